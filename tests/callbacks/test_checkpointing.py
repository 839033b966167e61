"""Resumed runs: their folder, best checkpoint and early-stopping patience are kept."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import metrics, weights
from helpers.refusals import refused
from helpers.stops import TINY

from gpt2_pl.callbacks import AtomicCheckpointIO, RunSummary
from gpt2_pl.experiments.run import Run
from gpt2_pl.experiments.selection import select
from gpt2_pl.tasks import SentimentClassifier

QUICK = [*TINY, "--trainer.precision=32-true", "--model.optimizer.init_args.lr=1e-3"]  # six steps an epoch


def same_checkpoint(a, b):
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def outcome(folder):
    """The part of metrics.json that equal runs share."""
    account = metrics(folder)
    return {key: account[key] for key in ("status", "scores", "epochs", "parameters", "steps", "seed")}


def test_fit_resumed_after_first_epoch_continues_bitwise_in_same_folder(run):
    whole = run(*QUICK, "--trainer.max_epochs=3", "--name=whole")
    half = run(
        *QUICK, "--trainer.max_epochs=3", "--name=half", "--trainer.max_time=00:00:00:00", "--trainer.min_epochs=1"
    )
    half_account = metrics(half)
    assert len(half_account["epochs"]) == 1
    resumed = run(*QUICK, "--trainer.max_epochs=3", f"--ckpt_path={half}/checkpoints/last.ckpt")
    assert resumed == half
    assert outcome(resumed) == outcome(whole)
    for name in ("best.ckpt", "last.ckpt"):
        assert same_checkpoint(whole / "checkpoints" / name, half / "checkpoints" / name)
    assert [path.name for path in half.parent.iterdir()] == ["version_0"]


def test_fit_resumed_after_best_epoch_keeps_best_checkpoint(run):
    """Use a learning rate that ruins the model after the first epoch, so that its checkpoint stays the best."""
    ruin = [
        "--model.schedule=gpt2_pl.optim.ConstantWithWarmup",
        "--trainer.max_epochs=3",
        "--model.optimizer.init_args.lr=0.3",
    ]
    whole = run(*QUICK, *ruin, "--name=whole")
    half = run(*QUICK, *ruin, "--name=half", "--trainer.max_time=00:00:00:00", "--trainer.min_epochs=2")
    assert len(metrics(half)["epochs"]) == 2
    elsewhere = run(*QUICK, *ruin, "--name=elsewhere", f"--ckpt_path={half}/checkpoints/last.ckpt")
    assert elsewhere.parent.name == "elsewhere"
    resumed = run(*QUICK, *ruin, f"--ckpt_path={half}/checkpoints/last.ckpt")
    for folder in (elsewhere, resumed):
        assert outcome(folder) == outcome(whole)
        assert same_checkpoint(whole / "checkpoints/best.ckpt", folder / "checkpoints/best.ckpt")


@pytest.fixture(scope="module")
def stopped_once(fitted):
    settings = ["--trainer.max_epochs=2", "--trainer.max_time=00:00:00:00", "--trainer.min_epochs=1"]
    return fitted(*QUICK, *settings)


@pytest.fixture
def stopped(stopped_once, run, tmp_path):
    """A run that was stopped after its first epoch of two."""
    return shutil.copytree(stopped_once, tmp_path / "lightning_logs/quickstart/version_0")


def changed(file, change):
    """Change the content of a checkpoint file."""
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def test_fit_resumed_with_forged_paths_copies_no_foreign_files(stopped, run, tmp_path):
    secret = tmp_path / "secret"
    (secret / "checkpoints").mkdir(parents=True)
    for name in ("checkpoints/id_rsa", "checkpoints/best.ckpt", "salaries_val.csv", "predictions_val.csv"):
        (secret / name).write_text("secret")
    (stopped / "predictions_val.csv").unlink()
    (stopped / "predictions_val.csv").symlink_to(secret / "salaries_val.csv")
    (stopped / "salaries_val.csv").write_text("secret")
    (stopped / "validations").mkdir()
    (stopped / "validations/step_1").symlink_to(secret)
    for name in ("id_rsa", "best.ckpt"):

        def change(content, name=name):
            for key, state in content["callbacks"].items():
                if key.startswith("ResumableModelCheckpoint"):
                    best = str(secret / "checkpoints" / name)
                    state.update(dirpath=str(secret / "checkpoints"), best_model_path=best, best_k_models={best: 1.0})

        changed(stopped / "checkpoints/last.ckpt", change)
        more = [f"--name={name}", f"--ckpt_path={stopped}/checkpoints/last.ckpt"]
        folder = run(*QUICK, "--trainer.max_epochs=2", *more)
        assert folder.parent.name == name
        assert metrics(folder)["status"] == "finished"
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
        for path in (path for path in folder.rglob("*") if path.is_file()):
            assert b"secret" not in path.read_bytes().replace(str(secret).encode(), b""), path
    assert not (folder / "salaries_val.csv").exists()


def test_fit_save_predictions_every_epoch_keeps_the_rows_of_all_validations(run, tmp_path):
    settings = [*QUICK, "--trainer.max_epochs=2", "--save_predictions=every_epoch", "--trainer.val_check_interval=3"]
    whole = run(*settings)
    names = {f"step_{step}" for step in (3, 6, 9, 12)}
    assert {path.name for path in (whole / "validations").iterdir()} == names
    assert [len(Run.read(whole).validations), select(Run.read(whole)).chosen.sum()] == [4, 40]
    stopped = run(*settings, "--trainer.max_time=00:00:00:00", "--trainer.min_epochs=1")
    resumed = run(*settings, "--name=other", f"--ckpt_path={stopped}/checkpoints/last.ckpt")
    for name in names:
        file = f"validations/{name}/predictions_val.csv"
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()


def test_fit_resumed_with_invalid_best_checkpoint_is_refused(stopped, run, capsys):
    (stopped / "checkpoints/best.ckpt").write_text("secret")
    more = ["--name=elsewhere", f"--ckpt_path={stopped}/checkpoints/last.ckpt"]
    line = refused(run, capsys, *QUICK, "--trainer.max_epochs=2", *more)
    assert "best.ckpt is not a checkpoint" in line
    assert not list(stopped.parents[1].glob("elsewhere/*/checkpoints/*"))


MALFORMED = {  # changes of a checkpoint, and what the message names
    "loops": (lambda content: content["loops"]["fit_loop"]["epoch_progress"].clear(), "epoch_progress.total"),
    "param_groups": (lambda content: content["optimizer_states"][0].update(param_groups=[]), "param_groups"),
    "no optimizer": (lambda content: content.pop("optimizer_states"), "a model alone"),
    "schedule": (lambda content: content["lr_schedulers"].__setitem__(0, {}), "lr_schedulers[0]."),
}


def test_fit_resumed_with_malformed_trainer_state_is_refused_in_one_line(stopped, run, capsys):
    checkpoint = stopped / "checkpoints/last.ckpt"
    original = checkpoint.read_bytes()
    for case, (change, named) in MALFORMED.items():
        changed(checkpoint, change)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(*QUICK, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}")
        assert ended.value.code == 2, case
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("gpt2-pl: error: ckpt_path: "), case
        assert "last.ckpt: " in line, case
        assert named in line, case
        checkpoint.write_bytes(original)


def test_fit_resumed_between_training_and_test_computes_test_scores(run):
    folder = run(*QUICK, "--trainer.max_epochs=2")
    expected = outcome(folder)
    assert "test/accuracy" in expected["scores"]
    (folder / "metrics.json").unlink()
    (folder / "predictions_test.csv").unlink()
    resumed = run(*QUICK, "--trainer.max_epochs=2", f"--ckpt_path={folder}/checkpoints/last.ckpt")
    assert resumed == folder
    assert outcome(resumed) == expected
    assert (folder / "predictions_test.csv").is_file()


def test_fit_version_of_existing_run_is_refused(run, tmp_path, capsys):
    run(*QUICK, "--trainer.max_epochs=1")
    named = [*QUICK, "--trainer.max_epochs=1", "--version=mine"]
    run(*named)
    before = (tmp_path / "lightning_logs/quickstart/mine/metrics.json").read_text()
    with pytest.raises(SystemExit):
        run(*named)
    assert (tmp_path / "lightning_logs/quickstart/mine/metrics.json").read_text() == before
    assert "quickstart/mine is the folder of another run" in capsys.readouterr().err


class PowerCut(BaseException):
    """A stand-in for the sudden end of the process."""


def test_fit_killed_at_end_of_unvalidated_epoch_resumes_bitwise(run, monkeypatch):
    settings = [*QUICK, "--trainer.max_epochs=2", "--trainer.val_check_interval=4"]
    whole = run(*settings, "--name=whole")  # of the six steps of an epoch it validates after the fourth
    assert metrics(whole)["steps"] == 12

    def cut(*_):
        raise PowerCut

    with monkeypatch.context() as power:
        power.setattr(RunSummary, "on_train_epoch_end", cut)
        with pytest.raises(PowerCut):
            run(*settings, "--name=half", "--checkpoint_every_n_steps=1")
    half = whole.parents[1] / "half/version_0"
    resumed = run(*settings, f"--ckpt_path={half}/checkpoints/last.ckpt")
    assert resumed == half
    assert metrics(half)["steps"] == 12
    assert same_checkpoint(whole / "checkpoints/last.ckpt", half / "checkpoints/last.ckpt")
    of_validation = [
        [
            {name: value for name, value in epoch.items() if not name.startswith("train/")}
            for epoch in metrics(r)["epochs"]
        ]
        for r in (whole, half)
    ]
    assert of_validation[0] == of_validation[1]
    assert [len(epoch) for epoch in of_validation[0]] == [4, 4]


def test_fit_epoch_without_validation_records_no_validation_scores(run):
    folder = run(*QUICK, "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2")
    account = metrics(folder)
    assert ["val/accuracy" in epoch for epoch in account["epochs"]] == [False, True, True]  # the last is always scored
    assert account["scores"]["best_epoch"] in (2, 3)


def last_of(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    "stop", [pytest.param("--trainer.max_epochs=2", marks=pytest.mark.slow), "--trainer.max_steps=8"]
)
def test_fit_checkpoint_every_n_steps_leaves_last_checkpoint_unchanged(run, stop):
    """Compare last.ckpt with and without N, where N divides the six steps per epoch or does not."""
    settings = [*QUICK, stop]
    whole = run(*settings, "--name=whole")
    expected = last_of(whole)
    assert expected["global_step"] == metrics(whole)["steps"]
    for every in (4, 6):
        folder = run(*settings, f"--name=every_{every}", f"--checkpoint_every_n_steps={every}")
        last = last_of(folder)
        assert (last["global_step"], last["epoch"]) == (expected["global_step"], expected["epoch"])
        assert last["callbacks"]["RunSummary"]["epochs"] == expected["callbacks"]["RunSummary"]["epochs"]
        assert same_checkpoint(whole / "checkpoints/last.ckpt", folder / "checkpoints/last.ckpt")


def test_fit_checkpoint_every_n_steps_saves_at_steps_and_epoch_ends(run, monkeypatch):
    saved = []
    save = AtomicCheckpointIO.save_checkpoint

    def note(self, checkpoint, path, *args, **kwargs):
        saved.append((checkpoint["global_step"], Path(path).name))
        save(self, checkpoint, path, *args, **kwargs)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", note)
    several = [*QUICK, "--trainer.max_epochs=2", "--checkpoint_every_n_steps=4"]
    run(*several)
    assert [step for step, name in saved if name == "last.ckpt"] == [4, 6, 8, 12]
    saved.clear()
    run(*several, "--trainer.accumulate_grad_batches=2", "--checkpoint_every_n_steps=1")  # three steps an epoch
    assert [step for step, name in saved if name == "last.ckpt"] == [1, 2, 3, 4, 5, 6]


def test_fit_resumed_in_mid_epoch_warns_as_little_as_a_whole_run(run, recwarn):
    """Lightning warns of a data loader that cannot be resumed, which this library's can."""
    run(*QUICK, "--trainer.max_steps=8", "--name=whole")
    whole = {str(warning.message) for warning in recwarn}
    folder = run(*QUICK, "--trainer.max_steps=4", "--name=half")
    recwarn.clear()
    run(*QUICK, "--trainer.max_steps=8", "--ckpt_path", folder / "checkpoints/last.ckpt")
    assert {str(warning.message) for warning in recwarn} <= whole


