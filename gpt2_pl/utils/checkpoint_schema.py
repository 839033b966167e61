"""Schemas of checkpoints.

Import this module where a file is read; see :mod:`gpt2_pl.utils.schema`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from gpt2_pl.utils.run_schema import Layer
from gpt2_pl.utils.schema import Count, EpochScores, Figure, Name, Rate, Schema, Score, Scores, Size, Text, expect

_LIGHTNING_VERSION = r"^([2-9]|[1-9][0-9])(\.[0-9]{1,9}){1,4}((a|b|rc|\.?dev|\.?post)[0-9]{1,9})?(\+[a-z0-9]+)?$"


def _is_number(value: Any) -> bool:
    """Return whether a value is a real number or a real tensor with one element."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, int | float) and not isinstance(value, bool)


_Number = Annotated[Any, expect(_is_number, "a number")]
_Scalar = Annotated[  # Lightning's callbacks call methods of a tensor and format its value
    Any,
    expect(
        lambda value: isinstance(value, Tensor) and value.dim() == 0 and _is_number(value), "a tensor of one number"
    ),
]
_Tensor = Annotated[Any, expect(lambda value: isinstance(value, Tensor), "a tensor")]


class BaseReference(Schema):
    """Pretrained base of a checkpoint's weights."""

    path: Text | None = None
    digest: Name | None = None
    complete: bool | None = None


class PromptSpec(Schema, extra="allow"):
    """Prompt template and class names of a classifier; a user's datamodule may add keys."""

    template: Text | None = None
    labels: list[Text] | None = None
    columns: dict[Text, list[Text]] | None = None
    max_length: Count | None = None
    quoting: bool | None = None


class RunSummaryState(Schema):
    """State of gpt2_pl.callbacks.RunSummary."""

    epochs: list[EpochScores] | None = None
    val_metrics: Scores | None = None
    layers: list[Layer] | None = None


class ThroughputState(Schema):
    """State of gpt2_pl.callbacks.Throughput."""

    seconds: Figure | None = None
    cpu_seconds: Figure | None = None
    training_seconds: Figure | None = None
    examples: Count | None = None
    tokens: Count | None = None
    flops: Figure | None = None
    peak_memory_bytes: Count | None = None


class PredictionWriterState(Schema):
    """State of gpt2_pl.callbacks.PredictionWriter."""

    best: Score | None = None


class NonFiniteLossGuardState(Schema):
    """State of gpt2_pl.callbacks.NonFiniteLossGuard."""

    skipped: Count


class EarlyStoppingState(Schema, extra="allow"):
    """State of Lightning's EarlyStopping; a later version may add keys."""

    wait_count: Count
    stopped_epoch: Count
    best_score: _Scalar
    patience: Count


class ModelCheckpointState(Schema, extra="allow"):
    """State of Lightning's ModelCheckpoint; a later version may add keys."""

    monitor: Name | None = None
    dirpath: Text | None = None
    best_model_path: Text
    kth_best_model_path: Text
    last_model_path: Text
    best_model_score: _Number | None = None
    current_score: _Number | None = None
    kth_value: _Number | None = None
    best_k_models: dict[Text, _Number]


class StochasticWeightAveragingState(Schema, extra="allow"):
    """State of Lightning's StochasticWeightAveraging; only ``n_averaged`` is used."""

    n_averaged: Count


class WeightAveragingState(Schema, extra="allow"):
    """State of Lightning's WeightAveraging and EMAWeightAveraging; a later version may add keys."""

    latest_update_step: Count


CALLBACKS: dict[str, type[Schema]] = {  # name of the callback's class -> schema of its state
    "RunSummary": RunSummaryState,
    "Throughput": ThroughputState,
    "PredictionWriter": PredictionWriterState,
    "NonFiniteLossGuard": NonFiniteLossGuardState,
    "ResumableEarlyStopping": EarlyStoppingState,
    "EarlyStopping": EarlyStoppingState,
    "ResumableModelCheckpoint": ModelCheckpointState,
    "ModelCheckpoint": ModelCheckpointState,
    "StochasticWeightAveraging": StochasticWeightAveragingState,
    "WeightAveraging": WeightAveragingState,
    "EMAWeightAveraging": WeightAveragingState,
}


class SurgerySettings(Schema):
    """Class and arguments of a surgery."""

    class_path: Name
    init_args: dict[Name, Any] | None = None


class Config(Schema):
    """Shape of a GPT-2, gpt2_pl.model.GPT2Config."""

    vocab_size: Size = 1
    n_positions: Size = 1
    n_embd: Size = 1
    n_layer: Size = 1
    n_head: Size = 1
    dropout: Rate = 0.0


class Hyperparameters(Schema):
    """Hyperparameters of all tasks; the signature of a task's class defines its other ones."""

    base: Text | None = None
    config: Config | None = None
    dropout: Rate | None = None
    surgery: list[SurgerySettings] | None = None
    train_base: bool | None = None


class FitLoop(Schema, extra="allow"):
    """Progress of training; :mod:`gpt2_pl.tasks.training_state` compares the other keys with the trainer's."""

    epoch_progress: dict[str, Any]


class Loops(Schema, extra="allow"):
    """Progress of all loops."""

    fit_loop: FitLoop


class OptimizerState(Schema, extra="allow"):
    """State of an optimizer; :mod:`gpt2_pl.tasks.training_state` compares it with the run's optimizer."""

    state: dict[Any, Any]
    param_groups: list[dict[str, Any]]


class Checkpoint(Schema, extra="allow"):
    """Content of a checkpoint; users' tasks and callbacks may add keys."""

    version: Annotated[str, Field(pattern=_LIGHTNING_VERSION)] = Field(alias="pytorch-lightning_version")
    state_dict: dict[Name, _Tensor]
    hyper_parameters: dict[Name, Any]
    hparams_name: Literal["kwargs"] | None = None
    base: BaseReference
    surgery: list[SurgerySettings] | None = None
    prompt_spec: PromptSpec | None = None
    epoch: Count | None = None
    global_step: Count | None = None
    callbacks: dict[Text, dict[str, Any]] | None = None
    loops: Loops | None = None
    optimizer_states: Annotated[list[OptimizerState], Field(min_length=1)] | None = None
    lr_schedulers: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
