"""Sweep files and the runs that they define."""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.configs import config_path
from gpt2_pl.errors import InputError, shorten
from gpt2_pl.experiments.sweep.run import SweepRun
from gpt2_pl.utils.yaml_json import read_yaml

if TYPE_CHECKING:
    from gpt2_pl.experiments.sweep.schema import (
        Factors,
        LevelNode,
        PretrainNode,
        RunsNode,
        SearchNode,
        StrategyNode,
        SweepFile,
        TaskNode,
        UntilNode,
    )
    from gpt2_pl.experiments.sweep.sequential import SequentialSeeds

_RUN_KEY = re.compile(r"(model|data|trainer)(\.[A-Za-z_][A-Za-z0-9_]*)+\+?")
_RESERVED_KEYS = ("seed_everything", "name", "version", "config", "ckpt_path", "trainer.default_root_dir")
_TOP_LEVEL_KEYS = ("early_stopping_patience", "checkpoint_every_n_steps", "on_non_finite_loss", "save_predictions")


@dataclass
class Experiment:
    """A strategy on a task with one combination of the grid's values; it has one run per seed.

    Args:
        task: name of the task.
        strategy: name of the strategy, with the grid's values.
        files: configuration files.
        flags: flags, which override the files, without the seed.
        seeds: seeds of the runs.
        sweep: name of the sweep.
        search: search for settings that precedes the runs.
        base: pretraining run whose model the runs start from, without its seed.
        best_flags: flags with the settings that the search has found.
        levels: factor and level of each factor, in a factorial design.
    """

    task: str
    strategy: str
    files: tuple[str, ...]
    flags: tuple[str, ...]
    seeds: tuple[int, ...]
    sweep: str
    search: SearchNode | None = None
    base: SweepRun | None = None
    best_flags: tuple[str, ...] = ()
    levels: tuple[tuple[str, str], ...] = ()

    def runs(self) -> list[SweepRun]:
        """Return the run of each seed."""
        return [self._run(self.sweep, f"seed_{seed}", seed, self.best_flags) for seed in self.seeds]

    def trial(self, number: int, settings: dict[str, Any]) -> SweepRun:
        """Return the run of the search with a number and the given settings."""
        assert self.search is not None
        extra = as_flags({**(self.search.overrides or {}), **settings}, "search")
        return self._run(f"{self.sweep}.search", f"trial_{number}", self.search.seed, extra)

    def _run(self, sweep: str, version: str, seed: int, extra: tuple[str, ...]) -> SweepRun:
        seed_flag = f"--seed_everything={seed}"
        base = self.base and replace(self.base, version=f"seed_{seed}", flags=(*self.base.flags, seed_flag))
        flags = (*self.flags, *extra, seed_flag)
        return SweepRun(sweep, self.task, self.strategy, version, self.files, flags, base, levels=self.levels)


@dataclass
class SweepConfig:
    """Content of a sweep file.

    Args:
        name: name of the sweep.
        max_parallel: maximum number of runs at the same time; None for one per GPU.
        experiments: strategies on tasks.
        slurm: parameters of submitit's AutoExecutor on SLURM; None to run on this machine.
        until: rule that adds seeds, by task.
    """

    name: str
    max_parallel: int | None
    experiments: list[Experiment]
    slurm: dict[str, Any] | None
    until: dict[str, UntilNode]

    @classmethod
    def read(cls, file: Path) -> SweepConfig:
        """Read a sweep file, or an included one by name, such as ``sweep/example``.

        Raises:
            InputError: the file is invalid; the message names the file, the key and valid values.
        """
        from gpt2_pl.experiments.sweep.schema import SweepFile
        from gpt2_pl.utils.schema import validate

        content = read_yaml(config_path(str(file), "sweep"))
        if isinstance(content, dict):
            content = {"name": file.stem, **content}
        top = validate(SweepFile, content, str(file))
        try:
            experiments = [one for task, node in top.tasks.items() for one in _parse_task(task, node, top)]
            for key in ("nodes", "tasks_per_node"):
                if top.slurm and (value := top.slurm.get(key, 1)) != 1:
                    expected = "1, because a run of a sweep is one task on one node"
                    raise InputError(key=f"slurm.{key}", value=value, expected=expected)
            _check_folders(experiments)
        except InputError as error:
            raise InputError(error, key=error.key, source=file) from None
        until = {task: rule for task, node in top.tasks.items() if (rule := node.until or top.until) is not None}
        return cls(top.name, top.max_parallel, experiments, top.slurm, until)

    def sequential_seeds(self) -> list[SequentialSeeds]:
        """Return the rules that add seeds, one for each task that has one.

        Raises:
            InputError: a rule does not fit the experiments of its task.
        """
        if not self.until:
            return []
        from gpt2_pl.experiments.sweep.sequential import SequentialSeeds

        of_task = {task: [one for one in self.experiments if one.task == task] for task in self.until}
        return [SequentialSeeds(of_task[task], rule) for task, rule in self.until.items()]


