"""``gpt2-pl`` whose new interpreters (a sweep's jobs) are forks of it: they begin with everything imported.

Started as ``cli.py`` is, with the arguments of a command. A fork has the arguments, environment, outputs, signals and
open files of the interpreter in whose place it runs; processes, groups and parents are as without forks. The import
path of jobs is not that of a new interpreter: tests/test_packaging.py runs a sweep without forks.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A process that is forked if its program is this interpreter and a module."""

    def __init__(self, args: Any, *more: Any, **settings: Any) -> None:
        self._settings = settings
        super().__init__(args, *more, **settings)

    def _execute_child(self, args: Any, *more: Any) -> None:
        if isinstance(args, str) or args[0] != sys.executable or "-m" not in args:
            return super()._execute_child(args, *more)
        assert self._settings.keys() <= {"shell", "env", "stdout", "stderr", "encoding"}, self._settings
        with warnings.catch_warnings():  # Python 3.12 warns of threads, which the child does not use
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            outputs = [self._settings.get(name) for name in ("stdout", "stderr")]
            _run(args[args.index("-m") + 1 :], self._settings.get("env"), outputs)
        self.pid, self._child_created = pid, True
        return None


def _run(args: list[str], environment: dict[str, str] | None, outputs: list[Any]) -> None:
    """Run a module as the main program of this process, and end the process."""
    status: Any = 1
    try:
        for descriptor, file in enumerate(outputs, start=1):
            if file is not None:
                os.dup2(file.fileno(), descriptor)
        os.closerange(3, 1024)
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
        sys.argv[:] = args
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    from gpt2_pl.commands import sweep

    sweep._POLL_INTERVAL = 0.1
    subprocess.Popen = Popen  # type: ignore[misc]
    sys.argv[0] = str(Path(__file__).resolve().parents[2] / "cli.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
