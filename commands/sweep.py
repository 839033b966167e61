"""sweep: a grid of tasks, strategies and seeds in one file; what is missing is run, what was stopped goes on."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.plan import RUNS, Arm, Plan, PlannedRun, as_flags
from gpt2_pl.errors import InputError
from gpt2_pl.files import whole_file

if TYPE_CHECKING:
    from rich.table import Table

_FOREVER = 60 * 24 * 365  # minutes: a run on this machine may take as long as it does
_POLL = 1.0  # seconds


def main(args: list[str]) -> None:
    """Run what a sweep's file asks for and is not finished."""
    parser = argparse.ArgumentParser(prog="gpt2-pl sweep", description=__doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help="the sweep's file; configs/sweep has examples")
    parser.add_argument("--at_once", type=int, help="runs at the same time; by default the file's, or one a GPU")
    parser.add_argument("--dry_run", action="store_true", help="say what would be run, and run nothing")
    given = parser.parse_args(args)
    if given.at_once is not None and given.at_once < 1:
        raise InputError(f"at_once is {given.at_once}; it must be at least 1")
    plan = Plan.read(given.file)
    for arm in plan.arms:
        if arm.search is None:
            for run in arm.runs():
                run.check()
    if given.dry_run:
        _tell(plan)
        return
    with _locked(RUNS / f"{plan.name}.sweep" / "lock") as alone:
        if not alone:
            raise InputError(f"{given.file}: this sweep is being run by another process")
        launcher = _launcher(plan, given.at_once)
        sweep = _Sweep(plan, {id(arm): _Search(arm) for arm in plan.arms if arm.search is not None}, launcher)
        with _stopping():
            try:
                sweep.run()
            except KeyboardInterrupt:
                print("stopped; the same command goes on", file=sys.stderr)
                raise SystemExit(130) from None
            finally:
                sweep.stop()
    if sweep.failures:
        for run, reason in sweep.failures.items():
            print(f"{run.folder} failed: {reason}", file=sys.stderr)
        print("the same command tries again what failed", file=sys.stderr)
        raise SystemExit(1)
    print(f"all runs are finished; set them side by side: gpt2-pl compare {RUNS / plan.name} --out FOLDER")


def _tell(plan: Plan) -> None:
    """Say what would be run."""
    told = set()
    for arm in plan.arms:
        if arm.search is not None:
            done = len(list(_journal(arm).with_suffix("").glob("trial_*/metrics.json")))
            print(f"search   {arm.task} {arm.strategy}: {done} of {arm.search.trials} trials begun; then {arm.seeds}")
            continue
        for run in arm.runs():
            for one in filter(None, (run.base, run)):
                if one not in told:
                    state = "finished" if one.finished else "goes on" if one.last.is_file() else "to do"
                    print(f"{state:8} gpt2-pl {shlex.join(one.command())}")
                    told.add(one)


# A run, in the process that makes it


class RunJob:
    """Makes a run: begins it, goes on with it where it was stopped, or does nothing where it is finished.

    Whoever asks for the same run at the same time waits until the first has made it, so that nothing is run twice.
    """

    def __init__(self, gpu: str | None = None) -> None:
        self.gpu = gpu  # the one that is the run's own

    def __call__(self, run: PlannedRun) -> None:
        """Make a run, the one that it starts from first."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit would ignore what Lightning saves a run at
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        if run.base is not None:
            with _locked(_lock(run.base), wait=True):
                if not run.base.finished:
                    _make(run.base, _apart)  # so that its memory is not counted as the run's
        with _locked(_lock(run), wait=True):
            if not run.finished:
                _make(run, _here)

    def checkpoint(self, run: PlannedRun) -> Any:
        """What submitit asks for when a job's time is up: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, run)


def _lock(run: PlannedRun) -> Path:
    return RUNS / f"{run.sweep}.sweep" / run.task / f"{run.strategy}_{run.version}.lock"


