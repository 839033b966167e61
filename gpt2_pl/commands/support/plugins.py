"""Code of the user's own: modules in the working folder or installed, imported because the user names them."""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

import gpt2_pl
from gpt2_pl.errors import InputError, nearest
from gpt2_pl.utils.user_code import PACKAGES, located

CLASS_MODULES = {  # keys whose values may be classes' names, and the modules that have such classes
    "model": ("gpt2_pl.tasks",),
    "model.surgery": ("gpt2_pl.surgery",),
    "model.optimizer": ("torch.optim",),
    "model.schedule": ("gpt2_pl.optim",),
    "data": ("gpt2_pl.datamodules",),
    "trainer.callbacks": ("gpt2_pl.callbacks", "lightning.pytorch.callbacks"),
    "trainer.logger": ("lightning.pytorch.loggers",),
    "trainer.strategy": ("lightning.pytorch.strategies",),
    "trainer.profiler": ("lightning.pytorch.profilers",),
}
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def add_working_folder() -> None:
    """Append the working folder to ``sys.path``: behind installed packages, which it therefore cannot replace.

    A checkout of this library is removed: its ``callbacks/`` and ``datamodules/`` would hide the user's own folders of
    these names, and :mod:`gpt2_pl`, once it is imported, finds its parts without it.
    """
    folder, checkout = os.getcwd(), os.path.realpath(Path(gpt2_pl.__file__).parents[1])
    if folder not in sys.path:
        sys.path.append(folder)
    if gpt2_pl.IS_CHECKOUT and checkout != os.path.realpath(folder):
        sys.path[:] = [path for path in sys.path if os.path.realpath(path) != checkout]


def import_plugin(name: str) -> ModuleType:
    """Import a module that a user names by ``--plugin``, from the working folder or from what is installed.

    Raises:
        InputError: a name that is not a module's, no such module, or one that fails when it is imported.
    """
    if not _DOTTED.fullmatch(name):
        hint = f", such as {stem}" if _DOTTED.fullmatch(stem := re.sub(r"\.py$", "", os.path.basename(name))) else ""
        raise InputError(f"plugin must be the import name of a module{hint}, got {name!r}")
    add_working_folder()
    module = _import(name, f"plugin: {name}")
    if module is None:
        raise InputError(f"plugin: there is no module {name!r}, in the working folder or among installed packages")
    return module


def import_class(path: str, key: str, where: str = "") -> None:
    """Import the module of a class that the user's configuration names; a name without a module is left alone.

    Args:
        path: of the class, such as ``mine.BitFit``.
        key: that holds it, for error messages.
        where: what precedes the key in error messages: ``"FILE: "`` for a configuration file's.

    Raises:
        InputError: there is no such class, or its module fails when it is imported.
    """
    module, found = path, None
    while found is None and _DOTTED.fullmatch(path) and (module := module.rpartition(".")[0]):  # or a class in a class
        found = _import(module, f"{where}{key}: {path}")
    if found is not None:
        try:
            operator.attrgetter(path[len(module) + 1 :])(found)
            return
        except AttributeError:
            pass
    if "." in path and _DOTTED.fullmatch(path) and not os.path.exists(path):  # a file may hold the arguments
        key = key.removesuffix(".help")
        name = key.replace("model.init_args.", "model.").removesuffix(".class_path").removesuffix("+")
        what = f"class {path!r}" if found is not None else f"module {path.rpartition('.')[0]!r}"
        raise InputError(f"{where}{key}: there is no {what}{nearest_class(name, path)}")


def nearest_class(key: str, path: str) -> str:
    """Return ``"; did you mean PATH?"`` with the class of the nearest name among those for a key, or nothing.

    Args:
        key: such as ``model.surgery``.
        path: a name, with or without a module, which is looked through as well.
    """
    classes: dict[str, str] = {}
    for place in (*CLASS_MODULES.get(key, ()), path.rpartition(".")[0]):
        try:
            module = importlib.import_module(place)
        except (ImportError, ValueError):
            continue
        for name in getattr(module, "__all__", dir(module)):
            if not name.startswith("_") and inspect.isclass(getattr(module, name, None)):
                classes.setdefault(name, f"{place}.{name}")
    near = nearest(path.rpartition(".")[2], classes)
    return "" if near is None else f"; did you mean {classes[near]}?"


def _import(name: str, what: str) -> ModuleType | None:
    """Import a module; None if there is none of that name."""
    PACKAGES.add(name.partition(".")[0])
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            return None
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
        file, line = (frames[-1].filename, frames[-1].lineno) if len(frames) > 1 else (name, None)
        if isinstance(error, SyntaxError):
            file, line = error.filename or file, error.lineno
        raise InputError(f"{what} cannot be imported: {located(error, file, line)}") from error
