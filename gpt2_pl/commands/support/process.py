"""The process around a command: its standard streams, Ctrl-C, and the process that launched it."""

from __future__ import annotations

import _thread
import errno
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

_READER_LEFT = {errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET}  # of a pipe, a terminal, a socket
if os.name == "nt":
    _READER_LEFT.add(errno.EINVAL)
LAUNCHER = "GPT2_PL_LAUNCHER"  # the variable that tells a rank the id of the process that launched it
_POLL = 1.0  # seconds


def program() -> list[str]:
    """Return the words that start this program as it was started: from a checkout, as a module, or installed."""
    started = Path(sys.argv[0])
    if started.name == "cli.py":
        return ["python", sys.argv[0]]
    if started.parts[-2:] == ("gpt2_pl", "__main__.py"):
        return ["python", "-m", "gpt2_pl"]
    return ["gpt2-pl"]


# Standard streams


class _Output(io.FileIO):
    """A standard stream's descriptor. What nobody reads any more is discarded, so that the command goes on."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write; note an error in place of raising it."""
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno in _READER_LEFT and not stat.S_ISREG(os.fstat(self.fileno()).st_mode):
                _discard(self.fileno())
            elif self.failure is None:
                self.failure = error
            return len(data)


def _discard(descriptor: int) -> None:
    """Let a descriptor lead nowhere, in this process and those that it starts."""
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(null, True)
    else:
        os.dup2(null, descriptor)
        os.close(null)


def guard_streams() -> None:
    """Make standard output and error safe to write to: closed ones, pipes without a reader, any character.

    Descriptors that are closed are opened on nothing, or the next file that is opened would take their place.
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
        if type(getattr(buffer, "raw", buffer)) is not io.FileIO:  # a Windows console, or another's replacement
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
    """Show warnings as one line each, without the file and the source line that gave them."""

    def show(message: Warning | str, *_: Any, file: Any = None, **__: Any) -> None:
        from gpt2_pl.errors import printable

        print(f"gpt2-pl: warning: {printable(' '.join(str(message).split()))}", file=file or sys.stderr, flush=True)

    warnings.showwarning = show


def output_failure() -> OSError | None:
    """Flush standard output; the first error of writing to it, where it was not that its reader had left."""
    if sys.stdout is not None:
        sys.stdout.flush()
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failure", None)


# Ctrl-C


class Interrupts:
    """What Ctrl-C does: the first raises KeyboardInterrupt, the second ends the process at once.

    Attributes:
        advice: gives the end of the line that is printed, such as how to go on.
    """

    def __init__(self) -> None:
        self.advice: Callable[[], str] = str
        self._count = 0
        self._process: int | None = None  # where it is installed; processes that are forked inherit the handler
        self._reported = False

    def install(self) -> None:
        """Take over SIGINT, also where a shell started this process in the background and had it ignore the signal.

        What cannot raise (a destructor, a callback of the import system) would print the exception and swallow it; it
        is raised again a moment later.
        """
        self._process = os.getpid()
        signal.signal(signal.SIGINT, self._handle)
        report_unraisable = sys.unraisablehook

        def raise_again(unraisable: Any) -> None:
            if issubclass(unraisable.exc_type, KeyboardInterrupt):
                self._count = 0
                threading.Timer(0.05, _thread.interrupt_main).start()
            else:
                report_unraisable(unraisable)

        sys.unraisablehook = raise_again

    def rearm(self) -> None:
        """Listen again where a library has turned the signal off, as Lightning does at the first."""
        if self._process == os.getpid() and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._handle)

    def _handle(self, *_: Any) -> None:
        self._count += 1
        if self._count == 1 or self._process != os.getpid():
            raise KeyboardInterrupt
        if not self._reported:
            self.report()
        os._exit(130)

    def report(self) -> None:
        """Print the line; of several processes of a run, the first does."""
        self._reported = True
        if rank() > 0:
            return
        try:
            advice = self.advice()
        except Exception:  # at any moment of a command, nothing may be there that it reads
            advice = ""
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # the cursor, which a progress bar hides
        print(f"gpt2-pl: stopped by Ctrl-C{advice}", file=sys.stderr, flush=True)


interrupts = Interrupts()


def rank() -> int:
    """The number of this process among those of its run, by what its launcher has put into the environment."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if (number := os.environ.get(name, "")).isdigit():
            return int(number)
    return 0


# The launcher


def watch_launcher() -> None:
    """End this process when the one that launched it has ended, if it is a rank of torchrun's or Lightning's.

    A rank that waits for others to join their group would otherwise wait for half an hour.
    """
    launcher = os.getppid()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        named = os.environ.get(LAUNCHER, "")
        if not named.isdigit() or int(named) == os.getpid() or os.environ.get("LOCAL_RANK", "0") == "0":
            return
        launcher = int(named)

    def watch() -> None:
        while _is_alive(launcher):
            time.sleep(_POLL)
        print("gpt2-pl: error: the process that started this one has ended; so does this", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-launcher").start()


def _is_alive(parent: int) -> bool:
    if os.name == "posix":
        return os.getppid() == parent
    import psutil

    return psutil.pid_exists(parent)
