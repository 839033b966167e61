"""Schemas of checkpoints.

Import this module where a file is read; see :mod:`gpt2_pl.utils.schema`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, InstanceOf
from torch import Tensor

from gpt2_pl.utils.run_schema import Layer
from gpt2_pl.utils.schema import (
    Count,
    EpochScores,
    Figure,
    Name,
    PromptSpec,
    Rate,
    Schema,
    Score,
    Scores,
    Size,
    Text,
    expect,
)

_LIGHTNING_VERSION = re.compile(r"([2-9]|[1-9]\d)(\.\d{1,9}){1,4}((a|b|rc|\.?dev|\.?post)\d{1,9})?(\+[a-z0-9]+)?", re.A)
_IS_VERSION = expect(lambda text: bool(_LIGHTNING_VERSION.fullmatch(text)), "a version of Lightning from 2.0 on")


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


class BaseReference(Schema):
    """Pretrained base of a checkpoint's weights."""

    path: Text | None = None
    digest: Name | None = None
    complete: bool | None = None


class CallbackState(Schema, extra="allow"):
    """State of one of ``CALLBACKS``, by the keys of all of them; later versions of Lightning may add keys."""

    # RunSummary
    epochs: list[EpochScores] | None = None
    val_metrics: Scores | None = None
    layers: list[Layer] | None = None
    # Throughput
    seconds: Figure | None = None
    cpu_seconds: Figure | None = None
    training_seconds: Figure | None = None
    examples: Count | None = None
    tokens: Count | None = None
    flops: Figure | None = None
    peak_memory_bytes: Count | None = None
    # PredictionWriter and NonFiniteLossGuard
    best: Score | None = None
    skipped: Count = 0
    # Forgetting
    initial: Score | None = None
    # EarlyStopping
    wait_count: Count = 0
    stopped_epoch: Count = 0
    best_score: _Scalar = None
    patience: Count = 0
    # ModelCheckpoint
    monitor: Name | None = None
    dirpath: Text | None = None
    best_model_path: Text = ""
    kth_best_model_path: Text = ""
    last_model_path: Text = ""
    best_model_score: _Number | None = None
    current_score: _Number | None = None
    kth_value: _Number | None = None
    best_k_models: dict[Text, _Number] = {}
    # StochasticWeightAveraging, and WeightAveraging and its subclasses
    n_averaged: Count = 0
    latest_update_step: Count = 0


CALLBACKS = {  # names of classes whose states are checked
    *("RunSummary", "Throughput", "PredictionWriter", "NonFiniteLossGuard", "Forgetting"),
    *("ResumableEarlyStopping", "EarlyStopping", "ResumableModelCheckpoint", "ModelCheckpoint"),
    *("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging"),
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

    version: Annotated[str, _IS_VERSION] = Field(alias="pytorch-lightning_version")
    state_dict: dict[Name, InstanceOf[Tensor]]
    hyper_parameters: dict[Name, Any]
    hparams_name: Literal["kwargs"] | None = None
    base: BaseReference
    surgery: list[SurgerySettings] | None = None
    prompt_spec: PromptSpec | None = None
    digests: dict[Name, Name] | None = None
    pairs: Name | None = None
    epoch: Count | None = None
    global_step: Count | None = None
    callbacks: dict[Text, dict[str, Any]] | None = None
    loops: Loops | None = None
    optimizer_states: Annotated[list[OptimizerState], Field(min_length=1)] | None = None
    lr_schedulers: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
