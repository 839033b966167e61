"""Registry of classes by import path, for the classes that checkpoints name. A lookup never imports a module."""

from __future__ import annotations

import sys
from typing import Any, Self

_PACKAGES = ("gpt2_pl.tasks", "gpt2_pl.surgery")  # Their classes are named by the package, not by the file.


def class_path(cls: type) -> str:
    """Return the name of a class in checkpoints and configurations, such as ``gpt2_pl.tasks.LanguageModel``."""
    for package in _PACKAGES:
        if cls.__module__.startswith(f"{package}.") and getattr(sys.modules.get(package), cls.__name__, None) is cls:
            return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


class Registered:
    """Mixin that registers subclasses: each direct subclass (a root) keeps all imported classes derived from it."""

    # No annotations: jsonargparse does not check the arguments of a dataclass that has a ClassVar in a base class.
    _classes = dict[str, type[Any]]()
    is_root = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.is_root = Registered in cls.__bases__
        if cls.is_root:
            cls._classes = {}
        else:
            cls._classes[f"{cls.__module__}.{cls.__qualname__}"] = cls

    @classmethod
    def find(cls, path: object) -> type[Self] | None:
        """Return the class with the given path: any derived class if called on a root, otherwise only this class.

        Returns:
            The class, or None if no class with this path has been imported.
        """
        candidates = cls._classes.values() if cls.is_root else (cls,)
        return next((candidate for candidate in candidates if class_path(candidate) == path), None)
