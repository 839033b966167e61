"""Convert the model of a run to a folder that transformers or peft can load."""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.support import hub
from gpt2_pl.commands.support.exported_task import (
    class_names,
    decision_threshold,
    read_record,
    task_decoding,
    task_head,
    task_pooling,
    task_prompt,
    task_settings,
)
from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.commands.support.terminal import Progress
from gpt2_pl.commands.support.trained_model import load_task
from gpt2_pl.errors import InputError, listing, printable, require
from gpt2_pl.filesystem import atomic_write, require_absent, reraise_disk_full
from gpt2_pl.inference.loading import load_run_tokenizer
from gpt2_pl.text.tokenizer import END_OF_TEXT
from gpt2_pl.utils.registry import class_path

if TYPE_CHECKING:
    from gpt2_pl.tasks import Task

POOLED_CODE = "modeling_gpt2_pooled.py"
"""File with the class of a model whose pooling transformers does not have; it is copied to the output folder."""


def main(args: list[str]) -> None:
    """Run ``gpt2-pl export``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: an argument or the checkpoint is invalid, or the format cannot represent the model.
        RunError: the model cannot be uploaded; the folder is complete.
    """
    options = _parse_arguments(args)
    require_absent(options.out)
    if options.push_to_hub is not None:
        hub.check(options.push_to_hub)
    with Progress("Loading the checkpoint", total=3) as progress:
        task, checkpoint = load_task(options)
        progress.advance(description="Writing the model")
        with atomic_directory(options.out) as folder:
            if options.format == "hf":
                export_hf(task, folder, options.run, options.backbone)
            else:
                export_peft(task, folder, options.backbone, options.run)
            progress.advance(description="Writing the model card")
            _write_card(task, folder, checkpoint, options)
    print(printable(f"{options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}"))
    if options.push_to_hub is not None:
        print(hub.push(options.out, options.push_to_hub, options.private))


def _parse_arguments(args: list[str]) -> Namespace:
    parser = CommandParser(prog="gpt2-pl export", description=__doc__)
    parser.add_run()
    format_help = "hf: the complete model with merged adapters, for transformers; peft: the adapter without the base"
    parser.add_argument("--format", choices=("hf", "peft"), required=True, help=format_help)
    parser.add_output("FOLDER", "output folder")
    parser.add_argument("--backbone", action="store_true", help="omit the head of the task")
    parser.add_argument(
        "--license", metavar="ID", help="licence in the model card, an identifier of the hub such as mit"
    )
    hub_help = (
        "also upload the folder to this repository of the Hugging Face hub, which is created if it does not exist"
    )
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help=hub_help)
    parser.add_argument(
        "--private", action="store_true", help="create the repository of --push_to_hub as a private one"
    )
    options = parser.parse_args(args)
    is_valid = options.license is None or re.fullmatch(r"[a-z0-9][a-z0-9.-]*", options.license) is not None
    require(is_valid, "license", options.license, "an identifier of the hub, such as mit or apache-2.0")
    if options.private and options.push_to_hub is None:
        raise InputError(key="private", value=True, expected="used with --push_to_hub")
    return options


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

    A classifier or regressor on the last token becomes a ``GPT2ForSequenceClassification``; with another pooling it
    becomes a class of the file :data:`POOLED_CODE`, which is added. Any other model becomes a ``GPT2LMHeadModel``.

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
    settings: dict[str, Any] = {**special, **_provenance(run), **task_settings(task, head, run)}
    if head is None:
        pretrained.save(gpt2, folder, settings=settings)
        return
    weight, bias = head.linear.weight, head.linear.bias
    if task_pooling(task) == "last":
        with torch.no_grad():  # the head of transformers has no bias
            gpt2.ln_f.bias.add_(fold_bias_into_ln_f(weight, bias))
        pretrained.save(gpt2, folder, score=weight, settings=settings)
        return
    code = resources.files("gpt2_pl.commands.support").joinpath(POOLED_CODE).read_text(encoding="utf-8")
    with atomic_write(folder / POOLED_CODE) as file:
        file.write(code)
    module = POOLED_CODE.removesuffix(".py")
    settings |= {
        "model_type": "gpt2_pooled",
        "architectures": ["PooledGPT2ForSequenceClassification"],
        "auto_map": {
            "AutoConfig": f"{module}.PooledGPT2Config",
            "AutoModelForSequenceClassification": f"{module}.PooledGPT2ForSequenceClassification",
        },
        "pooling": task_pooling(task),
        "mean_weight": getattr(task, "mean_weight", 0.0),
    }
    pretrained.save(gpt2, folder, score=weight, score_bias=bias, settings=settings)


