"""The checkpoints of a task: what they hold, and what is compared before one is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gpt2_pl.errors import InputError
from gpt2_pl.model import GPT2Config
from gpt2_pl.surgery import Surgery
from gpt2_pl.surgery.base import is_plain
from gpt2_pl.tasks import averaging
from gpt2_pl.tasks import checkpoint as checkpoints
from gpt2_pl.tasks.protocols import PromptedData
from gpt2_pl.tasks.training_state import check_progress, check_training_state
from gpt2_pl.utils.registry import class_path

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what weights may be stored in
_OF_CODE = ("optimizer", "schedule")  # arguments that the configuration gives and no checkpoint holds
_TRAINING_ONLY = (
    "dropout",
    "loraplus_lr_ratio",
    "init_text",
    "folder",
)  # settings of surgery that change no trained model


def _drop_keys(settings: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Settings of a surgery without some of its arguments."""
    return {**settings, "init_args": {k: v for k, v in settings["init_args"].items() if k not in names}}


class CheckpointedModule(LightningModule):
    """A module whose checkpoints hold what trained and what surgery added, and the base's digest.

    :class:`~gpt2_pl.tasks.Task` sets the attributes.

    Attributes:
        base: the pretrained GPT-2, a folder or id.
        base_digest: of its weights.
        config: shape of the GPT-2.
        surgery: the changes made to it.
        frozen_names: its published parameters that do not train.
        wording: template, labels and max_length that a loaded checkpoint learned with.
    """

    base: str | None
    base_digest: str | None
    config: GPT2Config
    surgery: list[Surgery]
    frozen_names: frozenset[str]
    prompt_spec: dict[str, Any] | None
    _restored: dict[str, Any] | None  # a checkpoint whose training state is to be checked

    @property
    def datamodule(self) -> Any:
        """The trainer's datamodule; None without one."""
        return getattr(self._trainer, "datamodule", None)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | PathLike[str],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """As Lightning's, from a file on this machine and without executing pickles.

        Raises:
            InputError: no such file, ``weights_only`` false, or hyperparameters that are not this class's.
        """
        if not weights_only:
            raise InputError("weights_only is false; a checkpoint of this library holds no code, and none is executed")
        task: Any = cls  # a Task, which the registry knows
        checkpoints.read(checkpoint_path, "checkpoint_path", task)
        file = Path(checkpoint_path).expanduser()
        return super().load_from_checkpoint(file, map_location, hparams_file, strict, True, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trained and what surgery added; frozen weights of the base are left out.

        A checkpoint with every weight needs no base to be loaded, only its shape.
        """
        surgery = [one.settings() for one in self.surgery]
        complete = self.base is None or not self.frozen_names
        checkpoint["task"] = class_path(type(self))
        checkpoint["surgery"] = surgery
        checkpoint["base"] = {"path": self.base, "digest": self.base_digest, "complete": complete}
        for cls in (type(self), *map(type, self.surgery)):
            if cls.__module__ == "__main__":
                rank_zero_warn(
                    f"the checkpoint names the class {class_path(cls)}, which no other program can import: move it "
                    "into a module of its own"
                )
        if isinstance(self.datamodule, PromptedData):
            checkpoint["prompt_spec"] = self.datamodule.prompt_spec()
        averaging.compact(checkpoint, self)
        stored = checkpoint["hyper_parameters"]
        for name in [name for name, value in stored.items() if name in _OF_CODE or not is_plain(value)]:
            del stored[name]  # a subclass may have saved more than a checkpoint can hold
        stored.update(config=None, surgery=surgery)
        if complete:
            surgery = [_drop_keys(settings, ("init_text",)) for settings in surgery]  # it is done
            stored.update(base=None, config=asdict(self.config), surgery=surgery)
        else:
            for name in self.frozen_names:
                checkpoint["state_dict"].pop(f"gpt2.{name}", None)  # sharded weights are gathered by one process alone

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare base, names and shapes before anything is copied; put back the weights of a frozen base.

        Raises:
            InputError: a checkpoint of another task, on another base, of a model of another shape, with weights that
                are not finite, or learned with another template or with other class names than the data's.
        """
        task, base = checkpoint.get("task"), checkpoint.get("base") or {}
        if task != (own := class_path(type(self))):
            raise InputError(f"the checkpoint was written by {task or 'another program'}, not by {own}")
        wanted, found = self.state_dict(), checkpoint["state_dict"]
        frozen: dict[str, Tensor] = {}
        if not base.get("complete"):
            if not self.frozen_names:
                raise InputError(
                    f"the checkpoint holds only what was added to the frozen base {base.get('path')}, "
                    "and here the base trains (train_base)"
                )
            if base.get("digest") != self.base_digest:
                there = f"the base {base.get('path')} (digest {str(base.get('digest'))[:12]})"
                here = f"model.base {self.base} holds other weights (digest {str(self.base_digest)[:12]})"
                if self.base_digest is None:
                    here = "model.base is null: give that base"
                raise InputError(f"the checkpoint was trained on {there}; {here}")
            frozen = {f"gpt2.{name}": wanted.pop(f"gpt2.{name}") for name in self.frozen_names}
            for name in frozen:
                found.pop(name, None)
        stored = checkpoint.get("surgery") or []  # in the hyperparameters those given now have taken their place
        given = [surgery.settings() for surgery in self.surgery]
        then, now = ([_drop_keys(s, _TRAINING_ONLY) for s in surgery] for surgery in (stored, given))
        if then != now:
            raise InputError(f"the checkpoint was trained with model.surgery {then}; here it is {now}")
        for name in sorted(wanted.keys() | found.keys()):
            theirs, ours = (tuple(state[name].shape) if name in state else None for state in (found, wanted))
            if theirs != ours:
                raise InputError(f"the checkpoint does not fit the model: {name} is {theirs} there and {ours} here")
        for name, tensor in found.items():
            kinds = _FLOATS if wanted[name].is_floating_point() else (wanted[name].dtype,)
            if tensor.dtype not in kinds:
                raise InputError(f"the checkpoint's {name} is of {tensor.dtype}; it must be of {kinds[0]}")
            if not bool(tensor.isfinite().all()):
                raise InputError(f"the checkpoint's {name} is not finite; train from a checkpoint before it")
        self._check_wording(checkpoint.get("prompt_spec"))
        if self.device_mesh is None:  # a sharded model loads what is there, and keeps the rest
            found.update(frozen)
        if self._trainer is not None:
            check_progress(checkpoint, self.trainer, f"ckpt_path: {self.trainer.ckpt_path}")
            averaging.expand(checkpoint, self, f"ckpt_path: {self.trainer.ckpt_path}")
            self._restored = checkpoint if self.trainer.training else None
            if self.trainer.strategy.restore_checkpoint_after_setup:  # there are optimizers already
                self._check_training_state()

    def _check_wording(self, prompt_spec: dict[str, Any] | None) -> None:
        """Keep the template and the class names of a checkpoint, and refuse data with others."""
        self.prompt_spec = prompt_spec
        if not prompt_spec or not isinstance(self.datamodule, PromptedData):
            return
        here = self.datamodule.prompt_spec()
        for key in ("template", "labels"):
            if (learned := prompt_spec.get(key)) != here[key]:
                raise InputError(
                    f"data.{key} is {here[key]!r}, and the checkpoint learned with {learned!r}; give it that"
                )

    def _check_training_state(self) -> None:
        checkpoint, self._restored = self._restored, None
        if checkpoint is not None:
            check_training_state(checkpoint, self.trainer, f"ckpt_path: {self.trainer.ckpt_path}")
