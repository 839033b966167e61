"""Layer-wise fine-tuning: gradual unfreezing and discriminative learning rates.

Both callbacks work with any LightningModule that implements ``layer_groups()``, which returns the layers from input to
output as a dict of name -> list of (parameter name, parameter).
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
from gpt2_pl.utils.trainer import callbacks_of

Layers = dict[str, list[tuple[str, nn.Parameter]]]

TOP = ("ln_f", "prefix", "prompt", "head")  # layers of a GPT-2 that are not below its blocks


def layers_of(module: LightningModule, callback: Callback) -> Layers:
    """Return the layers of ``module`` from input to output, for ``callback``.

    Raises:
        InputError: the module does not implement ``layer_groups()``.
    """
    if not hasattr(module, "layer_groups"):
        raise InputError(
            f"{type(callback).__name__}: {type(module).__name__} does not implement layer_groups(); it must return "
            "{layer: [(name, parameter), ...]}, from input to output"
        )
    layers: Any = module
    return layers.layer_groups()


def require_single(callback: Callback, callbacks: Sequence[Callback], module: LightningModule) -> None:
    """Refuse a second callback of the same class, and a model without trainable blocks."""
    name = type(callback).__name__
    if sum(type(other) is type(callback) for other in callbacks) > 1:
        raise InputError(f"trainer.callbacks has two {name}; use only one of the strategies that add it")
    if not getattr(module, "trains_blocks", True):
        raise InputError(
            f"{name} cannot be used with a frozen GPT-2: no block has parameters that train (train_base is false and "
            "there is no LoRA)"
        )


class GradualUnfreezing(Callback):
    """Gradual unfreezing: train the top of the model first, and unfreeze lower layers stage by stage.

    The method is that of Howard & Ruder 2018, section 3.3. Layers that are still frozen stay bitwise unchanged (weight
    decay is not applied either) and need no backward pass. The stage depends on the epoch and the batch only, so that
    a resumed run is in the same stage as an uninterrupted one. The callback affects only parameters that are trainable
    without it: with LoRA, the adapters. All of them are in the optimizer from the start.

    Under DDP the parameters are frozen after the model is wrapped. The callback enables ``find_unused_parameters``,
    without which the parameters of the processes would diverge.

    Args:
        stages: layers that are unfrozen at each stage, such as
            ``[[head, ln_f], [block.3-5], [block.0-2, embeddings]]``; layers in no stage stay frozen. By default the
            first stage has all layers above the blocks, the following stages have the blocks from the top, and the
            last stage also has the embeddings.
        blocks_per_stage: number of blocks that are unfrozen at each stage, if ``stages`` is not given.
        epochs_per_stage: length of a stage in epochs; may be a fraction.

    Raises:
        InputError: a number out of range; before training, a layer that does not exist or is named twice, a module
            without ``layer_groups()``, or a distributed strategy that does not support freezing.
    """

    def __init__(
        self,
        stages: list[list[str]] | None = None,
        blocks_per_stage: int = 3,
        epochs_per_stage: float = 1.0,
    ) -> None:
        if stages is not None and not (stages and all(stages)):
            raise InputError(f"GradualUnfreezing: stages must be a list of non-empty lists of layers, got {stages}")
        if blocks_per_stage < 1:
            raise InputError(f"GradualUnfreezing: blocks_per_stage must be at least 1, got {blocks_per_stage}")
        if not epochs_per_stage > 0:
            raise InputError(f"GradualUnfreezing: epochs_per_stage must be above 0, got {epochs_per_stage}")
        self.stages, self.blocks_per_stage, self.epochs_per_stage = stages, blocks_per_stage, epochs_per_stage
        self.stage: int | None = None
        # Parameters by the stage at which they are unfrozen; the last list stays frozen.
        self._params_by_stage: list[list[nn.Parameter]] = []

    def check(self, callbacks: Sequence[Callback], module: LightningModule) -> None:
        """Check that the callback can be used with the other callbacks and the module, before the model is built.

        Raises:
            InputError: a second callback of this class, a model without trainable blocks, or an unknown layer.
        """
        require_single(self, callbacks, module)
        if (names := getattr(module, "layer_names", None)) is not None:
            self.stage_layers(list(names))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the callback and the strategy, and configure DDP for parameters without a gradient."""
        if stage != "fit":
            return
        self.check(callbacks_of(trainer), pl_module)
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy):
            if strategy._ddp_kwargs.get("static_graph"):
                raise InputError("GradualUnfreezing: trainer.strategy must not have static_graph; the graph changes")
            strategy._ddp_kwargs["find_unused_parameters"] = True
        elif not isinstance(strategy, SingleDeviceStrategy | ModelParallelStrategy):
            raise InputError(
                "GradualUnfreezing: trainer.strategy must be that of one device, ddp or configs/trainer/fsdp.yaml, got "
                f"{type(strategy).__name__}"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Assign every trainable parameter to a stage."""
        layers = layers_of(pl_module, self)
        stage_of_layer = dict.fromkeys(layers, -1)
        trainable = {name for name, parameters in layers.items() if any(p.requires_grad for _, p in parameters)}
        stages = self.stage_layers(list(layers))
        if self.stages is None:
            stages = [stage for stage in stages if trainable & set(stage)]
        for stage in stages:
            if not trainable & set(stage):
                raise InputError(f"GradualUnfreezing: no parameter of the stage [{', '.join(stage)}] is trainable")
        self._warn_of_late_stages(stages, trainer.max_epochs)
        for i, names in enumerate(stages):
            for name in names:
                stage_of_layer[name] = i
        self._params_by_stage = [[] for _ in range(len(stages) + 1)]
        for name, parameters in layers.items():
            self._params_by_stage[stage_of_layer[name]] += [p for _, p in parameters if p.requires_grad]
        self.stage = None

    def _warn_of_late_stages(self, stages: list[list[str]], max_epochs: int | None) -> None:
        if max_epochs is None or max_epochs <= 0:
            return
        late = [name for i, stage in enumerate(stages) if i * self.epochs_per_stage >= max_epochs for name in stage]
        if late:
            rank_zero_warn(
                f"GradualUnfreezing: training ends after {max_epochs} epochs, so {', '.join(late)} will never train; "
                f"there are {len(stages)} stages of {self.epochs_per_stage:g} epochs"
            )

    def stage_layers(self, layers: list[str]) -> list[list[str]]:
        """Return the names of the layers that are unfrozen at each stage.

        Args:
            layers: names of all layers, from input to output.

        Raises:
            InputError: ``stages`` names an unknown layer, or a layer twice.
        """
        if self.stages is None:
            return _default_stages(layers, self.blocks_per_stage)
        stages = [[name for entry in stage for name in _expand_range(entry)] for stage in self.stages]
        named = [name for stage in stages for name in stage]
        for name in named:
            if name not in layers:
                near = did_you_mean(name, layers) or ";"
                raise InputError(f"GradualUnfreezing: unknown layer {name!r}{near} the layers are {', '.join(layers)}")
            if named.count(name) > 1:
                raise InputError(f"GradualUnfreezing: stages must name each layer once, got {name} twice")
        return stages

    def stage_at(self, epoch: int, batch: int, n_batches: float) -> int:
        """Return the stage, counted from 0, of a batch.

        Args:
            epoch: number of the epoch, from 0.
            batch: number of the batch in the epoch, from 0.
            n_batches: number of batches in an epoch.
        """
        progress = epoch + batch / n_batches
        return min(int(progress / self.epochs_per_stage + 1e-9), len(self._params_by_stage) - 2)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Freeze and unfreeze layers when a stage starts or training resumes; never within an optimizer step."""
        first = batch_idx - batch_idx % trainer.accumulate_grad_batches
        stage = self.stage_at(trainer.current_epoch, first, trainer.num_training_batches)
        if stage == self.stage:
            return
        self.stage = stage
        for i, parameters in enumerate(self._params_by_stage):
            for parameter in parameters:
                parameter.requires_grad_(i <= stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Make all parameters trainable that were trainable before."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make all parameters trainable that were trainable before."""
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


def _expand_range(entry: str) -> list[str]:
    """Expand a range of layers: ``block.3-5`` -> block.3, block.4, block.5; other names stay as they are."""
    if match := re.fullmatch(r"(.+\.)(\d+)-(\d+)", entry):
        prefix, first, last = match[1], int(match[2]), int(match[3])
        return [f"{prefix}{i}" for i in range(first, last + 1)]
    return [entry]


class DiscriminativeLR(Callback):
    """Discriminative learning rates (Howard & Ruder 2018, section 3.2), also called layer-wise rate decay (LLRD).

    With L blocks, block l (counted from 1 at the bottom) has the rate lr * decay^(L - l): the last block has lr, the
    first lr * decay^(L - 1), and the embeddings have lr * decay^L. Layers above the blocks have lr, and the head has
    lr * ``head_scale``.

    Each group of the optimizer must belong to one layer, as those of ``gpt2_pl.optim.parameter_groups`` do.

    Args:
        decay: factor between the rates of a layer and the layer above it; 1 makes all rates equal.
        head_scale: factor of the rate of the last layer.
        top: layers whose rate does not decay; by default the last layer, and in a GPT-2 also ln_f, the prefix and the
            soft prompt.

    Raises:
        InputError: a number out of range; before training, a layer that does not exist, a module without
            ``layer_groups()``, or an optimizer group with parameters of several layers.
    """

    def __init__(self, decay: float = 0.95, head_scale: float = 1.0, top: list[str] | None = None) -> None:
        if not 0.0 < decay <= 1.0:
            raise InputError(f"DiscriminativeLR: decay must be in (0, 1], got {decay}")
        if not head_scale > 0.0:
            raise InputError(f"DiscriminativeLR: head_scale must be above 0, got {head_scale}")
        self.decay, self.head_scale, self.top = decay, head_scale, top

    def check(self, callbacks: Sequence[Callback], module: LightningModule) -> None:
        """Check that the callback can be used with the other callbacks and the module, before the model is built.

        Raises:
            InputError: a second callback of this class, a model without trainable blocks, or an unknown layer.
        """
        require_single(self, callbacks, module)
        if (names := getattr(module, "layer_names", None)) is not None:
            self.scales(list(names))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the callback can be used with the other callbacks and the module."""
        if stage == "fit":
            self.check(callbacks_of(trainer), pl_module)

    def scales(self, layers: list[str]) -> dict[str, float]:
        """Return the factor of the learning rate of each layer.

        Args:
            layers: names of all layers, from input to output.

        Raises:
            InputError: ``top`` names an unknown layer.
        """
        for name in self.top or []:
            if name not in layers:
                near = did_you_mean(name, layers) or ";"
                raise InputError(f"DiscriminativeLR: unknown layer {name!r}{near} the layers are {', '.join(layers)}")
        last_block = max((i for i, name in enumerate(layers) if name.startswith("block.")), default=len(layers) - 1)
        top = {layers[-1], *((*TOP, *layers[last_block + 1 :]) if self.top is None else self.top)}
        below = [name for name in layers if name not in top]
        scales = dict.fromkeys(layers, 1.0)
        # The embeddings are one layer below the first block, whose exponent is L - 1.
        scales.update({name: self.decay**i for i, name in enumerate(reversed(below))})
        scales[layers[-1]] = self.head_scale
        return scales

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale the rates of all optimizer groups and of the schedulers, before a resumed run restores its own."""
        layers = layers_of(pl_module, self)
        scales = self.scales(list(layers))
        layer_of: dict[int, str] = {}  # id of a parameter -> its layer
        for layer, parameters in layers.items():
            for _, parameter in parameters:
                layer_of.setdefault(id(parameter), layer)
        for optimizer in trainer.optimizers:
            factors = []
            for i, group in enumerate(optimizer.param_groups):
                names = sorted({layer_of.get(id(parameter), "?") for parameter in group["params"]})
                if len(names) > 1 or names == ["?"]:
                    raise InputError(
                        f"DiscriminativeLR: group {group.get('name', i)!r} of the optimizer holds parameters of "
                        f"{', '.join(names).replace('?', 'no named layer')}; make one group for each layer: "
                        "gpt2_pl.optim.parameter_groups(self.layer_groups())"
                    )
                factors.append(scales[names[0]])
                group["lr_scale"] = group.get("lr_scale", 1.0) * factors[i]
                for key in {
                    "lr",
                    "initial_lr",
                    "max_lr",
                    "min_lr",
                } & group.keys():  # max_lr and min_lr are OneCycleLR's.
                    group[key] *= factors[i]
            for config in trainer.lr_scheduler_configs:
                _scale_scheduler(config.scheduler, optimizer, factors)


def _scale_scheduler(scheduler: Any, optimizer: Any, factors: list[float]) -> None:
    """Scale the rates that a scheduler, or a scheduler nested in it, stores for the groups of an optimizer."""
    for inner in getattr(scheduler, "_schedulers", []):  # SequentialLR, ChainedScheduler
        _scale_scheduler(inner, optimizer, factors)
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        return
    for key in ("base_lrs", "max_lrs", "min_lrs"):
        if isinstance(rates := getattr(scheduler, key, None), list):
            setattr(scheduler, key, [rate * factor for rate, factor in zip(rates, factors, strict=True)])
