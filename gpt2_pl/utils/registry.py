"""Classes by import path: what a checkpoint may name. Looking a class up never imports anything."""

from __future__ import annotations

import sys
from typing import Any, Self

_PACKAGES = ("gpt2_pl.tasks", "gpt2_pl.surgery")  # their classes are named by the package, not by the file


def class_path(cls: type) -> str:
    """Return the path that checkpoints and configurations name a class by, such as ``gpt2_pl.tasks.LanguageModel``."""
    for package in _PACKAGES:
        if cls.__module__.startswith(f"{package}.") and getattr(sys.modules.get(package), cls.__name__, None) is cls:
            return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


class Registered:
    """Mixin whose direct subclasses (the roots) know all classes derived from them that have been imported."""

    # Without annotations: jsonargparse does not check the arguments of a dataclass with a ClassVar among its bases.
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
        """Return the class that ``path`` names: any derived one if called on a root, else this class itself.

        Returns:
            None if no such class has been imported.
        """
        candidates = cls._classes.values() if cls.is_root else (cls,)
        return next((one for one in candidates if class_path(one) == path), None)
