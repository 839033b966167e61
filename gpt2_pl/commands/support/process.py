"""Process of a command: its standard streams, Ctrl-C, and the process that launched it."""

from __future__ import annotations

import _thread
import errno
import gc
import io
import os
import signal
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_READER_CLOSED = {errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET}  # a pipe, a terminal, a socket
if os.name == "nt":
    _READER_CLOSED.add(errno.EINVAL)
LAUNCHER = "GPT2_PL_LAUNCHER"  # environment variable with the id of the process that launched a rank
_POLL_INTERVAL = 1.0  # seconds


def program() -> list[str]:
    """Return the command that starts this program as it was started: from a checkout, as a module, or installed."""
    started = Path(sys.argv[0])
    if started.name == "cli.py":
        return ["python", sys.argv[0]]
    if started.parts[-2:] == ("gpt2_pl", "__main__.py"):
        return ["python", "-m", "gpt2_pl"]
    return ["gpt2-pl"]


def set_up_process() -> None:
    """Set up the process of a command: its streams, warnings, Ctrl-C, launcher, and garbage collection.

    Garbage is not collected until the module of the command is imported.
    """
    gc.disable()
    guard_streams()
    interrupts.install()
    watch_launcher()
    shorten_warnings()


# Standard streams


class _Output(io.FileIO):
    """File descriptor of a standard stream; if its reader closes it, output is discarded and the command continues.

    Attributes:
        failure: first error of writing that has another cause, such as a full disk.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write data; store an error instead of raising it."""
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno in _READER_CLOSED and not stat.S_ISREG(os.fstat(self.fileno()).st_mode):
                _discard(self.fileno())
            elif self.failure is None:
                self.failure = error
            return len(data)


def _discard(descriptor: int) -> None:
    """Redirect a descriptor to the null device, in this process and its children."""
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(null, True)
    else:
        os.dup2(null, descriptor)
        os.close(null)


def guard_streams() -> None:
    """Make standard output and error safe to write to, also if closed, without a reader, or in a limited encoding.

    Closed descriptors are redirected to the null device, so that files that are opened later do not get their numbers.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _discard(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), encoding="utf-8", errors="replace"))
            continue
        buffer = getattr(stream, "buffer", None)
        if type(getattr(buffer, "raw", buffer)) is not io.FileIO:  # a Windows console, or a replaced stream
            continue
        stream.flush()
        guarded = io.TextIOWrapper(
            io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, guarded)


def shorten_warnings() -> None:
    """Print each warning as one line, without file and source line."""

    def show(message: Warning | str, *_: Any, file: Any = None, **__: Any) -> None:
        from gpt2_pl.errors import printable

        print(f"gpt2-pl: warning: {printable(' '.join(str(message).split()))}", file=file or sys.stderr, flush=True)

    warnings.showwarning = show


def output_failure() -> OSError | None:
    """Flush standard output and return the first error of writing to it, except that its reader had closed it."""
    if sys.stdout is not None:
        sys.stdout.flush()
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failure", None)


# Ctrl-C


class Interrupts:
    """Handler of Ctrl-C: the first one raises KeyboardInterrupt, the second one ends the process immediately.

    Attributes:
        advice: returns the end of the message, such as how to resume.
    """

    def __init__(self) -> None:
        self.advice: Callable[[], str] = str
        self._count = 0
        self._pid: int | None = None  # of the installing process; forked processes inherit the handler
        self._reported = False

    def install(self) -> None:
        """Handle SIGINT, even if a shell started this process in the background and ignores the signal.

        A KeyboardInterrupt that is lost in code that cannot raise, such as a destructor, is raised again shortly after.
        """
        self._pid = os.getpid()
        signal.signal(signal.SIGINT, self._handle)
        report_unraisable = sys.unraisablehook

        def raise_again(unraisable: Any) -> None:
            if issubclass(unraisable.exc_type, KeyboardInterrupt):
                self._count = 0
                threading.Timer(0.05, _thread.interrupt_main).start()
            else:
                report_unraisable(unraisable)

        sys.unraisablehook = raise_again

    def reset(self) -> None:
        """Count from the first Ctrl-C again, after a command has handled one and continues."""
        self._count = 0

    def rearm(self) -> None:
        """Handle SIGINT again, after a library has ignored it, as Lightning does at the first Ctrl-C."""
        if self._pid == os.getpid() and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._handle)

    def _handle(self, *_: Any) -> None:
        self._count += 1
        if self._count == 1 or self._pid != os.getpid():
            raise KeyboardInterrupt
        if not self._reported:
            self.report()
        os._exit(130)

    def report(self) -> None:
        """Print the message in the first process of a run."""
        self._reported = True
        if rank() > 0:
            return
        try:
            advice = self.advice()
        except Exception:  # an interrupted command may be in any state
            advice = ""
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # show the cursor, which a progress bar hides
        print(f"gpt2-pl: stopped by Ctrl-C{advice}", file=sys.stderr, flush=True)


interrupts = Interrupts()


def rank() -> int:
    """Return the rank of this process in its run, from the environment variables of the launcher."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if (number := os.environ.get(name, "")).isdigit():
            return int(number)
    return 0


# The launcher


def watch_launcher() -> None:
    """End this process when its launcher has ended, if it is a rank that torchrun or Lightning launched.

    A rank that waits for the other ranks at initialization would otherwise wait for half an hour.
    """
    launcher = os.getppid()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        pid = os.environ.get(LAUNCHER, "")
        if not pid.isdigit() or int(pid) == os.getpid() or os.environ.get("LOCAL_RANK", "0") == "0":
            return
        launcher = int(pid)

    def watch() -> None:
        while _is_alive(launcher):
            time.sleep(_POLL_INTERVAL)
        print("gpt2-pl: error: the process that launched this one has ended", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-launcher").start()


def _is_alive(parent: int) -> bool:
    if os.name == "posix":
        return os.getppid() == parent
    import psutil

    return psutil.pid_exists(parent)
