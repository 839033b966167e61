"""AdamW, learning-rate schedules, and the parameter groups that every strategy shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2_pl.errors import InputError

NamedParameters = list[tuple[str, nn.Parameter]]


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), one tensor after the other.

    This is the algorithm to read; ``torch.optim.AdamW(fused=True)``, which the shipped configurations use, is faster.
    ``theta *= 1 - lr * weight_decay``, then ``theta -= lr * m_hat / (sqrt(v_hat) + eps)`` with the bias-corrected
    first and second moments. Its state has the layout of ``torch.optim.AdamW``; either loads the other's.

    Args:
        params: tensors or parameter groups.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decay per step, in units of ``lr``.

    Raises:
        ValueError: a negative ``lr``, ``eps`` or ``weight_decay``, or a beta outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        for key, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{key} is {value}; it must be at least 0")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas are {tuple(betas)}; each must be in [0, 1)")
        defaults: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if grad.is_sparse:
            raise RuntimeError("AdamW needs dense gradients; this parameter's gradient is sparse")
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        step, m, v = state["step"].item(), state["exp_avg"], state["exp_avg_sq"]
        parameter.mul_(1.0 - lr * group["weight_decay"])
        m.lerp_(grad, 1.0 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        v_hat = v / (1.0 - beta2**step)
        parameter.addcdiv_(m, v_hat.sqrt_().add_(group["eps"]), value=-lr / (1.0 - beta1**step))


def decays(name: str, parameter: Tensor) -> bool:
    """The decay rule: matrices decay; biases, norms and position embeddings do not."""
    return parameter.dim() >= 2 and not name.endswith("wpe.weight")


def parameter_groups(
    layers: Mapping[str, NamedParameters],
    lr_scales: Mapping[str, float] | None = None,
    trained: Container[str] | None = None,
) -> list[dict[str, Any]]:
    """One optimizer group per layer, decay rule and rate, named such as ``head``, ``head/no_decay``, ``head/lr_x16``.

    Only trainable parameters enter, each exactly once: one that several layers share (tied weights) belongs to the
    first. Groups without decay carry ``weight_decay = 0``; the others take the optimizer's. ``lr_scale`` says by what
    the group's rate is multiplied.

    Args:
        layers: name of a layer, from the input to the output -> its named parameters.
        lr_scales: name of a parameter -> its rate in units of the optimizer's; 1 where it is not named.
        trained: names of the parameters that enter; by default those that require a gradient now.
    """
    seen: set[int] = set()
    groups: dict[str, dict[str, Any]] = {}
    for layer, named in layers.items():
        for name, parameter in sorted(named, key=lambda pair: not decays(*pair)):
            if not (parameter.requires_grad if trained is None else name in trained) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            scale = (lr_scales or {}).get(name, 1.0)
            undecayed = {} if decays(name, parameter) else {"weight_decay": 0.0}
            key = layer + ("/no_decay" if undecayed else "") + (f"/lr_x{scale:g}" if scale != 1.0 else "")
            group = {"name": key, "layer": layer, "params": [], "lr_scale": scale, **undecayed}
            groups.setdefault(key, group)["params"].append(parameter)
    return list(groups.values())


class Schedule:
    """A learning rate over training, as a factor of the optimizer's ``lr``: ``factor(step, total)`` in [0, 1].

    The number of steps is the trainer's to know; the task asks it when training begins.
    """

    @property
    def needs_total(self) -> bool:
        """Whether the factor depends on the total number of steps, which an unbounded run does not have."""
        return True

    def factor(self, step: int, total: int) -> float:
        """The factor at optimizer step ``step`` (0, 1, ..., total - 1) of ``total``."""
        raise NotImplementedError


class ConstantWithWarmup(Schedule):
    """Linear warmup, then 1.

    Args:
        warmup: steps when 1 or more, else a share of all steps.
    """

    def __init__(self, warmup: float = 0.0) -> None:
        if warmup < 0:
            raise InputError(f"warmup is {warmup}; it must be a number of steps or a share of all steps in [0, 1)")
        self.warmup = warmup

    @property
    def needs_total(self) -> bool:
        """Whether the warmup is a share of all steps, or the rate decays to the end of training."""
        return type(self) is not ConstantWithWarmup or 0 < self.warmup < 1

    def _after_warmup(self, step: int, total: int) -> float:
        return 1.0

    def factor(self, step: int, total: int) -> float:
        """The factor at ``step`` of ``total``; see :class:`Schedule`."""
        warmup = int(self.warmup if self.warmup >= 1 else self.warmup * total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self._after_warmup(step - warmup, max(total - warmup, 1))


class LinearWithWarmup(ConstantWithWarmup):
    """Linear warmup, then linear decay to 0 at the end of training."""

    def _after_warmup(self, step: int, total: int) -> float:
        return max(0.0, 1.0 - step / total)


class CosineWithWarmup(ConstantWithWarmup):
    """Linear warmup, then half a cosine down to ``floor`` (Loshchilov & Hutter 2017, eq. 5, one period).

    Args:
        warmup: steps when 1 or more, else a share of all steps.
        floor: the factor at the end.
    """

    def __init__(self, warmup: float = 0.0, floor: float = 0.0) -> None:
        super().__init__(warmup)
        if not 0.0 <= floor <= 1.0:
            raise InputError(f"floor is {floor}; it must be in [0, 1]")
        self.floor = floor

    def _after_warmup(self, step: int, total: int) -> float:
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * min(step / total, 1.0)))


class SlantedTriangular(Schedule):
    """A short linear rise and a long linear fall (Howard & Ruder 2018, eq. 3).

    With ``cut = floor(total * cut_frac)``, p = step / cut up to the cut and 1 - (step - cut) / (total - cut) after;
    the factor is (1 + p (ratio - 1)) / ratio. The paper's own denominator, cut (1 / cut_frac - 1), is the same but
    for its rounding, which makes p negative for some totals.

    Args:
        cut_frac: share of the steps in which the rate rises.
        ratio: the highest rate over the lowest.
    """

    def __init__(self, cut_frac: float = 0.1, ratio: float = 32.0) -> None:
        if not 0.0 <= cut_frac < 1.0:
            raise InputError(f"cut_frac is {cut_frac}; it must be in [0, 1)")
        if ratio < 1.0:
            raise InputError(f"ratio is {ratio}; it must be at least 1")
        self.cut_frac, self.ratio = cut_frac, ratio

    def factor(self, step: int, total: int) -> float:
        """The factor at ``step`` of ``total``; see :class:`Schedule`."""
        cut = math.floor(total * self.cut_frac)
        p = step / cut if step < cut else 1.0 - min(step - cut, total - cut) / (total - cut)
        return (1.0 + p * (self.ratio - 1.0)) / self.ratio
