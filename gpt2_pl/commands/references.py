"""Compute reference baselines for the data of a run: predictions that every fine-tuned model should beat."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.commands import filter_messages, quiet_lightning
from gpt2_pl.commands import main as run_command
from gpt2_pl.commands.compare import print_lines
from gpt2_pl.commands.lightning_cli import GPT2CLI
from gpt2_pl.commands.support import text_references
from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.commands.support.process import program
from gpt2_pl.commands.support.reference_runs import reference_record, write_reference
from gpt2_pl.errors import InputError, printable
from gpt2_pl.experiments import references
from gpt2_pl.experiments.references import Texts
from gpt2_pl.experiments.rows import classification_scores, regression_scores
from gpt2_pl.experiments.run import RUNS, Run
from gpt2_pl.experiments.statistics.contrast import Floats
from gpt2_pl.filesystem import atomic_write, require_absent
from gpt2_pl.utils.yaml_json import read_json

_DESCRIPTION = f"""{__doc__}

majority predicts the fractions of the training labels, and mean their mean for labels that are numbers. bag_of_words is
logistic or ridge regression on TF-IDF of words and word pairs. frozen_features is the same on the pooled features of
the frozen base. random_init trains the network of the run from random weights, without surgery, with the other settings
of the run. The others need a classifier or a regressor and have no seed.

For a task that generates texts, random_continuation is the target of a random training row, such as the last lines of
another poem; copy_source repeats the given text; nearest_source is the target of the training row with the most similar
given text by TF-IDF.

Each reference is a run folder that `gpt2-pl compare` reads together with the runs.
"""
_CONSTANTS = {True: "majority", False: "mean"}  # by whether labels are classes
_MODELS = ("bag_of_words", "frozen_features")
_DETERMINISTIC = (*_CONSTANTS.values(), *_MODELS)
_NAMES = (*_DETERMINISTIC, *text_references.NAMES, "random_init")
_MAX_DRAWS = 1000


class _Setup(GPT2CLI):
    """Command line that builds the data and the model of a run without training."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing."""


@dataclass
class _Split:
    """Rows of a split.

    Args:
        texts: the texts of every row.
        labels: (N,) class indices, or numbers.
        numbers: number of each row in its file.
        lines: the text of each row as in the run's table of predictions.
    """

    texts: Texts
    labels: NDArray[Any]
    numbers: list[int]
    lines: list[str]


def main(args: list[str]) -> None:
    """Run ``gpt2-pl references``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: an argument is invalid, a folder exists, or the task of the run has no such reference.
    """
    parser = CommandParser(prog="gpt2-pl references", description=_DESCRIPTION)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run with the data and the settings")
    only_help = f"reference to compute: {', '.join(_NAMES)}; repeatable (default: those of the task but random_init)"
    parser.add_argument("--only", metavar="NAME", action="append", choices=_NAMES, help=only_help)
    name_help = f"folder of the references below {RUNS} (default: references/NAME, with the name of the run)"
    parser.add_argument("--name", help=name_help)
    draws_help = "number of draws of random_continuation, each a run with a seed of its own"
    parser.add_argument("--draws", metavar="N", type=int, default=10, help=draws_help)
    options = parser.parse_args(args)
    if not 1 <= options.draws <= _MAX_DRAWS:
        raise InputError(key="draws", value=options.draws, expected=f"in [1, {_MAX_DRAWS:,}]")
    run = Run.read(options.run)
    if not run.record.get("scores"):
        raise InputError(f"RUN must be a finished run, got {options.run}", key="RUN", value=options.run)
    folder = RUNS / (options.name or f"references/{run.settings.get('name') or options.run.name}")
    chosen = None if options.only is None else list(dict.fromkeys(options.only))
    for name in chosen or _NAMES[:-1]:
        require_absent(folder / name / "version_0", "name")
    filter_messages()
    if chosen != ["random_init"]:
        names = None if chosen is None else [name for name in chosen if name != "random_init"]
        _compute_all(run, names, folder, options.draws)
    if chosen is not None and "random_init" in chosen:
        _train_random_init(run, folder / "random_init")
    compare = shlex.join([*program(), "compare", str(options.run), str(folder), "--out", "FOLDER"])
    print(printable(f"compare them: {compare}"))


