"""gpt2-pl sweep: its configuration, the runs that it asks for, and invalid files of its runs."""

import json
import os
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.refusals import names, refused
from helpers.sweeps import FILE

from gpt2_pl.commands import main
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.sweep.config import SweepConfig


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "s.yaml").write_text(text)
        return tmp_path / "s.yaml"

    return write


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


def full(settings):
    """Return the file with these settings of its strategy."""
    return FILE.replace("full: {", f"full: {{{settings}, ")


INVALID = {  # part of the error's key or, where it has none, of its text
    "- a": "valid dictionary",
    "tasks: {toy: {config: []}}": "tasks.toy.config",
    "tasks: {toy: {configs: [nowhere.yaml], strategies: [full]}}": "tasks.toy.configs",
    "tasks: {sst9: {strategies: [full]}}": "tasks.sst9.configs",
    "tasks: {}": "tasks",
    "[" * 5000: "nested",
    FILE.replace("[1, 2]", "[1, 1]"): "seeds",
    FILE.replace("name: s", "name: ../s"): "name",
    FILE.replace("full:", "../full:"): "tasks.toy.strategies",
    FILE.replace("full:", f"{'x' * 300}:"): "tasks.toy.strategies",
    FILE.replace("full.yaml", f"{'x' * 300}.yaml"): "tasks.toy.strategies.full.configs",
    FILE.replace("60,", "'${NOWHERE_TO_BE_FOUND}',"): "overrides.data.n_train",
    FILE + "        base: x\n": "YAML",
    FILE + "max_parallel: 0": "max_parallel",
    FILE + "2: 3": "[2]",
    FILE.replace("[1, 2]", "null"): "seeds",
    FILE.replace("[1, 2]", "[true]"): "seeds[0]",
    FILE + "slurm: yes": "slurm",
    FILE + "slurm: {tasks_per_node: 2}": "slurm.tasks_per_node",
    full("base: x"): "tasks.toy.strategies.full.base",
    full("base: [1]"): "tasks.toy.strategies.full.base",
    full("grid: {a: 3}"): "full.grid",
    full("grid: {a: []}"): "full.grid.a",
    full("grid: {seed_everything: [1]}"): "full.grid.seed_everything",
    full("grid: {3: [4]}"): "full.grid",
    full("search: {}"): "full.search.space",
    full("search: {trials: null, space: {data.batch_size: [8]}}"): "full.search.trials",
    full("search: {space: {a: 3}}"): "full.search.space.a",
    full("search: {space: {name: [a]}}"): "full.search.space.name",
    full("search: {space: {a: {low: 0, high: 1, log: true}}}"): "full.search.space.a",
    full("search: {space: {a: {low: 1, high: 2, log: true, step: 1}}}"): "full.search.space.a",
    full("search: {space: {data.n_train: [2001-01-01]}}"): "full.search.space.data.n_train",
    full("overrides: {name: x}"): "full.overrides.name",
    full("overrides: {3: 4}"): "full.overrides",
    full("overrides: {'version=../../x': 4}"): "full.overrides",
    full("overrides: {nam: ../x}"): "full.overrides",
    full("overrides: {trainer.default_root_dir: /x}"): "full.overrides.trainer.default_root_dir",
    full("overrides: {trainer: {default_root_dir: /x}}"): "full.overrides.trainer",
    full("overrides: {data.n_train: 2001-01-01}"): "full.overrides.data.n_train",
    full("overrides: {data.n_train: !!binary aaaa}"): "full.overrides.data.n_train",
    full('overrides: {data.n_train: "\\ud800"}'): "YAML",
    full("overrides: &a {data.n_train: *a}"): "alias",
    full("grid: {data.n_train: [60, '60']}"): "s/toy/full,n_train=60/seed_1",
    full("grid: {data.n_train: [60]}") + "      full,n_train=60: {configs: []}\n": "s/toy/full,n_train=60/seed_1",
    FILE + f"      Full: {{configs: [{ROOT}/configs/strategy/lora.yaml]}}\n": "s/toy/Full/seed_1",
    FILE + f"      full: {{configs: [{ROOT}/configs/strategy/lora.yaml]}}\n": "full",
    FILE + f"  Toy: {{configs: [{ROOT}/configs/quickstart.yaml], strategies: {{full: {{configs: []}}}}}}\n":
        "s/Toy/full/seed_1",
    FILE + "  two: {configs: [], strategies: [full, full]}\n": "tasks.two.strategies",
}  # fmt: skip


