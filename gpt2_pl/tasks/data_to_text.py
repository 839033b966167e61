"""Data-to-text: a language model that writes a target after a source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from gpt2_pl.beams import validate_beams
from gpt2_pl.errors import require
from gpt2_pl.metrics import MetricInfo
from gpt2_pl.tasks.language_modeling import MAX_TEXT, LanguageModel
from gpt2_pl.tasks.protocols import ReferencedData, RowTable, ScoredTexts
from gpt2_pl.text.overlap import best_chrf_counts, bleu, bleu_counts, chrf, rouge_l, signatures

_SCORES = ("bleu", "chrf", "rouge_l")
_GROUPS = {"seen": True, "unseen": False}  # sources whose category occurs in training, and the others


class DataToText(LanguageModel):
    """Language model that generates a target for a source, such as a sentence that says what a record holds.

    Loss and perplexity are those of the target and the end of text. After the test, and in validation on request, beam
    search generates a target for every source, which is compared with the references. The scores are:

    - ``bleu``, ``chrf``: sacrebleu's corpus BLEU and chrF with all references;
    - ``rouge_l``: mean ROUGE-L F-measure, of the best reference;
    - ``bleu_seen``, ``bleu_unseen`` and so on: the same for sources whose category occurs in training, and for the
      others, if the data have both.

    Args:
        num_beams: number of beams; 1 is greedy decoding.
        length_penalty: exponent of the length by which the log-probability of a beam is divided; see
            :func:`~gpt2_pl.beams.beam_search`.
        max_new_tokens: largest number of tokens of a target.
        num_samples: number of targets that are logged after every validation and after the test.
        score_every_n_epochs: number of epochs from one validation in which all targets are generated and scored to the
            next; by default, none. ``gpt2-pl validate`` always scores them.
        **kwargs: arguments of :class:`~gpt2_pl.tasks.language_modeling.LanguageModel`.

    Raises:
        InputError: a value out of range.
    """

    metric_info: ClassVar[dict[str, MetricInfo]] = {
        **LanguageModel.metric_info,
        **dict.fromkeys(_SCORES, MetricInfo()),
        **{f"{name}_{group}": MetricInfo() for name in _SCORES for group in _GROUPS},
    }
    primary = "test/bleu"
    fixed_length_batches: ClassVar[bool] = False
    samples_name = "texts"

    def __init__(
        self,
        num_beams: int = 5,
        length_penalty: float = 1.0,
        max_new_tokens: int = 100,
        num_samples: int = 8,
        score_every_n_epochs: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        validate_beams(num_beams, max_new_tokens, length_penalty)
        require(num_samples >= 0, "model.num_samples", num_samples, "at least 0")
        is_period = score_every_n_epochs is None or score_every_n_epochs >= 1
        require(is_period, "model.score_every_n_epochs", score_every_n_epochs, "null or at least 1")
        self.beams = {"num_beams": num_beams, "length_penalty": length_penalty}
        self.max_new_tokens, self.num_samples = max_new_tokens, num_samples
        self.decoding = {**self.beams, "max_new_tokens": max_new_tokens}
        self.score_every_n_epochs = score_every_n_epochs
        self.generated: dict[int, str] = {}  # targets of the last evaluation by row
        self.is_scored = False  # whether they are those of all rows
        self.score_signatures: dict[str, str] = {}  # score -> sacrebleu's signature of its computation

    def generate_targets(self, data: ReferencedData, split: str, rows: Sequence[int]) -> dict[int, str]:
        """Generate the targets of sources.

        Args:
            data: the sources.
            split: their split.
            rows: indices of the sources.

        Returns:
            The target of each source by its index, without surrounding white space.
        """
        prompts, texts = data.prompts(split), {}
        order = sorted(rows, key=lambda i: len(prompts[i]))
        for start in range(0, len(order), data.eval_batch_size):
            batch = order[start : start + data.eval_batch_size]
            given = [prompts[i] for i in batch]
            new = self.continue_prompts(data.tokenizer, given, [0] * len(batch), self.max_new_tokens, **self.beams)
            texts.update({i: data.tokenizer.decode(ids).strip() for i, ids in zip(batch, new, strict=True)})
        return {i: texts[i] for i in rows}

    def _generate(self, split: str, is_scored: bool) -> None:
        """Generate the targets of a split: of all evaluated sources and with scores, or the samples alone."""
        self.generated, self.is_scored = {}, False
        for name in set(self.metric_info) - set(LanguageModel.metric_info):
            self.trainer.callback_metrics.pop(f"{split}/{name}", None)  # of an earlier epoch
        data = self.datamodule
        if not isinstance(data, ReferencedData):
            return
        rows = self.outcomes.rows()["row"].tolist()
        self.generated = self.generate_targets(data, split, rows if is_scored else rows[: self.num_samples])
        self.is_scored = is_scored
        if not is_scored or split == "predict":
            return
        references = [data.references(split)[i] for i in rows]
        scores = text_scores(list(self.generated.values()), references, [data.is_seen(split)[i] for i in rows])
        self.score_signatures |= {f"{split}/{name}": text for name, text in signatures(references).items()}
        self.log_dict({f"{split}/{name}": value for name, value in scores.items()}, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Generate targets of the validation sources."""
        if self.trainer.sanity_checking:
            return
        period, epoch = self.score_every_n_epochs, self.trainer.current_epoch + 1
        is_fit = self.trainer.state.fn == "fit"
        self._generate("val", not is_fit or (period is not None and epoch % period == 0))

    def on_test_epoch_end(self) -> None:
        """Generate and score the targets of the test sources."""
        self._generate("test", is_scored=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Record the rows of a batch; their targets are generated at the end, the same in every process."""
        zeros = batch["row"].new_zeros(len(batch["row"]))
        self.outcomes.update(row=batch["row"], n_tokens=zeros, loss=zeros.float())
        return batch["row"]

    def on_predict_epoch_end(self) -> None:
        """Generate the targets of the sources."""
        self._generate("predict", is_scored=True)

    def row_table(self, split: str) -> RowTable | None:
        """Return the table of a language model for every source.

        If all targets were generated, the table also has each of them, its references as a JSON list, and what it adds
        to the scores; see :func:`text_outcomes`. In prediction it has the source and the target of every row.
        """
        data: Any = self.datamodule
        if split == "predict":
            cells = ([data.row_number(split, i), data.text(split, i), text] for i, text in self.generated.items())
            return RowTable("texts", ["row", "source", "target"], cells)
        table = super().row_table(split)
        if table is None or not self.is_scored:
            return table
        columns = _generated_columns(data, split, self.generated)
        added = zip(*columns.values(), strict=True)
        cells = ([*row, *more] for row, more in zip(table.rows, added, strict=True))
        return RowTable(table.name, [*table.columns, *columns], cells)

    def score_texts(self, data: Any, split: str, texts: Sequence[str]) -> ScoredTexts:
        """Score one target for every source of a split as if they had been generated.

        Args:
            data: the datamodule of the sources.
            split: their split.
            texts: the targets.

        Returns:
            The scores of :func:`text_scores`, and what every target adds to them.
        """
        targets, n_tokens = dict(enumerate(texts)), data.encoded[split].n_targets.tolist()
        columns = {
            "row": [data.row_number(split, i) for i in targets],
            "n_tokens": n_tokens,
            "text": [data.text(split, i)[:MAX_TEXT] for i in targets],
            **_generated_columns(data, split, targets),
        }
        table = RowTable("losses", list(columns), list(zip(*columns.values(), strict=True)))
        scores = text_scores(texts, data.references(split), data.is_seen(split))
        return ScoredTexts(scores, table, self._samples(data, split, targets))

    def samples(self, split: str) -> dict[str, str]:
        """Return the first generated targets, each after its source and before its first reference."""
        return self._samples(self.datamodule, split, self.generated)

    def _samples(self, data: Any, split: str, targets: dict[int, str]) -> dict[str, str]:
        found = {}
        for i, text in list(targets.items())[: self.num_samples]:
            lines = [data.text(split, i), f"generated: {text}", f"reference: {data.references(split)[i][0]}"]
            found[f"text_{data.row_number(split, i)}"] = "\n".join(lines) + "\n"
        return found


def _generated_columns(data: ReferencedData, split: str, targets: dict[int, str]) -> dict[str, list[str]]:
    """Return the columns of targets in the table of rows; ``targets`` are by the index of their source."""
    references = [data.references(split)[i] for i in targets]
    lists = [json.dumps(list(of_text), ensure_ascii=False) for of_text in references]
    outcomes = text_outcomes(list(targets.values()), references, [data.is_seen(split)[i] for i in targets])
    return {"generated": list(targets.values()), "references": lists, **outcomes}


def text_outcomes(
    texts: Sequence[str], references: Sequence[Sequence[str]], is_seen: Sequence[bool | None]
) -> dict[str, list[str]]:
    """Return what single texts add to the scores of :class:`DataToText`, as text.

    Args:
        texts: the generated texts.
        references: the references of each text.
        is_seen: for each text whether the category of its source occurs in training; None if this is not known.

    Returns:
        The values of every text, by name: ``bleu_counts`` of :func:`~gpt2_pl.text.overlap.bleu_counts`, ``chrf_counts``
        of :func:`~gpt2_pl.text.overlap.best_chrf_counts`, separated by spaces, and ``rouge_l``. If there are texts of
        both groups, also ``bleu_seen_counts`` and so on, empty for texts of the other group.
    """
    pairs = list(zip(texts, references, strict=True))
    counts = {"bleu": [bleu_counts(*pair) for pair in pairs], "chrf": [best_chrf_counts(*pair) for pair in pairs]}
    outcomes = {f"{name}_counts": [" ".join(map(str, row)) for row in rows] for name, rows in counts.items()}
    outcomes["rouge_l"] = [f"{rouge_l(*pair):.6f}" for pair in pairs]
    if {True, False} <= set(is_seen):
        for key in list(outcomes):
            name, *suffix = key.partition("_counts")
            for group, value in _GROUPS.items():
                cells = [cell if seen is value else "" for cell, seen in zip(outcomes[key], is_seen, strict=True)]
                outcomes["".join([f"{name}_{group}", *suffix])] = cells
    return outcomes


def text_scores(
    texts: Sequence[str], references: Sequence[Sequence[str]], is_seen: Sequence[bool | None]
) -> dict[str, float]:
    """Return the scores of :class:`DataToText`; arguments are those of :func:`text_outcomes`."""
    rows = list(zip(texts, references, is_seen, strict=True))
    groups = {"": rows}
    if {True, False} <= set(is_seen):
        groups |= {f"_{group}": [row for row in rows if row[2] is value] for group, value in _GROUPS.items()}
    scores = {}
    for suffix, of_group in groups.items():
        pairs = [(text, of_text) for text, of_text, _ in of_group]
        found, true = zip(*pairs, strict=True)
        scores[f"bleu{suffix}"], scores[f"chrf{suffix}"] = bleu(found, true), chrf(found, true)
        scores[f"rouge_l{suffix}"] = sum(rouge_l(*pair) for pair in pairs) / len(pairs)
    return scores
