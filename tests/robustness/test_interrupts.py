"""Ctrl-C at any moment ends a command with one line and exit status 130."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers.faults import QUICK, faults

from gpt2_pl.commands import main


def test_fit_ctrl_c_prints_resume_command_and_resumes_to_the_same_result(tmp_path):
    """Send SIGINT in training, validation and test steps, and while a checkpoint is written."""
    kinds = "training_step,validation_step,test_step,in last.ckpt"
    arguments = [*QUICK, "--trainer.max_epochs=2", "--data.n_train=60", "--checkpoint_every_n_steps=2"]
    for case in faults(tmp_path, 4, 5, arguments, FAULT_SIGNAL="SIGINT", FAULT_KINDS=kinds):
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


@pytest.mark.parametrize(("module", "command"), [("gpt2_pl.commands.sweep", "sweep"), ("numpy", "fit")])
def test_main_ctrl_c_during_imports_is_one_line(module, command):
    done = python(AT_IMPORT, module, command, "nothing.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "gpt2-pl: stopped by Ctrl-C\n")


def press_ctrl_c(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def finished(fitted):
    return fitted("fit", *QUICK, "--trainer.max_epochs=1")


@pytest.mark.parametrize("command", ["classify", "compare", "export", "test", "sweep"])
def test_commands_ctrl_c_is_one_line_and_leaves_no_files(command, finished, run, capsys, monkeypatch, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "lightning_logs/quickstart/version_0")
    rows = tmp_path / "rows.csv"
    rows.write_text("sentence\na fine film\n")
    plan = tmp_path / "s.yaml"
    plan.write_text(
        f"tasks: {{toy: {{configs: [{ROOT}/configs/quickstart.yaml], strategies: {{full: {{configs: []}}}}}}}}"
    )
    checkpoint = folder / "checkpoints/best.ckpt"
    moment, args = {
        "classify": ("gpt2_pl.inference.predictor.Predictor.predict_ids", [folder, "--input", rows, "--out", "o.csv"]),
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


def test_interrupts_ctrl_c_swallowed_by_a_destructor_is_raised_again():
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


def test_interrupts_second_ctrl_c_exits_at_once_with_the_message():
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


def test_main_ctrl_c_of_background_command_is_received(tmp_path):
    """A shell without job control starts background processes with SIGINT ignored."""
    file = tmp_path / "start.py"
    file.write_text(f"import signal\nassert signal.getsignal(signal.SIGINT) == signal.SIG_IGN\n{AT_IMPORT}")
    command = f"{sys.executable} {file} torch generate R --prompt_file {file} --out o.txt & wait $!"
    done = subprocess.run(["sh", "-c", command], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    assert done.stderr == "gpt2-pl: stopped by Ctrl-C\n"


def test_main_called_from_python_keeps_the_sigint_handler():
    """A caller from Python keeps Python's own handler."""
    before = signal.getsignal(signal.SIGINT)
    main(["--version"])
    assert signal.getsignal(signal.SIGINT) is before
