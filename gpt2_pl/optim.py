"""AdamW, learning-rate schedules, and parameter groups.

A schedule returns a factor; the learning rate of a parameter group at optimizer step t of S steps in total is
``lr * lr_scale * factor(t, S)``, where ``lr_scale`` is the group's multiplier (layer-wise rates, LoRA+).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2_pl.errors import require

NamedParameters = list[tuple[str, nn.Parameter]]


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).

    At step t = 1, 2, ... with the gradient g of a parameter theta::

        theta = theta * (1 - lr * weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        m_hat = m / (1 - beta1^t)
        v_hat = v / (1 - beta2^t)
        theta = theta - lr * m_hat / (sqrt(v_hat) + eps)

    This is a readable reference that updates one tensor at a time. ``torch.optim.AdamW(fused=True)``, the optimizer of
    the included configurations, is faster. The state has the layout of ``torch.optim.AdamW``, and each of the two loads
    the state of the other.

    Args:
        params: tensors or parameter groups.
        lr: learning rate.
        betas: decay rates beta1 and beta2 of the first and second moment.
        eps: added to the square root of the second moment.
        weight_decay: decay per step, relative to ``lr``.

    Raises:
        InputError: ``lr``, ``eps`` or ``weight_decay`` is negative, or a beta is outside [0, 1).
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
            require(value >= 0.0, key, value, "at least 0")
        require(all(0.0 <= beta < 1.0 for beta in betas), "betas", tuple(betas), "in [0, 1)")
        defaults: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss, with gradients.

        Returns:
            The loss of ``closure``, or None without one.
        """
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
            raise RuntimeError("AdamW does not support sparse gradients; use dense gradients")
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
    """Return whether weight decay applies: to matrices, but not to biases, norms and position embeddings."""
    return parameter.dim() >= 2 and not name.endswith("wpe.weight")


def parameter_groups(
    layers: Mapping[str, NamedParameters],
    lr_scales: Mapping[str, float] | None = None,
    trained: Container[str] | None = None,
) -> list[dict[str, Any]]:
    """Build one optimizer group per layer, weight decay and learning rate.

    Each trainable parameter is in exactly one group; a parameter shared by several layers (tied weights) is in the
    group of the first.

    Args:
        layers: maps the name of each layer, from input to output, to its named parameters.
        lr_scales: maps names of parameters to factors of the learning rate; 1 by default.
        trained: names of the parameters to include; by default those with ``requires_grad``.

    Returns:
        Groups with the keys ``name`` (such as ``head``, ``head/no_decay``, ``head/lr_x16``), ``layer``, ``params``,
        ``lr_scale``, and ``weight_decay`` = 0 in groups without decay. The other groups use the optimizer's default.
    """
    seen: set[int] = set()
    groups: dict[str, dict[str, Any]] = {}
    for layer, named in layers.items():
        for name, parameter in sorted(named, key=lambda pair: not decays(*pair)):
            if not (parameter.requires_grad if trained is None else name in trained) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            scale = (lr_scales or {}).get(name, 1.0)
            no_decay = {} if decays(name, parameter) else {"weight_decay": 0.0}
            key = layer + ("/no_decay" if no_decay else "") + (f"/lr_x{scale:g}" if scale != 1.0 else "")
            group = {"name": key, "layer": layer, "params": [], "lr_scale": scale, **no_decay}
            groups.setdefault(key, group)["params"].append(parameter)
    return list(groups.values())


class Schedule:
    """Learning-rate schedule: a factor of the optimizer's ``lr`` in [0, 1] at every optimizer step.

    The trainer determines the total number of steps, and the task reads it when training starts.
    """

    @property
    def needs_total(self) -> bool:
        """Whether the factor depends on the total number of steps. A run without a limit has no such number."""
        return True

    def factor(self, step: int, total: int) -> float:
        """Return the factor of the learning rate.

        Args:
            step: optimizer step, 0, 1, ..., total - 1.
            total: total number of optimizer steps.
        """
        raise NotImplementedError


