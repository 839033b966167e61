"""GPT-2 from scratch, with composable fine-tuning strategies."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_pl.beams import beam_search
    from gpt2_pl.generation import generate
    from gpt2_pl.inference.loading import load
    from gpt2_pl.model import GPT2, GPT2Config
    from gpt2_pl.optim import AdamW

__version__ = "0.1.0"
__all__ = ["GPT2", "AdamW", "GPT2Config", "__version__", "beam_search", "generate", "load"]

_ROOT = Path(__file__).resolve().parents[1]
_CHECKOUT_PACKAGES = {f"gpt2_pl.{name}": _ROOT / name for name in ("datamodules", "callbacks", "configs")}


class _CheckoutFinder:
    """Import finder for subpackages that are next to this folder in a checkout and inside it once installed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the specification of one of these subpackages; None for any other module."""
        folder = _CHECKOUT_PACKAGES.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


IS_CHECKOUT = (_ROOT / "datamodules" / "batching.py").is_file()
if IS_CHECKOUT:
    sys.meta_path.append(_CheckoutFinder)

_LAZY_IMPORTS = {
    "GPT2": "gpt2_pl.model",
    "GPT2Config": "gpt2_pl.model",
    "AdamW": "gpt2_pl.optim",
    "beam_search": "gpt2_pl.beams",
    "generate": "gpt2_pl.generation",
    "load": "gpt2_pl.inference.loading",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that light commands never load torch."""
    if name in _LAZY_IMPORTS:
        return getattr(import_module(_LAZY_IMPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
