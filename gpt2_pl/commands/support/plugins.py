"""Import of the user's own modules, which are in the working directory or installed, and which the user names."""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import gpt2_pl
from gpt2_pl.errors import InputError, nearest
from gpt2_pl.utils.user_code import add_package, find_fault, located

CLASS_KEYS = {  # keys whose values may be names of classes
    *("model", "model.surgery", "model.optimizer", "model.schedule", "data"),
    *("trainer.callbacks", "trainer.logger", "trainer.strategy", "trainer.profiler"),
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
        raise InputError(key="plugin", value=name, expected="the import name of a module, such as mine for mine.py")
    add_working_folder()
    module = _import(name, "plugin", f"plugin: {name}")
    if module is None:
        message = f"plugin: there is no module {name!r}, in the working directory or among installed packages"
        raise InputError(message, key="plugin", value=name)
    return module


def import_class(path: str, key: str, source: str = "") -> None:
    """Import the module of a class that the user's configuration names; ignore a name without a module.

    Args:
        path: path of the class, such as ``mine.TopBlocks``.
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
        key = re.sub(r"(\.help|\.class_path|\+)*$", "", key)
        message = f"{key}: there is no module {path.rpartition('.')[0]!r}"
        if module is not None:
            classes = [cls for cls in dir(module) if inspect.isclass(getattr(module, cls, None))]
            near = nearest(path[len(name) + 1 :], classes)
            message = f"{key}: there is no class {path!r}{'' if near is None else f'; did you mean {name}.{near}?'}"
        raise InputError(message, key=key, value=path, source=source)


def _import(name: str, key: str, what: str, source: str = "") -> ModuleType | None:
    """Import a module, or return None if it does not exist."""
    add_package(name)
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            return None
        if isinstance(error, SyntaxError):
            text = located(error, error.filename or name, error.lineno)
        else:
            fault = find_fault(error)
            text = located(error, name, None) if fault is None else fault.text
        raise InputError(f"{what} cannot be imported: {text}", key=key, source=source) from error
