"""generate: continue prompts with a run's language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpt2_pl.commands.support.parser import CommandParser, best_checkpoint
from gpt2_pl.errors import InputError, printable, shorten
from gpt2_pl.filesystem import atomic_write, read_text, require_absent, require_file

_SEEDS = 1_000_003  # prompt n of seed s draws from a generator of its own, whatever else is asked


def main(args: list[str]) -> None:
    """Write what a run's model makes of every prompt of a file."""
    parser = CommandParser(plugins=True, prog="gpt2-pl generate", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "--prompt_file",
        required=True,
        help="UTF-8 text (.txt) with a prompt on every line, JSON lines (.jsonl) with a key `prompt`, or (--poems) "
        "poems' first lines",
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write, .txt or .jsonl; it must not exist")
    parser.add_argument("--ckpt_path", type=Path, help="instead of RUN/checkpoints/best.ckpt")
    parser.add_argument("--base", help="where the base of an adapter checkpoint lies now, if it has moved")
    parser.add_argument("--max_new_tokens", type=int, default=220)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--no_repeat_ngram_size", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--poems", action="store_true", help="the prompts are poems, each with its number before it")
    parser.add_argument(
        "--no_line_length_bias", action="store_true", help="poems: do not favour line ends in long lines"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="compile each block first, which takes a while")
    given = parser.parse_args(args)
    require_absent(given.out)
    if given.out.suffix.lower() not in (".txt", ".jsonl"):
        raise InputError(f"out: {given.out} does not end in .txt or .jsonl")
    if given.batch_size < 1:
        raise InputError(f"batch_size is {given.batch_size}; it must be at least 1")

    import torch
    from rich.progress import track

    from gpt2_pl.commands.export import load
    from gpt2_pl.generation import validate_sampling
    from gpt2_pl.tasks.protocols import TextGenerator, lacks
    from gpt2_pl.text.poems import LineLengthProcessor, MaxLinesCriteria, Poem, split_lines
    from gpt2_pl.text.tokenizer import load_tokenizer, validate_vocab_size

    settings: dict[str, Any] = {
        key: getattr(given, key)
        for key in ("temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size")
    }
    try:
        validate_sampling(**settings, max_new_tokens=given.max_new_tokens)
    except ValueError as error:
        raise InputError(str(error)) from None
    prompts, numbers = read_prompts(given.prompt_file, given.poems)
    checkpoint = given.ckpt_path or best_checkpoint(given.run)
    task = load(checkpoint, given.base)
    if not isinstance(task, TextGenerator):
        raise InputError(
            f"{checkpoint} is of a {type(task).__name__}, which generates no text: {lacks(task, TextGenerator)}"
        )
    tokenizer = load_tokenizer(given.run, "RUN")
    validate_vocab_size(tokenizer, task.config.vocab_size, str(checkpoint), "RUN's tokenizer.json")
    task.eval().to(
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=torch.bfloat16 if given.precision == "bf16" else torch.float32,
    )
    if given.compile:
        for block in task.backbone.h:
            block.compile(dynamic=True)
    if numbers is not None:
        V = task.config.vocab_size
        settings["stopping_criteria"] = MaxLinesCriteria(tokenizer, V)
        settings["logits_processors"] = [] if given.no_line_length_bias else [LineLengthProcessor(tokenizer, V)]
    ids = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]  # as in training
    for prompt, found in enumerate(ids, start=1):
        if not found:
            text = shorten(prompts[prompt - 1])
            raise InputError(
                f"prompt_file: {given.prompt_file}, prompt {prompt}: the run's tokenizer makes no token of {text}"
            )
        if len(found) >= task.max_length:
            raise InputError(
                f"prompt_file: {given.prompt_file}, prompt {prompt} has {len(found)} tokens; the model has room for "
                f"{task.max_length}, so that a prompt has at most {task.max_length - 1}"
            )
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # prompts of similar length together
    texts = [""] * len(ids)
    for start in track(range(0, len(order), given.batch_size), "Generating", transient=True):
        batch = order[start : start + given.batch_size]
        written = task.continue_prompts(
            tokenizer,
            [ids[i] for i in batch],
            seeds=[(given.seed * _SEEDS + i) % 2**63 for i in batch],
            max_new_tokens=given.max_new_tokens,
            **settings,
        )
        for i, new in zip(batch, written, strict=True):
            texts[i] = tokenizer.decode([*ids[i], *new], skip_special_tokens=False)
    if numbers is not None:
        poems = [Poem(number, split_lines(text)) for number, text in zip(numbers, texts, strict=True)]
        texts = [poem.text for poem in poems]
    with atomic_write(given.out) as file:
        if given.out.suffix.lower() == ".jsonl":
            rows: list[dict[str, Any]] = [{"prompt": p, "text": text} for p, text in zip(prompts, texts, strict=True)]
            for row, number in zip(rows, numbers or [], strict=False):
                row["number"] = number
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif numbers is not None:
            file.write("\n".join(f"{poem.number}\n\n{poem.text}" for poem in poems))
        else:
            file.writelines(f"{text}\n\n" for text in texts)
    print(printable(f"{given.out}: {len(texts)} texts"))


def read_prompts(file: str, poems: bool) -> tuple[list[str], list[int] | None]:
    """The prompts of a file, and their numbers where they are poems.

    Raises:
        InputError: no such file, no prompt, or a line that is not what it should be.
    """
    from gpt2_pl.datamodules.sonnets import read_poems

    path = require_file(file, "prompt_file")
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise InputError(f"prompt_file: {file} does not end in .txt or .jsonl")
    text = read_text(file, "prompt_file")
    if poems:
        found = read_poems(file, "prompt_file")
        return [poem.text for poem in found], [poem.number for poem in found]
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError(f"prompt_file: {file} has no prompt")
    if path.suffix.lower() == ".jsonl":
        prompts = []
        for number, line in lines:
            try:
                prompts.append(json.loads(line)["prompt"])
                str(prompts[-1]).encode()  # halves of surrogate pairs are no text
            except (ValueError, TypeError, KeyError, RecursionError):
                raise InputError(f'prompt_file: {file}, line {number} is not an object with "prompt"') from None
            if not isinstance(prompts[-1], str) or not prompts[-1]:
                raise InputError(f"prompt_file: {file}, line {number}: the prompt is {prompts[-1]!r}; it must be text")
        return prompts, None
    return [line for _, line in lines], None
