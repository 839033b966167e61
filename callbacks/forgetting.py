"""Forgetting: the perplexity of text of the base before and after fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gpt2_pl.errors import InputError, require
from gpt2_pl.filesystem import require_file
from gpt2_pl.losses import cross_entropy
from gpt2_pl.metrics import MetricInfo
from gpt2_pl.tasks import Task
from gpt2_pl.tasks.protocols import TokenizedData
from gpt2_pl.utils.registry import class_path

_CHARACTERS_PER_TOKEN = 16  # read from the file for every token that is scored, at most


class Forgetting(Callback):
    """Scores of the language model on a text of the user's choice, before and during fine-tuning.

    ``val/base_perplexity`` is the perplexity of the text at every validation, and ``val/initial_base_perplexity`` that
    before training. Adapters and virtual tokens are on. Of a task with a head, the tied head of the language model is
    scored. Their values of the best epoch are in metrics.json and in the tables of ``gpt2-pl compare``.

    The text is cut into contexts of the largest length that the model reads, without overlap; every token except the
    first is predicted once.

    Args:
        file: a text file in UTF-8, such as text that the base was trained on.
        max_tokens: number of tokens at the start of the text that are scored, at least 2.
        batch_size: number of contexts that are scored together.

    Raises:
        InputError: an argument is out of range; before training, the file is missing, is not UTF-8 or has fewer than
            two tokens.
    """

    metric_info: ClassVar[dict[str, MetricInfo]] = {
        "base_perplexity": MetricInfo(higher_is_better=False),
        "initial_base_perplexity": MetricInfo(higher_is_better=None),
    }

    def __init__(self, file: str | os.PathLike[str], max_tokens: int = 20_000, batch_size: int = 8) -> None:
        require(max_tokens >= 2, "trainer.callbacks.max_tokens", max_tokens, "at least 2")
        require(batch_size >= 1, "trainer.callbacks.batch_size", batch_size, "at least 1")
        self.file, self.max_tokens, self.batch_size = Path(file), max_tokens, batch_size
        self.initial: float | None = None
        self._tokens: Tensor | None = None

    def check(self, used: Sequence[Callback], model: LightningModule) -> None:
        """Check the module, and that the file exists, before anything is loaded."""
        _require_task(model)
        require_file(self.file, "trainer.callbacks.file")

    def state_dict(self) -> dict[str, Any]:
        """Return the perplexity before training."""
        return {"initial": self.initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the perplexity before training."""
        self.initial = state_dict.get("initial")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the perplexity before training; a resumed run keeps that of its start."""
        if self.initial is None:
            self.initial = self._perplexity(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the perplexity of the model, and that before training."""
        if trainer.sanity_checking:
            return
        scores = {"val/base_perplexity": self._perplexity(trainer, pl_module)}
        if self.initial is not None:
            scores["val/initial_base_perplexity"] = self.initial
        pl_module.log_dict(scores, batch_size=1)

    def _perplexity(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Compute the perplexity of the text; all processes compute all of it."""
        task = _require_task(pl_module)
        if self._tokens is None:
            self._tokens = self._read(trainer)
        model, was_training = task.backbone, task.backbone.training
        total = torch.zeros((), dtype=torch.float64)
        model.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for inputs, targets in _batches(self._tokens, task.max_length, self.batch_size):
                targets = targets.to(task.device)
                total += cross_entropy(model(inputs.to(task.device)), model.head_weight, targets)[0].double().cpu()
        model.train(was_training)
        return float((total / (len(self._tokens) - 1)).exp())

    def _read(self, trainer: Trainer) -> Tensor:
        """Return the token ids (N,) of the text.

        Raises:
            InputError: the data have no tokenizer, the file is not UTF-8, or it has fewer than two tokens.
        """
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, TokenizedData):
            raise InputError("Forgetting requires data with a tokenizer", key="trainer.callbacks")
        try:
            with self.file.open(encoding="utf-8") as lines:
                text = lines.read(self.max_tokens * _CHARACTERS_PER_TOKEN)
        except UnicodeDecodeError as error:
            raise InputError(f"{self.file} must be UTF-8: {error.reason}", key="trainer.callbacks.file") from None
        ids = data.tokenizer.encode(text, add_special_tokens=False).ids[: self.max_tokens]
        require(len(ids) >= 2, "trainer.callbacks.file", self.file, "a text with at least two tokens")
        return torch.tensor(ids)


def _require_task(module: LightningModule) -> Task:
    """Return a module that is a task.

    Raises:
        InputError: it is another module, which has no GPT-2 to score the text with.
    """
    if not isinstance(module, Task):
        message = f"Forgetting requires a task, a subclass of gpt2_pl.tasks.Task, got {class_path(type(module))}"
        raise InputError(message, key="trainer.callbacks")
    return module


def _batches(tokens: Tensor, context: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets (B, T) of consecutive contexts; the last, shorter context is a batch of its own."""
    inputs, targets = tokens[:-1].split(context), tokens[1:].split(context)
    pairs = list(zip(inputs, targets, strict=True))
    last = [pairs.pop()] if len(pairs[-1][0]) < context else []
    complete = iter(pairs)
    while batch := list(islice(complete, batch_size)):
        yield torch.stack([one for one, _ in batch]), torch.stack([other for _, other in batch])
    for one, other in last:
        yield one.unsqueeze(0), other.unsqueeze(0)
