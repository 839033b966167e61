"""gpt2-pl sweep: its configuration, and execution of every run exactly once despite interruptions."""

import json
import os
import signal
import time

import psutil
import pytest
import torch
from conftest import ROOT, metrics
from helpers.forked import Forked
from helpers.refusals import refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2_pl import GPT2
from gpt2_pl.commands import main
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.sweep.config import SweepConfig
from gpt2_pl.pretrained import weights_sha256

QUICK = "{data.n_train: 60, trainer.enable_progress_bar: false, trainer.precision: 32-true, trainer.max_epochs: 2}"
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


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "s.yaml").write_text(text)
        return tmp_path / "s.yaml"

    return write


def start(folder, *args):
    """Start the sweep in a separate process, whose jobs end with it."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return Forked([ROOT / "cli.py", "sweep", "s.yaml", *args], cwd=folder, env=environment)


def kill(process):
    process.kill()
    process.wait()


# What a file asks for


def test_sweep_config_grid_and_seeds_give_commands(file):
    plan = SweepConfig.read(
        file(
            f"""
overrides: {{trainer.max_epochs: 3}}
seeds: [1, 2]
strategies: [full]
tasks:
  one:
    configs: [{ROOT}/configs/task/sst5.yaml]
    overrides: {{data.train_file: '${{HOME}}/a.csv'}}
    strategies:
      llrd+lora:
        configs: [{ROOT}/configs/strategy/llrd.yaml, {ROOT}/configs/strategy/lora.yaml]
        overrides: {{trainer.max_epochs: 4}}
        seeds: [7]
        grid: {{model.optimizer.init_args.lr: [1.0e-3, 2.0e-3], data.batch_size: [8]}}
