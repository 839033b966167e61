"""gpt2-pl sweep: execution of every run exactly once despite interruptions."""

import json
import os
import signal
import time

import psutil
import pytest
import torch
from conftest import ROOT, metrics
from helpers.forked import Forked
from helpers.sweeps import FILE, start, sweep
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2_pl import GPT2
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.sweep.config import SweepConfig
from gpt2_pl.pretrained import weights_sha256


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "s.yaml").write_text(text)
        return tmp_path / "s.yaml"

    return write


def kill(process):
    process.kill()
    process.wait()


BAD = "      bad: {configs: [], overrides: {data.nonsense: 1}, seeds: [1]}\n"


def test_sweep_repeated_retries_only_failed_runs_and_refuses_changed_settings(file, tmp_path):
    file(FILE + BAD)
    status, out, error = sweep(tmp_path, "--max_parallel=2")
    assert status == 1
    assert out.count(": started") == 3
    assert "toy bad seed 1: failed" in out
    assert "toy full seed 1: finished, val/accuracy" in out
    assert "lightning_logs/s/toy/bad/seed_1 failed: " in error
    assert "nonsense" in error
    folders = [tmp_path / f"lightning_logs/s/toy/full/seed_{seed}" for seed in (1, 2)]
    assert [metrics(folder)["seed"] for folder in folders] == [1, 2]
    assert all(metrics(folder)["status"] == "finished" for folder in folders)
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    status, out, _ = sweep(tmp_path)
    assert (status, out.count("started")) == (1, 1)
    file(FILE)
    status, out, error = sweep(tmp_path)
    assert status == 0, error
    assert "started" not in out
    assert "all runs are finished" in out
    assert before == {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}

    file(FILE.replace("max_epochs: 2", "max_epochs: 3"))
    status, _, error = sweep(tmp_path)
    assert status == 2
    assert "trainer.max_epochs was '2' and is '3'" in error


def wait_for(found, seconds=100.0):
    deadline = time.monotonic() + seconds
    while not found() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found()


def epochs_begun(folder):
    """The number of epochs validated by all processes of a run, from TensorBoard's files."""
    scalars = EventAccumulator(str(folder)).Reload().Scalars("val/accuracy")
    return len(scalars)


def test_sweep_killed_at_any_moment_completes_without_repeating_runs(file, tmp_path):
    """Kill the sweep with its jobs while jobs start, after an epoch, and after a run; then the sweep alone."""
    file(FILE.replace("max_epochs: 2", "max_epochs: 8"))
    logs = tmp_path / "lightning_logs"
    runs = [logs / f"s/toy/full/seed_{seed}" for seed in (1, 2)]
    moments = [
        lambda: list(logs.glob("s.sweep/jobs/*_log.out")),
        lambda: (runs[0] / "checkpoints/last.ckpt").is_file(),
        lambda: (runs[0] / "predictions_test.csv").is_file(),
    ]
    for moment in moments:
        process = start(tmp_path, "--max_parallel=1")
        wait_for(moment)
        kill(process)
    process = start(tmp_path, "--max_parallel=1")
    wait_for(lambda: (runs[1] / "checkpoints/last.ckpt").is_file() or metrics_of(runs[1]))
    os.kill(process.pid, signal.SIGKILL)  # its job lives on
    process.wait()
    status, out, error = sweep(tmp_path, "--max_parallel=2")
    assert status == 0, error
    assert "all runs are finished" in out
    for folder in runs:
        assert metrics(folder)["status"] == "finished"
        assert [epoch["epoch"] for epoch in metrics(folder)["epochs"]] == list(range(1, 9))
    assert epochs_begun(runs[1]) == 8  # never killed itself, run once
    assert epochs_begun(runs[0]) <= 8 + 2  # of each kill it may have repeated the epoch that it was in
    assert len(list(runs[0].parent.iterdir())) == 2


def metrics_of(folder):
    return (folder / "metrics.json").is_file()


