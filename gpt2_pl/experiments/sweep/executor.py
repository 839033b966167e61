"""Jobs of a sweep, each a run in its own process, and the executor that starts them."""

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

_NO_TIMEOUT = 60 * 24 * 365  # minutes, because submitit requires a time limit


@dataclass
class RunJob:
    """Job of a run: starts it, resumes it, or does nothing if it is finished.

    A second job of the same run waits until the first one has ended, so that nothing is run twice.

    Args:
        run_command: runs a command of ``gpt2-pl``, given its arguments, in this process.
        gpu: GPU of the run, as in CUDA_VISIBLE_DEVICES; None for all visible ones.
    """

    run_command: Callable[[list[str]], None]
    gpu: str | None = None

    def __call__(self, run: SweepRun) -> None:
        """Run the pretraining run that a run starts from, if it is unfinished, and then the run."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores SIGTERM, at which Lightning saves a checkpoint
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        if run.base is not None:
            with locked(_lock(run.base), wait=True):
                if not run.base.finished:
                    _run(run.base, _run_in_subprocess)  # so that its memory is not part of the run's peak memory
        with locked(_lock(run), wait=True):
            if not run.finished:
                _run(run, self._run_in_process)

    def _run_in_process(self, args: list[str]) -> None:
        """Run a command in this process."""
        print("gpt2-pl", printable(shlex.join(args)), flush=True)
        try:
            self.run_command(args)
        except SystemExit as stop:
            if stop.code in (1, 2):  # statuses of gpt2-pl; submitit uses others for jobs whose time is up
                raise RuntimeError(f"gpt2-pl {args[0]} ended with status {stop.code}") from None
            if stop.code:
                raise

    def checkpoint(self, run: SweepRun) -> Any:
        """Return the job that submitit submits when the time of this one is up: the same, which resumes the run."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, run)


def _lock(run: SweepRun) -> Path:
    return RUNS / f"{run.sweep}.sweep" / run.task / f"{run.strategy}_{run.version}.lock"


def _run(run: SweepRun, command: Callable[[list[str]], None]) -> None:
    """Start or resume a run whose lock is held, and export its model if other runs start from it."""
    if run.metrics().get("status") != "finished":
        run.check()
        record = run.folder / "sweep.json"
        if run.last.is_file():
            threads = run.saved_record()["threads"]
        else:
            threads = int(os.environ.get("OMP_NUM_THREADS") or available_cores())
            _check_unused(run.folder)
            shutil.rmtree(run.folder, ignore_errors=True)  # remains of a run without a checkpoint
            with atomic_write(record) as file:
                json.dump({**run.record(), "threads": threads, "levels": dict(run.levels)}, file, indent=2)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # constant over a run, because it affects the rounding of sums
        command([*run.command(), *([f"--ckpt_path={run.last}"] if run.last.is_file() else [])])
    if run.exported and not (run.folder / "exported").is_dir():
        plugins = [f"--plugin={module}" for module in plugins_of(run.folder / "config.yaml")]
        command(["export", str(run.folder), "--format=hf", f"--out={run.folder / 'exported'}", *plugins])


def _run_in_subprocess(args: list[str]) -> None:
    """Run a command of ``gpt2-pl`` in a child process, to which SIGTERM is forwarded."""
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
    """Check that no process outside the sweep writes into a folder.

    Raises:
        InputError: a process does; the message names the folder and the process.
    """
    if (folder / LOCK).exists():
        RunLock(folder).release()


@contextmanager
def locked(file: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock, which the operating system releases when the process ends.

    Args:
        file: file of the lock.
        wait: whether to wait until another process releases it.

    Yields:
        Whether the lock is held; False only if ``wait`` is False and another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, thread_local=False, fallback_to_soft=False, poll_interval=0.2)
    with suppress(Timeout):
        lock.acquire(blocking=wait)
    try:
        yield lock.is_locked
    finally:
        lock.release()


@dataclass
class Executor:
    """Functions that start and cancel jobs through submitit.

    Args:
        submit: starts a run in a slot and returns submitit's job.
        cancel: asks a job to end; its run saves a checkpoint first.
        slots: maximum number of jobs at the same time.
    """

    submit: Callable[[SweepRun, int], Any]
    cancel: Callable[[Any], None]
    slots: int


def make_executor(config: SweepConfig, max_parallel: int | None, run_command: Callable[[list[str]], None]) -> Executor:
    """Create the executor of a sweep, on SLURM or on this machine.

    Args:
        config: the sweep.
        max_parallel: maximum number of runs at the same time; defaults to that of the sweep, else one per GPU.
        run_command: runs a command of ``gpt2-pl``, given its arguments, in this process.

    Returns:
        The executor.

    Raises:
        InputError: submitit is not installed, SLURM is not available, or a SLURM parameter is unknown.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("sweep needs submitit: pip install 'gpt2_pl[sweep]'", key="sweep") from None
    folder = RUNS / f"{config.name}.sweep" / "jobs"
    max_jobs = max_parallel or config.max_parallel
    executor: Any
    if config.slurm is not None:
        try:
            executor = submitit.AutoExecutor(folder, cluster="slurm")
            executor.update_parameters(name=config.name, **config.slurm)
        except (ValueError, TypeError, NameError, RuntimeError) as error:
            raise InputError(f"slurm: {' '.join(str(error).split())[:300]}", key="slurm") from None

        def submit_to_slurm(run: SweepRun, slot: int) -> Any:
            with _job_environment():
                return executor.submit(RunJob(run_command), run)

        return Executor(submit_to_slurm, lambda job: job.cancel(), max_jobs or 64)
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(timeout_min=_NO_TIMEOUT, stderr_to_stdout=True)
    gpus = _visible_gpus()
    slots = max_jobs or max(1, len(gpus))
    if not gpus:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // slots)))

    def submit(run: SweepRun, slot: int) -> Any:
        # Jobs ignore Ctrl-C in the terminal that they share with this process, which receives it and cancels the jobs.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with _job_environment():
                return executor.submit(RunJob(run_command, gpus[slot % len(gpus)] if gpus else None), run)
        finally:
            signal.signal(signal.SIGINT, before)

    return Executor(submit, _terminate, slots)


@contextmanager
def _job_environment() -> Iterator[None]:
    """Set the import path of new processes: this copy of the library, without the working directory."""
    root = str(Path(gpt2_pl.__file__).resolve().parents[1])
    before = dict(os.environ)
    paths = [root, *filter(None, before.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ.update(PYTHONPATH=os.pathsep.join(dict.fromkeys(paths)), PYTHONSAFEPATH="1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _terminate(job: Any) -> None:
    """Terminate a local job; submitit's process forwards SIGTERM, at which Lightning saves a checkpoint."""
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(job.job_id)).terminate()


def _visible_gpus() -> list[str]:
    """Return the visible GPUs, as in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