""".replace("strategies: [full]", f"strategies: {{full: {{configs: [{ROOT}/configs/strategy/full.yaml]}}}}")
        )
    )
    assert plan.name == "s"
    runs = [run for experiment in plan.experiments for run in experiment.runs()]
    assert [(run.strategy, run.version) for run in runs] == [
        ("full", "seed_1"), ("full", "seed_2"),
        ("llrd+lora,lr=0.001,batch_size=8", "seed_7"), ("llrd+lora,lr=0.002,batch_size=8", "seed_7"),
    ]  # fmt: skip
    command = runs[3].command()
    assert [part.rpartition("/")[2] for part in command if part.startswith("--config")] == [
        "sst5.yaml", "llrd.yaml", "lora.yaml"
    ]  # fmt: skip
    flags = [part for part in command[1:] if not part.startswith("--config")]
    assert flags == [
        "--trainer.max_epochs=3", f"--data.train_file={os.environ['HOME']}/a.csv", "--trainer.max_epochs=4",
        "--model.optimizer.init_args.lr=0.002", "--data.batch_size=8", "--seed_everything=7",
        "--name=s/one/llrd+lora,lr=0.002,batch_size=8", "--version=seed_7",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "the file must be a mapping with name, "),
        (
            "tasks: {toy: {config: []}}",
            "unknown key tasks.toy.config; did you mean configs? keys are configs, overrides",
        ),
        (
            "tasks: {toy: {configs: [nowhere.yaml], strategies: [full]}}",
            "tasks.toy.configs: there is no file nowhere.yaml",
        ),
        ("tasks: {sst9: {strategies: [full]}}", "tasks.sst9.configs: there is no file configs/task/sst9.yaml"),
        (FILE.replace("[1, 2]", "[1, 1]"), "seeds must be a list of different integers of at least 0, got [1, 1]"),
        (
            FILE.replace("name: s", "name: ../s"),
            "name must be a name of up to 200 letters, digits, _ . + -, got '../s'",
        ),
        (
            FILE.replace("full:", "../full:"),
            "tasks.toy.strategies: a name must be up to 200 letters, digits, _ . + -, got '../full'",
        ),
        (FILE.replace("60,", "'${NOWHERE_TO_BE_FOUND}',"), "the environment variable NOWHERE_TO_BE_FOUND is not set"),
        (FILE + "        base: x\n", "is not YAML"),
        (
            FILE.replace("full: {", "full: {base: x, "),
            "tasks.toy.strategies.full.base must be one of the task's bases (none), got 'x'",
        ),
        (
            FILE.replace("full: {", "full: {grid: {a: 3}, "),
            "grid must be a mapping of keys to lists of values, got {'a': 3}",
        ),
        (FILE.replace("full: {", "full: {overrides: {name: x}, "), "full.overrides.name is set by the sweep"),
        (FILE.replace("full: {", "full: {search: {space: {a: 3}}, "), "full.search.space.a must be a list of choices"),
        (FILE.replace("full: {", "full: {search: {space: {a: {low: 0, high: 1, log: true}}}, "), "space.a must be"),
        (FILE + "max_parallel: 0", "max_parallel must be an integer of at least 1, got 0"),
        (FILE + "slurm: yes", "slurm must be a mapping"),
        (
            FILE + "slurm: {tasks_per_node: 2}",
            "slurm.tasks_per_node must be 1, because a run of a sweep is one task on one node, got 2",
        ),
        ("tasks: {}", "tasks must be a mapping of names"),
        (FILE.replace("full: {", "full: {grid: {seed_everything: [1]}, "), "grid.seed_everything is set by the sweep"),
        (FILE.replace("full: {", "full: {search: {space: {name: [a]}}, "), "space.name is set by the sweep"),
        (
            FILE.replace("full: {", "full: {search: {space: {a: {low: 1, high: 2, log: true, step: 1}}}, "),
            "space.a must be",
        ),
        (FILE.replace("full: {", "full: {overrides: {3: 4}, "), "full.overrides: unknown key 3"),
        (FILE.replace("full: {", "full: {overrides: {'version=../../x': 4}, "), "unknown key 'version=../../x'"),
        (FILE.replace("full: {", "full: {overrides: {nam: ../x}, "), "unknown key 'nam'"),
        (FILE.replace("full: {", "full: {overrides: {trainer.default_root_dir: /x}, "), "root_dir is set by the sweep"),
        (
            FILE.replace("full: {", "full: {overrides: {trainer: {default_root_dir: /x}}, "),
            "trainer is set by the sweep",
        ),
        (
            FILE.replace("full: {", "full: {overrides: {data.n_train: 2001-01-01}, "),
            "data.n_train must be text, a number",
        ),
        (
            FILE.replace("full: {", "full: {overrides: {data.n_train: !!binary aaaa}, "),
            "overrides.data.n_train must be",
        ),
        (FILE.replace("full: {", 'full: {overrides: {data.n_train: "\\ud800"}, '), "is not YAML"),
        (FILE.replace("full: {", "full: {overrides: &a {data.n_train: *a}, "), "*a is recursive"),
        (FILE.replace("full: {", "full: {grid: {3: [4]}, "), "full.grid: unknown key 3"),
        (FILE.replace("full: {", "full: {search: {space: {data.n_train: [2001-01-01]}}, "), "data.n_train must be"),
        (FILE.replace("full: {", "full: {base: [1], "), "full.base must be one of the task's bases (none), got [1]"),
        (FILE.replace("full:", f"{'x' * 300}:"), "a name must be up to"),
        (FILE.replace("full.yaml", f"{'x' * 300}.yaml"), "there is no file"),
        (FILE + f"      Full: {{configs: [{ROOT}/configs/strategy/lora.yaml]}}\n", "two runs have one folder, "),
        (FILE + f"      full: {{configs: [{ROOT}/configs/strategy/lora.yaml]}}\n", "the key 'full' is given twice"),
        (
            FILE.replace("full: {", "full: {grid: {data.n_train: [60, '60']}, "),
            "s/toy/full,n_train=60/seed_1: toy.full",
        ),
        (
            FILE.replace("full: {", "full: {grid: {data.n_train: [60]}, ") + "      full,n_train=60: {configs: []}\n",
            "two runs have one folder, lightning_logs/s/toy/full,n_train=60/seed_1",
        ),
        (
            FILE + f"  Toy: {{configs: [{ROOT}/configs/quickstart.yaml], strategies: {{full: {{configs: []}}}}}}\n",
            "lightning_logs/s/toy/full/seed_1 and lightning_logs/s/Toy/full/seed_1: toy.full, seed 1 and Toy.full",
        ),
        (
            FILE + "  two: {configs: [], strategies: [full, full]}\n",
            "tasks.two.strategies must have different names, got 'full' twice",
        ),
        ("[" * 5000, "nested more than 100 deep"),
    ],
)
def test_sweep_config_invalid_file_is_refused(text, message, file):
    path = file(text)
    with pytest.raises(InputError) as error:
        SweepConfig.read(path)
    assert str(error.value).startswith(f"{path}")
    assert message in str(error.value)


def test_sweep_linked_run_folders_are_refused(file, tmp_path, capsys):
    path = file(FILE + f"      lora: {{configs: [{ROOT}/configs/strategy/full.yaml]}}\n")
    (tmp_path / "lightning_logs/s/toy/full").mkdir(parents=True)
    SweepConfig.read(path)
    (tmp_path / "lightning_logs/s/toy/lora").symlink_to("full")
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(path)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "two runs have one folder, lightning_logs/s/toy/full/seed_1 and lightning_logs/s/toy/lora/seed_1" in line


def test_sweep_config_base_shared_by_strategies_is_accepted(file):
    text = FILE.replace("    strategies:\n", "    pretrain: {b: {configs: []}}\n    strategies:\n")
    text = text.replace("full: {", "full: {base: b, ") + "      other: {base: b, configs: []}\n"
    assert len(SweepConfig.read(file(text)).experiments) == 2
    text = text.replace("{b: {configs: []}}", "{b: {configs: []}, B: {configs: []}}").replace(
        "other: {base: b", "other: {base: B"
    )
    with pytest.raises(InputError, match=r"two runs have one folder, lightning_logs/s.pretrain/toy/b/seed_1 and "):
        SweepConfig.read(file(text))


def test_sweep_dry_run_prints_commands_and_runs_nothing(file, tmp_path, capsys):
    search = "full: {search: {trials: 3, space: {data.batch_size: [8, 16]}}, "
    path = file(FILE + f"      other: {{configs: [{ROOT}/configs/strategy/llrd.yaml]}}\n".replace("full: {", search))
    main(["sweep", str(path), "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("to do    gpt2-pl fit --config=") for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {"s.yaml"}


@pytest.mark.parametrize(
    ("name", "text"),
    [("metrics.json", text) for text in ("{", "[]", "3", '{"epochs": 3}', '{"monitor": [1]}', "\xff", "[" * 100_000)]
    + [("sweep.json", text) for text in ("{", "[]", "{}", '{"flags": [1]}', "\xff",
                                        '{"flags": {"a": 1}, "files": {}, "base": null, "threads": 1}')],
    ids=range(13),
)  # fmt: skip
def test_sweep_broken_run_files_are_refused(name, text, file, tmp_path, capsys):
    folder = tmp_path / "lightning_logs/s/toy/full/seed_1"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"status": "finished"}')
    (folder / name).write_text(text, encoding="latin-1")
    for extra in ([], ["--dry_run"]):
        with pytest.raises(SystemExit) as stop:
            main(["sweep", str(file(FILE)), *extra])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"lightning_logs/s/toy/full/seed_1/{name}" in line
        assert line.endswith("; delete lightning_logs/s/toy/full/seed_1")


# Running


def test_sweep_repeated_runs_nothing_and_refuses_changed_settings(file, tmp_path):
    file(FILE)
    done = start(tmp_path, "--max_parallel=2")
    out, error = done.communicate(timeout=200)
    assert done.returncode == 0, error
    assert out.count(": started") == 2
    folders = [tmp_path / f"lightning_logs/s/toy/full/seed_{seed}" for seed in (1, 2)]
    assert [metrics(folder)["seed"] for folder in folders] == [1, 2]
    assert all(metrics(folder)["status"] == "finished" for folder in folders)
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    out, _ = start(tmp_path).communicate(timeout=60)
    assert "started" not in out
    assert "all runs are finished" in out
    assert before == {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}

    file(FILE.replace("max_epochs: 2", "max_epochs: 3"))
    changed = start(tmp_path)
    _, error = changed.communicate(timeout=60)
    assert changed.returncode == 2
    assert "was run with other settings (trainer.max_epochs was '2' and is '3')" in error


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
    last = start(tmp_path, "--max_parallel=2")
    out, error = last.communicate(timeout=300)
    assert last.returncode == 0, error
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


def test_sweep_failed_run_is_reported_and_retried(file, tmp_path):
    bad = "      bad: {configs: [], overrides: {data.nonsense: 1}, seeds: [1]}\n"
    file(FILE.replace("[1, 2]", "[1]") + bad)
    process = start(tmp_path, "--max_parallel=2")
    out, error = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "toy bad seed 1: failed" in out
    assert "toy full seed 1: finished, val/accuracy" in out
    assert "lightning_logs/s/toy/bad/seed_1 failed: " in error
    assert "nonsense" in error
    out, _ = start(tmp_path).communicate(timeout=200)
    assert out.count("started") == 1


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
    process = start(tmp_path, "--max_parallel=2")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
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
    journal = tmp_path / "lightning_logs/s.search/toy/full.journal"
    deadline = time.monotonic() + 100
    while not list(journal.parent.glob("full/trial_0/metrics.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    kill(first)
    process = start(tmp_path, "--max_parallel=2")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    trials = sorted((tmp_path / "lightning_logs/s.search/toy/full").iterdir())
    assert [path.name for path in trials] == [f"trial_{n}" for n in range(2)]
    scores = {path.name: metrics(path)["scores"]["val/accuracy"] for path in trials}
    key = "model.optimizer.init_args.lr"
    rates = {path.name: json.loads((path / "sweep.json").read_text())["flags"][key] for path in trials}
    best = max(scores, key=scores.get)
    run = json.loads((tmp_path / "lightning_logs/s/toy/full/seed_5/sweep.json").read_text())
    assert run["flags"][key] == rates[best]
    assert set(rates.values()) <= {"0.0", "0.003"}
    again = start(tmp_path)
    out, _ = again.communicate(timeout=60)
    assert "started" not in out
    file((tmp_path / "s.yaml").read_text().replace("3.0e-3", "4.0e-3"))
    other = start(tmp_path)
    _, error = other.communicate(timeout=60)
    assert other.returncode == 2
    assert "was searched with another space or other settings" in error


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
    with pytest.raises(InputError, match="was run with other settings"):
        more.report_result(fourth)
    assert more.experiment.best_flags != best


def test_check_run_failed_before_first_checkpoint_is_accepted(file, tmp_path):
    path = file(FILE)
    run = SweepConfig.read(path).experiments[0].runs()[0]
    run.folder.mkdir(parents=True)
    (run.folder / ".sweep.json.abc.part").write_text("{")
    run.check()
    (run.folder / "metrics.json").write_text(json.dumps({"status": "failed"}))
    run.check()
    (run.folder / "metrics.json").write_text(json.dumps({"status": "finished"}))
    with pytest.raises(InputError, match="is not a run of this sweep"):
        run.check()
    record = run.record()
    (run.folder / "sweep.json").write_text(json.dumps({**record, "flags": dict(reversed(record["flags"].items()))}))
    run.check()


def test_make_executor_slurm_settings_are_written_to_the_script(file, tmp_path, monkeypatch):
    """Check the script that submitit writes, with an sbatch that only stores it."""
    from gpt2_pl.experiments.sweep.executor import make_executor

    tools = tmp_path / "bin"
    tools.mkdir()
    for name, code in (
        ("srun", "exit 0"),
        ("sbatch", 'cp "$1" script; echo Submitted batch job 7'),
        ("sacct", "exit 0"),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{code}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    plan = SweepConfig.read(file(FILE + "slurm: {slurm_partition: gpu, timeout_min: 240, gpus_per_node: 1}"))
    launcher = make_executor(plan, None, main)
    job = launcher.submit(plan.experiments[0].runs()[0], 0)
    assert job.job_id == "7"
    script = (tmp_path / "script").read_text()
    for line in ("--partition=gpu", "--time=240", "--gpus-per-node=1", "--job-name=s"):
        assert f"#SBATCH {line}" in script
    with pytest.raises(InputError, match=r"slurm: .*nonsense"):
        make_executor(SweepConfig.read(file(FILE + "slurm: {nonsense: 1}")), None, main)


def test_sweep_missing_config_error_names_working_folder(run, capsys, tmp_path):
    own = (ROOT / "configs/sweep/example.yaml").read_text().replace("configs/quickstart.yaml", "mine/own.yaml")
    (tmp_path / "s.yaml").write_text(own)
    line = refused(run, capsys, "sweep", "s.yaml", "--dry_run")
    assert "there is no file mine/own.yaml; " in line
    assert f"; paths are relative to the working folder, {tmp_path}" in line
