"""Saving and loading of adapters in the format of ``peft``: LoRA, prefixes and soft prompts.

``peft`` adapts ``GPT2LMHeadModel`` or ``GPT2ForSequenceClassification`` of ``transformers``. The head ``score`` of the
latter has no bias. A head's bias c is therefore added to the bias of the final layer norm, whose output only the head
reads: W (h + d) = W h + c for d = pinv(W) c.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gpt2_pl.errors import InputError, listing, require
from gpt2_pl.heads import ClassificationHead
from gpt2_pl.pretrained import write_folder
from gpt2_pl.surgery.base import Surgery, check_length, freeze_base
from gpt2_pl.surgery.lora import Adapter, DoRALinear, LoRAEmbedding, LoRALinear, plain_layer
from gpt2_pl.surgery.virtual_tokens import Prefix, Prompt
from gpt2_pl.utils.yaml_json import read_json

if TYPE_CHECKING:
    import os

    from tokenizers import Tokenizer

    from gpt2_pl.model import GPT2
    from gpt2_pl.utils.hugging_face_schema import AdapterConfig

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LINEAR_KEYS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
_EMBEDDING_KEYS = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


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


def save(model: GPT2, folder: str | os.PathLike[str], base: str | None, head: ClassificationHead | None = None) -> None:
    """Save the adapter of ``model`` in the format of ``peft``, to be loaded on the base.

    Args:
        model: a GPT-2 with LoRA adapters (saved as one adapter), or a prefix, or a soft prompt.
        folder: the folder of adapter_config.json and adapter_model.safetensors, which are written.
        base: path or id of the base, for adapter_config.json.
        head: a classification head on the last token; without one the adapter is for language modeling.

    Raises:
        InputError: the model has no adapter, tensors that the format cannot store, several kinds of adapters, or an
            adapted embedding without a head (peft does not adapt the tied language-model head).
    """
    adapters = {name: m for name, m in model.named_modules() if isinstance(m, Adapter)}
    modules = {name: m for name, m in model.named_modules() if isinstance(m, Adapter | Prefix | Prompt)}
    known = {f"{name}.{key}" for name, module in modules.items() for key in module.state_dict()}
    if foreign := model.state_dict().keys() - known - model.base_names:
        raise InputError(f"peft's format cannot store {listing(foreign)}{other_format(model)}")
    parts = {"LoRA": adapters, "a prefix": model.prefix, "a soft prompt": model.prompt}
    present = [name for name, part in parts.items() if part]
    if len(present) != 1:
        kinds = " and ".join(present) or "none of them"
        raise InputError(f"a peft adapter must be LoRA, a prefix or a soft prompt, got {kinds}")
    if "wte" in adapters and head is None:
        raise InputError("peft cannot adapt the language-model head, which is tied to the adapted wte; use --format hf")
    prefix = "base_model.model." if adapters else "base_model."
    tensors, specific = _lora(adapters) if adapters else _virtual(model)
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        "inference_mode": True,
        **specific,
    }
    if head is not None:
        weight, bias = head.linear.weight.detach(), head.linear.bias.detach()
        tensors[f"{prefix}score.weight"] = weight
        tensors[f"{prefix}transformer.ln_f.weight"] = model.ln_f.weight.detach()
        tensors[f"{prefix}transformer.ln_f.bias"] = model.ln_f.bias.detach() + fold_bias_into_ln_f(weight, bias)
        config["modules_to_save"] = ["score", "ln_f"]
    write_folder(Path(folder), _WEIGHTS, tensors, _CONFIG, config)


def other_format(model: GPT2) -> str:
    """Return the remedy for a model that peft's format cannot store; the other format stores no virtual tokens."""
    return "; no format stores them together with virtual tokens" if model.n_virtual else "; use --format hf"


