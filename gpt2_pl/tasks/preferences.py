"""Preference optimization of a language model: pairs, which are made once, and training and validation steps."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from numpy.typing import NDArray
from torch import Tensor, nn

from gpt2_pl import pretrained
from gpt2_pl.errors import InputError
from gpt2_pl.metrics import SplitMetrics, WeightedMean, finite
from gpt2_pl.model import GPT2
from gpt2_pl.tasks.dpo import DPO, corrupt, sequence_log_probs
from gpt2_pl.tasks.optimization import OptimizedModule
from gpt2_pl.tasks.protocols import PreferenceData, lacks
from gpt2_pl.text.poems import decode_vocab
from gpt2_pl.text.tokenizer import END_OF_TEXT
from gpt2_pl.utils.digests import tensor_digests

Batch = dict[str, Any]
Pair = tuple[list[int], list[int], list[int]]

METRICS = ("dpo_loss", "reward_accuracy", "reward_margin")
_STAGES = ("fit", "validate")  # that read pairs


class Preferences(nn.Module):
    """Pairs and metrics of a task that is trained with DPO.

    Methods have the task, a :class:`~gpt2_pl.tasks.LanguageModel`, as argument: a module must not contain itself. The
    pairs and their log-probabilities under the reference model depend on the weights before the first step. They are
    computed once: when a checkpoint is about to be loaded, or else before the optimizer is created.

    Args:
        settings: settings of the loss and of the pairs.
    """

    def __init__(self, settings: DPO) -> None:
        super().__init__()
        self.settings = settings
        self.metrics = SplitMetrics(lambda: {name: WeightedMean() for name in METRICS})
        self.digest: str | None = None  # of the training pairs
        self._is_ready = False
        self._from_files: dict[str, list[Pair]] = {}

    # Pairs

    def check(self, task: Any) -> None:
        """Read the files of pairs, or check that the texts have pairs, before anything is written.

        Raises:
            InputError: the data cannot be divided into pairs, or a file is invalid.
        """
        data, settings = task.datamodule, self.settings
        if task.trainer.state.fn not in _STAGES or self._from_files:
            return
        if not isinstance(data, PreferenceData):
            raise InputError(f"model.dpo must be null with these data: {lacks(data, PreferenceData)}", key="model.dpo")
        for split, key in (("train", "pairs_file"), ("val", "val_pairs_file")):
            if (file := getattr(settings, key)) is not None:
                self._from_files[split] = data.read_pairs(file, f"model.dpo.{key}")
            elif settings.pairs_file is None:
                self._texts(task, split)

    def _texts(self, task: Any, split: str) -> list[tuple[list[int], list[int]]]:
        """Return the prompts and the true continuations of a split."""
        settings = self.settings
        texts: list[tuple[list[int], list[int]]] = task.datamodule.continuations(
            split, settings.prompt_tokens, settings.max_new_tokens
        )
        if not texts:
            expected = f"less than the number of tokens of a text; the {split} data have no such text"
            raise InputError(key="model.dpo.prompt_tokens", value=settings.prompt_tokens, expected=expected)
        return texts

    def prepare(self, task: Any) -> None:
        """Make the pairs and compute their log-probabilities under the reference, unless this was done before.

        With sharded weights all processes compute everything, because each has a part of the weights; otherwise the
        first one does. All use the results of the first.
        """
        if self._is_ready or task.trainer.state.fn not in _STAGES:
            return
        self.check(task)
        trainer, data = task.trainer, task.datamodule
        if task.device_mesh is None:
            task.to(trainer.strategy.root_device)
        for split in ("train", "val") if self.settings.has_val_pairs else ("train",):
            computes = trainer.is_global_zero or task.device_mesh is not None
            pairs = trainer.strategy.broadcast(self._pairs(task, split) if computes else None)
            dataset = data.use_pairs(split, pairs)
            computed = self._reference(task, split) if computes else None
            dataset.reference = trainer.strategy.broadcast(computed)
        if task.device_mesh is not None:
            task.backbone.reshard()  # The optimizer must get the sharded parameters.
        self.digest = data.pairs["train"].digest
        self._is_ready = True

    def _pairs(self, task: Any, split: str) -> list[Pair]:
        """Return the pairs of a split; made pairs whose continuations are equal are left out."""
        settings, data = self.settings, task.datamodule
        if self._from_files:
            return self._from_files[split]
        texts = self._texts(task, split)
        end = data.tokenizer.token_to_id(END_OF_TEXT)
        if settings.rejected == "samples":
            rejected = self._samples(task, split, [prompt for prompt, _ in texts], end)
        else:
            ends = ["\n" in text for text in decode_vocab(data.tokenizer, task.config.vocab_size)]
            ends[end] = True
            rejected = [
                corrupt(true, [ends[token] for token in true], settings.rejected, f"{_seed()} {split} {i}", end)
                for i, (_, true) in enumerate(texts)
            ]
        pairs = [(*text, other) for text, other in zip(texts, rejected, strict=True) if text[1] != other]
        if not pairs:
            problem = f"makes no pair of the {split} data: the continuations are equal to the true ones"
            raise InputError(f"model.dpo.rejected: {settings.rejected} {problem}", key="model.dpo.rejected")
        return pairs

    def _samples(self, task: Any, split: str, prompts: list[list[int]], end: int) -> list[list[int]]:
        """Draw a continuation of every prompt; it ends with the end of text if the model ended it."""
        settings, data = self.settings, task.datamodule
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p, **task.sampling_settings()}
        limit = settings.max_new_tokens
        seeds = [
            int(hashlib.sha256(f"{_seed()} {split} {i}".encode()).hexdigest()[:12], 16) for i in range(len(prompts))
        ]

        def draw() -> list[list[int]]:
            order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
            texts: dict[int, list[int]] = {}
            for start in range(0, len(order), data.eval_batch_size):
                rows = order[start : start + data.eval_batch_size]
                batch, batch_seeds = [prompts[i] for i in rows], [seeds[i] for i in rows]
                with forward_context(task):
                    drawn = task.continue_prompts(data.tokenizer, batch, batch_seeds, limit, **sampling)
                for i, text in zip(rows, drawn, strict=True):
                    has_ended = len(text) < min(limit, task.max_length - len(prompts[i]))
                    texts[i] = [*text, end] if has_ended else text
            return [texts[i] for i in range(len(prompts))]

        if task.device_mesh is not None:
            with torch.no_grad(), forward_context(task):  # FSDP must not create its buffers in inference mode.
                task.backbone(torch.zeros(1, 1, dtype=torch.long, device=task.device))
            return draw()
        # The samples depend on the batches only by rounding in 16 bits, but they must be the same in a resumed run.
        weights = sorted(tensor_digests(task.backbone.state_dict()).items())
        stop = [f"{type(task).__module__}.{type(task).__qualname__}", limit, settings.temperature, settings.top_p]
        key = [weights, prompts, seeds, stop, end, data.eval_batch_size, str(task.device), task.trainer.precision]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return data.cached_texts(digest, draw)

    def _reference(self, task: Any, split: str) -> NDArray[np.float32]:
        """Compute the log-probabilities (N, 2) of the pairs of a split under the reference, without dropout."""
        model = reference_model(task)
        pairs, average = task.datamodule.pairs[split], self.settings.average_log_probs
        was_training = model.training
        found = np.zeros((len(pairs), 2), dtype=np.float32)
        size = task.datamodule.eval_batch_size
        order = np.argsort(-pairs.lengths, kind="stable")
        with torch.no_grad(), forward_context(task):
            model.eval()
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                batch = {key: value.to(task.device) for key, value in pairs.batch(rows).items()}
                found[rows] = log_probs(model, batch, average).float().cpu().numpy()
            model.train(was_training)
        return found

    def check_digest(self, stored: str | None) -> None:
        """Refuse a checkpoint that was trained on other pairs.

        Args:
            stored: digest in the checkpoint; None for a checkpoint that was not trained with DPO.

        Raises:
            InputError: the digests differ.
        """
        if stored is not None and stored != self.digest:
            cause = "the data, the base, the seed or a setting of model.dpo has changed"
            message = f"the pairs of model.dpo must be those of the checkpoint (digest {stored}), got {self.digest}"
            raise InputError(f"{message}; {cause}", key="model.dpo")

    # Steps

    def losses(self, task: Any, batch: Batch, split: str) -> tuple[Tensor, Tensor]:
        """Compute the losses (B,) of a batch of pairs and update the metrics of a split.

        Returns:
            The losses, and the log-probabilities (B, 2) without gradients.
        """
        settings = self.settings
        values = log_probs(task.backbone, batch, settings.average_log_probs)
        losses, rewards = settings(values, batch["reference"])
        margins = rewards[:, 0] - rewards[:, 1]
        _, weights = finite(losses.detach(), split)
        metrics = self.metrics.of(split)
        for name, value in zip(METRICS, (losses.detach(), (margins > 0).to(margins.dtype), margins), strict=True):
            metrics[name].update(value.nan_to_num() if split == "train" else value, weights)
        return losses, values.detach()

    def validate(self, task: Any) -> None:
        """Compute and log the metrics of the validation pairs."""
        if not self.settings.has_val_pairs:
            return
        metrics = self.metrics.of("val")
        for batch in task.datamodule.pair_dataloader("val"):
            self.losses(task, {key: value.to(task.device) for key, value in batch.items()}, "val")
        task.log_dict({f"val/{name}": metric for name, metric in metrics.items()})


def log_probs(model: GPT2, batch: Batch, average: bool) -> Tensor:
    """Return the log-probabilities (B, 2) of the preferred and the rejected continuation of each pair of a batch."""
    hidden = model(batch["input_ids"])
    values = sequence_log_probs(
        hidden, model.head_weight, batch["targets"], average, positions=batch["target_positions"]
    )
    return values.view(-1, 2)


def reference_model(task: Any) -> GPT2:
    """Return the reference model: the base without surgery, or the task's model, which has not been trained yet."""
    kind, surgery = task.preferences.settings.reference, task.surgery
    adapts = bool(surgery) and task.base_is_frozen and not any(one.loads_weights for one in surgery)
    if task.base is None or not surgery or kind == "start" or (kind is None and not adapts):
        return task.backbone
    return pretrained.load(task.base, dropout=0.0).to(task.trainer.strategy.root_device)