def _parse_task(task: str, node: TaskNode, top: SweepFile) -> list[Experiment]:
    """Return the experiments of a task.

    Raises:
        InputError: a strategy is invalid, or no strategy is given.
    """
    path = f"tasks.{task}"
    top_flags = as_flags(top.overrides or {}, "overrides")
    flags = (*top_flags, *as_flags(node.overrides or {}, f"{path}.overrides"))
    shared = Experiment(
        task, "", _configs(node, path, f"configs/task/{task}.yaml"), flags, tuple(node.seeds or top.seeds), top.name
    )
    bases: dict[str, SweepRun] = {}
    for base, pretrain in node.pretrain.items():
        base_path = f"{path}.pretrain.{base}"
        base_flags = as_flags(pretrain.overrides or {}, f"{base_path}.overrides")
        files = _configs(pretrain, base_path)
        bases[base] = SweepRun(f"{top.name}.pretrain", task, base, "", files, (*top_flags, *base_flags), exported=True)
    strategies = {name: (f"strategies.{name}", strategy) for name, strategy in top.strategies.items()}
    strategies.update({name: (f"{path}.strategies.{name}", strategy) for name, strategy in node.strategies.items()})
    factors_path = f"{path}.factors" if node.factors else "factors"
    factors = node.factors or top.factors
    if not strategies and not factors:
        message = f"{path}.strategies must name at least one strategy, such as full"
        raise InputError(message, key=f"{path}.strategies")
    experiments = _parse_factors(factors, factors_path, shared) if factors else []
    for name, (strategy_path, strategy) in strategies.items():
        experiments += _parse_strategy(name, strategy, strategy_path, shared, bases)
    return experiments


def _parse_strategy(
    name: str, node: StrategyNode, path: str, shared: Experiment, bases: dict[str, SweepRun]
) -> list[Experiment]:
    """Return an experiment for each combination of a strategy's grid.

    Args:
        name: name of the strategy.
        node: the strategy.
        path: path of the strategy in the file, for error messages.
        shared: an experiment with the files, flags and seeds of the task.
        bases: pretraining runs of the task, by name.

    Raises:
        InputError: the strategy is invalid.
    """
    from gpt2_pl.experiments.sweep.schema import NAME

    if node.base is not None and node.base not in bases:
        expected = f"one of the task's bases ({', '.join(bases) or 'none'})"
        raise InputError(key=f"{path}.base", value=node.base, expected=expected)
    default = [f"configs/strategy/{part}.yaml" for part in name.split("+")]
    files = (*shared.files, *_configs(node, path, *default))
    flags = (*shared.flags, *as_flags(node.overrides or {}, f"{path}.overrides"))
    if node.search is not None:
        _check_search(node.search, f"{path}.search")
    base, seeds = bases.get(node.base or ""), tuple(node.seeds) or shared.seeds
    shared = replace(shared, files=files, seeds=seeds, search=node.search, base=base)
    experiments = []
    grid = node.grid or {}
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        suffix = "".join(f",{str(key).rpartition('.')[2]}={value}" for key, value in settings.items())
        if not NAME.fullmatch(name + suffix):
            expected = "numbers and words that can be part of a folder's name"
            raise InputError(key=f"{path}.grid", value=suffix, expected=expected)
        grid_flags = as_flags(settings, f"{path}.grid")
        experiments.append(replace(shared, strategy=name + suffix, flags=(*flags, *grid_flags)))
    return experiments


def _parse_factors(factors: Factors, path: str, shared: Experiment) -> list[Experiment]:
    """Return an experiment for each combination of the factors' levels.

    The first level of a factor adds nothing to a run if no strategy has its name, such as ``none``. An experiment has
    the names of its other levels, and is ``full`` without any.

    Args:
        factors: the levels of each factor, by name.
        path: path of the factors in the file, for error messages.
        shared: an experiment with the files, flags and seeds of the task.

    Raises:
        InputError: a level is invalid.
    """
    parts: list[list[tuple[str, str, tuple[str, ...], tuple[str, ...]]]] = []
    for factor, levels in factors.items():
        parts.append([])
        for i, (level, node) in enumerate(levels.items()):
            level_path = f"{path}.{factor}.{level}"
            adds_nothing = i == 0 and not node.configs and not _is_strategy(level)
            files = () if adds_nothing else _configs(node, level_path, f"configs/strategy/{level}.yaml")
            parts[-1].append((factor, level, files, as_flags(node.overrides or {}, f"{level_path}.overrides")))
    experiments = []
    for cell in itertools.product(*parts):
        files = tuple(file for _, _, level_files, _ in cell for file in level_files)
        flags = tuple(flag for *_, level_flags in cell for flag in level_flags)
        name = "+".join(level for _, level, level_files, level_flags in cell if level_files or level_flags)
        experiment = replace(
            shared,
            strategy=name or "full",
            files=(*shared.files, *(files or ("configs/strategy/full.yaml",))),
            flags=(*shared.flags, *flags),
            levels=tuple((factor, level) for factor, level, *_ in cell),
        )
        experiments.append(experiment)
    return experiments