def _lora(adapters: dict[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of LoRA adapters and their entries of adapter_config.json."""
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, module in adapters.items():
        path = f"transformer.{name}"
        keys = _EMBEDDING_KEYS if isinstance(module, LoRAEmbedding) else _LINEAR_KEYS
        stored = [module.lora_A, module.lora_B if isinstance(module, LoRAEmbedding) else module.zero_padded_B()]
        if isinstance(module, DoRALinear):
            norm = torch.linalg.vector_norm(module.weight + module.delta_weight(), dim=1)
            stored.append(module.dora_scale(norm) * norm)
        tensors |= {f"base_model.model.{path}.{key}": tensor for key, tensor in zip(keys, stored, strict=False)}
        ranks[path] = stored[1].size(1)
        alphas[path] = module.scaling * ranks[path]
    decomposed = [module for module in adapters.values() if isinstance(module, DoRALinear)]
    if decomposed and len(decomposed) < len(adapters):
        raise InputError("a peft adapter must be LoRA or DoRA, got LoRA and DoRA in one model")
    linear = [module for module in adapters.values() if isinstance(module, LoRALinear)]
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return tensors, {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "lora_dropout": linear[0].dropout if linear else 0.0,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": True,
        "use_dora": bool(decomposed),
        "bias": "none",
    }


def _virtual(model: GPT2) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensor of a prefix or a soft prompt and its entries of adapter_config.json."""
    config: dict[str, Any] = {
        "num_layers": model.config.n_layer,
        "num_attention_heads": model.config.n_head,
        "token_dim": model.config.n_embd,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": model.n_virtual,
        "peft_type": "PROMPT_TUNING",
    }
    if isinstance(model.prefix, Prefix):
        config |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
        return {"prompt_embeddings": model.prefix.prompt_embeddings()}, config
    assert model.prompt is not None
    return {"prompt_embeddings": model.prompt()}, config


@dataclass
class PeftAdapter(Surgery):
    """Adapter for GPT-2 that ``peft`` saved: LoRA, DoRA, rsLoRA, a prefix or a soft prompt; it can be trained further.

    Args:
        folder: the folder with adapter_config.json and adapter_model.safetensors.
        digest: expected SHA-256 of the two files, from a checkpoint; by default it is computed from them.

    Raises:
        InputError: in ``apply``, the adapter does not exist, has changed, is of an unsupported kind, has unsupported
            options or does not fit the model.
    """

    freezes_base = True

    folder: str
    digest: str | None = None

    def __post_init__(self) -> None:
        self._score: Tensor | None = None  # weight of the saved head
        self._shift: Tensor | None = None  # of the final layer norm's bias

    def apply(self, model: GPT2, tokenizer: Tokenizer | None = None) -> GPT2:
        """Add the saved adapter to ``model`` and freeze the published parameters; see :class:`Surgery`."""
        config, tensors = self._read()
        self._score = tensors.pop("score.weight", None)
        if (shift := self._take_ln_f_shift(model, tensors)) is not None:
            self._shift = shift
        take = self._take_lora if config.peft_type == "LORA" else self._take_virtual_tokens
        modules = take(model, config, tensors)
        if tensors:
            raise InputError(f"{self.folder}: {_WEIGHTS} has the unexpected tensor {min(tensors)}")
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        freeze_base(model)
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

    def _read(self) -> tuple[AdapterConfig, dict[str, Tensor]]:
        from gpt2_pl.utils.hugging_face_schema import check_adapter

        folder = Path(self.folder).expanduser()
        try:
            config = check_adapter(read_json(folder / _CONFIG), str(folder / _CONFIG))
            stored = load_file(folder / _WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder} is not a peft adapter that is supported: {error}") from None
        for name, tensor in stored.items():
            if tensor.dim() == 0 or 0 in tensor.shape or not tensor.is_floating_point() or not tensor.isfinite().all():
                raise InputError(f"{folder / _WEIGHTS}: {name} must contain finite floating-point numbers")
        digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in (_CONFIG, _WEIGHTS))).hexdigest()
        if self.digest not in (None, digest):
            raise InputError(f"{folder}: the adapter has changed since it was trained on; restore its files")
        self.digest = digest
        names = (name.removeprefix("base_model.").removeprefix("model.") for name in stored)
        return config, dict(zip(names, stored.values(), strict=True))

    def _take_lora(self, model: GPT2, config: AdapterConfig, tensors: dict[str, Tensor]) -> dict[str, nn.Module]:
        """Remove LoRA matrices from ``tensors`` and return the adapted layers by name.

        Raises:
            InputError: a layer does not exist or has an adapter already, or the matrices do not fit it.
        """
        modules: dict[str, nn.Module] = {}
        for path in sorted({name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}):
            name = path.removeprefix("transformer.")
            layer: Any = plain_layer(model, name, f"PeftAdapter {self.folder}")
            keys = _EMBEDDING_KEYS if name == "wte" else _LINEAR_KEYS
            found: list[Any] = [tensors.pop(f"{path}.{key}", None) for key in keys]
            A, B, magnitude = found
            rank = 0 if A is None else len(A)
            is_embedding = isinstance(layer, nn.Embedding)
            n_out, n_in = layer.weight.shape[::-1] if is_embedding else layer.weight.shape
            expected = [(rank, n_in), (n_out, rank), (n_out,) if config.use_dora and not is_embedding else None]
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in found]
            if shapes != expected or is_embedding != (name == "wte") or (is_embedding and config.use_dora):
                raise InputError(f"{self.folder}: the adapter of {path} does not fit {layer}")
            scaling, dropout = _scaling(config, path, rank), config.lora_dropout or 0.0
            if is_embedding:
                module: Any = LoRAEmbedding(layer, rank, scaling)
            else:
                module = (DoRALinear if config.use_dora else LoRALinear)(layer, rank, scaling, dropout)
            with torch.no_grad():
                module.lora_A.copy_(A)
                module.lora_B.copy_(B)
                if magnitude is not None:
                    module.lora_magnitude.copy_(magnitude)
            modules[name] = module.train(layer.training)
        if not modules:
            raise InputError(f"{self.folder}: {_WEIGHTS} contains no LoRA matrices")
        return modules

    def _take_virtual_tokens(
        self, model: GPT2, config: AdapterConfig, tensors: dict[str, Tensor]
    ) -> dict[str, nn.Module]:
        """Remove the virtual tokens from ``tensors`` and return the prefix or the soft prompt by name.

        Raises:
            InputError: the model has such a module already, or the tensor does not fit it.
        """
        name = "prefix" if config.peft_type == "PREFIX_TUNING" else "prompt"
        width = model.config.n_embd * (2 * model.config.n_layer if name == "prefix" else 1)
        table = tensors.pop("prompt_embeddings", torch.empty(0))
        require(table.shape[1:] == (width,), "prompt_embeddings", table, f"of shape (P, {width})", self.folder)
        if getattr(model, name) is not None:
            raise InputError(f"{self.folder}: the model has a {name} already")
        check_length(self.folder, len(table), model)
        table = table.to(model.wte.weight.device, model.wte.weight.dtype)
        if name == "prompt":
            return {name: Prompt(table).train(model.training)}
        prefix = Prefix(model.config, len(table)).to(table.device).train(model.training)
        with torch.no_grad():
            prefix.table.copy_(table)
        return {name: prefix}

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


def _scaling(config: AdapterConfig, path: str, rank: int) -> float:
    """Return the scaling s of a module. An alpha pattern is a regular expression for the end of a path, as in peft."""
    patterns = (config.alpha_pattern or {}).items()
    alpha = next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", path)), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)