def test_run_job_two_processes_execute_the_same_run_once(file, tmp_path):
    file(FILE.replace("[1, 2]", "[1]"))
    code = (
        "from pathlib import Path; from gpt2_pl.commands import main\n"
        "from gpt2_pl.experiments.sweep.config import SweepConfig\n"
        "from gpt2_pl.experiments.sweep.executor import RunJob\n"
        "RunJob(main)(SweepConfig.read(Path('s.yaml')).experiments[0].runs()[0])"
    )
    (tmp_path / "make.py").write_text(code)
    both = [Forked([tmp_path / "make.py"], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    outs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("gpt2-pl fit" in out for out in outs) == [False, True]


def test_sweep_pretrained_base_is_trained_first_and_once_per_seed(file, tmp_path, base):
    reviews = tmp_path / "reviews.csv"
    reviews.write_text("sentence\tsentiment\n" + "".join(f"a fine film number {i}\t{i % 2}\n" for i in range(40)))
    files = f"data.train_file: {reviews}, data.val_file: {reviews}, trainer.max_epochs: 1, trainer.accelerator: cpu"
    config = ROOT / "configs"
    file(f"""
name: s
overrides: {{model.base: {base}, {files}, trainer.enable_progress_bar: false, data.max_length: 24}}
seeds: [1]
tasks:
  imdb:
    configs: [{config}/task/imdb.yaml]
    pretrain:
      adapted: {{configs: [{config}/task/text.yaml], overrides: {{data.column: sentence}}}}
    strategies:
      ulmfit: {{configs: [{config}/strategy/ulmfit.yaml], base: adapted}}
      llrd: {{configs: [{config}/strategy/llrd.yaml], base: adapted}}
""")
    status, _, error = sweep(tmp_path, "--max_parallel=2")
    assert status == 0, error
    logs = tmp_path / "lightning_logs"
    made = metrics(logs / "s.pretrain/imdb/adapted/seed_1")
    ulmfit, llrd = (metrics(logs / f"s/imdb/{name}/seed_1") for name in ("ulmfit", "llrd"))
    digest = weights_sha256(GPT2.from_pretrained(base))
    assert ulmfit["base"]["digest"] == llrd["base"]["digest"] != digest
    assert ulmfit["base"]["origin"] == made["base"]["digest"] == digest
    assert ulmfit["base"]["seconds"] == made["seconds"]
    logs_of_jobs = [path.read_text() for path in (logs / "s.sweep/jobs").glob("*_log.out")]
    assert sum(text.count("--name=s.pretrain/imdb/adapted") for text in logs_of_jobs) == 1


def test_sweep_search_best_settings_are_used_by_seeds(file, tmp_path):
    pytest.importorskip("optuna")
    search = "full: {search: {trials: 2, space: {model.optimizer.init_args.lr: [0.0, 3.0e-3]}}, "
    file(FILE.replace("full: {", search).replace("[1, 2]", "[5]"))
    first = start(tmp_path, "--max_parallel=1")
    wait_for((tmp_path / "lightning_logs/s.search/toy/full/trial_0/metrics.json").is_file)
    kill(first)
    status, _, error = sweep(tmp_path, "--max_parallel=2")
    assert status == 0, error
    trials = sorted((tmp_path / "lightning_logs/s.search/toy/full").iterdir())
    assert [path.name for path in trials] == [f"trial_{n}" for n in range(2)]
    scores = {path.name: metrics(path)["scores"]["val/accuracy"] for path in trials}
    key = "model.optimizer.init_args.lr"
    rates = {path.name: json.loads((path / "sweep.json").read_text())["flags"][key] for path in trials}
    best = max(scores, key=scores.get)
    run = json.loads((tmp_path / "lightning_logs/s/toy/full/seed_5/sweep.json").read_text())
    assert run["flags"][key] == rates[best]
    assert set(rates.values()) <= {"0.0", "0.003"}
    assert "started" not in sweep(tmp_path)[1]
    file((tmp_path / "s.yaml").read_text().replace("3.0e-3", "4.0e-3"))
    status, _, error = sweep(tmp_path)
    assert status == 2
    assert "lightning_logs/s.search/toy/full" in error


@pytest.mark.parametrize("how", ["SIGTERM to the sweep", "Ctrl-C in its terminal"])
def test_sweep_interrupted_ends_its_runs_and_prints_one_line(how, file, tmp_path):
    file(FILE.replace("max_epochs: 2", "max_epochs: 2000"))
    process = start(tmp_path, "--max_parallel=1")
    folder = tmp_path / "lightning_logs/s/toy/full/seed_1"
    wait_for(lambda: (folder / "checkpoints/last.ckpt").is_file())
    jobs = psutil.Process(process.pid).children(recursive=True)
    assert len(jobs) >= 2
    if how == "Ctrl-C in its terminal":  # which reaches all processes of the group
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "gpt2-pl: stopped; the same command resumes the sweep\n"
    assert not [job for job in jobs if job.is_running() and job.status() != psutil.STATUS_ZOMBIE]
    assert metrics(folder)["status"] == "interrupted"  # it saved the step that it had reached
    reached = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert reached >= metrics(folder)["steps"] - 1


def test_hyperparameter_search_killed_resumes_with_complete_trials(file, tmp_path):
    """An incomplete trial, a truncated last line, a score of NaN, and a best trial that changes."""
    pytest.importorskip("optuna")
    from gpt2_pl.experiments.sweep.search import HyperparameterSearch

    search = "full: {search: {trials: 2, space: {model.optimizer.init_args.lr: {low: 0.001, high: 0.01}}}, "
    path = file(FILE.replace("full: {", search).replace("[1, 2]", "[5]"))
    begun = HyperparameterSearch(SweepConfig.read(path).experiments[0])
    begun.study.ask()
    journal = tmp_path / "lightning_logs/s.search/toy/full.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole[: len(whole) // 3].rpartition(b"\n")[0] + b'\n{"op')
    journal.write_bytes(whole + b'{"op')
    search = HyperparameterSearch(SweepConfig.read(path).experiments[0])
    first, second = search.next(), search.next()
    assert [run.version for run in (first, second)] == ["trial_1", "trial_2"]
    assert all(any("lr=" in flag for flag in run.flags) for run in (first, second))
    assert search.next() is None

    def score(run, value, last=False):
        run.folder.mkdir(parents=True)
        account = {"status": "finished", "monitor": "val/accuracy", "mode": "max", "scores": {"val/accuracy": value}}
        (run.folder / "metrics.json").write_text(json.dumps(account))

    score(first, float("nan"))
    search.report_result(first)
    assert not search.finished
    score(second, 0.5)
    search.report_result(second)
    assert search.finished
    assert search.next() is None
    best = search.experiment.best_flags
    (run,) = search.experiment.runs()
    score(run, 0.5)
    (run.folder / "sweep.json").write_text(json.dumps(run.record()))
    more = HyperparameterSearch(
        SweepConfig.read(file(path.read_text().replace("trials: 2", "trials: 3"))).experiments[0]
    )
    third, fourth = more.next(), more.next()  # of the trials that failed, one is made again
    assert {third.version, fourth.version} == {"trial_3", "trial_4"}
    score(third, 0.4)
    more.report_result(third)
    score(fourth, 0.9)
    with pytest.raises(InputError, match="toy/full/seed_5"):
        more.report_result(fourth)
    assert more.experiment.best_flags != best


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_hyperparameter_search_random_trials_do_not_depend_on_scores(file, tmp_path, monkeypatch, sampler):
    pytest.importorskip("optuna")
    from gpt2_pl.experiments.sweep.search import HyperparameterSearch

    space = "trials: 8, space: {model.optimizer.init_args.lr: {low: 0.001, high: 0.01}}"
    text = FILE.replace("full: {", f"full: {{search: {{{space}, sampler: {sampler}}}, ").replace("[1, 2]", "[5]")
    drawn = []
    for sign in (1, -1):
        (tmp_path / str(sign)).mkdir()
        monkeypatch.chdir(tmp_path / str(sign))
        search = HyperparameterSearch(SweepConfig.read(file(text)).experiments[0])
        while (run := search.next()) is not None:
            run.folder.mkdir(parents=True)
            rate = float(next(flag for flag in run.flags if ".lr=" in flag).partition("=")[2])
            account = {"status": "finished", "monitor": "val/accuracy", "scores": {"val/accuracy": sign * rate}}
            (run.folder / "metrics.json").write_text(json.dumps({**account, "mode": "max"}))
            search.report_result(run)
        drawn.append([trial.params for trial in search.study.trials])
        described = json.loads((tmp_path / str(sign) / "lightning_logs/s.search/toy/full.json").read_text())
        assert described.get("sampler", "tpe") == sampler
    assert len(drawn[0]) == 8
    assert (drawn[0] == drawn[1]) == (sampler == "random")
