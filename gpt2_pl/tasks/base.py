"""Base class of all tasks: the GPT-2, its surgery, the data that callbacks read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric

from gpt2_pl import kernels, pretrained
from gpt2_pl.errors import InputError, listing, require
from gpt2_pl.filesystem import resolve_checkpoint_dir
from gpt2_pl.metrics import MetricInfo
from gpt2_pl.model import GPT2, GPT2Config
from gpt2_pl.optim import LinearWithWarmup, Schedule
from gpt2_pl.surgery import LoRAEmbedding, Surgery, build
from gpt2_pl.surgery.targets import AdaptedLinear
from gpt2_pl.tasks import averaging
from gpt2_pl.tasks.fsdp import shard
from gpt2_pl.tasks.optimization import OptimizedModule, OptimizerCallable, gpt2_layers
from gpt2_pl.tasks.protocols import RowTable, TokenizedData
from gpt2_pl.tasks.scores import ScoredModule
from gpt2_pl.text.tokenizer import validate_vocab_size
from gpt2_pl.utils.registry import Registered, class_path

if TYPE_CHECKING:
    from gpt2_pl.tasks.recorded_step import RecordedStep


def _build_model(config: GPT2Config) -> GPT2:
    """Create a GPT-2 with random weights.

    Raises:
        InputError: there is not enough memory for this shape.
    """
    try:
        return GPT2(config)
    except (RuntimeError, MemoryError):
        message = f"there is no memory for a GPT-2 of this shape: {config}"
        raise InputError(f"model.config: {message}", key="model.config") from None


def _find_trained_adapted_weight(model: GPT2) -> tuple[str, str] | None:
    """Return the name of a weight that trains although an adapter adapts it, and the adapter's surgery, or None."""
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLinear | LoRAEmbedding))
    return next(((f"{name}.weight", layer.surgery) for name, layer in layers if layer.weight.requires_grad), None)


