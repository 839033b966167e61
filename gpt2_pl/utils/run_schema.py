"""Schemas of the files of a run: metrics.json, weight_digests.json, calibration.json, sweep.json and that of a search.

Import this module where a file is read; see :mod:`gpt2_pl.utils.schema`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from gpt2_pl.errors import InputError
from gpt2_pl.utils.schema import VISIBLE, Count, EpochScores, Figure, Name, Schema, Scores, Text, expect, validate


def _is_file_or_files(value: Any) -> bool:
    """Return whether a value is None, the path of a file, or a list of paths."""
    if value is None:
        return True
    files = value if isinstance(value, list) else [value]
    return all(isinstance(file, str) and not re.search("[\ud800-\udfff]", file) for file in files)


_STEP = expect(lambda text: bool(re.fullmatch("[1-9][0-9]{0,17}", text)), "a number of steps")
_FILES = expect(_is_file_or_files, "a file or a list of files")


class Layer(Schema):
    """Number of parameters, number of trainable parameters and peak learning rates of a layer."""

    layer: Name
    parameters: Count
    trainable: Count
    peak_rates: list[Figure] = []


class Parameters(Schema):
    """Numbers of parameters of a model."""

    trainable: Count | None = None
    total: Count | None = None
    layers: list[Layer] = []


class Base(Schema):
    """Pretrained base of a run, its origin and the time that its pretraining took."""

    path: Text | None = None
    hub_id: Text | None = None
    digest: Name | None = None
    origin: Name | None = None
    recipe: Text | None = None
    seconds: Figure | None = None
    cpu_seconds: Figure | None = None


class DataDescription(Schema, extra="allow"):
    """Description of a datamodule; a user's datamodule may add keys."""

    class_name: Name | None = Field(None, alias="class")
    files: dict[Name, Annotated[Any, _FILES]] | None = None
    hub_id: Text | None = None
    rows: dict[Name, Count | None] | None = None
    labels: list[Text] | None = None
    truncated: dict[Name, Count] | None = None
    class_counts: dict[Name, list[Count]] | None = None
    dropped_duplicates: Count | None = None


class MetricDescription(Schema):
    """Direction and display of a metric; see :class:`gpt2_pl.metrics.MetricInfo`."""

    higher_is_better: bool | None = None
    percent: bool = False
    shown: bool = False


class Metrics(Schema):
    """Record of a run, metrics.json."""

    status: Name | None = None
    reference: Name | None = None
    task: Name | None = None
    configs: list[Annotated[Text, VISIBLE]] | None = None
    monitor: Name | None = None
    mode: Literal["min", "max"] | None = None
    primary: Name | None = None
    metrics: dict[Name, MetricDescription] | None = None
    scores: Scores | None = None
    score_signatures: dict[Name, Name] | None = None
    score_note: Text | None = None
    epochs: Annotated[list[EpochScores], Field(max_length=100_000)] | None = None
    parameters: Parameters | None = None
    seconds: Figure | None = None
    cpu_seconds: Figure | None = None
    examples_per_second: Figure | None = None
    tokens_per_second: Figure | None = None
    training_flops: Figure | None = None
    mfu: Figure | None = None
    peak_memory_bytes: Count | None = None
    checkpoint_bytes: Count | None = None
    threads: Count | None = None
    steps: Count | None = None
    skipped_steps: Count | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    processes: Count | None = None
    precision: Name | None = None
    device: Name | None = None
    base: Base | None = None
    data: DataDescription | None = None
    code: dict[Name, Name] | None = None
    versions: dict[Name, Name] | None = None


class DigestRecord(Schema):
    """Digests of the weights after some steps of a run, weight_digests.json."""

    total_steps: Count
    steps: dict[Annotated[str, _STEP], dict[Name, Name]]


class CalibrationRecord(Schema):
    """Temperature that was fitted on rows of a split, calibration.json."""

    temperature: Annotated[float, Field(gt=0, le=1000)]
    split: Name
    rows: Count


class SweepRecord(Schema):
    """Settings with which a run of a sweep was started, sweep.json."""

    files: dict[Text, Text]
    flags: dict[Text, Text]
    base: dict[str, Any] | None
    threads: Count = 1
    levels: dict[Name, Name] = {}


class SearchRecord(SweepRecord):
    """Space, seed and sampler of a sweep's search, and the settings of its trials."""

    files: dict[Text, Text] = {}
    flags: dict[Text, Text] = {}
    base: dict[str, Any] | None = None
    space: dict[Text, Any]
    seed: int
    sampler: Name = "tpe"


def check_metrics(content: Any, where: str) -> dict[str, Any]:
    """Check the content of metrics.json; a finished training run must have its scores, parameters and times.

    Args:
        content: the content of the file.
        where: the path of the file; messages start with it.

    Returns:
        The content.

    Raises:
        InputError: naming the invalid or missing key.
    """
    record = validate(Metrics, content, where)
    if record.status == "finished" and record.epochs:
        parameters = record.parameters or Parameters()
        required = {key: getattr(record, key) for key in ("scores", "parameters", "seconds", "monitor")}
        required |= {"parameters.trainable": parameters.trainable, "parameters.total": parameters.total}
        for key, value in required.items():
            if value is None:
                raise InputError(f"{key} is missing, and the run is finished", key=key, source=where)
    return dict(content)
