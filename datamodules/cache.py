"""Cache files of preprocessed data, recomputed when missing or damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from gpt2_pl.errors import RunError, is_full, printable
from gpt2_pl.filesystem import atomic_write, reraise_disk_full

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
        InputError: raised by ``batches``; nothing is cached.
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
    written again. If the cache folder is not writable, a temporary folder replaces it until the process ends.

    Args:
        name: name of the file; a digest of the key is appended to its stem.
        key: JSON-serializable value of everything that the contents depend on.
        write: writes the contents; called only if they are not cached.

    Returns:
        The contents and the path of the file.

    Raises:
        InputError: raised by ``write``; nothing is cached.
        RunError: the disk is full, or the written file cannot be read.
    """
    import datasets

    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    file = Path(datasets.config.HF_DATASETS_CACHE) / "gpt2_pl" / f"{Path(name).stem}-{digest}{Path(name).suffix}"
    contents = _read_verified(file)
    if contents is None:
        file = _writable_path(file)
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


def _writable_path(file: Path) -> Path:
    """Return the path if its folder is writable, else a path in a temporary folder."""
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
            return Path(_temporary_folder(file.parent, printable(error.strerror)).name) / file.name


@cache
def _temporary_folder(folder: Path, reason: str) -> TemporaryDirectory[str]:
    """Create a folder that replaces an unwritable cache folder and is removed when the process ends."""
    rank_zero_warn(f"the cache {folder} cannot be written ({reason}); data are prepared again in every run")
    return TemporaryDirectory(prefix="gpt2_pl-", ignore_cleanup_errors=True)
