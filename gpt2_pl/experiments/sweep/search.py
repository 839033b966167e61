"""The search for a strategy's settings."""

from __future__ import annotations

import json
import math
from pathlib import Path

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.run import RUNS
from gpt2_pl.experiments.sweep.config import Experiment, as_flags
from gpt2_pl.experiments.sweep.run import SweepRun
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.utils.yaml_json import read_json


def journal(arm: Experiment) -> Path:
    """The file that keeps the trials of an arm's search."""
    return RUNS / f"{arm.sweep}.search" / arm.task / f"{arm.strategy}.journal"


class HyperparameterSearch:
    """An arm's search with Optuna, which keeps its trials in a file: it goes on where it was stopped."""

    def __init__(self, arm: Experiment) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise InputError("search needs Optuna: pip install 'gpt2_pl[sweep]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        assert arm.search is not None
        self.arm, self.trials, seed = arm, arm.search.trials, arm.search.seed
        file = journal(arm)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._check(file.with_suffix(".json"))
        if file.is_file() and not (written := file.read_bytes()).endswith(b"\n"):  # a disk was full, or power went off
            with atomic_write(file, "wb") as whole:
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
        self.finished = False
        self.finalize()

    def _check(self, file: Path) -> None:
        """Refuse to go on with a search of something else; more trials are welcome.

        Raises:
            InputError: naming the folder.
        """
        assert self.arm.search is not None
        search, run = self.arm.search, self.arm.trial(0, {})
        record = {"space": search.space, "seed": search.seed, **run.record()}
        if not file.is_file():
            with atomic_write(file) as out:
                json.dump(record, out, indent=2)
        elif read_json(file) != record:
            raise InputError(
                f"{file.with_suffix('')} was searched with another space or other settings; delete it and "
                f"{file.with_suffix('.journal')} and {file.name}, or give the strategy or the sweep another name"
            )

    @property
    def n_done(self) -> int:
        """How many trials have a score."""
        return len(self.study.get_trials(deepcopy=False, states=(self._states.COMPLETE,)))

    def next(self) -> SweepRun | None:
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
            self.report_result(run)  # it was, when the sweep was killed

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

    def report_result(self, run: SweepRun) -> None:
        """Enter a trial's score."""
        number, record = int(run.version.rpartition("_")[2]), run.metrics()
        score = (record.get("scores") or {}).get(record.get("monitor"), math.nan) if run.finished else math.nan
        if math.isfinite(score):
            self.study.tell(number, score if record.get("mode") != "min" else -score)
        else:
            self._n_failed += 1
            self.study.tell(number, state=self._states.FAIL)
        self.finalize()

    def finalize(self) -> bool:
        """Give the arm the best settings, once all trials have ended and one of them has a score.

        Raises:
            InputError: a run of the arm was made with other settings, when fewer trials had found others.
        """
        if not self.finished and self.n_done and self.n_done + self._n_failed >= self.trials:
            self.arm.found, self.finished = as_flags(self.study.best_params, "search"), True
            for run in self.arm.runs():
                run.check()
        return self.finished


# The sweep
