"""Synthetic datasets for a first run and for tests, without files or network."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gpt2_pl.datamodules import paraphrase, sentiment
from gpt2_pl.datamodules.classification import TextClassification
from gpt2_pl.datamodules.rows import DatasetRows, RowSource
from gpt2_pl.errors import InputError
from gpt2_pl.text.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_THINGS = "plot cast music story camera script pacing dialogue ending humour scenery costume".split()
_GOOD = "wonderful moving clever charming brilliant funny fresh warm gripping lovely".split()
_BAD = "dreadful boring clumsy tedious awful stale cold lifeless messy painful".split()
_PLAIN = "long short recent foreign quiet loud dark bright modern old".split()
_DEGREES = ["", "really ", "quite ", "utterly ", "rather "]
_OPENINGS = ["", "I think ", "critics say ", "my friends agree that ", "for once ", "to be fair "]
_CLOSINGS = ["", " this time", " from start to finish", " as the reviews said", " on a big screen"]

_ASKS = ["how do I {} {}?", "who can {} {}?", "is it hard to {} {}?"]
_VERBS = [("fix", "repair"), ("buy", "purchase"), ("hide", "conceal")]
_OBJECTS = ["a bicycle", "a boat", "a clock", "a camera"]


def toy_reviews(n: int, seed: int) -> list[dict[str, Any]]:
    """Generate short reviews, each negative (0), neutral (1) or positive (2).

    A review has an opinion on one thing and a neutral clause on another. Half of the opinions are negated ("not ... at
    all"), which reverses their class, so that no single word determines the class.

    Args:
        n: number of reviews.
        seed: seed of the random choices.

    Returns:
        Rows with ``sentence`` and ``sentiment``.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        label = rng.randrange(3)
        first, second = rng.sample(_THINGS, 2)
        negated = label != 1 and rng.random() < 0.5
        words = _PLAIN if label == 1 else _GOOD if (label == 2) != negated else _BAD
        opinion = f"the {first} is {'not ' if negated else ''}{rng.choice(_DEGREES)}{rng.choice(words)}"
        opinion += " at all" if negated else ""
        aside = f"the {second} is {rng.choice(_DEGREES)}{rng.choice(_PLAIN)}"
        clauses = [opinion, aside]
        rng.shuffle(clauses)
        sentence = f"{rng.choice(_OPENINGS)}{' and '.join(clauses)}{rng.choice(_CLOSINGS)}"
        rows.append({"sentence": sentence, "sentiment": label})
    return rows


def toy_pairs(n: int, seed: int) -> list[dict[str, Any]]:
    """Generate pairs of questions, half of them paraphrases (1).

    The questions of the other pairs (0) differ in their verb and their object. Every question is equally frequent in
    both classes, so that a model must compare the two sentences.

    Args:
        n: number of pairs.
        seed: seed of the random choices.

    Returns:
        Rows with ``sentence1``, ``sentence2`` and ``is_duplicate``.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        same = rng.randrange(2)
        verbs, objects = rng.sample(_VERBS, 2), rng.sample(_OBJECTS, 2)
        asks = rng.sample(_ASKS, 2)
        rows.append(
            {
                "sentence1": asks[0].format(rng.choice(verbs[0]), objects[0]),
                "sentence2": asks[1].format(rng.choice(verbs[1 - same]), objects[1 - same]),
                "is_duplicate": same,
            }
        )
    return rows


class ToyRows(TextClassification):
    """Base class of datamodules with generated rows and a byte-level BPE trained on them.

    Args:
        n_train: number of training rows, at least 8; validation and test have a quarter as many each.
        vocab_size: number of entries of the tokenizer.
        data_seed: seed of the generated rows.
        template: text of a row, with ``{field}`` as the placeholder of a column's text; defaults to the template of the
            corresponding real task.
        tokenizer: folder or hub id of the tokenizer; by default, one is trained. On the command line it defaults to
            that of the pretrained base, if there is one.
        max_length: maximum number of tokens in a row; defaults to the context length of the model.
        batch_size: rows per process and step.
        eval_batch_size: rows per process and step in validation, test and prediction.
        shots: number of training rows of each class.
        demonstrations: number of training rows that precede every evaluated text in its prompt, or ``all``.
        steps_per_epoch: optimizer steps in an epoch; None for those of one pass over the training rows.

    Raises:
        InputError: ``n_train`` is less than 8, or an argument of the base class is invalid.
    """

    WRITE: ClassVar[Callable[[int, int], list[dict[str, Any]]]]
    TEMPLATE: ClassVar[str]
    LABEL_COLUMN: ClassVar[str]
    LABELS: ClassVar[Sequence[str]]

    def __init__(
        self,
        n_train: int = 2000,
        vocab_size: int = 512,
        data_seed: int = 0,
        template: str | None = None,
        tokenizer: str | None = None,
        max_length: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        shots: int | None = None,
        demonstrations: int | Literal["all"] | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__(
            label_column=self.LABEL_COLUMN,
            labels=list(self.LABELS),
            template=self.TEMPLATE if template is None else template,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            shots=shots,
            demonstrations=demonstrations,
            steps_per_epoch=steps_per_epoch,
        )
        if n_train < 8:
            raise InputError(key="data.n_train", value=n_train, expected="at least 8")
        self.n_train, self.vocab_size, self.data_seed = n_train, vocab_size, data_seed

    def has_split(self, split: str) -> bool:
        """Return True: every split exists, and prediction uses the test rows."""
        return True

    def _has_own_val(self) -> bool:
        return True

    def _texts(self, split: str) -> list[dict[str, Any]]:
        n, sizes = self.n_train, {"train": slice(0, self.n_train), "val": slice(self.n_train, self.n_train * 5 // 4)}
        rows = type(self).WRITE(n + 2 * (n // 4), self.data_seed)
        return rows[sizes.get(split, slice(n * 5 // 4, None))]

    def _sources(self, split: str) -> list[RowSource]:
        from datasets import Dataset

        return [DatasetRows(Dataset.from_list(self._texts(split)), f"toy rows ({split})", "data")]

    def _make_tokenizer(self) -> Tokenizer:
        if self.tokenizer_source is not None:
            return super()._make_tokenizer()
        texts = (self.template.fill(row) for row in self._texts("train"))
        return train_tokenizer(texts, self.vocab_size)


class ToySentiment(ToyRows):
    """Datamodule of the three-class reviews of :func:`toy_reviews`; arguments as in :class:`ToyRows`."""

    WRITE = toy_reviews
    TEMPLATE = sentiment.TEMPLATE
    LABEL_COLUMN = "sentiment"
    LABELS = ("negative", "neutral", "positive")


class ToyPairs(ToyRows):
    """Datamodule of the question pairs of :func:`toy_pairs`; arguments as in :class:`ToyRows`."""

    WRITE = toy_pairs
    TEMPLATE = paraphrase.TEMPLATE
    LABEL_COLUMN = "is_duplicate"
    LABELS = paraphrase.PAIR_LABELS
