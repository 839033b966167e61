"""Reading rows: CSV, TSV, JSON lines and Parquet files and hub datasets, through ``datasets``."""

from __future__ import annotations

import codecs
import csv
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.errors import InputError, RunError
from gpt2_pl.files import existing_file, room, whole_file

if TYPE_CHECKING:
    from datasets import Dataset

_MRPC_COLUMN = "#1 String"
_JSON = "as JSON"  # the one field of a value that is kept so
_JSON_FORMAT = 1  # part of every cache key; raised when what is cached changes
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
    value stays the text it is. An empty line is no row; one of blanks is a bad row where there is one column. JSON
    lines hold one object a line; one array of objects will do too.

    Args:
        file: its path; the ending says the format.
        key: the option that held it, for error messages.
        quoting: whether double quotes in delimited text enclose values; by default in every file but MRPC's.
        skip_bad: leave rows out that are not UTF-8, have more or fewer values than the header, or are no JSON object.
        streaming: read while going through the rows: ``rows`` is then an ``IterableDataset``.

    Raises:
        InputError: no such file, another format, no rows, or a row that cannot be read.
        RunError: there is no room to cache the rows.
    """
    path = existing_file(file, key)
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise InputError(f"{key}: {file} does not end in one of {', '.join(_BUILDERS)}")
    if path.stat().st_size == 0:
        raise InputError(f"{key}: {file} is empty")
    import datasets

    datasets.disable_progress_bars()
    if builder == "json":
        return _read_json(path, key, skip_bad, streaming)
    options: dict[str, Any] = {}
    bad: dict[int, str] = {}
    if builder == "csv":
        options, bad = _csv_options(path, key, quoting, skip_bad)
    elif streaming:
        options["batch_size"] = 10_000  # a whole row group otherwise
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would tell errors beside ours
    try:
        data_files = str(path.resolve())
        with caching():
            rows = datasets.load_dataset(builder, data_files=data_files, split="train", streaming=streaming, **options)
        empty = next(iter(rows), None) is None
    except RunError:
        raise
    except Exception as error:  # pandas', pyarrow's and the library's own classes
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"{key}: {file} cannot be read as {path.suffix[1:]}: {reason}") from error
    if empty:
        raise InputError(f"{key}: {file} has no rows")
    return Source(rows, file, bad)


def caching() -> AbstractContextManager[None]:
    """Around what ``datasets`` caches: a disk that is full is a RunError that names the cache."""
    import datasets

    return room(Path(datasets.config.HF_DATASETS_CACHE))


def _csv_options(path: Path, key: str, quoting: bool | None, skip_bad: bool) -> tuple[dict[str, Any], dict[int, str]]:
    """How ``datasets`` is to read delimited text, and the rows it cannot read."""
    from datasets import Features, Value

    csv.field_size_limit(sys.maxsize)
    columns, delimiter = _header(path, key, quoting)
    if quoting is None:
        quoting = _MRPC_COLUMN not in columns
    # pandas, which `datasets` reads with, gives this name to a column without one
    names = [name or f"Unnamed: {i}" for i, name in enumerate(columns)]
    if len(set(names)) < len(names):
        raise InputError(f"{key}: {path} names a column twice in its header: {columns}")
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        n_rows, bad, records = 0, {}, [0]  # a record is what pandas counts: the header, rows and blank lines
        settings: dict[str, Any] = {"quoting": csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE}
        reader = enumerate(csv.reader(lines, delimiter=delimiter, strict=True, **settings))
        next(reader)  # the header
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
            blank = len(cells) == 1 and cells[0] != "" and not cells[0].strip(" \t")
            if not cells or (blank and len(names) > 1):
                continue
            n_rows += 1
            reason = "" if len(cells) == len(names) else f"it has {len(cells)} values, and the header {len(names)}"
            if blank:  # pandas would leave it out unseen
                reason = "it is blank"
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


def _header(path: Path, key: str, quoting: bool | None) -> tuple[list[str], str]:
    """The names in the header of delimited text, and which delimiter gives the most of them."""
    found: list[tuple[list[str], str]] = []
    for delimiter in _DELIMITERS:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            how: dict[str, Any] = {"quoting": csv.QUOTE_NONE if quoting is False else csv.QUOTE_MINIMAL}
            try:
                found.append((next(csv.reader(lines, delimiter=delimiter, strict=True, **how)), delimiter))
            except csv.Error:
                continue  # a delimiter that stands within quotes
    if not found:
        raise InputError(f"{key}: {path}: a double quote opens a name in the header and does not close it")
    columns, delimiter = max(found, key=lambda pair: len(pair[0]))
    text = "".join(columns)
    if not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text):
        raise InputError(f"{key}: {path}: the header is not UTF-8 text; save the file as UTF-8")
    if "\0" in text:
        raise InputError(f"{key}: {path}: the header holds NUL; is it UTF-16? Save the file as UTF-8")
    if not text.strip():
        raise InputError(f"{key}: {path}: its first line is blank; it must name the columns")
    return columns, delimiter


def _read_json(path: Path, key: str, skip_bad: bool, streaming: bool) -> Source:
    """The rows of a file of JSON lines, or of one JSON array: every value is what Python's ``json`` says it is.

    The loader of ``datasets`` would turn texts that look like dates into dates, and "0" beside false into 0. A column
    with values of several kinds, or nested ones, holds objects with the JSON of each; :func:`value_of` reads it.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter
    from pyarrow.lib import ArrowException

    bad: dict[int, str] = {}
    kinds: dict[str, set[type]] = {}
    n_rows = 0
    for n_rows, row in enumerate(_json_rows(path, key), start=1):
        if isinstance(row, str):
            if not skip_bad:
                raise InputError(f"{key}: {path}, row {n_rows} cannot be read: {row}")
            bad[n_rows] = row
            continue
        for name, value in row.items():
            kinds.setdefault(name, set()).add(type(value))
    if n_rows == len(bad) or not kinds:
        raise InputError(f"{key}: {path} has no rows{' that can be read' if bad else ''}")
    features = datasets.Features({name: _json_feature(found) for name, found in kinds.items()})

    def rows() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(_json_rows(path, key), start=1):
            if number not in bad and isinstance(row, dict):
                yield {
                    name: {_JSON: json.dumps(row.get(name))} if isinstance(features[name], dict) else row.get(name)
                    for name in features
                }

    if streaming:
        return Source(datasets.IterableDataset.from_generator(rows, features=features), str(path), bad)
    status = path.stat()
    identity = f"{_JSON_FORMAT} {path.resolve()} {status.st_size} {status.st_mtime_ns} {sorted(bad)}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
    file = Path(datasets.config.HF_DATASETS_CACHE) / "gpt2_pl" / f"rows-{digest}.arrow"
    if not file.is_file():
        try:
            with whole_file(file, "wb") as out, ArrowWriter(stream=out, features=features) as writer:
                for row in rows():
                    writer.write(row)
                writer.finalize()
        except InputError:
            raise
        except (ValueError, TypeError, OverflowError, ArrowException) as error:
            raise InputError(f"{key}: {path} cannot be read as JSON: {str(error).splitlines()[0]}") from error
    return Source(datasets.Dataset.from_file(str(file)), str(path), bad)


