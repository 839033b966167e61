"""classify: say of every row of a file what a run's model takes it for, reading and writing as it goes."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from gpt2_pl.commands.support.parser import CommandParser, best_checkpoint
from gpt2_pl.errors import InputError, printable
from gpt2_pl.filesystem import atomic_write, require_absent
from gpt2_pl.kernels.attention import set_cudnn_sdp

if TYPE_CHECKING:
    from gpt2_pl.datamodules.readers import RowSource
    from gpt2_pl.tasks.protocols import TextClassifier

_CHUNK = 64  # batches that are read, sorted by length and written together
_ENDINGS = {".csv": ",", ".tsv": "\t", ".jsonl": None}


class InputRow(NamedTuple):
    """A row to classify: its number in the file, from 1, and its texts by template field."""

    number: int
    fields: dict[str, str]


def main(args: list[str]) -> None:
    """Classify the rows of a file, which need no labels and may be more than fit in memory."""
    parser = CommandParser(plugins=True, prog="gpt2-pl classify", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "--input", required=True, help="CSV, TSV, JSON lines or Parquet file with the template's columns"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help=f"file to write: {', '.join(_ENDINGS)}; it must not exist"
    )
    parser.add_argument("--ckpt_path", type=Path, help="instead of RUN/checkpoints/best.ckpt")
    parser.add_argument("--base", help="where the base of an adapter checkpoint lies now, if it has moved")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--quoting", choices=("true", "false"), help="whether double quotes enclose values; by default as in training"
    )
    parser.add_argument(
        "--on_invalid_row", choices=("error", "skip"), default="error", help="what to do about rows without text"
    )
    parser.add_argument(
        "--precision", choices=("bf16-mixed", "32-true"), help="by default what the hardware is good at"
    )
    given = parser.parse_args(args)
    require_absent(given.out)
    if given.out.suffix.lower() not in _ENDINGS:
        raise InputError(f"out: {given.out} does not end in one of {', '.join(_ENDINGS)}")
    if given.batch_size < 1:
        raise InputError(f"batch_size is {given.batch_size}; it must be at least 1")

    import torch
    from rich.progress import track

    from gpt2_pl.commands.export import load
    from gpt2_pl.commands.support.settings import best_precision
    from gpt2_pl.datamodules.prompt_template import Template
    from gpt2_pl.datamodules.readers import read_file
    from gpt2_pl.tasks.protocols import TextClassifier, lacks
    from gpt2_pl.text.tokenizer import load_tokenizer, validate_vocab_size

    checkpoint = given.ckpt_path or best_checkpoint(given.run)
    task = load(checkpoint, given.base)
    if not isinstance(task, TextClassifier):
        raise InputError(
            f"{checkpoint} is of a {type(task).__name__}, which classifies no text: {lacks(task, TextClassifier)}"
        )
    if not task.prompt_spec:
        raise InputError(
            f"{checkpoint} does not say which template it learned with; train it with data of this library"
        )
    check_prompt_spec(task, checkpoint)
    tokenizer, template = load_tokenizer(given.run, "RUN"), Template(task.prompt_spec["template"])
    validate_vocab_size(tokenizer, task.config.vocab_size, str(checkpoint), "RUN's tokenizer.json")
    skip = given.on_invalid_row == "skip"
    quoting = task.prompt_spec.get("quoting") if given.quoting is None else given.quoting == "true"
    source = read_file(given.input, "input", quoting, skip)
    texts = reader(source, task.prompt_spec["columns"], skip)
    counts = Counter(text is None for text in texts())  # every row is checked before any is classified
    if not (n_rows := counts[False]):
        raise InputError(f"input: {given.input} has no rows that can be used")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = (given.precision or best_precision("auto")) == "bf16-mixed"
    task.to(device).eval()
    set_cudnn_sdp(False)  # batches are of many lengths
    with (
        writer(given.out, list(template.fields), task.prompt_spec["labels"]) as write,
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        n_classified = 0
        rows, n = (text for text in texts() if text is not None), _CHUNK * given.batch_size
        hidden = not sys.stdout.isatty()
        for _ in track(range(0, n_rows, n), "Classifying", transient=True, disable=hidden):
            chunk = list(islice(rows, n))
            ids = template.encode([text.fields for text in chunk], tokenizer, task.prompt_spec["max_length"])
            usable = [i for i, tokens in enumerate(ids) if tokens]
            if len(usable) < len(chunk) and not skip:
                text = next(text for text, tokens in zip(chunk, ids, strict=True) if not tokens)
                raise InputError(f"{source.name}, row {text.number}: {template.no_token(text.fields)}")
            n_classified += len(usable)
            outcomes = classify(task, [ids[i] for i in usable], given.batch_size)
            for i, (decision, probability) in zip(usable, outcomes, strict=True):
                write(chunk[i], decision, probability)
        if not n_classified:
            raise InputError(f"input: {given.input} has no rows that can be used")
    n_skipped = counts.total() - n_classified
    skipped = f"; {n_skipped} rows that cannot be used are left out" if n_skipped else ""
    print(printable(f"{given.out}: {n_classified} rows{skipped}"))


def check_prompt_spec(task: TextClassifier, checkpoint: Path) -> None:
    """Refuse a checkpoint whose wording is none, or is of another model.

    Raises:
        InputError: naming the checkpoint and what is wrong.
    """
    from gpt2_pl.datamodules.prompt_template import Template

    prompt_spec: Any = task.prompt_spec
    for key in ("template", "columns", "labels", "max_length"):
        if prompt_spec.get(key) is None:
            raise InputError(f"{checkpoint} does not say its {key}; it is broken")
    fields, names = Template(prompt_spec["template"]).fields, prompt_spec["columns"]
    if set(fields) != names.keys() or not all(names.values()):
        raise InputError(f"{checkpoint} does not say which columns its template's fields are; it is broken")
    if len(prompt_spec["labels"]) != task.num_classes or not 1 <= prompt_spec["max_length"] <= task.max_length:
        raise InputError(
            f"{checkpoint} says {len(prompt_spec['labels'])} labels and max_length {prompt_spec['max_length']}; "
            f"its model has {task.num_classes} classes and room for {task.max_length} tokens"
        )


def reader(source: RowSource, columns: dict[str, list[str]], skip: bool) -> Callable[[], Iterator[InputRow | None]]:
    """Make a function that reads a source from the start.

    Args:
        source: the rows.
        columns: template field -> the names that its column may have, the first of them that exists counts.
        skip: give None for a row that cannot be used, in place of an error.

    Raises:
        InputError: no such column; and when it comes to it, a row without text or a file that is broken.
    """
    from gpt2_pl.datamodules.readers import parse_text, require_columns

    names = source.columns
    chosen = {field: next((name for name in among if name in names), among[0]) for field, among in columns.items()}
    require_columns(source, list(chosen.values()), keys="the run's data.columns")

    def texts() -> Iterator[InputRow | None]:
        for number, row in source.read(list(dict.fromkeys(chosen.values()))):
            if isinstance(row, str):
                yield None
                continue
            try:
                fields = {field: parse_text(row, column, source.name, number) for field, column in chosen.items()}
            except InputError:
                if not skip:
                    raise
                yield None
                continue
            yield InputRow(number, fields)

    return texts


def classify(task: TextClassifier, ids: list[list[int]], batch_size: int) -> list[tuple[int, list[float]]]:
    """Return the class of every text and the probabilities of all classes, in the order of the texts.

    Args:
        task: the model.
        ids: of every text, at least one token id.
        batch_size: texts in a batch.
    """
    import numpy as np
    import torch

    from gpt2_pl.datamodules.batching import TokenDataset, evaluation_batches

    offsets = np.cumsum([0, *map(len, ids)])
    rows = TokenDataset(np.fromiter(chain.from_iterable(ids), np.int32, offsets[-1]), offsets)
    probability = torch.empty(len(ids), task.num_classes)
    for numbers in evaluation_batches(rows.lengths, batch_size):
        batch = {key: tensor.to(task.device) for key, tensor in rows.batch(numbers).items()}
        probability[torch.from_numpy(numbers)] = task.predict_proba(batch).float().cpu()
    return list(zip(task.predict_class(probability).tolist(), probability.tolist(), strict=True))


@contextmanager
def writer(out: Path, fields: list[str], labels: list[str]) -> Iterator[Callable[[InputRow, int, list[float]], None]]:
    """A function that writes one row: its number, its texts, the class and every class's probability."""
    names = ["row", *fields, "prediction", *(f"p({label})" for label in labels)]
    with atomic_write(out) as file:
        put = _line_writer(file, names, _ENDINGS[out.suffix.lower()])
        yield lambda text, decision, probability: put(
            [text.number, *text.fields.values(), labels[decision], *(round(p, 6) for p in probability)]
        )


def _line_writer(file: IO[str], names: list[str], delimiter: str | None) -> Callable[[list[Any]], Any]:
    if delimiter is None:
        return lambda values: file.write(json.dumps(dict(zip(names, values, strict=True)), ensure_ascii=False) + "\n")
    table = csv.writer(file, delimiter=delimiter)
    table.writerow(names)
    return table.writerow
