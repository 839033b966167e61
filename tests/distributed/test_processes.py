"""Runs in separate processes: killed and resumed, and two processes compared with one."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, latest, metrics, process, weights

from gpt2_pl import GPT2, GPT2Config
from gpt2_pl.text.tokenizer import train_tokenizer

QUICK = [
    "fit",
    f"--config={ROOT}/configs/quickstart.yaml",
    "--data.n_train=252",  # 63 rows each to validate and test on: an odd number
    "--trainer.max_epochs=2",
    "--trainer.precision=32-true",
    "--trainer.enable_progress_bar=false",
]


def fit(folder, *args):
    folder.mkdir(exist_ok=True)
    done = process(folder, *QUICK, *args)
    assert done.returncode == 0, done.stderr
    return latest(folder)


def same(a, b):
    a, b = (weights(folder / "checkpoints/last.ckpt") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_fit_killed_in_mid_epoch_resumes_bitwise(tmp_path):
    sizes = ["--data.batch_size=16", "--checkpoint_every_n_steps=3"]  # 16 steps an epoch
    whole = fit(tmp_path / "whole", *sizes)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    killer = "--trainer.callbacks=[{class_path: helpers.kill_at.KillAt, init_args: {step: 23}}]"
    assert process(stopped, *QUICK, *sizes, killer).returncode == -9
    checkpoint = latest(stopped) / "checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 21
    assert metrics(latest(stopped))["status"] == "running"
    resumed = fit(stopped, *sizes, f"--ckpt_path={checkpoint}")
    one, two = metrics(whole), metrics(resumed)
    assert one["scores"] == two["scores"]
    assert one["steps"] == two["steps"]
    for a, b in zip(one["epochs"], two["epochs"], strict=True):  # training scores count the rows since resuming
        assert all(a[key] == b[key] for key in a if not key.startswith("train/"))
    assert same(whole, resumed)


def torchrun(folder, *args):
    """Two processes, started by torchrun."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / "cli.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *QUICK, *args], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return latest(folder)


# Where a gradient is no more than rounding, Adam would make a whole step of it; beside this epsilon it is nothing.
EXACT = "--model.optimizer.init_args.eps=1e-6"


