"""Processes that are killed, asked to end, or find no room; losses that are no numbers."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

QUICK = [f"--config={ROOT}/configs/quickstart.yaml", "--data.n_train=120", "--data.batch_size=10",
         "--trainer.max_epochs=3", "--trainer.precision=32-true"]  # fmt: skip


@pytest.mark.parametrize(
    ("seed", "arguments"),
    [
        (1, [*QUICK, "--checkpoint_every_n_steps=4"]),
        (2, [*QUICK, "--early_stopping_patience=1", f"--config={ROOT}/configs/strategy/ulmfit.yaml"]),
    ],
    ids=["steps", "stages and patience"],
)
def test_killed_at_any_moment_and_gone_on(seed, arguments, tmp_path):
    """Fifteen moments each: in steps, validation and test, and while every kind of file is written and renamed."""
    command = [sys.executable, str(ROOT / "tests/faults.py"), str(tmp_path / "runs"), "15", str(seed), "--", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=900, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(cases) == 15
    assert {case["killed"] for case in cases} == {-9}
    assert not [case for case in cases if case["went_on"] or case["wrong"]]
