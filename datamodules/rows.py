"""Reading rows: CSV, TSV, JSON lines and Parquet files and hub datasets, through ``datasets``."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.errors import InputError
from gpt2_pl.files import whole_file

if TYPE_CHECKING:
    from datasets import Dataset

_MRPC_COLUMN = "#1 String"
_DELIMITERS = ("\t", ",", ";")
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class Source:
    """Rows to read and what they are called.

    Args:
        rows: in the order of their source, without those that could not be read.
        name: for messages.
        skipped: the numbers, from 1, of the rows that could not be read, and why.
    """

    rows: Dataset
    name: str
    skipped: dict[int, str] = field(default_factory=dict)

    def numbers(self) -> Iterator[int]:
        """The number in the source, from 1, of each row and so on."""
        return (number for number in itertools.count(1) if number not in self.skipped)


def read_file(
    file: str, key: str, quoting: bool | None = None, skip_bad: bool = False, streaming: bool = False
) -> Source:
    """The rows of a local file, in its order.

    Delimited text is UTF-8 with a header; the header tells whether tabs, commas or semicolons separate, and every
    value stays the text it is. JSON lines hold one object a line.

    Args:
        file: its path; the ending says the format.
        key: the option that held it, for error messages.
        quoting: whether double quotes in delimited text enclose values; by default in every file but MRPC's.
        skip_bad: leave rows out that are not UTF-8, have more or fewer values than the header, or are no JSON object.
        streaming: read while going through the rows: ``rows`` is then an ``IterableDataset``.

    Raises:
        InputError: no such file, another format, no rows, or a row that cannot be read.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"{key}: {'a folder, not a file' if path.is_dir() else 'there is no file'}: {file}")
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise InputError(f"{key}: {file} does not end in one of {', '.join(_BUILDERS)}")
    if path.stat().st_size == 0:
        raise InputError(f"{key}: {file} is empty")
    options: dict[str, Any] = {}
    bad: dict[int, str] = {}
    data_files = str(path.resolve())
    if builder == "csv":
        options, bad = _csv_options(path, key, quoting, skip_bad)
    elif builder == "json":
        bad = _bad_json(path, key, skip_bad)
        data_files = str(_without_lines(path, bad)) if bad else data_files
    elif streaming:
        options["batch_size"] = 10_000  # a whole row group otherwise
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(builder, data_files=data_files, split="train", streaming=streaming, **options)
        empty = next(iter(rows), None) is None
    except Exception as error:  # pandas', pyarrow's and the library's own classes
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"{key}: {file} cannot be read as {path.suffix[1:]}: {reason}") from error
    if empty:
        raise InputError(f"{key}: {file} has no rows")
    return Source(rows, file, bad)


def _csv_options(path: Path, key: str, quoting: bool | None, skip_bad: bool) -> tuple[dict[str, Any], dict[int, str]]:
    """How ``datasets`` is to read delimited text, and the rows it cannot read."""
    from datasets import Features, Value

    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        header = lines.readline()
        delimiter = max(_DELIMITERS, key=header.count)
        columns = next(csv.reader([header], delimiter=delimiter), [])
        if quoting is None:
            quoting = _MRPC_COLUMN not in columns
        # pandas, which `datasets` reads with, gives this name to a column without one
        names = [name or f"Unnamed: {i}" for i, name in enumerate(columns)]
        if len(set(names)) < len(names):
            raise InputError(f"{key}: {path} names a column twice in its header: {columns}")
        csv.field_size_limit(sys.maxsize)
        n_rows, bad, records = 0, {}, [0]  # a record is what pandas counts: the header, rows and blank lines
        settings: dict[str, Any] = {"quoting": csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE}
        reader = enumerate(csv.reader(lines, delimiter=delimiter, strict=True, **settings), start=1)
        while True:
            try:
                record, cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:  # where it ends is anybody's guess, so that it cannot be skipped
                raise InputError(
                    f"{key}: {path}, row {n_rows + 1}: a double quote opens a value and does not close it ({error}); "
                    "where quotes are part of the text, give data.quoting false"
                ) from None
            if not cells or (len(cells) == 1 and cells[0] and not cells[0].strip(" \t")):
                continue
            n_rows += 1
            reason = "" if len(cells) == len(names) else f"it has {len(cells)} values, and the header {len(names)}"
            if not (text := "".join(cells)).isascii() and any("\udc80" <= character <= "\udcff" for character in text):
                reason = "it is not UTF-8 text"
            if reason and not skip_bad:
                raise InputError(f"{key}: {path}, row {n_rows} cannot be read: {reason} (delimiter {delimiter!r})")
            if reason:
                bad[n_rows] = reason
                records.append(record)
    if n_rows == len(bad):
        raise InputError(f"{key}: {path} has no rows{' that can be read' if bad else ''} below its header")
    options = {
        **settings,
        "sep": delimiter,
        "encoding": "utf-8-sig",
        "keep_default_na": False,  # "null" and "NA" are words
        "features": Features({name: Value("string") for name in names}),
    }
    if bad:
        options.update(skiprows=records[1:], encoding_errors="replace")
    return options, bad


def _bad_json(path: Path, key: str, skip_bad: bool) -> dict[int, str]:
    """Which rows of a file of JSON lines are none."""
    bad: dict[int, str] = {}
    n_rows = 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            if n_rows == 0 and line.lstrip().startswith(b"["):
                return {}  # one array: pyarrow reads that too
            n_rows += 1
            try:
                if not isinstance(json.loads(line.decode("utf-8-sig" if n_rows == 1 else "utf-8")), dict):
                    raise ValueError("it is no JSON object")
            except ValueError as error:
                reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
                if not skip_bad:
                    raise InputError(f"{key}: {path}, row {n_rows} cannot be read: {reason}") from None
                bad[n_rows] = reason
    if n_rows == len(bad):
        raise InputError(f"{key}: {path} has no rows that can be read")
    return bad


def _without_lines(path: Path, bad: Collection[int]) -> Path:
    """A copy of a file of JSON lines without some of its rows, in the cache of ``datasets``."""
    import datasets

    status = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:32]
    copy = Path(datasets.config.HF_DATASETS_CACHE) / "gpt2_pl" / f"{key}.jsonl"
    with path.open("rb") as lines, whole_file(copy, "wb") as out:
        rows = (line for line in lines if line.strip())
        out.writelines(line.rstrip(b"\r\n") + b"\n" for n, line in enumerate(rows, start=1) if n not in bad)
    return copy


def read_hub(hub_id: str, split: str, key: str, config: str | None = None) -> Source:
    """One split of a hub dataset, in one of its configurations where it has several.

    Raises:
        InputError: the dataset cannot be had.
    """
    import datasets

    try:
        return Source(datasets.load_dataset(hub_id, config, split=split), f"{hub_id} ({split})")
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{key}: the hub's dataset {hub_id!r}, split {split!r}, cannot be had ({reason}); without a network, "
            "give files: --data.train_file, --data.val_file, --data.test_file"
        ) from error


def require_columns(
    names: Sequence[str], columns: Sequence[str], source: str, keys: str = "data.columns and data.label_column"
) -> None:
    """Raise an InputError that names the source and its columns unless those that ``keys`` chose are among them."""
    if missing := [column for column in columns if column not in names]:
        raise InputError(
            f"{source} has no column {missing[0]!r}; it has {', '.join(map(repr, names))} ({keys} say which to read)"
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