def _compute_all(run: Run, names: list[str] | None, folder: Path, num_draws: int) -> None:
    """Compute references without training, by default all that suit the task.

    Raises:
        InputError: the task of the run has no such reference.
    """
    from gpt2_pl.tasks.protocols import ScoredGenerator, SourceTargetData

    setup = _set_up(run)
    generates = isinstance(setup.model, ScoredGenerator) and isinstance(setup.datamodule, SourceTargetData)
    of_texts = [name for name in names or () if name in text_references.NAMES]
    if generates and len(of_texts) == len(names or ()):
        names = of_texts or list(text_references.NAMES)
        text_references.compute(run, setup.model, setup.datamodule, names, folder, num_draws)
    elif of_texts and not generates:
        message = (
            f"{of_texts[0]} needs a task that generates targets for sources, got a run of {run.record.get('task')}"
        )
        raise InputError(message, key="only", value=of_texts[0])
    else:
        _compute(run, setup, None if names is None else [n for n in names if n in _DETERMINISTIC], folder)


def _compute(run: Run, setup: _Setup, names: list[str] | None, folder: Path) -> None:
    """Compute deterministic references, by default all that suit the labels, and write a run folder for each.

    Raises:
        InputError: the task of the run is neither a classifier nor a regressor, or a reference does not suit it.
    """
    from gpt2_pl.tasks.protocols import ClassificationRows, FeatureClassifier, FeaturePredictor, LabelledRows

    data: Any = setup.datamodule
    task: Any = setup.model
    is_classifier = isinstance(task, FeatureClassifier) and isinstance(data, ClassificationRows)
    if not is_classifier and not (isinstance(task, FeaturePredictor) and isinstance(data, LabelledRows)):
        wanted = ", ".join(names or _MODELS)
        message = f"{wanted} need a classifier or a regressor of rows, got a run of {run.record.get('task')}"
        raise InputError(message, key="only", value=names)
    names = _suitable(task, is_classifier) if names is None else names
    if (other := _CONSTANTS[not is_classifier]) in names:
        message = (
            f"{other} does not suit the labels of a run of {run.record.get('task')}; use {_CONSTANTS[is_classifier]}"
        )
        raise InputError(message, key="only", value=other)
    data.prepare_data()
    for stage in ("fit", "test") if data.has_split("test") else ("fit",):
        data.setup(stage)
    present: list[str] = [split for split in ("train", "val", "test") if split in data.rows]
    splits = {split: _read_split(data, split) for split in present}
    train, num_classes = splits["train"], data.num_classes if is_classifier else None
    evaluated = {split: rows for split, rows in splits.items() if split != "train"}
    features = _frozen_features(task, data, list(splits)) if "frozen_features" in names else {}
    predict: dict[str, Callable[[], dict[str, Floats]]] = {
        "majority": lambda: {
            split: references.majority(train.labels, len(rows.labels), data.num_classes)
            for split, rows in evaluated.items()
        },
        "mean": lambda: {
            split: references.mean_label(train.labels, len(rows.labels)) for split, rows in evaluated.items()
        },
        "bag_of_words": lambda: references.bag_of_words(
            train.texts, train.labels, {split: rows.texts for split, rows in evaluated.items()}, num_classes
        ),
        "frozen_features": lambda: references.linear_model(
            features["train"], train.labels, {split: features[split] for split in evaluated}, num_classes
        ),
    }
    for name in names:
        start, cpu_start = time.perf_counter(), time.process_time()
        predictions = predict[name]()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        record = _record(run, name, evaluated, predictions, {"seconds": seconds, "cpu_seconds": cpu_seconds})
        _write(folder / name / "version_0", run, record, evaluated, predictions, data.labels if is_classifier else None)
        shown = (f"{key} {value:.4f}" for key, value in record["scores"].items() if "/" in key)
        print_lines([f"{name}: {', '.join(shown)}"])


def _suitable(task: Any, is_classifier: bool) -> list[str]:
    """Return the deterministic references that suit a task; without a pretrained base there are no features."""
    names = [_CONSTANTS[is_classifier], *_MODELS]
    if task.base is None:
        names.remove("frozen_features")
        print("frozen_features is left out: the run has no pretrained base")
    return names


def _set_up(run: Run) -> _Setup:
    """Build the data and the base of a run, without surgery and without a run folder."""
    flags = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.callbacks=null"]
    flags += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--ckpt_path=null"]
    flags += ["--model.surgery=[]", "--model.train_base=true", "--early_stopping_patience=null"]
    with quiet_lightning(), contextlib.redirect_stdout(io.StringIO()):
        return _Setup(["fit", f"--config={run.folder / 'config.yaml'}", *flags])


