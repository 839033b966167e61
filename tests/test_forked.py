"""The forked processes of the tests behave as started processes do."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from conftest import ROOT
from helpers.forked import Forked, run

SCRIPT = """
import os, sys, threading
print(sys.argv, os.getcwd(), sorted(os.environ), sys.stdin.read(), __name__, threading.active_count())
print("error", file=sys.stderr)
import atexit
atexit.register(print, "the end")
"""
ENDS = {
    "runs to its end": "",
    "exits": "sys.exit(3)",
    "exits with a message": "sys.exit('no more')",
    "raises": "raise ValueError('no')",
    "is interrupted": "import signal, time\ntry: signal.raise_signal(2)\nexcept KeyboardInterrupt: print('stopped')",
    "is killed": "import signal; sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)",
    "ends at once": "sys.stdout.flush(); os._exit(7)",
}


def test_forked_run_script_equals_subprocess(tmp_path):
    file = tmp_path / "script.py"
    environment = {"ONE": "1", "PYTHONPATH": str(tmp_path), "LC_CTYPE": "C.UTF-8"}
    command = [str(file), "a", "b c"]
    for how, end in ENDS.items():
        file.write_text(SCRIPT + end)
        forked = run(command, cwd=tmp_path, env=environment, input="in")
        started = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, input="in", text=True,
                                 capture_output=True, check=False)  # fmt: skip
        assert (forked.returncode, forked.stdout) == (started.returncode, started.stdout), how
        assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:], how


def test_forked_process_terminates_on_signals_as_session_leader(tmp_path):
    file = tmp_path / "script.py"
    file.write_text("import time; open('begun', 'w').close(); time.sleep(60)")
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = Forked([file], cwd=tmp_path)
        assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
        os.kill(process.pid, number)
        assert process.wait(timeout=20) == -number
        assert not psutil.pid_exists(process.pid)


def test_forked_run_project_modules_are_already_imported(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(
        "import sys; assert 'gpt2_pl.commands.lightning_cli' in sys.modules; import cli; print(cli.__file__)"
    )
    assert run([file], cwd=tmp_path).stdout == f"{ROOT / 'cli.py'}\n"
