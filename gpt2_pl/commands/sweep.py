"""Run a grid of tasks, strategies and seeds; finished runs are skipped and interrupted ones are resumed."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from gpt2_pl.commands import main as run_command
from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.commands.support.process import program
from gpt2_pl.errors import InputError, printable, require
from gpt2_pl.experiments.run import RUNS
from gpt2_pl.experiments.sweep.config import Experiment, SweepConfig
from gpt2_pl.experiments.sweep.executor import Executor, locked, make_executor
from gpt2_pl.experiments.sweep.run import SweepRun
from gpt2_pl.experiments.sweep.search import HyperparameterSearch, journal
from gpt2_pl.filesystem import require_writable

if TYPE_CHECKING:
    from rich.table import Table

_POLL_INTERVAL, _GRACE_PERIOD = 1.0, 30.0  # seconds


def main(args: list[str]) -> None:
    """Run ``gpt2-pl sweep``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: the file is invalid, or another process is running the sweep.
        SystemExit: the sweep was stopped (status 130), or a run failed (status 1).
    """
    parser = CommandParser(prog="gpt2-pl sweep", description=__doc__)
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="YAML file of the sweep, or an included one, such as sweep/example"
    )
    parallel_help = "number of runs at the same time (default: max_parallel of FILE, else one per GPU)"
    parser.add_argument("--max_parallel", type=int, metavar="N", help=parallel_help)
    parser.add_argument("--dry_run", action="store_true", help="print the state of all runs without running any")
    options = parser.parse_args(args)
    slots = options.max_parallel
    require(slots is None or slots >= 1, "max_parallel", slots, "at least 1")
    config = SweepConfig.read(options.file)
    require_writable(RUNS / config.name, "name")
    sequential = config.sequential_seeds()
    for experiment in config.experiments:
        if experiment.search is None:
            for run in experiment.runs():
                run.check()
    if options.dry_run:
        for line in chain.from_iterable(rule.update() for rule in sequential):
            print(printable(line))
        _print_plan(config)
        return
    with locked(RUNS / f"{config.name}.sweep" / "lock") as is_locked:
        if not is_locked:
            raise InputError(f"{options.file}: another process is running this sweep", key="file", value=options.file)
        failures = _run_sweep(_Sweep(config, make_executor(config, slots, run_command)))
    if failures:
        for run, reason in failures.items():
            print(printable(f"{run.folder} failed: {reason}"), file=sys.stderr)
        print("the same command repeats the failed runs", file=sys.stderr)
        raise SystemExit(1)
    compare = shlex.join([*program(), "compare", str(RUNS / config.name)])
    print(f"all runs are finished; compare them: {compare} --out FOLDER")


def _run_sweep(sweep: _Sweep) -> dict[SweepRun, str]:
    """Run all unfinished runs; SIGTERM, and SIGINT even if a shell had this process ignore it, stop them.

    Returns:
        The reason of each failed run.

    Raises:
        SystemExit: the sweep was stopped; the status is 130.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        sweep.run()
        return sweep.failures
    except KeyboardInterrupt:
        sweep.stop()
        print("gpt2-pl: stopped; the same command resumes the sweep", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        sweep.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_plan(config: SweepConfig) -> None:
    """Print the trials of each search, and the state and the command of each run."""
    runs: list[SweepRun | None] = []
    for experiment in config.experiments:
        if experiment.search is None:
            for run in experiment.runs():
                runs += [run.base, run]
        else:
            n_started = len(list(journal(experiment).with_suffix("").glob("trial_*/metrics.json")))
            trials = f"{n_started} of {experiment.search.trials} trials started; then seeds {experiment.seeds}"
            print(f"search   {experiment.task} {experiment.strategy}: {trials}")
    for one in dict.fromkeys(filter(None, runs)):
        state = "finished" if one.finished else "resume" if one.last.is_file() else "to do"
        print(printable(f"{state:8} {shlex.join([*program(), *one.command()])}"))


class _Sweep:
    """Scheduler of the runs of a sweep.

    Args:
        config: the sweep.
        executor: starts the runs.

    Attributes:
        searches: the search of each experiment that has one, by the ``id`` of the experiment.
        sequential: rules that add seeds.
        failures: the reason of each failed run.
        running: run and job in each occupied slot of the executor.
        submitted: runs that have been started.
    """

    def __init__(self, config: SweepConfig, executor: Executor) -> None:
        self.config, self.executor = config, executor
        self.searches = {id(one): HyperparameterSearch(one) for one in config.experiments if one.search is not None}
        self.failures: dict[SweepRun, str] = {}
        self.running: dict[int, tuple[SweepRun, Any]] = {}
        self.submitted: set[SweepRun] = set()
        self.sequential = config.sequential_seeds()
        self.start_time = time.monotonic()

    def run(self) -> None:
        """Run all unfinished runs, with a live table if the output is a terminal."""
        from rich.console import Console
        from rich.live import Live

        console = Console()
        with Live(console=console, refresh_per_second=1, transient=not console.is_terminal) as live:
            while True:
                for line in chain.from_iterable(rule.update() for rule in self.sequential):
                    console.print(printable(line), highlight=False, markup=False)
                self._fill(console)
                if console.is_terminal:
                    live.update(self._table())
                if not self.running:
                    return
                time.sleep(_POLL_INTERVAL)
                self._collect(console)

    def stop(self) -> None:
        """Terminate all running jobs; each run saves a checkpoint from which it can be resumed.

        Processes that are still alive after the grace period, or after another Ctrl-C, are killed.
        """
        if not self.running:
            return
        processes = psutil.Process().children(recursive=True)
        with suppress(KeyboardInterrupt):
            for _, job in self.running.values():
                self.executor.cancel(job)
            deadline = time.monotonic() + _GRACE_PERIOD
            while time.monotonic() < deadline and not all(job.done() for _, job in self.running.values()):
                time.sleep(0.1)
        self.running.clear()
        processes += psutil.Process().children(recursive=True)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=_POLL_INTERVAL)

    def _fill(self, console: Any) -> None:
        """Start runs in all free slots of the executor."""
        for slot in range(self.executor.slots):
            if slot in self.running:
                continue
            if (run := self._next()) is None:
                return
            self.submitted.add(run)
            self.running[slot] = (run, self.executor.submit(run, slot))
            if not console.is_terminal:
                console.print(f"{_run_name(run)}: started", highlight=False)

    def _next(self) -> SweepRun | None:
        """Return the next run to start: trials of searches first, then the experiments' runs seed by seed."""
        for search in self.searches.values():
            if not search.finished and (run := search.next()) is not None:
                return run
        ready = [one.runs() for one in self.config.experiments if self._is_ready(one)]
        seed_by_seed = chain.from_iterable(zip_longest(*ready))
        runs = (run for run in seed_by_seed if run is not None and run not in self.submitted)
        return next((run for run in runs if not run.finished), None)

    def _is_ready(self, experiment: Experiment) -> bool:
        """Return whether the settings of an experiment's runs are known."""
        return id(experiment) not in self.searches or self.searches[id(experiment)].finished

    def _collect(self, console: Any) -> None:
        """Remove ended jobs from their slots and record their results."""
        for slot, (run, job) in list(self.running.items()):
            if not job.done():
                continue
            del self.running[slot]
            for search in self.searches.values():
                if run.name == search.experiment.trial(0, {}).name:
                    search.report_result(run)
            if not run.finished:
                self.failures[run] = _failure_reason(job)
            if not console.is_terminal:
                state = _status(run, False, run in self.failures)
                console.print(f"{_run_name(run)}: {state}", highlight=False, markup=False)

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        rows = [(experiment, experiment.runs()) for experiment in self.config.experiments]
        all_runs = [run for _, runs in rows for run in runs]
        n_finished = sum(run.finished for run in all_runs)
        minutes = (time.monotonic() - self.start_time) / 60
        done = sum(run.finished for run in self.submitted.intersection(all_runs))  # in these minutes
        left = f", about {minutes * (len(all_runs) - n_finished) / done:.0f} left" if done else ""
        title = f"{self.config.name}: {n_finished} of {len(all_runs)} runs finished, {minutes:.0f} minutes{left}"
        table = Table(title=title)
        versions = list(dict.fromkeys(run.version for run in all_runs))
        for column in ("task", "strategy", *versions):
            table.add_column(column.replace("_", " "))
        active = {run for run, _ in self.running.values()}
        for experiment, runs in rows:
            states = {run.version: Text(_status(run, run in active, run in self.failures)) for run in runs}
            cells: list[Text | str] = [states.get(version, "") for version in versions]
            if not self._is_ready(experiment):
                search = self.searches[id(experiment)]
                cells = [f"search: {search.n_done} of {search.trials} trials"]
            table.add_row(experiment.task, experiment.strategy, *cells)
        return table


def _run_name(run: SweepRun) -> str:
    return f"{run.task} {run.strategy} {run.version.replace('_', ' ')}"


def _status(run: SweepRun, active: bool, failed: bool) -> str:
    """Return the state of a run, with its score if it has one."""
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
    """Return the error message, or else the last line, of a job's output, and the path of the output."""
    path = job.paths.stdout
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    lines = [line for line in lines if line.strip()] or ["no output"]
    messages = [line for line in lines if line.startswith("gpt2-pl: error:")] or lines
    return f"{messages[-1].removeprefix('gpt2-pl: error: ')} (complete output: {path})"