class ConstantWithWarmup(Schedule):
    """Linear warmup, then a constant factor of 1.

    With w warmup steps the factor at step t < w is ``(t + 1) / (w + 1)``.

    Args:
        warmup: number of warmup steps if at least 1, else a fraction of all steps, in [0, 1).
    """

    def __init__(self, warmup: float = 0.0) -> None:
        require(warmup >= 0, "warmup", warmup, "a number of steps or a fraction of all steps in [0, 1)")
        self.warmup = warmup

    @property
    def needs_total(self) -> bool:
        """Whether the warmup is a fraction of all steps, or the rate decays until the end of training."""
        return type(self) is not ConstantWithWarmup or 0 < self.warmup < 1

    def _after_warmup(self, step: int, total: int) -> float:
        return 1.0

    def factor(self, step: int, total: int) -> float:
        """Return the factor at ``step`` of ``total`` steps; see :meth:`Schedule.factor`."""
        warmup = int(self.warmup if self.warmup >= 1 else self.warmup * total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self._after_warmup(step - warmup, max(total - warmup, 1))


class LinearWithWarmup(ConstantWithWarmup):
    """Linear warmup, then linear decay to 0 at the end of training.

    With w warmup steps of S steps in total the factor at step t >= w is ``1 - (t - w) / (S - w)``.

    Args:
        warmup: number of warmup steps if at least 1, else a fraction of all steps, in [0, 1).
    """

    def _after_warmup(self, step: int, total: int) -> float:
        return max(0.0, 1.0 - step / total)


class CosineWithWarmup(ConstantWithWarmup):
    """Linear warmup, then half a cosine down to ``floor`` (Loshchilov & Hutter 2017, eq. 5, one period).

    With w warmup steps of S steps in total the factor at step t >= w is
    ``floor + (1 - floor) * (1 + cos(pi * (t - w) / (S - w))) / 2``.

    Args:
        warmup: number of warmup steps if at least 1, else a fraction of all steps, in [0, 1).
        floor: the factor at the end, in [0, 1].
    """

    def __init__(self, warmup: float = 0.0, floor: float = 0.0) -> None:
        super().__init__(warmup)
        require(0.0 <= floor <= 1.0, "floor", floor, "in [0, 1]")
        self.floor = floor

    def _after_warmup(self, step: int, total: int) -> float:
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * min(step / total, 1.0)))


class SlantedTriangular(Schedule):
    """Slanted triangular schedule: a short linear increase, then a long linear decay (Howard & Ruder 2018, eq. 3).

    With S steps in total, ``cut = floor(S * cut_frac)``, the factor at step t is ``(1 + p * (ratio - 1)) / ratio``,
    where ``p = t / cut`` for t < cut and ``p = 1 - (t - cut) / (S - cut)`` after. The denominator of the paper,
    ``cut * (1 / cut_frac - 1)``, differs from ``S - cut`` by the rounding of ``cut``; it makes p negative for some S.

    Args:
        cut_frac: fraction of the steps in which the rate increases, in [0, 1).
        ratio: highest rate divided by the lowest, at least 1.
    """

    def __init__(self, cut_frac: float = 0.1, ratio: float = 32.0) -> None:
        require(0.0 <= cut_frac < 1.0, "cut_frac", cut_frac, "in [0, 1)")
        require(ratio >= 1.0, "ratio", ratio, "at least 1")
        self.cut_frac, self.ratio = cut_frac, ratio

    def factor(self, step: int, total: int) -> float:
        """Return the factor at ``step`` of ``total`` steps; see :meth:`Schedule.factor`."""
        cut = math.floor(total * self.cut_frac)
        p = step / cut if step < cut else 1.0 - min(step - cut, total - cut) / (total - cut)
        return (1.0 + p * (self.ratio - 1.0)) / self.ratio
