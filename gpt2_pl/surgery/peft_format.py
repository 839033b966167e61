"""Saving and loading of adapters in the format of ``peft``; :mod:`gpt2_pl.surgery.peft_kinds` has their types.

``peft`` adapts ``GPT2LMHeadModel`` or ``GPT2ForSequenceClassification`` of ``transformers``. The head ``score`` of the
latter has no bias. A head's bias c is therefore added to the bias of the final layer norm, whose output only the head
reads: W (h + d) = W h + c for d = pinv(W) c.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gpt2_pl.errors import InputError, listing, require
from gpt2_pl.heads import ClassificationHead
from gpt2_pl.kernels.prepacked_linear import MergeableLayer
from gpt2_pl.pretrained import write_folder
from gpt2_pl.surgery.base import Surgery
from gpt2_pl.surgery.peft_kinds import KINDS, Modules, PeftKind
from gpt2_pl.utils.yaml_json import read_json

if TYPE_CHECKING:
    import os

    from tokenizers import Tokenizer

    from gpt2_pl.model import GPT2
    from gpt2_pl.utils.hugging_face_schema import AdapterConfig

ADAPTER_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def fold_bias_into_ln_f(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the shift d of the final layer norm's bias that replaces a head's bias c: W d = c.

    Args:
        weight: W, (K, C).
        bias: c, (K,).

    Returns:
        d, (C,).

    Raises:
        InputError: there is no solution, because the rows of W are linearly dependent.
    """
    shift = torch.linalg.pinv(weight.double()) @ bias.double()
    if not torch.allclose(weight.double() @ shift, bias.double(), atol=1e-6):
        raise InputError("the head's rows must be linearly independent to store its bias in transformers' format")
    return shift.to(weight.dtype)


def find_kind(model: GPT2) -> tuple[PeftKind, frozenset[str]]:
    """Return the type of the adapter of ``model``, and the names of the parameters of the base that it stores.

    Raises:
        InputError: the model has no adapter, several types of adapters, or parameters that no type stores.
    """
    present = {kind: _state_names(modules) for kind in KINDS if (modules := kind.modules(model))}
    if foreign := model.state_dict().keys() - frozenset().union(*present.values()) - model.base_names:
        raise InputError(f"peft's format cannot store {listing(foreign)}{other_format(model)}")
    selected = frozenset().union(*(names for kind, names in present.items() if kind.selects_base))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if unstored := (trained & model.base_names) - selected:
        cause = f"the base trains (train_base, or a surgery that selects its parameters): {listing(unstored)}"
        raise InputError(f"{cause}; peft's format cannot store these{other_format(model)}", key="train_base")
    *labels, last = (kind.label for kind in KINDS)
    if not present:
        has = f"peft's format has {', '.join(labels)} or {last}"
        raise InputError(f"the run has no adapter; {has}; export the whole model with --format hf", key="format")
    if len(present) != 1:
        found = " and ".join(kind.label for kind in present)
        raise InputError(f"a peft adapter must be {', '.join(labels)} or {last}, got {found}")
    return next(iter(present)), selected


def _state_names(modules: Modules) -> frozenset[str]:
    """Return the names, in a model, of the tensors of some of its modules."""
    return frozenset(f"{name}.{key}" for name, module in modules.items() for key in module.state_dict())


def save(model: GPT2, folder: str | os.PathLike[str], base: str | None, head: ClassificationHead | None = None) -> None:
    """Save the adapter of ``model`` in the format of ``peft``, to be loaded on the base.

    Args:
        model: a GPT-2 with an adapter of one of the types in :data:`~gpt2_pl.surgery.peft_kinds.KINDS`. Several LoRA
            surgeries are saved as one adapter.
        folder: the folder of adapter_config.json and adapter_model.safetensors, which are written.
        base: path or id of the base, for adapter_config.json.
        head: a classification head on the last token; without one the adapter is for language modeling.

    Raises:
        InputError: the model has no adapter, tensors that the format cannot store, several kinds of adapters, or an
            adapted embedding without a head (peft does not adapt the tied language-model head).
    """
    kind, _ = find_kind(model)
    modules = kind.modules(model)
    if "wte" in modules and head is None:
        raise InputError("peft cannot adapt the language-model head, which is tied to the adapted wte; use --format hf")
    tensors, specific = kind.write(model, modules)
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        "inference_mode": True,
        "peft_type": kind.peft_type,
        **specific,
    }
    if head is not None:
        weight, bias = head.linear.weight.detach(), head.linear.bias.detach()
        tensors[f"{kind.root}score.weight"] = weight
        config["modules_to_save"] = ["score", *kind.write_shift(model, tensors, fold_bias_into_ln_f(weight, bias))]
    write_folder(Path(folder), _WEIGHTS, tensors, ADAPTER_CONFIG, config)


