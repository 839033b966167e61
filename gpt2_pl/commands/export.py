"""export: a run's model as a folder that transformers or peft loads."""

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
    """Write RUN's best checkpoint in another program's format."""
    parser = CommandParser(plugins=True, prog="gpt2-pl export", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "--format",
        choices=("hf", "peft"),
        required=True,
        help="hf: the whole model with adapters merged, for transformers; peft: what was added to the base, for peft",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; it must not exist")
    parser.add_argument("--ckpt_path", type=Path, help="instead of RUN/checkpoints/best.ckpt")
    parser.add_argument("--base", help="where the base of an adapter checkpoint lies now, if it has moved")
    parser.add_argument("--backbone", action="store_true", help="leave the task's head out")
    given = parser.parse_args(args)
    require_absent(given.out)
    task = load(given.ckpt_path or best_checkpoint(given.run), given.base)
    with atomic_directory(given.out) as folder:
        if given.format == "hf":
            export_hf(task, folder, given.run, given.backbone)
        else:
            export_peft(task, folder, given.backbone)
    print(printable(f"{given.out}: {', '.join(sorted(path.name for path in given.out.iterdir()))}"))


def load(checkpoint: Path, base: str | None = None) -> Task:
    """The trained task of a checkpoint, whatever task it is, for evaluation on the CPU."""
    from gpt2_pl.tasks import Task
    from gpt2_pl.tasks.checkpoint import read

    content = read(checkpoint, "checkpoint", Task)
    if base is not None and content["base"].get("complete"):
        raise InputError(f"base: {checkpoint} holds every weight; leave --base out")
    moved = {} if base is None else {"base": base}
    try:
        cls: Any = Task.find(content["task"])
        return cls.load_from_checkpoint(checkpoint, map_location="cpu", **moved)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:  # values of other kinds than ours
        if describe_failure(error) is not None:  # no memory, not a fault of the checkpoint
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{checkpoint} does not hold what its task needs: {reason[:200]}") from error


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when all is written, and vanishes when that fails."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with reraise_disk_full(out):
            part.mkdir(parents=True)
            yield part
            part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def export_hf(task: Task, folder: Path, run: Path, backbone: bool = False) -> None:
    """Write the whole model for transformers, with its tokenizer, adapters merged.

    A classifier on the last token becomes ``GPT2ForSequenceClassification``; everything else a language model.

    Args:
        task: the trained task, which is changed.
        folder: where to write.
        run: the run's folder, which holds the tokenizer.
        backbone: leave the task's head out.

    Raises:
        InputError: a head or surgery that the format has no place for.
    """
    import torch

    from gpt2_pl import pretrained
    from gpt2_pl.surgery.base import merge
    from gpt2_pl.surgery.peft_format import fold_bias_into_ln_f

    gpt2 = task.backbone
    if gpt2.n_virtual:
        raise InputError(
            "a prefix or soft prompt cannot be merged into the weights; --format peft holds one, where nothing else "
            "was trained or added"
        )
    head = None if backbone else _head(task)
    merge(gpt2)
    end = _save_tokenizer(run, folder, gpt2.config.n_positions, gpt2.config.vocab_size)
    settings: dict[str, Any] = {} if end is None else {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    settings |= _provenance(run)
    if head is None:
        pretrained.save(gpt2, folder, settings=settings)
        return
    labels = _labels(task, head.linear.out_features)
    settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
    settings["label2id"] = {label: i for i, label in enumerate(labels)}
    with torch.no_grad():  # transformers' head has no bias
        gpt2.ln_f.bias.add_(fold_bias_into_ln_f(head.linear.weight, head.linear.bias))
    pretrained.save(gpt2, folder, score=head.linear.weight, settings=settings)


def _provenance(run: Path) -> dict[str, Any]:
    """What the folder says of the model's past: the base that its training began from, and what it took since."""
    from gpt2_pl.pretrained import PROVENANCE
    from gpt2_pl.utils.run_schema import check_metrics

    try:
        record = check_metrics(read_json(run / "metrics.json"), "metrics.json")
        base = record["base"]
        spent = {key: record[key] + base.get(key, 0.0) for key in ("seconds", "cpu_seconds")}
        origin = base.get("origin", base["digest"])
        recipe = "+".join(Path(file).stem for file in record["configs"]) or str(run.parent.name)
        return {} if origin is None else {PROVENANCE: {"origin": origin, "recipe": recipe, **spent}}
    except (InputError, KeyError, TypeError):
        return {}


def export_peft(task: Task, folder: Path, backbone: bool = False) -> None:
    """Write what was added to the base for peft; with ``backbone``, without the task's head."""
    from gpt2_pl.pretrained import weights_sha256
    from gpt2_pl.surgery import peft_format

    gpt2, otherwise = task.backbone, peft_format.other_format(task.backbone)
    if not task.base_is_frozen:
        raise InputError(f"the base itself was trained (train_base); an adapter would not hold that{otherwise}")
    head = None if backbone else _head(task)
    peft_format.save(gpt2, folder, task.base, head)
    if weights_sha256(gpt2) != task.base_digest:
        raise InputError(f"surgery changed the base's own weights; an adapter would not hold that{otherwise}")


def _head(task: Task) -> ClassificationHead | None:
    """Return the task's linear head; None if the task has no parameters besides the GPT-2's.

    Raises:
        InputError: a head that transformers does not have.
    """
    from gpt2_pl.heads import ClassificationHead

    head: Any = getattr(task, "head", None)
    is_ours = isinstance(head, ClassificationHead)
    kept = ("head.linear.weight", "head.linear.bias") if is_ours else ()
    if foreign := [name for name, _ in task.head_parameters() if name not in kept]:
        raise InputError(
            f"transformers has no place for {listing(foreign)}, the head of {class_path(type(task))}; --backbone "
            "leaves it out"
        )
    if is_ours and (pooling := getattr(task, "pooling", None)) != "last":
        raise InputError(
            f"transformers' classifier reads the last token; this one has pooling {pooling!r}; --backbone leaves the "
            "head out"
        )
    return head if is_ours else None


def _labels(task: Task, n: int) -> list[str]:
    """The class names that the model learned with, or numbers."""
    labels = (getattr(task, "prompt_spec", None) or {}).get("labels") or []
    return labels if len(labels) == n else [str(i) for i in range(n)]


def _save_tokenizer(run: Path, folder: Path, n_positions: int, vocab_size: int) -> int | None:
    """Copy the run's tokenizer; returns the id of its end of text, which also serves for padding."""
    from gpt2_pl.text.tokenizer import load_tokenizer, validate_vocab_size

    if not (run / "tokenizer.json").is_file():
        raise InputError(f"{run} has no tokenizer.json; runs of this library have one")
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
