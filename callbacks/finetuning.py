"""Layer-wise fine-tuning: gradual unfreezing and discriminative learning rates.

Both callbacks work with any LightningModule that implements ``layer_groups()``, which returns the layers from input to
output as a dict of name -> list of (parameter name, parameter).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from gpt2_pl.errors import InputError, require
from gpt2_pl.optim import NamedParameters
from gpt2_pl.tasks.base import Task
from gpt2_pl.tasks.protocols import LayeredModule
from gpt2_pl.utils.trainer import callbacks_of

TOP = ("ln_f", "prefix", "prompt", "head")  # layers of a GPT-2 that are not below its blocks
_RATES = {"lr", "initial_lr", "max_lr", "min_lr"}  # of an optimizer's group; the last two are OneCycleLR's


class LayerCallback(Callback):
    """Base class of callbacks that treat the layers of a module differently."""

    def check_layers(self, layers: list[str]) -> object:
        """Check the settings, given the names of all layers, from input to output."""
        raise NotImplementedError

    def check(self, callbacks: Sequence[Callback], module: LightningModule) -> None:
        """Check that the callback can be used with the other callbacks and the module, before the model is built.

        Raises:
            InputError: a second callback of this class, a model without trainable blocks, or an unknown layer.
        """
        name = type(self).__name__
        if sum(type(other) is type(self) for other in callbacks) > 1:
            message = f"trainer.callbacks has two {name}; use only one of the strategies that add it"
            raise InputError(message, key="trainer.callbacks")
        if isinstance(module, Task):
            if not module.trains_blocks:
                reason = "no block has parameters that train (train_base is false and there is no LoRA)"
                raise InputError(f"{name} cannot be used with a frozen GPT-2: {reason}", key="trainer.callbacks")
            self.check_layers(module.layer_names)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the callback can be used with the other callbacks and the module."""
        if stage == "fit":
            self.check(callbacks_of(trainer), pl_module)

    def layers_of(self, module: LightningModule) -> dict[str, NamedParameters]:
        """Return the layers of a module, from input to output.

        Raises:
            InputError: the module does not implement ``layer_groups()``.
        """
        if not isinstance(module, LayeredModule):
            raise InputError(f"{type(module).__name__} does not implement layer_groups()", source=type(self).__name__)
        return module.layer_groups()

    def _check_names(self, key: str, names: Iterable[str], layers: list[str]) -> None:
        for name in names:
            require(name in layers, key, name, f"one of {', '.join(layers)}", type(self).__name__)


