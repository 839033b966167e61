"""Reading rows: CSV, TSV, JSON lines and Parquet files and hub datasets, through ``datasets``."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_DELIMITERS = ("\t", ",", ";")
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_file(file: str, key: str) -> Dataset:
    """The rows of a local file, in its order.

    Delimited text is UTF-8 with a header; the header tells whether tabs, commas or semicolons separate, and every
    value stays the text it is. JSON lines hold one object a line.

    Args:
        file: its path; the ending says the format.
        key: the option that held it, for error messages.

    Raises:
        InputError: no such file, another format, no rows, or bytes that cannot be read.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"{key}: {'a folder, not a file' if path.is_dir() else 'there is no file'}: {file}")
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise InputError(f"{key}: {file} does not end in one of {', '.join(_BUILDERS)}")
    if path.stat().st_size == 0:
        raise InputError(f"{key}: {file} is empty")
    options = _csv_options(path, key) if builder == "csv" else {}
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(builder, data_files=str(path.resolve()), split="train", **options)
    except Exception as error:  # pandas', pyarrow's and the library's own classes
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"{key}: {file} cannot be read as {path.suffix[1:]}: {reason}") from error
    if len(rows) == 0:
        raise InputError(f"{key}: {file} has no rows")
    return rows


def _csv_options(path: Path, key: str) -> dict[str, Any]:
    from datasets import Features, Value

    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            header = lines.readline()
            has_rows = any(line.strip() for line in lines)
    except UnicodeDecodeError as error:
        raise InputError(f"{key}: {path} is not UTF-8 text: {error}") from None
    if not has_rows:
        raise InputError(f"{key}: {path} has no rows below its header")
    delimiter = max(_DELIMITERS, key=header.count)
    columns = next(csv.reader([header], delimiter=delimiter), [])
    # pandas, which `datasets` reads with, gives this name to a column without one
    names = [name or f"Unnamed: {i}" for i, name in enumerate(columns)]
    if len(set(names)) < len(names):
        raise InputError(f"{key}: {path} names a column twice in its header: {columns}")
    return {
        "sep": delimiter,
        "encoding": "utf-8-sig",
        "keep_default_na": False,  # "null" and "NA" are words
        "features": Features({name: Value("string") for name in names}),
    }


def read_hub(hub_id: str, split: str, key: str) -> Dataset:
    """One split of a hub dataset.

    Raises:
        InputError: the dataset cannot be had.
    """
    import datasets

    try:
        return datasets.load_dataset(hub_id, split=split)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{key}: the hub's dataset {hub_id!r}, split {split!r}, cannot be had ({reason}); without a network, "
            "give files: --data.train_file, --data.val_file, --data.test_file"
        ) from error


def require_columns(
    rows: Dataset, columns: Sequence[str], source: str, keys: str = "data.columns and data.label_column"
) -> None:
    """Raise an InputError that names the source and its columns unless it has ``columns``, which ``keys`` chose."""
    if missing := [column for column in columns if column not in rows.column_names]:
        raise InputError(
            f"{source} has no column {missing[0]!r}; it has {', '.join(map(repr, rows.column_names))} "
            f"({keys} say which to read)"
        )


def text_of(row: Mapping[str, Any], column: str, source: str, number: int) -> str:
    """The text in a column of row ``number`` (from 1, the header not counted).

    Raises:
        InputError: it is missing, not text, or blank.
    """
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{source}, row {number}: {column!r} is {text!r}; it must hold text")
    return text


def label_of(row: Mapping[str, Any], column: str, names: Sequence[str], source: str, number: int) -> int:
    """The class index in a column of row ``number``, given as an index or as one of the class names.

    Raises:
        InputError: neither of them.
    """
    value = row[column]
    text = "" if value is None else str(value).strip()
    if text in names:
        return names.index(text)
    try:
        index = float(text)
    except ValueError:
        index = -1.0
    if index.is_integer() and 0 <= index < len(names):
        return int(index)
    raise InputError(
        f"{source}, row {number}: the label in {column!r} is {value!r}; "
        f"it must be 0 to {len(names) - 1} or one of {', '.join(names)}"
    )
