"""Published GPT-2 weights: Hugging Face folders and hub ids in, folders that ``transformers`` loads out.

Hugging Face stores the four projections of a block as (in, out); ours are ``nn.Linear``'s (out, in). They are
transposed here, once at loading and once at saving, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt2_pl.errors import InputError, listing, shorten
from gpt2_pl.filesystem import WEIGHTS, WEIGHTS_INDEX, atomic_write, resolve_checkpoint_dir
from gpt2_pl.kernels.prepacked_linear import MergeableLayer
from gpt2_pl.model import GPT2, GPT2Config
from gpt2_pl.utils.registry import class_path
from gpt2_pl.utils.yaml_json import read_json

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_CAUSAL_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask that old checkpoints carry
_DTYPES = ("F32", "F16", "BF16", "F64")
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")


PROVENANCE = "gpt2_pl"  # what config.json of a model trained here says of its past


def provenance(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a folder that this library exported says of the model's past.

    Returns:
        ``origin``, the digest of the base that training began from; ``recipe``, the names of the configuration files
        that it was trained with; and ``seconds`` and ``cpu_seconds`` that this took. Nothing for other folders.
    """
    try:
        said = read_json(Path(folder) / "config.json")[PROVENANCE]
        seconds = {key: float(said[key]) for key in ("seconds", "cpu_seconds")}
        return {"origin": str(said["origin"]), "recipe": str(said["recipe"]), **seconds}
    except (ValueError, KeyError, TypeError, OverflowError):
        return {}


def read_config(folder: str | os.PathLike[str], dropout: float | None = None) -> GPT2Config:
    """The shape that a folder's config.json states.

    Args:
        folder: a local Hugging Face folder.
        dropout: the dropout to use; by default the file's own, which must then be one number.

    Raises:
        InputError: no readable config.json, or one that describes something other than GPT-2's architecture.
    """
    from gpt2_pl.utils.hugging_face_schema import PretrainedConfig
    from gpt2_pl.utils.schema import validate

    file = Path(folder) / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} has no config.json; a pretrained GPT-2 is a Hugging Face folder")
    found = validate(PretrainedConfig, read_json(file), str(file))
    if found.n_inner not in (None, 4 * found.n_embd):
        raise InputError(
            f"{file}: n_inner must be {4 * found.n_embd}, 4 * n_embd, or null, got {shorten(found.n_inner)}"
        )
    if dropout is None:
        rates = {key: getattr(found, key) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
        if len(set(rates.values())) > 1:
            raise InputError(f"{file} states three dropout rates, {rates}, and gpt2_pl has one: give `dropout`")
        dropout = found.resid_pdrop
    try:
        return GPT2Config(**{key: getattr(found, key) for key in _SIZES}, dropout=dropout)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if index.is_file():
        from gpt2_pl.utils.hugging_face_schema import ShardIndex
        from gpt2_pl.utils.schema import validate

        names = sorted(set(validate(ShardIndex, read_json(index), str(index)).weight_map.values()))
        for name in names:
            if Path(name).name != name or "\0" in name or len(os.fsencode(name)) > 255:
                raise InputError(f"{index} names the shard {shorten(name)}; a shard lies in the same folder")
            if not (folder / name).is_file():
                raise InputError(f"{folder} lacks the shard {name} that {WEIGHTS_INDEX} names")
        return [folder / name for name in names]
    other = next((p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.h5"))), None)
    hint = f" ({other} is not read: save it again with safe_serialization)" if other else ""
    raise InputError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}{hint}")


def _core_name(stored: str) -> str | None:
    """Our name of a stored tensor; None for what is not part of the core: the old mask buffers, a classifier."""
    name = stored.removeprefix("transformer.")
    if _CAUSAL_BUFFER.fullmatch(name) or name.startswith("score."):
        return None
    return name


def check(folder: str | os.PathLike[str], config: GPT2Config) -> None:
    """Compare the names and shapes of a folder's tensors with what ``config`` needs. Reads headers only.

    Raises:
        InputError: an unreadable file, or a tensor that is missing, unexpected, there twice, of another shape or not
            of floating-point numbers, by name.
    """
    folder = Path(folder)
    found: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for stored in tensors.keys():  # noqa: SIM118 (not a dict)
                    name = _core_name(stored)
                    if name is None:
                        continue
                    if name in found:
                        raise InputError(f"{folder} holds {name} twice")
                    tensor = tensors.get_slice(stored)
                    if tensor.get_dtype() not in _DTYPES:
                        raise InputError(
                            f"{folder}: {name} is of type {tensor.get_dtype()}; it must be one of {', '.join(_DTYPES)}"
                        )
                    shape = tuple(tensor.get_shape())
                    found[name] = shape[::-1] if name.endswith(_TRANSPOSED) else shape
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a whole safetensors file: {error}") from None
    n_layer = len({name.split(".")[1] for name in found if name.startswith("h.")})
    if n_layer < config.n_layer:  # a skeleton of whatever size config.json states would be built in vain
        raise InputError(
            f"{folder} lacks tensors that its config.json asks for: n_layer is {config.n_layer}, and there are "
            f"{n_layer} layers (the first without any: h.{n_layer})"
        )
    for name, expected in (
        ("wte.weight", (config.vocab_size, config.n_embd)),
        ("wpe.weight", (config.n_positions, config.n_embd)),
    ):
        if found.get(name, expected) != expected:
            raise InputError(f"{folder}: {name} has shape {found[name]}; its config.json asks for {expected}")
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in GPT2(config).state_dict().items()}
    head = found.pop("lm_head.weight", wanted["wte.weight"])
    if missing := wanted.keys() - found.keys():
        raise InputError(f"{folder} lacks tensors that its config.json asks for: {listing(missing)}")
    if extra := found.keys() - wanted.keys():
        raise InputError(f"{folder} has tensors that its config.json leaves no place for: {listing(extra)}")
    for name in [*wanted, "lm_head.weight"]:
        stated, expected = found.get(name, head), wanted.get(name, wanted["wte.weight"])
        if stated != expected:
            raise InputError(f"{folder}: {name} has shape {stated}; its config.json asks for {expected}")


def load(path_or_id: str | os.PathLike[str], dropout: float | None = None) -> GPT2:
    """Load a pretrained GPT-2 of any size in float32.

    Args:
        path_or_id: a Hugging Face folder or hub id (``gpt2``, ``gpt2-medium``, ``distilgpt2``, ...).
        dropout: instead of the one in config.json.

    Raises:
        InputError: the folder or id cannot be had, or does not hold every tensor of the model its config.json
            describes, in the right shape, finite, and nothing else. Nothing is ever left at random.
    """
    folder = resolve_checkpoint_dir(path_or_id)
    config = read_config(folder, dropout)
    check(folder, config)
    with torch.device("meta"):
        model = GPT2(config)
    state: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118
                name = _core_name(stored)
                if name is not None:
                    tensor = tensors.get_tensor(stored)
                    if not tensor.isfinite().all():
                        raise InputError(f"{folder}: {name} holds NaN or infinity; the weights are broken")
                    tensor = tensor.t() if name.endswith(_TRANSPOSED) else tensor
                    # A copy, even of float32: one view would keep the whole file in memory.
                    state[name] = torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, state["wte.weight"]):
        raise InputError(f"{folder}: lm_head.weight differs from wte.weight; GPT-2's head is tied to its embedding")
    model.load_state_dict(state, strict=True, assign=True)
    model.source = str(folder)
    return model.requires_grad_(True)


