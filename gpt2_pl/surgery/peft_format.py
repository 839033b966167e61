"""Saving and loading of adapters in the format of ``peft``: LoRA, prefixes and soft prompts.

``peft`` adapts ``GPT2LMHeadModel`` or ``GPT2ForSequenceClassification`` of ``transformers``. The head ``score`` of the
latter has no bias. A head's bias c is therefore added to the bias of the final layer norm, whose output only the head
reads: W (h + d) = W h + c for d = pinv(W) c.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gpt2_pl.errors import InputError, listing
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.heads import ClassificationHead
from gpt2_pl.pretrained import write_tensors
from gpt2_pl.surgery.base import Surgery, check_length, freeze_base, plain_layer
from gpt2_pl.surgery.lora import Adapter, DoRALinear, LoRAEmbedding, LoRALinear
from gpt2_pl.surgery.virtual_tokens import Prefix, Prompt
from gpt2_pl.utils.yaml_json import read_json

if TYPE_CHECKING:
    import os

    from tokenizers import Tokenizer

    from gpt2_pl.model import GPT2
    from gpt2_pl.utils.hugging_face_schema import AdapterConfig

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LORA_KEYS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


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
    known = set(model.base_names)
    known |= {f"{name}.{key}" for name in adapters for key in ("lora_A", "lora_B", "lora_magnitude")}
    for name, part, cls in (("prefix", model.prefix, Prefix), ("prompt", model.prompt, Prompt)):
        if isinstance(part, cls):
            known |= {f"{name}.{key}" for key in part.state_dict()}
    if foreign := model.state_dict().keys() - known:
        raise InputError(f"peft's format cannot store {listing(foreign)}{other_format(model)}")
    parts = {"LoRA": adapters, "a prefix": model.prefix, "a soft prompt": model.prompt}
    present = [name for name, part in parts.items() if part]
    if len(present) != 1:
        kinds = " and ".join(present) if present else "none of them"
        raise InputError(f"a peft adapter must be LoRA, a prefix or a soft prompt, got {kinds}")
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        "inference_mode": True,
    }
    if "wte" in adapters and head is None:
        raise InputError("peft cannot adapt the language-model head, which is tied to the adapted wte; use --format hf")
    if adapters:
        tensors, specific = _lora(adapters)
        prefix = "base_model.model."
    else:
        tensors, specific = _virtual(model)
        prefix = "base_model."
    config.update(specific)
    if head is not None:
        weight, bias = head.linear.weight.detach(), head.linear.bias.detach()
        tensors[f"{prefix}score.weight"] = weight
        tensors[f"{prefix}transformer.ln_f.weight"] = model.ln_f.weight.detach()
        tensors[f"{prefix}transformer.ln_f.bias"] = model.ln_f.bias.detach() + fold_bias_into_ln_f(weight, bias)
        config["modules_to_save"] = ["score", "ln_f"]
    folder = Path(folder)
    state = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_tensors(state, folder / _WEIGHTS)
    with atomic_write(folder / _CONFIG) as file:
        file.write(json.dumps(config, indent=2) + "\n")


def other_format(model: GPT2) -> str:
    """Return the remedy for a model that peft's format cannot store; the other format stores no virtual tokens."""
    return "; no format stores them together with virtual tokens" if model.n_virtual else "; use --format hf"


