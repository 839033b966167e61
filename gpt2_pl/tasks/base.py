"""What all tasks share: a GPT-2, what of it trains, the optimizer and its schedule, losses and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from gpt2_pl import kernels, pretrained
from gpt2_pl.errors import InputError, listing
from gpt2_pl.filesystem import resolve_checkpoint_dir
from gpt2_pl.metrics import MetricInfo, RowOutputs
from gpt2_pl.model import GPT2, GPT2Config
from gpt2_pl.optim import LinearWithWarmup, NamedParameters, Schedule, parameter_groups
from gpt2_pl.surgery import Adapter, Surgery, build
from gpt2_pl.tasks import averaging
from gpt2_pl.tasks.accumulation import StepMean, accumulation_scheduler, scheduled_steps
from gpt2_pl.tasks.checkpointed import CheckpointedModule
from gpt2_pl.tasks.fsdp import shard
from gpt2_pl.tasks.protocols import RowTable, TokenizedData
from gpt2_pl.text.tokenizer import validate_vocab_size
from gpt2_pl.utils.registry import Registered, class_path

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]


def _build_model(config: GPT2Config) -> GPT2:
    """A GPT-2 of random weights.

    Raises:
        InputError: there is no memory for one of this shape.
    """
    try:
        return GPT2(config)
    except (RuntimeError, MemoryError):
        raise InputError(f"model.config: there is no memory for a GPT-2 of this shape: {config}") from None


def _written_twice(model: GPT2) -> str | None:
    """The name of a weight that trains although LoRA adapts it; None if there is none."""
    adapters = ((name, module) for name, module in model.named_modules() if isinstance(module, Adapter))
    return next((f"{name}.weight" for name, adapter in adapters if adapter.weight.requires_grad), None)


def _layers(model: GPT2) -> dict[str, NamedParameters]:
    """The layers of a GPT-2 from input to output, and their named parameters."""
    blocks = [f"block.{i}" for i in range(len(model.h))]
    layers: dict[str, NamedParameters] = {name: [] for name in ("embeddings", *blocks, "ln_f", "prefix", "prompt")}
    for name, parameter in model.named_parameters():
        top, _, rest = name.partition(".")
        if top in ("wte", "wpe"):
            layer = "embeddings"
        elif top == "h" and f"block.{rest.partition('.')[0]}" in layers:
            layer = f"block.{rest.partition('.')[0]}"
        else:
            layer = f"gpt2.{top}" if top in ("h", "head", "embeddings") else top
        layers.setdefault(layer, []).append((f"gpt2.{name}", parameter))
    return {name: parameters for name, parameters in layers.items() if parameters or name not in ("prefix", "prompt")}


class Task(Registered, CheckpointedModule):
    """A GPT-2 under Lightning. Subclasses add a head, a loss and metrics.

    A checkpoint holds the template and the class names of the data, and is refused with others.

    Args:
        base: pretrained GPT-2, a Hugging Face folder or hub id.
        config: shape of a GPT-2 to train from a random start, instead of ``base``.
        dropout: of the GPT-2; by default the base's or the config's own.
        surgery: changes made to the GPT-2 before it trains, in this order, such as ``[LoRA(rank=8)]``.
        train_base: whether the GPT-2's own weights train, unless a surgery freezes or unfreezes some; by default they
            do if there is no surgery.
        frozen_base_dropout: whether a frozen GPT-2 applies ``dropout`` in training, as peft does. It is frozen if none
            of its own weights trains in the whole run; weights that
            :class:`~gpt2_pl.callbacks.GradualUnfreezing` freezes for a stage still count as trained.
            The dropout of adapters and of the head is not affected.
        optimizer: makes the optimizer from parameter groups.
        schedule: the learning rate over training.
        compile: compile each block, and a language model's loss, with ``torch.compile``.
        activation_checkpointing: recompute activations in the backward pass: less memory, more time.

    Raises:
        InputError: both or neither of ``base`` and ``config``, a base that cannot be used, surgery that does not fit
            it, or settings that contradict each other.
    """

    #: The metrics that are logged as ``<split>/<name>``, by name.
    metric_info: ClassVar[dict[str, MetricInfo]] = {"loss": MetricInfo(higher_is_better=False, shown=True)}
    #: The score that decides which checkpoint is best.
    monitor: ClassVar[str] = "val/loss"
    #: The score by which runs are compared, where they have it; by default ``monitor``.
    primary: ClassVar[str | None] = None
    #: Whether nearly all batches have the same length.
    fixed_length_batches: ClassVar[bool] = False
    #: The name of the file that :meth:`samples` are written to.
    samples_name: ClassVar[str] = "samples"

    def __init__(
        self,
        base: str | None = None,
        config: GPT2Config | None = None,
        dropout: float | None = None,
        surgery: list[Surgery] | None = None,
        train_base: bool | None = None,
        frozen_base_dropout: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5, fused=True),
        schedule: Schedule | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if (base is None) == (config is None):
            raise InputError(
                "model: give either base (a pretrained GPT-2: folder or hub id) or config (a shape to train from "
                f"a random start); got {'neither' if base is None else 'both: --model.config null leaves config out'}"
            )
        if dropout is not None and not 0.0 <= dropout < 1.0:
            raise InputError(f"model.dropout is {dropout}; it must be in [0, 1)")
        if base is not None:
            folder = resolve_checkpoint_dir(base, "model.base")
            self.config = pretrained.read_config(folder, dropout)
            pretrained.check(folder, self.config)
        else:
            shape = config if isinstance(config, dict) else asdict(config)  # type: ignore[arg-type]
            self.config = GPT2Config(**shape) if dropout is None else GPT2Config(**{**shape, "dropout": dropout})
        self.base = base
        self.base_digest: str | None = None
        self.surgery = [build(settings) for settings in surgery or []]
        self.train_base = not self.surgery if train_base is None else train_base
        self.frozen_base_dropout = frozen_base_dropout
        self._check_surgery()
        self.make_optimizer, self.schedule = optimizer, schedule or LinearWithWarmup()
        self.compile_blocks, self.activation_checkpointing = compile, activation_checkpointing
        self.save_hyperparameters(ignore=["optimizer", "schedule", "surgery"], logger=False)
        self.hparams["config"] = None if config is None else asdict(self.config)
        self.hparams["surgery"] = [surgery.settings() for surgery in self.surgery]
        self.gpt2: GPT2 | None = None
        self._restored: dict[str, Any] | None = None  # a checkpoint whose training state is to be checked
        self._logged: set[str] = set()  # the splits whose scores the trainer has for this epoch
        self._step_mean = StepMean()
        self.prompt_spec: dict[str, Any] | None = (
            None  # template, labels and max_length that a loaded checkpoint learned with
        )

    def _apply_surgery(self, model: GPT2) -> None:
        """Let ``train_base`` set what trains by default, apply all surgery in order, and record what trains after it.

        The record is made once: callbacks that freeze parameters for a part of the training do not change what the
        optimizer and the checkpoints hold. Names are relative to the GPT-2.

        Raises:
            InputError: a surgery does not fit the model, replaces it, or removes what another one added.
        """
        published = list(model.parameters())
        identities = set(map(id, published))
        added: dict[str, nn.Parameter] = {}
        self._freezing: list[str] = []  # surgery, not of LoRA's kind, that freezes every published parameter
        for parameter in published:
            parameter.requires_grad_(self.train_base)
        for surgery in self.surgery:
            before = [parameter.requires_grad for parameter in published]
            changed = surgery.apply(model)
            if changed is not model and changed is not None:
                raise InputError(f"surgery {class_path(type(surgery))}: apply must change the model in place")
            if surgery.freezes_base:
                for parameter, trains in zip(published, before, strict=True):
                    parameter.requires_grad_(trains)
            elif any(before) and not any(parameter.requires_grad for parameter in published):
                self._freezing.append(class_path(type(surgery)))
            left = set(map(id, model.parameters()))
            if lost := [name for name, parameter in added.items() if id(parameter) not in left]:
                raise InputError(
                    f"surgery {class_path(type(surgery))} removes {listing(lost)}, which surgery before it added; its "
                    "modules must keep the layers that they replace, or replace others"
                )
            added = {name: p for name, p in model.named_parameters() if id(p) not in identities}
        self.trained_names, self.frozen_names = frozenset[str](), frozenset[str]()
        self.base_is_frozen = not any(parameter.requires_grad for parameter in published)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                self.trained_names |= {name}
            elif id(parameter) in identities:
                self.frozen_names |= {name}

    def _check_surgery(self) -> None:
        """Operate on a model without weights: what cannot be done is refused before anything is loaded."""
        skeleton = self._skeleton()
        if self.base is None and self.base_is_frozen:
            raise self._random_and_frozen()
        if name := _written_twice(skeleton):
            what = "train_base: true (full fine-tuning)" if self.train_base else "a surgery that unfreezes it"
            raise InputError(f"{what} and LoRA both write {name}; leave one of them out")
        if self.train_base and self.base_is_frozen and self._freezing:
            rank_zero_warn(
                f"train_base: true has no effect: {self._freezing[0]} freezes the whole base; with freezes_base = True "
                "in that class a task restores what trained before"
            )
        self.trains_blocks = any(name.startswith(("h.", "wte.", "wpe.")) for name in self.trained_names)
        self.n_virtual = skeleton.n_virtual
        self.layer_names = [*_layers(skeleton), "head"]  # of layer_groups(), before it is built

    def _skeleton(self) -> GPT2:
        """Build a GPT-2 without weights, surgery applied."""
        with torch.device("meta"):
            skeleton = _build_model(self.config)
        skeleton.source = None if self.base is None else str(resolve_checkpoint_dir(self.base, "model.base"))
        with torch.random.fork_rng(devices=[]):  # what it draws here would shift all that is drawn later
            self._apply_surgery(skeleton)
        return skeleton

    def _random_and_frozen(self) -> InputError:
        """Return the error for a GPT-2 from a random start of which nothing trains, with what would help."""
        advice = "give a trained GPT-2: --model.base FOLDER_OR_ID --model.config null"
        names = ", ".join(class_path(type(surgery)) for surgery in self.surgery)
        cause = f"surgery ({names})" if self.surgery else "train_base: false"
        if self._freezing:  # train_base is true already
            cause = f"{self._freezing[0]}, which freezes all of it despite train_base: true,"
        self.train_base = True
        skeleton = self._skeleton()
        if self._freezing:
            advice += f"; or set freezes_base = True in {self._freezing[0]}, and train_base: true"
        elif not _written_twice(skeleton):
            advice += "; or train_base: true"
        return InputError(f"model.config starts at random, and with {cause} it would stay so; {advice}")

    @property
    def max_length(self) -> int:
        """The longest text, in tokens: what virtual ones leave of the context."""
        return self.config.n_positions - self.n_virtual

    @property
    def backbone(self) -> GPT2:
        """The GPT-2, once ``configure_model`` has built it."""
        if self.gpt2 is None:
            raise RuntimeError("the model is not built yet: call configure_model() first")
        return self.gpt2

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether the checkpoint with the highest or with the lowest value of ``monitor`` is best."""
        info = self.metric_info.get(self.monitor.partition("/")[2])
        return "min" if info is not None and info.higher_is_better is False else "max"

    @property
    def displayed_metrics(self) -> tuple[str, ...]:
        """The metrics that the table of epochs shows."""
        return tuple(name for name, info in self.metric_info.items() if info.shown)

    # Building

    def configure_model(self) -> None:
        """Build the GPT-2: load the base, apply surgery. Lightning calls this for every stage."""
        if self.gpt2 is not None:
            return
        if self.base is not None:
            self.gpt2 = pretrained.load(self.base, dropout=self.config.dropout)
            self.base_digest = pretrained.weights_sha256(self.gpt2)
        else:
            self.gpt2 = _build_model(self.config)
        self.gpt2.activation_checkpointing = self.activation_checkpointing
        self._apply_surgery(self.gpt2)
        if not self.frozen_base_dropout and self.base_is_frozen:
            self.gpt2.set_dropout(0.0)
        if self.compile_blocks:
            for block in self.gpt2.h:
                block.compile(dynamic=True)
        if self.device_mesh is not None:
            shard(self.gpt2, self.device_mesh)

    def setup(self, stage: str) -> None:
        """Check that the data's tokens are the model's, and start all metrics anew."""
        self._logged.clear()
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()  # a run that broke off leaves what it had added
        if isinstance(self.datamodule, TokenizedData):
            self.check_tokenizer(self.datamodule.tokenizer)
        averaging.create_averages(self, stage)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer with tokens that the GPT-2 does not have."""
        where = f"model.base {self.base}" if self.base else "model.config"
        validate_vocab_size(tokenizer, self.config.vocab_size, where, "data.tokenizer")

    def train(self, mode: bool = True) -> Task:
        """Training mode; a GPT-2 in which nothing trains stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.gpt2 is not None and self.backbone_frozen:
            self.gpt2.eval()
        return self

    @property
    def backbone_frozen(self) -> bool:
        """Whether nothing in the GPT-2 trains and none of it is random, so that its features can be computed once."""
        return not self.trained_names and not self.frozen_base_dropout

    # Parameters

    def head_parameters(self) -> NamedParameters:
        """The named parameters that are not the GPT-2's."""
        return [(name, p) for name, p in self.named_parameters() if not name.startswith("gpt2.")]

    def pictures(self, split: str) -> dict[str, NDArray[Any]]:
        """Draw what an epoch of a split looks like, for callbacks to show before its metrics are reset.

        Args:
            split: ``train``, ``val`` or ``test``.

        Returns:
            Pictures (H, W, 3), from 0 to 255, by name. All processes call this; all but the first may return none.
        """
        return {}

    def row_table(self, split: str) -> RowTable | None:
        """Return what the model has to say of every row of an evaluation, for a callback to write.

        Args:
            split: ``val``, ``test`` or ``predict``.

        Returns:
            None for a task without such a table. All processes call this; only the first one's is written.
        """
        return None

    def samples(self, split: str) -> dict[str, str]:
        """Return texts that the model wrote in an evaluation, by name, for a callback to show and to write.

        Args:
            split: ``val`` or ``test``.
        """
        return {}

    def training_outputs(self, gpt2: GPT2, input_ids: Tensor) -> Tensor:
        """Return the tensor that the loss is computed from, to count operations; by default all hidden states.

        Args:
            gpt2: a model without memory, on the meta device.
            input_ids: (1, T).
        """
        return gpt2(input_ids)

    def training_flops_per_token(self, context: float) -> float | None:
        """Return the floating-point operations per token of a forward and a backward pass.

        ``torch.utils.flop_counter`` counts them on a model without memory in which those parameters train that train
        now, so that adapters and frozen layers are taken into account. Recomputation and task heads are not counted.

        Args:
            context: mean number of tokens in a row.

        Returns:
            None if the model cannot be run without memory.
        """
        from torch.utils.flop_counter import FlopCounterMode

        trains = {name for name, parameter in self.backbone.named_parameters() if parameter.requires_grad}
        gpt2 = self._skeleton().eval()
        for name, parameter in gpt2.named_parameters():
            parameter.requires_grad_(name in trains)
        input_ids = torch.zeros(1, max(1, round(context)), dtype=torch.long, device="meta")
        kernels_enabled = kernels.set_enabled(False)
        try:
            with FlopCounterMode(display=False) as counter:
                outputs = self.training_outputs(gpt2, input_ids)
                if outputs.requires_grad:
                    outputs.sum().backward()
        except (NotImplementedError, RuntimeError):  # surgery that reads values
            return None
        finally:
            kernels.set_enabled(kernels_enabled)
        return counter.get_total_flops() / input_ids.numel()

    def layer_groups(self) -> dict[str, NamedParameters]:
        """The layers from input to output, and their named parameters.

        They are ``embeddings``, ``block.0`` ... ``block.{L-1}``, ``ln_f``, ``prefix`` and ``prompt`` where there is
        one, whatever else surgery added to the GPT-2 itself, by its attribute's name, and ``head``.
        """
        return {**_layers(self.backbone), "head": self.head_parameters()}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over groups per layer, decay rule and rate, and the schedule over all steps of the run."""
        adapters = [(name, m) for name, m in self.named_modules() if isinstance(m, Adapter)]
        rates = {f"{name}.lora_B": m.loraplus_lr_ratio for name, m in adapters}
        trained = {f"gpt2.{name}" for name in self.trained_names}
        trained |= {name for name, parameter in self.head_parameters() if parameter.requires_grad}
        groups = parameter_groups(self.layer_groups(), rates, trained)
        if not groups:
            raise InputError("nothing would train: train_base is false and this head has no parameters")
        try:
            optimizer = self.make_optimizer(groups)
        except ValueError as error:  # of the shapes of these parameters
            raise InputError(f"model.optimizer: {' '.join(str(error).split())}") from None
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
        total = self._n_steps()
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _n_steps(self) -> int:
        """Return the number of optimizer steps of the run; 1 where it is unbounded and the schedule does not use it.

        Raises:
            InputError: the data or the trainer's limits cannot be used, or the run is unbounded and the schedule uses
                its length.
        """
        try:
            self.trainer.fit_loop.setup_data()  # reads the data
            total = self.trainer.estimated_stepping_batches
        except ValueError as error:
            raise InputError(f"trainer: {' '.join(str(error).split())}") from None
        if (accumulation := accumulation_scheduler(self.trainer)) is not None:  # which Lightning leaves out of account
            total = scheduled_steps(self.trainer, accumulation) or total
        if math.isinf(total) or total < 0:  # no limit, or batches of unknown number
            self.check_schedule(endless=self.trainer.limit_train_batches != 0)
            return 1
        return max(int(total), 1)

    def check_schedule(self, endless: bool) -> None:
        """Refuse a schedule that uses the length of training where training has none.

        Args:
            endless: whether the number of optimizer steps is unbounded or unknown.

        Raises:
            InputError: naming the schedule.
        """
        if endless and self.schedule.needs_total:
            raise InputError(
                f"trainer.max_epochs or trainer.max_steps must be a number above 0 with model.schedule "
                f"{type(self.schedule).__name__}, whose rates depend on the length of training (trainer.max_time may "
                "end it earlier); without a length, give --model.schedule gpt2_pl.optim.ConstantWithWarmup with a "
                "warmup of 0 or in steps"
            )

    def _set_resumed_rates(self) -> None:
        """Compute the rates of a resumed run; those in the checkpoint are for the length that the run had before."""
        if self.trainer.ckpt_path is None:
            return
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, LambdaLR):
                scheduler._last_lr = [
                    base * factor(scheduler.last_epoch)
                    for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
                ]
                for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                    group["lr"] = rate

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Take a step with the gradient of the mean over all its rows, then free the gradients.

        Lightning would keep them during the next forward pass. Callbacks find them, before clipping, in
        ``on_before_optimizer_step``.
        """

        def closure() -> Any:
            loss = None if optimizer_closure is None else optimizer_closure()
            if (factor := self._step_mean.correction(self.trainer)) != 1.0:
                for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        optimizer.zero_grad()
        self._step_mean.clear()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, fused optimizers too where there is no gradient scaler (bf16).

        Lightning refuses those under any mixed precision, because a fused optimizer unscales gradients by itself.
        """
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # Training

    def on_fit_start(self) -> None:
        """Check the training state of a checkpoint, once there are optimizers and before it enters them.

        Averages of the weights are made to share what does not train.

        Raises:
            InputError: a state that does not fit them.
        """
        self._check_training_state()
        averaging.share_untrained(self)

    # Losses and scores

    def mean_loss(
        self,
        total: Tensor,
        count: int | Tensor,
        batch: dict[str, Any],
        batch_idx: int,
        unit: Literal["rows", "targets"] = "rows",
    ) -> tuple[Tensor, Tensor]:
        """Turn the sum of the losses of a batch into the loss to train on.

        Its gradients add up to the gradient of one mean over all rows (or targets) of the optimizer step, however these
        are spread over batches and processes; see :class:`~gpt2_pl.tasks.accumulation.StepMean`.

        Args:
            total: sum of the losses on this process, a scalar.
            count: how many losses that is the sum of.
            batch: may state, as ``global_<unit>`` and ``step_<unit>``, how many rows or targets all processes have in
                this batch and in all batches of the optimizer step.
            batch_idx: the number of the batch in the epoch.
            unit: what has a loss each.

        Returns:
            What ``training_step`` returns, and the mean over the batch, to log.
        """
        trainer = self.trainer
        if batch_idx % trainer.accumulate_grad_batches == 0:  # where Lightning sets the gradients to zero
            self._step_mean.clear()
        everywhere = batch.get(f"global_{unit}")
        weight = self._step_mean.weight(trainer, count, everywhere, batch.get(f"step_{unit}"))
        mean = total.detach() * (trainer.world_size / everywhere if everywhere else 1.0 / count)
        return total * weight, mean

    def leave_out_batch(self) -> None:
        """Take the batch that was given to :meth:`mean_loss` last out of the mean: its gradient is not used."""
        self._step_mean.leave_out()

    def log_scores(self, split: str, metrics: Mapping[str, Metric]) -> None:
        """Have the trainer compute and log the scores of a split when the epoch ends.

        It is told once an epoch, in the first step: to tell it takes longer than to enter a batch in the metrics.
        """
        if split not in self._logged:
            self._logged.add(split)
            for name, metric in metrics.items():
                self.log(f"{split}/{name}", metric, on_step=False, on_epoch=True, batch_size=1)

    def on_train_start(self) -> None:
        """Set the rates, and the batches per step, which Lightning does not set when it resumes within an epoch."""
        self._set_resumed_rates()
        self._step_mean.clear()
        if (scheduler := accumulation_scheduler(self.trainer)) is not None:
            self.trainer.accumulate_grad_batches = scheduler.get_accumulate_grad_batches(self.trainer.current_epoch)

    def on_train_epoch_start(self) -> None:
        """The scores of a new epoch."""
        self._logged.discard("train")

    def on_validation_epoch_start(self) -> None:
        """Start the scores and the rows' outputs of an evaluation anew."""
        self._logged.discard("val")
        self._reset_row_outputs()

    def on_test_epoch_start(self) -> None:
        """Start the scores and the rows' outputs of an evaluation anew."""
        self._logged.discard("test")
        self._reset_row_outputs()

    def on_predict_epoch_start(self) -> None:
        """Start the rows' outputs anew."""
        self._reset_row_outputs()

    def _reset_row_outputs(self) -> None:
        for metric in self.children():
            if isinstance(metric, RowOutputs):
                metric.reset()
