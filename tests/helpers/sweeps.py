"""Small sweeps, and processes that run them."""

import os

from conftest import ROOT

from helpers.forked import Forked

SHAPE = "{vocab_size: 300, n_positions: 64, n_embd: 16, n_layer: 1, n_head: 2, dropout: 0.1}"
QUICK = (
    "{data.n_train: 60, trainer.enable_progress_bar: false, trainer.precision: 32-true, trainer.max_epochs: 2, "
    f"model.config: '{SHAPE}', data.vocab_size: 300}}"
)
FILE = f"""
name: s
overrides: {QUICK}
seeds: [1, 2]
tasks:
  toy:
    configs: [{ROOT}/configs/quickstart.yaml]
    strategies:
      full: {{configs: [{ROOT}/configs/strategy/full.yaml]}}
"""


def start(folder, *args, file="s.yaml"):
    """Start a sweep in a process whose jobs are its forks and end with it."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return Forked([ROOT / "tests/helpers/forked_jobs.py", "sweep", file, *args], cwd=folder, env=environment)


def sweep(folder, *args, file="s.yaml"):
    """Run a sweep to its end; return its status, its output and its errors."""
    process = start(folder, *args, file=file)
    try:
        output, errors = process.communicate(timeout=200)
    except BaseException:
        process.kill()
        raise
    return process.returncode, output, errors
