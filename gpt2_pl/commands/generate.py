"""Continue prompts with the language model of a run."""

from __future__ import annotations

import json
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.support.parser import CommandParser, check_batches, require_extension
from gpt2_pl.errors import InputError, printable, shorten
from gpt2_pl.filesystem import atomic_write, read_text, require_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2_pl.tasks.protocols import TextGenerator

_SEED_STRIDE = 1_000_003  # prompt i has the generator seed * _SEED_STRIDE + i, independent of the other prompts
_EXTENSIONS = (".txt", ".jsonl")
_SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": 0.9, "seed": 0}  # options of sampling, and their defaults
_BEAMS = {"length_penalty": 1.0}  # options that require --num_beams


def main(args: list[str]) -> None:
    """Run ``gpt2-pl generate``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: an argument, a prompt or the checkpoint is invalid.
    """
    options = _parse_arguments(args)

    import torch

    from gpt2_pl.commands.support.trained_model import load_run_tokenizer, load_task
    from gpt2_pl.tasks.protocols import TextGenerator
    from gpt2_pl.text.poems import LineLengthProcessor, MaxLinesCriteria, Poem, split_lines

    settings = _decoding_settings(options)
    prompts, numbers = read_prompts(options.prompt_file, options.poems)
    task, _ = load_task(options, TextGenerator)
    vocab_size = task.config.vocab_size
    tokenizer = load_run_tokenizer(options.run, vocab_size)
    task.eval().to(
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=torch.bfloat16 if options.precision == "bf16" else torch.float32,
    )
    if options.compile:
        for block in task.backbone.h:
            block.compile(dynamic=True)
    if numbers is not None:
        bias = [] if options.no_line_length_bias else [LineLengthProcessor(tokenizer, vocab_size)]
        settings |= {"stopping_criteria": MaxLinesCriteria(tokenizer, vocab_size), "logits_processors": bias}
    ids = _encode_prompts(prompts, tokenizer, task.max_length, options.prompt_file)
    texts = _continue(task, tokenizer, ids, options, settings)
    if numbers is not None:
        texts = [Poem(number, split_lines(text)).text for number, text in zip(numbers, texts, strict=True)]
    _write(options.out, prompts, texts, numbers)
    print(printable(f"{options.out}: {len(texts)} texts"))


def _parse_arguments(args: list[str]) -> Namespace:
    parser = CommandParser(prog="gpt2-pl generate", description=__doc__)
    add = parser.add_argument
    parser.add_run()
    add(
        "--prompt_file",
        required=True,
        metavar="FILE",
        help="UTF-8 text (.txt) with one prompt per line, JSON lines (.jsonl) with the key `prompt`, or, with --poems, "
        "numbered poems (.txt) that consist of their first lines",
    )
    parser.add_output("FILE", "output file, .txt or .jsonl")
    add("--max_new_tokens", type=int, default=220, metavar="N", help="tokens per prompt at most")
    add("--num_beams", type=int, metavar="N", help="search for the most probable text with N beams (default: sample)")
    length_help = "exponent of the length by which the log-probability of a beam is divided (default: 1.0)"
    add("--length_penalty", type=float, metavar="A", help=length_help)
    temperature_help = "0 for greedy decoding (default: 1.0)"
    add("--temperature", type=float, metavar="T", help=temperature_help)
    add("--top_k", type=int, metavar="K", help="sample from the K most likely tokens (default: all)")
    top_p_help = "sample from the most likely tokens with a total probability of P (default: 0.9)"
    add("--top_p", type=float, metavar="P", help=top_p_help)
    penalty_help = "penalty of tokens that have occurred; 1.0 applies no penalty"
    add("--repetition_penalty", type=float, default=1.0, metavar="PENALTY", help=penalty_help)
    ngram_help = "do not repeat n-grams of this size; 0 allows all"
    add("--no_repeat_ngram_size", type=int, default=0, metavar="N", help=ngram_help)
    add("--seed", type=int, help="seed of sampling; each prompt has its own generator (default: 0)")
    add("--batch_size", type=int, default=16, metavar="N", help="prompts per batch")
    add("--poems", action="store_true", help="read numbered poems and complete them")
    bias_help = "with --poems, do not make line ends likelier in long lines"
    add("--no_line_length_bias", action="store_true", help=bias_help)
    add("--precision", choices=("bf16", "fp32"), default="fp32", help="type of the weights")
    add("--compile", action="store_true", help="compile the blocks with torch.compile; pays off for many prompts")
    options = parser.parse_args(args)
    check_batches(options, _EXTENSIONS)
    return options


