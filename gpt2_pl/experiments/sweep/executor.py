"""The jobs of a sweep: a run in a process of its own, and the launcher that starts them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

import gpt2_pl
from gpt2_pl.errors import InputError, printable
from gpt2_pl.experiments.run import RUNS, plugins_of
from gpt2_pl.experiments.run_lock import LOCK, RunLock
from gpt2_pl.experiments.sweep.config import SweepConfig
from gpt2_pl.experiments.sweep.run import SweepRun
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.utils.machine import available_cores

_FOREVER = 60 * 24 * 365  # minutes: a run on this machine may take as long as it does


class RunJob:
    """Makes a run: begins it, goes on with it where it was stopped, or does nothing where it is finished.

    Whoever asks for the same run at the same time waits until the first has made it, so that nothing is run twice.

    Args:
        run_command: runs a command of ``gpt2-pl``, given its arguments, in this process.
        gpu: the one that is the run's own.
    """

    def __init__(self, run_command: Callable[[list[str]], None], gpu: str | None = None) -> None:
        self.run_command = run_command
        self.gpu = gpu

    def __call__(self, run: SweepRun) -> None:
        """Make a run, the one that it starts from first."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit would ignore what Lightning saves a run at
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        if run.base is not None:
            with locked(_lock(run.base), wait=True):
                if not run.base.finished:
                    _run(run.base, _run_in_subprocess)  # so that its memory is not counted as the run's
        with locked(_lock(run), wait=True):
            if not run.finished:
                _run(run, self._run_in_process)

    def _run_in_process(self, args: list[str]) -> None:
        """Run a command in this process."""
        print("gpt2-pl", printable(shlex.join(args)), flush=True)
        try:
            self.run_command(args)
        except SystemExit as stop:
            if stop.code in (1, 2):  # the command's own; others are submitit's, of jobs whose time is up
                raise RuntimeError(f"gpt2-pl {args[0]} ended with status {stop.code}") from None
            if stop.code:
                raise

    def checkpoint(self, run: SweepRun) -> Any:
        """What submitit asks for when a job's time is up: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, run)


def _lock(run: SweepRun) -> Path:
    return RUNS / f"{run.sweep}.sweep" / run.task / f"{run.strategy}_{run.version}.lock"


def _run(run: SweepRun, command: Callable[[list[str]], None]) -> None:
    """Begin or go on with a run whose lock is held, and export its model where others start from it."""
    if run.metrics().get("status") != "finished":
        run.check()
        record = run.folder / "sweep.json"
        if run.last.is_file():
            threads = run.begun()["threads"]
        else:
            threads = int(os.environ.get("OMP_NUM_THREADS") or available_cores())
            _check_unused(run.folder)
            shutil.rmtree(run.folder, ignore_errors=True)  # what broke off before its first checkpoint
            with atomic_write(record) as file:
                json.dump({**run.record(), "threads": threads}, file, indent=2)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # the same when it goes on: sums depend on it in their last digits
        command([*run.command(), *([f"--ckpt_path={run.last}"] if run.last.is_file() else [])])
    if run.exported and not (run.folder / "exported").is_dir():
        plugins = [f"--plugin={module}" for module in plugins_of(run.folder / "config.yaml")]
        command(["export", str(run.folder), "--format=hf", f"--out={run.folder / 'exported'}", *plugins])


def _run_in_subprocess(args: list[str]) -> None:
    """Run a command of ours in a process of its own, which is asked to end when this one is."""
    print("gpt2-pl", printable(shlex.join(args)), flush=True)
    command = [sys.executable, "-m", "gpt2_pl", *args]
    with subprocess.Popen(command) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            status = process.wait()
        finally:
            process.terminate()
            signal.signal(signal.SIGTERM, before)
    if status:
        raise subprocess.CalledProcessError(status, command)


def _check_unused(folder: Path) -> None:
    """Refuse a folder that a process outside the sweep writes into.

    Raises:
        InputError: naming the folder and the process.
    """
    if (folder / LOCK).exists():
        RunLock(folder).release()


@contextmanager
def locked(file: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock that ends with the process, however it ends; False where another holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, thread_local=False, fallback_to_soft=False, poll_interval=0.2)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


# Where jobs go


@dataclass
class Executor:
    """Starts jobs through submitit.

    Args:
        submit: starts a run on a place; gives submitit's job.
        cancel: asks a job to end; a run saves a checkpoint first.
        places: how many there are.
    """

    submit: Callable[[SweepRun, int], Any]
    cancel: Callable[[Any], None]
    places: int


def make_executor(plan: SweepConfig, max_parallel: int | None, run_command: Callable[[list[str]], None]) -> Executor:
    """The launcher that a plan asks for.

    Args:
        plan: of the sweep.
        max_parallel: how many runs at the same time; None for what the plan says, or one a GPU.
        run_command: runs a command of ``gpt2-pl``, given its arguments, in this process.

    Raises:
        InputError: submitit is not installed, or SLURM is not there or knows a parameter not.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("sweep needs submitit: pip install 'gpt2_pl[sweep]'") from None
    folder = RUNS / f"{plan.name}.sweep" / "jobs"
    wanted = max_parallel or plan.max_parallel
    executor: Any
    if plan.slurm is not None:
        try:
            executor = submitit.AutoExecutor(folder, cluster="slurm")
            executor.update_parameters(name=plan.name, **plan.slurm)
        except (ValueError, TypeError, NameError, RuntimeError) as error:
            raise InputError(f"slurm: {' '.join(str(error).split())[:300]}") from None

        def submit_to_slurm(run: SweepRun, place: int) -> Any:
            with _environment_of_jobs():
                return executor.submit(RunJob(run_command), run)

        return Executor(submit_to_slurm, lambda job: job.cancel(), wanted or 64)
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(timeout_min=_FOREVER, stderr_to_stdout=True)
    gpus = _gpus()
    places = wanted or max(1, len(gpus))
    if not gpus:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // places)))

    def submit(run: SweepRun, place: int) -> Any:
        # The process of a job ignores Ctrl-C in the terminal that it shares: this one hears it and cancels the jobs.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with _environment_of_jobs():
                return executor.submit(RunJob(run_command, gpus[place % len(gpus)] if gpus else None), run)
        finally:
            signal.signal(signal.SIGINT, before)

    return Executor(submit, _terminate, places)


@contextmanager
def _environment_of_jobs() -> Iterator[None]:
    """Within, processes that start import this library from where it is, and nothing else from the working folder."""
    root = str(Path(gpt2_pl.__file__).resolve().parents[1])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
    paths = [root, *filter(None, (before["PYTHONPATH"] or "").split(os.pathsep))]
    os.environ.update(PYTHONPATH=os.pathsep.join(dict.fromkeys(paths)), PYTHONSAFEPATH="1")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _terminate(job: Any) -> None:
    """Ask a local job to end: submitit's process passes SIGTERM on, at which Lightning saves a checkpoint."""
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(job.job_id)).terminate()


def _gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES calls them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
