"""Sweep files and the runs that they define."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt2_pl.configs import config_path
from gpt2_pl.errors import InputError, did_you_mean
from gpt2_pl.experiments.sweep.run import SweepRun
from gpt2_pl.filesystem import require_file
from gpt2_pl.utils.yaml_json import read_yaml

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.+,=-]{0,198}[A-Za-z0-9_+,=-])?")  # Windows drops dots at the end
_NAME_RULE = "up to 200 letters, digits, _ . + -"
_RUN_KEY = re.compile(r"(model|data|trainer)(\.[A-Za-z_][A-Za-z0-9_]*)+\+?")
_RESERVED_KEYS = ("seed_everything", "name", "version", "config", "ckpt_path", "trainer.default_root_dir")
_TOP_LEVEL_KEYS = ("early_stopping_patience", "checkpoint_every_n_steps", "on_non_finite_loss")


Base = tuple[str, tuple[str, ...], tuple[str, ...]]  # name, files and flags of a pretraining run


@dataclass(frozen=True)
class Search:
    """Search for the best settings of a strategy by the monitored score of its task.

    Args:
        trials: number of runs of the search.
        space: for each key a list of choices, or ``{low, high}`` with optional ``log: true`` or ``step``.
        seed: seed of the runs and of the sampler.
        flags: flags of the search's runs only, such as fewer epochs.
    """

    trials: int
    space: dict[str, Any]
    seed: int = 0
    flags: tuple[str, ...] = ()


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
        base: name, files and flags of the pretraining run whose model the runs start from.
        best_flags: flags with the settings that the search has found.
    """

    task: str
    strategy: str
    files: tuple[str, ...]
    flags: tuple[str, ...]
    seeds: tuple[int, ...]
    sweep: str
    search: Search | None = None
    base: Base | None = None
    best_flags: tuple[str, ...] = ()

    def runs(self) -> list[SweepRun]:
        """Return the run of each seed."""
        return [self._run(self.sweep, f"seed_{seed}", seed, self.best_flags) for seed in self.seeds]

    def trial(self, number: int, settings: dict[str, Any]) -> SweepRun:
        """Return the run of the search with a number and the given settings."""
        assert self.search is not None
        extra = (*self.search.flags, *as_flags(settings, "search"))
        return self._run(f"{self.sweep}.search", f"trial_{number}", self.search.seed, extra)

    def _run(self, sweep: str, version: str, seed: int, extra: tuple[str, ...]) -> SweepRun:
        seed_flag = f"--seed_everything={seed}"
        base = None
        if self.base is not None:
            name, files, flags = self.base
            base = SweepRun(
                f"{self.sweep}.pretrain", self.task, name, f"seed_{seed}", files, (*flags, seed_flag), exported=True
            )
        return SweepRun(sweep, self.task, self.strategy, version, self.files, (*self.flags, *extra, seed_flag), base)


@dataclass
class SweepConfig:
    """Content of a sweep file.

    Args:
        name: name of the sweep.
        max_parallel: maximum number of runs at the same time; None for one per GPU.
        experiments: strategies on tasks.
        slurm: parameters of submitit's AutoExecutor on SLURM; None to run on this machine.
    """

    name: str
    max_parallel: int | None
    experiments: list[Experiment]
    slurm: dict[str, Any] | None

    @classmethod
    def read(cls, file: Path) -> SweepConfig:
        """Read a sweep file.

        Raises:
            InputError: the file is invalid; the message names the file, the key and valid values.
        """
        content = read_yaml(require_file(file, "sweep"))
        try:
            config = cls._parse(ConfigNode(content, "", file.stem))
            _check_folders(config.experiments)
            return config
        except InputError as error:
            raise InputError(f"{file}: {error}") from None

    @classmethod
    def _parse(cls, top: ConfigNode) -> SweepConfig:
        top.only("name", "max_parallel", "seeds", "overrides", "tasks", "strategies", "slurm")
        name = top.name("name", top.default)
        max_parallel = top.integer("max_parallel", None, least=1)
        seeds = top.seeds((1, 2, 3))
        common_strategies = top.mapping("strategies")
        experiments = []
        for task, node in top.mapping("tasks", required=True).items():
            node.only("configs", "overrides", "seeds", "strategies", "pretrain")
            flags = (*top.flags("overrides"), *node.flags("overrides"))
            shared = Experiment(task, "", node.configs("task", task), flags, node.seeds(seeds), name)
            bases = _parse_bases(node, top.flags("overrides"))
            strategies = {**common_strategies, **node.mapping("strategies")}
            if not strategies:
                raise InputError(f"{node.path}.strategies must name at least one strategy, such as full")
            for strategy, strategy_node in strategies.items():
                experiments += _parse_strategy(strategy, strategy_node, shared, bases)
        return cls(name, max_parallel, experiments, _parse_slurm(top.content.get("slurm")))


