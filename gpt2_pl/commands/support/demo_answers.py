"""Answers of the runs of ``gpt2-pl demo``, as HTML, without the page that they are shown on.

What a run reads and answers is derived from its predictor: the fields of its template, its classes, its number or its
text. A task from outside the library is therefore shown as well as one of this library.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from gpt2_pl.errors import InputError, printable

if TYPE_CHECKING:
    from jinja2 import Template

    from gpt2_pl.inference.occlusion import PartEffect
    from gpt2_pl.inference.predictor import Prediction, Predictor

T = TypeVar("T")
MAX_CHARACTERS = 4000  # of a text
_MAX_CLASSES = 10  # that are shown
_MAX_STRONGEST = 5  # parts that are listed below a text
_MIN_SCALE = 0.05  # change of a probability that is drawn in the strongest color, at least
_MIN_LISTED = 0.0005  # change of a probability that is listed
_INTERVAL = 0.1  # seconds between two pictures of a text that is being generated


class Segment(NamedTuple):
    """Piece of a text.

    Args:
        text: the characters.
        change: its effect on the prediction, with its sign; empty for a piece without an effect.
        kind: ``for`` or ``against`` the prediction; empty for a piece without an effect.
        strength: from 0 to 1, for its color.
    """

    text: str
    change: str = ""
    kind: str = ""
    strength: float = 0.0


class DemoRun:
    """Run on the page: its model, or the reason that it has none.

    Args:
        source: the run as it was named on the command line.
        predictor: its model; None if it cannot be loaded.
        problem: the reason, a sentence.
        facts: what is known about the model, such as a score.

    Attributes:
        name: short name of the run.
    """

    def __init__(
        self, source: str | Path, predictor: Predictor | None = None, problem: str = "", facts: Sequence[str] = ()
    ) -> None:
        parts = Path(source).parts or (str(source),)
        is_version = parts[-1].startswith("version_") and len(parts) > 1
        self.source = Path(source)
        self.name = printable("/".join(parts[-2:] if is_version else parts[-1:]))
        self.predictor, self.problem, self.facts = predictor, problem, facts

    @property
    def inputs(self) -> list[str]:
        """Names of the texts that the model reads."""
        assert self.predictor is not None
        prompt = self.predictor.prompt
        return prompt.fields or ["first lines of a poem" if prompt.is_poem else "start of a text"]

    @property
    def is_generator(self) -> bool:
        """Whether the model writes texts."""
        return self.predictor is not None and self.predictor.is_generator

    @property
    def introduction(self) -> str:
        """What the model does with a text."""
        model = self.predictor
        if model is None:
            return ""
        if model.labels:
            names = ", ".join(model.labels[:_MAX_CLASSES])
            more = f" and {len(model.labels) - _MAX_CLASSES} more" if len(model.labels) > _MAX_CLASSES else ""
            return printable(f"It chooses one of {len(model.labels)} classes: {names}{more}.")
        if model.is_regressor:
            return "It predicts a number."
        if model.prompt.is_poem:
            return "It completes the first lines of a poem to 14 lines."
        if model.prompt.fields:
            return f"It writes a text from {printable(' and '.join(model.prompt.fields))}."
        return "It continues a text."

    def heading(self, name: str) -> str:
        """Return what is known about the run as HTML.

        Args:
            name: name that is shown, or an empty text.
        """
        return _template().render(
            part="heading", name=name, facts=self.facts, text=self.introduction, problem=self.problem
        )

    def answers(self, texts: Sequence[Any], settings: Mapping[str, Any], worker: Worker) -> Iterator[str]:
        """Yield the answer to texts as HTML; each is more complete than the one before.

        Invalid input, and a failure of the machine, is a sentence in the last one.

        Args:
            texts: a text for each name in :attr:`inputs`.
            settings: of generation: ``seed``, and arguments of
                :meth:`~gpt2_pl.inference.predictor.Predictor.generate`; for a classifier or regressor, empty.
            worker: thread of the models.
        """
        if self.predictor is None:
            return
        try:
            check_texts(self.inputs, texts)
            answers = self._texts if self.predictor.is_generator else self._predictions
            yield from answers(self.predictor, list(texts), settings, worker)
        except InputError as error:
            yield problem(str(error))

    def _predictions(
        self, model: Predictor, texts: list[str], settings: Mapping[str, Any], worker: Worker
    ) -> Iterator[str]:
        from gpt2_pl.inference.occlusion import occlude

        (prediction,) = worker.run(lambda: model.predictions([texts]))
        shown = _predicted(model, prediction)
        yield _template().render(part="prediction", **shown, is_running=True)
        _, effects = worker.run(lambda: occlude(model, texts))
        words = _words(model, prediction, texts, effects)
        yield _template().render(part="prediction", **shown, **words, is_cut=_is_cut(model, texts))

    def _texts(self, model: Predictor, texts: list[str], settings: Mapping[str, Any], worker: Worker) -> Iterator[str]:
        pieces: list[str] = []
        prompt = [*texts] if model.prompt.fields else texts[0]
        stream = worker.stream(lambda on_text: model.generate([prompt], on_text=on_text, **settings))
        for new, result in stream:
            pieces += new
            start = "" if model.prompt.fields else texts[0]
            text = start + "".join(pieces) if result is None else result[0]
            yield _generated(model, texts, text, is_running=result is None)


def check_texts(names: Sequence[str], texts: Sequence[Any]) -> None:
    """Check that texts are neither blank nor too long.

    Args:
        names: names of the texts.
        texts: the texts, of any type.

    Raises:
        InputError: they are.
    """
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{name} must not be empty; type a text", key=name, value=text)
        if len(text) > MAX_CHARACTERS:
            message = f"{name} must have at most {MAX_CHARACTERS:,} characters, got {len(text):,}"
            raise InputError(message, key=name, value=text)


def problem(sentence: str) -> str:
    """Return a sentence about a problem as HTML."""
    return _template().render(part="problem", problem=sentence)


def waiting() -> str:
    """Return what stands in the place of an answer that is not computed yet, as HTML."""
    return _template().render(part="waiting")


def named(answer: str, name: str) -> str:
    """Return an answer under the name of its run, as HTML."""
    return _template().render(part="name", name=name) + answer


class Worker:
    """Thread in which the models compute, one request after the other.

    A server runs every request in another thread. PyTorch keeps threads of its own for every thread that computes.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gpt2_pl-model")
        self._closed = Event()

    def run(self, compute: Callable[[], T]) -> T:
        """Return the result of a computation."""
        return self._executor.submit(compute).result()

    def stream(self, generate: Callable[[Callable[[str], None]], T]) -> Iterator[tuple[list[str], T | None]]:
        """Yield the pieces of text that a function passes on, a few times a second, and at last its result.

        The function is stopped when the iterator is closed, or the worker.

        Args:
            generate: is called with the function that takes a piece of text.

        Yields:
            New pieces of text, and the result or None.
        """
        pieces: SimpleQueue[str] = SimpleQueue()
        stopped = Event()

        def on_text(piece: str) -> None:
            if stopped.is_set() or self._closed.is_set():
                raise _Stopped
            pieces.put(piece)

        future = self._executor.submit(generate, on_text)
        try:
            while not future.done():
                time.sleep(_INTERVAL)
                if new := _drain(pieces):
                    yield new, None
            yield _drain(pieces), future.result()
        finally:
            stopped.set()
            _wait(future)

    def close(self) -> None:
        """Stop the text that is being generated, and end the thread."""
        self._closed.set()
        self._executor.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """A text is no longer wanted."""


