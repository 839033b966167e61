"""Processes that begin with everything imported: each is forked from a server, which takes 0.05 s in place of 5.

``Forked`` is to a script what ``subprocess.Popen`` is to a program: the process has an id, a session and a status of
its own and can be sent signals, but its parent is not this process. What it writes goes to files, so that nothing waits
for a reader. The server has imported the modules of this project, to which PYTHONPATH only adds others, and what a
library reads from the environment when it is imported is the server's.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_REQUEST = 2**20  # bytes, at most


class Forked:
    """A Python script in a process of its own.

    Args:
        args: the script and its arguments.
        cwd: the folder that it runs in.
        env: its whole environment.
        input: its standard input.

    Attributes:
        pid: the process, which leads a session and a process group.
        returncode: once it has ended, its status, negative where a signal ended it.
    """

    def __init__(self, args: list[Any], cwd: Path, env: dict[str, str] | None = None, input: str = "") -> None:
        self.args = [str(arg) for arg in args]
        self.returncode: int | None = None
        request = {"args": self.args, "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
        self._outputs = [tempfile.TemporaryFile("w+", errors="backslashreplace") for _ in range(2)]  # noqa: SIM115
        # Two messages, the id and the status, which stay apart however late they are read.
        self._reply, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile("w+") as source:
            source.write(input)
            source.seek(0)
            files = [source.fileno(), *(file.fileno() for file in self._outputs), theirs.fileno()]
            socket.send_fds(_server(), [json.dumps(request).encode()], files)
        self.pid = int(self._line(60.0))

    def _line(self, timeout: float | None) -> str:
        self._reply.settimeout(timeout)
        try:
            line = self._reply.recv(64)
        except TimeoutError:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from None
        assert line, "the server of forked processes has ended"
        return line.decode()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; gives its status."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(int(self._line(timeout)))
            self._reply.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until it has ended; gives what it has written to standard output and error."""
        self.wait(timeout)
        texts = []
        for file in self._outputs:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return texts[0], texts[1]

    def kill(self) -> None:
        """Kill it and all of its group."""
        os.killpg(self.pid, signal.SIGKILL)


def run(args: list[Any], timeout: float = 300.0, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, at most for so many seconds; then the error has the stacks of its threads."""
    process = Forked(args, **settings)
    try:
        out, error = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # at which faulthandler writes the stacks
        _, error = process.communicate(10.0)
        raise AssertionError(f"{process.args} timed out after {timeout:g} seconds:\n{error}") from None
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.wait(), out, error)


@functools.cache
def _server() -> socket.socket:
    """Start the server of this process; it ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    with theirs:
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    return ours


def _serve(requests: socket.socket) -> str:
    """Fork for every request. Returns in the processes that are forked only, with the script to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(requests, _REQUEST, 4)
        if not message:
            os._exit(0)
        if os.fork():
            for file in files:
                os.close(file)
            continue
        requests.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        if child:  # wait for it, and tell how it ended
            for file in files[:3]:
                os.close(file)
            _, status = os.waitpid(child, 0)
            try:
                os.write(files[3], str(status).encode())
            finally:
                os._exit(0)
        return _begin(json.loads(message), files)


def _begin(request: dict[str, Any], files: list[int]) -> str:
    """Make of this process the one that is asked for; gives the script to run."""
    import faulthandler
    import random

    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for descriptor, file in enumerate(files[:3]):
        os.dup2(file, descriptor)
    faulthandler.enable(2)
    random.seed()
    sys.argv[:] = request["args"]
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[:] = [str(Path(sys.argv[0]).parent), *more, *sys.path[1:]]
    os.write(files[3], str(os.getpid()).encode())
    for file in files:
        os.close(file)
    return sys.argv[0]


def _preload() -> None:
    """Import what commands use, also while they run. Nothing may start a thread, which a fork would lose."""
    import gc
    from importlib import import_module

    gc.disable()
    commands = ("classify", "compare", "export", "generate", "lightning_cli", "support.failures", "sweep")
    libraries = ("datasets", "matplotlib.backends.backend_agg", "torch.distributed.fsdp", "torch.utils.tensorboard")
    for name in (
        *(f"gpt2_pl.commands.{command}" for command in commands),
        "gpt2_pl.datamodules",
        "gpt2_pl.experiments.sweep.search",
        *libraries,
    ):
        import_module(name)
    import torch

    from helpers import blank_images

    blank_images.install()
    torch.set_num_threads(1)
    gc.freeze()
    gc.enable()
    if sys.platform == "linux":
        threads = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
        threads -= {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}  # which jemalloc starts again
        assert not threads, f"imports have started threads: {threads}"


if __name__ == "__main__":
    import runpy

    _preload()
    script = _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_path(script, run_name="__main__")
