"""Continue prompts with the language model of a run, of an exported folder or of the Hugging Face hub."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.support.output import STANDARD_OUTPUT, json_line, open_output
from gpt2_pl.commands.support.parser import CommandParser, check_batches, require_extension, require_one
from gpt2_pl.commands.support.terminal import track
from gpt2_pl.errors import InputError, printable, require
from gpt2_pl.filesystem import read_text, require_file

if TYPE_CHECKING:
    from gpt2_pl.inference.prompts import Text

_EXTENSIONS = (".txt", ".jsonl")
_SAMPLING = ("temperature", "top_k", "top_p")  # options of sampling, as is --seed
_BEAMS = ("length_penalty",)  # options that require --num_beams
_SHARED = ("repetition_penalty", "no_repeat_ngram_size")


def main(args: list[str]) -> None:
    """Run ``gpt2-pl generate``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: an argument, a prompt or the model is invalid.
    """
    options = _parse_arguments(args)

    from gpt2_pl.commands.support.trained_model import load_predictor
    from gpt2_pl.inference.loading import require_protocol
    from gpt2_pl.tasks.protocols import TextGenerator

    settings = _decoding_settings(options)
    prompts, numbers, where = _given_prompts(options)
    predictor = load_predictor(options, options.precision)
    require_protocol(predictor.task, TextGenerator, predictor.source)
    predictor.prompt.is_poem |= options.poems
    is_poem = predictor.prompt.is_poem and not options.as_is
    require(is_poem or not options.no_line_length_bias, "no_line_length_bias", True, "used with poems")
    is_shown = options.out == STANDARD_OUTPUT
    texts = predictor.generate(
        prompts,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed or 0,
        line_length_bias=False if options.no_line_length_bias else None,
        as_is=options.as_is,
        where=where,
        track=lambda batches: track(batches, "Generating", len(batches)),
        compiled=options.compile or None,
        **settings,
    )
    _write(options, prompts, texts, numbers)
    if not is_shown:
        print(printable(f"{options.out}: {len(texts)} texts"))


def _parse_arguments(args: list[str]) -> Namespace:
    parser = CommandParser(prog="gpt2-pl generate", description=__doc__)
    add = parser.add_argument
    parser.add_run("folder of the run or of an exported or pretrained model, or a hub id, such as gpt2")
    prompt_help = (
        "continue this prompt; for a template of several fields, one text for each; can be given several times"
    )
    add("--prompt", nargs="+", action="append", metavar="TEXT", help=prompt_help)
    add(
        "--prompt_file",
        metavar="FILE",
        help="UTF-8 text (.txt) with one prompt per line, JSON lines (.jsonl) with the key `prompt` or the fields of "
        "the template, or, with --poems, numbered poems (.txt) that consist of their first lines; - for standard input",
    )
    parser.add_output("FILE", "output file, .txt or .jsonl, or - for standard output", required=False)
    add("--json", action="store_true", help="write JSON lines to standard output")
    parser.add_sampling()
    beams_help = "search for the most probable text with N beams (default: as the task does, or sample)"
    add("--num_beams", type=int, metavar="N", help=beams_help)
    length_help = "exponent of the length by which the log-probability of a beam is divided (default: 1.0)"
    add("--length_penalty", type=float, metavar="A", help=length_help)
    penalty_help = "penalty of tokens that have occurred; 1.0 applies no penalty"
    add("--repetition_penalty", type=float, default=1.0, metavar="PENALTY", help=penalty_help)
    ngram_help = "do not repeat n-grams of this size; 0 allows all"
    add("--no_repeat_ngram_size", type=int, default=0, metavar="N", help=ngram_help)
    add("--seed", type=int, help="seed of sampling; each prompt has its own generator (default: 0)")
    add("--batch_size", type=int, default=16, metavar="N", help="prompts per batch")
    add("--poems", action="store_true", help="read numbered poems and complete them")
    bias_help = "for poems, do not make line ends likelier in long lines"
    add("--no_line_length_bias", action="store_true", help=bias_help)
    as_is_help = "continue prompts as they are, without the template of the task, and not as poems"
    add("--as_is", action="store_true", help=as_is_help)
    precision_help = "type of the weights: float32, or bfloat16"
    add("--precision", choices=("32-true", "bf16-true"), default="32-true", help=precision_help)
    add(
        "--compile", action="store_true", help="compile decoding with torch.compile; pays off on a GPU for many prompts"
    )
    options = parser.parse_args(args)
    require_one(options, "prompt", "prompt_file")
    require(not (options.poems and options.as_is), "as_is", True, "used without --poems")
    if options.json or (options.out is None and options.prompt is not None):
        require(options.out in (None, STANDARD_OUTPUT), "json", True, "used without --out, or with --out -")
        options.out = STANDARD_OUTPUT
    if options.out is None:
        raise InputError("--out is required with --prompt_file; --out - writes to standard output", key="out")
    check_batches(options, _EXTENSIONS)
    return options


def _decoding_settings(options: Namespace) -> dict[str, Any]:
    """Return the settings of decoding that are given.

    Raises:
        InputError: a setting is out of range, or belongs to another way of decoding.
    """
    from gpt2_pl.beams import validate_beams
    from gpt2_pl.decoding import validate_processors
    from gpt2_pl.generation import validate_sampling

    processors = {key: getattr(options, key) for key in _SHARED}
    validate_processors(**processors)
    is_search, limit = options.num_beams is not None, 1 if options.max_new_tokens is None else options.max_new_tokens
    for key in (*_SAMPLING, "seed") if is_search else _BEAMS:
        if getattr(options, key) is not None:
            conflict = f"--num_beams searches for the most probable text and does not sample; leave out --{key}"
            raise InputError(conflict if is_search else f"--{key} requires --num_beams", key=key)
    keys = ("num_beams", *_BEAMS) if is_search else _SAMPLING
    given = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    if is_search:
        validate_beams(**given, max_new_tokens=limit)
    else:
        validate_sampling(**{"temperature": 1.0, **given}, max_new_tokens=limit)
    return given | processors


def _given_prompts(options: Namespace) -> tuple[Sequence[Text], list[int] | None, str]:
    """Return the prompts, the numbers of poems or None, and what error messages call a prompt.

    Raises:
        InputError: the file of prompts is invalid.
    """
    from gpt2_pl.inference.input_rows import STANDARD_STREAM, copied_input

    if options.prompt is not None:
        return options.prompt, None, "prompt"
    if options.prompt_file != STANDARD_STREAM:
        return *read_prompts(options.prompt_file, options.poems), f"prompt_file: {options.prompt_file}, prompt"
    with copied_input("prompt_file", ".txt", "{") as copy:
        return *read_prompts(copy, options.poems), "standard input, prompt"


def read_prompts(file: str, poems: bool) -> tuple[list[Any], list[int] | None]:
    """Read the prompts of a file.

    Args:
        file: ``.txt`` with one prompt per line, or ``.jsonl`` with the key ``prompt``, or with texts by field or
            column.
        poems: whether the file contains numbered poems, each of which is a prompt.

    Returns:
        The prompts, and the numbers of poems or None.

    Raises:
        InputError: the file is missing, has an unknown extension, no prompt, or an invalid line.
    """
    from gpt2_pl.datamodules.sonnets import read_poems

    path = require_file(file, "prompt_file")
    require_extension(path, "prompt_file", _EXTENSIONS)
    if poems:
        openings = read_poems(file, "prompt_file")
        return [poem.text for poem in openings], [poem.number for poem in openings]
    numbered = enumerate(read_text(file, "prompt_file").split("\n"), start=1)
    lines = [(number, line.rstrip("\r")) for number, line in numbered if line.strip()]
    if not lines:
        raise InputError(f"prompt_file: {file} has no prompt", key="prompt_file")
    if path.suffix.lower() == ".jsonl":
        return [_parse_prompt(line, f"prompt_file: {file}, line {number}") for number, line in lines], None
    return [line for _, line in lines], None


def _parse_prompt(line: str, where: str) -> str | dict[str, str]:
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        content = json.loads(line)
        given = content.get("prompt", content)
        texts = [given] if isinstance(given, str) else list(given.values())
        # Lone surrogates raise UnicodeError, which is a ValueError.
        if texts and all(isinstance(text, str) and text.encode() for text in texts):
            return given
    raise InputError(f'{where} must be a JSON object with text in the key "prompt"', key="prompt")


def _write(options: Namespace, prompts: Sequence[Any], texts: list[str], numbers: list[int] | None) -> None:
    """Write texts as JSON lines, as numbered poems, or as text with a blank line after each."""
    with open_output(options.out) as file:
        if options.json or options.out.suffix.lower() == ".jsonl":
            for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                given = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
                number = {} if numbers is None else {"number": numbers[i]}
                file.write(json_line({"prompt": given, "text": text, **number}))
        elif numbers is not None:
            file.write("\n".join(f"{number}\n\n{text}" for number, text in zip(numbers, texts, strict=True)))
        elif options.prompt is not None:  # for reading
            file.write("\n".join(f"{text.rstrip()}\n" for text in texts))
        else:
            file.writelines(f"{text}\n\n" for text in texts)
