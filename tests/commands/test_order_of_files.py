"""Order of files and flags on the command line, and refusal of a strategy before its task."""

import pytest
import yaml
from conftest import ROOT, metrics
from helpers.configs import CONFIGS, STRATEGIES, TASKS, TRAINERS
from helpers.refusals import names, refused

from gpt2_pl.commands.support.config_merge import CommandLine, check_order
from gpt2_pl.errors import InputError

LOST = {  # of strategies whose file stands before the task's
    "dora": "model.optimizer.lr", "linear_probe": "model.optimizer.lr",
    "multi_sample_dropout": "model.pooling", "hard_prompt": "data.template", "ulmfit": "model.pooling",
    "prefix_tuning": "model.optimizer.lr",
    "ulmfit_lm": "model.schedule.class_path",
}  # fmt: skip


def line(*files, flags=()):
    return CommandLine(["fit", *(part for file in files for part in ("--config", str(file))), *flags])


def test_check_order_strategy_before_task_is_refused_by_name():
    for strategy, key in LOST.items():
        first, second = CONFIGS / f"strategy/{strategy}.yaml", CONFIGS / "task/sst5.yaml"
        with pytest.raises(InputError) as refusal:
            check_order(line(first, second))
        for words in (str(first), str(second), key, f"--config {second} --config {first}"):
            assert words in str(refusal.value), strategy


def test_check_order_task_first_is_accepted(tmp_path):
    own, defaults = tmp_path / "own.yaml", tmp_path / "defaults.yaml"
    defaults.write_text("trainer: {accelerator: cpu}\nmodel: {init_args: {dropout: 0.0}}\n")
    for task in TASKS:
        own.write_text(yaml.safe_dump({**yaml.safe_load(task.read_text()), "name": "mine", "seed_everything": 3}))
        for i, strategy in enumerate(STRATEGIES):
            trainer = TRAINERS[i % len(TRAINERS)]
            check_order(line(task, strategy, trainer))
            check_order(line(task, trainer, strategy, own, defaults))


def test_check_order_equal_values_and_other_keys_are_accepted(tmp_path):
    data = tmp_path / "data.yaml"
    data.write_text("data: {class_path: gpt2_pl.datamodules.SST5, init_args: {train_file: x.csv, batch_size: 64}}\n")
    check_order(line(data, CONFIGS / "task/sst5.yaml"))
    check_order(line(CONFIGS / "strategy/full.yaml", CONFIGS / "task/sst5.yaml"))


def test_check_order_trainer_file_or_flag_before_task_is_accepted(tmp_path):
    task, trainer = CONFIGS / "task/sst5.yaml", CONFIGS / "trainer/debug.yaml"
    check_order(line(trainer, task))
    check_order(CommandLine(["fit", "--model.base=own", "--trainer.max_epochs", "6", "--config", str(task)]))
    own = tmp_path / "config.yaml"
    own.write_text(task.read_text())
    strategy = CONFIGS / "strategy/lora.yaml"
    with pytest.raises(InputError, match=r"model\.optimizer\.lr"):
        check_order(line(strategy, own))


def test_fit_strategy_before_task_is_refused_and_a_later_file_wins(run, base, data_flags, capsys, tmp_path):
    files = [f"--config={CONFIGS}/{name}.yaml" for name in ("strategy/lora", "task/imdb")]
    rest = [f"--model.base={base}", *data_flags, "--data.max_length=24", "--trainer.max_epochs=1"]
    assert "model.optimizer.lr" in refused(run, capsys, "fit", *files, *rest)
    assert not list(tmp_path.glob("lightning_logs"))
    own = tmp_path / "own.yaml"
    own.write_text("model: {init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.003}}}}\n")
    folder = run("fit", *reversed(files), *rest, "--config", own)
    assert metrics(folder)["configs"] == [files[1].partition("=")[2], files[0].partition("=")[2], str(own)]
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.003


# Reading


def test_command_line_reads_files_and_flags_once_in_order(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model: {class_path: m.T, init_args: {base: x, optimizer: {init_args: {lr: 1}}}}\nname: n\n")
    found = CommandLine(["fit", "--model.base=y", "--config", str(file), "--plugin", "mine", "--trainer.max_steps",
                         "-1", "--model.init_args.dropout=0.1", "--plugin=b", "--print_config"])  # fmt: skip
    assert found.command == "fit"
    assert found.plugins == ["mine", "b"]
    assert found.files == [str(file)]
    assert [source.name for source in found.sources] == ["model.base", str(file), "trainer.max_steps",
                                                         "model.init_args.dropout", "print_config"]  # fmt: skip
    assert found.sources[1].settings == {"model.class_path": "m.T", "model.base": "x",
                                         "model.optimizer.lr": 1, "name": "n"}  # fmt: skip
    assert (found.last("model.base"), found.last("trainer.max_steps"), found.last("model.dropout")) == ("x", -1, 0.1)
    assert found.states("optimizer")
    assert found.states("base")
    assert not found.states("surgery")
    assert found.has_flag("version", "print_config")
    assert not found.has_flag("name")
    assert "--plugin" not in found.arguments
    assert found.arguments[-1] == "--print_config"
    with pytest.raises(InputError, match="--name needs a value"):
        CommandLine(["fit", "--name", "--print_config"])


def test_command_line_states_parts_of_an_argument():
    for flag in ("--model.surgery+=m.T", "--model.surgery=[m.T]", "--model.config.n_layer=2"):
        found = CommandLine(["fit", flag, "--model.base=null"])
        assert found.states("surgery") == ("surgery" in flag), flag
        assert found.states("config") == ("config" in flag), flag
        assert not found.states("base"), flag


def test_command_line_checkpoint_in_file_and_flag_later_one_wins(tmp_path):
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).touch()
    (tmp_path / "a.yaml").write_text(f"ckpt_path: {tmp_path}/a.ckpt\n")
    parts = [["--config", str(tmp_path / "a.yaml")], ["--ckpt_path", str(tmp_path / "b.ckpt")]]
    for (first, last), name in ((parts, "b.ckpt"), (parts[::-1], "a.ckpt")):
        assert CommandLine(["test", *first, *last]).checkpoint() == str(tmp_path / name)


def test_fit_config_without_settings_is_refused_by_name(run, tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    line = refused(run, capsys, "fit", "--config", ROOT / "configs/quickstart.yaml", "--config", "empty.yaml")
    assert names(line, "config")
    assert "empty.yaml" in line
