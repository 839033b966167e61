"""Repeat the first steps of a run and check that the weights are bitwise equal to the recorded ones."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

from gpt2_pl.callbacks import RunSummary
from gpt2_pl.callbacks.weight_digests import WeightDigests, read_digests
from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.errors import InputError, RunError, printable
from gpt2_pl.experiments.run import Run
from gpt2_pl.utils.digests import first_difference, tensor_digests
from gpt2_pl.utils.trainer import find_callbacks

_DESCRIPTION = f"""{__doc__}

The checkpoints of the run are compared with the digests that they hold. The steps are repeated in a temporary folder,
with the settings, the seed and the number of threads of the run. Run the command in the same working directory.
"""

_CAUSES = ("code", "base.digest", "data.digests", "versions", "threads", "processes", "device", "precision", "seed")


class _Repeated(Exception):
    """End of the repeated steps."""


class _Repetition(WeightDigests):
    """Compares the weights after every recorded step, and ends training at the last or at the first difference.

    Args:
        expected: recorded digests by step.

    Attributes:
        difference: the step, the first name and the number of weights that differ; None so far.
        run_record: the record of the repeated run.
    """

    def __init__(self, expected: dict[int, dict[str, str]]) -> None:
        super().__init__()
        self.expected = expected
        self.difference: tuple[int, str, int] | None = None
        self.run_record: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Build the record of the repeated run, whose data and base are known now."""
        super().on_train_start(trainer, pl_module)
        self.run_record = find_callbacks(trainer, RunSummary)[0].build_record(trainer, pl_module)

    def record(self, trainer: Any, step: int, digests: dict[str, str]) -> None:
        """Compare the digests after a step."""
        self.steps[step] = digests
        if step in self.expected and (found := first_difference(self.expected[step], digests)) is not None:
            self.difference = (step, *found)
        if self.difference is not None or step >= max(self.expected):
            raise _Repeated


def main(args: list[str]) -> None:
    """Run ``gpt2-pl verify``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: an argument is invalid, or the run has no record of its weights.
        RunError: something differs; the message names the step and the first weight.
    """
    parser = CommandParser(prog="gpt2-pl verify", description=_DESCRIPTION)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("--steps", default="10", metavar="N|all", help="largest number of optimizer steps to repeat")
    options = parser.parse_args(args)
    run = Run.read(options.run)
    expected = _select(read_digests(options.run)[0], options.steps)
    checked = [name for name in ("best.ckpt", "last.ckpt") if _check_checkpoint(options.run / "checkpoints" / name)]
    if checked:
        print(f"{', '.join(checked)}: all weights equal their digests", flush=True)
    repetition = _repeat(run, expected)
    for change in _changes(run.record, repetition.run_record):
        print(printable(f"changed: {change}"))
    done = [step for step in expected if step in repetition.steps]
    if repetition.difference is not None:
        step, name, count = repetition.difference
        total = len(expected[step])
        raise RunError(f"{options.run}: step {step}: {name} is the first of {count} weights (of {total}) that differ")
    if len(done) < len(expected):
        raise RunError(f"{options.run}: training ended after {max(done, default=0)} of {max(expected)} recorded steps")
    weights = next(iter(expected.values()))
    steps = ", ".join(map(str, done))
    print(printable(f"{options.run}: bitwise equal after steps {steps} ({len(weights)} weights)"))


def _select(recorded: dict[int, dict[str, str]], steps: str) -> dict[int, dict[str, str]]:
    """Return the recorded digests of the steps to repeat.

    Raises:
        InputError: ``steps`` is neither a positive number nor ``all``, or none of these steps is recorded.
    """
    if steps == "all":
        limit = max(recorded, default=0)
    elif steps.isascii() and steps.isdigit() and int(steps[:19]) > 0:
        limit = int(steps[:19])
    else:
        raise InputError(key="steps", value=steps, expected="a number of at least 1, or all")
    chosen = {step: digests for step, digests in recorded.items() if step <= limit}
    if not chosen:
        first = min(recorded, default=None)
        message = f"steps: the first recorded step is {first}, got {steps}" if first else "steps: no step is recorded"
        raise InputError(message, key="steps", value=steps)
    return chosen


def _check_checkpoint(file: Path) -> bool:
    """Compare the weights of a checkpoint with its digests; return whether there are any.

    Raises:
        RunError: a weight differs.
    """
    from gpt2_pl.tasks import Task
    from gpt2_pl.tasks.checkpoint import read

    if not file.is_file():
        return False
    checkpoint = read(file, "RUN", Task)
    recorded = checkpoint.get("digests")
    if not recorded:
        return False
    difference = first_difference(recorded, tensor_digests(checkpoint["state_dict"]))
    if difference is not None:
        name, count = difference
        raise RunError(f"{file}: {name} is the first of {count} weights that differ from their digests in the file")
    return True


def _repeat(run: Run, expected: dict[int, dict[str, str]]) -> _Repetition:
    """Repeat the steps of a run in a temporary folder and compare."""
    import torch

    from gpt2_pl.commands import filter_messages, quiet_lightning
    from gpt2_pl.commands.lightning_cli import GPT2CLI

    filter_messages()
    if threads := run.record.get("threads"):
        torch.set_num_threads(threads)
    repetition = _Repetition(expected)
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "trainer.default_root_dir": folder,
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "name": "verify",
            "version": "null",
            "ckpt_path": "null",
        }
        arguments = ["fit", "--config", str(run.folder / "config.yaml")]
        arguments += [text for key, value in flags.items() for text in (f"--{key}", value)]
        with quiet_lightning(), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(_Repeated):
            GPT2CLI(arguments, digests=repetition)
    return repetition


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between two run records among what decides the weights, as ``KEY: BEFORE, now NOW``."""
    changes = []
    for key in _CAUSES:
        old, new = (_get(record, key) for record in (before, now))
        if isinstance(old, dict) and isinstance(new, dict):
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            changes += [f"{key}.{name}: {old.get(name)}, now {new.get(name)}" for name in names]
        elif old != new:
            changes.append(f"{key}: {old}, now {new}")
    return changes


def _get(record: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key in nested mappings, or None."""
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
