"""Type texts, and see their classes, the numbers of a regressor, or the texts that a language model generates.

Ctrl-C stops a generation or leaves, Ctrl-D leaves. The arrow keys recall earlier lines.
"""

from __future__ import annotations

import sys
import textwrap
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.support.display import describe, terminal_width
from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.commands.support.process import interrupts
from gpt2_pl.errors import InputError, listing, printable

if TYPE_CHECKING:
    from gpt2_pl.inference.predictor import Predictor


def main(args: list[str]) -> None:
    """Run ``gpt2-pl chat``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: an argument or the model is invalid.
    """
    options = _parse_arguments(args)

    from gpt2_pl.commands.support.trained_model import load_predictor
    from gpt2_pl.inference.loading import require_protocol
    from gpt2_pl.tasks.protocols import TextGenerator

    predictor = load_predictor(options)
    settings = {key: getattr(options, key) for key in ("temperature", "top_k", "top_p")}
    if predictor.is_generator:
        predictor.decoding(options.max_new_tokens, settings)
    elif predictor.labels or predictor.is_regressor:
        for key, value in {"max_new_tokens": options.max_new_tokens, **settings}.items():
            if value is not None:
                raise InputError(key=key, value=value, expected="used with a model that generates texts")
    else:
        require_protocol(predictor.task, TextGenerator, predictor.source)
    with suppress(ImportError):
        import readline  # noqa: F401  # input() then edits lines and recalls earlier ones
    print(textwrap.fill(_introduction(predictor), terminal_width()))
    _talk(predictor, options, settings)


def _parse_arguments(args: list[str]) -> Namespace:
    parser = CommandParser(prog="gpt2-pl chat", description=__doc__)
    parser.add_run("folder of the run or of an exported or pretrained model, or a hub id, such as gpt2")
    parser.add_checkpoint()
    parser.add_calibrated()
    parser.add_sampling()
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    return parser.parse_args(args)


def _introduction(predictor: Predictor) -> str:
    """Return what the model does with a text, and how to leave."""
    fields = predictor.prompt.fields
    what = f"{' and '.join(fields)}" if len(fields) > 1 else "a text"
    if predictor.labels:
        names = listing(predictor.labels) if len(predictor.labels) > 8 else ", ".join(predictor.labels)
        does = f"Type {what}; the classes are {names}."
    elif predictor.is_regressor:
        does = f"Type {what} to see its number."
    elif predictor.prompt.is_poem:
        does = "Type the first lines of a poem and an empty line; the model completes it."
    else:
        does = f"Type {'the start of a text' if not fields else what}; the model continues."
    return printable(f"{does} Ctrl-C stops a generation or leaves, Ctrl-D leaves.")


def _talk(predictor: Predictor, options: Namespace, settings: dict[str, Any]) -> None:
    """Answer texts until standard input ends or Ctrl-C is pressed."""
    texts = _typed_texts(predictor)
    for number in range(sys.maxsize):
        try:
            text = next(texts, None)
        except KeyboardInterrupt:
            text = None
        if text is None:
            interrupts.reset()
            print()
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", UserWarning)  # the same sentence for every long text
                _answer(predictor, text, options, settings, options.seed + number)
        except InputError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            interrupts.reset()
            print("\n(stopped)")


def _typed_texts(predictor: Predictor) -> Iterator[list[str]]:
    """Yield the texts that are typed: one for each field, the first lines of a poem, or the start of a text."""
    fields = predictor.prompt.fields
    names = [f"{field}> " for field in fields] if len(fields) > 1 else ["> "]
    with suppress(EOFError):
        while True:
            values = [_typed_poem()] if predictor.prompt.is_poem else [_typed_line(name) for name in names]
            if all(value.strip() for value in values):
                yield values


def _typed_poem() -> str:
    """Return the lines that are typed up to a blank line or the end of input.

    Raises:
        EOFError: the input ends before the first line.
    """
    lines = [_typed_line("> ")]
    try:
        while lines[-1].strip():
            lines.append(_typed_line("| "))
    except EOFError:
        print()
    return "\n".join(lines)


def _typed_line(prompt: str) -> str:
    return input(printable(prompt) if sys.stdin.isatty() else "")


def _answer(predictor: Predictor, text: list[str], options: Namespace, settings: dict[str, Any], seed: int) -> None:
    """Print the prediction for a text, or its continuation while it is generated."""
    if not predictor.is_generator:
        (prediction,) = predictor.predictions([text])
        print("".join(f"  {line}\n" for line in describe(prediction, predictor.labels)))
        return
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        print(printable(piece, keep="\n\t"), end="", flush=True)

    (generated,) = predictor.generate(
        [text], max_new_tokens=options.max_new_tokens, seed=seed, on_text=show, **settings
    )
    print("\n" if shown else f"{printable(generated, keep=chr(10))}\n")
