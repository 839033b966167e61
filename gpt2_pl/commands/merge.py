"""Merge LoRA adapters of one base into one: a linear combination of their changes, such as "A + 0.5*B - C"."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.export import atomic_directory
from gpt2_pl.commands.support.exported_task import task_head, task_pooling
from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.commands.support.plugins import import_plugin
from gpt2_pl.commands.support.trained_model import load_task
from gpt2_pl.errors import InputError, printable, require
from gpt2_pl.filesystem import require_absent
from gpt2_pl.utils.yaml_json import read_json

if TYPE_CHECKING:
    from gpt2_pl.heads import ClassificationHead
    from gpt2_pl.model import GPT2
    from gpt2_pl.surgery.merging import LowRank

_PEFT_CONFIG = "adapter_config.json"
_DESCRIPTION = f"""{__doc__}

An adapter is a run folder, or a folder in peft's format. The output is a folder in peft's format, which
gpt2_pl.surgery.PeftAdapter and peft load.
"""


@dataclass
class _Adapter:
    """LoRA adapter with its base.

    Args:
        model: the GPT-2 with the adapter.
        base: path or hub id of the base.
        digest: digest of the weights of the base.
        head: classification head; None without one that peft's format can store.
    """

    model: GPT2
    base: str
    digest: str
    head: ClassificationHead | None


def main(args: list[str]) -> None:
    """Run ``gpt2-pl merge``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: an argument is invalid, an adapter cannot be loaded or is no LoRA, or the bases differ.
    """
    options = _parse_arguments(args)
    from gpt2_pl import pretrained
    from gpt2_pl.surgery import peft_format
    from gpt2_pl.surgery.merging import lora_changes, merge_adapters, parse_combination

    terms = parse_combination(options.expression)
    names = [term.adapter for term in terms]
    if options.head not in (None, *names):
        raise InputError(key="head", value=options.head, expected=f"one of the adapters: {', '.join(names)}")
    require_absent(options.out)
    for module in options.plugin or ():
        import_plugin(module)
    changes: list[tuple[float, dict[str, LowRank]]] = []
    first: _Adapter | None = None
    head: ClassificationHead | None = None
    for coefficient, name in terms:
        adapter = _load(name, options.base, needs_head=name == options.head)
        first = first or adapter
        if adapter.digest != first.digest:
            found = f"{adapter.base} (digest {adapter.digest[:12]}) and {first.base} (digest {first.digest[:12]})"
            raise InputError(f"{name} and {names[0]} have different bases, {found}; adapters of one base can be merged")
        changes.append((coefficient, lora_changes(adapter.model, name)))
        head = adapter.head if name == options.head else head
    assert first is not None
    model = pretrained.load(first.base)
    kept = merge_adapters(model, changes, options.rank)
    with atomic_directory(options.out) as folder:
        peft_format.save(model, folder, first.base, head)
    print(printable(f"{options.out}: {len(terms)} adapters; the rank keeps {kept:.2%} of the squared norm"))


def _parse_arguments(args: list[str]) -> Namespace:
    parser = CommandParser(prog="gpt2-pl merge", description=_DESCRIPTION)
    expression_help = "adapters with coefficients: run folders or folders of peft, and + and - with blanks around them"
    parser.add_argument("expression", metavar="EXPRESSION", help=expression_help)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="output folder; it must not exist")
    rank_help = "largest rank of the adapter of a weight (default: the largest rank of the adapters)"
    parser.add_argument("--rank", type=int, metavar="R", help=rank_help)
    head_help = "the adapter whose classification head is stored with the merged adapter (default: none)"
    parser.add_argument("--head", metavar="ADAPTER", help=head_help)
    base_help = "path or hub id of the base (default: the one that an adapter names)"
    parser.add_argument("--base", help=base_help)
    plugin_help = "module with the task of a run; can be given several times"
    parser.add_argument("--plugin", metavar="MODULE", action="append", help=plugin_help)
    options = parser.parse_args(args)
    require(options.rank is None or options.rank >= 1, "rank", options.rank, "at least 1")
    return options


def _load(name: str, base: str | None, needs_head: bool) -> _Adapter:
    """Load the adapter of a run or of a folder in peft's format.

    Raises:
        InputError: there is no such adapter, its base has been trained or is missing, or it has no head.
    """
    folder = Path(name).expanduser()
    load = _load_peft if (folder / _PEFT_CONFIG).is_file() else _load_run
    adapter = load(folder, base, needs_head)
    if needs_head and adapter.head is None:
        raise InputError(f"head: {name} has no linear head on the last token", key="head", value=name)
    return adapter


def _load_run(folder: Path, base: str | None, needs_head: bool) -> _Adapter:
    from gpt2_pl.pretrained import weights_sha256

    options = Namespace(run=folder, ckpt_path=None, base=base, plugin=None)
    task: Any = load_task(options)[0]
    if task.base is None or not task.base_is_frozen or weights_sha256(task.backbone) != task.base_digest:
        raise InputError(f"{folder} has trained weights of its base; only adapters of a frozen base can be merged")
    head = task_head(task) if needs_head and task_pooling(task) == "last" else None
    return _Adapter(task.backbone, task.base, task.base_digest, head)


def _load_peft(folder: Path, base: str | None, needs_head: bool) -> _Adapter:
    from gpt2_pl import pretrained
    from gpt2_pl.filesystem import resolve_checkpoint_dir
    from gpt2_pl.surgery import PeftAdapter

    config = read_json(folder / _PEFT_CONFIG)
    base = base or (config.get("base_model_name_or_path") if isinstance(config, dict) else None)
    if not isinstance(base, str):
        raise InputError(f"{folder / _PEFT_CONFIG} names no base; give it with --base", key="base")
    model = pretrained.load(resolve_checkpoint_dir(base, "base"))
    adapter, digest = PeftAdapter(str(folder)), pretrained.weights_sha256(model)
    adapter.apply(model)
    return _Adapter(model, base, digest, adapter.stored_head() if needs_head else None)
