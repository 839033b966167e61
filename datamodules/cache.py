"""Files of what was computed from data, computed again where such a file is missing or damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, TYPE_CHECKING, Any, cast

from lightning.pytorch.utilities import rank_zero_warn

from gpt2_pl.errors import RunError, printable
from gpt2_pl.filesystem import atomic_write, is_full, reraise_disk_full

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_DIGEST_SIZE = hashlib.sha256().digest_size


def cached(name: str, key: Any, schema: pa.Schema, batches: Callable[[], Iterable[pa.RecordBatch]]) -> Dataset:
    """The rows that ``batches`` computes, in a file of the cache that is mapped into memory.

    Args:
        name: what is cached, for the file's name.
        key: everything that the rows depend on, as JSON can express it.
        schema: of the rows.
        batches: computes the rows.

    Raises:
        InputError: from ``batches``; nothing is cached then.
        RunError: the disk is full, or what was written cannot be read.
    """
    import datasets
    import pyarrow as pa

    def write(file: IO[bytes]) -> None:
        with pa.ipc.new_stream(file, schema) as writer:
            for batch in batches():
                writer.write_batch(batch)

    contents, file = cached_file(f"{name}.arrow", [key, schema.to_string()], write)
    table = pa.ipc.open_stream(contents).read_all()
    return datasets.Dataset(datasets.table.MemoryMappedTable(table, str(file)), fingerprint=file.stem)


def cached_file(name: str, key: Any, write: Callable[[IO[bytes]], None]) -> tuple[pa.Buffer, Path]:
    """What ``write`` writes, mapped into memory from a file of the cache.

    Behind the contents the file holds their SHA-256, so that one that was cut short, overwritten or is not readable is
    recognised and written again. Where the cache cannot be written, a temporary folder takes its place until the
    process ends.

    Args:
        name: of the file; its stem is followed by a digest of the key.
        key: everything that the contents depend on, as JSON can express it.
        write: writes them.

    Returns:
        The contents, and the file.

    Raises:
        InputError: from ``write``; nothing is cached then.
        RunError: the disk is full, or what was written cannot be read.
    """
    import datasets

    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    file = Path(datasets.config.HF_DATASETS_CACHE) / "gpt2_pl" / f"{Path(name).stem}-{digest}{Path(name).suffix}"
    contents = _read(file)
    if contents is None:
        file = _writable(file)
        contents = _read(file)
    if contents is None:
        with atomic_write(file, "wb") as out:
            digested = _Digested(out)
            write(cast("IO[bytes]", digested))
            out.write(digested.digest.digest())
        contents = _read(file)
    if contents is None:
        raise RunError(f"{file} cannot be read after it was written; HF_DATASETS_CACHE names another folder")
    return contents, file


def _read(file: Path) -> pa.Buffer | None:
    """The contents of a cache file; None where there is none or it is damaged."""
    import pyarrow as pa

    try:
        if not file.is_file():  # to open a pipe would wait for a writer
            return None
        whole = pa.memory_map(str(file)).read_buffer()
    except (OSError, pa.ArrowException):
        return None
    end = whole.size - _DIGEST_SIZE
    if end < 0 or hashlib.sha256(whole.slice(0, end)).digest() != whole.slice(end).to_pybytes():
        return None
    return whole.slice(0, end)


class _Digested:
    """A file to write to, and the SHA-256 of what was written."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write bytes."""
        self.digest.update(data)
        return self.file.write(data)


def _writable(file: Path) -> Path:
    """The path itself where a file can be written there, else one in a temporary folder."""
    with reraise_disk_full(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir():
                shutil.rmtree(file)
            with TemporaryFile(dir=file.parent):
                return file
        except OSError as error:
            if is_full(error):
                raise
            return Path(_substitute(file.parent, printable(error.strerror)).name) / file.name


@cache
def _substitute(folder: Path, reason: str) -> TemporaryDirectory[str]:
    """A folder in place of a cache that cannot be written, removed when the process ends."""
    rank_zero_warn(f"the cache {folder} cannot be written ({reason}); data are prepared again in every run")
    return TemporaryDirectory(prefix="gpt2_pl-", ignore_cleanup_errors=True)
