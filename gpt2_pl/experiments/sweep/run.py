"""One run of a sweep: how it is made, and how far it is."""

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


@dataclass(frozen=True)
class SweepRun:
    """One run: what it is called, and the flags that make it.

    Args:
        sweep: the sweep's folder below ``lightning_logs``.
        task: the task's name in the file.
        strategy: the strategy's.
        version: the run's own folder, such as ``seed_1``.
        files: its configuration files.
        flags: those over them.
        base: a run whose model this one starts from, exported; it is made first.
        exported: whether the model is exported into the run's folder, for others to start from.
    """

    sweep: str
    task: str
    strategy: str
    version: str
    files: tuple[str, ...]
    flags: tuple[str, ...]
    base: SweepRun | None = None
    exported: bool = False

    @property
    def name(self) -> str:
        """What ``--name`` is given."""
        return f"{self.sweep}/{self.task}/{self.strategy}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return RUNS / self.name / self.version

    def command(self) -> list[str]:
        """The arguments of the command line, from the beginning."""
        base = [] if self.base is None else [f"--model.base={self.base.folder / 'exported'}"]
        files = [f"--config={file}" for file in self.files]
        return ["fit", *files, *self.flags, *base, f"--name={self.name}", f"--version={self.version}"]

    def record(self) -> dict[str, Any]:
        """What the run is made of: flags, and the content of configuration files. Runs of equal records are equal."""
        return {
            "files": {path: hashlib.sha256(config_path(path).read_bytes()).hexdigest() for path in self.files},
            "flags": dict(_parts(flag) for flag in self.flags),  # of one given twice, the last counts
            "base": None if self.base is None else self.base.record(),
        }

    def metrics(self) -> dict[str, Any]:
        """The run's ``metrics.json`` as it stands; empty before its first epoch.

        Raises:
            InputError: it is broken.
        """
        file = self.folder / "metrics.json"
        if not file.is_file():
            return {}
        from gpt2_pl.utils.run_schema import check_metrics

        with self._hint():
            return check_metrics(read_json(file), str(file))

    def begun(self) -> dict[str, Any]:
        """What the run was begun with: :meth:`record`, and the number of ``threads``.

        Raises:
            InputError: there is no such record, or it is broken.
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
        """Say in errors of broken files what to do about them."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{error}; delete {self.folder}") from None

    @property
    def last(self) -> Path:
        """The checkpoint that the run goes on from."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        exported = not self.exported or (self.folder / "exported").is_dir()
        return exported and self.metrics().get("status") == "finished"

    def check(self) -> None:
        """Refuse a folder that holds a run with other settings; what broke off before its first checkpoint is none.

        Raises:
            InputError: naming the folder and the setting.
        """
        if self.base is not None:
            self.base.check()
        if not self.last.is_file() and self.metrics().get("status") != "finished":
            return
        then, now = self.begun(), self.record()
        what = [
            f"{name} was {before} and is {after}"
            for part in ("flags", "files")
            for name, before, after in _changes(then[part], now[part])
        ]
        if then["base"] != now["base"]:
            what.append("its base has changed")
        if what:
            raise InputError(
                f"{self.folder} was run with other settings ({'; '.join(what)}); delete it, or give the strategy or "
                "the sweep another name"
            )


def _parts(flag: str) -> tuple[str, str]:
    name, _, value = flag.removeprefix("--").partition("=")
    return name, value


def _changes(then: dict[str, str], now: dict[str, str]) -> list[tuple[str, str, str]]:
    """What differs, as name, before and after; of files, whose values are digests, without these."""

    def shown(value: str | None) -> str:
        return "not there" if value is None else "other" if len(value) == 64 else repr(value)

    names = sorted(then.keys() | now.keys())
    return [(name, shown(then.get(name)), shown(now.get(name))) for name in names if then.get(name) != now.get(name)]