def other_format(model: GPT2) -> str:
    """Return the remedy for a model that peft's format cannot store."""
    if model.n_virtual:
        return "; no format stores them together with virtual tokens"
    mergeable = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, MergeableLayer))
    if all(name in model.base_names or name.startswith(mergeable) for name in model.state_dict()):
        return "; use --format hf"
    return "; only a checkpoint stores modules that cannot be merged"


@dataclass
class PeftAdapter(Surgery):
    """Adapter for GPT-2 that ``peft`` saved, of a type in :data:`~gpt2_pl.surgery.peft_kinds.KINDS`.

    It can be trained further.

    Args:
        folder: the folder with adapter_config.json and adapter_model.safetensors.
        digest: expected SHA-256 of the two files, from a checkpoint; by default it is computed from them.

    Raises:
        InputError: in ``apply``, the adapter does not exist, has changed, is of an unsupported kind, has unsupported
            options or does not fit the model.
    """

    freezes_base = True
    loads_weights = True

    folder: str
    digest: str | None = None

    def __post_init__(self) -> None:
        self._score: Tensor | None = None  # weight of the saved head
        self._shift: Tensor | None = None  # of the final layer norm's bias

    def apply(self, model: GPT2, tokenizer: Tokenizer | None = None) -> GPT2:
        """Add the saved adapter to ``model`` and freeze the other published parameters; see :class:`Surgery`."""
        config, tensors = self._read()
        self._score = tensors.pop("score.weight", None)
        if (shift := self._take_ln_f_shift(model, tensors)) is not None:
            self._shift = shift
        (kind,) = (kind for kind in KINDS if kind.peft_type == config.peft_type)
        modules = kind.read(model, config, tensors, self.folder)
        if tensors:
            raise InputError(f"{self.folder}: {_WEIGHTS} has the unexpected tensor {min(tensors)}")
        kind.insert(model, modules)
        self.selects_base, self.freezes_base = kind.selects_base, not kind.selects_base
        return model

    def load_head(self, head: nn.Module) -> None:
        """Copy ``score`` from the adapter; the bias is computed from the shift of the final layer norm's bias."""
        score = self._score
        if score is None or not isinstance(head, ClassificationHead):
            return
        shape = tuple(head.linear.weight.shape)
        require(score.shape == shape, "the head", score, f"of shape {shape} (classes, features)", self.folder)
        with torch.no_grad():
            head.linear.weight.copy_(score)
            head.linear.bias.zero_()
            if self._shift is not None:
                head.linear.bias.copy_(score @ self._shift)

    def stored_head(self) -> ClassificationHead | None:
        """Return the saved head, after ``apply``; None if the adapter has none."""
        if self._score is None:
            return None
        head = ClassificationHead(self._score.size(1), self._score.size(0))
        self.load_head(head)
        return head

    def describe(self) -> tuple[AdapterConfig, int | None]:
        """Return the adapter_config.json, and the number of outputs of the saved head; None without a head."""
        config, tensors = self._read()
        score = tensors.get("score.weight")
        return config, None if score is None else len(score)

    def _read(self) -> tuple[AdapterConfig, dict[str, Tensor]]:
        from gpt2_pl.utils.hugging_face_schema import check_adapter

        folder = Path(self.folder).expanduser()
        try:
            config = check_adapter(read_json(folder / ADAPTER_CONFIG), str(folder / ADAPTER_CONFIG))
            stored = load_file(folder / _WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder} is not a peft adapter that is supported: {error}") from None
        for name, tensor in stored.items():
            if tensor.dim() == 0 or 0 in tensor.shape or not tensor.is_floating_point() or not tensor.isfinite().all():
                raise InputError(f"{folder / _WEIGHTS}: {name} must contain finite floating-point numbers")
        digest = hashlib.sha256(
            b"".join((folder / name).read_bytes() for name in (ADAPTER_CONFIG, _WEIGHTS))
        ).hexdigest()
        if self.digest not in (None, digest):
            raise InputError(f"{folder}: the adapter has changed since it was trained on; restore its files")
        self.digest = digest
        names = (name.removeprefix("base_model.").removeprefix("model.") for name in stored)
        return config, dict(zip(names, stored.values(), strict=True))

    def _take_ln_f_shift(self, model: GPT2, tensors: dict[str, Tensor]) -> Tensor | None:
        """Remove a saved final layer norm from ``tensors`` and return the shift of its bias, a head's bias."""
        stored: list[Any] = [tensors.pop(f"transformer.ln_f.{key}", None) for key in ("weight", "bias")]
        (weight, bias), base, device = stored, model.ln_f, model.ln_f.weight.device
        if stored == [None, None] or device.type == "meta":
            return None
        is_complete = weight is not None and bias is not None and bias.shape == base.bias.shape
        if not is_complete or not torch.equal(weight.to(device), base.weight):
            raise InputError(f"{self.folder}: ln_f.weight must be that of the base; only ln_f.bias may differ")
        return bias.to(device) - base.bias.detach()
