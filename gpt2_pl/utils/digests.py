"""Digests of tensors and of source code, by which the results of two runs are compared."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import gpt2_pl
from gpt2_pl.utils.user_code import PACKAGES


def tensor_digests(tensors: Mapping[str, object]) -> dict[str, str]:
    """Return the digest of every tensor: the first 16 hexadecimal digits of the SHA-256 of its type, shape and bytes.

    Args:
        tensors: tensors by name, on any device; other values are left out.
    """
    import torch

    digests = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            digests[name] = sha.hexdigest()[:16]
    return digests


def first_difference(expected: Mapping[str, str], actual: Mapping[str, str]) -> tuple[str, int] | None:
    """Return the first name whose digests differ or are missing on one side, and the number of such names.

    Args:
        expected: digests by name; their order decides which name is first.
        actual: digests by name.

    Returns:
        None if all digests are equal.
    """
    names = [name for name in {**expected, **actual} if expected.get(name) != actual.get(name)]
    return (names[0], len(names)) if names else None


def code_digests() -> dict[str, str]:
    """Return the digest of the source code of this library and of every module that the user named, by package.

    Dependencies of this library, such as torch, are left out: they have versions.
    """
    sources = {"gpt2_pl": _library_digest()}
    for name in sorted(PACKAGES):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None:
            path = Path(file)
            sources[name] = _digest([path.parent if path.name == "__init__.py" else path])
    return sources


@cache
def _library_digest() -> str:
    """Return the digest of this library when it was first asked for: later changes of its files are not imported."""
    library = Path(gpt2_pl.__file__).parent
    root = library.parent if gpt2_pl.IS_CHECKOUT else library
    parts = [root / part for part in ("gpt2_pl", "datamodules", "callbacks")] if gpt2_pl.IS_CHECKOUT else [library]
    return _digest(parts)


def _digest(paths: list[Path]) -> str:
    """Return the digest of the names and contents of Python files, and of those below folders."""
    sha = hashlib.sha256()
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            name = file.name if file == path else file.relative_to(path.parent).as_posix()
            sha.update(f"{name.removeprefix('gpt2_pl/')}\n".encode() + file.read_bytes())
    return sha.hexdigest()[:16]