def _json_feature(found: set[type]) -> Any:
    """How the values of a column are kept: as what they are, or else as their JSON."""
    from datasets import Value

    found = found - {type(None)}
    plain = {str: "string", bool: "bool", int: "int64", float: "float64"}
    return Value(plain[next(iter(found))]) if len(found) == 1 and found <= plain.keys() else {_JSON: Value("string")}


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """What a column of a row holds."""
    value = row[column]
    return json.loads(value[_JSON]) if isinstance(value, dict) and value.keys() == {_JSON} else value


def _json_rows(path: Path, key: str) -> Iterator[dict[str, Any] | str]:
    """Every row of a file of JSON lines or of one JSON array; of one that is no object with names of its own, why."""
    with path.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
        if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            try:
                yield from map(_object, _parsed(first + lines.read()))
            except ValueError as error:
                raise InputError(f"{key}: {path} cannot be read as a JSON array: {error}") from None
            return
        for line in itertools.chain([first], lines):
            if not line.strip():
                continue
            try:
                yield _object(_parsed(line))
            except ValueError as error:
                yield str(error)


def _parsed(text: bytes) -> Any:
    """What JSON says. Raises ValueError: nothing, in one line."""
    try:
        value = json.loads(text.decode().removeprefix("\ufeff"), object_pairs_hook=_unique, parse_int=_whole_number)
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
    except UnicodeError:
        raise ValueError("it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _whole_number(digits: str) -> int:
    if not -(2**63) <= (value := int(digits)) < 2**63:
        raise ValueError(f"it has a number beyond 64 bits: {digits[:30]}")
    return value


def _object(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else "it is no JSON object"


def read_hub(hub_id: str, split: str, key: str, config: str | None = None) -> Source:
    """One split of a hub dataset, in one of its configurations where it has several.

    Raises:
        InputError: the dataset cannot be had.
    """
    import datasets

    try:
        with caching():
            return Source(datasets.load_dataset(hub_id, config, split=split), f"{hub_id} ({split})")
    except RunError:
        raise
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
    text = value_of(row, column)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{source}, row {number}: {column!r} is {text!r}; it must hold text")
    return text


def label_of(row: Mapping[str, Any], column: str, names: Sequence[str], source: str, number: int) -> int:
    """The class index in a column of row ``number``, given as one of the class names or as an index.

    Where a name is a number, a number is a name, of equal value (``4.0`` is ``4``), and never an index.

    Raises:
        InputError: neither of them.
    """
    value = value_of(row, column)
    text = "" if value is None else str(value).strip()
    if text in names:
        return names.index(text)
    numbers = [_decimal(name) for name in names]
    numbered = any(number is not None for number in numbers)
    if (given := _decimal(text)) is not None:
        among: Sequence[Any] = numbers if numbered else range(len(names))
        if among.count(given) == 1 and (numbered or text[0] != "-"):
            return among.index(given)
    raise InputError(
        f"{source}, row {number}: the label in {column!r} is {value!r}; "
        f"it must be {'' if numbered else f'0 to {len(names) - 1} or '}one of {', '.join(names)}"
    )


def _decimal(text: str) -> Decimal | None:
    """The number that plain digits say; None for any other text."""
    return Decimal(text) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) else None