def _write_card(task: Task, folder: Path, checkpoint: Path, options: Namespace) -> None:
    """Write the model card, README.md."""
    from gpt2_pl.commands.support.model_card import ExportedModel, ModelCard
    from gpt2_pl.experiments.run import Run

    head = None if options.backbone else task_head(task)
    prompt, base = task_prompt(task, head, options.run), read_record(options.run).get("base") or {}
    code = POOLED_CODE if (folder / POOLED_CODE).exists() else None
    model = ExportedModel(
        name=options.push_to_hub or options.out.name,
        library="peft" if options.format == "peft" else "transformers",
        task=type(task).__name__,
        num_parameters=sum(parameter.numel() for parameter in task.parameters()),
        labels=class_names(task, head),
        template=prompt.get("template"),
        target=prompt.get("target"),
        normalize=prompt.get("normalize", ()),
        prompt_lines=prompt.get("prompt_lines") if head is None else None,
        decoding=task_decoding(task) if head is None else {},
        n_positions=task.max_length,
        max_length=prompt.get("max_length"),
        threshold=None if head is None else decision_threshold(task),
        code=code,
        base=task.base or base.get("path"),
        hub_base=base.get("hub_id"),
    )
    run = None
    with suppress(InputError):  # a run without a readable record
        run = Run.read(options.run)
    best = options.run / "checkpoints" / "best.ckpt"
    is_best = best.exists() and checkpoint.samefile(best)
    card = ModelCard(model, run, is_best, options.license)
    with atomic_write(folder / "README.md") as file:
        file.write(card.render(options.push_to_hub or "."))


def _provenance(run: Path) -> dict[str, Any]:
    """Return the origin of a model: its pretrained base, the recipe and the total time, or {} without a run record."""
    from gpt2_pl.pretrained import PROVENANCE

    record = read_record(run)
    try:
        base = record["base"]
        times = {key: record[key] + base.get(key, 0.0) for key in ("seconds", "cpu_seconds")}
        origin = base.get("origin", base["digest"])
        recipe = "+".join(Path(file).stem for file in record["configs"]) or str(run.parent.name)
        return {} if origin is None else {PROVENANCE: {"origin": origin, "recipe": recipe, **times}}
    except (KeyError, TypeError):
        return {}


def export_peft(task: Task, folder: Path, backbone: bool = False, run: Path | None = None) -> None:
    """Write the adapter of a model for peft, and of a run also its tokenizer and ``task.json`` with its classes.

    Args:
        task: the trained task.
        folder: output folder.
        backbone: whether to omit the head of the task.
        run: folder of the run, which contains the tokenizer; None for the adapter alone.

    Raises:
        InputError: the format cannot represent the head or the adapter, or weights of the base have changed.
    """
    import torch

    from gpt2_pl import pretrained
    from gpt2_pl.surgery import peft_format

    gpt2 = task.backbone
    _, stored = peft_format.find_kind(gpt2)
    head = None if backbone else task_head(task)
    if head is not None and task_pooling(task) != "last":
        expected = "'last', as in the classifier that peft adapts"
        message = f"pooling must be {expected}, got {task_pooling(task)!r}; omit the head with --backbone"
        raise InputError(message, key="pooling", value=task_pooling(task), expected=expected)
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
    if run is not None:
        _save_tokenizer(run, folder, gpt2.config.n_positions, gpt2.config.vocab_size)
        settings = task_settings(task, head, run)
        num_labels = {} if head is None else {"num_labels": head.linear.out_features}
        with atomic_write(folder / "task.json") as file:
            content = {"task": class_path(type(task)), **num_labels, **settings}
            file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


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
