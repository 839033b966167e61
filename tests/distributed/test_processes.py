"""Processes that torchrun starts, compared with one process."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, latest, metrics, process, weights

QUICK = [
    "fit",
    f"--config={ROOT}/configs/quickstart.yaml",
    "--data.n_train=124",  # 31 rows each to validate and test on: an odd number
    "--trainer.max_epochs=1",
    "--trainer.precision=32-true",
    "--trainer.enable_progress_bar=false",
    "--model.dropout=0.0",
    "--model.optimizer.init_args.lr=1e-4",
    # where a gradient is no more than rounding, Adam would make a whole step of it; beside this epsilon it is nothing
    "--model.optimizer.init_args.eps=1e-6",
]


def torchrun(folder, *args):
    """Two processes, started by torchrun."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / "cli.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *QUICK, *args], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return latest(folder)


@pytest.mark.slow
def test_fit_torchrun_two_processes_equals_one(tmp_path):
    """Every other comparison forks its processes; here torchrun itself starts them, and rows of scores are compared."""
    (tmp_path / "one").mkdir()
    done = process(tmp_path / "one", *QUICK, "--data.batch_size=16")
    assert done.returncode == 0, done.stderr
    one = latest(tmp_path / "one")
    ddp = [f"--config={ROOT}/configs/trainer/ddp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    two = torchrun(tmp_path / "two", *ddp, "--data.batch_size=8", "--data.eval_batch_size=7")
    a, b = (weights(folder / "checkpoints/last.ckpt") for folder in (one, two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    scores = [metrics(folder)["scores"] for folder in (one, two)]
    for name in ("val/accuracy", "val/macro_f1", "test/accuracy", "test/macro_f1"):
        assert scores[0][name] == scores[1][name], name
    assert scores[0]["test/loss"] == pytest.approx(scores[1]["test/loss"], abs=1e-6)
    for split in ("val", "test"):
        rows = [(folder / f"predictions_{split}.csv").read_text().splitlines() for folder in (one, two)]
        assert len(rows[0]) == len(rows[1]) == 32
        assert [line.split(",")[0] for line in rows[0]] == [line.split(",")[0] for line in rows[1]]
