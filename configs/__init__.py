"""Configuration files of tasks, strategies, trainers and sweeps, and the names by which they are found anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path

from gpt2_pl.errors import InputError
from gpt2_pl.filesystem import require_file

KINDS = ("task", "strategy", "trainer", "sweep", "course/cs224n")  # subfolders; files beside them are whole runs
_ROOT = Path(__file__).parent


def packaged_configs() -> dict[str, Path]:
    """Return the included configuration files by name, such as ``task/sst5`` and ``quickstart``."""
    files = [*sorted(_ROOT.glob("*.yaml")), *(file for kind in KINDS for file in sorted((_ROOT / kind).glob("*.yaml")))]
    return {file.relative_to(_ROOT).with_suffix("").as_posix(): file for file in files}


def config_path(name: str, key: str = "config") -> Path:
    """Return the configuration file that a name stands for; a file of the user's own comes first.

    Args:
        name: a file, or an included configuration with or without ``configs/`` and ``.yaml``, such as ``task/sst5``.
        key: the option that holds the name, for error messages.

    Raises:
        InputError: there is neither such a file nor such an included configuration.
    """
    plain = name.removeprefix("configs/").removesuffix(".yaml")
    included = packaged_configs()
    try:
        return require_file(name, key)
    except InputError as error:
        if plain in included:
            return included[plain]
        if near := _nearest(name, plain, included):
            raise InputError(f"{error}; did you mean {near}?") from None
        if "there is no " in str(error):
            raise InputError(f"{error}; `gpt2-pl configs` lists those that come with the library") from None
        raise


def _nearest(name: str, plain: str, included: Iterable[str]) -> str | None:
    """Return the file beside ``name``, or the included configuration, whose name is the most similar."""
    path = Path(name)
    try:
        beside = [str(file) for file in path.expanduser().parent.glob("*.yaml")] if not path.is_dir() else []
    except (OSError, RuntimeError, ValueError):
        return None
    leaves = {known.rpartition("/")[2]: known for known in included if not known.startswith("course/")}
    for typed, known in ((name, {file: file for file in beside}), (plain, {n: n for n in included}), (plain, leaves)):
        if close := get_close_matches(typed, known, 1, cutoff=0.75):
            return known[close[0]]
    return None


def description(file: Path) -> str:
    """Return the first sentence of the comment at the start of a configuration file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.removeprefix("#").strip() for line in comment)
    return re.split(r"(?<!et al)\. ", text, maxsplit=1)[0].removesuffix(".")
