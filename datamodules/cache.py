"""Cache files of preprocessed data, recomputed when missing or damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gpt2_pl.errors import RunError
from gpt2_pl.filesystem import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_DIGEST_SIZE = hashlib.sha256().digest_size


def cached(name: str, key: Any, schema: pa.Schema, batches: Callable[[], Iterable[pa.RecordBatch]]) -> Dataset:
    """Return computed rows as a dataset that is memory-mapped from a cache file.

    Args:
        name: prefix of the file name.
        key: JSON-serializable value of everything that the rows depend on.
        schema: schema of the rows.
        batches: computes the rows; called only if they are not cached.

    Returns:
        The rows.

    Raises:
        InputError: raised by ``batches``, and nothing is cached; or the cache folder is not writable.
        RunError: the disk is full, or the written file cannot be read.
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
    """Return computed contents, memory-mapped from a cache file.

    The file ends with the SHA-256 of its contents, so that a truncated, overwritten or unreadable file is detected and
    written again.

    Args:
        name: name of the file; a digest of the key is appended to its stem.
        key: JSON-serializable value of everything that the contents depend on.
        write: writes the contents; called only if they are not cached.

    Returns:
        The contents and the path of the file.

    Raises:
        InputError: raised by ``write``, and nothing is cached; or the cache folder is not writable.
        RunError: the disk is full, or the written file cannot be read.
    """
    import datasets

    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    file = Path(datasets.config.HF_DATASETS_CACHE) / "gpt2_pl" / f"{Path(name).stem}-{digest}{Path(name).suffix}"
    contents = _read_verified(file)
    if contents is None:
        with atomic_write(file, "w+b") as out:
            write(out)
            out.seek(0)
            out.write(hashlib.file_digest(out, "sha256").digest())
        contents = _read_verified(file)
    if contents is None:
        raise RunError(f"{file} cannot be read after it was written; set HF_DATASETS_CACHE to another folder")
    return contents, file


def _read_verified(file: Path) -> pa.Buffer | None:
    """Return the contents of a cache file, or None if the file is missing or damaged."""
    import pyarrow as pa

    try:
        if not file.is_file():  # opening a named pipe would wait for a writer
            return None
        buffer = pa.memory_map(str(file)).read_buffer()
    except (OSError, pa.ArrowException):
        return None
    end = buffer.size - _DIGEST_SIZE
    if end < 0 or hashlib.sha256(buffer.slice(0, end)).digest() != buffer.slice(end).to_pybytes():
        return None
    return buffer.slice(0, end)