def test_fit_torchrun_two_processes_equals_one(tmp_path):
    settings = ["--model.dropout=0.0", "--model.optimizer.init_args.lr=1e-4", EXACT]
    one = fit(tmp_path / "one", *settings, "--data.batch_size=16")
    ddp = [f"--config={ROOT}/configs/trainer/ddp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    two = torchrun(tmp_path / "two", *ddp, *settings, "--data.batch_size=8", "--data.eval_batch_size=7")
    a, b = (weights(folder / "checkpoints/last.ckpt") for folder in (one, two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    scores = [metrics(folder)["scores"] for folder in (one, two)]
    for name in ("val/accuracy", "val/macro_f1", "test/accuracy", "test/macro_f1"):
        assert scores[0][name] == scores[1][name], name
    assert scores[0]["test/loss"] == pytest.approx(scores[1]["test/loss"], abs=1e-6)
    for split in ("val", "test"):
        rows = [(folder / f"predictions_{split}.csv").read_text().splitlines() for folder in (one, two)]
        assert len(rows[0]) == len(rows[1]) == 64
        assert [line.split(",")[0] for line in rows[0]] == [line.split(",")[0] for line in rows[1]]


def test_fit_sharded_run_resumes_in_two_processes_and_in_one(tmp_path):
    settings = ["--model.dropout=0.0", "--model.optimizer.init_args.lr=1e-4", EXACT]
    one = [*settings, "--data.batch_size=16"]
    fsdp = [f"--config={ROOT}/configs/trainer/fsdp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    two = [*settings, "--data.batch_size=8", *fsdp]
    whole = weights(fit(tmp_path / "whole", *one) / "checkpoints/last.ckpt")
    half = fit(tmp_path / "half", *two, "--trainer.max_time=00:00:00:00", "--trainer.min_epochs=1")
    for name, how in (("sharded", two), ("alone", one)):
        found = weights(
            fit(tmp_path / name, *how, f"--ckpt_path={half}/checkpoints/last.ckpt") / "checkpoints/last.ckpt"
        )
        assert found.keys() == whole.keys()
        for key in whole:
            torch.testing.assert_close(found[key], whole[key], atol=1e-5, rtol=0, msg=f"{name}: {key}")


# Five stages in two epochs of 16 steps: they begin at steps 0, 8, 15, 22 and 29.
STAGES = """
model: {init_args: {pooling: concat, dropout: %s, schedule: {class_path: gpt2_pl.optim.SlantedTriangular}}}
trainer:
  callbacks:
    - {class_path: gpt2_pl.callbacks.GradualUnfreezing, init_args: {blocks_per_stage: 1, epochs_per_stage: 0.45}}
    - {class_path: gpt2_pl.callbacks.DiscriminativeLR, init_args: {decay: 0.7}}
    - {class_path: helpers.kill_at.Keep}
"""


def staged(tmp_path, dropout):
    file = tmp_path / "stages.yaml"
    file.write_text(STAGES % dropout)
    return [f"--config={file}", "--model.optimizer.init_args.lr=1e-4", "--model.optimizer.init_args.weight_decay=0.1"]


def test_fit_gradual_unfreezing_in_two_processes_equals_one(tmp_path):
    settings = [*staged(tmp_path, 0.0), EXACT]
    one = fit(tmp_path / "one", *settings, "--data.batch_size=16")
    ddp = [f"--config={ROOT}/configs/trainer/ddp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    two = fit(tmp_path / "two", *ddp, *settings, "--data.batch_size=8")
    first, second = (torch.load(tmp_path / f"two/rank_{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    a, b = (weights(folder / "checkpoints/last.ckpt") for folder in (one, two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    moved = torch.load(tmp_path / "one/rank_0.pt", weights_only=True)
    assert metrics(one)["parameters"]["layers"] == metrics(two)["parameters"]["layers"]
    assert all(layer["trainable"] for layer in metrics(one)["parameters"]["layers"])
    assert moved.keys() == first.keys()


def test_fit_killed_within_unfreezing_stage_resumes_bitwise(tmp_path):
    settings = [*staged(tmp_path, 0.1), "--data.batch_size=16", "--checkpoint_every_n_steps=3"]
    whole = fit(tmp_path / "whole", *settings)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    killer = "--trainer.callbacks+={class_path: helpers.kill_at.KillAt, init_args: {step: 20}}"
    assert process(stopped, *QUICK, *settings, killer).returncode == -9
    checkpoint = latest(stopped) / "checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 18
    resumed = fit(stopped, *settings, f"--ckpt_path={checkpoint}")
    assert metrics(whole)["scores"] == metrics(resumed)["scores"]
    assert metrics(whole)["parameters"] == metrics(resumed)["parameters"]
    assert same(whole, resumed)


def test_fit_poems_with_unlikelihood_in_two_processes_equals_one(tmp_path, poem_flags):
    torch.manual_seed(0)
    GPT2(GPT2Config(vocab_size=300, n_positions=640, n_embd=32, n_layer=2, n_head=2)).save_pretrained(tmp_path / "base")
    train_tokenizer(["the plot is wonderful and not at all boring\n"] * 50, 300).save(
        str(tmp_path / "base/tokenizer.json")
    )
    command = [
        "fit", f"--config={ROOT}/configs/task/sonnets.yaml", f"--config={ROOT}/configs/strategy/unlikelihood.yaml",
        f"--model.base={tmp_path / 'base'}", *poem_flags, "--data.train_fraction=0.889", "--model.dropout=0.0",
        "--model.sequence_unlikelihood=0.5", "--model.sequence_prefix=20", "--model.sequence_length=20",
        "--model.num_val_samples=1", "--model.max_new_tokens=30", "--trainer.max_epochs=2",
        "--trainer.precision=32-true",
        "--trainer.enable_progress_bar=false", "--model.optimizer.init_args.lr=1e-4",
    ]  # fmt: skip
    ddp = [f"--config={ROOT}/configs/trainer/ddp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    folders = []
    for name, extra in (
        ("one", ["--data.batch_size=4", "--trainer.accelerator=cpu"]),
        ("two", [*ddp, "--data.batch_size=2"]),
    ):
        (tmp_path / name).mkdir()
        done = process(tmp_path / name, *command, *extra)
        assert done.returncode == 0, done.stderr
        folders.append(latest(tmp_path / name))
    a, b = (weights(folder / "checkpoints/last.ckpt") for folder in folders)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    one, two = (metrics(folder) for folder in folders)
    assert any("train/sequence_unlikelihood" in epoch for epoch in one["epochs"])
    for key, value in one["epochs"][-1].items():
        assert two["epochs"][-1][key] == pytest.approx(value, rel=1e-3), key
    assert two["scores"]["test/perplexity"] == pytest.approx(one["scores"]["test/perplexity"], rel=1e-4)
