"""What a terminal shows: lines of its width, progress with the time left, defaults in help, and names of options."""

import io
import logging
import re
import time
from types import SimpleNamespace

import pytest
import yaml
from helpers.refusals import refused
from lightning.pytorch import LightningModule
from rich.console import Console

from gpt2_pl.callbacks import Forgetting
from gpt2_pl.callbacks.progress import RunProgressBar
from gpt2_pl.commands import _COMMANDS, main
from gpt2_pl.commands.support import closing, terminal
from gpt2_pl.commands.support.config_merge import CommandLine
from gpt2_pl.errors import InputError


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")


def test_wrapped_line_fits_the_terminal_and_keeps_its_words():
    text = "gpt2-pl: error: " + " ".join(f"word{i}" for i in range(60))
    lines = terminal.wrapped(text, Terminal()).splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) < 80
    assert " ".join(line.strip() for line in lines) == text
    assert terminal.wrapped(text, io.StringIO()) == terminal.wrapped(text, None) == text
    assert terminal.wrapped("short", Terminal()) == "short"


def test_error_on_a_terminal_is_wrapped(monkeypatch):
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    with pytest.raises(SystemExit):
        main(["power", f"/{'/'.join(['no such folder'] * 9)}", "--difference=1"])
    lines = stderr.getvalue().strip().splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) < 80


def test_closing_lines_fit_the_terminal_and_remain_a_command(tmp_path, monkeypatch):
    folder = tmp_path / "lightning_logs" / "a_long_name_of_a_run" / "version_0"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/best.ckpt").write_bytes(b"x" * 200_000)
    for name in ("events.out.tfevents.1795950543.vm.1.0", "events.out.tfevents.1795950543.vm.1.1", "metrics.json",
                 "predictions_test.csv", "predictions_val.csv", "tokenizer.json", "weight_digests.json"):  # fmt: skip
        (folder / name).touch()
    stdout = Terminal()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout", stdout)
    relative = folder.relative_to(tmp_path)
    closing._print_folder(SimpleNamespace(loggers=[]), LightningModule(), relative, "fit", True, "")
    shown = stdout.getvalue()
    assert max(map(len, shown.splitlines())) < 80
    assert shown.count("events.out") == 1
    command = shown.partition("Evaluate:")[2].replace("\\\n", " ").split()
    assert command[-4:] == ["--config", f"{relative}/config.yaml", "--ckpt_path", f"{relative}/checkpoints/best.ckpt"]


def test_progress_on_a_terminal_shows_what_is_done_and_the_time_left(monkeypatch):
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(terminal, "_DELAY", 0.0)
    with terminal.Progress("Reading [runs]", total=4) as progress:
        progress._timer.join()
        progress.advance(3, description="Drawing")
        progress._bar.refresh()
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stderr.getvalue())
    assert "Reading [runs]" in shown
    assert re.search(r"Drawing .*3/4 \d:\d\d:\d\d [-\d:]+ left", shown)
    assert max(map(len, re.split(r"[\r\n]", shown))) <= 80


def test_progress_of_a_short_command_or_without_terminal_is_hidden(monkeypatch):
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    assert list(terminal.track("abc", "Reading", 3)) == ["a", "b", "c"]
    assert stderr.getvalue() == ""
    plain = io.StringIO()
    monkeypatch.setattr("sys.stderr", plain)
    monkeypatch.setattr(terminal, "_DELAY", 0.0)
    for _ in terminal.track("abc", "Reading", 3):
        time.sleep(0.01)
    assert plain.getvalue() == ""


def test_progress_bar_of_fit_prints_messages_of_the_trainer_above_it():
    bar, shown, log = RunProgressBar(), io.StringIO(), logging.getLogger("lightning.pytorch.utilities.rank_zero")
    trainer, logged = SimpleNamespace(is_global_zero=True), []
    handler = logging.Handler()
    handler.emit = logged.append
    log.addHandler(handler)
    try:
        bar.setup(trainer, LightningModule(), "fit")
        bar.progress = SimpleNamespace(live=SimpleNamespace(is_started=True), console=Console(file=shown), stop=bool)
        log.warning("`Trainer.fit` stopped: [it]")
        assert shown.getvalue() == "`Trainer.fit` stopped: [it]\n"
        assert not logged
        bar.progress.live.is_started = False
        log.warning("later")
        bar.teardown(trainer, LightningModule(), "fit")
        log.warning("after")
        assert [record.getMessage() for record in logged] == ["later", "after"]
    finally:
        log.removeHandler(handler)


@pytest.mark.parametrize("command", _COMMANDS[4:])
def test_help_of_command_shows_the_default_of_every_option(command, capsys):
    main([command, "--help"])
    options = re.split(r"\n  (?=-)", capsys.readouterr().out.partition("options:")[2])[1:]
    texts = [" ".join(option.split()) for option in options if not option.startswith("-h")]
    assert [text for text in texts if not re.search(r"\(default|\(required\)", text)] == []


def test_option_error_has_the_dashes_of_the_option(run, capsys):
    line = refused(run, capsys, "power", "lightning_logs/x", "--difference", "-1")
    assert "error: --difference must be above 0, got -1.0" in line
    assert line.key == "difference"
    assert refused(run, capsys, "fit", "--task=sst5", "--nme=x").endswith("did you mean --name?")


def test_short_forms_stand_for_their_files_and_keys_in_order():
    short = CommandLine(["fit", "--task", "sst5", "--lr=1e-4", "--strategy", "lora", "--strategy=strategy/llrd.yaml"])
    long = CommandLine(["fit", "--config", "task/sst5", "--model.optimizer.init_args.lr", "1e-4",
                        "--config=strategy/lora", "--config=strategy/llrd.yaml"])  # fmt: skip
    assert short.arguments == long.arguments
    assert short.sources == long.sources
    assert short.files == ["task/sst5", "strategy/lora", "strategy/llrd.yaml"]


def test_short_forms_keep_the_order_of_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("model: {init_args: {optimizer: {init_args: {lr: 0.5}}}}\n")
    for *args, expected in (("--lr=0.25", "--strategy=own.yaml", 0.5), ("--strategy=own.yaml", "--lr", "0.25", 0.25)):
        main(["fit", "--task=sst5", *args, "--print_config"])
        settings = yaml.safe_load(capsys.readouterr().out)
        assert settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] == expected


def test_short_form_of_a_missing_file_suggests_the_nearest(run, capsys):
    assert "did you mean strategy/lora?" in refused(run, capsys, "fit", "--task=sst5", "--strategy=lorra")
    assert refused(run, capsys, "fit", "--task=sst5", "--lr").key == "lr"


def test_forgetting_of_a_module_that_is_no_task_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(InputError, match=r"Forgetting requires a task.*LightningModule"):
        Forgetting(tmp_path / "text.txt").check([], LightningModule())