def _drain(pieces: SimpleQueue[str]) -> list[str]:
    """Return what a queue holds now."""
    found: list[str] = []
    try:
        while True:
            found.append(pieces.get_nowait())
    except Empty:
        return found


def _wait(future: Future[Any]) -> None:
    """Wait until a computation has ended or will not begin, whatever its result."""
    if not future.cancel():
        future.exception()


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("gpt2_pl.commands.support", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["printable"] = lambda text: printable(text, keep="\n\t")
    return environment.get_template("demo.html.jinja")


def _predicted(model: Predictor, prediction: Prediction) -> dict[str, Any]:
    """Return what is shown of a prediction: its name and the classes in their order, or its number."""
    index = prediction.class_index
    if index is None:
        return {"verdict": f"{prediction.value:g}", "classes": []}
    order = list(range(len(model.labels)))
    if len(order) > _MAX_CLASSES:
        order = sorted(order, key=lambda i: (i != index, -prediction.probabilities[i]))
    classes = [(model.labels[i], prediction.probabilities[i], i == index) for i in order[:_MAX_CLASSES]]
    return {"verdict": model.labels[index], "classes": classes, "n_more": len(order) - len(classes)}


def _words(
    model: Predictor, prediction: Prediction, texts: Sequence[str], effects: Sequence[PartEffect]
) -> dict[str, Any]:
    """Return what is shown of the words that moved a prediction."""
    is_number = prediction.class_index is None
    scale = max((abs(part.effect) for part in effects), default=0.0)
    scale = max(scale, 1e-9 if is_number else _MIN_SCALE)
    fields = dict(zip(model.prompt.fields, texts, strict=True))
    marked = [(field, _segments(text, field, effects, scale, is_number)) for field, text in fields.items()]
    smallest = 0.0 if is_number else _MIN_LISTED
    strongest = sorted((part for part in effects if abs(part.effect) > smallest), key=lambda part: -abs(part.effect))
    listed = [
        (fields[part.field][part.start : part.end], _change(part.effect, is_number), _without(part, is_number))
        for part in strongest[:_MAX_STRONGEST]
    ]
    grouped = any(len(fields[part.field][part.start : part.end].split()) > 1 for part in effects)
    changed = any(part.without.class_index != prediction.class_index for part in strongest[:_MAX_STRONGEST])
    shown = {"marked": marked, "strongest": listed, "is_number": is_number, "is_grouped": grouped}
    return shown | {"is_changed": changed}


def _segments(text: str, field: str, effects: Sequence[PartEffect], scale: float, is_number: bool) -> list[Segment]:
    """Return a text in pieces, those with an effect and what lies between them."""
    segments, end = [], 0
    for part in effects:
        if part.field != field:
            continue
        kind = "for" if part.effect > 0 else "against"
        strength = min(1.0, abs(part.effect) / scale)
        segments.append(Segment(text[end : part.start]))
        change = _change(part.effect, is_number)
        segments.append(Segment(text[part.start : part.end], change, kind, round(strength, 3)))
        end = part.end
    return [segment for segment in (*segments, Segment(text[end:])) if segment.text]


def _change(effect: float, is_number: bool) -> str:
    """Format the change of a prediction without a part, of a probability in percentage points."""
    change = f"{-effect:+.3g}" if is_number else f"{-100 * effect:+.1f}"
    return change.replace("-", "\N{MINUS SIGN}", 1) if change.startswith("-") else change


def _without(part: PartEffect, is_number: bool) -> str:
    """Format the prediction without a part."""
    return f"{part.without.value:g}" if is_number else str(part.without.value)


def _is_cut(model: Predictor, texts: Sequence[str]) -> int:
    """Return the number of tokens that the model reads if it does not read the text to its end, or 0."""
    _, truncation = model.prompt.encode(model.prompt.rows([list(texts)]), model.tokenizer)
    return model.prompt.max_length or 0 if truncation.n_truncated else 0


def _generated(model: Predictor, texts: Sequence[str], text: str, is_running: bool) -> str:
    """Return a generated text as HTML, in lines if it is a poem."""
    prompt, given, lines = model.prompt, "", []
    if prompt.is_poem:
        from gpt2_pl.text.poems import split_lines

        n_given = len(split_lines(texts[0]))
        lines = [(line, i < n_given) for i, line in enumerate(split_lines(text))]
    elif not prompt.fields and text.startswith(texts[0]):
        given, text = texts[0], text.removeprefix(texts[0])
    return _template().render(part="text", given=given, text=text, lines=lines, is_running=is_running)
