"""Folder of a run: its settings, its record and the scores of every row."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.errors import InputError, shorten
from gpt2_pl.experiments.rows import KeptRows, Positions, RowScore, RowScores, RowTable, read_row_table
from gpt2_pl.utils.yaml_json import read_json, read_yaml

if TYPE_CHECKING:
    from gpt2_pl.utils.run_schema import SweepRecord

RUNS = Path("lightning_logs")  # folder of all runs, relative to the working directory

_LOCATION_KEYS = re.compile(  # locations, hardware and displays, which do not affect what is compared
    r"data\..*(_file|tokenizer)$|model\.(base|label_token_ids)$|trainer\.(logger|default_root_dir|accelerator|devices|profiler|"
    r"enable_progress_bar|enable_model_summary|enable_checkpointing|enable_autolog_hparams|log_every_n_steps|barebones)$"
)


_MAX_KEY_CHARACTERS = 1000  # of a dotted key
_MAX_EXPONENT = 700.0  # of a floating-point number


def counted_runs(runs: Iterable[Run]) -> str:
    """Return the numbers of runs and of references among them, such as ``4 runs and 2 references``."""
    is_reference = [run.record.get("reference") is not None for run in runs]
    counts = {"run": is_reference.count(False), "reference": is_reference.count(True)}
    parts = [f"{n} {name}{'s' * (n != 1)}" for name, n in counts.items() if n]
    return " and ".join(parts) or "0 runs"


@dataclass(eq=False)
class Run:
    """Finished or unfinished run.

    Args:
        folder: path of the run's folder.
        record: content of its ``metrics.json``.
        settings: content of its ``config.yaml``.
        crossed: scores that replace those of the best epoch in a comparison; see
            :mod:`gpt2_pl.experiments.selection`.
        kept: for each split the rows that are compared, if runs have different rows; see
            :mod:`gpt2_pl.experiments.common_rows`.
        shown: path that reports show; None for ``folder``.
    """

    folder: Path
    record: dict[str, Any]
    settings: dict[str, Any]
    crossed: dict[str, RowScore] = field(default_factory=dict)
    kept: dict[str, KeptRows] = field(default_factory=dict)
    shown: str | None = None

    @classmethod
    def read(cls, folder: Path, shown: str | None = None) -> Run:
        """Read the record and the settings of a run.

        Args:
            folder: path of the run's folder.
            shown: path that reports show; by default ``folder``. A run in an archive is unpacked elsewhere.

        Raises:
            InputError: a file is missing or invalid.
        """
        for name in ("metrics.json", "config.yaml"):
            if not (folder / name).is_file():
                raise InputError(f"{folder} has no {name}; the folder of a run is {RUNS}/NAME/version_N")
        from gpt2_pl.utils.run_schema import check_metrics

        record = check_metrics(read_json(folder / "metrics.json"), str(folder / "metrics.json"))
        file = folder / "config.yaml"
        settings = read_yaml(file)
        parts = [settings.get(key) for key in ("model", "data", "trainer")] if isinstance(settings, dict) else [0]
        if not all(isinstance(part, dict | None) for part in parts):
            expected = "a mapping, and so must its model, data and trainer"
            raise InputError(f"{file} must be {expected}, got {shorten(settings)}", value=settings, expected=expected)
        try:
            json.dumps(settings, ensure_ascii=False, sort_keys=True, default=str).encode()
        except (TypeError, ValueError) as error:  # keys of several types, lone surrogates
            raise InputError(f"{file} cannot be compared: {error}") from None
        return cls(folder, record, settings, shown=shown)

    @property
    def path(self) -> str:
        """Path of the run as reports show it."""
        return str(self.folder) if self.shown is None else self.shown

    @property
    def strategy(self) -> str:
        """Names of the strategy files of the run, or else the name of the run without the number of its seed."""
        if self.record.get("reference"):
            return str(self.record["reference"])
        files = [Path(file) for file in self.record.get("configs") or []]
        stems = [file.stem for file in files if file.parent.name == "strategy"]
        return "+".join(stems) or re.sub(r"[-_](seed)?[0-9]+$", "", str(self.settings.get("name"))) or "run"

    @property
    def needs_no_training(self) -> bool:
        """Whether the run only evaluates a model, by ``trainer.max_epochs: 0``."""
        return (self.settings.get("trainer") or {}).get("max_epochs") == 0

    @cached_property
    def flat(self) -> dict[str, Any]:
        """Settings by dotted key, without locations, names and seeds.

        Raises:
            InputError: a key is too long.
        """
        flat: dict[str, Any] = {}

        def walk(name: str, value: Any) -> None:
            if len(name) > _MAX_KEY_CHARACTERS:
                message = f"a key must have at most {_MAX_KEY_CHARACTERS} characters, got {name[:80]}..."
                raise InputError(message, key=name, source=self.folder / "config.yaml")
            if isinstance(value, dict):
                for key, inner in value.items():
                    walk(f"{name}.{key}".replace(".init_args", "").replace(".class_path", ""), inner)
            elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
                for i, inner in enumerate(value):
                    walk(f"{name}.{i}", inner)
            elif value is not None and value != [] and not _LOCATION_KEYS.match(name):
                flat[name] = value

        for key in ("model", "data", "trainer"):
            walk(key, self.settings.get(key) or {})
        data = self.record.get("data") or {}
        walk("data.training_rows", (data.get("rows") or {}).get("train"))
        walk("data.training_files", _file_names((data.get("files") or {}).get("train") or []))
        walk("base.trained_with", (self.record.get("base") or {}).get("recipe"))
        walk("device", self.record.get("device"))
        walk("processes", self.record.get("processes"))
        walk("early_stopping_patience", self.settings.get("early_stopping_patience"))
        walk("skipped_steps", self.record.get("skipped_steps") or None)
        return flat

    def comparison_key(self, split: str) -> dict[str, Any]:
        """Return the properties that runs must share in order to be compared: task, data, labels, contexts and base.

        The number of rows is one of them only without a table of rows.

        Args:
            split: the split that is compared, ``val`` or ``test``.
        """
        has_table = split in self.row_scores
        data = self.record.get("data") or {}
        files = data.get("files") or {}
        base = self.record.get("base") or {}
        return {
            "task": self.record.get("task"),
            "data": _file_names(files.get(split) or files.get("train") or data.get("hub_id") or data.get("class")),
            "rows": None if has_table else (data.get("rows") or {}).get(split),
            "texts": "known" if has_table else None,
            "labels": data.get("labels"),
            "context": data.get("context"),
            "stride": data.get("stride"),
            "base": base.get("origin", base.get("digest")),
        }

    @cached_property
    def sweep_record(self) -> SweepRecord | None:
        """Settings with which a sweep has started the run, its ``sweep.json``; None for other runs.

        Raises:
            InputError: the file is invalid.
        """
        file = self.folder / "sweep.json"
        if not file.is_file():
            return None
        from gpt2_pl.utils.run_schema import SweepRecord
        from gpt2_pl.utils.schema import validate

        return validate(SweepRecord, read_json(file), str(file))

    @property
    def levels(self) -> dict[str, str]:
        """Level of each factor, if a sweep with ``factors`` has started the run."""
        return {} if self.sweep_record is None else self.sweep_record.levels

    @property
    def split(self) -> str:
        """Split of the score that selected the best epoch."""
        return str(self.record.get("monitor")).partition("/")[0]

    @cached_property
    def row_scores(self) -> dict[str, RowScores]:
        """Scores of all rows of the splits ``val`` and ``test``, for splits with a file of rows.

        Raises:
            InputError: a file of rows is invalid.
        """
        metrics = tuple(self.record.get("metrics") or ())
        tables = {split: read_row_table(self.folder, split, metrics) for split in ("val", "test")}
        return {split: table.scores() for split, table in tables.items() if table is not None}

    @cached_property
    def validations(self) -> list[RowTable]:
        """Rows of every validation in order of training, if the run kept them; else empty.

        Raises:
            InputError: a file of rows is invalid.
        """
        metrics = tuple(self.record.get("metrics") or ())
        folders = {
            int(path.name[5:]): path
            for path in (self.folder / "validations").glob("step_*")
            if path.name[5:].isdecimal()
        }
        tables = (read_row_table(folders[step], "val", metrics) for step in sorted(folders))
        return [table for table in tables if table is not None]

    def keep_rows(self, split: str, positions: Positions, digest: str) -> None:
        """Compare only some rows of a split, and not those that other runs lack.

        Args:
            split: a split of :attr:`row_scores`.
            positions: indices of the rows in the table of the split.
            digest: digest of the rows.
        """
        table = read_row_table(self.folder, split, tuple(self.record.get("metrics") or ()))
        if table is not None:
            self.kept[split] = KeptRows(
                positions, table.select(positions, digest).scores(), len(positions) == len(table)
            )

    def compared_rows(self, split: str) -> RowScores | None:
        """Return the scores of the rows of a split that are compared; None if it has no table."""
        kept = self.kept.get(split)
        return self.row_scores.get(split) if kept is None else kept.scores

    def best_score(self, name: str) -> float | None:
        """Return a score of the best epoch on the rows that are compared; None if it is not known."""
        kept = self.kept.get(name.partition("/")[0])
        if kept is not None and name in kept.scores.scores:
            return _recorded(name, kept.scores.scores[name].value)
        value = self.record["scores"].get(name) if kept is None or kept.is_all else None
        return None if value is None else float(value)

    def score(self, name: str) -> float | None:
        """Return a score, of rows that did not choose the epoch if :attr:`crossed` has it; None if it is not known."""
        crossed = self.crossed.get(name)
        return self.best_score(name) if crossed is None else _recorded(name, crossed.value)

    def row_score(self, name: str) -> RowScore | None:
        """Return :meth:`score` with the contribution of every row, as tables of rows give it; None if they do not."""
        if name in self.crossed:
            return self.crossed[name]
        of_split = self.compared_rows(name.partition("/")[0])
        return None if of_split is None else of_split.scores.get(name)


def _recorded(name: str, value: float) -> float:
    """Convert a score of rows to that of a record: the score of rows of a perplexity is its logarithm."""
    return math.exp(min(value, _MAX_EXPONENT)) if name.endswith("/perplexity") else value


def _file_names(files: Any) -> str:
    return ", ".join(sorted(Path(str(file)).name for file in (files if isinstance(files, list) else [files])))


def plugins_of(config: Path) -> list[str]:
    """Return the user's own modules with the task and surgery that a run's config.yaml names.

    Call it only for a configuration that this program has written; modules of an untrusted one must not be imported.
    """
    content = read_yaml(config)
    model: Any = content.get("model") if isinstance(content, dict) else None
    surgery = ((model or {}).get("init_args") or {}).get("surgery") or []
    modules = [one["class_path"].rpartition(".")[0] for one in (model or {}, *surgery) if "class_path" in one]
    return [module for module in dict.fromkeys(modules) if module and module.partition(".")[0] != "gpt2_pl"]