def test_sweep_config_invalid_file_is_refused(file):
    for text, key in INVALID.items():
        path = file(text)
        with pytest.raises(InputError) as error:
            SweepConfig.read(path)
        assert str(error.value).startswith(f"{path}"), text
        assert names(error.value, key), (text, error.value)


def test_sweep_linked_run_folders_are_refused(run, file, tmp_path, capsys):
    path = file(FILE + f"      lora: {{configs: [{ROOT}/configs/strategy/full.yaml]}}\n")
    (tmp_path / "lightning_logs/s/toy/full").mkdir(parents=True)
    SweepConfig.read(path)
    (tmp_path / "lightning_logs/s/toy/lora").symlink_to("full")
    line = refused(run, capsys, "sweep", path)
    assert "lightning_logs/s/toy/full/seed_1 and lightning_logs/s/toy/lora/seed_1" in line


def test_sweep_config_base_shared_by_strategies_is_accepted(file):
    text = FILE.replace("    strategies:\n", "    pretrain: {b: {configs: []}}\n    strategies:\n")
    text = text.replace("full: {", "full: {base: b, ") + "      other: {base: b, configs: []}\n"
    assert len(SweepConfig.read(file(text)).experiments) == 2
    text = text.replace("{b: {configs: []}}", "{b: {configs: []}, B: {configs: []}}").replace(
        "other: {base: b", "other: {base: B"
    )
    with pytest.raises(InputError, match=r"s\.pretrain/toy/b/seed_1 and "):
        SweepConfig.read(file(text))


def test_sweep_dry_run_prints_commands_and_runs_nothing(file, tmp_path, capsys):
    search = "full: {search: {trials: 3, space: {data.batch_size: [8, 16]}}, "
    path = file(FILE + f"      other: {{configs: [{ROOT}/configs/strategy/llrd.yaml]}}\n".replace("full: {", search))
    main(["sweep", str(path), "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("to do    gpt2-pl fit --config=") for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {"s.yaml"}


def test_sweep_included_file_is_found_by_name_in_any_folder(tmp_path, monkeypatch, capsys):
    for variable in ("GPT2_PL_SHARED", "GPT2_PL_DATA"):
        monkeypatch.setenv(variable, "/data")
    monkeypatch.chdir(tmp_path)
    for name in ("example", "gpt2", "results"):
        main(["sweep", f"sweep/{name}", "--dry_run"])
        assert len(capsys.readouterr().out.splitlines()) > 4
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "results"])
def test_sweep_included_file_has_valid_settings_of_every_run(name, monkeypatch, capsys):
    for variable in ("GPT2_PL_SHARED", "GPT2_PL_DATA"):
        monkeypatch.setenv(variable, "/data")
    firsts = [one.runs()[0] for one in SweepConfig.read(Path(f"sweep/{name}")).experiments]
    for one in dict.fromkeys(run for first in firsts for run in (first.base, first) if run is not None):
        with pytest.raises(SystemExit) as end:
            main([*one.command(), "--print_config"])
        assert not end.value.code, (one.folder, capsys.readouterr().err)


BROKEN = {
    "metrics.json": ("{", "[]", "3", '{"epochs": 3}', '{"monitor": [1]}', "\xff", "[" * 100_000),
    "sweep.json": ("{", "[]", "{}", '{"flags": [1]}', "\xff",
                   '{"flags": {"a": 1}, "files": {}, "base": null, "threads": 1}'),
}  # fmt: skip


