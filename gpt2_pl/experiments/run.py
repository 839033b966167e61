"""A run's folder: what was set, what it scored, and the outcome of every row."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.errors import InputError, shorten
from gpt2_pl.experiments.inference import Score, confusion_scores, loss_scores
from gpt2_pl.utils.yaml_json import read_json, read_yaml

RUNS = Path("lightning_logs")  # the folder of runs, below the working folder

_LOCATION_KEYS = re.compile(  # where things lie and what is shown, not what was done
    r"data\..*(_file|tokenizer)$|model\.(base|label_token_ids)$|trainer\.(logger|default_root_dir|accelerator|devices|profiler|"
    r"enable_progress_bar|enable_model_summary|enable_checkpointing|enable_autolog_hparams|log_every_n_steps|barebones)$"
)


_LONGEST_NAME = 1000  # characters of a dotted name
_MOST_CLASSES = 200  # a row's outcome is one of their square


@dataclass(eq=False)
class Run:
    """A run's folder.

    Args:
        folder: it.
        record: its ``metrics.json``.
        settings: its ``config.yaml``.
    """

    folder: Path
    record: dict[str, Any]
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run's record and settings.

        Raises:
            InputError: the folder has none, or they are broken.
        """
        for name in ("metrics.json", "config.yaml"):
            if not (folder / name).is_file():
                raise InputError(f"{folder} has no {name}; a run's folder is lightning_logs/NAME/version_N")
        from gpt2_pl.utils.run_schema import check_metrics

        record = check_metrics(read_json(folder / "metrics.json"), str(folder / "metrics.json"))
        file = folder / "config.yaml"
        settings = read_yaml(file)
        parts = [settings.get(key) for key in ("model", "data", "trainer")] if isinstance(settings, dict) else [0]
        if not all(isinstance(part, dict | None) for part in parts):
            raise InputError(f"{file} must hold keys, and its model, data and trainer too, got {shorten(settings)}")
        try:
            json.dumps(settings, ensure_ascii=False, sort_keys=True, default=str).encode()
        except (TypeError, ValueError) as error:  # keys of several kinds, halves of surrogate pairs
            raise InputError(f"{file} cannot be compared: {error}") from None
        return cls(folder, record, settings)

    @property
    def strategy(self) -> str:
        """The strategy files that it was laid together from, or its name without a seed's number."""
        files = [Path(file) for file in self.record.get("configs") or []]
        stems = [file.stem for file in files if file.parent.name == "strategy"]
        return "+".join(stems) or re.sub(r"[-_](seed)?[0-9]+$", "", str(self.settings.get("name"))) or "run"

    @cached_property
    def flat(self) -> dict[str, Any]:
        """What was set, by dotted name, but where things lie, names and seeds."""
        found: dict[str, Any] = {}

        def walk(name: str, value: Any) -> None:
            if len(name) > _LONGEST_NAME:
                file = self.folder / "config.yaml"
                raise InputError(f"{file}: the key {name[:80]}... has more than {_LONGEST_NAME} characters")
            if isinstance(value, dict):
                for key, inner in value.items():
                    walk(f"{name}.{key}".replace(".init_args", "").replace(".class_path", ""), inner)
            elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
                for i, inner in enumerate(value):
                    walk(f"{name}.{i}", inner)
            elif value is not None and value != [] and not _LOCATION_KEYS.match(name):
                found[name] = value

        for key in ("model", "data", "trainer"):
            walk(key, self.settings.get(key) or {})
        data = self.record.get("data") or {}
        walk("data.training_rows", (data.get("rows") or {}).get("train"))
        walk("data.training_files", _name((data.get("files") or {}).get("train") or []))
        walk("base.trained_with", (self.record.get("base") or {}).get("recipe"))
        for key in ("device", "processes"):
            walk(key, self.record.get(key))
        walk("early_stopping_patience", self.settings.get("early_stopping_patience"))
        walk("skipped_steps", self.record.get("skipped_steps") or None)
        return found

    @property
    def comparison_key(self) -> dict[str, Any]:
        """What it must share with others to be compared with them."""
        data = self.record.get("data") or {}
        files = data.get("files") or {}
        base = self.record.get("base") or {}
        return {
            "task": self.record.get("task"),
            "data": _name(files.get(self.split) or files.get("train") or data.get("hub_id") or data.get("class")),
            "rows": (data.get("rows") or {}).get(self.split),
            "texts": self.judged[self.split].digest if self.split in self.judged else None,
            "labels": data.get("labels"),
            "context": data.get("context"),
            "stride": data.get("stride"),
            "base": base.get("origin", base.get("digest")),
        }

    @property
    def split(self) -> str:
        """The split whose score chose the best epoch."""
        return str(self.record.get("monitor")).partition("/")[0]

    @cached_property
    def judged(self) -> dict[str, RowScores]:
        """What is known of the rows of each split, ``val`` and ``test``, that was evaluated row by row."""
        metrics = tuple(self.record.get("metrics") or ())
        found = {split: _read_row_scores(self.folder, split, metrics) for split in ("val", "test")}
        return {split: judged for split, judged in found.items() if judged is not None}


