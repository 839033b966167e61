"""Folders of sweeps with searches, as ``gpt2-pl sweep`` leaves them."""

import json

import numpy as np

from helpers.runs import fake_run

KEY = "model.optimizer.init_args.lr"


def change_record(folder, **values):
    """Change values of a run's record."""
    file = folder / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def sweep_run(folder, strategy, seed, right, cpu_seconds=60.0, lr=1e-3, **values):
    """Write a run of a sweep with a cost, and other values of its record."""
    run = fake_run(folder, strategy, seed, right, lr=lr)
    change_record(run, cpu_seconds=cpu_seconds, mode="max", device="cpu", **values)
    (run / "sweep.json").write_text(json.dumps({"files": {}, "flags": {KEY: str(lr)}, "base": None}))
    return run


def fake_search(sweep, strategy, scores, cpu_seconds=60.0, sampler="random", num_rows=100, **values):
    """Write the trials of a search beside the runs of a sweep; None is the score of a failed trial.

    Args:
        sweep: folder of the task's runs in the sweep, ``SWEEP/TASK``.
        strategy: name of the strategy.
        scores: accuracy of each trial, rounded to rows.
        cpu_seconds: cost of each trial.
        sampler: sampler of the search.
        num_rows: number of rows.
        values: other values of the records of the trials.
    """
    folder = sweep.parent.with_name(f"{sweep.parent.name}.search") / sweep.name / strategy
    for n, score in enumerate(scores):
        right = np.arange(num_rows) < round(num_rows * (score or 0.0))
        trial = sweep_run(folder / f"trial_{n}", strategy, 0, right, cpu_seconds, **values)
        if score is None:
            change_record(trial, status="failed")
    described = {"space": {KEY: {"low": 1e-5, "high": 1e-2, "log": True}}, "seed": 0, "files": {}, "flags": {}}
    described |= {"base": None} | ({"sampler": sampler} if sampler != "tpe" else {})
    folder.with_name(f"{strategy}.json").write_text(json.dumps(described))
    return folder
