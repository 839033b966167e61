"""sweep: a grid of tasks, strategies and seeds in one file; what is missing is run, what was stopped goes on."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from gpt2_pl.commands import main as run_command
from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.commands.support.process import program
from gpt2_pl.errors import InputError, printable
from gpt2_pl.experiments.run import RUNS
from gpt2_pl.experiments.sweep.config import SweepConfig
from gpt2_pl.experiments.sweep.executor import Executor, locked, make_executor
from gpt2_pl.experiments.sweep.run import SweepRun
from gpt2_pl.experiments.sweep.search import HyperparameterSearch, journal
from gpt2_pl.filesystem import require_writable

if TYPE_CHECKING:
    from rich.table import Table

_POLL, _GRACE = 1.0, 30.0  # seconds


def main(args: list[str]) -> None:
    """Run what a sweep's file asks for and is not finished."""
    parser = CommandParser(prog="gpt2-pl sweep", description=__doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help="the sweep's file; configs/sweep has examples")
    parser.add_argument("--max_parallel", type=int, help="runs at the same time; by default the file's, or one a GPU")
    parser.add_argument("--dry_run", action="store_true", help="say what would be run, and run nothing")
    given = parser.parse_args(args)
    if given.max_parallel is not None and given.max_parallel < 1:
        raise InputError(f"max_parallel is {given.max_parallel}; it must be at least 1")
    plan = SweepConfig.read(given.file)
    require_writable(RUNS / plan.name, "name")
    for arm in plan.arms:
        if arm.search is None:
            for run in arm.runs():
                run.check()
    if given.dry_run:
        _print_plan(plan)
        return
    with locked(RUNS / f"{plan.name}.sweep" / "lock") as alone:
        if not alone:
            raise InputError(f"{given.file}: this sweep is being run by another process")
        launcher = make_executor(plan, given.max_parallel, run_command)
        sweep = _Sweep(
            plan, {id(arm): HyperparameterSearch(arm) for arm in plan.arms if arm.search is not None}, launcher
        )
        with _stopping():
            try:
                sweep.run()
            except KeyboardInterrupt:
                sweep.stop()
                print("gpt2-pl: stopped; the same command goes on", file=sys.stderr)
                raise SystemExit(130) from None
            finally:
                sweep.stop()
    if sweep.failures:
        for run, reason in sweep.failures.items():
            print(printable(f"{run.folder} failed: {reason}"), file=sys.stderr)
        print("the same command tries again what failed", file=sys.stderr)
        raise SystemExit(1)
    compare = shlex.join([*program(), "compare", str(RUNS / plan.name)])
    print(f"all runs are finished; set them side by side: {compare} --out FOLDER")


def _print_plan(plan: SweepConfig) -> None:
    """Say what would be run."""
    told = set()
    for arm in plan.arms:
        if arm.search is not None:
            done = len(list(journal(arm).with_suffix("").glob("trial_*/metrics.json")))
            print(f"search   {arm.task} {arm.strategy}: {done} of {arm.search.trials} trials begun; then {arm.seeds}")
            continue
        for run in arm.runs():
            for one in filter(None, (run.base, run)):
                if one not in told:
                    state = "finished" if one.finished else "goes on" if one.last.is_file() else "to do"
                    print(printable(f"{state:8} {shlex.join([*program(), *one.command()])}"))
                    told.add(one)


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


class _Sweep:
    """Keeps the launcher's places busy, and says how far everything is."""

    def __init__(self, plan: SweepConfig, searches: dict[int, HyperparameterSearch], launcher: Executor) -> None:
        self.plan, self.searches, self.launcher = plan, searches, launcher
        self.failures: dict[SweepRun, str] = {}
        self.running: dict[int, tuple[SweepRun, Any]] = {}  # place -> run and job
        self.begun: set[SweepRun] = set()
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
        """Ask what is running to end; every run goes on from its last checkpoint.

        What has not ended half a minute later, or at another Ctrl-C, is killed.
        """
        if not self.running:
            return
        started = psutil.Process().children(recursive=True)
        try:
            for _, job in self.running.values():
                self.launcher.cancel(job)
            deadline = time.monotonic() + _GRACE
            while time.monotonic() < deadline and not all(job.done() for _, job in self.running.values()):
                time.sleep(0.1)
        except KeyboardInterrupt:
            pass
        self.running.clear()
        started += psutil.Process().children(recursive=True)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=_POLL)

    def _fill(self, console: Any) -> None:
        for place in range(self.launcher.places):
            if place in self.running:
                continue
            if (run := self._next()) is None:
                return
            self.begun.add(run)
            self.running[place] = (run, self.launcher.submit(run, place))
            if not console.is_terminal:
                console.print(f"{_run_name(run)}: begins", highlight=False)

    def _next(self) -> SweepRun | None:
        """What to begin next: searches, then one seed of every arm before the next seed."""
        for search in self.searches.values():
            if not search.finished and (run := search.next()) is not None:
                return run
        arms = [arm for arm in self.plan.arms if id(arm) not in self.searches or self.searches[id(arm)].finished]
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
                    search.report_result(run)
            if not run.finished:
                self.failures[run] = _failure_reason(job)
            if not console.is_terminal:
                state = _status(run, False, run in self.failures)
                console.print(f"{_run_name(run)}: {state}", highlight=False, markup=False)

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

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
            if search is not None and not search.finished:
                table.add_row(arm.task, arm.strategy, f"search: {search.n_done} of {search.trials} trials")
                continue
            states = {run.version: Text(_status(run, run in active, run in self.failures)) for run in runs}
            table.add_row(arm.task, arm.strategy, *(states.get(version, "") for version in versions))
        return table


def _run_name(run: SweepRun) -> str:
    return f"{run.task} {run.strategy} {run.version.replace('_', ' ')}"


def _status(run: SweepRun, active: bool, failed: bool) -> str:
    """How far a run is, in a few words."""
    record = run.metrics()
    monitor, scores, epochs = record.get("monitor"), record.get("scores") or {}, record.get("epochs") or []
    score = f", {printable(monitor)} {scores[monitor]:.4g}" if monitor in scores else ""
    if failed:
        return "failed"
    if run.finished:
        return f"finished{score}"
    if active:
        return f"after epoch {len(epochs)}{score}" if epochs else "running"
    return f"stopped after epoch {len(epochs)}" if epochs else ""


def _failure_reason(job: Any) -> str:
    """The last line of what a job wrote, and where the rest is."""
    path = job.paths.stdout
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    told = [line for line in lines if line.startswith("gpt2-pl: error:")] or [line for line in lines if line.strip()]
    return f"{told[-1].removeprefix('gpt2-pl: error: ') if told else 'it wrote nothing'} (all of it: {path})"
