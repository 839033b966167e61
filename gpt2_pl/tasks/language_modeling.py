"""Language modelling: every token predicts the next one."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from itertools import takewhile
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_pl.beams import beam_search
from gpt2_pl.errors import InputError, require
from gpt2_pl.generation import generate
from gpt2_pl.losses import IGNORE_INDEX, cross_entropy, sequence_unlikelihood_loss, unlikelihood_cross_entropy
from gpt2_pl.metrics import MetricInfo, RowOutputs, SplitMetrics, WeightedMean, finite
from gpt2_pl.model import GPT2
from gpt2_pl.tasks.base import Task
from gpt2_pl.tasks.dpo import DPO
from gpt2_pl.tasks.preferences import PreferenceHooks, Preferences
from gpt2_pl.tasks.protocols import ClusteredData, RowData, RowTable, TokenizedData
from gpt2_pl.text.poems import decode_vocab
from gpt2_pl.text.tokenizer import END_OF_TEXT

Batch = dict[str, Any]
MAX_TEXT = 1000  # characters of a row's text in the table of rows


class Perplexity(WeightedMean):
    """Perplexity: the exponential of the mean loss per token."""

    def compute(self) -> Tensor:
        """Compute the perplexity of all updates."""
        return super().compute().exp()


class LanguageModel(PreferenceHooks, Task):
    """Language model whose head is tied to the token embedding.

    Batches hold ``input_ids`` (B, T), padded on the right, and ``targets`` (B, T): the token that follows each token,
    or -100 at positions without a target. Those of this library's datamodules also hold ``target_positions`` (n,), the
    indices of the n targets in the flattened ``targets``; without them every step waits for a GPU. The loss is the mean
    per target token, and perplexity is its exponential.

    Validation and test keep the loss of every row, a context of the corpus; see :meth:`row_table`.

    Unlikelihood losses (Welleck et al. 2020) can be added to the likelihood loss. The metrics ``loss`` and
    ``perplexity`` are always those of the likelihood alone.

    Args:
        unlikelihood: weight of the token-level unlikelihood of tokens that occurred earlier in the text, including its
            first token; at least 0.
        unlikelihood_window: number of preceding tokens that count as earlier tokens; by default all.
        unlikelihood_ignores: texts that may be repeated, such as line ends and punctuation: tokens with one of these
            texts, apart from surrounding spaces, have no unlikelihood.
        sequence_unlikelihood: share of the steps that use sequence-level unlikelihood instead, in [0, 1]: a
            continuation is decoded greedily, and the tokens of its repeated 4-grams are made less likely.
        sequence_prefix: number of tokens of a text that such a step continues; all tokens of a shorter text.
        sequence_length: number of tokens that such a step decodes.
        dpo: train with direct preference optimization on pairs of continuations instead; see
            :class:`~gpt2_pl.tasks.DPO`. No dropout is applied, the metrics of training are those of the preferred
            continuations, and ``val/dpo_loss`` selects the best checkpoint if there are validation pairs.
        **kwargs: arguments of :class:`~gpt2_pl.tasks.base.Task`.

    Raises:
        InputError: a value out of range, or a sequence that is longer than the model's context.
    """

    metric_info: ClassVar[dict[str, MetricInfo]] = {
        "loss": MetricInfo(higher_is_better=False, shown=True),
        "perplexity": MetricInfo(higher_is_better=False, shown=True),
        **dict.fromkeys(("unlikelihood", "sequence_unlikelihood", "dpo_loss"), MetricInfo(higher_is_better=False)),
        "reward_accuracy": MetricInfo(percent=True),
        "reward_margin": MetricInfo(),
    }
    primary = "test/perplexity"
    fixed_length_batches: ClassVar[bool] = True

    def __init__(
        self,
        unlikelihood: float = 0.0,
        unlikelihood_window: int | None = None,
        unlikelihood_ignores: list[str] | None = None,
        sequence_unlikelihood: float = 0.0,
        sequence_prefix: int = 50,
        sequence_length: int = 100,
        dpo: DPO | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        is_window = unlikelihood_window is None or unlikelihood_window >= 1
        require(unlikelihood >= 0.0, "model.unlikelihood", unlikelihood, "at least 0")
        require(is_window, "model.unlikelihood_window", unlikelihood_window, "null or at least 1")
        is_share = 0.0 <= sequence_unlikelihood <= 1.0
        require(is_share, "model.sequence_unlikelihood", sequence_unlikelihood, "in [0, 1]")
        require(sequence_prefix >= 1, "model.sequence_prefix", sequence_prefix, "at least 1")
        require(sequence_length >= 1, "model.sequence_length", sequence_length, "at least 1")
        length, key = sequence_prefix + sequence_length, "model.sequence_prefix + model.sequence_length"
        fits = not sequence_unlikelihood or length <= self.max_length
        require(fits, key, length, f"at most {self.max_length}, the model's context length")
        self.unlikelihood, self.unlikelihood_window = unlikelihood, unlikelihood_window
        self.unlikelihood_ignores = list(unlikelihood_ignores or [])
        self.sequence_unlikelihood = sequence_unlikelihood
        self.sequence_prefix, self.sequence_length = sequence_prefix, sequence_length
        self._ignored_ids: list[int] | None = None
        for key in ("unlikelihood", "sequence_unlikelihood"):
            is_alone = dpo is None or getattr(self, key) == 0.0
            require(is_alone, f"model.{key}", getattr(self, key), "0 with model.dpo")
        self.use_preferences(DPO(**dpo) if isinstance(dpo, dict) else dpo)
        self.metrics = SplitMetrics(lambda: {"loss": WeightedMean(), "perplexity": Perplexity()})
        self.outcomes = RowOutputs("row", "n_tokens", "loss")  # of every evaluated row

    @property
    def has_static_shapes(self) -> bool:
        """Whether nearly all training batches have the same shape."""
        return super().has_static_shapes and self.preferences is None and not self.sequence_unlikelihood

    @property
    def table_caption(self) -> str | None:
        """Description of the scored text, for the caption of a table of perplexities; None without one."""
        return getattr(self.datamodule, "perplexity_note", None)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the sum of a batch's losses and its number of targets."""
        hidden, weight = self.backbone(batch["input_ids"]), self.backbone.head_weight
        return cross_entropy(hidden, weight, batch["targets"], **self._loss_options(batch))

    def _loss_options(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments of a loss that choose how it is computed."""
        return {"compiled": self.compiles is not None, "positions": batch.get("target_positions")}

    def _step(self, batch: Batch, split: str) -> tuple[Tensor, Tensor]:
        total, n_targets = self(batch)
        self._update_metrics(split, total.detach(), n_targets)
        return total, n_targets

    def _update_metrics(self, split: str, total: Tensor, n_targets: Tensor) -> None:
        mean, weight = finite(total / n_targets.clamp(min=1), split)
        metrics = self.metrics.of(split)
        for metric in metrics.values():
            metric.update(mean, n_targets * weight)
        self.log_scores(split, metrics)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss; see :meth:`~gpt2_pl.tasks.base.Task.mean_loss`."""
        if self.preferences is not None:
            return self._preference_step(self.preferences, batch, batch_idx)
        self.decoded_last_step = self._is_sequence_step()
        if self.decoded_last_step:
            return self._sequence_step(batch, batch_idx)
        if self.unlikelihood:
            hidden, weight = self.backbone(batch["input_ids"]), self.backbone.head_weight
            settings = (self.unlikelihood, self._ignored_tokens(), self.unlikelihood_window)
            options = {**self._loss_options(batch), "input_ids": batch["input_ids"]}
            total, n_targets, unlikelihood = unlikelihood_cross_entropy(
                hidden, weight, batch["targets"], *settings, **options
            )
            self._update_metrics("train", (total - self.unlikelihood * unlikelihood).detach(), n_targets)
            count = int(n_targets) if options["positions"] is None else len(options["positions"])
            self._log_mean("train/unlikelihood", unlikelihood / n_targets, count)
        else:
            total, n_targets = self._step(batch, "train")
        loss, mean = self.mean_loss(total, n_targets, batch, batch_idx, "targets")
        self.log_step_loss(mean)
        return loss

    def _preference_step(self, preferences: Preferences, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the mean DPO loss of pairs; the other metrics are those of the preferred continuations."""
        losses, log_probs = preferences.losses(self, batch, "train")
        self.log_scores("train", {**self.metrics.of("train"), **preferences.metrics.of("train")})
        n_targets = (batch["targets"][::2] != IGNORE_INDEX).sum(1)
        nll = -log_probs[:, 0] * (n_targets if preferences.settings.average_log_probs else 1)
        self._update_metrics("train", nll.sum(), n_targets.sum())
        loss, mean = self.mean_loss(losses.sum(), len(losses), batch, batch_idx)
        self.log_step_loss(mean)
        return loss

    def _is_sequence_step(self) -> bool:
        """Return whether this step uses sequence-level unlikelihood, which depends on the seed and the step only."""
        if self.sequence_unlikelihood == 0.0:
            return False
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        return random.Random(f"{seed} {self.global_step}").random() < self.sequence_unlikelihood

    def _sequence_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the sequence-level unlikelihood of greedy continuations.

        The continuations are decoded without gradients, and then read in one forward pass.
        """
        prefix_lengths = batch["attention_mask"].sum(1).clamp(max=self.sequence_prefix)
        shortest, P = torch.stack(prefix_lengths.aminmax()).tolist()
        prefix = batch["input_ids"][:, :P]
        mask = None if shortest == P else torch.arange(P, device=prefix.device) < prefix_lengths.unsqueeze(1)
        text = generate(self.backbone, prefix, mask, max_new_tokens=self.sequence_length, temperature=0.0)
        if mask is not None:  # The output of `generate` is padded on the left.
            mask = F.pad(mask.flip(1), (0, self.sequence_length - 1), value=True)
        targets = text[:, P:]
        hidden, weight = self.backbone(text[:, :-1], mask)[:, P - 1 :], self.backbone.head_weight
        positions = torch.arange(targets.numel(), device=targets.device)
        loss = sequence_unlikelihood_loss(
            hidden, weight, targets, compiled=self.compiles is not None, positions=positions
        )
        self._log_mean("train/sequence_unlikelihood", loss.detach(), len(text))
        return self.mean_loss(loss * len(text), len(text), batch, batch_idx)[0]

    def _log_mean(self, name: str, value: Tensor, n: int) -> None:
        """Log an epoch's mean over all processes; ``n`` is the weight of this step."""
        self.log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=n)

    def _ignored_tokens(self) -> list[int]:
        """Return the ids of the tokens that may be repeated.

        Raises:
            InputError: no tokenizer is available, or a text is not a token.
        """
        if self._ignored_ids is not None or not self.unlikelihood_ignores:
            return self._ignored_ids or []
        if not isinstance(self.datamodule, TokenizedData):
            raise InputError("model.unlikelihood_ignores requires data.tokenizer", key="model.unlikelihood_ignores")
        texts = [text.strip(" ") for text in decode_vocab(self.datamodule.tokenizer)]
        ignored = [text.strip(" ") for text in self.unlikelihood_ignores]
        for text in ignored:
            require(text in texts, "model.unlikelihood_ignores", text, "tokens of the tokenizer")
        self._ignored_ids = [i for i, text in enumerate(texts) if text in ignored]
        return self._ignored_ids

    def training_outputs(self, gpt2: GPT2, input_ids: Tensor) -> Tensor:
        """Compute the logits."""
        return gpt2.logits(gpt2(input_ids))

    def continue_prompts(
        self, tokenizer: Any, prompts: list[list[int]], seeds: list[int], max_new_tokens: int, **settings: Any
    ) -> list[list[int]]:
        """Generate the tokens that continue each prompt, up to the end of text.

        Args:
            tokenizer: tokenizer of the model.
            prompts: token ids of each prompt.
            seeds: random seed of each prompt; beam search draws no random numbers.
            max_new_tokens: largest number of new tokens of each prompt; the context may leave room for fewer.
            **settings: arguments of :func:`~gpt2_pl.beams.beam_search` if ``num_beams`` is among them, else of
                :func:`~gpt2_pl.generation.generate`.

        Returns:
            Token ids of each continuation, without the end of text.

        Raises:
            InputError: an empty prompt, a prompt that fills the context, or a tokenizer without an end of text.
        """
        end = tokenizer.token_to_id(END_OF_TEXT)
        require(end is not None, "data.tokenizer", tokenizer, f"a tokenizer with the token {END_OF_TEXT}")
        rooms = [min(max_new_tokens, self.max_length - len(prompt)) for prompt in prompts]
        for prompt, room in zip(prompts, rooms, strict=True):
            expected = f"in [1, {self.max_length - 1}] to fit the model's context"
            require(bool(prompt) and room >= 1, "the number of tokens of a prompt", len(prompt), expected)
        new: dict[int, list[int]] = {}
        ends: dict[str, Any] = {"eos_token_id": end, "pad_token_id": end}
        # Prompts with the same room form a batch: a continuation must not depend on the room of other prompts.
        for room in sorted(set(rooms)):
            rows = [i for i, other in enumerate(rooms) if other == room]
            longest = max(len(prompts[i]) for i in rows)
            padding = {i: [0] * (longest - len(prompts[i])) for i in rows}
            ids = torch.tensor([padding[i] + prompts[i] for i in rows], device=self.device)
            mask = torch.tensor([padding[i] + [1] * len(prompts[i]) for i in rows], device=self.device)
            if "num_beams" in settings:
                text = beam_search(self.backbone, ids, mask, max_new_tokens=room, **ends, **settings).ids[:, 0]
            else:
                row_seeds = [seeds[i] for i in rows]
                text = generate(self.backbone, ids, mask, max_new_tokens=room, seed=row_seeds, **ends, **settings)
            for i, row in zip(rows, text.tolist(), strict=True):
                new[i] = list(takewhile(lambda token: token != end, row[longest:]))
        return [new[i] for i in range(len(prompts))]

    def sampling_settings(self) -> dict[str, Any]:
        """Return further arguments of :meth:`continue_prompts` for texts of this task."""
        return {}

    def _evaluation_step(self, batch: Batch, split: str) -> None:
        """Update the metrics of a split and the table of rows with a batch."""
        hidden, weight = self.backbone(batch["input_ids"]), self.backbone.head_weight
        B, T = batch["input_ids"].shape
        positions: Tensor | None = batch.get("target_positions")
        of_row = positions[:T] if positions is not None and len(positions) == B * T else None
        compiled = self.compiles is not None
        rows = (
            cross_entropy(states, weight, targets, compiled=compiled, positions=of_row)
            for states, targets in zip(hidden.split(1), batch["targets"].split(1), strict=True)
        )
        total, n_targets = (torch.stack(values) for values in zip(*rows, strict=True))
        self._update_metrics(split, total, n_targets)
        self.outcomes.update(row=batch["row"], n_tokens=n_targets, loss=total)

    def row_table(self, split: str) -> RowTable | None:
        """Return the number of targets and the sum of their losses, in nats, of every row of an evaluation.

        If the data tell them, there are also the start of each row's text and the cluster that it belongs to, such as
        the text that a context is part of; see :class:`~gpt2_pl.tasks.protocols.ClusteredData`.
        """
        outcomes, data = self.outcomes.rows(), self.datamodule
        clusters = data.clusters(split) if isinstance(data, ClusteredData) else None
        cells: dict[str, Callable[[int], object]] = {}
        if clusters is not None:
            cells["cluster"] = clusters.__getitem__
        if isinstance(data, RowData):
            cells["text"] = lambda i: data.text(split, i)[:MAX_TEXT]
        columns = (outcomes[key].tolist() for key in ("row", "n_tokens", "loss"))
        rows = (
            [data.row_number(split, i) if isinstance(data, RowData) else i + 1, n, f"{loss:.6f}"]
            + [cell(i) for cell in cells.values()]
            for i, n, loss in zip(*columns, strict=True)
        )
        return RowTable("losses", ["row", "n_tokens", "loss", *cells], rows)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the validation metrics with a batch."""
        self._evaluation_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the test metrics with a batch."""
        self._evaluation_step(batch, "test")