def _read_split(data: Any, split: str) -> _Split:
    """Return the rows of a split."""
    rows, fields = data.rows[split], data.template.fields
    texts = list(zip(*(rows[field] for field in fields), strict=True))
    indices = range(len(rows))
    numbers, lines = [data.row_number(split, i) for i in indices], [data.text(split, i) for i in indices]
    return _Split(texts, np.asarray(data.encoded[split].labels), numbers, lines)


def _frozen_features(task: Any, data: Any, splits: list[str]) -> dict[str, Floats]:
    """Return the pooled features of the base for every row of the splits.

    Raises:
        InputError: the run has no pretrained base.
    """
    import torch

    if task.base is None:
        message = "frozen_features needs a pretrained base, and the run has none (model.base)"
        raise InputError(message, key="only", value="frozen_features")
    task.configure_model()
    task.eval()
    features = {}
    for split in splits:
        loader = data.evaluation_dataloader(split)
        matrix = None
        with torch.inference_mode():
            for batch in loader:
                pooled = task.encode(batch).float().numpy()
                matrix = np.zeros((len(loader.rows), pooled.shape[1])) if matrix is None else matrix
                matrix[batch["row"].numpy()] = pooled
        assert matrix is not None
        features[split] = matrix
    return features


def _record(
    run: Run, name: str, splits: dict[str, _Split], predictions: dict[str, Floats], cost: dict[str, float]
) -> dict[str, Any]:
    """Return the run record of a reference: its own scores and costs, and the task, data and base of the run."""
    scores: dict[str, float] = {}
    for split, rows in splits.items():
        of_split = _scores(rows.labels, predictions[split])
        described = run.record.get("metrics") or of_split
        scores |= {f"{split}/{metric}": value for metric, value in of_split.items() if metric in described}
    return reference_record(run, name, scores, cost)


def _scores(labels: NDArray[Any], predictions: Floats) -> dict[str, float]:
    """Return the scores of class probabilities (N, K) or numbers (N,)."""
    if predictions.ndim == 1:
        return {name: score.value for name, score in regression_scores(labels, predictions).items()}
    likelihood = np.maximum(predictions[np.arange(len(labels)), labels], 1e-12)
    found = classification_scores(labels, predictions.argmax(1), predictions.shape[1])
    return {"loss": float(-np.log(likelihood).mean()), **{name: score.value for name, score in found.items()}}


def _write(
    folder: Path,
    run: Run,
    record: dict[str, Any],
    splits: dict[str, _Split],
    predictions: dict[str, Floats],
    labels: list[str] | None,
) -> None:
    """Write the folder of a reference as a run leaves it."""
    outcomes = ["loss", "mae"] if labels is None else [f"p({name})" for name in labels]
    columns = ["row", "text", "label", "prediction", *outcomes]
    tables = {
        f"predictions_{split}.csv": (columns, _table_rows(rows, predictions[split], labels))
        for split, rows in splits.items()
    }
    write_reference(folder, run, record, tables, {})


def _table_rows(rows: _Split, predictions: Floats, labels: list[str] | None) -> Iterator[list[object]]:
    """Yield the cells of every row."""
    for i, p in enumerate(predictions):
        source, label = [rows.numbers[i], rows.lines[i]], rows.labels[i]
        if labels is None:
            yield [*source, *(f"{number:.7g}" for number in (label, p, (p - label) ** 2, abs(p - label)))]
        else:
            yield [*source, labels[label], labels[int(p.argmax())], *(f"{value:.6f}" for value in p)]


def _train_random_init(run: Run, folder: Path) -> None:
    """Train the network of a run from random weights, with the other settings of the run."""
    from dataclasses import asdict

    from gpt2_pl.pretrained import read_config

    settings: Any = (run.settings.get("model") or {}).get("init_args") or {}
    base = settings.get("base")
    if base is None:
        raise InputError("random_init needs a pretrained base, and the run has none (model.base)", key="only")
    data: Any = (run.settings.get("data") or {}).get("init_args") or {}
    flags = {
        "model.base": "null",
        "model.config": json.dumps(asdict(read_config(base, settings.get("dropout")))),
        "model.surgery": "[]",
        "model.train_base": "true",
        "data.tokenizer": data.get("tokenizer") or base,
        "name": folder.relative_to(RUNS).as_posix(),
        "version": "version_0",
        "ckpt_path": "null",
    }
    run_command(
        ["fit", f"--config={run.folder / 'config.yaml'}", *(f"--{key}={value}" for key, value in flags.items())]
    )
    file = folder / "version_0" / "metrics.json"
    record = {**read_json(file), "reference": "random_init", "base": run.record.get("base")}
    with atomic_write(file) as out:
        json.dump(record, out, indent=2)