def _make(run: PlannedRun, command: Callable[[list[str]], None]) -> None:
    """Begin or go on with a run whose lock is held, and export its model where others start from it."""
    if run.account().get("status") != "finished":
        run.check()
        record = run.folder / "sweep.json"
        if run.last.is_file():
            threads = json.loads(record.read_text(encoding="utf-8"))["threads"]
        else:
            threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
            shutil.rmtree(run.folder, ignore_errors=True)  # what broke off before its first checkpoint
            with whole_file(record) as file:
                json.dump({**run.record(), "threads": threads}, file, indent=2)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # the same when it goes on: sums depend on it in their last digits
        command([*run.command(), *([f"--ckpt_path={run.last}"] if run.last.is_file() else [])])
    if run.exported and not (run.folder / "exported").is_dir():
        command(["export", str(run.folder), "--format=hf", f"--out={run.folder / 'exported'}"])


def _here(args: list[str]) -> None:
    """Run a command of ours in this process."""
    from cli import main

    print("gpt2-pl", shlex.join(args), flush=True)
    try:
        main(args)
    except SystemExit as stop:
        if stop.code in (1, 2):  # our own; others are submitit's, of jobs whose time is up
            raise RuntimeError(f"gpt2-pl {args[0]} ended with status {stop.code}") from None
        if stop.code:
            raise


def _apart(args: list[str]) -> None:
    """Run a command of ours in a process of its own."""
    print("gpt2-pl", shlex.join(args), flush=True)
    subprocess.run([sys.executable, str(Path(__file__).resolve().parents[1] / "cli.py"), *args], check=True)