def contents(folder):
    """The contents of a run's files, except TensorBoard's."""
    files = [path for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name]
    return {path.relative_to(folder): path.read_bytes() for path in files}


OTHER_SETTINGS = [  # flags, and what the message names
    (["--model.config.n_layer=4"], "gpt2.h.1."),
    (["--model.optimizer.init_args.lr=0.01"], "model.optimizer"),
    (["--model.pooling=mean"], "model.pooling"),
    (["--data.n_train=90"], "data.n_train"),
    (["--seed_everything=2"], "seed_everything"),
    (["--trainer.callbacks=[{class_path: gpt2_pl.callbacks.DiscriminativeLR}]"], "trainer.callbacks"),
]


def test_fit_resumed_with_other_settings_is_refused_and_run_unchanged(stopped, run, capsys):
    before = contents(stopped)
    checkpoint = f"--ckpt_path={stopped}/checkpoints/last.ckpt"
    for change, named in OTHER_SETTINGS:
        assert named in refused(run, capsys, *QUICK, "--trainer.max_epochs=2", checkpoint, *change), change
        assert contents(stopped) == before, change
    assert [path.name for path in stopped.parent.iterdir()] == [stopped.name]


def test_test_resumed_run_writes_new_run_folder(run):
    folder = run(*QUICK, "--trainer.max_epochs=1", "--version=version_7")
    resumed = run(*QUICK, "--trainer.max_epochs=2", f"--ckpt_path={folder}/checkpoints/last.ckpt")
    assert resumed == folder
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["version"] is settings["ckpt_path"] is None
    before = contents(folder)
    scored = run("test", f"--config={folder}/config.yaml", f"--ckpt_path={folder}/checkpoints/best.ckpt")
    assert scored.name == "version_8"
    assert contents(folder) == before
    test = {name: value for name, value in metrics(folder)["scores"].items() if name.startswith("test/")}
    assert metrics(scored)["scores"] == test


def test_fit_interrupted_in_second_epoch_resumes_bitwise(run, monkeypatch):
    """Interrupt where Lightning's counters of the preceding validation disagree."""
    step, steps = SentimentClassifier.training_step, []

    def interrupt(task, batch, batch_idx):
        steps.append(batch_idx)
        if len(steps) == 9:  # of six an epoch
            raise KeyboardInterrupt
        return step(task, batch, batch_idx)

    monkeypatch.setattr(SentimentClassifier, "training_step", interrupt)
    settings = ["--checkpoint_every_n_steps=1", "--trainer.max_epochs=2", "--name=a"]
    with pytest.raises(SystemExit):
        run(*QUICK, *settings)
    monkeypatch.setattr(SentimentClassifier, "training_step", step)
    folder = run(*QUICK, *settings, "--ckpt_path=lightning_logs/a/version_0/checkpoints/last.ckpt")
    whole = run(*QUICK, *settings, "--name=whole")
    assert same_checkpoint(folder / "checkpoints/last.ckpt", whole / "checkpoints/last.ckpt")
