"""A sweep's file: which runs it asks for."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_pl.configs import config_path
from gpt2_pl.errors import InputError, did_you_mean
from gpt2_pl.experiments.sweep.run import SweepRun
from gpt2_pl.filesystem import require_file
from gpt2_pl.utils.yaml_json import read_yaml

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.+,=-]{0,198}[A-Za-z0-9_+,=-])?")  # Windows drops dots at the end
_KEY = re.compile(r"(model|data|trainer)(\.[A-Za-z_][A-Za-z0-9_]*)+\+?")
_OWN = ("seed_everything", "name", "version", "config", "ckpt_path", "trainer.default_root_dir")
_KEYS = ("early_stopping_patience", "checkpoint_every_n_steps", "on_non_finite_loss")


@dataclass(frozen=True)
class Search:
    """A search for the best settings of a strategy, by its task's monitored score.

    Args:
        trials: how many runs it is made of.
        space: key -> a list of choices, or ``{low, high}`` with ``log: true`` or ``step``.
        seed: of the runs, and of the sampler.
        flags: of its runs alone, such as fewer epochs.
    """

    trials: int
    space: dict[str, Any]
    seed: int = 0
    flags: tuple[str, ...] = ()


@dataclass
class Experiment:
    """A strategy on a task: its runs, one for every seed and combination of the grid.

    Args:
        task: the task's name.
        strategy: the strategy's, with the grid's values.
        files: configuration files.
        flags: those over them, but the seed's.
        seeds: of its runs.
        sweep: the sweep's name.
        search: what is to be found before they begin.
        base: name, files and flags of the run whose model they start from.
        found: flags that the search has found.
    """

    task: str
    strategy: str
    files: tuple[str, ...]
    flags: tuple[str, ...]
    seeds: tuple[int, ...]
    sweep: str
    search: Search | None = None
    base: tuple[str, tuple[str, ...], tuple[str, ...]] | None = None
    found: tuple[str, ...] = ()

    def runs(self) -> list[SweepRun]:
        """A run for every seed."""
        return [self._run(self.sweep, f"seed_{seed}", seed, self.found) for seed in self.seeds]

    def trial(self, number: int, settings: dict[str, Any]) -> SweepRun:
        """A run of the search with these settings."""
        assert self.search is not None
        extra = (*self.search.flags, *as_flags(settings, "search"))
        return self._run(f"{self.sweep}.search", f"trial_{number}", self.search.seed, extra)

    def _run(self, sweep: str, version: str, seed: int, extra: tuple[str, ...]) -> SweepRun:
        seeded = f"--seed_everything={seed}"
        base = None
        if self.base is not None:
            name, files, flags = self.base
            base = SweepRun(
                f"{self.sweep}.pretrain", self.task, name, f"seed_{seed}", files, (*flags, seeded), exported=True
            )
        return SweepRun(sweep, self.task, self.strategy, version, self.files, (*self.flags, *extra, seeded), base)


@dataclass
class SweepConfig:
    """What a sweep's file asks for.

    Args:
        name: the sweep's.
        max_parallel: how many runs go on at the same time; None for one a GPU.
        arms: strategies on tasks.
        slurm: parameters of submitit's AutoExecutor on SLURM; None on this machine.
    """

    name: str
    max_parallel: int | None
    arms: list[Experiment]
    slurm: dict[str, Any] | None

    @classmethod
    def read(cls, file: Path) -> SweepConfig:
        """Read a sweep's file.

        Raises:
            InputError: naming the file, the key and what would be right.
        """
        content = read_yaml(require_file(file, "sweep"))
        try:
            plan = cls._from(ConfigNode(content, "", file.stem))
            _check_folders(plan.arms)
            return plan
        except InputError as error:
            raise InputError(f"{file}: {error}") from None

    @classmethod
    def _from(cls, top: ConfigNode) -> SweepConfig:
        top.only("name", "max_parallel", "seeds", "overrides", "tasks", "strategies", "slurm")
        name = top.name("name", top.default)
        max_parallel = top.integer("max_parallel", None, least=1)
        seeds = top.seeds((1, 2, 3))
        everywhere = top.mapping("strategies")
        arms = []
        for task, node in top.mapping("tasks", required=True).items():
            node.only("configs", "overrides", "seeds", "strategies", "pretrain")
            bases = {}
            for base, own in node.mapping("pretrain").items():
                own.only("configs", "overrides")
                if "configs" not in own.content:
                    raise InputError(f"{own.path}: give configs, the files of the run that makes this base")
                bases[base] = (base, own.configs(), (*top.flags("overrides"), *own.flags("overrides")))
            strategies = {**everywhere, **node.mapping("strategies")}
            if not strategies:
                raise InputError(f"{node.path}.strategies: name at least one, such as full")
            for strategy, own in strategies.items():
                own.only("configs", "overrides", "seeds", "grid", "search", "base")
                wanted = own.content.get("base")
                if wanted is not None and (not isinstance(wanted, str) or wanted not in bases):
                    raise InputError(
                        f"{own.path}.base is {wanted!r}; the task's bases are {', '.join(bases) or 'none'}"
                    )
                files = (*node.configs("task", task), *own.configs("strategy", *strategy.split("+")))
                flags = (*top.flags("overrides"), *node.flags("overrides"), *own.flags("overrides"))
                for suffix, values in own.grid():
                    if not _NAME.fullmatch(strategy + suffix):
                        raise InputError(
                            f"{own.path}.grid: {suffix[1:]!r} is no name for a folder; use plain numbers and words"
                        )
                    settings = (*flags, *as_flags(values, f"{own.path}.grid"))
                    arms.append(
                        Experiment(
                            task,
                            strategy + suffix,
                            files,
                            settings,
                            own.seeds(node.seeds(seeds)),
                            name,
                            own.search(),
                            None if wanted is None else bases[wanted],
                        )
                    )
        slurm = top.content.get("slurm")
        if slurm is not None and not isinstance(slurm, dict):
            raise InputError(
                f"slurm is {slurm!r}; it must be a mapping, such as {{slurm_partition: gpu, timeout_min: 60}}"
            )
        for key in ("nodes", "tasks_per_node"):
            if slurm and slurm.get(key, 1) != 1:
                raise InputError(f"slurm.{key} is {slurm[key]!r}; a run of a sweep is one task on one node")
        return cls(name, max_parallel, arms, slurm)


def _check_folders(arms: list[Experiment]) -> None:
    """Refuse two runs that would write into one folder, also where a file system takes two names or links for one.

    Raises:
        InputError: naming both.
    """
    runs = [(run, False) for arm in arms for run in (*arm.runs(), *([arm.trial(0, {})] if arm.search else []))]
    bases = [(run.base, True) for run, _ in runs if run.base is not None]
    taken: dict[str, SweepRun] = {}
    for run, shared in [*runs, *bases]:  # runs may start from one base
        other = taken.setdefault(os.path.realpath(run.folder).casefold(), run)
        if other is not run and not (shared and other == run):
            names = " and ".join(f"{one.task}.{one.strategy}, {one.version.replace('_', ' ')}" for one in (other, run))
            folders = " and ".join(dict.fromkeys(str(one.folder) for one in (other, run)))
            raise InputError(f"two runs have one folder, {folders}: {names}; give one another name or other values")


def as_flags(settings: dict[str, Any], path: str) -> tuple[str, ...]:
    """Settings as flags; ``${NAME}`` stands for a variable of the environment.

    Raises:
        InputError: a key that is none of a run's, or the sweep's own to say, or a value that is no plain one.
    """
    flags = []
    for key, value in settings.items():
        inner = value if key == "trainer" and isinstance(value, dict) else {}
        if key in _OWN or "default_root_dir" in inner:
            raise InputError(f"{path}.{key} is the sweep's own to say")
        if not isinstance(key, str) or not (key in ("model", "data", "trainer", *_KEYS) or _KEY.fullmatch(key)):
            raise InputError(
                f"{path}: {key!r} is no key of a run, such as trainer.max_epochs, data.batch_size or {', '.join(_KEYS)}"
            )
        try:
            text = value if isinstance(value, str) else "null" if value is None else json.dumps(value)
            text.encode()
        except (ValueError, TypeError, RecursionError):
            raise InputError(
                f"{path}.{key} is {str(value)[:100]!a}; it must be text, a number, true, false, null, or lists or "
                "mappings of them"
            ) from None
        text = os.path.expandvars(text)
        if (missing := re.search(r"\$\{(\w+)\}", text)) is not None:
            raise InputError(f"{path}.{key}: the environment has no {missing[1]}; set it, or write its value here")
        flags.append(f"--{key}={text}")
    return tuple(flags)


class ConfigNode:
    """A part of the file, which knows its path for error messages."""

    def __init__(self, content: Any, path: str, default: str = "") -> None:
        self.content, self.path, self.default = {} if content is None else content, path, default
        if not isinstance(self.content, dict | list):
            raise InputError(f"{path or 'the file'} is {content!r}; it must be a mapping of keys to values")

    def _key(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def only(self, *known: str) -> None:
        """Refuse other keys."""
        if not isinstance(self.content, dict):
            raise InputError(f"{self.path or 'the file'} is a list; it must be a mapping with {', '.join(known)}")
        for key in self.content:
            if key not in known:
                near = did_you_mean(str(key), known) or ";"
                raise InputError(f"{self._key(str(key))} is no key{near} there are {', '.join(known)}")

    def mapping(self, key: str, required: bool = False) -> dict[str, ConfigNode]:
        """Named parts."""
        found = self.content.get(key)
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            if twice := [name for name, times in Counter(found).items() if times > 1]:
                raise InputError(f"{self._key(key)} names {twice[0]!r} twice")
            found = dict.fromkeys(found)
        if (not found and required) or (found is not None and not isinstance(found, dict)):
            raise InputError(f"{self._key(key)} is {found!r}; it must name its parts, such as {{sst5: {{...}}}}")
        for name in found or {}:
            if not (isinstance(name, str) and _NAME.fullmatch(name)):
                raise InputError(f"{self._key(key)}: {name!r} is no name; use up to 200 letters, digits, _ . + -")
        return {str(name): ConfigNode(part, f"{self._key(key)}.{name}") for name, part in (found or {}).items()}

    def name(self, key: str, default: str) -> str:
        """A name that can be a folder's."""
        found = self.content.get(key, default)
        if not isinstance(found, str) or not _NAME.fullmatch(found):
            raise InputError(f"{self._key(key)} is {found!r}; it must be a name of up to 200 letters, digits, _ . + -")
        return found

    def integer(self, key: str, default: int | None, least: int = 0) -> int | None:
        """A whole number."""
        found = self.content.get(key, default)
        if found is not None and (type(found) is not int or found < least):
            raise InputError(f"{self._key(key)} is {found!r}; it must be a whole number of at least {least}")
        return found

    def seeds(self, default: tuple[int, ...]) -> tuple[int, ...]:
        """The seeds."""
        found = self.content.get("seeds", list(default))
        good = isinstance(found, list) and found and all(type(seed) is int and seed >= 0 for seed in found)
        if not good or len(set(found)) != len(found):
            raise InputError(f"{self._key('seeds')} is {found!r}; it must be a list of different whole numbers")
        return tuple(found)

    def flags(self, key: str) -> tuple[str, ...]:
        """Settings as flags."""
        found = self.content.get(key) or {}
        if not isinstance(found, dict):
            raise InputError(f"{self._key(key)} is {found!r}; it must be a mapping, such as {{trainer.max_epochs: 3}}")
        return as_flags(found, self._key(key))

    def configs(self, kind: str = "", *names: str) -> tuple[str, ...]:
        """Configuration files, or names of packaged ones; by default those of these names in ``configs/KIND``."""
        found = self.content.get("configs", [f"configs/{kind}/{name}.yaml" for name in names])
        if not isinstance(found, list) or not all(isinstance(file, str) for file in found):
            raise InputError(f"{self._key('configs')} is {found!r}; it must be a list of files")
        for file in found:
            try:
                config_path(file, self._key("configs"))
            except InputError as error:
                where = "" if os.path.isabs(file) else f"; its path counts from the working folder, {os.getcwd()}"
                raise InputError(f"{error}{where}") from None
        return tuple(found)

    def grid(self) -> list[tuple[str, dict[str, Any]]]:
        """Every combination of the grid's values, and what it adds to the strategy's name."""
        found = self.content.get("grid") or {}
        if not isinstance(found, dict) or not all(isinstance(values, list) and values for values in found.values()):
            raise InputError(f"{self._key('grid')} is {found!r}; it must give every key a list of values")
        combinations = [dict(zip(found, values, strict=True)) for values in itertools.product(*found.values())]
        named = ["".join(f",{str(key).rpartition('.')[2]}={value}" for key, value in c.items()) for c in combinations]
        return list(zip(named, combinations, strict=True))

    def search(self) -> Search | None:
        """The search."""
        if self.content.get("search") is None:
            return None
        node = ConfigNode(self.content["search"], self._key("search"))
        node.only("trials", "space", "seed", "overrides")
        trials, seed = node.integer("trials", 10, least=1), node.integer("seed", 0)
        space = node.content.get("space")
        if not isinstance(space, dict) or not space:
            raise InputError(f"{node.path}.space is {space!r}; it must name keys and their values")
        for key, values in space.items():
            if not _bounds(values) and not (isinstance(values, list) and values):
                raise InputError(
                    f"{node.path}.space.{key} is {values!r}; it must be a list of choices, or {{low: 1.0e-5, "
                    "high: 1.0e-2, log: true}"
                )
            for value in values if isinstance(values, list) else [None]:
                as_flags({key: value}, f"{node.path}.space")
        assert trials is not None
        assert seed is not None
        return Search(trials, space, seed, node.flags("overrides"))


def _bounds(values: Any) -> bool:
    """Whether this is a range of numbers to search."""
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= {"low", "high", "log", "step"}:
        return False
    low, high, log, step = values["low"], values["high"], values.get("log", False), values.get("step")
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not isinstance(log, bool) or not low < high or (log and (low <= 0 or step is not None)):
        return False
    return step is None or (isinstance(step, int | float) and not isinstance(step, bool) and 0 < step <= high - low)
