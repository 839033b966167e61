"""The forked processes of the tests behave as started processes do."""

import os
import signal
import subprocess
import sys
import time

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


def test_forked_process_that_ends_before_its_id_is_read_has_its_status(tmp_path, monkeypatch):
    file = tmp_path / "script.py"
    file.write_text("import os; os._exit(7)")
    run([file], cwd=tmp_path)  # starts the server
    line = Forked._line

    def late(self, timeout):
        time.sleep(0.5)
        return line(self, timeout)

    monkeypatch.setattr(Forked, "_line", late)
    assert run([file], cwd=tmp_path).returncode == 7


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


def test_forked_jobs_module_equals_subprocess(tmp_path):
    (tmp_path / "job.py").write_text(
        "import os, signal, sys\n"
        "print(sys.argv[1:], sorted(os.environ), __name__, [signal.getsignal(n) for n in (2, 15)])\n"
        "print(os.getppid() == int(os.environ['PARENT']), os.listdir('/proc/self/fd')[3:] == ['3'])\n"
        "sys.exit('no more')\n"
    )
    (tmp_path / "start.py").write_text(
        "import os, signal, subprocess, sys\n"
        "from helpers.forked_jobs import Popen\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "env = {'PYTHONPATH': sys.path[0], 'LC_CTYPE': 'C.UTF-8', 'PARENT': str(os.getpid())}\n"
        "held = open(__file__)\n"
        "for name, kind in (('exec', subprocess.Popen), ('fork', Popen)):\n"
        "    for ignored in (signal.SIG_IGN, signal.default_int_handler):\n"
        "        signal.signal(signal.SIGINT, ignored)\n"
        "        with open(name, 'a') as out:\n"
        "            job = kind([sys.executable, '-u', '-m', 'job', 'a', 'b c'], env=env, stdout=out, stderr=out)\n"
        "            print(job.wait(), file=out)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, "start.py"], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fork").read_text() == (tmp_path / "exec").read_text()
    assert "no more\n1\n" in (tmp_path / "fork").read_text()


def test_run_that_hangs_is_an_error_with_the_stacks_of_its_threads(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text("import time\ndef wait_for_ever():\n    time.sleep(100)\nwait_for_ever()\n")
    with pytest.raises(AssertionError, match=r"timed out after 1 seconds(?s:.*)wait_for_ever"):
        run([script], timeout=1.0, cwd=tmp_path)
