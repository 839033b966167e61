"""States of callbacks in checkpoints: values that a callback would use are checked before training."""

import math

import pytest
import torch

from gpt2_pl.errors import InputError
from gpt2_pl.utils.checkpoint_schema import CallbackState
from gpt2_pl.utils.schema import validate

STOPPING = {"wait_count": 1, "stopped_epoch": 0, "best_score": torch.tensor(0.5), "patience": 3}


def test_early_stopping_state_of_lightning_is_valid():
    validate(CallbackState, STOPPING, "last.ckpt")
    validate(CallbackState, {**STOPPING, "best_score": torch.tensor(math.inf), "stopping_reason": 0}, "last.ckpt")


def test_early_stopping_state_best_score_that_is_no_scalar_tensor_is_refused():
    for value in (-1, 0.5, math.nan, "0.5", torch.zeros(1), torch.zeros(2), torch.tensor(1j)):
        with pytest.raises(InputError) as error:
            validate(CallbackState, {**STOPPING, "best_score": value}, "last.ckpt")
        assert error.value.key == "best_score", value


def test_run_summary_state_epoch_that_is_no_whole_number_is_refused():
    validate(CallbackState, {"epochs": [{"epoch": 0, "val/loss": math.nan}, {"epoch": 1.0}]}, "last.ckpt")
    for value in (math.nan, math.inf, -1, 0.5):
        with pytest.raises(InputError) as error:
            validate(CallbackState, {"epochs": [{"epoch": value}]}, "last.ckpt")
        assert error.value.key == "epochs[0]", value
