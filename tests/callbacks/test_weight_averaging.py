"""Averages of the weights: resumed exactly, stored without a frozen base, and validated, tested and saved."""

import pytest
import torch
from conftest import ROOT, metrics
from helpers.refusals import refused
from helpers.stops import STOP, TINY, same, state
from helpers.trainers import trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging

from gpt2_pl.datamodules import ToySentiment
from gpt2_pl.surgery import LoRA
from gpt2_pl.tasks import SentimentClassifier

CONFIGS = ROOT / "configs"
WEIGHTS = ("state_dict", "current_model_state", "averaging_state")


def callback(name, module="lightning.pytorch.callbacks", **arguments):
    return f"--trainer.callbacks+={{class_path: {module}.{name}, init_args: {arguments}}}"


EMA = callback("EMAWeightAveraging", decay=0.8)
SWA = callback("StochasticWeightAveraging", swa_lrs=0.005, swa_epoch_start=2, annealing_epochs=1)
EVERY_THIRD = callback("EMAWeightAveraging", decay=0.8, update_every_n_steps=3)


def last(folder):
    return f"--ckpt_path={folder}/checkpoints/last.ckpt"


def equal_weights(one, two):
    return all(same(one.get(key), two.get(key)) for key in WEIGHTS)


# WeightAveraging and EMAWeightAveraging


@pytest.mark.parametrize(
    ("averaging", "stopped"),
    [
        pytest.param(EMA, "--trainer.max_steps=9", marks=pytest.mark.slow, id="ema"),
        pytest.param(EVERY_THIRD, STOP, id="every third step"),
    ],
)
def test_weight_averaging_resumed_ends_as_if_not_stopped(averaging, stopped, run):
    expected = state(run(*TINY, averaging))
    assert not same(expected["state_dict"], expected["current_model_state"])
    resumed = run(*TINY, averaging, last(run(*TINY, averaging, stopped)))
    assert equal_weights(state(resumed), expected)


class Record(Callback):
    """Record the parameters after every optimizer step and at every start of an epoch."""

    def __init__(self):
        self.steps, self.epochs = [], []

    @staticmethod
    def copy(module):
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append(self.copy(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(self.copy(pl_module))


def test_ema_with_frozen_base_averages_only_trained_weights(base, tmp_path):
    record, file = Record(), tmp_path / "x.ckpt"
    task = SentimentClassifier(base=str(base), num_classes=3, surgery=[LoRA(rank=2, targets=["c_attn", "c_fc"])])
    fit = trainer(max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.7), record], limit_val_batches=1)
    fit.fit(task, ToySentiment(vocab_size=400, n_train=40, batch_size=10, max_length=32))
    fit.save_checkpoint(file)
    average = record.steps[0]
    for step in record.steps[1:]:
        average = {name: 0.7 * value + 0.3 * step[name] for name, value in average.items()}
    trained = {f"gpt2.{name}" for name in task.trained_names} | {name for name, _ in task.head_parameters()}
    saved = torch.load(file, weights_only=True)
    assert saved["state_dict"].keys() == saved["current_model_state"].keys() == trained
    for name, parameter in task.named_parameters():
        if name in trained:
            torch.testing.assert_close(saved["state_dict"][name], average[name])
            assert torch.equal(parameter, saved["state_dict"][name])
        else:
            assert torch.equal(parameter, record.steps[0][name])


@pytest.mark.parametrize("strategy", ["lora", pytest.param("prompt_tuning", marks=pytest.mark.slow)])
def test_ema_with_frozen_base_resumes_bitwise_and_scores_equal(strategy, run, base, data_flags):
    settings = [
        "fit", "--config", CONFIGS / "task/imdb.yaml", "--config", CONFIGS / f"strategy/{strategy}.yaml",
        f"--model.base={base}", "--data.max_length=40", *data_flags, "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2", "--trainer.precision=32-true", "--data.batch_size=32", EMA,
        "--data.train_fraction=0.6",
        "--model.schedule={class_path: gpt2_pl.optim.ConstantWithWarmup, init_args: {warmup: 0}}",
    ]  # fmt: skip
    whole = run(*settings)
    resumed = run(*settings, last(run(*settings, "--trainer.max_steps=3")))  # of two an epoch
    checkpoint = state(whole)
    assert equal_weights(state(resumed), checkpoint)
    assert checkpoint["current_model_state"].keys() == checkpoint["state_dict"].keys()
    assert not any(name.startswith("gpt2.wte.w") or name.endswith("ln_1.weight") for name in checkpoint["state_dict"])
    scored = run("test", f"--config={whole}/config.yaml", f"--ckpt_path={whole}/checkpoints/best.ckpt")
    assert metrics(scored)["scores"]["test/accuracy"] == metrics(whole)["scores"]["test/accuracy"]


def test_ema_with_tuned_threshold_and_verbalizer_keeps_threshold_and_loss(run, base, pair_files):
    """Keep the buffers: averages of token ids and of thresholds would be meaningless."""
    rows = [f"--data.{split}_file={file}" for split, file in pair_files.items()]
    folder = run(
        "fit", "--config", CONFIGS / "task/quora.yaml", "--config", CONFIGS / "strategy/verbalizer.yaml",
        f"--model.base={base}", "--data.max_length=64", *rows, "--trainer.accelerator=cpu", "--trainer.max_epochs=2",
        "--model.threshold=f1", callback("EMAWeightAveraging", decay=0.9), "--trainer.precision=32-true",
    )  # fmt: skip
    tuned = metrics(folder)["epochs"][-1]["val/threshold"]
    assert state(folder)["state_dict"]["decision_threshold"] == pytest.approx(tuned)
    scored = run("validate", f"--config={folder}/config.yaml", last(folder))
    assert metrics(scored)["scores"]["val/loss"] == pytest.approx(metrics(folder)["epochs"][-1]["val/loss"], abs=1e-6)