def _parse_bases(task: ConfigNode, top_flags: tuple[str, ...]) -> dict[str, Base]:
    """Return name, files and flags of each pretraining run of a task, by name."""
    bases = {}
    for base, node in task.mapping("pretrain").items():
        node.only("configs", "overrides")
        if "configs" not in node.content:
            raise InputError(f"{node.path}.configs is missing; list the files of the pretraining run")
        bases[base] = (base, node.configs(), (*top_flags, *node.flags("overrides")))
    return bases


def _parse_strategy(name: str, node: ConfigNode, shared: Experiment, bases: dict[str, Base]) -> list[Experiment]:
    """Return an experiment for each combination of a strategy's grid.

    Args:
        name: name of the strategy.
        node: the strategy.
        shared: an experiment with the files, flags and seeds of the task.
        bases: pretraining runs of the task, by name.

    Raises:
        InputError: the strategy is invalid.
    """
    node.only("configs", "overrides", "seeds", "grid", "search", "base")
    base = node.content.get("base")
    if base is not None and (not isinstance(base, str) or base not in bases):
        known = ", ".join(bases) or "none"
        raise InputError(f"{node.path}.base must be one of the task's bases ({known}), got {base!r}")
    files = (*shared.files, *node.configs("strategy", *name.split("+")))
    flags = (*shared.flags, *node.flags("overrides"))
    experiments = []
    for suffix, values in node.grid():
        if not _NAME.fullmatch(name + suffix):
            raise InputError(
                f"{node.path}.grid: values must be plain numbers and words that can be part of a folder's name, "
                f"got {suffix[1:]!r}"
            )
        experiments.append(
            replace(
                shared,
                strategy=name + suffix,
                files=files,
                flags=(*flags, *as_flags(values, f"{node.path}.grid")),
                seeds=node.seeds(shared.seeds),
                search=node.search(),
                base=None if base is None else bases[base],
            )
        )
    return experiments


def _parse_slurm(slurm: Any) -> dict[str, Any] | None:
    if slurm is not None and not isinstance(slurm, dict):
        raise InputError(f"slurm must be a mapping, such as {{slurm_partition: gpu, timeout_min: 60}}, got {slurm!r}")
    for key in ("nodes", "tasks_per_node"):
        if slurm and slurm.get(key, 1) != 1:
            raise InputError(
                f"slurm.{key} must be 1, because a run of a sweep is one task on one node, got {slurm[key]!r}"
            )
    return slurm


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
        raise InputError(f"{path}.{key} is set by the sweep; remove it")
    is_known = key in ("model", "data", "trainer", *_TOP_LEVEL_KEYS) or (
        isinstance(key, str) and _RUN_KEY.fullmatch(key)
    )
    if not is_known:
        examples = f"trainer.max_epochs, data.batch_size or {', '.join(_TOP_LEVEL_KEYS)}"
        raise InputError(f"{path}: unknown key {key!r}; keys are those of a run, such as {examples}")
    try:
        text = value if isinstance(value, str) else "null" if value is None else json.dumps(value)
        text.encode()
    except (ValueError, TypeError, RecursionError):
        raise InputError(
            f"{path}.{key} must be text, a number, true, false, null, or lists or mappings of them, "
            f"got {str(value)[:100]!a}"
        ) from None
    text = os.path.expandvars(text)
    if (missing := re.search(r"\$\{(\w+)\}", text)) is not None:
        raise InputError(f"{path}.{key}: the environment variable {missing[1]} is not set; set it, or write its value")
    return text


