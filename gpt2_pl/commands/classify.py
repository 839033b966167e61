"""Classify texts with the model of a run or of an exported folder, or predict a number for each with a regressor.

Rows of a file are streamed, so that files may exceed the memory.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_pl.commands.support.display import show
from gpt2_pl.commands.support.output import DELIMITERS, STANDARD_OUTPUT, row_writer
from gpt2_pl.commands.support.parser import CommandParser, check_batches, require_one
from gpt2_pl.commands.support.terminal import track
from gpt2_pl.errors import InputError, printable, require
from gpt2_pl.utils.columns import check_kept, choose_columns

if TYPE_CHECKING:
    from gpt2_pl.datamodules.rows import RowSource
    from gpt2_pl.inference.input_rows import InputRow
    from gpt2_pl.inference.predictor import Prediction, Predictor

_CHUNK_BATCHES = 64  # number of batches that are read, sorted by length and written together


def main(args: list[str]) -> None:
    """Run ``gpt2-pl classify``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: an argument, the model or a row is invalid.
    """
    options = _parse_arguments(args)

    import torch

    from gpt2_pl.commands.support.trained_model import load_predictor
    from gpt2_pl.inference.input_rows import read_rows, select_columns

    predictor = load_predictor(options, options.precision)
    predictor.require_prediction()
    if options.calibrated and predictor.is_regressor:
        expected = f"used with a classifier; {options.run} has a regressor"
        raise InputError(key="calibrated", value=True, expected=expected)
    torch.backends.cuda.enable_cudnn_sdp(False)  # batches have many different lengths
    skip = options.on_invalid_row == "skip"
    with ExitStack() as stack:
        source, possible = _open_source(options, predictor, stack)
        check_kept(options.keep, _written_columns(predictor), "keep")
        columns = select_columns(source, possible, options.keep)
        rows = read_rows(source, columns, skip, options.keep)
        counts = Counter(row is None for row in rows)  # all rows are checked before the first
        if not counts[False]:
            raise source.error(" has no valid rows")
        valid = (row for row in read_rows(source, columns, skip, options.keep) if row is not None)
        chunks = _chunks(valid, counts[False], _CHUNK_BATCHES * options.batch_size, options.out)
        predicted = _predicted(predictor, chunks, source, skip, options.batch_size)
        if options.out is None:
            numbers = [str(index) for index in range(len(predictor.labels))]
            n = show(predicted, numbers if options.labels == "numbers" else predictor.labels)
        else:
            n = _write(predicted, predictor, options)
    if options.out not in (None, STANDARD_OUTPUT):
        n_skipped = counts.total() - n
        skipped = f"; {n_skipped} invalid rows are skipped" if n_skipped else ""
        print(printable(f"{options.out}: {n} rows{skipped}"))


def _parse_arguments(args: list[str]) -> Namespace:
    parser = CommandParser(prog="gpt2-pl classify", description=__doc__)
    add = parser.add_argument
    parser.add_run("folder of the run or of an exported model, or a hub id")
    text_help = "classify this text; for a template of several fields, one text for each; can be given several times"
    add("--text", nargs="+", action="append", metavar="TEXT", help=text_help)
    input_help = "CSV, TSV, JSON lines or Parquet file with the columns of the training data, without labels; - for "
    add("--input", metavar="FILE", help=f"{input_help}standard input")
    add("--lines", action="store_true", help="every line of the input is a text")
    out_help = f"output file, {', '.join(DELIMITERS)}, or - for standard output"
    parser.add_output("FILE", out_help, required=False)
    add("--json", action="store_true", help="write JSON lines to standard output")
    keep_help = "copy this column of the input to the output, such as id; can be given several times"
    add("--keep", action="append", metavar="COLUMN", help=keep_help)
    add("--labels", choices=("names", "numbers"), default="names", help="how a predicted class is written")
    columns_help = "columns of the output, in this order, each with a new name if it has one (default: all)"
    add("--columns", nargs="+", metavar="NAME[=NEW]", help=columns_help)
    add("--batch_size", type=int, default=64, metavar="N", help="rows per batch")
    quoting_help = "whether double quotes enclose values in CSV and TSV files (default: as in training)"
    add("--quoting", choices=("true", "false"), help=quoting_help)
    invalid_help = "whether a row that cannot be read or has no text is an error or skipped"
    add("--on_invalid_row", choices=("error", "skip"), default="error", help=invalid_help)
    precision_help = "32-true is float32; bf16-mixed multiplies in bfloat16, which some hardware does faster"
    add("--precision", choices=("32-true", "bf16-mixed", "bf16-true"), default="32-true", help=precision_help)
    parser.add_calibrated()
    options = parser.parse_args(args)
    options.keep = options.keep or []
    _check_arguments(options)
    return options


def _check_arguments(options: Namespace) -> None:
    """Check that the arguments fit each other, and set the output if it is standard output.

    Raises:
        InputError: they do not.
    """
    require_one(options, "input", "text")
    if options.json:
        require(options.out in (None, STANDARD_OUTPUT), "json", True, "used without --out, or with --out -")
        options.out = STANDARD_OUTPUT
    if options.out is None:
        if options.input is not None:
            raise InputError("--out is required with --input; --out - writes to standard output", key="out")
        for key in ("columns", "keep"):
            require(not getattr(options, key), key, getattr(options, key), "used with --out or --json")
    if options.text is not None:
        defaults: dict[str, object] = {"keep": [], "quoting": None, "on_invalid_row": "error"}
        for key, value in defaults.items():
            require(getattr(options, key) == value, key, getattr(options, key), "used with --input")
    require(not options.lines or options.input is not None, "lines", True, "used with --input")
    check_batches(options, DELIMITERS)
    if options.calibrated and options.ckpt_path is not None:
        expected = "the best checkpoint (no --ckpt_path), for which the temperature was fitted"
        raise InputError(key="ckpt_path", value=options.ckpt_path, expected=f"with --calibrated {expected}")


def _open_source(
    options: Namespace, predictor: Predictor, stack: ExitStack
) -> tuple[RowSource, dict[str, Sequence[str]]]:
    """Open the rows, and return them with the possible columns of each field.

    Raises:
        InputError: the file is missing or cannot be read, or the texts do not fit the template.
    """
    from gpt2_pl.inference.input_rows import GivenTexts, open_input

    prompt = predictor.prompt
    if options.text is not None:
        return GivenTexts(prompt.rows(options.text), "text"), {field: [field] for field in prompt.fields}
    quoting = prompt.quoting if options.quoting is None else options.quoting == "true"
    if options.lines and len(prompt.fields) > 1:
        expected = f"used with a template of one field; this one has {', '.join(prompt.fields)}"
        raise InputError(key="lines", value=True, expected=expected)
    column = prompt.fields[0] if options.lines else None
    return stack.enter_context(open_input(options.input, quoting, column)), dict(prompt.columns)


def _chunks(rows: Iterator[InputRow], n_rows: int, size: int, out: Path | None) -> Iterator[list[InputRow]]:
    """Yield rows in lists of ``size``, with a progress bar unless the rows are shown on the terminal."""
    is_shown = out in (None, STANDARD_OUTPUT) and sys.stdout.isatty()
    starts = range(0, n_rows, size)
    for _ in starts if is_shown else track(starts, "Classifying", len(starts)):
        yield list(islice(rows, size))


def _predicted(
    predictor: Predictor, chunks: Iterable[list[InputRow]], source: RowSource, skip: bool, batch_size: int
) -> Iterator[tuple[InputRow, Prediction]]:
    """Yield the rows that have tokens, with their predictions, and warn of truncated ones after the last.

    Raises:
        InputError: a row has no token, and is not to be skipped, or all rows are skipped.
    """
    from gpt2_pl.datamodules.prompt_template import Truncation

    truncation = Truncation()
    for chunk in chunks:
        ids, counts = predictor.prompt.encode([row.texts for row in chunk], predictor.tokenizer)
        empty = next((row for row, row_ids in zip(chunk, ids, strict=True) if not row_ids), None)
        if empty is not None and not skip:
            raise InputError(predictor.prompt.no_token(empty.texts), source=f"{source.name}, row {empty.number}")
        rows = [row for row, row_ids in zip(chunk, ids, strict=True) if row_ids]
        truncation += counts
        yield from zip(rows, predictor.predict_ids([row_ids for row_ids in ids if row_ids], batch_size), strict=True)
    if not truncation.n_texts:
        raise source.error(" has no valid rows")
    predictor.prompt.warn_of_truncation(truncation)


def _written_columns(predictor: Predictor) -> list[str]:
    """Return the columns of the output without those that are copied."""
    return ["row", *predictor.prompt.fields, "prediction", *(f"p({label})" for label in predictor.labels)]


def _write(predicted: Iterable[tuple[InputRow, Prediction]], predictor: Predictor, options: Namespace) -> int:
    """Write a row for every prediction, and return their number.

    Raises:
        InputError: a chosen column does not exist, or two columns have the same name; see
            :mod:`gpt2_pl.utils.columns`.
    """
    names = _written_columns(predictor)
    pick, names = choose_columns([*names[:1], *options.keep, *names[1:]], options.columns, "columns")
    n = 0
    with row_writer(options.out, names, options.json) as write:
        for row, prediction in predicted:
            is_number = options.labels == "numbers" and prediction.class_index is not None
            value = prediction.class_index if is_number else prediction.value
            probability = (round(p, 6) for p in prediction.probabilities)
            write(pick([row.number, *row.kept, *row.texts.values(), value, *probability]))
            n += 1
    return n