@pytest.fixture(scope="module")
def averaged_content(fitted):
    return (fitted(*TINY, EMA, "--trainer.max_steps=3") / "checkpoints/last.ckpt").read_bytes()


@pytest.fixture
def averaged(averaged_content, tmp_path):
    (tmp_path / "averaged.ckpt").write_bytes(averaged_content)
    return tmp_path / "averaged.ckpt"


def test_fit_resumed_averaged_checkpoint_without_callback_is_refused(averaged, run, capsys):
    line = refused(run, capsys, *TINY, f"--ckpt_path={averaged}")
    assert "averaged weights" in line


NAME = "gpt2.ln_f.weight"
HOSTILE = {  # changes of a checkpoint, and what the message names
    "missing": (lambda c: c["current_model_state"].popitem(), "current_model_state"),
    "another name": (lambda c: c["current_model_state"].update(x=torch.ones(1)), "current_model_state"),
    "no state": (lambda c: c.update(current_model_state=3), "current_model_state"),
    "another shape": (lambda c: c["current_model_state"].update({NAME: torch.ones(3)}), NAME),
    "text": (lambda c: c["current_model_state"].update({NAME: "x"}), NAME),
    "not finite": (lambda c: c["current_model_state"][NAME].fill_(float("nan")), NAME),
    "no count": (lambda c: c.update(averaging_state={}), "n_averaged"),
    "half a count": (lambda c: c["averaging_state"].update(n_averaged=torch.tensor(0.5)), "n_averaged"),
    "negative": (lambda c: c["averaging_state"].update(n_averaged=torch.tensor(-1)), "n_averaged"),
    "many counts": (lambda c: c["averaging_state"].update(n_averaged=torch.ones(2).long()), "n_averaged"),
    "step": (lambda c: c["callbacks"]["EMAWeightAveraging"].update(latest_update_step="x"), "latest_update_step"),
}  # fmt: skip


def test_fit_resumed_malformed_averages_are_refused(averaged, run, capsys):
    original = averaged.read_bytes()
    for case, (change, named) in HOSTILE.items():
        content = torch.load(averaged, weights_only=True)
        change(content)
        torch.save(content, averaged)
        assert named in refused(run, capsys, *TINY, EMA, f"--ckpt_path={averaged}"), case
        averaged.write_bytes(original)


# StochasticWeightAveraging


def test_swa_finished_last_checkpoint_holds_validated_average(run, monkeypatch):
    records = []
    monkeypatch.setattr(Record, "__init__", lambda self: (setattr(self, "epochs", []), setattr(self, "steps", []),
                                                          records.append(self))[-1])  # fmt: skip
    folder = run(*TINY, SWA, "--trainer.max_epochs=4", callback("Record", "test_weight_averaging"))
    starts = records[-1].epochs[1:]  # swa_epoch_start counts from 1
    saved = state(folder)["state_dict"]
    for name in starts[0]:
        torch.testing.assert_close(saved[name], torch.stack([start[name] for start in starts]).mean(0))
    assert not same(saved, records[-1].steps[-1])
    assert metrics(folder)["scores"].keys() >= {"val/accuracy", "test/accuracy"}
    scored = run("validate", f"--config={folder}/config.yaml", last(folder))
    assert state(folder)["callbacks"]["StochasticWeightAveraging"]["average_model_state"] is None
    epoch = metrics(folder)["epochs"][-1]
    for score in ("val/loss", "val/accuracy"):  # of what is saved
        assert metrics(scored)["scores"][score] == pytest.approx(epoch[score], rel=1e-5), score


def test_swa_resumed_before_it_averages_ends_as_if_not_stopped(run):
    settings = [*TINY, SWA, "--trainer.max_epochs=3"]
    resumed = run(*settings, last(run(*settings, "--trainer.max_steps=3")))
    assert equal_weights(state(resumed), state(run(*settings)))


@pytest.mark.parametrize("steps", [9, 18])
def test_swa_resumed_after_it_began_is_refused(steps, run, capsys):
    settings = [*TINY, SWA, "--trainer.max_epochs=3"]
    stopped = run(*settings, f"--trainer.max_steps={steps}")
    capsys.readouterr()
    line = refused(run, capsys, *settings, "--trainer.max_epochs=4", last(stopped))
    assert "StochasticWeightAveraging" in line
    assert "lightning.pytorch.callbacks.WeightAveraging" in line


@pytest.mark.parametrize("averaging", [EMA, SWA], ids=["ema", "swa"])
def test_fit_weight_averaging_of_sharded_model_is_refused(averaging, run, capsys):
    sharded = f"--config={CONFIGS}/trainer/fsdp.yaml"
    line = refused(run, capsys, *TINY, sharded, averaging, "--trainer.accelerator=cpu", "--trainer.devices=1")
    assert "averages complete models" in line