class ConfigNode:
    """A mapping or list of the sweep file with its path.

    Args:
        content: the mapping or list; None for an empty one.
        path: path in the file, for error messages.
        default: default name of the sweep, for the top of the file.

    Raises:
        InputError: the content is neither a mapping nor a list.
    """

    def __init__(self, content: Any, path: str, default: str = "") -> None:
        self.content, self.path, self.default = {} if content is None else content, path, default
        if not isinstance(self.content, dict | list):
            raise InputError(f"{path or 'the file'} must be a mapping of keys to values, got {content!r}")

    def _key(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def only(self, *known: str) -> None:
        """Check that the node is a mapping and has no other keys than the given ones."""
        if not isinstance(self.content, dict):
            raise InputError(f"{self.path or 'the file'} must be a mapping with {', '.join(known)}, got a list")
        for key in self.content:
            if key not in known:
                near = did_you_mean(str(key), known) or ";"
                raise InputError(f"unknown key {self._key(str(key))}{near} keys are {', '.join(known)}")

    def mapping(self, key: str, required: bool = False) -> dict[str, ConfigNode]:
        """Return the named nodes below a key, which are a mapping or a list of names."""
        value = self.content.get(key)
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            if duplicates := [name for name, count in Counter(value).items() if count > 1]:
                raise InputError(f"{self._key(key)} must have different names, got {duplicates[0]!r} twice")
            value = dict.fromkeys(value)
        if (not value and required) or (value is not None and not isinstance(value, dict)):
            raise InputError(f"{self._key(key)} must be a mapping of names, such as {{sst5: {{...}}}}, got {value!r}")
        for name in value or {}:
            if not (isinstance(name, str) and _NAME.fullmatch(name)):
                raise InputError(f"{self._key(key)}: a name must be {_NAME_RULE}, got {name!r}")
        return {str(name): ConfigNode(part, f"{self._key(key)}.{name}") for name, part in (value or {}).items()}

    def name(self, key: str, default: str) -> str:
        """Return a name that can be the name of a folder."""
        value = self.content.get(key, default)
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise InputError(f"{self._key(key)} must be a name of {_NAME_RULE}, got {value!r}")
        return value

    def integer(self, key: str, default: int | None, least: int = 0) -> int | None:
        """Return an integer of at least ``least``."""
        value = self.content.get(key, default)
        if value is not None and (type(value) is not int or value < least):
            raise InputError(f"{self._key(key)} must be an integer of at least {least}, got {value!r}")
        return value

    def seeds(self, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return the seeds."""
        value = self.content.get("seeds", list(default))
        is_valid = isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value)
        if not is_valid or len(set(value)) != len(value):
            raise InputError(f"{self._key('seeds')} must be a list of different integers of at least 0, got {value!r}")
        return tuple(value)

    def flags(self, key: str) -> tuple[str, ...]:
        """Return the settings below a key as flags."""
        value = self.content.get(key) or {}
        if not isinstance(value, dict):
            raise InputError(f"{self._key(key)} must be a mapping, such as {{trainer.max_epochs: 3}}, got {value!r}")
        return as_flags(value, self._key(key))

    def configs(self, kind: str = "", *names: str) -> tuple[str, ...]:
        """Return the configuration files; they default to ``configs/KIND/NAME.yaml`` for the given kind and names."""
        value = self.content.get("configs", [f"configs/{kind}/{name}.yaml" for name in names])
        if not isinstance(value, list) or not all(isinstance(file, str) for file in value):
            raise InputError(f"{self._key('configs')} must be a list of files, got {value!r}")
        for file in value:
            try:
                config_path(file, self._key("configs"))
            except InputError as error:
                hint = "" if os.path.isabs(file) else f"; paths are relative to the working directory, {os.getcwd()}"
                raise InputError(f"{error}{hint}") from None
        return tuple(value)

    def grid(self) -> list[tuple[str, dict[str, Any]]]:
        """Return each combination of the grid's values, after the suffix that it adds to the strategy's name."""
        value = self.content.get("grid") or {}
        if not isinstance(value, dict) or not all(isinstance(values, list) and values for values in value.values()):
            raise InputError(f"{self._key('grid')} must be a mapping of keys to lists of values, got {value!r}")
        combinations = [dict(zip(value, values, strict=True)) for values in itertools.product(*value.values())]
        suffixes = ["".join(f",{str(key).rpartition('.')[2]}={v}" for key, v in c.items()) for c in combinations]
        return list(zip(suffixes, combinations, strict=True))

    def search(self) -> Search | None:
        """Return the search, or None if there is none."""
        if self.content.get("search") is None:
            return None
        node = ConfigNode(self.content["search"], self._key("search"))
        node.only("trials", "space", "seed", "overrides")
        trials, seed = node.integer("trials", 10, least=1), node.integer("seed", 0)
        space = node.content.get("space")
        if not isinstance(space, dict) or not space:
            raise InputError(f"{node.path}.space must be a mapping of keys to values to try, got {space!r}")
        for key, values in space.items():
            if not _is_range(values) and not (isinstance(values, list) and values):
                raise InputError(
                    f"{node.path}.space.{key} must be a list of choices, or {{low: 1.0e-5, high: 1.0e-2, log: true}}, "
                    f"got {values!r}"
                )
            for value in values if isinstance(values, list) else [None]:
                as_flags({key: value}, f"{node.path}.space")
        assert trials is not None
        assert seed is not None
        return Search(trials, space, seed, node.flags("overrides"))


def _is_range(values: Any) -> bool:
    """Return whether values are a valid range of numbers: low < high, and either log, with low > 0, or step."""
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= {"low", "high", "log", "step"}:
        return False
    low, high, log, step = values["low"], values["high"], values.get("log", False), values.get("step")
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not isinstance(log, bool) or not low < high or (log and (low <= 0 or step is not None)):
        return False
    return step is None or (isinstance(step, int | float) and not isinstance(step, bool) and 0 < step <= high - low)