def _decoding_settings(options: Namespace) -> dict[str, Any]:
    """Return the settings of beam search if there are beams, else of sampling, and set the options' defaults.

    Raises:
        InputError: a setting is out of range, or belongs to the other way of decoding.
    """
    from gpt2_pl.beam_search import validate_beams
    from gpt2_pl.decoding import validate_processors
    from gpt2_pl.generation import validate_sampling

    processors = {key: getattr(options, key) for key in ("repetition_penalty", "no_repeat_ngram_size")}
    validate_processors(**processors)
    is_search = options.num_beams is not None
    for key in _SAMPLING if is_search else _BEAMS:
        if getattr(options, key) is not None:
            conflict = f"--num_beams searches for the most probable text and does not sample; leave out --{key}"
            raise InputError(conflict if is_search else f"--{key} requires --num_beams", key=key)
    for key, default in (_BEAMS | _SAMPLING).items():
        if getattr(options, key) is None:
            setattr(options, key, default)
    if is_search:
        beams = {"num_beams": options.num_beams, "length_penalty": options.length_penalty}
        validate_beams(**beams, max_new_tokens=options.max_new_tokens)
        return beams | processors
    sampling = {key: getattr(options, key) for key in ("temperature", "top_k", "top_p")}
    validate_sampling(**sampling, max_new_tokens=options.max_new_tokens)
    return sampling | processors


def read_prompts(file: str, poems: bool) -> tuple[list[str], list[int] | None]:
    """Read the prompts of a file.

    Args:
        file: ``.txt`` with one prompt per line, or ``.jsonl`` with the key ``prompt``.
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


def _parse_prompt(line: str, where: str) -> str:
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        prompt = json.loads(line)["prompt"]
        if isinstance(prompt, str) and prompt.encode():  # lone surrogates raise UnicodeError, which is a ValueError
            return prompt
    raise InputError(f'{where} must be a JSON object with text in the key "prompt"', key="prompt")


def _encode_prompts(prompts: list[str], tokenizer: Tokenizer, max_length: int, file: str) -> list[list[int]]:
    """Return the token ids of each prompt.

    Raises:
        InputError: a prompt has no token, or leaves no room for a new one.
    """
    ids = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]  # as in training
    for number, (prompt, prompt_ids) in enumerate(zip(prompts, ids, strict=True), start=1):
        where = f"prompt_file: {file}, prompt {number}"
        if not prompt_ids:
            raise InputError(f"{where}: the tokenizer of the run gives no token for {shorten(prompt)}", key="prompt")
        if len(prompt_ids) >= max_length:
            expected = f"have at most {max_length - 1} tokens, which leaves room for one new token"
            raise InputError(f"{where} must {expected}, got {len(prompt_ids)}", key="prompt")
    return ids


def _continue(
    task: TextGenerator, tokenizer: Tokenizer, ids: list[list[int]], options: Namespace, settings: dict[str, Any]
) -> list[str]:
    """Return each prompt with its continuation; prompts of similar length are generated together."""
    from rich.progress import track

    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [""] * len(ids)
    for start in track(range(0, len(order), options.batch_size), "Generating", transient=True):
        batch = order[start : start + options.batch_size]
        continuations = task.continue_prompts(
            tokenizer,
            [ids[i] for i in batch],
            seeds=[(options.seed * _SEED_STRIDE + i) % 2**63 for i in batch],
            max_new_tokens=options.max_new_tokens,
            **settings,
        )
        for i, new_ids in zip(batch, continuations, strict=True):
            texts[i] = tokenizer.decode([*ids[i], *new_ids], skip_special_tokens=False)
    return texts


def _write(out: Path, prompts: list[str], texts: list[str], numbers: list[int] | None) -> None:
    """Write texts as JSON lines, as numbered poems, or as text with a blank line after each."""
    with atomic_write(out) as file:
        if out.suffix.lower() == ".jsonl":
            for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                number = {} if numbers is None else {"number": numbers[i]}
                file.write(json.dumps({"prompt": prompt, "text": text, **number}, ensure_ascii=False) + "\n")
        elif numbers is not None:
            file.write("\n".join(f"{number}\n\n{text}" for number, text in zip(numbers, texts, strict=True)))
        else:
            file.writelines(f"{text}\n\n" for text in texts)
