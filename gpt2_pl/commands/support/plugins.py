"""Import of the user's own modules, which are in the working directory or installed, and which the user names."""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import gpt2_pl
from gpt2_pl.errors import InputError, nearest
from gpt2_pl.utils.user_code import PACKAGES, located

CLASS_MODULES = {  # keys whose values may be names of classes, and the modules of such classes
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
    """Append the working directory to ``sys.path``, after installed packages, so that it cannot replace them.

    A checkout of this library is removed from ``sys.path``, because its ``callbacks/`` and ``datamodules/`` would hide
    the user's folders of the same names. :mod:`gpt2_pl` does not need it after it is imported.
    """
    folder, checkout = os.getcwd(), os.path.realpath(Path(gpt2_pl.__file__).parents[1])
    if folder not in sys.path:
        sys.path.append(folder)
    if gpt2_pl.IS_CHECKOUT and checkout != os.path.realpath(folder):
        sys.path[:] = [path for path in sys.path if os.path.realpath(path) != checkout]


def import_plugin(name: str) -> ModuleType:
    """Import a module that ``--plugin`` names, from the working directory or from installed packages.

    Raises:
        InputError: the name is not a module's, the module does not exist, or its import fails.
    """
    if not _DOTTED.fullmatch(name):
        hint = f", such as {stem}" if _DOTTED.fullmatch(stem := re.sub(r"\.py$", "", os.path.basename(name))) else ""
        raise InputError(key="plugin", value=name, expected=f"the import name of a module{hint}")
    add_working_folder()
    module = _import(name, "plugin", f"plugin: {name}")
    if module is None:
        message = f"plugin: there is no module {name!r}, in the working directory or among installed packages"
        raise InputError(message, key="plugin", value=name)
    return module


def import_class(path: str, key: str, source: str = "") -> None:
    """Import the module of a class that the user's configuration names; ignore a name without a module.

    Args:
        path: path of the class, such as ``mine.BitFit``.
        key: key of the class, for error messages.
        source: the file that names it, for error messages; empty for a flag.

    Raises:
        InputError: the class does not exist, or the import of its module fails.
    """
    name, module = path, None
    while module is None and _DOTTED.fullmatch(path) and (name := name.rpartition(".")[0]):  # for nested classes
        module = _import(name, key, f"{key}: {path}", source)
    if module is not None:
        with suppress(AttributeError):
            operator.attrgetter(path[len(name) + 1 :])(module)
            return
    if "." in path and _DOTTED.fullmatch(path) and not os.path.exists(path):  # it may be a file with arguments
        key = key.removesuffix(".help")
        plain_key = key.replace("model.init_args.", "model.").removesuffix(".class_path").removesuffix("+")
        missing = f"class {path!r}" if module is not None else f"module {path.rpartition('.')[0]!r}"
        message = f"{key}: there is no {missing}{nearest_class(plain_key, path)}"
        raise InputError(message, key=plain_key, value=path, source=source)


def nearest_class(key: str, path: str) -> str:
    """Return a hint ``"; did you mean PATH?"`` with the class of the nearest name, or an empty string.

    Args:
        key: key of the class, such as ``model.surgery``, whose modules are searched.
        path: name of a class with or without a module, which is searched as well.
    """
    classes: dict[str, str] = {}
    for module_name in (*CLASS_MODULES.get(key, ()), path.rpartition(".")[0]):
        try:
            module = importlib.import_module(module_name)
        except (ImportError, ValueError):
            continue
        for name in getattr(module, "__all__", dir(module)):
            if not name.startswith("_") and inspect.isclass(getattr(module, name, None)):
                classes.setdefault(name, f"{module_name}.{name}")
    near = nearest(path.rpartition(".")[2], classes)
    return "" if near is None else f"; did you mean {classes[near]}?"


def _import(name: str, key: str, what: str, source: str = "") -> ModuleType | None:
    """Import a module, or return None if it does not exist."""
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
        message = f"{what} cannot be imported: {located(error, file, line)}"
        raise InputError(message, key=key, source=source) from error