def _is_strategy(name: str) -> bool:
    """Return whether there is a configuration file of a strategy with this name."""
    try:
        config_path(f"configs/strategy/{name}.yaml")
    except InputError:
        return False
    return True


def _check_search(search: SearchNode, path: str) -> None:
    for key, values in search.space.items():
        for value in values if isinstance(values, list) else [None]:
            as_flags({key: value}, f"{path}.space")
    as_flags(search.overrides or {}, f"{path}.overrides")


def _configs(node: RunsNode | PretrainNode | LevelNode, path: str, *default: str) -> tuple[str, ...]:
    """Return the configuration files of a node, or ``default`` if it does not name any.

    Raises:
        InputError: a file does not exist.
    """
    files = tuple(node.configs) if "configs" in node.model_fields_set else default
    for file in files:
        try:
            config_path(file, f"{path}.configs")
        except InputError as error:
            hint = "" if os.path.isabs(file) else f"; paths are relative to the working directory, {os.getcwd()}"
            raise InputError(f"{error}{hint}", key=f"{path}.configs") from None
    return files


def _check_folders(experiments: list[Experiment]) -> None:
    """Check that no two runs have the same folder, which includes names that differ only in case, and links.

    Raises:
        InputError: two runs do; the message names both.
    """
    runs = [run for one in experiments for run in (*one.runs(), *([one.trial(0, {})] if one.search else []))]
    bases = [run.base for run in runs if run.base is not None]
    first_runs: dict[str, SweepRun] = {}
    for run in [*runs, *bases]:
        first = first_runs.setdefault(os.path.realpath(run.folder).casefold(), run)
        is_shared_base = run.exported and first == run  # several runs may start from one base
        if first is not run and not is_shared_base:
            names = " and ".join(f"{one.task}.{one.strategy}, {one.version.replace('_', ' ')}" for one in (first, run))
            folders = " and ".join(dict.fromkeys(str(one.folder) for one in (first, run)))
            raise InputError(f"two runs have one folder, {folders}: {names}; use different names or values")


def as_flags(settings: dict[str, Any], path: str) -> tuple[str, ...]:
    """Convert settings to flags.

    Args:
        settings: values by key; ``${NAME}`` is replaced by the value of an environment variable.
        path: path of the settings in the sweep file, for error messages.

    Raises:
        InputError: a key is unknown or reserved by the sweep, or a value is not a plain YAML scalar, list or mapping.
    """
    return tuple(f"--{key}={_flag_value(key, value, path)}" for key, value in settings.items())


def _flag_value(key: Any, value: Any, path: str) -> str:
    trainer = value if key == "trainer" and isinstance(value, dict) else {}
    if key in _RESERVED_KEYS or "default_root_dir" in trainer:
        raise InputError(f"{path}.{key} is set by the sweep; remove it", key=f"{path}.{key}")
    known = ("model", "data", "trainer", *_TOP_LEVEL_KEYS)
    if key not in known and not (isinstance(key, str) and _RUN_KEY.fullmatch(key)):
        examples = f"trainer.max_epochs, data.batch_size or {', '.join(_TOP_LEVEL_KEYS)}"
        message = f"{path}: unknown key {shorten(key)}; keys are those of a run, such as {examples}"
        raise InputError(message, key=path)
    try:
        text = value if isinstance(value, str) else "null" if value is None else json.dumps(value)
        text.encode()
    except (ValueError, TypeError, RecursionError):
        expected = "text, a number, true, false, null, or lists or mappings of them"
        raise InputError(key=f"{path}.{key}", value=value, expected=expected) from None
    text = os.path.expandvars(text)
    if (missing := re.search(r"\$\{(\w+)\}", text)) is not None:
        message = f"{path}.{key}: the environment variable {missing[1]} is not set; set it, or write its value"
        raise InputError(message, key=f"{path}.{key}")
    return text
