"""Layer by layer: gradual unfreezing and discriminative learning rates.

Both work on any LightningModule that names its layers, from input to output, in a method ``layer_groups()`` -> dict of
name -> list of (parameter name, parameter).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from gpt2_pl.errors import InputError, did_you_mean

Layers = dict[str, list[tuple[str, nn.Parameter]]]

TOP = ("ln_f", "prefix", "prompt", "head")  # what stands above the blocks of a GPT-2, or beside them


def layers_of(module: LightningModule, callback: Callback) -> Layers:
    """The layers that ``module`` names.

    Raises:
        InputError: it names none.
    """
    if not hasattr(module, "layer_groups"):
        raise InputError(
            f"{type(callback).__name__}: {type(module).__name__} names no layers; give it a method "
            "layer_groups() -> {layer: [(name, parameter), ...]}, from input to output"
        )
    layers: Any = module
    return layers.layer_groups()


def require_single(callback: Callback, callbacks: Sequence[Callback], module: LightningModule) -> None:
    """Refuse a second callback of the same kind, and a model in which there is nothing for it to do."""
    name = type(callback).__name__
    if sum(type(other) is type(callback) for other in callbacks) > 1:
        raise InputError(f"trainer.callbacks: two {name}; two of the strategies given each bring one")
    if not getattr(module, "trains_blocks", True):
        raise InputError(
            f"{name} and a frozen GPT-2: no block has parameters that train (train_base is false and there is no LoRA)"
        )


class GradualUnfreezing(Callback):
    """Trains the top of the model first and unfreezes the layers below it stage by stage (Howard & Ruder 2018, 3.3).

    What has not been reached yet stays bitwise as it is, weight decay included, and costs no backward pass. The stage
    is a function of the epoch and batch alone, so that a resumed run is in the stage of the one that was not stopped.
    Only parameters that would train anyway are ever touched: with LoRA, the adapters. All of them are in the optimizer
    from the start.

    Under DDP the parameters are frozen after the model is wrapped, with ``find_unused_parameters``, which this callback
    switches on; the processes would drift apart otherwise.

    Args:
        stages: layers that join at each stage, such as ``[[head, ln_f], [block.3-5], [block.0-2, embeddings]]``; layers
            never named stay frozen. By default everything above the blocks, then the blocks from the top, and with the
            last of them the embeddings.
        blocks_per_stage: blocks that join at each stage, where ``stages`` is not given.
        epochs_per_stage: length of a stage in epochs; fractions are fine.

    Raises:
        InputError: a number out of range; before training, a layer that does not exist or is named twice, a module that
            names no layers, or a distributed strategy that cannot freeze.
    """

    def __init__(
        self,
        stages: list[list[str]] | None = None,
        blocks_per_stage: int = 3,
        epochs_per_stage: float = 1.0,
    ) -> None:
        if stages is not None and not (stages and all(stages)):
            raise InputError(f"GradualUnfreezing: stages is {stages}; every stage names a layer or more")
        if blocks_per_stage < 1:
            raise InputError(f"GradualUnfreezing: blocks_per_stage is {blocks_per_stage}; it must be at least 1")
        if not epochs_per_stage > 0:
            raise InputError(f"GradualUnfreezing: epochs_per_stage is {epochs_per_stage}; it must be above 0")
        self.stages, self.blocks_per_stage, self.epochs_per_stage = stages, blocks_per_stage, epochs_per_stage
        self.stage: int | None = None
        self._params_by_stage: list[
            list[nn.Parameter]
        ] = []  # parameters by the stage that they join at; the last list never

    def check(self, callbacks: Sequence[Callback], module: LightningModule) -> None:
        """Refuse what contradicts this callback, before anything is built."""
        require_single(self, callbacks, module)
        if (names := getattr(module, "layer_names", None)) is not None:
            self.stage_layers(list(names))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have DDP accept parameters without a gradient."""
        if stage != "fit":
            return
        self.check(trainer.callbacks, pl_module)  # type: ignore[attr-defined]
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy):
            if strategy._ddp_kwargs.get("static_graph"):
                raise InputError("GradualUnfreezing: trainer.strategy has static_graph, and this graph changes")
            strategy._ddp_kwargs["find_unused_parameters"] = True
        elif not isinstance(strategy, SingleDeviceStrategy | ModelParallelStrategy):
            raise InputError(
                f"GradualUnfreezing: trainer.strategy is {type(strategy).__name__}; it works on one device, with ddp, "
                "and with configs/trainer/fsdp.yaml"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what trains, and when."""
        layers = layers_of(pl_module, self)
        joined = dict.fromkeys(layers, -1)
        trains = {name for name, parameters in layers.items() if any(p.requires_grad for _, p in parameters)}
        stages = self.stage_layers(list(layers))
        if self.stages is None:
            stages = [stage for stage in stages if trains & set(stage)]
        for stage in stages:
            if not trains & set(stage):
                raise InputError(f"GradualUnfreezing: nothing of the stage [{', '.join(stage)}] would train")
        self._warn_of_late_stages(stages, trainer.max_epochs)
        for i, names in enumerate(stages):
            for name in names:
                joined[name] = i
        self._params_by_stage = [[] for _ in range(len(stages) + 1)]
        for name, parameters in layers.items():
            self._params_by_stage[joined[name]] += [p for _, p in parameters if p.requires_grad]
        self.stage = None

    def _warn_of_late_stages(self, stages: list[list[str]], max_epochs: int | None) -> None:
        if max_epochs is None or max_epochs <= 0:
            return
        late = [name for i, stage in enumerate(stages) if i * self.epochs_per_stage >= max_epochs for name in stage]
        if late:
            rank_zero_warn(
                f"GradualUnfreezing: training ends after {max_epochs} epochs, so that {', '.join(late)} never train: "
                f"there are {len(stages)} stages of {self.epochs_per_stage:g} epochs"
            )

    def stage_layers(self, layers: list[str]) -> list[list[str]]:
        """The layers, of ``layers`` from input to output, that join at each stage.

        Raises:
            InputError: ``stages`` names one that does not exist, or one twice.
        """
        if self.stages is None:
            return _default_stages(layers, self.blocks_per_stage)
        stages = [[name for entry in stage for name in _expanded(entry)] for stage in self.stages]
        named = [name for stage in stages for name in stage]
        for name in named:
            if name not in layers:
                near = did_you_mean(name, layers) or ";"
                raise InputError(f"GradualUnfreezing: there is no layer {name!r}{near} there are {', '.join(layers)}")
            if named.count(name) > 1:
                raise InputError(f"GradualUnfreezing: stages names {name} twice")
        return stages

    def stage_at(self, epoch: int, batch: int, n_batches: float) -> int:
        """The stage, from 0, in which a batch is trained."""
        progress = epoch + batch / n_batches
        return min(int(progress / self.epochs_per_stage + 1e-9), len(self._params_by_stage) - 2)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Freeze and unfreeze where a stage begins, or training resumes within one; never within an optimizer step."""
        first = batch_idx - batch_idx % trainer.accumulate_grad_batches
        stage = self.stage_at(trainer.current_epoch, first, trainer.num_training_batches)
        if stage == self.stage:
            return
        self.stage = stage
        for i, parameters in enumerate(self._params_by_stage):
            for parameter in parameters:
                parameter.requires_grad_(i <= stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave everything trainable that was so before."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave everything trainable that was so before."""
        for parameters in self._params_by_stage:
            for parameter in parameters:
                parameter.requires_grad_(True)
        self._params_by_stage = []


def _default_stages(layers: list[str], blocks_per_stage: int) -> list[list[str]]:
    blocks = [name for name in layers if name.startswith("block.")]
    if not blocks:
        return [[name] for name in reversed(layers)]
    below = layers[: layers.index(blocks[0])]
    stages = [[name for name in layers if name not in blocks and name not in below]]
    while blocks:
        stages.append(blocks[-blocks_per_stage:])
        blocks = blocks[:-blocks_per_stage]
    stages[-1] = below + stages[-1]
    return [stage for stage in stages if stage]


def _expanded(entry: str) -> list[str]:
    """``block.3-5`` -> block.3, block.4, block.5; any other name is itself."""
    if found := re.fullmatch(r"(.+\.)(\d+)-(\d+)", entry):
        prefix, first, last = found[1], int(found[2]), int(found[3])
        return [f"{prefix}{i}" for i in range(first, last + 1)]
    return [entry]


class DiscriminativeLR(Callback):
    """Lower learning rates for lower layers (Howard & Ruder 2018, section 3.2), or layer-wise rate decay (LLRD).

    Of L layers below the top, layer l from the bottom has the rate lr * decay^(L - l): the last block has lr * 1, the
    first lr * decay^(L - 1), the embeddings lr * decay^L. What stands above the blocks has lr, the head
    lr * ``head_scale``.

    The optimizer's groups must not mix layers (``gpt2_pl.optim.parameter_groups`` makes such).

    Args:
        decay: what each layer's rate is multiplied by, going down; 1 changes nothing.
        head_scale: what the last layer's rate is multiplied by.
        top: layers that are not below the top; by default the last, and of a GPT-2 ln_f, prefix and soft prompt.

    Raises:
        InputError: a number out of range; before training, a layer that does not exist, a module that names no layers,
            or an optimizer group with parameters of several layers.
    """

    def __init__(self, decay: float = 0.95, head_scale: float = 1.0, top: list[str] | None = None) -> None:
        if not 0.0 < decay <= 1.0:
            raise InputError(f"DiscriminativeLR: decay is {decay}; it must be above 0 and at most 1")
        if not head_scale > 0.0:
            raise InputError(f"DiscriminativeLR: head_scale is {head_scale}; it must be above 0")
        self.decay, self.head_scale, self.top = decay, head_scale, top

    def check(self, callbacks: Sequence[Callback], module: LightningModule) -> None:
        """Refuse what contradicts this callback, before anything is built."""
        require_single(self, callbacks, module)
        if (names := getattr(module, "layer_names", None)) is not None:
            self.scales(list(names))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what contradicts this callback."""
        if stage == "fit":
            self.check(trainer.callbacks, pl_module)  # type: ignore[attr-defined]

    def scales(self, layers: list[str]) -> dict[str, float]:
        """What the rate of each of ``layers``, from input to output, is multiplied by."""
        for name in self.top or []:
            if name not in layers:
                near = did_you_mean(name, layers) or ";"
                raise InputError(f"DiscriminativeLR: there is no layer {name!r}{near} there are {', '.join(layers)}")
        last_block = max((i for i, name in enumerate(layers) if name.startswith("block.")), default=len(layers) - 1)
        top = {layers[-1], *((*TOP, *layers[last_block + 1 :]) if self.top is None else self.top)}
        below = [name for name in layers if name not in top]
        scales = dict.fromkeys(layers, 1.0)
        # embeddings are one further down than the first block, whose exponent is L - 1
        scales.update({name: self.decay**i for i, name in enumerate(reversed(below))})
        scales[layers[-1]] = self.head_scale
        return scales

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale the rates of all groups, and the schedulers' idea of them. A resumed run then takes its own back."""
        layers = layers_of(pl_module, self)
        scales = self.scales(list(layers))
        home: dict[int, str] = {}
        for layer, parameters in layers.items():
            for _, parameter in parameters:
                home.setdefault(id(parameter), layer)
        for optimizer in trainer.optimizers:
            factors = []
            for i, group in enumerate(optimizer.param_groups):
                found = sorted({home.get(id(parameter), "?") for parameter in group["params"]})
                if len(found) > 1 or found == ["?"]:
                    raise InputError(
                        f"DiscriminativeLR: group {group.get('name', i)!r} of the optimizer holds parameters of "
                        f"{', '.join(found).replace('?', 'no named layer')}; make one group a layer: "
                        "gpt2_pl.optim.parameter_groups(self.layer_groups())"
                    )
                factors.append(scales[found[0]])
                group["lr_scale"] = group.get("lr_scale", 1.0) * factors[i]
                for key in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():  # the last two are OneCycleLR's
                    group[key] *= factors[i]
            for config in trainer.lr_scheduler_configs:
                _scale(config.scheduler, optimizer, factors)


def _scale(scheduler: Any, optimizer: Any, factors: list[float]) -> None:
    """Multiply the rates that a scheduler, or one within it, keeps for the groups of an optimizer."""
    for inner in getattr(scheduler, "_schedulers", []):  # SequentialLR, ChainedScheduler
        _scale(inner, optimizer, factors)
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        return
    for key in ("base_lrs", "max_lrs", "min_lrs"):
        if isinstance(rates := getattr(scheduler, key, None), list):
            setattr(scheduler, key, [rate * factor for rate, factor in zip(rates, factors, strict=True)])