def hf_config(config: GPT2Config) -> dict[str, Any]:
    """The content of a config.json with which ``transformers`` builds the same model."""
    end_of_text = 50256 if config.vocab_size == 50257 else None  # other vocabularies: the tokenizer's to say
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def save(
    model: GPT2,
    folder: str | os.PathLike[str],
    score: Tensor | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Write ``model`` as a folder that ``transformers`` loads: config.json and model.safetensors, float32.

    Each file is written beside its place and then renamed, so that a folder never holds half a file.

    Args:
        model: a GPT-2 with its published parameters and no others.
        folder: where to write.
        score: the weight (K, C) of a linear head on the last token; the folder is then one of
            ``GPT2ForSequenceClassification``, else of ``GPT2LMHeadModel``.
        settings: what config.json says beside the shape, such as ``id2label``.

    Raises:
        InputError: the model has other tensors than a plain GPT-2 of its shape, by name.
    """
    _check_plain(model)
    folder = Path(folder)
    state = {
        f"transformer.{name}": (tensor.t() if name.endswith(_TRANSPOSED) else tensor).float().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    config = {**hf_config(model.config), **(settings or {})}
    if score is not None:
        state["score.weight"] = score.detach().float().cpu().contiguous()
        config["architectures"] = ["GPT2ForSequenceClassification"]
    write_tensors(state, folder / WEIGHTS)
    with atomic_write(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2) + "\n")


def _check_plain(model: GPT2) -> None:
    """Refuse a model whose tensors are not exactly those of a plain GPT-2 of its shape; see :func:`save`."""
    with torch.device("meta"):
        plain = GPT2(model.config)
    found, wanted = ({name: tuple(t.shape) for name, t in one.state_dict().items()} for one in (model, plain))
    if added := found.keys() - wanted.keys():
        reason = _why_added(model, plain, min(added))
        raise InputError(f"a pretrained folder has no place for {listing(added)}: {reason}")
    if different := {name for name in wanted if found.get(name) != wanted[name]}:
        name = min(different)
        raise InputError(
            f"a pretrained folder of this shape, {model.config}, has {name} as {wanted[name]}, and surgery has left "
            f"{found.get(name, 'no such tensor')}: it must change model.config too"
        )


def _why_added(model: GPT2, plain: GPT2, name: str) -> str:
    """Say which module holds a tensor that a plain GPT-2 does not have, and how it can be saved."""
    if name.startswith(("prefix.", "prompt.")):
        return "prefixes and soft prompts are saved in peft's format (gpt2_pl.surgery.peft_format)"
    parts, modules = name.split("."), dict(plain.named_modules())
    for path in (".".join(parts[:n]) for n in range(1, len(parts))):
        module = model.get_submodule(path)
        if isinstance(module, MergeableLayer):
            return "merge LoRA and other adapters into the weights first (gpt2_pl.surgery.merge(model))"
        if type(module) is not type(modules.get(path)):
            return (
                f"{path} is a {class_path(type(module))}, which has no method merged() -> (weight, bias) that would "
                "make it a plain layer"
            )
    return f"surgery added {name} to the GPT-2 itself, and a plain one has no such tensor"


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whole or not at all; see :func:`atomic_write` for what is raised."""
    with atomic_write(path, "wb") as file:
        try:
            save_file(tensors, file.name, metadata={"format": "pt"})
        except SafetensorError as error:  # which names the system's error in its text alone
            if (found := re.search(r"os error ([0-9]+)", str(error))) is None:
                raise
            raise OSError(int(found[1]), str(error)) from None


def weights_sha256(model: GPT2) -> str:
    """SHA-256 over the names, shapes and float32 values of the published tensors: the identity of a base.

    Equal for equal weights, wherever they were loaded from and in however many shards, and whatever surgery added.
    """
    sha = hashlib.sha256()
    state = model.state_dict()
    for name, tensor in sorted((name, state[name]) for name in model.base_names & state.keys()):
        sha.update(f"{name} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy())
    return sha.hexdigest()
