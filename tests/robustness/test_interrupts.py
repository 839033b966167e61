"""Ctrl-C, at whatever moment, ends a command with one line and exit status 130."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers.faults import QUICK, faults

from gpt2_pl.commands import main


def test_ctrl_c_in_training_says_how_to_resume_and_loses_nothing(tmp_path):
    """In training, validation and test steps, and while every kind of file is written."""
    kinds = "training_step,validation_step,test_step,in last.ckpt,in best.ckpt,before last.ckpt"
    arguments = [*QUICK, "--trainer.max_epochs=2", "--data.n_train=60", "--checkpoint_every_n_steps=2"]
    for case in faults(tmp_path, 6, 5, arguments, FAULT_SIGNAL="SIGINT", FAULT_KINDS=kinds):
        assert case["killed"] == 130, case
        (line,) = case["said"]
        run = "lightning_logs/quickstart/version_0"
        assert line in (
            "gpt2-pl: stopped by Ctrl-C before the first checkpoint",
            f"gpt2-pl: stopped by Ctrl-C; resume it with gpt2-pl fit --config {run}/config.yaml "
            f"--ckpt_path {run}/checkpoints/last.ckpt",
        )
        assert not case["left"]
        assert case["went_on"] == 0
        assert not case["wrong"]


def python(code, *args):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=environment, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip


AT_IMPORT = """
import os, signal, sys
module = sys.argv.pop(1)
class AtImport:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, AtImport())
from gpt2_pl.commands import main
main()
"""


@pytest.mark.parametrize(
    ("module", "command"), [("torch", "generate"), ("gpt2_pl.commands.sweep", "sweep"), ("numpy", "fit")]
)
def test_ctrl_c_while_modules_are_imported_is_one_line(module, command):
    args = ["RUN", "--prompt_file", __file__, "--out", "o.txt"] if command == "generate" else ["nothing.yaml"]
    done = python(AT_IMPORT, module, command, *args)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "gpt2-pl: stopped by Ctrl-C\n")


def press_ctrl_c(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("command", ["classify", "compare", "export", "test", "sweep"])
def test_ctrl_c_in_other_commands_is_one_line_and_leaves_nothing(command, run, capsys, monkeypatch, tmp_path):
    folder = run("fit", *QUICK, "--trainer.max_epochs=1")
    rows = tmp_path / "rows.csv"
    rows.write_text("sentence\na fine film\n")
    plan = tmp_path / "s.yaml"
    plan.write_text(
        f"tasks: {{toy: {{configs: [{ROOT}/configs/quickstart.yaml], strategies: {{full: {{configs: []}}}}}}}}"
    )
    checkpoint = folder / "checkpoints/best.ckpt"
    moment, args = {
        "classify": ("gpt2_pl.commands.classify.classify", [folder, "--input", rows, "--out", "o.csv"]),
        "compare": ("gpt2_pl.commands.compare.plots", [folder, "--out", "o"]),
        "export": ("gpt2_pl.pretrained.save_file", [folder, "--format", "hf", "--out", "o"]),
        "test": ("gpt2_pl.tasks.SentimentClassifier.test_step",
                 [f"--config={folder}/config.yaml", f"--ckpt_path={checkpoint}"]),
        "sweep": ("gpt2_pl.commands.sweep._Sweep.run", [plan]),
    }[command]  # fmt: skip
    capsys.readouterr()
    monkeypatch.setattr(moment, press_ctrl_c)
    with pytest.raises(SystemExit) as stop:
        run(command, *args)
    assert stop.value.code == 130
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("gpt2-pl", "Traceback"))]
    assert line.startswith("gpt2-pl: stopped")
    assert not list(tmp_path.rglob(".*"))
    assert command == "compare" or not list(tmp_path.glob("o*"))


def test_ctrl_c_that_a_destructor_swallows_is_raised_again():
    done = python("""
import os, signal, time
from gpt2_pl.commands.support.process import interrupts
interrupts.install()
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass
try:
    finalized = Finalized()
    del finalized
    time.sleep(0.01)
    print("swallowed", flush=True)
    for _ in range(100): time.sleep(0.1)
except KeyboardInterrupt:
    print("raised")
""")
    assert (done.stdout, done.stderr) == ("swallowed\nraised\n", "")


def test_second_ctrl_c_ends_at_once_with_the_line():
    done = python("""
import os, signal, time
from gpt2_pl.commands.support.process import interrupts
interrupts.install()
interrupts.advice = lambda: "; go on"
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Lightning does
    interrupts.rearm()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
    print("not reached")
""")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "gpt2-pl: stopped by Ctrl-C; go on\n")


def test_ctrl_c_reaches_a_command_that_a_shell_started_in_the_background(tmp_path):
    """Without job control a shell has what it starts with ``&`` ignore SIGINT."""
    file = tmp_path / "start.py"
    file.write_text(f"import signal\nassert signal.getsignal(signal.SIGINT) == signal.SIG_IGN\n{AT_IMPORT}")
    command = f"{sys.executable} {file} torch generate R --prompt_file {file} --out o.txt & wait $!"
    done = subprocess.run(["sh", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    assert done.stderr == "gpt2-pl: stopped by Ctrl-C\n"


def test_ctrl_c_in_this_process_is_a_keyboard_interrupt_to_others():
    """Whoever calls the command line from Python keeps Python's own handler."""
    before = signal.getsignal(signal.SIGINT)
    main(["--version"])
    assert signal.getsignal(signal.SIGINT) is before
