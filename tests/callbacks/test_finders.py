"""Lightning's finders of the learning rate and the batch size, as callbacks of fit."""

import math

import pytest
import torch
import yaml
from conftest import metrics, weights
from helpers.refusals import refused

TINY = ["fit", "--config=quickstart", "--data.n_train=150", "--trainer.max_epochs=2", "--trainer.precision=32-true",
        "--data.batch_size=16"]  # fmt: skip
RATE = ["--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateFinder", "--trainer.callbacks.min_lr=1e-5",
        "--trainer.callbacks.num_training_steps=30"]  # fmt: skip
SIZE = ["--trainer.callbacks+=lightning.pytorch.callbacks.BatchSizeFinder", "--trainer.callbacks.steps_per_trial=1",
        "--trainer.callbacks.init_val=10", "--trainer.callbacks.max_val=40"]  # fmt: skip


def settings(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def rate(folder):
    return settings(folder)["model"]["init_args"]["optimizer"]["init_args"]["lr"]


def equal_weights(one, other):
    mine, theirs = (weights(folder / "checkpoints/last.ckpt") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_learning_rate_finder_run_equals_a_run_with_the_rate_that_it_found(run, tmp_path):
    found = run(*TINY, *RATE, "--config=strategy/llrd")
    value = rate(found)
    assert value != 1e-3  # of the configuration
    assert 1e-5 < value < 1
    assert settings(found)["trainer"]["callbacks"][-1]["class_path"] == "gpt2_pl.callbacks.DiscriminativeLR"
    peak = [max(layer["peak_rates"]) for layer in metrics(found)["parameters"]["layers"] if layer["layer"] == "head"]
    assert peak == [pytest.approx(value)]
    again = run("fit", "--config", found / "config.yaml")
    assert rate(again) == value
    assert equal_weights(found, again)
    assert not list(tmp_path.glob(".lr_find*"))


def test_batch_size_finder_run_equals_a_run_with_the_size_that_it_found(run, capsys, caplog):
    found = run(*TINY, *SIZE)
    assert caplog.text.count("Finished batch size finder") == 1  # and none before the test
    size = settings(found)["data"]["init_args"]["batch_size"]
    assert size == 40
    assert settings(found)["trainer"]["callbacks"] == []
    record = metrics(found)
    assert record["data"]["batch_size"] == size
    assert record["steps"] == 2 * math.ceil(record["data"]["rows"]["train"] / size)
    again = run("fit", "--config", found / "config.yaml")
    assert equal_weights(found, again)  # the schedule has the length of this run, too
    last = ["--trainer.max_epochs=3", "--ckpt_path", found / "checkpoints/last.ckpt"]
    line = refused(run, capsys, *TINY, *SIZE, f"--data.batch_size={size}", *last)
    assert "BatchSizeFinder searches at the start" in line
    assert "config.yaml" in line