class RowScores(NamedTuple):
    """The outcome of every row of a split.

    Args:
        digest: of the rows' texts and labels.
        features: (N, F) what each row adds to the sums that the scores are made of.
        names: of the scores, S.
        score: from sums over rows (..., F) to scores (..., S).
    """

    digest: str
    features: NDArray[Any]
    names: tuple[str, ...]
    score: Score


def _read_row_scores(folder: Path, split: str, metrics: Sequence[str]) -> RowScores | None:
    """What a run's file of rows says; None where there is none, or one without labels."""
    csv.field_size_limit(sys.maxsize)
    for file, read in ((folder / f"losses_{split}.csv", _losses), (folder / f"predictions_{split}.csv", _predictions)):
        if file.is_file():
            try:
                found = read(file, split, metrics)
            except (OSError, ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
                raise InputError(f"{file} is broken: {' '.join(str(error).split())[:200]}") from None
            if found is not None and not len(found.features):
                raise InputError(f"{file} has no rows")
            return found
    return None


def _losses(file: Path, split: str, metrics: Sequence[str]) -> RowScores:
    digest = hashlib.sha256()
    with file.open(encoding="utf-8", newline="") as lines:
        poems = list(csv.DictReader(lines))
    digest.update(str([(poem["poem"], poem["n_tokens"]) for poem in poems]).encode())
    losses = np.array([(float(poem["loss"]), float(int(poem["n_tokens"]))) for poem in poems])
    return RowScores(digest.hexdigest()[:12], losses, (f"{split}/loss", f"{split}/perplexity"), loss_scores)


def _predictions(file: Path, split: str, metrics: Sequence[str]) -> RowScores | None:
    digest, cells, values = hashlib.sha256(), [], []
    with file.open(encoding="utf-8", newline="") as lines:
        table = csv.DictReader(lines)
        columns = list(table.fieldnames or ())
        if not {"text", "label", "prediction"} <= set(columns):
            return None
        if len(set(columns)) < len(columns):
            raise ValueError("its header names a column twice")
        number = {name[2:-1]: i for i, name in enumerate(name for name in columns if name.startswith("p("))}
        K = len(number)
        if not K and (own := [name for name in columns if name in metrics]):
            for row in table:
                digest.update(f"{row['text']}\0{row['label']}\0".encode())
                values.append([*(float(row[name]) for name in own), 1.0])
            names = tuple(f"{split}/{name}" for name in own)
            return RowScores(
                digest.hexdigest()[:12], np.array(values), names, lambda sums: sums[..., :-1] / sums[..., -1:]
            )
        if not 2 <= K <= _MOST_CLASSES:
            raise ValueError(f"it has {K} classes; rows are compared of 2 to {_MOST_CLASSES} classes")
        for row in table:
            digest.update(f"{row['text']}\0{row['label']}\0".encode())
            cells.append(number[row["label"]] * K + number[row["prediction"]])
    confusion = np.zeros((len(cells), K * K), np.float32)
    confusion[np.arange(len(cells)), cells] = 1.0
    names = (f"{split}/accuracy", f"{split}/macro_f1", *([f"{split}/f1"] if K == 2 else []))
    return RowScores(digest.hexdigest()[:12], confusion, names, lambda sums: confusion_scores(sums)[..., : len(names)])


def _name(files: Any) -> str:
    return ", ".join(sorted(Path(str(file)).name for file in (files if isinstance(files, list) else [files])))


def plugins_of(config: Path) -> list[str]:
    """The modules of a user's own task and surgery that a run's config.yaml names.

    For a configuration that this program has made of the user's own; one of others is no reason to import anything.
    """
    content = read_yaml(config)
    model: Any = content.get("model") if isinstance(content, dict) else None
    surgery = ((model or {}).get("init_args") or {}).get("surgery") or []
    modules = [one["class_path"].rpartition(".")[0] for one in (model or {}, *surgery) if "class_path" in one]
    return [module for module in dict.fromkeys(modules) if module and module.partition(".")[0] != "gpt2_pl"]
