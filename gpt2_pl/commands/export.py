"""Convert the model of a run to a folder that transformers or peft can load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.support.parser import CommandParser, best_checkpoint
from gpt2_pl.errors import InputError, describe_failure, listing, printable
from gpt2_pl.filesystem import atomic_write, require_absent, reraise_disk_full
from gpt2_pl.text.tokenizer import END_OF_TEXT
from gpt2_pl.utils.registry import class_path
from gpt2_pl.utils.yaml_json import read_json

if TYPE_CHECKING:
    from gpt2_pl.heads import ClassificationHead
    from gpt2_pl.tasks import Task


def main(args: list[str]) -> None:
    """Run ``gpt2-pl export``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: an argument or the checkpoint is invalid, or the format cannot represent the model.
    """
    parser = CommandParser(plugins=True, prog="gpt2-pl export", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument(
        "--format",
        choices=("hf", "peft"),
        required=True,
        help="hf: the complete model with merged adapters, for transformers; peft: the adapter without the base model",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="output folder; it must not exist")
    parser.add_argument("--ckpt_path", type=Path, metavar="FILE", help="checkpoint (default: that of the best epoch)")
    parser.add_argument("--base", help="new path or hub id of the pretrained base, if it has moved since training")
    parser.add_argument("--backbone", action="store_true", help="omit the head of the task")
    options = parser.parse_args(args)
    require_absent(options.out)
    task = load(options.ckpt_path or best_checkpoint(options.run), options.base)
    with atomic_directory(options.out) as folder:
        if options.format == "hf":
            export_hf(task, folder, options.run, options.backbone)
        else:
            export_peft(task, folder, options.backbone)
    print(printable(f"{options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}"))


def load(checkpoint: Path, base: str | None = None) -> Task:
    """Load the trained task of a checkpoint on the CPU.

    Args:
        checkpoint: path of the checkpoint, of any task.
        base: path or hub id of the pretrained base; defaults to the one that the checkpoint names.

    Returns:
        The task.

    Raises:
        InputError: the checkpoint cannot be loaded, or ``base`` is given for a checkpoint with all weights.
    """
    from gpt2_pl.tasks import Task
    from gpt2_pl.tasks.checkpoint import read

    content = read(checkpoint, "checkpoint", Task)
    if base is not None and content["base"].get("complete"):
        raise InputError(f"base: {checkpoint} contains all weights; omit --base")
    overrides = {} if base is None else {"base": base}
    try:
        cls: Any = Task.find(content["task"])
        return cls.load_from_checkpoint(checkpoint, map_location="cpu", **overrides)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:  # values of unexpected types
        if describe_failure(error) is not None:  # for example, out of memory
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{checkpoint} is not valid for its task: {reason[:200]}") from error


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Provide a temporary folder that is renamed to ``out`` on success and removed on failure.

    Args:
        out: folder to create; it must not exist.

    Yields:
        The temporary folder, which has the same parent as ``out``.

    Raises:
        RunError: the disk is full.
    """
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with reraise_disk_full(out):
            temporary.mkdir(parents=True)
            yield temporary
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export_hf(task: Task, folder: Path, run: Path, backbone: bool = False) -> None:
    """Write the complete model with merged adapters, and its tokenizer, for transformers.

    A classifier on the last token becomes a ``GPT2ForSequenceClassification``, any other model a ``GPT2LMHeadModel``.

    Args:
        task: the trained task, which is modified.
        folder: output folder.
        run: folder of the run, which contains the tokenizer.
        backbone: whether to omit the head of the task.

    Raises:
        InputError: the format cannot represent the head or an adapter.
    """
    import torch

    from gpt2_pl import pretrained
    from gpt2_pl.surgery.base import merge
    from gpt2_pl.surgery.peft_format import fold_bias_into_ln_f

    gpt2 = task.backbone
    if gpt2.n_virtual:
        raise InputError(
            "a prefix or soft prompt cannot be merged into the weights; use --format peft, which supports it if "
            "nothing else was trained or added"
        )
    head = None if backbone else _head(task)
    merge(gpt2)
    end = _save_tokenizer(run, folder, gpt2.config.n_positions, gpt2.config.vocab_size)
    settings: dict[str, Any] = {}
    if end is not None:
        settings |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    settings |= _provenance(run)
    if head is None:
        pretrained.save(gpt2, folder, settings=settings)
        return
    labels = _labels(task, head.linear.out_features)
    settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
    settings["label2id"] = {label: i for i, label in enumerate(labels)}
    with torch.no_grad():  # the head of transformers has no bias
        gpt2.ln_f.bias.add_(fold_bias_into_ln_f(head.linear.weight, head.linear.bias))
    pretrained.save(gpt2, folder, score=head.linear.weight, settings=settings)