@contextmanager
def _locked(file: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock that ends with the process, however it ends; False where another holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


# Where jobs go


@dataclass
class _Launcher:
    """Starts jobs through submitit.

    Args:
        submit: starts a run on a place; gives submitit's job.
        places: how many there are.
    """

    submit: Callable[[PlannedRun, int], Any]
    places: int


def _launcher(plan: Plan, at_once: int | None) -> _Launcher:
    try:
        import submitit
    except ImportError:
        raise InputError("sweep needs submitit: pip install 'gpt2_pl[sweep]'") from None
    root = str(Path(__file__).resolve().parents[1])  # the job imports us, from wherever we were started
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    folder = RUNS / f"{plan.name}.sweep" / "jobs"
    wanted = at_once or plan.at_once
    executor: Any
    if plan.slurm is not None:
        try:
            executor = submitit.AutoExecutor(folder, cluster="slurm")
            executor.update_parameters(name=plan.name, **plan.slurm)
        except (ValueError, TypeError, NameError, RuntimeError) as error:
            raise InputError(f"slurm: {' '.join(str(error).split())[:300]}") from None
        return _Launcher(lambda run, place: executor.submit(RunJob(), run), wanted or 64)
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(timeout_min=_FOREVER, stderr_to_stdout=True)
    gpus = _gpus()
    places = wanted or max(1, len(gpus))
    if not gpus:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // places)))
    return _Launcher(lambda run, place: executor.submit(RunJob(gpus[place % len(gpus)] if gpus else None), run), places)


def _gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES calls them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


@contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM stops the sweep as Ctrl-C does, which a shell may have told us, and so our jobs, to ignore."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# The search


def _journal(arm: Arm) -> Path:
    """The file that keeps the trials of an arm's search."""
    return RUNS / f"{arm.sweep}.search" / arm.task / f"{arm.strategy}.journal"


class _Search:
    """An arm's search with Optuna, which keeps its trials in a file: it goes on where it was stopped."""

    def __init__(self, arm: Arm) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise InputError("search needs Optuna: pip install 'gpt2_pl[sweep]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        assert arm.search is not None
        self.arm, self.trials, seed = arm, arm.search.trials, arm.search.seed
        file = _journal(arm)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._check(file.with_suffix(".json"))
        if file.is_file() and not (written := file.read_bytes()).endswith(b"\n"):  # a disk was full, or power went off
            with whole_file(file, "wb") as whole:
                whole.write(written[: written.rfind(b"\n") + 1])
        self._states = optuna.trial.TrialState
        self._sampler = lambda n: optuna.samplers.TPESampler(
            seed=seed + n, n_startup_trials=max(2, self.trials // 2), constant_liar=True
        )
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(file))),
            study_name=arm.strategy,
            direction="maximize",
            load_if_exists=True,
        )
        self._waiting = []
        for trial in self.study.get_trials(states=(self._states.RUNNING,)):
            if trial.params.keys() == arm.search.space.keys():
                self._waiting.append(trial.number)
            else:  # the sweep was killed before it had all of its settings
                self.study.tell(trial.number, state=self._states.FAIL)
        self._n_failed = 0  # which a sweep begun anew tries again
        self.settled = False
        self.settle()

    def _check(self, file: Path) -> None:
        """Refuse to go on with a search of something else; more trials are welcome.

        Raises:
            InputError: naming the folder.
        """
        assert self.arm.search is not None
        search, run = self.arm.search, self.arm.trial(0, {})
        record = {"space": search.space, "seed": search.seed, **run.record()}
        if not file.is_file():
            with whole_file(file) as out:
                json.dump(record, out, indent=2)
        elif json.loads(file.read_text(encoding="utf-8")) != record:
            raise InputError(
                f"{file.with_suffix('')} was searched with another space or other settings; delete it and "
                f"{file.with_suffix('.journal')} and {file.name}, or give the strategy or the sweep another name"
            )

    @property
    def n_done(self) -> int:
        """How many trials have a score."""
        return len(self.study.get_trials(deepcopy=False, states=(self._states.COMPLETE,)))

    def next(self) -> PlannedRun | None:
        """The run of the next trial, of one that was stopped first; None where as many as are wanted are under way."""
        while True:
            if not self._waiting:
                under_way = self.study.get_trials(deepcopy=False, states=(self._states.COMPLETE, self._states.RUNNING))
                if len(under_way) + self._n_failed >= self.trials:
                    return None
                self._waiting.append(self._ask())
            number = self._waiting.pop(0)
            run = self.arm.trial(number, self.study.trials[number].params)
            if not run.finished:
                return run
            self.ended(run)  # it was, when the sweep was killed

    def _ask(self) -> int:
        assert self.arm.search is not None
        self.study.sampler = self._sampler(len(self.study.trials))
        trial = self.study.ask()
        for key, values in self.arm.search.space.items():
            if isinstance(values, list):
                trial.suggest_categorical(key, values)
                continue
            low, high, log = values["low"], values["high"], bool(values.get("log"))
            if isinstance(low, int) and isinstance(high, int):
                trial.suggest_int(key, low, high, step=values.get("step", 1), log=log)
            else:
                trial.suggest_float(key, low, high, step=values.get("step"), log=log)
        return trial.number

    def ended(self, run: PlannedRun) -> None:
        """Enter a trial's score."""
        number, account = int(run.version.rpartition("_")[2]), run.account()
        score = account["scores"][account["monitor"]] if run.finished else math.nan
        if math.isfinite(score):
            self.study.tell(number, score if account.get("mode") != "min" else -score)
        else:
            self._n_failed += 1
            self.study.tell(number, state=self._states.FAIL)
        self.settle()

    def settle(self) -> bool:
        """Give the arm the best settings, once all trials have ended and one of them has a score.

        Raises:
            InputError: a run of the arm was made with other settings, when fewer trials had found others.
        """
        if not self.settled and self.n_done and self.n_done + self._n_failed >= self.trials:
            self.arm.found, self.settled = as_flags(self.study.best_params, "search"), True
            for run in self.arm.runs():
                run.check()
        return self.settled


# The sweep