def _lora(adapters: dict[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, module in adapters.items():
        path = f"transformer.{name}"
        if isinstance(module, LoRAEmbedding):
            ranks[path], alphas[path] = module.rank, module.scaling * module.rank
            tensors[f"base_model.model.{path}.lora_embedding_A"] = module.lora_A
            tensors[f"base_model.model.{path}.lora_embedding_B"] = module.lora_B
            continue
        B = module.zero_padded_B()
        ranks[path], alphas[path] = B.size(1), module.scaling * B.size(1)
        tensors[f"base_model.model.{path}.lora_A.weight"] = module.lora_A
        tensors[f"base_model.model.{path}.lora_B.weight"] = B
        if isinstance(module, DoRALinear):
            norm = torch.linalg.vector_norm(module.weight + module.delta_weight(), dim=1)
            tensors[f"base_model.model.{path}.lora_magnitude_vector"] = module.dora_scale(norm) * norm
    linear = [module for module in adapters.values() if isinstance(module, LoRALinear)]
    decomposed = {isinstance(module, DoRALinear) for module in linear} or {False}
    if len(decomposed) > 1 or (True in decomposed and len(linear) < len(adapters)):
        raise InputError("a peft adapter must be LoRA or DoRA, got LoRA and DoRA in one model")
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
        "use_dora": decomposed.pop(),
        "bias": "none",
    }


def _virtual(model: GPT2) -> tuple[dict[str, Tensor], dict[str, Any]]:
    shape = model.config
    config: dict[str, Any] = {
        "num_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "token_dim": shape.n_embd,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": model.n_virtual,
    }
    if model.prefix is not None:
        assert isinstance(model.prefix, Prefix)
        table = model.prefix.prompt_embeddings()
        return {"prompt_embeddings": table}, {**config, "peft_type": "PREFIX_TUNING", "prefix_projection": False}
    assert isinstance(model.prompt, Prompt)
    return {"prompt_embeddings": model.prompt()}, {**config, "peft_type": "PROMPT_TUNING"}


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

    def apply(self, model: GPT2, tokenizer: Tokenizer | None = None) -> GPT2:
        """Add the saved adapter to ``model`` and freeze the published parameters; see :class:`Surgery`."""
        config, tensors = self._read()
        if config.peft_type == "LORA":
            self._apply_lora(model, config, tensors)
        else:
            self._apply_virtual(model, config.peft_type, tensors)
        freeze_base(model)
        return model

    def load_head(self, head: nn.Module) -> None:
        """Copy ``score`` from the adapter; the bias is computed from the shift of the final layer norm's bias."""
        _, tensors = self._read()
        score = tensors.get("score.weight")
        if score is None or not isinstance(head, ClassificationHead):
            return
        if score.shape != head.linear.weight.shape:
            raise InputError(
                f"{self.folder}: the head must have shape {tuple(head.linear.weight.shape)} (classes, features), got "
                f"{tuple(score.shape)}"
            )
        with torch.no_grad():
            head.linear.weight.copy_(score)
            head.linear.bias.zero_()
            if self._shift is not None:
                head.linear.bias.copy_(score @ self._shift)

    _shift = None  # shift of the final layer norm's bias

    def _read(self) -> tuple[AdapterConfig, dict[str, Tensor]]:
        from gpt2_pl.utils.hugging_face_schema import check_adapter

        folder = Path(self.folder).expanduser()
        try:
            config = check_adapter(read_json(folder / _CONFIG), str(folder / _CONFIG))
            stored = load_file(folder / _WEIGHTS)
        except InputError as error:
            raise InputError(f"{folder} is not a peft adapter that is supported: {error}") from None
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder} is not a peft adapter ({_CONFIG} and {_WEIGHTS}): {error}") from None
        for name, tensor in stored.items():
            if tensor.dim() == 0 or 0 in tensor.shape or not tensor.is_floating_point() or not tensor.isfinite().all():
                raise InputError(f"{folder / _WEIGHTS}: {name} must contain finite floating-point numbers")
        digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in (_CONFIG, _WEIGHTS))).hexdigest()
        if self.digest not in (None, digest):
            raise InputError(f"{folder}: the adapter has changed since it was trained on; restore its files")
        self.digest = digest
        names = (name.removeprefix("base_model.").removeprefix("model.") for name in stored)
        return config, dict(zip(names, stored.values(), strict=True))

    def _apply_lora(self, model: GPT2, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
        adapted = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
        embedding = [tensors.get(f"transformer.wte.lora_embedding_{x}") for x in "AB"]
        if not adapted and embedding == [None, None]:
            raise InputError(f"{self.folder}: {_WEIGHTS} contains no lora_A")
        used = {"score.weight"} | self._layer_norm(model, tensors)
        modules: dict[str, nn.Module] = {}
        if embedding[0] is not None and embedding[1] is not None:
            used |= {f"transformer.wte.lora_embedding_{x}" for x in "AB"}
            modules["wte"] = self._embedding(model, config, embedding[0], embedding[1])
        for path in adapted:
            name = path.removeprefix("transformer.")
            modules[name] = self._linear(model, config, tensors, path)
            used |= {f"{path}.{key}" for key in _LORA_KEYS}
        if unused := sorted(tensors.keys() - used):
            raise InputError(f"{self.folder}: {_WEIGHTS} has the unexpected tensor {unused[0]}")
        for name, adapter in modules.items():
            model.set_submodule(name, adapter)

    def _linear(self, model: GPT2, config: AdapterConfig, tensors: dict[str, Tensor], path: str) -> LoRALinear:
        """Return the adapted linear layer at ``path``, a name of ``transformers``.

        Raises:
            InputError: the layer does not exist or has an adapter already, or the tensors do not fit it.
        """
        name = path.removeprefix("transformer.")
        linear = dict(model.named_modules()).get(name)
        if isinstance(linear, LoRALinear):
            raise InputError(f"{self.folder}: {name} has an adapter already")
        if linear is not None:
            plain_layer(model, name, "PeftAdapter")
        A, B, magnitude = (tensors.get(f"{path}.{key}") for key in _LORA_KEYS)
        if not isinstance(linear, nn.Linear) or A is None or B is None:
            raise InputError(f"{self.folder}: the model has no layer for the adapter of {path}")
        rank = A.size(0)
        fits = A.shape == (rank, linear.in_features) and B.shape == (linear.out_features, rank)
        if not fits or (magnitude is None) == bool(config.use_dora):
            raise InputError(f"{self.folder}: the adapter of {path} does not fit a layer of {linear}")
        scaling = _scaling(config, path, rank)
        cls = LoRALinear if magnitude is None else DoRALinear
        module = cls(linear, rank, scaling, config.lora_dropout or 0.0)
        with torch.no_grad():
            module.lora_A.copy_(A), module.lora_B.copy_(B)
            if magnitude is not None and isinstance(module, DoRALinear):
                module.lora_magnitude.copy_(magnitude)
        return module.train(linear.training)

    def _embedding(self, model: GPT2, config: AdapterConfig, A: Tensor, B: Tensor) -> LoRAEmbedding:
        rank = A.size(0)
        if isinstance(model.wte, LoRAEmbedding):
            raise InputError(f"{self.folder}: wte has an adapter already")
        plain_layer(model, "wte", "PeftAdapter")
        if A.shape != (rank, model.config.vocab_size) or B.shape != (model.config.n_embd, rank) or config.use_dora:
            raise InputError(f"{self.folder}: the adapter of transformer.wte does not fit {model.wte}")
        module = LoRAEmbedding(model.wte, rank, _scaling(config, "transformer.wte", rank)).train(model.wte.training)
        with torch.no_grad():
            module.lora_A.copy_(A), module.lora_B.copy_(B)
        return module

    def _apply_virtual(self, model: GPT2, kind: str, tensors: dict[str, Tensor]) -> None:
        name = "prefix" if kind == "PREFIX_TUNING" else "prompt"
        table, shape = tensors.get("prompt_embeddings"), model.config
        width = 2 * shape.n_layer * shape.n_embd if name == "prefix" else shape.n_embd
        if table is None or table.dim() != 2 or table.size(1) != width:
            table_shape = None if table is None else tuple(table.shape)
            raise InputError(f"{self.folder}: prompt_embeddings must have shape (P, {width}), got {table_shape}")
        if getattr(model, name) is not None:
            raise InputError(f"{self.folder}: the model has a {name} already")
        check_length(self.folder, len(table), model)
        if unused := sorted(tensors.keys() - {"prompt_embeddings", "score.weight"} - self._layer_norm(model, tensors)):
            raise InputError(f"{self.folder}: {_WEIGHTS} has the unexpected tensor {unused[0]}")
        weight = model.wte.weight
        table = table.to(weight.device, weight.dtype)
        if name == "prompt":
            model.prompt = Prompt(table).train(model.training)
            return
        model.prefix = prefix = Prefix(shape, len(table)).to(weight.device).train(model.training)
        with torch.no_grad():
            prefix.table.copy_(table)

    def _layer_norm(self, model: GPT2, tensors: dict[str, Tensor]) -> set[str]:
        """Return the names of a saved final layer norm, and store its bias shift, which represents a head's bias."""
        names = {"transformer.ln_f.weight", "transformer.ln_f.bias"} & tensors.keys()
        if names and not model.ln_f.weight.is_meta:
            weight, bias = (tensors[f"transformer.ln_f.{key}"].to(model.ln_f.bias.device) for key in ("weight", "bias"))
            if not torch.equal(weight, model.ln_f.weight):
                raise InputError(f"{self.folder}: ln_f.weight must be that of the base; only ln_f.bias may differ")
            self._shift = bias - model.ln_f.bias.detach()
        return names


def _scaling(config: AdapterConfig, path: str, rank: int) -> float:
    """Return the scaling s of a module. An alpha pattern is a regular expression for the end of a path, as in peft."""
    patterns = (config.alpha_pattern or {}).items()
    alpha = next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", path)), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)
