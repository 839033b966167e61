"""Reference baselines of tasks that generate a target for a given source, such as the rest of a poem."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_pl.commands.compare import print_lines
from gpt2_pl.commands.support.reference_runs import reference_record, write_reference
from gpt2_pl.errors import InputError
from gpt2_pl.experiments import references
from gpt2_pl.experiments.run import Run

RANDOM, NAMES = "random_continuation", ("random_continuation", "copy_source", "nearest_source")
_SPLIT = "test"  # tasks score generated texts of this split


def compute(run: Run, task: Any, data: Any, names: list[str], folder: Path, num_draws: int) -> None:
    """Compute references and write a run folder for each; each draw of a random reference is a run of its own.

    Args:
        run: the run whose data and task are used.
        task: its task, a :class:`~gpt2_pl.tasks.protocols.ScoredGenerator`.
        data: its data, :class:`~gpt2_pl.tasks.protocols.SourceTargetData`.
        names: names of the references.
        folder: folder of all references.
        num_draws: number of draws of a random reference.

    Raises:
        InputError: the run has no test rows, or no training row has a target.
    """
    if not data.has_split(_SPLIT):
        message = f"{', '.join(names)} need test rows, and the run has none (data.test_file)"
        raise InputError(message, key="data.test_file", value=None)
    data.max_length = data.max_length or task.max_length
    for stage in ("fit", _SPLIT):
        data.setup(stage)
    if not any(target.strip() for target in data.targets(_SPLIT)):
        raise InputError(f"{', '.join(names)} need test rows with a target, and none has one", key="data.test_file")
    pairs = zip(data.sources("train"), data.targets("train"), strict=True)
    train = [(source, target) for source, target in pairs if target.strip()]
    if not train:
        raise InputError("no training row has a target", key="data.train_file")
    sources, targets = data.sources(_SPLIT), [target for _, target in train]
    generate: dict[str, Callable[[int], list[str]]] = {
        RANDOM: lambda seed: references.random_continuation(targets, len(sources), seed),
        "copy_source": lambda _: list(sources),
        "nearest_source": lambda _: references.nearest_source([s for s, _ in train], targets, sources),
    }
    for name in names:
        drawn = []
        for draw in range(num_draws if name == RANDOM else 1):
            start, cpu_start = time.perf_counter(), time.process_time()
            texts = generate[name](draw)
            cost = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
            found = task.score_texts(data, _SPLIT, texts)
            scores = {f"{_SPLIT}/{metric}": float(score) for metric, score in found.scores.items()}
            record = reference_record(run, name, scores, cost, draw if name == RANDOM else None)
            table = {f"{found.table.name}_{_SPLIT}.csv": (found.table.columns, found.table.rows)}
            samples = {f"{task.samples_name}_{_SPLIT}.txt": "\n".join(found.samples.values())}
            write_reference(folder / name / f"version_{draw}", run, record, table, samples)
            drawn.append(scores)
        print_lines([_line(name, drawn)])


def _line(name: str, drawn: list[dict[str, float]]) -> str:
    """Return the scores of a reference; of several draws the means with standard deviations."""
    shown = []
    for key in drawn[0]:
        values = [scores[key] for scores in drawn]
        spread = f" (sd {np.std(values, ddof=1):.2g})" if len(values) > 1 else ""
        shown.append(f"{key} {np.mean(values):.4g}{spread}")
    draws = f" ({len(drawn)} draws)" if len(drawn) > 1 else ""
    return f"{name}{draws}: {', '.join(shown)}"