def _provenance(run: Path) -> dict[str, Any]:
    """Return the origin of a model: its pretrained base, the recipe and the total time, or {} without a run record."""
    from gpt2_pl.pretrained import PROVENANCE
    from gpt2_pl.utils.run_schema import check_metrics

    try:
        record = check_metrics(read_json(run / "metrics.json"), "metrics.json")
        base = record["base"]
        times = {key: record[key] + base.get(key, 0.0) for key in ("seconds", "cpu_seconds")}
        origin = base.get("origin", base["digest"])
        recipe = "+".join(Path(file).stem for file in record["configs"]) or str(run.parent.name)
        return {} if origin is None else {PROVENANCE: {"origin": origin, "recipe": recipe, **times}}
    except (InputError, KeyError, TypeError):
        return {}


def export_peft(task: Task, folder: Path, backbone: bool = False) -> None:
    """Write the adapter of a model for peft.

    Args:
        task: the trained task.
        folder: output folder.
        backbone: whether to omit the head of the task.

    Raises:
        InputError: the format cannot represent the head or the adapter, or weights of the base have changed.
    """
    from gpt2_pl.pretrained import weights_sha256
    from gpt2_pl.surgery import peft_format

    gpt2, alternative = task.backbone, peft_format.other_format(task.backbone)
    if not task.base_is_frozen:
        raise InputError(f"the base was trained (train_base); an adapter cannot contain its weights{alternative}")
    head = None if backbone else _head(task)
    peft_format.save(gpt2, folder, task.base, head)
    if weights_sha256(gpt2) != task.base_digest:
        raise InputError(f"surgery changed weights of the base; an adapter cannot contain them{alternative}")


def _head(task: Task) -> ClassificationHead | None:
    """Return the linear head of a task, or None if only the backbone has parameters.

    Raises:
        InputError: transformers has no such head.
    """
    from gpt2_pl.heads import ClassificationHead

    head: Any = getattr(task, "head", None)
    is_linear = isinstance(head, ClassificationHead)
    supported = ("head.linear.weight", "head.linear.bias") if is_linear else ()
    if unsupported := [name for name, _ in task.head_parameters() if name not in supported]:
        raise InputError(
            f"transformers does not support {listing(unsupported)}, the head of {class_path(type(task))}; omit it "
            "with --backbone"
        )
    if is_linear and (pooling := getattr(task, "pooling", None)) != "last":
        raise InputError(
            f"pooling must be 'last', as in the classifier of transformers, got {pooling!r}; omit the head with "
            "--backbone"
        )
    return head if is_linear else None


def _labels(task: Task, n: int) -> list[str]:
    """Return the ``n`` class names of the training data, or the class indices as text."""
    labels = (getattr(task, "prompt_spec", None) or {}).get("labels") or []
    return labels if len(labels) == n else [str(i) for i in range(n)]


def _save_tokenizer(run: Path, folder: Path, n_positions: int, vocab_size: int) -> int | None:
    """Write the tokenizer of a run for transformers.

    Returns:
        The id of ``<|endoftext|>``, which is the padding token as well; None if the tokenizer does not have it.

    Raises:
        InputError: the run has no tokenizer, or its vocabulary is larger than that of the model.
    """
    from gpt2_pl.text.tokenizer import load_tokenizer, validate_vocab_size

    if not (run / "tokenizer.json").is_file():
        raise InputError(f"RUN must contain tokenizer.json, as every run of this library does, got {run}")
    tokenizer = load_tokenizer(run, "RUN")
    validate_vocab_size(tokenizer, vocab_size, "the model", "RUN's tokenizer.json")
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True))
    end = tokenizer.token_to_id(END_OF_TEXT)
    special = {} if end is None else dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": n_positions, **special}
    with atomic_write(folder / "tokenizer_config.json") as file:
        file.write(json.dumps(settings, indent=2) + "\n")
    return end