class GradualUnfreezing(LayerCallback):
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
        self, stages: list[list[str]] | None = None, blocks_per_stage: int = 3, epochs_per_stage: float = 1.0
    ) -> None:
        source, are_stages = "GradualUnfreezing", stages is None or bool(stages and all(stages))
        require(are_stages, "stages", stages, "a list of non-empty lists of layers", source)
        require(blocks_per_stage >= 1, "blocks_per_stage", blocks_per_stage, "at least 1", source)
        require(epochs_per_stage > 0, "epochs_per_stage", epochs_per_stage, "above 0", source)
        self.stages, self.blocks_per_stage, self.epochs_per_stage = stages, blocks_per_stage, epochs_per_stage
        self.stage: int | None = None
        # Parameters by the stage at which they are unfrozen; the last list stays frozen.
        self._params_by_stage: list[list[nn.Parameter]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the callback and the strategy, and configure DDP for parameters without a gradient."""
        super().setup(trainer, pl_module, stage)
        strategy = trainer.strategy
        if stage == "fit" and isinstance(strategy, DDPStrategy):
            is_static = bool(strategy._ddp_kwargs.get("static_graph"))
            require(not is_static, "trainer.strategy", "static_graph", "ddp without static_graph", "GradualUnfreezing")
            strategy._ddp_kwargs["find_unused_parameters"] = True
        elif stage == "fit":
            is_supported = isinstance(strategy, SingleDeviceStrategy | ModelParallelStrategy)
            expected = "that of one device, ddp or configs/trainer/fsdp.yaml"
            name = type(strategy).__name__
            require(is_supported, "trainer.strategy", name, expected, "GradualUnfreezing")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Assign every trainable parameter to a stage."""
        layers = self.layers_of(pl_module)
        trainable = {layer: [p for _, p in named if p.requires_grad] for layer, named in layers.items()}
        stages = self.stage_layers(list(layers))
        if self.stages is None:
            stages = [stage for stage in stages if any(trainable[layer] for layer in stage)]
        for stage in stages:
            if not any(trainable[layer] for layer in stage):
                message = f"no parameter of the stage [{', '.join(stage)}] is trainable"
                raise InputError(message, key="stages", source="GradualUnfreezing")
        epochs, length = trainer.max_epochs or 0, self.epochs_per_stage
        if late := [layer for i, stage in enumerate(stages) if 0 < epochs <= i * length for layer in stage]:
            rank_zero_warn(
                f"GradualUnfreezing: training ends after {epochs} epochs, so {', '.join(late)} will never train; "
                f"there are {len(stages)} stages of {length:g} epochs"
            )
        self._params_by_stage = [[*chain.from_iterable(map(trainable.pop, stage))] for stage in stages]
        self._params_by_stage.append([*chain.from_iterable(trainable.values())])
        self.stage = None

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
        self._check_names("stages", named, layers)
        for name in named:
            require(named.count(name) == 1, "stages", self.stages, f"lists without {name} twice", "GradualUnfreezing")
        return stages

    check_layers = stage_layers

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


class DiscriminativeLR(LayerCallback):
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
        require(0.0 < decay <= 1.0, "decay", decay, "in (0, 1]", "DiscriminativeLR")
        require(head_scale > 0.0, "head_scale", head_scale, "above 0", "DiscriminativeLR")
        self.decay, self.head_scale, self.top = decay, head_scale, top

    def scales(self, layers: list[str]) -> dict[str, float]:
        """Return the factor of the learning rate of each layer.

        Args:
            layers: names of all layers, from input to output.

        Raises:
            InputError: ``top`` names an unknown layer.
        """
        self._check_names("top", self.top or [], layers)
        last_block = max((i for i, name in enumerate(layers) if name.startswith("block.")), default=len(layers) - 1)
        top = {layers[-1], *((*TOP, *layers[last_block + 1 :]) if self.top is None else self.top)}
        below = [name for name in layers if name not in top]
        scales = dict.fromkeys(layers, 1.0)
        # The embeddings are one layer below the first block, whose exponent is L - 1.
        scales.update({name: self.decay**i for i, name in enumerate(reversed(below))})
        scales[layers[-1]] = self.head_scale
        return scales

    check_layers = scales

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale the rates of all optimizer groups and of the schedulers, before a resumed run restores its own."""
        layers = self.layers_of(pl_module)
        scales = self.scales(list(layers))
        # A parameter of several layers belongs to the first.
        layer_of = {id(parameter): layer for layer, named in reversed(layers.items()) for _, parameter in named}
        for optimizer in trainer.optimizers:
            factors = []
            for i, group in enumerate(optimizer.param_groups):
                names = sorted({layer_of.get(id(parameter), "no named layer") for parameter in group["params"]})
                expected = "parameters of one layer, as those of gpt2_pl.optim.parameter_groups(self.layer_groups())"
                is_layer = len(names) == 1 and names[0] in scales
                require(is_layer, f"group {i} of the optimizer", names, expected, "DiscriminativeLR")
                factors.append(scales[names[0]])
                group["lr_scale"] = group.get("lr_scale", 1.0) * factors[i]
                for key in _RATES & group.keys():
                    group[key] *= factors[i]
            for config in trainer.lr_scheduler_configs:
                _scale_scheduler(config.scheduler, optimizer, factors)


def _scale_scheduler(scheduler: Any, optimizer: Optimizer, factors: list[float]) -> None:
    """Scale the rates that a scheduler, or a scheduler nested in it, stores for the groups of an optimizer."""
    for inner in getattr(scheduler, "_schedulers", []):  # SequentialLR, ChainedScheduler
        _scale_scheduler(inner, optimizer, factors)
    if getattr(scheduler, "optimizer", optimizer) is optimizer:
        for key in ("base_lrs", "max_lrs", "min_lrs"):
            if isinstance(rates := getattr(scheduler, key, None), list):
                setattr(scheduler, key, [rate * factor for rate, factor in zip(rates, factors, strict=True)])