def forward_context(task: Any) -> AbstractContextManager[Any]:
    """Return the context of the trainer's precision."""
    return task.trainer.precision_plugin.forward_context()


def _seed() -> str:
    return os.environ.get("PL_GLOBAL_SEED", "0")


class PreferenceHooks(OptimizedModule):
    """Hooks of a task that make the pairs and evaluate them; without preference optimization they do nothing.

    Attributes:
        preferences: pairs and metrics; None without preference optimization.
    """

    preferences: Preferences | None

    def use_preferences(self, settings: DPO | None) -> None:
        """Set the settings of DPO when the task is created; None for other losses."""
        self.preferences = None if settings is None else Preferences(settings)
        if settings is None:
            return
        self.hparams["dpo"] = asdict(settings)
        if settings.has_val_pairs:
            self.monitor = "val/dpo_loss"

    @property
    def displayed_metrics(self) -> tuple[str, ...]:
        """Metrics that the table of epochs shows."""
        shown: Any = super()
        return (*shown.displayed_metrics, *(() if self.preferences is None else METRICS[:2]))

    def prepare_data(self) -> None:
        """Check the pairs before anything is written; Lightning calls this after the data are read."""
        if self.preferences is not None:
            self.preferences.check(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the pairs with the weights before the first step, and refuse a checkpoint of other pairs."""
        super().on_load_checkpoint(checkpoint)
        if self.preferences is not None and self._trainer is not None:
            self.preferences.prepare(self)
            if self.trainer.training:
                self.preferences.check_digest(checkpoint.get("pairs"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the digest of the pairs."""
        super().on_save_checkpoint(checkpoint)
        if self.preferences is not None:
            checkpoint["pairs"] = self.preferences.digest

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make the pairs, on whose number the number of steps depends, and create the optimizer."""
        if self.preferences is not None:
            self.preferences.prepare(self)
        return super().configure_optimizers()

    def on_train_start(self) -> None:
        """Switch off dropout for DPO; Lightning does not call :meth:`train`."""
        super().on_train_start()
        if self.preferences is not None:
            self.backbone.eval()

    def train(self, mode: bool = True) -> Self:
        """Set training mode; with DPO the GPT-2 stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.preferences is not None and self.gpt2 is not None:
            self.gpt2.eval()
        return self

    def on_validation_start(self) -> None:
        """Make the pairs if a model is validated that was not loaded from a checkpoint."""
        if self.preferences is not None:
            self.preferences.prepare(self)

    def on_validation_epoch_end(self) -> None:
        """Evaluate the validation pairs."""
        if self.preferences is not None and not self.trainer.sanity_checking:
            self.preferences.validate(self)
