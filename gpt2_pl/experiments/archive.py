"""Archive of the records of runs: settings, scores and rows, without weights, logs and images.

An archive is a tar file with xz compression. Its members are files of run folders and the descriptions of searches,
named relative to ``lightning_logs``. Unpacked there, they are runs that are compared, and that a sweep does not repeat.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from gpt2_pl.errors import InputError
from gpt2_pl.filesystem import atomic_write, require_file
from gpt2_pl.utils.yaml_json import read_json

SUFFIX = ".tar.xz"
_RECORDS = ("metrics.json", "config.yaml", "sweep.json", "calibration.json")
_TABLES = ("predictions_*.csv", "losses_*.csv", "outputs_*.csv", "validations/step_*/*.csv")
_PREPARATIONS = (".search", ".pretrain")  # endings of the folders that a sweep writes beside its own
_MAX_BYTES, _MAX_FILES = 2**31, 200_000  # of an unpacked archive


def write_archive(folders: Iterable[Path], file: Path, validation_rows: bool = True) -> int:
    """Archive the records of ended runs; equal records of equal times give an equal file.

    The searches and the pretraining runs of a sweep are archived with it.

    Args:
        folders: run folders, or folders that contain some.
        file: path of the archive.
        validation_rows: whether to include the validation rows of trials, and of runs with test rows. Intervals of
            test scores do not need them; without them, those of validation scores are over seeds alone.

    Returns:
        The number of runs.

    Raises:
        InputError: a folder contains no ended run, or two folders have the same name.
    """
    members: dict[str, Path] = {}
    num_runs = 0
    for folder in folders:
        runs = [run for part in _with_preparations(folder) for run in _ended_runs(part)]
        if not runs:
            expected = "a folder with runs that have ended"
            raise InputError(f"RUN must be {expected}, got {folder}", key="RUN", value=folder, expected=expected)
        num_runs += len(runs)
        for path in sorted({path for run in runs for path in _files(run, validation_rows)}):
            name = path.relative_to(folder.parent).as_posix()
            if members.setdefault(name, path).resolve() != path.resolve():
                raise InputError(f"RUN: two folders have a file {name}", key="RUN", value=folder)
    with (
        atomic_write(file, "wb") as target,
        lzma.open(target, "wb", preset=9) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in _similar_together(members):
            info = tarfile.TarInfo(name)
            status = members[name].stat()
            info.size, info.mtime = status.st_size, int(status.st_mtime)
            with members[name].open("rb") as content:
                archive.addfile(info, content)
    return num_runs


@contextmanager
def unpacked(paths: Iterable[Path]) -> Iterator[list[Path]]:
    """Unpack the archives among paths into a temporary folder, which is deleted at the end.

    Args:
        paths: archives, and paths of run folders.

    Yields:
        The paths, with a folder in place of each archive.

    Raises:
        InputError: an archive is invalid.
    """
    with tempfile.TemporaryDirectory(prefix="gpt2_pl_") as temporary:
        folders = []
        for i, path in enumerate(paths):
            if path.name.endswith(SUFFIX):
                folder = Path(temporary) / str(i) / path.name
                folder.mkdir(parents=True)
                unpack(path, folder)
                folders.append(folder)
            else:
                folders.append(path)
        yield folders


def unpack(file: Path, folder: Path) -> None:
    """Unpack an archive, whose content is not trusted.

    Args:
        file: the archive.
        folder: an existing folder.

    Raises:
        InputError: the file is missing or no archive, or a member is no regular file below the folder, or too large.
    """
    path = require_file(file, "RUN")
    num_bytes = 0
    try:
        with tarfile.open(path, "r:xz") as archive:
            for count, member in enumerate(archive, start=1):
                num_bytes += member.size
                target, content = folder / _safe_name(member.name, file), archive.extractfile(member)
                if not member.isreg() or content is None:
                    raise InputError(f"{file}: {member.name[:200]!r} must be a regular file", key="RUN")
                if num_bytes > _MAX_BYTES or count > _MAX_FILES:
                    raise InputError(f"{file} must have at most {_MAX_FILES:,} files and 2 GiB unpacked", key="RUN")
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as out:
                    shutil.copyfileobj(content, out)
                os.utime(target, (member.mtime, member.mtime))
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, OverflowError, KeyError) as error:
        raise InputError(f"{file} cannot be unpacked: {' '.join(str(error).split())[:200]}", key="RUN") from None


def _safe_name(name: str, file: Path) -> PurePosixPath:
    """Return the name of a member as a relative path.

    Raises:
        InputError: it could denote a file outside the folder into which the archive is unpacked.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or re.search(r"[\\\0]|^[A-Za-z]:", name):
        raise InputError(f"{file}: {name[:200]!r} must be a relative path without ..", key="RUN")
    return path


def _with_preparations(folder: Path) -> list[Path]:
    """Return a folder and those of the searches and pretraining runs of the sweep in it."""
    beside = (folder.with_name(f"{folder.name}{suffix}") for suffix in _PREPARATIONS)
    return [folder, *(path for path in beside if path.is_dir())]


def _ended_runs(folder: Path) -> list[Path]:
    """Return the run folders at or below a folder whose status is finished or failed."""
    runs = sorted(file.parent for file in folder.glob("**/metrics.json"))
    return [run for run in runs if _status(run) in ("finished", "failed")]


def _status(run: Path) -> object:
    record = read_json(run / "metrics.json")
    return record.get("status") if isinstance(record, dict) else None


def _files(run: Path, validation_rows: bool) -> Iterator[Path]:
    """Return the records and tables of a run, and the files of the search that it is a trial of."""
    yield from (path for name in _RECORDS if (path := run / name).is_file())
    tables = [path for pattern in _TABLES for path in run.glob(pattern)]
    is_trial = run.name.startswith("trial_")
    if validation_rows or not (is_trial or any(path.stem.endswith("_test") for path in tables)):
        yield from tables
    else:
        yield from (path for path in tables if path.parent == run and not path.stem.endswith("_val"))
    if is_trial:
        search = run.parent
        beside = (search.with_name(f"{search.name}{suffix}") for suffix in (".json", ".journal"))
        yield from (path for path in beside if path.is_file())
        failed_at_once = (trial for trial in search.glob("trial_*") if not (trial / "metrics.json").is_file())
        yield from (path for trial in failed_at_once if (path := trial / "sweep.json").is_file())


def _similar_together(members: Iterable[str]) -> list[str]:
    """Sort names by the file's name first, so that similar contents compress together."""
    return sorted(members, key=lambda name: (name.rpartition("/")[2], name))