def test_sweep_broken_run_files_are_refused(run, file, tmp_path, capsys):
    folder = tmp_path / "lightning_logs/s/toy/full/seed_1"
    folder.mkdir(parents=True)
    for name, text in ((name, text) for name, texts in BROKEN.items() for text in texts):
        (folder / "metrics.json").write_text('{"status": "finished"}')
        (folder / name).write_text(text, encoding="latin-1")
        for extra in ([], ["--dry_run"]):
            line = refused(run, capsys, "sweep", file(FILE), *extra)
            assert f"lightning_logs/s/toy/full/seed_1/{name}" in line, text
            assert line.endswith("; delete lightning_logs/s/toy/full/seed_1"), text


def test_check_run_failed_before_first_checkpoint_is_accepted(file, tmp_path):
    path = file(FILE)
    run = SweepConfig.read(path).experiments[0].runs()[0]
    run.folder.mkdir(parents=True)
    (run.folder / ".sweep.json.abc.part").write_text("{")
    run.check()
    (run.folder / "metrics.json").write_text(json.dumps({"status": "failed"}))
    run.check()
    (run.folder / "metrics.json").write_text(json.dumps({"status": "finished"}))
    with pytest.raises(InputError, match=str(run.folder)):
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
    with pytest.raises(InputError, match="nonsense"):
        make_executor(SweepConfig.read(file(FILE + "slurm: {nonsense: 1}")), None, main)


def test_sweep_missing_config_error_names_working_folder(run, capsys, tmp_path):
    own = (ROOT / "configs/sweep/example.yaml").read_text().replace("configs/quickstart.yaml", "mine/own.yaml")
    (tmp_path / "s.yaml").write_text(own)
    line = refused(run, capsys, "sweep", "s.yaml", "--dry_run")
    assert "mine/own.yaml" in line
    assert str(tmp_path) in line


FACTORS = """
seeds: [1]
tasks:
  sst5:
    factors:
      adapter: [none, lora, prefix_tuning]
      rates:
        flat:
        llrd: {overrides: {model.optimizer.init_args.lr: 1.0e-3}}
      template: {plain: {}, words: {configs: [strategy/hard_prompt]}}
"""


def test_sweep_config_factors_give_all_combinations_of_levels(file):
    plan = SweepConfig.read(file(FACTORS))
    names = [one.strategy for one in plan.experiments]
    assert names == [
        "full", "words", "llrd", "llrd+words", "lora", "lora+words", "lora+llrd", "lora+llrd+words", "prefix_tuning",
        "prefix_tuning+words", "prefix_tuning+llrd", "prefix_tuning+llrd+words",
    ]  # fmt: skip
    last = plan.experiments[-1].runs()[0]
    assert dict(last.levels) == {"adapter": "prefix_tuning", "rates": "llrd", "template": "words"}
    assert [part.rpartition("/")[2] for part in last.command() if part.startswith("--config")] == [
        "sst5.yaml", "prefix_tuning.yaml", "llrd.yaml", "hard_prompt"
    ]  # fmt: skip
    assert "--model.optimizer.init_args.lr=1.0e-3" not in " ".join(plan.experiments[0].runs()[0].command())
    assert "--model.optimizer.init_args.lr=0.001" in last.command()
    first = plan.experiments[0].runs()[0]
    assert "configs/strategy/full.yaml" in " ".join(first.command())
    assert first.record()["files"].keys() == {"configs/task/sst5.yaml", "configs/strategy/full.yaml"}


def test_sweep_config_invalid_factors_name_the_level(file):
    for change, key in (
        (("[none, lora, prefix_tuning]", "[none, lorra]"), "tasks.sst5.factors.adapter.lorra.configs"),
        (("[none, lora, prefix_tuning]", "[lora]"), "tasks.sst5.factors.adapter"),
        (("[none, lora, prefix_tuning]", "[none, lora, lora]"), "tasks.sst5.factors.adapter"),
        (("{configs: [strategy/hard_prompt]}", "{file: a}"), "tasks.sst5.factors.template.words.file"),
        (("model.optimizer.init_args.lr", "lr"), "tasks.sst5.factors.rates.llrd.overrides"),
    ):
        with pytest.raises(InputError) as error:
            SweepConfig.read(file(FACTORS.replace(*change)))
        assert names(error.value, key), error.value