class Task(Registered, ScoredModule, OptimizedModule):
    """LightningModule of a GPT-2; subclasses add a head, a loss and metrics.

    A checkpoint holds the prompt template and the class names of the data, and cannot be used with others.

    Args:
        base: pretrained GPT-2, a Hugging Face folder or hub id.
        config: shape of a randomly initialized GPT-2, instead of ``base``.
        dropout: dropout rate of the GPT-2, in [0, 1); by default that of the base or of ``config``.
        surgery: changes made to the GPT-2 before training, in this order, such as ``[LoRA(rank=8)]``.
        train_base: whether the weights of the base train, unless a surgery freezes or unfreezes some; by default they
            train if there is no surgery.
        frozen_base_dropout: whether a frozen base applies ``dropout`` in training, as in peft. The base is frozen if
            none of its weights trains in the whole run; weights that :class:`~gpt2_pl.callbacks.GradualUnfreezing`
            freezes for a stage count as trained. The dropout of adapters and of the head is not affected.
        optimizer: creates the optimizer from parameter groups.
        schedule: learning-rate schedule; by default linear decay.
        compile: what is compiled with ``torch.compile``: nothing, each of the ``blocks`` (or ``True``), which takes
            seconds, or the whole ``model``, which takes up to some minutes and is faster. Either way the loss of a
            language model is compiled too. If batches have a fixed length, the model is compiled for their shapes;
            otherwise for any shape. With FSDP the blocks are compiled.
        activation_checkpointing: whether activations are recomputed in the backward pass, which takes less memory and
            more time.

    Raises:
        InputError: both or neither of ``base`` and ``config``, a base that cannot be used, surgery that does not fit
            the base, or contradictory settings.
    """

    #: Metrics that are logged as ``<split>/<name>``, by name.
    metric_info: ClassVar[dict[str, MetricInfo]] = {"loss": MetricInfo(higher_is_better=False, shown=True)}
    #: Score that selects the best checkpoint.
    monitor: ClassVar[str] = "val/loss"
    #: Score that compares runs; by default, and in runs without this score, ``monitor``.
    primary: ClassVar[str | None] = None
    #: Whether nearly all batches have the same length.
    fixed_length_batches: ClassVar[bool] = False
    #: Whether the last training step read other tokens than those of its batch.
    decoded_last_step: bool = False
    #: The steps of a training that are replayed from CUDA graphs; None for ordinary steps.
    recorded_step: RecordedStep | None = None
    #: Settings with which the task generates texts, for ``generate``: arguments of
    #: :func:`~gpt2_pl.generation.generate`, or of :func:`~gpt2_pl.beams.beam_search` with ``num_beams``.
    decoding: Mapping[str, Any] = {}
    #: Name, without the split, of the file that :meth:`samples` are written to.
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
        compile: bool | Literal["blocks", "model"] = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if (base is None) == (config is None):
            got = "neither" if base is None else "both; set one to null: --model.base null or --model.config null"
            wanted = "base (a pretrained GPT-2: folder or hub id) or config (the shape of a randomly initialized one)"
            raise InputError(f"model: give either {wanted}; got {got}", key="model.base")
        require(dropout is None or 0.0 <= dropout < 1.0, "model.dropout", dropout, "in [0, 1)")
        if base is not None:
            folder = resolve_checkpoint_dir(base, "model.base")
            self.config = pretrained.read_config(folder, dropout)
            pretrained.validate_weights(folder, self.config)
        elif config is not None:
            shape = config if isinstance(config, dict) else asdict(config)
            self.config = GPT2Config(**shape | ({} if dropout is None else {"dropout": dropout}))
        self.base = base
        self.base_digest: str | None = None
        self.surgery = [build(settings) for settings in surgery or []]
        self.train_base = not self.surgery if train_base is None else train_base
        self.frozen_base_dropout = frozen_base_dropout
        self._check_surgery()
        self.make_optimizer, self.schedule = optimizer, schedule or LinearWithWarmup()
        self.compiles: Literal["blocks", "model"] | None = "blocks" if compile is True else (compile or None)
        self.activation_checkpointing = activation_checkpointing
        self.save_hyperparameters(ignore=["optimizer", "schedule", "surgery"], logger=False)
        self.hparams["config"] = None if config is None else asdict(self.config)
        self.hparams["surgery"] = [surgery.settings() for surgery in self.surgery]
        self._restored: dict[str, Any] | None = None  # loaded checkpoint whose training state is not checked yet
        self.prompt_spec: dict[str, Any] | None = None  # that of the training data of a loaded checkpoint

    def _apply_surgery(self, model: GPT2) -> None:
        """Set what trains by default from ``train_base``, apply all surgery in order, and record what trains then.

        The record is made once, before callbacks freeze parameters for a part of training. Names are relative to the
        GPT-2.

        Raises:
            InputError: a surgery does not fit the model, replaces it, or removes parameters that another one added.
        """
        base_parameters = list(model.parameters())
        base_ids = set(map(id, base_parameters))
        added: dict[str, nn.Parameter] = {}
        for parameter in base_parameters:
            parameter.requires_grad_(self.train_base)
        for surgery in self.surgery:
            self._apply_one(surgery, model, base_parameters)
            remaining = set(map(id, model.parameters()))
            if lost := [name for name, parameter in added.items() if id(parameter) not in remaining]:
                message = f"surgery {class_path(type(surgery))} removes {listing(lost)}, which earlier surgery added"
                advice = "its modules must keep the layers that they replace, or replace others"
                raise InputError(f"{message}; {advice}", key="model.surgery")
            added = {name: p for name, p in model.named_parameters() if id(p) not in base_ids}
        self.base_is_frozen = not any(parameter.requires_grad for parameter in base_parameters)
        named = dict(model.named_parameters(remove_duplicate=False))
        self.trained_names = frozenset(name for name, p in named.items() if p.requires_grad)
        self.frozen_names = frozenset(n for n, p in named.items() if id(p) in base_ids) - self.trained_names

    def _apply_one(self, surgery: Surgery, model: GPT2, base_parameters: list[nn.Parameter]) -> None:
        """Apply a surgery; restore the trainable parameters of the base if the surgery has ``freezes_base``."""
        were_trainable = [parameter.requires_grad for parameter in base_parameters]
        result, name = surgery.apply(model), class_path(type(surgery))
        if result is not model and result is not None:
            raise InputError(f"surgery {name}: apply must change the model in place", key="model.surgery")
        if not surgery.freezes_base:
            return
        if any(parameter.requires_grad for parameter in base_parameters):
            problem = f"surgery {name} has freezes_base = True, but leaves parameters of the base trainable"
            raise InputError(problem, key="model.surgery")
        for parameter, was_trainable in zip(base_parameters, were_trainable, strict=True):
            parameter.requires_grad_(was_trainable)

    def _check_surgery(self) -> None:
        """Apply the surgery to a model on the meta device, to fail before weights are loaded.

        Raises:
            InputError: surgery or settings that do not fit the model or each other.
        """
        with torch.device("meta"):
            skeleton = _build_model(self.config)
        skeleton.source = None if self.base is None else str(resolve_checkpoint_dir(self.base, "model.base"))
        with torch.random.fork_rng(devices=[]):  # Later random draws must not depend on this model.
            self._apply_surgery(skeleton)
        names = ", ".join(class_path(type(surgery)) for surgery in self.surgery)
        if self.base is None and self.base_is_frozen:
            cause = f"with {names or 'train_base: false'} it would not train"
            advice = "give a trained GPT-2: --model.base FOLDER_OR_ID --model.config null"
            raise InputError(f"model.config is initialized at random, and {cause}; {advice}", key="model.config")
        if found := _find_trained_adapted_weight(skeleton):
            name, adapter = found
            cause = "train_base: true (full fine-tuning)" if self.train_base else "a surgery that unfreezes it"
            raise InputError(f"{cause} and {adapter} both train {name}; use only one of them", key="model.surgery")
        if self.train_base and (selection := next((one for one in self.surgery if one.selects_base), None)):
            cause = f"train_base: true (full fine-tuning) and {class_path(type(selection))} both select what trains"
            raise InputError(f"{cause}; use only one of them", key="model.train_base")
        if self.train_base and self.base_is_frozen:
            rank_zero_warn(f"train_base: true has no effect: {names} freezes the whole base (see Surgery.freezes_base)")
        self.trains_blocks = any(name.startswith(("h.", "wte.", "wpe.")) for name in self.trained_names)
        self.n_virtual = skeleton.n_virtual
        self._meta_model = (skeleton,)  # in a tuple, so that it is no submodule
        self.layer_names = [*gpt2_layers(skeleton), "head"]  # the keys of layer_groups()

    @property
    def max_length(self) -> int:
        """Largest number of tokens in a text: the context length without virtual tokens."""
        return self.config.n_positions - self.n_virtual

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether the best checkpoint has the highest or the lowest value of ``monitor``."""
        info = self.metric_info.get(self.monitor.partition("/")[2])
        return "min" if info is not None and info.higher_is_better is False else "max"

    @property
    def has_static_shapes(self) -> bool:
        """Whether nearly all training batches have the same shape, for which the model is compiled."""
        return self.fixed_length_batches

    @property
    def displayed_metrics(self) -> tuple[str, ...]:
        """Metrics that the table of epochs shows."""
        return tuple(name for name, info in self.metric_info.items() if info.shown)

    # Building

    def configure_model(self) -> None:
        """Load the base or create the GPT-2, and apply surgery; Lightning calls this in every stage."""
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
        if self.compiles == "model" and self.device_mesh is None:
            self.gpt2.compile(dynamic=not self.has_static_shapes)
        elif self.compiles:
            for block in self.gpt2.h:
                block.compile(dynamic=True)
        if self.device_mesh is not None:
            shard(self.gpt2, self.device_mesh)

    def setup(self, stage: str) -> None:
        """Check the data's tokenizer, reset all metrics, and create the averages of the weights."""
        self._logged.clear()
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()  # An interrupted run may have left values.
        if isinstance(self.datamodule, TokenizedData):
            self.check_tokenizer(self.datamodule.tokenizer)
        averaging.create_averages(self, stage)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer with more tokens than the GPT-2's vocabulary."""
        where = f"model.base {self.base}" if self.base else "model.config"
        rule = None if self.base else "increase model.config.vocab_size, or give another data.tokenizer"
        validate_vocab_size(tokenizer, self.config.vocab_size, where, "data.tokenizer", rule)

    def train(self, mode: bool = True) -> Task:
        """Set training mode; a GPT-2 without trained parameters stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.gpt2 is not None and self.backbone_frozen:
            self.gpt2.eval()
        return self

    @property
    def backbone_frozen(self) -> bool:
        """Whether the GPT-2 neither trains nor applies dropout, so that its features can be computed once."""
        return not self.trained_names and not self.frozen_base_dropout

    # Outputs for callbacks

    def images(self, split: str) -> dict[str, NDArray[Any]]:
        """Draw the results of an epoch of a split; callbacks log the images before the metrics are reset.

        Args:
            split: ``train``, ``val`` or ``test``.

        Returns:
            Images (H, W, 3), from 0 to 255, by name. All processes call this; those of the first are used.
        """
        return {}

    def row_table(self, split: str) -> RowTable | None:
        """Return the outputs of the model for every row of an evaluation; a callback writes them.

        Args:
            split: ``val``, ``test`` or ``predict``.

        Returns:
            The table, or None for a task without one. All processes call this; the table of the first is written.
        """
        return None

    def samples(self, split: str) -> dict[str, str]:
        """Return the texts that the model generated in an evaluation, by name; a callback logs and writes them.

        Args:
            split: ``val`` or ``test``.
        """
        return {}

    def training_outputs(self, gpt2: GPT2, input_ids: Tensor) -> Tensor:
        """Compute the tensor that the loss reads, for counting operations; by default all hidden states.

        Args:
            gpt2: a GPT-2 on the meta device.
            input_ids: token ids (1, T), on the meta device.
        """
        return gpt2(input_ids)

    def training_flops_per_token(self, context: float) -> float | None:
        """Count the floating-point operations per token of a forward and a backward pass.

        ``torch.utils.flop_counter`` counts them on the meta device, with adapters and the parameters that train now.
        Recomputed activations and task heads are not counted.

        Args:
            context: mean number of tokens in a row.

        Returns:
            The number of operations, or None if the model cannot be run on the meta device.
        """
        from torch.utils.flop_counter import FlopCounterMode

        trainable = {name for name, parameter in self.backbone.named_parameters() if parameter.requires_grad}
        gpt2 = self._meta_model[0].eval()
        for name, parameter in gpt2.named_parameters():
            parameter.requires_grad_(name in trainable)
        input_ids = torch.zeros(1, min(max(1, round(context)), self.max_length), dtype=torch.long, device="meta")
        kernels_enabled = kernels.set_enabled(False)
        try:
            with FlopCounterMode(display=False) as counter:
                outputs = self.training_outputs(gpt2, input_ids)
                if outputs.requires_grad:
                    outputs.sum().backward()
        except (NotImplementedError, RuntimeError):  # A surgery reads values.
            return None
        finally:
            kernels.set_enabled(kernels_enabled)
        return counter.get_total_flops() / input_ids.numel()

    def on_fit_start(self) -> None:
        """Check a checkpoint's training state, and share the parameters that do not train with averages of the weights.

        Raises:
            InputError: a state that does not fit the optimizers or schedulers.
        """
        self._check_training_state()
        averaging.share_untrained(self)
