"""Classify every row of a file with the model of a run, or predict a number for every row with a regressor.

Rows are streamed, so that files may exceed the memory.
"""

from __future__ import annotations

import csv
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.support.parser import CommandParser, check_batches
from gpt2_pl.errors import InputError, printable
from gpt2_pl.filesystem import atomic_write

if TYPE_CHECKING:
    from gpt2_pl.datamodules.rows import RowSource
    from gpt2_pl.tasks.protocols import NumberPredictor, TextClassifier

_CHUNK_BATCHES = 64  # number of batches that are read, sorted by length and written together
InputRow = tuple[int, dict[str, str]]  # number of a row in its file, from 1, and its texts by template field
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": None}  # by the extension of the output file


def main(args: list[str]) -> None:
    """Run ``gpt2-pl classify``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: an argument, the checkpoint or a row is invalid.
    """
    options = _parse_arguments(args)
    temperature = _read_temperature(options.run) if options.calibrated else 1.0

    import torch

    from gpt2_pl.commands.support.settings import best_precision
    from gpt2_pl.commands.support.trained_model import load_run_tokenizer, load_task, require_protocol
    from gpt2_pl.datamodules.prompt_template import Template
    from gpt2_pl.datamodules.readers import read_file
    from gpt2_pl.tasks.protocols import NumberPredictor, TextClassifier

    task, checkpoint = load_task(options)
    is_regressor = isinstance(task, NumberPredictor)
    if not is_regressor:
        require_protocol(task, TextClassifier, checkpoint)
    elif options.calibrated:
        raise InputError(
            key="calibrated", value=True, expected=f"used with a classifier; {options.run} has a regressor"
        )
    spec = complete_prompt_spec(task, checkpoint)
    template = Template(spec["template"])
    tokenizer = load_run_tokenizer(options.run, task.config.vocab_size)
    skip = options.on_invalid_row == "skip"
    quoting = spec.get("quoting") if options.quoting is None else options.quoting == "true"
    source = read_file(options.input, "input", quoting)
    columns = select_columns(source, spec["columns"])
    counts = Counter(row is None for row in read_rows(source, columns, skip))  # all rows are checked before the first
    if not counts[False]:
        raise source.error(" has no valid rows")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = (options.precision or best_precision("auto")) == "bf16-mixed"
    task.to(device).eval()
    torch.backends.cuda.enable_cudnn_sdp(False)  # batches have many different lengths
    rows = (row for row in read_rows(source, columns, skip) if row is not None)
    labels = [] if is_regressor else spec["labels"]
    names = ["row", *template.fields, "prediction", *(f"p({label})" for label in labels)]
    n_classified = 0
    with (
        writer(options.out, names) as write,
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        for chunk in _chunks(rows, counts[False], _CHUNK_BATCHES * options.batch_size):
            ids = template.encode([fields for _, fields in chunk], tokenizer, spec["max_length"])
            empty = next((row for row, row_ids in zip(chunk, ids, strict=True) if not row_ids), None)
            if empty is not None and not skip:
                raise InputError(template.no_token(empty[1]), source=f"{source.name}, row {empty[0]}")
            encoded = [(row, row_ids) for row, row_ids in zip(chunk, ids, strict=True) if row_ids]
            n_classified += len(encoded)
            predicted = _predict(task, [row_ids for _, row_ids in encoded], options.batch_size, temperature, labels)
            for ((number, fields), _), cells in zip(encoded, predicted, strict=True):
                write([number, *fields.values(), *cells])
        if not n_classified:
            raise source.error(" has no valid rows")
    n_skipped = counts.total() - n_classified
    skipped = f"; {n_skipped} invalid rows are skipped" if n_skipped else ""
    print(printable(f"{options.out}: {n_classified} rows{skipped}"))


def _predict(
    task: Any, ids: list[list[int]], batch_size: int, temperature: float, labels: Sequence[str]
) -> Iterator[Sequence[object]]:
    """Yield the cells of every text: its class and probabilities, or its number if there are no classes."""
    if not labels:
        yield from ([float(f"{number:.7g}")] for number in predict_numbers(task, ids, batch_size))
        return
    for prediction, probabilities in classify(task, ids, batch_size, temperature):
        yield [labels[prediction], *(round(probability, 6) for probability in probabilities)]


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
    calibrated_help = "scale the probabilities by the temperature of RUN/calibration.json, which gpt2-pl inspect writes"
    add("--calibrated", action="store_true", help=calibrated_help)
    options = parser.parse_args(args)
    check_batches(options, _DELIMITERS)
    if options.calibrated and options.ckpt_path is not None:
        expected = "the best checkpoint (no --ckpt_path), for which the temperature was fitted"
        raise InputError(key="ckpt_path", value=options.ckpt_path, expected=f"with --calibrated {expected}")
    return options


def _read_temperature(run: Path) -> float:
    """Return the temperature that was fitted on the validation rows of a run.

    Raises:
        InputError: the run has no valid temperature.
    """
    from gpt2_pl.experiments.inspection.calibration import CALIBRATION_FILE
    from gpt2_pl.utils.run_schema import CalibrationRecord
    from gpt2_pl.utils.schema import validate
    from gpt2_pl.utils.yaml_json import read_json

    file = run / CALIBRATION_FILE
    if not file.is_file():
        message = f"{file} does not exist; write it with: gpt2-pl inspect {run} --out FOLDER"
        raise InputError(message, key="calibrated", value=True)
    return validate(CalibrationRecord, read_json(file), str(file)).temperature


def _chunks(rows: Iterator[InputRow], n_rows: int, size: int) -> Iterator[list[InputRow]]:
    """Yield rows in lists of ``size``, with a progress bar if standard output is a terminal."""
    from rich.progress import track

    is_hidden = not sys.stdout.isatty()
    for _ in track(range(0, n_rows, size), "Classifying", transient=True, disable=is_hidden):
        yield list(islice(rows, size))


def complete_prompt_spec(task: TextClassifier | NumberPredictor, checkpoint: Path) -> dict[str, Any]:
    """Return the prompt format of a checkpoint, which is complete and fits its model.

    Args:
        task: the classifier or regressor of the checkpoint.
        checkpoint: path of the checkpoint, for error messages.

    Raises:
        InputError: the prompt format is missing, incomplete, or does not fit the model.
    """
    from gpt2_pl.datamodules.prompt_template import Template

    spec: dict[str, Any] = task.prompt_spec or {}
    fault, num_classes = "", getattr(task, "num_classes", None)
    required = ("template", "columns", "max_length", *(() if num_classes is None else ("labels",)))
    if missing := [key for key in required if spec.get(key) is None]:
        fault = f"prompt_spec.{missing[0]} is missing"
    elif set(Template(spec["template"]).fields) != spec["columns"].keys() or not all(spec["columns"].values()):
        fault = "prompt_spec.columns must name a column for each template field"
    elif num_classes not in (None, len(spec.get("labels") or [])):
        fault = f"prompt_spec must have {num_classes} labels"
    elif not 1 <= spec["max_length"] <= task.max_length:
        fault = f"prompt_spec must have a max_length of 1 to {task.max_length}"
    if fault:
        raise InputError(f"{checkpoint} cannot be used to classify: {fault}", key="prompt_spec")
    return spec


def select_columns(source: RowSource, columns: dict[str, list[str]]) -> dict[str, str]:
    """Return the column of each template field: the first one that exists of its possible names.

    Raises:
        InputError: a column is missing.
    """
    from gpt2_pl.datamodules.rows import require_columns

    existing = source.columns
    selected = {field: next((name for name in names if name in existing), names[0]) for field, names in columns.items()}
    require_columns(source, list(selected.values()), keys="data.columns in training")
    return selected


def read_rows(source: RowSource, columns: dict[str, str], skip: bool) -> Iterator[InputRow | None]:
    """Yield the rows of a source.

    Args:
        source: the rows.
        columns: column of each template field.
        skip: whether to yield None for an invalid row instead of raising an error.

    Raises:
        InputError: a row is invalid.
    """
    from gpt2_pl.datamodules.rows import parse_text

    for number, row in source.read(list(dict.fromkeys(columns.values())), skip):
        valid: InputRow | None = None
        try:
            if not isinstance(row, str):
                valid = number, {key: parse_text(row, column, source.name, number) for key, column in columns.items()}
        except InputError:
            if not skip:
                raise
        yield valid


def _batches(task: TextClassifier | NumberPredictor, ids: list[list[int]], size: int) -> Iterator[tuple[Any, Any]]:
    """Yield row indices and batches of texts of similar length, on the device of a task."""
    import numpy as np
    import torch

    from gpt2_pl.datamodules.batching import TokenDataset, evaluation_batches

    offsets = np.cumsum([0, *map(len, ids)])
    rows = TokenDataset(np.fromiter(chain.from_iterable(ids), np.int32, offsets[-1]), offsets)
    for indices in evaluation_batches(rows.lengths, size):
        batch = {key: tensor.to(task.device) for key, tensor in rows.batch(indices).items()}
        yield torch.from_numpy(indices), batch


def predict_numbers(task: NumberPredictor, ids: list[list[int]], batch_size: int) -> list[float]:
    """Predict the number of every text in batches of similar length.

    Args:
        task: the regressor.
        ids: token ids of each text, at least one per text.
        batch_size: number of texts in a batch.

    Returns:
        The numbers in the order of the texts.
    """
    import torch

    numbers = torch.empty(len(ids))
    for indices, batch in _batches(task, ids, batch_size):
        numbers[indices] = task.predict_number(batch).float().cpu()
    return numbers.tolist()


def classify(
    task: TextClassifier, ids: list[list[int]], batch_size: int, temperature: float = 1.0
) -> list[tuple[int, list[float]]]:
    """Classify texts in batches of similar length.

    Args:
        task: the classifier.
        ids: token ids of each text, at least one per text.
        batch_size: number of texts in a batch.
        temperature: number that logits are divided by; it does not change the predicted classes.

    Returns:
        The class index and the probabilities of all classes for each text, in the order of the texts.
    """
    import torch

    probabilities = torch.empty(len(ids), task.num_classes)
    for indices, batch in _batches(task, ids, batch_size):
        probabilities[indices] = task.predict_proba(batch).float().cpu()
    predicted = task.predict_class(probabilities).tolist()
    if temperature != 1.0:
        smallest = torch.finfo(torch.float32).tiny
        probabilities = (probabilities.clamp_min(smallest).log() / temperature).softmax(-1)
    return list(zip(predicted, probabilities.tolist(), strict=True))


@contextmanager
def writer(out: Path, names: list[str]) -> Iterator[Callable[[list[Any]], object]]:
    """Open an output file and provide a function that writes the values of a row to it.

    Args:
        out: the file, which appears when all rows are written; its extension determines the format.
        names: names of the columns.

    Yields:
        A function of the values in the order of the columns.
    """
    delimiter = _DELIMITERS[out.suffix.lower()]
    with atomic_write(out) as file:
        if delimiter is None:

            def write_object(values: list[Any]) -> None:
                row = dict(zip(names, values, strict=True))
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

            yield write_object
        else:
            table = csv.writer(file, delimiter=delimiter)
            table.writerow(names)
            yield table.writerow
