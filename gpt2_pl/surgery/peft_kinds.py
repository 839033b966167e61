"""Types of adapters in the format of ``peft``, a class for each: LoRA, (IA)3, virtual tokens and layer norms."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from gpt2_pl.errors import InputError, require
from gpt2_pl.surgery.base import check_length, freeze_base
from gpt2_pl.surgery.ia3 import IA3Linear
from gpt2_pl.surgery.lora import Adapter, DoRALinear, LoRAEmbedding, LoRALinear
from gpt2_pl.surgery.selection import select
from gpt2_pl.surgery.targets import plain_layer
from gpt2_pl.surgery.virtual_tokens import Prefix, Prompt

if TYPE_CHECKING:
    from gpt2_pl.model import GPT2
    from gpt2_pl.utils.hugging_face_schema import AdapterConfig

Tensors = dict[str, Tensor]
Modules = dict[str, nn.Module]


class PeftKind(ABC):
    """Type of adapter that ``peft`` stores.

    A subclass also needs its ``peft_type`` and the keys of its configuration in
    :class:`~gpt2_pl.utils.hugging_face_schema.AdapterConfig`.

    Attributes:
        peft_type: the type in adapter_config.json.
        label: name of the adapter in error messages.
        selects_base: whether the adapter consists of parameters of the base, which :meth:`insert` selects to train.
        root: path of the model of ``transformers`` inside a ``peft.PeftModel``, in the names of tensors.
    """

    peft_type: ClassVar[str]
    label: ClassVar[str]
    root: ClassVar[str] = "base_model.model."
    selects_base: ClassVar[bool] = False

    @abstractmethod
    def modules(self, model: GPT2) -> Modules:
        """Return the modules of a GPT-2 whose tensors this type stores, by name."""

    @abstractmethod
    def write(self, model: GPT2, modules: Modules) -> tuple[Tensors, dict[str, Any]]:
        """Convert modules to the tensors and the entries of adapter_config.json that ``peft`` saves.

        Args:
            model: the GPT-2.
            modules: those that :meth:`modules` returns.

        Raises:
            InputError: the type cannot store the modules.
        """

    @abstractmethod
    def read(self, model: GPT2, config: AdapterConfig, tensors: Tensors, folder: str) -> Modules:
        """Remove the tensors of this type from ``tensors`` and convert them to modules by name; ``model`` is kept.

        Args:
            model: the GPT-2 that the modules must fit.
            config: adapter_config.json.
            tensors: all tensors of the adapter, by names without ``root``.
            folder: the adapter, for error messages.

        Raises:
            InputError: there are no such tensors, or they do not fit the model.
        """

    def write_shift(self, model: GPT2, tensors: Tensors, shift: Tensor) -> list[str]:
        """Add the final layer norm, with a shift of its bias, to ``tensors``.

        Args:
            model: the GPT-2.
            tensors: the tensors of the adapter, which are changed.
            shift: (C,).

        Returns:
            The modules that ``peft`` then stores in addition to the adapter.
        """
        tensors[f"{self.root}transformer.ln_f.weight"] = model.ln_f.weight.detach()
        tensors[f"{self.root}transformer.ln_f.bias"] = model.ln_f.bias.detach() + shift
        return ["ln_f"]

    def insert(self, model: GPT2, modules: Modules) -> None:
        """Insert the modules that :meth:`read` returns into the GPT-2, and set what trains."""
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        freeze_base(model)


class LoRAKind(PeftKind):
    """LoRA, rsLoRA and DoRA."""

    peft_type = "LORA"
    label = "LoRA"
    linear_keys = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    embedding_keys = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

    def modules(self, model: GPT2) -> Modules:
        """Return the adapted layers."""
        return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}

    def write(self, model: GPT2, modules: Modules) -> tuple[Tensors, dict[str, Any]]:
        """Convert all LoRA adapters of a model to one of ``peft``; see :class:`PeftKind`."""
        adapters = [module for module in modules.values() if isinstance(module, Adapter)]
        tensors: Tensors = {}
        ranks, alphas = {}, {}
        for name, module in zip(modules, adapters, strict=True):
            path = f"transformer.{name}"
            is_embedding = isinstance(module, LoRAEmbedding)
            stored = [module.lora_A, module.lora_B] if isinstance(module, LoRAEmbedding) else [*module.factors()]
            if isinstance(module, DoRALinear):
                norm = torch.linalg.vector_norm(module.weight + module.delta_weight(), dim=1)
                stored.append(module.dora_scale(norm) * norm)
            keys = self.embedding_keys if is_embedding else self.linear_keys
            tensors |= {f"{self.root}{path}.{key}": tensor for key, tensor in zip(keys, stored, strict=False)}
            ranks[path] = stored[1].size(1)
            alphas[path] = module.scaling * ranks[path]
        decomposed = [module for module in adapters if isinstance(module, DoRALinear)]
        if decomposed and len(decomposed) < len(adapters):
            raise InputError("a peft adapter must be LoRA or DoRA, got LoRA and DoRA in one model")
        linear = [module for module in adapters if isinstance(module, LoRALinear)]
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        return tensors, {
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

    def read(self, model: GPT2, config: AdapterConfig, tensors: Tensors, folder: str) -> Modules:
        """Convert LoRA matrices to adapted layers; see :class:`PeftKind`.

        Raises:
            InputError: a layer does not exist or has an adapter already, or the matrices do not fit it.
        """
        modules: Modules = {}
        for path in sorted({name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}):
            name = path.removeprefix("transformer.")
            layer: Any = plain_layer(model, name, f"PeftAdapter {folder}")
            keys = self.embedding_keys if name == "wte" else self.linear_keys
            found: list[Any] = [tensors.pop(f"{path}.{key}", None) for key in keys]
            A, B, magnitude = found
            rank = 0 if A is None else len(A)
            is_embedding = isinstance(layer, nn.Embedding)
            n_out, n_in = layer.weight.shape[::-1] if is_embedding else layer.weight.shape
            expected = [(rank, n_in), (n_out, rank), (n_out,) if config.use_dora and not is_embedding else None]
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in found]
            if shapes != expected or is_embedding != (name == "wte") or (is_embedding and config.use_dora):
                raise InputError(f"{folder}: the adapter of {path} does not fit {layer}")
            scaling, dropout = self._scaling(config, path, rank), config.lora_dropout or 0.0
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
            raise InputError(f"{folder}: adapter_model.safetensors contains no LoRA matrices")
        return modules

    @staticmethod
    def _scaling(config: AdapterConfig, path: str, rank: int) -> float:
        """Return the scaling s of a layer. An alpha pattern is a regular expression for the end of a path."""
        patterns = (config.alpha_pattern or {}).items()
        alpha = next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", path)), config.lora_alpha)
        return alpha / (rank**0.5 if config.use_rslora else rank)


class IA3Kind(PeftKind):
    """(IA)3."""

    peft_type = "IA3"
    label = "IA3"

    def modules(self, model: GPT2) -> Modules:
        """Return the adapted layers."""
        return {name: module for name, module in model.named_modules() if isinstance(module, IA3Linear)}

    def write(self, model: GPT2, modules: Modules) -> tuple[Tensors, dict[str, Any]]:
        """Convert vectors to tensors (1, in) for inputs and (out, 1) for outputs; see :class:`PeftKind`."""
        layers = {f"transformer.{name}": module for name, module in modules.items() if isinstance(module, IA3Linear)}
        tensors = {
            f"{self.root}{path}.ia3_l": layer.scale().unsqueeze(0 if layer.scales_input else 1)
            for path, layer in layers.items()
        }
        return tensors, {
            "target_modules": sorted(layers),
            "feedforward_modules": sorted(path for path, layer in layers.items() if layer.scales_input),
            "fan_in_fan_out": True,
        }

    def read(self, model: GPT2, config: AdapterConfig, tensors: Tensors, folder: str) -> Modules:
        """Convert tensors to adapted layers; their shape tells whether they scale inputs; see :class:`PeftKind`.

        Raises:
            InputError: a layer does not exist or has an adapter already, or a tensor does not fit it.
        """
        modules: Modules = {}
        for key in sorted(name for name in tensors if name.endswith(".ia3_l")):
            path = key.removesuffix(".ia3_l")
            layer: Any = plain_layer(model, path.removeprefix("transformer."), f"PeftAdapter {folder}")
            stored = tensors.pop(key)
            shapes = [] if isinstance(layer, nn.Embedding) else [(layer.out_features, 1), (1, layer.in_features)]
            if tuple(stored.shape) not in shapes:
                raise InputError(f"{folder}: the adapter of {path} does not fit {layer}")
            module = IA3Linear(layer, scales_input=tuple(stored.shape) == shapes[1])
            with torch.no_grad():
                module.ia3_l.copy_(stored.flatten())
            modules[path.removeprefix("transformer.")] = module.train(layer.training)
        if not modules:
            raise InputError(f"{folder}: adapter_model.safetensors contains no vectors of IA3")
        return modules


class _VirtualTokens(PeftKind):
    """Virtual tokens in front of the text.

    Attributes:
        name: attribute of the GPT-2 that holds them.
    """

    root = "base_model."
    name: ClassVar[str]

    def write(self, model: GPT2, modules: Modules) -> tuple[Tensors, dict[str, Any]]:
        """Convert the virtual tokens to one tensor; see :class:`PeftKind`."""
        return {"prompt_embeddings": self.table(modules[self.name])}, {
            "num_layers": model.config.n_layer,
            "num_attention_heads": model.config.n_head,
            "token_dim": model.config.n_embd,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": model.n_virtual,
        }

    @abstractmethod
    def table(self, module: Any) -> Tensor:
        """Return the virtual tokens as a table (P, width)."""

    def take_table(self, model: GPT2, tensors: Tensors, width: int, folder: str) -> Tensor:
        """Remove the table (P, width) from ``tensors``.

        Raises:
            InputError: the model has such a module already, or the table does not fit it.
        """
        table = tensors.pop("prompt_embeddings", torch.empty(0))
        require(table.shape[1:] == (width,), "prompt_embeddings", table, f"of shape (P, {width})", folder)
        if getattr(model, self.name) is not None:
            raise InputError(f"{folder}: the model has a {self.name} already")
        check_length(folder, len(table), model)
        return table.to(model.wte.weight.device, model.wte.weight.dtype)


class PrefixKind(_VirtualTokens):
    """Prefix of keys and values; a reparameterization network is stored as the table that it computes."""

    peft_type = "PREFIX_TUNING"
    label = "a prefix"
    name = "prefix"

    def modules(self, model: GPT2) -> Modules:
        """Return the prefix."""
        return {self.name: model.prefix} if isinstance(model.prefix, Prefix) else {}

    def table(self, module: Any) -> Tensor:
        """Return the keys and values (P, 2 L C)."""
        return module.prompt_embeddings()

    def write(self, model: GPT2, modules: Modules) -> tuple[Tensors, dict[str, Any]]:
        """Convert the prefix to one tensor; see :class:`PeftKind`."""
        tensors, config = super().write(model, modules)
        return tensors, {**config, "prefix_projection": False}

    def read(self, model: GPT2, config: AdapterConfig, tensors: Tensors, folder: str) -> Modules:
        """Convert the table to a prefix; see :class:`PeftKind`."""
        table = self.take_table(model, tensors, 2 * model.config.n_layer * model.config.n_embd, folder)
        prefix = Prefix(model.config, len(table)).to(table.device).train(model.training)
        with torch.no_grad():
            prefix.table.copy_(table)
        return {self.name: prefix}


class PromptKind(_VirtualTokens):
    """Soft prompt."""

    peft_type = "PROMPT_TUNING"
    label = "a soft prompt"
    name = "prompt"

    def modules(self, model: GPT2) -> Modules:
        """Return the soft prompt."""
        return {self.name: model.prompt} if isinstance(model.prompt, Prompt) else {}

    def table(self, module: Any) -> Tensor:
        """Return the embeddings (P, C)."""
        return module()

    def read(self, model: GPT2, config: AdapterConfig, tensors: Tensors, folder: str) -> Modules:
        """Convert the embeddings to a soft prompt; see :class:`PeftKind`."""
        table = self.take_table(model, tensors, model.config.n_embd, folder)
        return {self.name: Prompt(table).train(model.training)}


class LayerNormKind(PeftKind):
    """Trained layer norms of the base."""

    peft_type = "LN_TUNING"
    label = "layer norms"
    selects_base = True

    def modules(self, model: GPT2) -> Modules:
        """Return the layer norms that train."""
        norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
        return {name: norm for name, norm in norms.items() if any(p.requires_grad for p in norm.parameters())}

    def write(self, model: GPT2, modules: Modules) -> tuple[Tensors, dict[str, Any]]:
        """Convert layer norms to their tensors; see :class:`PeftKind`."""
        paths = {name: f"transformer.{name}" for name in modules}
        tensors = {
            f"{self.root}{paths[name]}.ln_tuning_layers.{key}": tensor
            for name, norm in modules.items()
            for key, tensor in norm.state_dict().items()
        }
        return tensors, {"target_modules": sorted(paths.values())}

    def write_shift(self, model: GPT2, tensors: Tensors, shift: Tensor) -> list[str]:
        """Shift the stored bias of the final layer norm, if it is part of the adapter; see :class:`PeftKind`."""
        name = f"{self.root}transformer.ln_f.ln_tuning_layers.bias"
        if name not in tensors:
            return super().write_shift(model, tensors, shift)
        tensors[name] = tensors[name] + shift
        return []

    def read(self, model: GPT2, config: AdapterConfig, tensors: Tensors, folder: str) -> Modules:
        """Convert tensors to layer norms; see :class:`PeftKind`.

        Raises:
            InputError: a layer norm does not exist, or other surgery has selected it, or the tensors do not fit it.
        """
        modules: Modules = {}
        norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
        nothing_selected = all(parameter.requires_grad for parameter in model.parameters())
        for path in sorted({name.rpartition(".ln_tuning_layers.")[0] for name in tensors if ".ln_tuning_" in name}):
            name = path.removeprefix("transformer.")
            stored: list[Any] = [tensors.pop(f"{path}.ln_tuning_layers.{key}", None) for key in ("weight", "bias")]
            norm = norms.get(name)
            if norm is None or any(tensor is None or tensor.shape != norm.weight.shape for tensor in stored):
                raise InputError(f"{folder}: the adapter of {path} does not fit {norm or 'the model'}")
            if norm.weight.requires_grad and not nothing_selected:
                raise InputError(f"PeftAdapter {folder}: other surgery selects {name} already; use only one of them")
            modules[name] = trained = nn.LayerNorm(norm.normalized_shape, norm.eps, device=norm.weight.device)
            with torch.no_grad():
                trained.weight.copy_(stored[0])
                trained.bias.copy_(stored[1])
        if not modules:
            raise InputError(f"{folder}: adapter_model.safetensors contains no layer norms")
        return modules

    def insert(self, model: GPT2, modules: Modules) -> None:
        """Copy the values into the layer norms of the base, which train; see :class:`PeftKind`."""
        for name, module in modules.items():
            with torch.no_grad():
                for own, stored in zip(model.get_submodule(name).parameters(), module.parameters(), strict=True):
                    own.copy_(stored)
        select(model, lambda name: name.rpartition(".")[0] in modules)


KINDS: tuple[PeftKind, ...] = (LoRAKind(), IA3Kind(), PrefixKind(), PromptKind(), LayerNormKind())
"""Types of adapters that are read and written in the format of ``peft``."""
