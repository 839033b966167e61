"""Saving and loading of a task's checkpoints, with checks before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, Self

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from gpt2_pl.errors import InputError, require
from gpt2_pl.model import GPT2Config
from gpt2_pl.surgery import Surgery, build
from gpt2_pl.surgery.base import is_plain
from gpt2_pl.tasks import averaging
from gpt2_pl.tasks import checkpoint as checkpoints
from gpt2_pl.tasks.checkpoint import CODE_ARGUMENTS
from gpt2_pl.tasks.protocols import PromptedData
from gpt2_pl.tasks.training_state import check_progress, check_training_state
from gpt2_pl.utils.digests import tensor_digests
from gpt2_pl.utils.registry import class_path

# Settings of a surgery that do not affect a trained model.
_TRAINING_ONLY = ("dropout", "loraplus_lr_ratio", "init_text", "folder")


def _drop_keys(settings: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the settings of a surgery without the arguments of the given names."""
    return {**settings, "init_args": {k: v for k, v in settings["init_args"].items() if k not in names}}


class CheckpointedModule(LightningModule):
    """Module whose checkpoints hold the trained and the added weights, and the digest of the base.

    :class:`~gpt2_pl.tasks.Task` sets the attributes.

    Attributes:
        base: pretrained GPT-2, a folder or hub id.
        base_digest: digest of its weights.
        config: shape of the GPT-2.
        surgery: changes made to the GPT-2.
        frozen_names: names of the base's parameters that do not train.
        prompt_spec: template, labels and max_length of the training data of a loaded checkpoint.
    """

    base: str | None
    base_digest: str | None
    config: GPT2Config
    surgery: list[Surgery]
    frozen_names: frozenset[str]
    prompt_spec: dict[str, Any] | None
    _restored: dict[str, Any] | None  # loaded checkpoint whose training state is not checked yet

    @property
    def datamodule(self) -> Any:
        """Datamodule of the trainer, or None without one."""
        return getattr(self._trainer, "datamodule", None)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | PathLike[str], *args: Any, **kwargs: Any
    ) -> Self:
        """Load a model from a local checkpoint, as in Lightning, but without executing code from the file.

        Args:
            checkpoint_path: a local file.
            *args: ``map_location``, ``hparams_file`` and ``strict``, as in Lightning.
            **kwargs: the same by name, ``weights_only``, which must be true, and arguments of the class that override
                the stored hyperparameters.

        Raises:
            InputError: a file that does not exist, ``weights_only`` false, or hyperparameters of another class.
        """
        weights_only = kwargs.setdefault("weights_only", True)
        require(bool(weights_only), "weights_only", weights_only, "true, as no code in a checkpoint is executed")
        task: Any = cls  # a Task, which is registered
        checkpoints.read(checkpoint_path, "checkpoint_path", task)
        file = Path(checkpoint_path).expanduser()
        return super().load_from_checkpoint(file, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the task, its surgery, its base and digests of the weights; drop the frozen weights of the base.

        A checkpoint that holds every weight can be loaded without the base, from its shape alone.
        """
        settings = [surgery.settings() for surgery in self.surgery]
        is_complete = self.base is None or not self.frozen_names
        checkpoint["task"] = class_path(type(self))
        checkpoint["surgery"] = settings
        checkpoint["base"] = {"path": self.base, "digest": self.base_digest, "complete": is_complete}
        for cls in (type(self), *map(type, self.surgery)):
            if cls.__module__ == "__main__":
                advice = "which other programs cannot import; move it to a separate module"
                rank_zero_warn(f"the checkpoint names the class {class_path(cls)}, {advice}")
        if isinstance(self.datamodule, PromptedData):
            checkpoint["prompt_spec"] = self.datamodule.prompt_spec()
        averaging.compact(checkpoint, self)
        hyperparameters = checkpoint["hyper_parameters"]
        # A subclass may have saved hyperparameters that a checkpoint cannot hold.
        for name in [n for n, value in hyperparameters.items() if n in CODE_ARGUMENTS or not is_plain(value)]:
            del hyperparameters[name]
        hyperparameters.update(config=None, surgery=settings)
        if is_complete:
            # The stored weights are already initialized from init_text.
            settings = [_drop_keys(one, ("init_text",)) for one in settings]
            hyperparameters.update(base=None, config=asdict(self.config), surgery=settings)
        else:
            for name in self.frozen_names:
                # With sharding, only one process has the weights.
                checkpoint["state_dict"].pop(f"gpt2.{name}", None)
        checkpoint["digests"] = tensor_digests(checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the base, names and shapes before anything is loaded, and add the weights of a frozen base.

        Raises:
            InputError: a checkpoint of another task, on another base, of a model of another shape, with weights that
                are not finite, or trained with another template or other class names than those of the data.
        """
        if (task := checkpoint.get("task")) != (own := class_path(type(self))):
            raise InputError(f"the checkpoint was written by {task or 'another program'}, not by {own}", key="task")
        expected, stored = self.state_dict(), checkpoint["state_dict"]
        frozen: dict[str, Tensor] = {}
        base = checkpoint.get("base") or {}
        if not base.get("complete"):
            self._check_base(base)
            frozen = {f"gpt2.{name}": expected.pop(f"gpt2.{name}") for name in self.frozen_names}
            for name in frozen:
                stored.pop(name, None)
        # Not from the hyperparameters, in which the surgery of this model has replaced the stored one.
        self._check_stored_surgery(checkpoint.get("surgery") or [])
        checkpoints.check_weights(stored, expected, "the checkpoint")
        self._check_prompt_spec(checkpoint.get("prompt_spec"))
        if self.device_mesh is None:  # A sharded model keeps weights that the state does not have.
            stored.update(frozen)
        if self._trainer is not None:
            check_progress(checkpoint, self.trainer)
            averaging.expand(checkpoint, self)
            self._restored = checkpoint if self.trainer.training else None
            if self.trainer.strategy.restore_checkpoint_after_setup:  # The optimizers already exist.
                self._check_training_state()

    def _check_base(self, base: dict[str, Any]) -> None:
        """Check that a checkpoint without the base's weights was trained on the base of this model.

        Args:
            base: the reference to the base in the checkpoint.
        """
        path, digest = base.get("path"), base.get("digest")
        if not self.frozen_names:
            message = f"the checkpoint holds only the weights that were added to the frozen base {path}"
            raise InputError(f"{message}, but the base of this model trains (train_base)", key="model.train_base")
        if digest != self.base_digest:
            expected = f"{path} (digest {str(digest)[:12]}), as in the checkpoint"
            own = f"{self.base} (digest {str(self.base_digest)[:12]})"
            raise InputError(f"model.base must be {expected}, got {own}", key="model.base")

    def _check_stored_surgery(self, stored: list[dict[str, Any]]) -> None:
        """Check that the settings of surgery in a checkpoint are those of this model, apart from training settings."""
        own = [surgery.settings() for surgery in self.surgery]
        complete = [build(settings).settings() for settings in stored]  # with later arguments' defaults
        trained, current = ([_drop_keys(one, _TRAINING_ONLY) for one in settings] for settings in (complete, own))
        if trained != current:
            message = f"model.surgery must be that of the checkpoint, {trained}, got {current}"
            raise InputError(message, key="model.surgery")

    def _check_prompt_spec(self, prompt_spec: dict[str, Any] | None) -> None:
        """Keep the template and class names of a checkpoint, and reject data with others."""
        self.prompt_spec = prompt_spec
        if not prompt_spec or not isinstance(self.datamodule, PromptedData):
            return
        current = self.datamodule.prompt_spec()
        for key in ("template", "labels", "normalize"):
            if (trained := prompt_spec.get(key) or None) != (own := current.get(key) or None):
                message = f"data.{key} must be {trained!r}, as in the checkpoint, got {own!r}"
                raise InputError(message, key=f"data.{key}")

    def _check_training_state(self) -> None:
        """Check the training state of the loaded checkpoint, once."""
        checkpoint, self._restored = self._restored, None
        if checkpoint is not None:
            check_training_state(checkpoint, self.trainer)