class _Sweep:
    """Keeps the launcher's places busy, and says how far everything is."""

    def __init__(self, plan: Plan, searches: dict[int, _Search], launcher: _Launcher) -> None:
        self.plan, self.searches, self.launcher = plan, searches, launcher
        self.failures: dict[PlannedRun, str] = {}
        self.running: dict[int, tuple[PlannedRun, Any]] = {}  # place -> run and job
        self.begun: set[PlannedRun] = set()
        self.since = time.monotonic()

    def run(self) -> None:
        """Make everything that is not finished."""
        from rich.console import Console
        from rich.live import Live

        console = Console()
        with Live(console=console, refresh_per_second=1, transient=not console.is_terminal) as live:
            while True:
                self._fill(console)
                if console.is_terminal:
                    live.update(self._table())
                if not self.running:
                    return
                time.sleep(_POLL)
                self._collect(console)

    def stop(self) -> None:
        """Interrupt what is running; every run goes on from its last checkpoint."""
        for _, job in self.running.values():
            job.cancel()
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline and not all(job.done() for _, job in self.running.values()):
            time.sleep(0.1)

    def _fill(self, console: Any) -> None:
        for place in range(self.launcher.places):
            if place in self.running:
                continue
            if (run := self._next()) is None:
                return
            self.begun.add(run)
            self.running[place] = (run, self.launcher.submit(run, place))
            if not console.is_terminal:
                console.print(f"{_called(run)}: begins", highlight=False)

    def _next(self) -> PlannedRun | None:
        """What to begin next: searches, then one seed of every arm before the next seed."""
        for search in self.searches.values():
            if not search.settled and (run := search.next()) is not None:
                return run
        arms = [arm for arm in self.plan.arms if id(arm) not in self.searches or self.searches[id(arm)].settled]
        rows = [arm.runs() for arm in arms]
        for i in range(max(map(len, rows), default=0)):
            for runs in rows:
                if i < len(runs) and runs[i] not in self.begun and not runs[i].finished:
                    return runs[i]
        return None

    def _collect(self, console: Any) -> None:
        for place, (run, job) in list(self.running.items()):
            if not job.done():
                continue
            del self.running[place]
            for search in self.searches.values():
                if run.name == search.arm.trial(0, {}).name:
                    search.ended(run)
            if not run.finished:
                self.failures[run] = _reason(job)
            if not console.is_terminal:
                console.print(f"{_called(run)}: {_state(run, False, run in self.failures)}", highlight=False)

    def _table(self) -> Table:
        from rich.table import Table

        rows = [(arm, arm.runs()) for arm in self.plan.arms]
        n_done = sum(run.finished for _, runs in rows for run in runs)
        minutes = (time.monotonic() - self.since) / 60
        total = sum(len(runs) for _, runs in rows)
        table = Table(title=f"{self.plan.name}: {n_done} of {total} runs finished, {minutes:.0f} minutes")
        for column in ("task", "strategy", *dict.fromkeys(run.version for _, runs in rows for run in runs)):
            table.add_column(column.replace("_", " "))
        active = {run for run, _ in self.running.values()}
        versions = list(dict.fromkeys(run.version for _, runs in rows for run in runs))
        for arm, runs in rows:
            search = self.searches.get(id(arm))
            if search is not None and not search.settled:
                table.add_row(arm.task, arm.strategy, f"search: {search.n_done} of {search.trials} trials")
                continue
            states = {run.version: _state(run, run in active, run in self.failures) for run in runs}
            table.add_row(arm.task, arm.strategy, *(states.get(version, "") for version in versions))
        return table


def _called(run: PlannedRun) -> str:
    return f"{run.task} {run.strategy} {run.version.replace('_', ' ')}"


def _state(run: PlannedRun, active: bool, failed: bool) -> str:
    """How far a run is, in a few words."""
    account = run.account()
    monitor, scores, epochs = account.get("monitor"), account.get("scores", {}), account.get("epochs", [])
    score = f", {monitor} {scores[monitor]:.4g}" if monitor in scores else ""
    if failed:
        return "failed"
    if run.finished:
        return f"finished{score}"
    if active:
        return f"after epoch {len(epochs)}{score}" if epochs else "running"
    return f"stopped after epoch {len(epochs)}" if epochs else ""


def _reason(job: Any) -> str:
    """The last line of what a job wrote, and where the rest is."""
    path = job.paths.stdout
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    told = [line for line in lines if line.startswith("gpt2-pl: error:")] or [line for line in lines if line.strip()]
    return f"{told[-1].removeprefix('gpt2-pl: error: ') if told else 'it wrote nothing'} (all of it: {path})"
