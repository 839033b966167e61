"""A run of a sweep: its command, its record and its state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_pl.configs import config_path
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.run import RUNS
from gpt2_pl.utils.yaml_json import read_json

_DIGEST_LENGTH = 64  # hexadecimal digits of SHA-256


@dataclass(frozen=True)
class SweepRun:
    """Run of a sweep: its name, configuration files and flags.

    Args:
        sweep: folder of the sweep below ``lightning_logs``.
        task: name of the task in the sweep file.
        strategy: name of the strategy.
        version: name of the run's folder, such as ``seed_1``.
        files: configuration files.
        flags: flags, which override the files.
        base: pretraining run; this run starts from its exported model.
        exported: whether the model is exported into the run's folder, as the base of other runs.
        levels: factor and level of each factor, in a factorial design.
    """

    sweep: str
    task: str
    strategy: str
    version: str
    files: tuple[str, ...]
    flags: tuple[str, ...]
    base: SweepRun | None = None
    exported: bool = False
    levels: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Value of ``--name``."""
        return f"{self.sweep}/{self.task}/{self.strategy}"

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return RUNS / self.name / self.version

    def command(self) -> list[str]:
        """Return the arguments of ``gpt2-pl`` that start the run."""
        base = [] if self.base is None else [f"--model.base={self.base.folder / 'exported'}"]
        files = [f"--config={file}" for file in self.files]
        return ["fit", *files, *self.flags, *base, f"--name={self.name}", f"--version={self.version}"]

    def record(self) -> dict[str, Any]:
        """Return digests of the configuration files and the flags; runs with equal records are equal."""
        return {
            "files": {path: hashlib.sha256(config_path(path).read_bytes()).hexdigest() for path in self.files},
            "flags": {  # the last of repeated flags applies
                name: value for name, _, value in (flag.removeprefix("--").partition("=") for flag in self.flags)
            },
            "base": None if self.base is None else self.base.record(),
        }

    def metrics(self) -> dict[str, Any]:
        """Return the current content of ``metrics.json``, or {} before the end of the first epoch.

        Raises:
            InputError: the file is invalid.
        """
        file = self.folder / "metrics.json"
        if not file.is_file():
            return {}
        from gpt2_pl.utils.run_schema import check_metrics

        with self._hint():
            return check_metrics(read_json(file), str(file))

    def saved_record(self) -> dict[str, Any]:
        """Return the :meth:`record` with which the run was started, and its number of ``threads``.

        Raises:
            InputError: the file is missing or invalid.
        """
        file = self.folder / "sweep.json"
        if not file.is_file():
            raise InputError(f"{self.folder} is not a run of this sweep; give the sweep another name")
        from gpt2_pl.utils.run_schema import SweepRecord
        from gpt2_pl.utils.schema import validate

        with self._hint():
            return validate(SweepRecord, read_json(file), str(file)).model_dump()

    @contextmanager
    def _hint(self) -> Iterator[None]:
        """Append the remedy to errors of invalid files."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{error}; delete {self.folder}", key=error.key) from None

    @property
    def last(self) -> Path:
        """Checkpoint from which the run is resumed."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def finished(self) -> bool:
        """Whether the run has ended successfully and its model is exported if required."""
        exported = not self.exported or (self.folder / "exported").is_dir()
        return exported and self.metrics().get("status") == "finished"

    def check(self) -> None:
        """Check that the folder does not contain a run with other settings; a run without a checkpoint is ignored.

        Raises:
            InputError: it does; the message names the folder and the settings.
        """
        if self.base is not None:
            self.base.check()
        if not self.last.is_file() and self.metrics().get("status") != "finished":
            return
        saved, current = self.saved_record(), self.record()
        changes = [change for part in ("flags", "files") for change in _describe_changes(saved[part], current[part])]
        if saved["base"] != current["base"]:
            changes.append("its base has changed")
        if changes:
            remedy = "delete it, or rename the strategy or the sweep"
            raise InputError(f"{self.folder} was run with other settings ({'; '.join(changes)}); {remedy}")


def _describe_changes(saved: dict[str, str], current: dict[str, str]) -> list[str]:
    """Describe each name whose value has changed; values of files are digests, which are omitted."""
    changes = []
    for name in sorted(saved.keys() | current.keys()):
        before, after = saved.get(name), current.get(name)
        if before == after:
            continue
        if before is None or after is None:
            changes.append(f"{name} was {'added' if before is None else 'removed'}")
        elif len(before) == len(after) == _DIGEST_LENGTH:
            changes.append(f"{name} has changed")
        else:
            changes.append(f"{name} was {before!r} and is {after!r}")
    return changes
