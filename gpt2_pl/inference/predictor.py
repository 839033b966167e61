"""Predictions of a trained model for texts: classes, numbers and generated texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from gpt2_pl.datamodules.batching import TokenDataset, evaluation_batches
from gpt2_pl.errors import InputError, require, shorten
from gpt2_pl.inference.loading import require_protocol
from gpt2_pl.inference.prompts import PromptFormat, Text, complete_prompt_spec
from gpt2_pl.tasks.protocols import NumberPredictor, TextClassifier, TextGenerator
from gpt2_pl.text.poems import LineLengthProcessor, MaxLinesCriteria, Poem, split_lines
from gpt2_pl.text.tokenizer import END_OF_TEXT

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from gpt2_pl.tasks import Task

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": 0.9}  # the default way of decoding
_BEAMS = ("num_beams", "length_penalty", "early_stopping")
MAX_NEW_TOKENS = 220  # by default
_SEED_STRIDE = 1_000_003  # prompt i has the generator seed * _SEED_STRIDE + i, independent of the other prompts


class Prediction(NamedTuple):
    """Prediction for a text.

    Args:
        value: name of the class, or the number of a regressor.
        class_index: index of the class; None for a number.
        probabilities: probability of each class; empty for a number.
    """

    value: str | float
    class_index: int | None = None
    probabilities: Sequence[float] = ()


class Predictor:
    """Trained model with its tokenizer and the prompt format of its training.

    :func:`gpt2_pl.load` creates it. The model is on the GPU, if there is one.

    Args:
        task: the trained task, a classifier, a regressor or a language model.
        tokenizer: its tokenizer.
        source: path of the checkpoint or folder, for error messages.
        precision: ``bf16-mixed`` computes in bfloat16 with weights in float32, ``bf16-true`` has weights in bfloat16.
        temperature: number that the logits of classes are divided by; it does not change the predicted classes.

    Attributes:
        labels: names of the classes; empty without classes.
        prompt: prompt format of the training data.

    Raises:
        InputError: the task has no prompt format that fits it, or cannot be used to predict; or the precision is
            unknown.
    """

    def __init__(
        self, task: Task, tokenizer: Tokenizer, source: str, precision: Precision = "32-true", temperature: float = 1.0
    ) -> None:
        precisions = get_args(Precision)
        require(precision in precisions, "precision", precision, f"one of {', '.join(precisions)}")
        self.tokenizer, self.source, self.temperature = tokenizer, source, temperature
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.task: Any = task.to(self.device, torch.bfloat16 if precision == "bf16-true" else torch.float32).eval()
        self.precision = precision
        is_predictor = isinstance(task, NumberPredictor | TextClassifier)
        spec = complete_prompt_spec(task, source) if is_predictor else task.prompt_spec or {}
        self.prompt = PromptFormat(spec)
        self.labels: list[str] = list(spec["labels"]) if isinstance(task, TextClassifier) else []

    @property
    def is_regressor(self) -> bool:
        """Whether the model predicts a number."""
        return isinstance(self.task, NumberPredictor)

    @property
    def is_generator(self) -> bool:
        """Whether the model continues texts."""
        return isinstance(self.task, TextGenerator)

    def require_prediction(self) -> None:
        """Check that the model predicts a class or a number.

        Raises:
            InputError: it does not.
        """
        if not self.is_regressor:
            require_protocol(self.task, TextClassifier, self.source)

    # Classes and numbers

    def predict(self, texts: Sequence[Text], batch_size: int = 64) -> list[str] | list[float]:
        """Predict the class or the number of every text.

        Args:
            texts: the texts. For a template of several fields, such as that of a pair, each of them is a sequence of
                texts in the order of the fields, or a mapping of fields or columns to texts.
            batch_size: number of texts in a batch.

        Returns:
            The names of the classes, or the numbers.

        Raises:
            InputError: a text is blank, has no token, or does not fit the template; or the model predicts neither.
        """
        values: list[Any] = [prediction.value for prediction in self.predictions(texts, batch_size)]
        return values

    def predict_proba(self, texts: Sequence[Text], batch_size: int = 64) -> NDArray[np.float64]:
        """Compute the class probabilities (N, K) of every text, in the order of ``labels``.

        Args:
            texts: as in :meth:`predict`.
            batch_size: as in :meth:`predict`.

        Raises:
            InputError: as in :meth:`predict`; also if the model predicts a number.
        """
        require_protocol(self.task, TextClassifier, self.source)
        predictions = self.predictions(texts, batch_size)
        return np.array([prediction.probabilities for prediction in predictions]).reshape(-1, len(self.labels))

    def predictions(self, texts: Sequence[Text], batch_size: int = 64) -> list[Prediction]:
        """Predict the class and its probabilities, or the number, of every text; see :meth:`predict`."""
        self.require_prediction()
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        rows = self.prompt.rows(texts)
        ids, truncation = self.prompt.encode(rows, self.tokenizer)
        for number, (row, row_ids) in enumerate(zip(rows, ids, strict=True), start=1):
            if not row_ids:
                raise InputError(self.prompt.no_token(row), source=f"text {number}")
        self.prompt.warn_of_truncation(truncation)
        return self.predict_ids(ids, batch_size)

    def predict_ids(self, ids: Sequence[Sequence[int]], batch_size: int) -> list[Prediction]:
        """Predict in batches of similar length.

        Args:
            ids: token ids of each text, at least one per text.
            batch_size: number of texts in a batch.

        Returns:
            The predictions in the order of the texts.
        """
        is_number = self.is_regressor
        outputs = torch.empty(len(ids), 1 if is_number else len(self.labels))
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"),
        ):
            for indices, batch in _batches(ids, batch_size, self.device):
                output = self.task.predict_number(batch) if is_number else self.task.predict_proba(batch)
                outputs[indices] = output.float().cpu().view(len(indices), -1)
            if is_number:
                return [Prediction(float(f"{number:.7g}")) for number in outputs.squeeze(1).tolist()]
            predicted = self.task.predict_class(outputs).tolist()
        if self.temperature != 1.0:
            smallest = torch.finfo(torch.float32).tiny
            outputs = (outputs.clamp_min(smallest).log() / self.temperature).softmax(-1)
        rows = zip(predicted, outputs.tolist(), strict=True)
        return [Prediction(self.labels[index], index, probabilities) for index, probabilities in rows]

    # Generation

    def generate(
        self,
        prompts: Sequence[Text],
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
        line_length_bias: bool | None = None,
        as_is: bool = False,
        where: str = "prompt",
        track: Callable[[Sequence[int]], Iterable[int]] = iter,
        on_text: Callable[[str], object] | None = None,
        **settings: Any,
    ) -> list[str]:
        """Continue prompts.

        A model that was trained on pairs of sources and targets generates the target of a source. The prompt of a poem
        is its first lines; the model completes it to 14 lines, with its line-length bias.

        Args:
            prompts: the prompts; the sources of a model of pairs, as the texts of :meth:`predict`.
            max_new_tokens: maximum number of tokens of a continuation; defaults to that of the task, or 220.
            batch_size: number of prompts in a batch.
            seed: seed of sampling; each prompt has its own generator.
            line_length_bias: whether line ends become likelier in long lines of a poem; defaults to the task's setting.
            as_is: whether the model continues every prompt as it is, whatever it was trained on.
            where: what error messages call a prompt.
            track: returns the elements of a sequence and shows how many have been taken.
            on_text: is called with every new piece of text of a single prompt, unless beams are searched.
            **settings: arguments of :func:`~gpt2_pl.generation.generate` or, with ``num_beams``, of
                :func:`~gpt2_pl.beams.beam_search`. Without ``num_beams``, those that are not given are the task's, or
                temperature 1 and top-p 0.9. ``temperature``, ``top_k`` or ``top_p`` replace the task's beam search.

        Returns:
            Each prompt with its continuation, or the target of each source.

        Raises:
            InputError: a prompt is invalid, has no token or leaves no room for a new one; a setting is out of range; or
                the model does not generate texts.
        """
        require_protocol(self.task, TextGenerator, self.source)
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        require(isinstance(seed, int), "seed", seed, "an integer")
        ids = self.prompt_ids(prompts, where, as_is)
        limit, settings = self.decoding(max_new_tokens, settings)
        if self.prompt.is_poem and not as_is:
            bias = getattr(self.task, "line_length_bias", True) if line_length_bias is None else line_length_bias
            settings = self._poem_settings(bias) | settings
        order, texts = sorted(range(len(ids)), key=lambda i: len(ids[i])), [""] * len(ids)
        for start in track(range(0, len(order), batch_size)):
            batch = order[start : start + batch_size]
            if on_text is not None and len(ids) == 1 and "num_beams" not in settings:
                settings["stopping_criteria"] = _Listener(self.tokenizer, len(ids[0]), on_text, settings)
            seeds = [(seed * _SEED_STRIDE + i) % 2**63 for i in batch]
            new = self.task.continue_prompts(self.tokenizer, [ids[i] for i in batch], seeds, limit, **settings)
            for i, new_ids in zip(batch, new, strict=True):
                texts[i] = self._finish(ids[i], new_ids, as_is)
        return texts

    def decoding(self, max_new_tokens: int | None, settings: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Complete the settings of decoding by those of the task, and check them.

        Args:
            max_new_tokens: as in :meth:`generate`.
            settings: as in :meth:`generate`.

        Returns:
            The maximum number of tokens of a continuation, and the settings.

        Raises:
            InputError: a setting is out of range, or belongs to another way of decoding.
        """
        from gpt2_pl.beams import validate_beams
        from gpt2_pl.decoding import validate_processors
        from gpt2_pl.generation import validate_sampling

        own = dict(self.task.decoding)
        own_limit = own.pop("max_new_tokens", MAX_NEW_TOKENS)
        limit = own_limit if max_new_tokens is None else max_new_tokens
        given = {key: value for key, value in settings.items() if value is not None}
        is_sampling = not given.keys().isdisjoint(SAMPLING)
        if "num_beams" not in given and not (is_sampling and "num_beams" in own):
            given = own | given
        processors = ("repetition_penalty", "no_repeat_ngram_size")
        validate_processors(**{"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, **_of(given, *processors)})
        is_search = "num_beams" in given
        for key, value in _of(given, *(SAMPLING if is_search else _BEAMS)).items():
            raise InputError(key=key, value=value, expected=f"used with{'out' if is_search else ''} num_beams")
        if is_search:
            validate_beams(max_new_tokens=limit, **_of(given, *_BEAMS))
            return limit, given
        given = SAMPLING | given
        validate_sampling(max_new_tokens=limit, **_of(given, *SAMPLING))
        return limit, given

    def prompt_ids(self, prompts: Sequence[Text], where: str = "prompt", as_is: bool = False) -> list[list[int]]:
        """Return the token ids of each prompt.

        Args:
            prompts: as in :meth:`generate`.
            where: as in :meth:`generate`.
            as_is: as in :meth:`generate`.

        Raises:
            InputError: a prompt is invalid, has no token, or leaves no room for a new one.
        """
        ids: list[list[int]] = []
        texts = self.prompt.fill(prompts, where, as_is)
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
            new = self.tokenizer.encode(text, add_special_tokens=False).ids  # as in training
            if not new:
                message = f"{where} {number}: the tokenizer of the run gives no token for {shorten(prompt)}"
                raise InputError(message, key="prompt")
            if len(new) >= self.task.max_length:
                expected = f"have at most {self.task.max_length - 1} tokens, which leaves room for one new token"
                raise InputError(f"{where} {number} must {expected}, got {len(new)}", key="prompt")
            ids.append(new)
        return ids

    def _poem_settings(self, line_length_bias: bool) -> dict[str, Any]:
        tokenizer, vocab_size = self.tokenizer, self.task.config.vocab_size
        bias = [LineLengthProcessor(tokenizer, vocab_size)] if line_length_bias else []
        return {"stopping_criteria": MaxLinesCriteria(tokenizer, vocab_size), "logits_processors": bias}

    def _finish(self, ids: list[int], new_ids: list[int], as_is: bool) -> str:
        """Return the generated text of a prompt; see :meth:`generate`."""
        if self.prompt.template is not None and not as_is:
            return self.tokenizer.decode(new_ids).strip()
        text = self.tokenizer.decode([*ids, *new_ids], skip_special_tokens=False)
        return Poem(0, split_lines(text)).text if self.prompt.is_poem and not as_is else text


class _Listener:
    """Stopping criterion that passes on the text of a row while it is generated, and stops as another one does.

    Args:
        tokenizer: tokenizer of the model.
        n_prompt: number of tokens of the prompt.
        on_text: is called with every new piece of text.
        settings: settings of decoding, which may have another criterion.
    """

    def __init__(
        self, tokenizer: Tokenizer, n_prompt: int, on_text: Callable[[str], object], settings: Mapping[str, Any]
    ) -> None:
        self.tokenizer, self.n_prompt, self.on_text = tokenizer, n_prompt, on_text
        self.criterion = settings.get("stopping_criteria")
        self.end, self.n_shown = tokenizer.token_to_id(END_OF_TEXT), 0

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return which rows (1,) end."""
        new = [token for token in ids[0, self.n_prompt :].tolist() if token != self.end]
        text = self.tokenizer.decode(new, skip_special_tokens=False).rstrip("\ufffd")  # part of a character
        self.on_text(text[self.n_shown :])
        self.n_shown = len(text)
        return ids.new_zeros(len(ids), dtype=torch.bool) if self.criterion is None else self.criterion(ids, mask)


def _of(settings: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: settings[key] for key in keys if key in settings}


def _batches(
    ids: Sequence[Sequence[int]], size: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Yield row indices and batches of texts of similar length, on a device."""
    offsets = np.cumsum([0, *map(len, ids)])
    rows = TokenDataset(np.fromiter(chain.from_iterable(ids), np.int32, offsets[-1]), offsets)
    for indices in evaluation_batches(rows.lengths, size):
        batch = {key: tensor.to(device) for key, tensor in rows.batch(indices).items()}
        yield torch.from_numpy(indices), batch
