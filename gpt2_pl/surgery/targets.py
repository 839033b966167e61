"""Layers of a GPT-2 that adapters replace, by the names of targets."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from gpt2_pl.errors import InputError, require
from gpt2_pl.kernels.prepacked_linear import Linear
from gpt2_pl.utils.registry import class_path

if TYPE_CHECKING:
    from gpt2_pl.model import GPT2

# Maps a target to a layer of the block and a slice of its output (None: all of it); c_attn contains q, k and v.
TARGETS: dict[str, tuple[str, int | None]] = {
    "q": ("attn.c_attn", 0),
    "k": ("attn.c_attn", 1),
    "v": ("attn.c_attn", 2),
    "c_attn": ("attn.c_attn", None),
    "c_proj": ("attn.c_proj", None),
    "c_fc": ("mlp.c_fc", None),
    "mlp.c_proj": ("mlp.c_proj", None),
}

Layers = list[int] | int | str | None  # numbers of blocks


class AdaptedLinear(Linear):
    """Linear layer with additional parameters.

    ``weight`` and ``bias`` are the parameters of the replaced layer, under the same names.

    Args:
        linear: the layer to replace; its parameters are reused.

    Attributes:
        surgery: name of the surgery, for error messages.
    """

    surgery: ClassVar[str]

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # Linear.__init__ would create new parameters
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias


def plain_layer(model: GPT2, path: str, surgery: str) -> nn.Module:
    """Return the linear layer or token embedding at ``path``, if no other surgery has replaced it.

    Args:
        model: the GPT-2.
        path: such as ``h.0.mlp.c_fc`` or ``wte``.
        surgery: the name of the surgery that adapts the layer, for error messages.

    Raises:
        InputError: there is no layer at ``path``, or it is of another class.
    """
    try:
        layer = model.get_submodule(path)
    except AttributeError as error:  # Another surgery may have replaced a part of the model.
        raise InputError(f"{surgery}: there is no {path}: {error}") from None
    if (other := getattr(layer, "surgery", None)) is not None:
        raise InputError(f"{surgery}: {path} has an adapter of {other} already; use only one of them on a layer")
    if type(layer) not in (nn.Linear, Linear, nn.Embedding):
        raise InputError(f"{surgery}: {path} must be a plain layer, got a {class_path(type(layer))}")
    return layer


def target_layers(targets: list[str], surgery: str) -> dict[str, list[int] | None]:
    """Return the path within a block and the adapted slices (None: all) of every target layer.

    Args:
        targets: keys of ``TARGETS``; others are skipped.
        surgery: the name of the surgery, for error messages.

    Raises:
        InputError: a layer is targeted twice.
    """
    layers: dict[str, list[int] | None] = {}
    for target in filter(TARGETS.__contains__, targets):
        name, index = TARGETS[target]
        slices = layers.get(name, [])
        is_new = slices is not None and index not in slices and (index is not None or not slices)
        require(is_new, "targets", targets, f"different layers, without {name} twice", surgery)
        layers[name] = None if index is None else sorted([*(slices or []), index])
    return layers


def chosen_blocks(layers: Layers, n: int, surgery: str) -> list[int]:
    """Return the numbers of the chosen blocks.

    Args:
        layers: numbers from 0, or ranges such as ``"0-2,9-11"``; None for all blocks.
        n: number of blocks of the GPT-2.
        surgery: the name of the surgery, for error messages.

    Raises:
        InputError: a block does not exist, or none is chosen.
    """
    if layers is None:
        return list(range(n))
    expected, blocks = f"blocks from 0 to {n - 1}, such as '0-2,9-11'", set[int]()
    for part in layers if isinstance(layers, list) else str(layers).split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", str(part))
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (n, n)
        require(last < n, "layers", layers, expected, surgery)
        blocks.update(range(first, last + 1))
    require(bool(blocks), "layers", layers, expected, surgery)
    return sorted(blocks)
