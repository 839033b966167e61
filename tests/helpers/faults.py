"""Runs that are killed and resumed."""

import json
import os

from conftest import ROOT

from helpers import forked

QUICK = [
    f"--config={ROOT}/configs/quickstart.yaml", "--data.n_train=80", "--data.batch_size=10", "--trainer.max_epochs=3",
    "--model.config={vocab_size: 512, n_positions: 64, n_embd: 16, n_layer: 2, n_head: 2, dropout: 0.1}",
    "--trainer.precision=32-true",
]  # fmt: skip  # eight steps an epoch


def faults(folder, n, seed, arguments, **environment):
    command = [ROOT / "tests/helpers/fault_injection.py", folder / "runs", n, seed, "--", *arguments]
    done = forked.run(command, cwd=folder, env={**os.environ, **environment}, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(cases) == n
    return cases
