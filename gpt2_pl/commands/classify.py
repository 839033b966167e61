"""Classify every row of a file with the model of a run; rows are streamed, so that files may exceed the memory."""

from __future__ import annotations

import csv
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gpt2_pl.commands.support.parser import CommandParser, check_batches
from gpt2_pl.errors import InputError, printable
from gpt2_pl.filesystem import atomic_write

if TYPE_CHECKING:
    from gpt2_pl.datamodules.rows import RowSource
    from gpt2_pl.tasks.protocols import TextClassifier

_CHUNK_BATCHES = 64  # number of batches that are read, sorted by length and written together
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": None}  # by the extension of the output file


class InputRow(NamedTuple):
    """Row to classify: its number in the file, from 1, and its texts by template field."""

    number: int
    fields: dict[str, str]


def main(args: list[str]) -> None:
    """Run ``gpt2-pl classify``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: an argument, the checkpoint or a row is invalid.
    """
    options = _parse_arguments(args)

    import torch

    from gpt2_pl.commands.support.settings import best_precision
    from gpt2_pl.commands.support.trained_model import load_run_tokenizer, load_task
    from gpt2_pl.datamodules.prompt_template import Template
    from gpt2_pl.datamodules.readers import read_file
    from gpt2_pl.tasks.protocols import TextClassifier, lacks

    task, checkpoint = load_task(options)
    if not isinstance(task, TextClassifier):
        kind = f"{type(task).__name__}: {lacks(task, TextClassifier)}"
        raise InputError(f"{checkpoint} must be of a task that classifies text, got {kind}", key="RUN")
    check_prompt_spec(task, checkpoint)
    spec = task.prompt_spec
    assert spec is not None
    template = Template(spec["template"])
    tokenizer = load_run_tokenizer(options.run, task.config.vocab_size, str(checkpoint))
    skip = options.on_invalid_row == "skip"
    quoting = spec.get("quoting") if options.quoting is None else options.quoting == "true"
    source = read_file(options.input, "input", quoting)
    read_rows = reader(source, spec["columns"], skip)
    counts = Counter(row is None for row in read_rows())  # all rows are checked before the first is classified
    if not counts[False]:
        raise source.error(" has no valid rows")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = (options.precision or best_precision("auto")) == "bf16-mixed"
    task.to(device).eval()
    torch.backends.cuda.enable_cudnn_sdp(False)  # batches have many different lengths
    rows = (row for row in read_rows() if row is not None)
    with (
        writer(options.out, list(template.fields), spec["labels"]) as write,
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        for chunk in _chunks(rows, counts[False], _CHUNK_BATCHES * options.batch_size):
            ids = template.encode([row.fields for row in chunk], tokenizer, spec["max_length"])
            for row, (prediction, probabilities) in zip(chunk, classify(task, ids, options.batch_size), strict=True):
                write(row, prediction, probabilities)
    skipped = f"; {counts[True]} invalid rows are skipped" if counts[True] else ""
    print(printable(f"{options.out}: {counts[False]} rows{skipped}"))


def _parse_arguments(args: list[str]) -> Namespace:
    parser = CommandParser(prog="gpt2-pl classify", description=__doc__)
    add = parser.add_argument
    parser.add_run()
    input_help = "CSV, TSV, JSON lines or Parquet file with the columns of the training data, without labels"
    add("--input", required=True, metavar="FILE", help=input_help)
    parser.add_output("FILE", f"output file, {', '.join(_DELIMITERS)}")
    add("--batch_size", type=int, default=64, metavar="N", help="rows per batch")
    quoting_help = "whether double quotes enclose values in CSV and TSV files (default: as in training)"
    add("--quoting", choices=("true", "false"), help=quoting_help)
    invalid_help = "whether a row that cannot be read or has no text is an error or skipped"
    add("--on_invalid_row", choices=("error", "skip"), default="error", help=invalid_help)
    precision_help = "default: bf16-mixed if the hardware supports bfloat16, else 32-true"
    add("--precision", choices=("bf16-mixed", "32-true"), help=precision_help)
    options = parser.parse_args(args)
    check_batches(options, _DELIMITERS)
    return options


def _chunks(rows: Iterator[InputRow], n_rows: int, size: int) -> Iterator[list[InputRow]]:
    """Yield rows in lists of ``size``, with a progress bar if standard output is a terminal."""
    from rich.progress import track

    is_hidden = not sys.stdout.isatty()
    for _ in track(range(0, n_rows, size), "Classifying", transient=True, disable=is_hidden):
        yield list(islice(rows, size))


def check_prompt_spec(task: TextClassifier, checkpoint: Path) -> None:
    """Check that the prompt format of a checkpoint is complete and fits its model.

    Args:
        task: the classifier of the checkpoint.
        checkpoint: path of the checkpoint, for error messages.

    Raises:
        InputError: the prompt format is missing, incomplete, or does not fit the model.
    """
    from gpt2_pl.datamodules.prompt_template import Template

    spec: Any = task.prompt_spec
    if not spec:
        message = f"{checkpoint} must contain a template (prompt_spec); train it with data of this library"
        raise InputError(message, key="prompt_spec")
    fault = ""
    if missing := [key for key in ("template", "columns", "labels", "max_length") if spec.get(key) is None]:
        fault = f"prompt_spec.{missing[0]} is missing"
    elif set(Template(spec["template"]).fields) != spec["columns"].keys() or not all(spec["columns"].values()):
        fault = "prompt_spec.columns must name a column for each template field"
    elif len(spec["labels"]) != task.num_classes or not 1 <= spec["max_length"] <= task.max_length:
        fault = (
            f"prompt_spec must have {task.num_classes} labels and a max_length of 1 to {task.max_length}, as its "
            f"model, got {len(spec['labels'])} labels and {spec['max_length']}"
        )
    if fault:
        raise InputError(f"{checkpoint} is broken: {fault}", key="prompt_spec")


def reader(source: RowSource, columns: dict[str, list[str]], skip: bool) -> Callable[[], Iterator[InputRow | None]]:
    """Return a function that reads a source from its start.

    Args:
        source: the rows.
        columns: possible column names of each template field; the first one that exists is read.
        skip: whether to yield None for an invalid row instead of raising an error.

    Returns:
        A function that returns an iterator over the rows; iterating raises an InputError for an invalid row.

    Raises:
        InputError: a column is missing.
    """
    from gpt2_pl.datamodules.rows import parse_text, require_columns

    existing = source.columns
    selected = {field: next((name for name in names if name in existing), names[0]) for field, names in columns.items()}
    require_columns(source, list(selected.values()), keys="data.columns in training")

    def read_rows() -> Iterator[InputRow | None]:
        for number, row in source.read(list(dict.fromkeys(selected.values())), skip):
            valid = None
            try:
                if not isinstance(row, str):
                    fields = {key: parse_text(row, column, source.name, number) for key, column in selected.items()}
                    valid = InputRow(number, fields)
            except InputError:
                if not skip:
                    raise
            yield valid

    return read_rows


def classify(task: TextClassifier, ids: list[list[int]], batch_size: int) -> list[tuple[int, list[float]]]:
    """Classify texts in batches of similar length.

    Args:
        task: the classifier.
        ids: token ids of each text, at least one per text.
        batch_size: number of texts in a batch.

    Returns:
        The class index and the probabilities of all classes for each text, in the order of the texts.
    """
    import numpy as np
    import torch

    from gpt2_pl.datamodules.batching import TokenDataset, evaluation_batches

    offsets = np.cumsum([0, *map(len, ids)])
    rows = TokenDataset(np.fromiter(chain.from_iterable(ids), np.int32, offsets[-1]), offsets)
    probabilities = torch.empty(len(ids), task.num_classes)
    for indices in evaluation_batches(rows.lengths, batch_size):
        batch = {key: tensor.to(task.device) for key, tensor in rows.batch(indices).items()}
        probabilities[torch.from_numpy(indices)] = task.predict_proba(batch).float().cpu()
    return list(zip(task.predict_class(probabilities).tolist(), probabilities.tolist(), strict=True))


@contextmanager
def writer(out: Path, fields: list[str], labels: list[str]) -> Iterator[Callable[[InputRow, int, list[float]], None]]:
    """Open an output file and provide a function that writes a row to it.

    Args:
        out: the file, which appears when all rows are written; its extension determines the format.
        fields: template fields.
        labels: class names.

    Yields:
        A function of a row, its predicted class index and the probabilities of all classes.
    """
    names = ["row", *fields, "prediction", *(f"p({label})" for label in labels)]
    delimiter = _DELIMITERS[out.suffix.lower()]
    with atomic_write(out) as file:
        table = None if delimiter is None else csv.writer(file, delimiter=delimiter)
        if table is not None:
            table.writerow(names)

        def write(row: InputRow, prediction: int, probabilities: list[float]) -> None:
            values = [row.number, *row.fields.values(), labels[prediction], *(round(p, 6) for p in probabilities)]
            if table is not None:
                table.writerow(values)
            else:
                file.write(json.dumps(dict(zip(names, values, strict=True)), ensure_ascii=False) + "\n")

        yield write
