"""Hyperparameter search for an experiment of a sweep."""

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


def journal(experiment: Experiment) -> Path:
    """Return the path of the file that stores the trials of an experiment's search."""
    return RUNS / f"{experiment.sweep}.search" / experiment.task / f"{experiment.strategy}.journal"


class HyperparameterSearch:
    """Resumable search for the best settings of an experiment, with a sampler and the journal storage of Optuna.

    Args:
        experiment: an experiment with a search.

    Attributes:
        finished: whether all trials have ended and the experiment has the best settings.

    Raises:
        InputError: Optuna is not installed, or stored trials belong to another search.
    """

    def __init__(self, experiment: Experiment) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise InputError("search needs Optuna: pip install 'gpt2_pl[sweep]'", key="search") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        assert experiment.search is not None
        self.experiment, self.trials, self.space = experiment, experiment.search.trials, experiment.search.space
        self.seed, self.sampler = experiment.search.seed, experiment.search.sampler
        file = journal(experiment)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._check_record(file.with_suffix(".json"))
        if file.is_file() and not (content := file.read_bytes()).endswith(b"\n"):  # remove an incomplete last line
            with atomic_write(file, "wb") as repaired:
                repaired.write(content[: content.rfind(b"\n") + 1])
        self._states = optuna.trial.TrialState
        self._samplers = optuna.samplers
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(file))),
            study_name=experiment.strategy,
            direction="maximize",
            load_if_exists=True,
        )
        self._waiting = []
        for trial in self.study.get_trials(states=(self._states.RUNNING,)):
            if trial.params.keys() == self.space.keys():
                self._waiting.append(trial.number)
            else:  # the sweep was killed while it sampled the settings of the trial
                self.study.tell(trial.number, state=self._states.FAIL)
        self._n_failed = 0  # in this process; a new one repeats failed trials
        self.finished = False
        self.finalize()

    def _check_record(self, file: Path) -> None:
        """Check that stored trials have the same space and settings; the number of trials may differ.

        Raises:
            InputError: they differ; the message names the files to delete.
        """
        sampler = {} if self.sampler == "tpe" else {"sampler": self.sampler}
        record = {"space": self.space, "seed": self.seed, **sampler, **self.experiment.trial(0, {}).record()}
        if not file.is_file():
            with atomic_write(file) as out:
                json.dump(record, out, indent=2)
        elif read_json(file) != record:
            remedy = f"delete it, {file.with_suffix('.journal')} and {file.name}, or rename the strategy or the sweep"
            raise InputError(f"{file.with_suffix('')} was searched with another space or other settings; {remedy}")

    @property
    def n_done(self) -> int:
        """Number of trials with a score."""
        return len(self.study.get_trials(deepcopy=False, states=(self._states.COMPLETE,)))

    def next(self) -> SweepRun | None:
        """Return the run of the next trial, or None if enough trials have been started.

        Interrupted trials come before new ones.
        """
        while True:
            if not self._waiting:
                started = self.study.get_trials(deepcopy=False, states=(self._states.COMPLETE, self._states.RUNNING))
                if len(started) + self._n_failed >= self.trials:
                    return None
                self._waiting.append(self._sample_trial())
            number = self._waiting.pop(0)
            run = self.experiment.trial(number, self.study.trials[number].params)
            if not run.finished:
                return run
            self.report_result(run)  # it had finished when the sweep was killed

    def _sample_trial(self) -> int:
        """Sample the settings of a new trial and return its number."""
        seed = self.seed + len(self.study.trials)
        if self.sampler == "random":
            self.study.sampler = self._samplers.RandomSampler(seed=seed)
        else:
            n_startup_trials = max(2, self.trials // 2)
            self.study.sampler = self._samplers.TPESampler(
                seed=seed, n_startup_trials=n_startup_trials, constant_liar=True
            )
        trial = self.study.ask()
        for key, values in self.space.items():
            if isinstance(values, list):
                trial.suggest_categorical(key, values)
                continue
            limits = {name: limit for name, limit in values.items() if limit is not None}
            if isinstance(values["low"], int) and isinstance(values["high"], int):
                trial.suggest_int(key, **limits)
            else:
                trial.suggest_float(key, **limits)
        return trial.number

    def report_result(self, run: SweepRun) -> None:
        """Store the score of a trial's run, or that it failed."""
        number, record = int(run.version.rpartition("_")[2]), run.metrics()
        score = (record.get("scores") or {}).get(record.get("monitor"), math.nan) if run.finished else math.nan
        if math.isfinite(score):
            self.study.tell(number, score if record.get("mode") != "min" else -score)
        else:
            self._n_failed += 1
            self.study.tell(number, state=self._states.FAIL)
        self.finalize()

    def finalize(self) -> None:
        """Set the best settings of the experiment, if all trials have ended and at least one has a score.

        Raises:
            InputError: a run of the experiment has other settings, which a search with fewer trials had found.
        """
        if not self.finished and self.n_done and self.n_done + self._n_failed >= self.trials:
            self.experiment.best_flags, self.finished = as_flags(self.study.best_params, "search"), True
            for run in self.experiment.runs():
                run.check()
