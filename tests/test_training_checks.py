"""Trainers with which a task cannot be trained are refused in one line, before any data are read."""

import pytest
from test_cli import refused
from test_end_of_training import TINY

NO_VALIDATION = "--trainer.limit_val_batches=0"


def callback(name, **arguments):
    return f"--trainer.callbacks=[{{class_path: {name}, init_args: {arguments}}}]"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--trainer.max_epochs=0"], "trainer.max_epochs is 0, and fit would train nothing"),
        (["--trainer.max_steps=0"], "trainer.max_steps is 0, and fit would train nothing"),
        (["--trainer.limit_train_batches=0"], "trainer.limit_train_batches is 0, and fit would train nothing"),
        ([callback("BackboneFinetuning")], "use callbacks.GradualUnfreezing"),
        ([callback("LearningRateFinder")], "LearningRateFinder sets an attribute that tasks do not have"),
        ([callback("BatchSizeFinder")], "BatchSizeFinder changes the batch size"),
        ([callback("ModelPruning", pruning_fn="l1_unstructured", amount=0.1)], "ModelPruning replaces weights"),
        ([callback("ModelCheckpoint", filename="best")], "would write checkpoints/best.ckpt"),
        ([callback("ModelCheckpoint", save_last="link")], "would write checkpoints/last.ckpt"),
        ([callback("EarlyStopping", monitor="val/loss"), NO_VALIDATION], "EarlyStopping monitors 'val/loss'"),
        ([callback("ModelCheckpoint", monitor="val/loss"), NO_VALIDATION], "ModelCheckpoint monitors 'val/loss'"),
        (
            [callback("GradientAccumulationScheduler", scheduling={0: 2}), "--trainer.accumulate_grad_batches=2"],
            "both say how many batches make an optimizer step",
        ),
        (["--trainer.strategy=ddp_spawn", "--trainer.devices=2"], "got one that starts them by spawn"),
        (["--trainer.strategy=ddp_fork", "--trainer.devices=2"], "got one that starts them by fork"),
        (["--trainer.strategy=ddp_notebook", "--trainer.devices=2"], "got one that starts them by fork"),
    ],
)
def test_trainer_that_a_task_cannot_be_trained_with_is_refused(settings, words, run, capsys, tmp_path):
    assert words in refused(run, capsys, *TINY, *settings)
    assert not list(tmp_path.glob("lightning_logs/*/version_0/metrics.json"))


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint"])
def test_monitor_that_is_not_logged_ends_training_in_one_line(name, run, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*TINY, callback(name, monitor="val/acc"))
    assert ended.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("gpt2-pl: error: trainer: ")
    assert "val/acc" in line
    assert "val/accuracy" in line
