"""Schema of sweep files.

Import this module where a file is read; see :mod:`gpt2_pl.utils.schema`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from gpt2_pl.utils.schema import Count, Schema, Size, Text, expect

NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.+,=-]{0,198}[A-Za-z0-9_+,=-])?")  # Windows drops dots at the end

T = TypeVar("T")


def _as_mapping(value: Any) -> Any:
    """Convert a list of names, and names without a value, to names of empty mappings."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value):
        value = dict.fromkeys(value)
    if not isinstance(value, dict | None):
        raise PydanticCustomError("unexpected", "{expected}", {"expected": "a mapping or a list of different names"})
    return {name: {} if part is None else part for name, part in (value or {}).items()}


def _is_list_or_range(values: Any) -> bool:
    """Return whether values are choices or a range of numbers: low < high, and either log, with low > 0, or step."""
    if not isinstance(values, dict):
        return isinstance(values, list) and bool(values)
    if not {"low", "high"} <= values.keys() <= {"low", "high", "log", "step"}:
        return False
    low, high, log, step = values["low"], values["high"], values.get("log", False), values.get("step")
    numbers = all(isinstance(number, int | float) and not isinstance(number, bool) for number in (low, high, step or 0))
    if not numbers or not isinstance(log, bool) or not low < high or (log and (low <= 0 or step is not None)):
        return False
    return step is None or 0 < step <= high - low


FolderName = Annotated[str, expect(lambda name: bool(NAME.fullmatch(name)), "up to 200 letters, digits, _ . + -")]
Named = Annotated[dict[FolderName, T], BeforeValidator(_as_mapping)]
Settings = dict[Any, Any] | None
Seeds = Annotated[
    list[Annotated[int, Field(ge=0)]],
    Field(min_length=1),
    expect(lambda seeds: len(set(seeds)) == len(seeds), "a list of different numbers"),
]
Choices = Annotated[Any, expect(_is_list_or_range, "a list of choices, or {low: 1.0e-5, high: 1.0e-2, log: true}")]


class PretrainNode(Schema):
    """Pretraining run."""

    configs: list[str]
    overrides: Settings = None


class SearchNode(Schema):
    """Search for the best settings of a strategy by the monitored score of its task.

    ``trials`` runs with ``seed`` and ``overrides`` try values of ``space``: for each key a list of choices, or
    ``{low, high}`` with optional ``log: true`` or ``step``. The sampler ``tpe`` adapts to earlier trials, ``random``
    draws all trials independently, so that ``compare`` can estimate the best of fewer trials.
    """

    trials: Size = 10
    space: Annotated[dict[Any, Choices], Field(min_length=1)]
    seed: Count = 0
    sampler: Literal["tpe", "random"] = "tpe"
    overrides: Settings = None


class UntilNode(Schema):
    """Rule that adds seeds until the difference of every strategy to the baseline is decided.

    ``margin`` is the difference that matters: points for a share, percent for a perplexity, else in the unit of the
    score. An undecided strategy has ``at_most`` seeds.
    """

    margin: Annotated[float, Field(gt=0, lt=1e300)]
    at_most: Annotated[int, Field(ge=3, le=15)] = 15
    baseline: Text = "full"


class RunsNode(Schema):
    """Settings of several runs; files and seeds that are not given follow from names and from the task."""

    configs: list[str] = []
    overrides: Settings = None
    seeds: Seeds = []


class StrategyNode(RunsNode):
    """Strategy."""

    grid: dict[Any, Annotated[list[Any], Field(min_length=1)]] | None = None
    search: SearchNode | None = None
    base: str | None = None


class LevelNode(Schema):
    """Level of a factor: configuration files, by default the strategy of its name, and overrides."""

    configs: list[str] = []
    overrides: Settings = None


Factors = Named[Annotated[Named[LevelNode], Field(min_length=2)]]


class TaskNode(RunsNode):
    """Task with its own strategies and factors."""

    strategies: Named[StrategyNode] = {}
    factors: Factors = {}
    until: UntilNode | None = None
    pretrain: Named[PretrainNode] = {}


class SweepFile(Schema):
    """Content of a sweep file."""

    name: FolderName
    max_parallel: Size | None = None
    seeds: Seeds = [1, 2, 3]
    overrides: Settings = None
    tasks: Annotated[Named[TaskNode], Field(min_length=1)]
    strategies: Named[StrategyNode] = {}
    factors: Factors = {}
    until: UntilNode | None = None
    slurm: dict[str, Any] | None = None
