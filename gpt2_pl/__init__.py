"""GPT-2 from scratch, adapted to tasks by strategies that compose."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_pl.generation import generate
    from gpt2_pl.model import GPT2, GPT2Config
    from gpt2_pl.optim import AdamW

__version__ = "0.1.0"
__all__ = ["GPT2", "AdamW", "GPT2Config", "__version__", "generate"]

_ROOT = Path(__file__).parents[1]
if (_ROOT / "datamodules" / "batching.py").is_file():
    # A checkout: datamodules, callbacks and configs lie beside this folder.
    __path__.append(str(_ROOT))

_HOMES = {
    "GPT2": "gpt2_pl.model",
    "GPT2Config": "gpt2_pl.model",
    "AdamW": "gpt2_pl.optim",
    "generate": "gpt2_pl.generation",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that light commands never load torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
