"""Convert the model of a run to a folder that transformers or peft can load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.commands.support.trained_model import load_run_tokenizer, load_task
from gpt2_pl.errors import InputError, listing, printable
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
    parser = CommandParser(prog="gpt2-pl export", description=__doc__)
    parser.add_run()
    parser.add_argument(
        "--format",
        choices=("hf", "peft"),
        required=True,
        help="hf: the complete model with merged adapters, for transformers; peft: the adapter without the base model",
    )
    parser.add_output("FOLDER", "output folder")
    parser.add_argument("--backbone", action="store_true", help="omit the head of the task")
    options = parser.parse_args(args)
    require_absent(options.out)
    task, _ = load_task(options)
    with atomic_directory(options.out) as folder:
        if options.format == "hf":
            export_hf(task, folder, options.run, options.backbone)
        else:
            export_peft(task, folder, options.backbone)
    print(printable(f"{options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}"))


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
            "nothing else was trained or added",
            key="format",
        )
    head = None if backbone else task_head(task)
    merge(gpt2)
    end = _save_tokenizer(run, folder, gpt2.config.n_positions, gpt2.config.vocab_size)
    special = {} if end is None else dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    settings: dict[str, Any] = {**special, **_provenance(run)}
    if head is None:
        pretrained.save(gpt2, folder, settings=settings)
        return
    n_classes = head.linear.out_features
    labels = (task.prompt_spec or {}).get("labels") or []
    if len(labels) != n_classes:
        labels = [str(i) for i in range(n_classes)]
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
    import torch

    from gpt2_pl import pretrained
    from gpt2_pl.surgery import peft_format

    gpt2 = task.backbone
    _, stored = peft_format.find_kind(gpt2)
    head = None if backbone else task_head(task)
    if task.base is None:
        raise InputError("a peft adapter must have a pretrained base, which this run does not have; use --format hf")
    base = pretrained.load(task.base).state_dict()
    state = gpt2.state_dict()
    if changed := [n for n in (gpt2.base_names & state.keys()) - stored if not torch.equal(state[n], base[n])]:
        alternative = peft_format.other_format(gpt2)
        raise InputError(
            f"surgery changed {listing(changed)}, weights of the base, which peft's format cannot store{alternative}"
        )
    peft_format.save(gpt2, folder, task.base, head)


def task_head(task: Task) -> ClassificationHead | None:
    """Return the linear head of a task, or None if only the backbone has parameters.

    Raises:
        InputError: transformers has no such head.
    """
    from gpt2_pl.heads import ClassificationHead

    head: Any = getattr(task, "head", None)
    is_linear = isinstance(head, ClassificationHead)
    supported = ("head.linear.weight", "head.linear.bias") if is_linear else ()
    if unsupported := [name for name, _ in task.head_parameters() if name not in supported]:
        what = f"{listing(unsupported)}, the head of {class_path(type(task))}"
        raise InputError(f"transformers does not support {what}; omit it with --backbone", key="backbone")
    if is_linear and (pooling := getattr(task, "pooling", None)) != "last":
        expected = "'last', as in the classifier of transformers"
        message = f"pooling must be {expected}, got {pooling!r}; omit the head with --backbone"
        raise InputError(message, key="pooling", value=pooling, expected=expected)
    return head if is_linear else None


def _save_tokenizer(run: Path, folder: Path, n_positions: int, vocab_size: int) -> int | None:
    """Write the tokenizer of a run for transformers.

    Returns:
        The id of ``<|endoftext|>``, which is the padding token as well; None if the tokenizer does not have it.

    Raises:
        InputError: the run has no tokenizer, or its vocabulary is larger than that of the model.
    """
    tokenizer = load_run_tokenizer(run, vocab_size)
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True))
    end = tokenizer.token_to_id(END_OF_TEXT)
    special = {} if end is None else dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": n_positions, **special}
    with atomic_write(folder / "tokenizer_config.json") as file:
        file.write(json.dumps(settings, indent=2) + "\n")
    return end
