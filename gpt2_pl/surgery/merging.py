"""Linear combinations of LoRA adapters (task arithmetic, Ilharco et al. 2023).

An adapter changes every adapted weight by s B A. A combination of adapters of one base is the same combination of these
changes, of a rank of at most the sum of the ranks. The singular value decomposition gives its best approximation of a
lower rank.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2_pl.errors import InputError, listing
from gpt2_pl.model import GPT2
from gpt2_pl.surgery.base import freeze_base
from gpt2_pl.surgery.lora import LoRAEmbedding, LoRALinear, PiSSALinear
from gpt2_pl.surgery.targets import plain_layer

MAX_TERMS = 100
_NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.I)
_MAX_COEFFICIENT = 1e6


class Term(NamedTuple):
    """Adapter with its coefficient in a combination."""

    coefficient: float
    adapter: str


class LowRank(NamedTuple):
    """Change B A of a weight, with B (out, r) and A (r, in)."""

    B: Tensor
    A: Tensor


def parse_combination(text: str) -> list[Term]:
    """Parse a combination of adapters, such as ``A + 0.5*B - C``.

    Operators are separated by blanks from the adapters, whose names may contain them. Quotes enclose names with blanks.

    Args:
        text: the combination.

    Returns:
        The terms in the order of their first occurrence, each adapter once.

    Raises:
        InputError: the text is no such combination.
    """
    try:
        tokens = shlex.split(re.sub(r"\s*\*\s*", "*", text))
    except ValueError as error:
        raise InputError(f"EXPRESSION {text!r}: {str(error).lower()}", key="EXPRESSION", value=text) from None
    coefficients: dict[str, float] = {}
    sign: float | None = 1.0  # None after a term
    for i, token in enumerate(tokens):
        if token in ("+", "-"):
            if sign is None or i == 0:
                sign = -1.0 if token == "-" else 1.0
                continue
            raise _invalid(text, f"an adapter before {token!r}", tokens[i - 1])
        if sign is None:
            raise _invalid(text, "an operator + or - between two adapters, with blanks around it", token)
        factor, star, name = token.rpartition("*")
        if not name or (star and not _NUMBER.fullmatch(factor)):
            raise _invalid(text, "terms such as RUN or 0.5*RUN", token)
        coefficient = sign * (float(factor) if star else 1.0)
        if abs(coefficient) > _MAX_COEFFICIENT:
            raise _invalid(text, f"coefficients of at most {_MAX_COEFFICIENT:g}", token)
        coefficients[name] = coefficients.get(name, 0.0) + coefficient
        sign = None
    if sign is not None:
        raise _invalid(text, "an adapter at its end", tokens[-1] if tokens else "")
    if len(coefficients) > MAX_TERMS:
        raise _invalid(text, f"at most {MAX_TERMS} adapters", str(len(coefficients)))
    return [Term(coefficient, name) for name, coefficient in coefficients.items()]


def _invalid(text: str, expected: str, found: str) -> InputError:
    message = f"EXPRESSION must have {expected}, got {found!r} in {text!r}"
    return InputError(message, key="EXPRESSION", value=text, expected=expected)


def lora_changes(model: GPT2, name: str) -> dict[str, LowRank]:
    """Return the change of every weight that LoRA adapts, in float64.

    Args:
        model: a GPT-2 with LoRA adapters.
        name: name of the adapter, for error messages.

    Raises:
        InputError: the model has no LoRA, or other parameters than those of the base and of LoRA.
    """
    adapters: dict[str, Any] = {
        n: m for n, m in model.named_modules() if type(m) in (LoRALinear, PiSSALinear, LoRAEmbedding)
    }
    known = {f"{path}.{key}" for path, module in adapters.items() for key in module.state_dict()}
    if foreign := model.state_dict().keys() - known - model.base_names:
        raise InputError(f"{name} has {listing(foreign)}; only LoRA adapters without DoRA can be merged")
    if not adapters:
        raise InputError(f"{name} has no LoRA adapter")
    changes = {}
    for path, module in adapters.items():
        A, B = (module.lora_A, module.lora_B) if isinstance(module, LoRAEmbedding) else module.factors()
        changes[path] = LowRank(module.scaling * B.detach().double(), A.detach().double())
    return changes


def combine(parts: Iterable[tuple[float, LowRank]], rank: int) -> tuple[LowRank, float, float]:
    """Return the best approximation of a linear combination of low-rank matrices by one of a given rank.

    Singular values that are rounding errors of the factors count as 0.

    Args:
        parts: coefficient and factors of each matrix.
        rank: largest rank of the approximation.

    Returns:
        Its factors with a common scale, in float64, and the squared Frobenius norms of the approximation and of the
        combination.
    """
    parts = list(parts)
    left = torch.cat([coefficient * B for coefficient, (B, _) in parts], dim=1)
    right = torch.cat([A for _, (_, A) in parts], dim=0)
    Q, R = torch.linalg.qr(left)
    P, T = torch.linalg.qr(right.T)
    U, S, V = torch.linalg.svd(R @ T.T)
    sizes = (abs(coefficient) * B.norm().item() * A.norm().item() for coefficient, (B, A) in parts)
    S = torch.where(torch.finfo(torch.float32).eps * math.fsum(sizes) < S, S, 0.0)
    root = S[:rank].sqrt()
    B, A = Q @ (U[:, : len(root)] * root), (root.unsqueeze(1) * V[: len(root)]) @ P.T
    return LowRank(B, A), S[:rank].square().sum().item(), S.square().sum().item()


def merge_adapters(
    model: GPT2, adapters: Sequence[tuple[float, Mapping[str, LowRank]]], rank: int | None = None
) -> float:
    """Add the linear combination of LoRA adapters to their base, as one LoRA adapter.

    Args:
        model: the base without adapters, changed in place.
        adapters: coefficient and :func:`lora_changes` of each adapter.
        rank: largest rank of the adapter of a weight; by default the largest of any adapter.

    Returns:
        Share of the squared Frobenius norm of the combination that this rank keeps, over all weights.
    """
    paths = sorted({path for _, changes in adapters for path in changes})
    if rank is None:
        rank = max(len(change.A) for _, changes in adapters for change in changes.values())
    kept = total = 0.0
    for path in paths:
        parts = [(coefficient, changes[path]) for coefficient, changes in adapters if path in changes]
        (B, A), kept_here, total_here = combine(parts, rank)
        layer: Any = plain_layer(model, path, "merge")
        module = (LoRAEmbedding if path == "wte" else LoRALinear)(layer, len(A), 1.0)
        with torch.no_grad():
            module.lora_B.copy_(B)
            module.lora_A.copy_(A)
        model.set_submodule(path, module.train(layer.training))
        kept, total = kept + kept_here, total + total_here
    freeze_base(model)
    return kept / total if total else 1.0
