"""Loading and saving of GPT-2 weights in Hugging Face folders.

Hugging Face stores the weights of the four projections of a block as (in, out); this library uses the (out, in) of
``nn.Linear``. They are transposed once in :func:`load` and once in :func:`save`, and nowhere else.
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
_CAUSAL_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask in old checkpoints
_DTYPES = ("F32", "F16", "BF16", "F64")
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")


PROVENANCE = "gpt2_pl"  # key of config.json with the origin of a model that this library exported


def provenance(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the origin of a model that this library exported.

    Args:
        folder: a local Hugging Face folder.

    Returns:
        ``origin``, the SHA-256 of the base that training started from; ``recipe``, the names of the configuration files
        of the training; ``seconds`` and ``cpu_seconds``, its duration. Empty for other folders.
    """
    try:
        entry = read_json(Path(folder) / "config.json")[PROVENANCE]
        seconds = {key: float(entry[key]) for key in ("seconds", "cpu_seconds")}
        return {"origin": str(entry["origin"]), "recipe": str(entry["recipe"]), **seconds}
    except (ValueError, KeyError, TypeError, OverflowError):
        return {}


def read_config(folder: str | os.PathLike[str], dropout: float | None = None) -> GPT2Config:
    """Read the architecture from a folder's config.json.

    Args:
        folder: a local Hugging Face folder.
        dropout: the dropout probability; by default that of config.json, whose three rates must then be equal.

    Raises:
        InputError: config.json cannot be read or describes an architecture other than GPT-2's.
    """
    from gpt2_pl.utils.hugging_face_schema import PretrainedConfig
    from gpt2_pl.utils.schema import validate

    file = Path(folder) / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} has no config.json; a pretrained GPT-2 must be a Hugging Face folder")
    config = validate(PretrainedConfig, read_json(file), str(file))
    if config.n_inner not in (None, 4 * config.n_embd):
        raise InputError(
            f"{file}: n_inner must be {4 * config.n_embd}, 4 * n_embd, or null, got {shorten(config.n_inner)}"
        )
    if dropout is None:
        rates = {key: getattr(config, key) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
        if len(set(rates.values())) > 1:
            raise InputError(f"{file}: the three dropout rates must be equal, got {rates}; set `dropout`")
        dropout = config.resid_pdrop
    try:
        return GPT2Config(**{key: getattr(config, key) for key in _SIZES}, dropout=dropout)
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
                raise InputError(f"{index}: a shard must be a file of the same folder, got {shorten(name)}")
            if not (folder / name).is_file():
                raise InputError(f"{folder} lacks the shard {name} that {WEIGHTS_INDEX} names")
        return [folder / name for name in names]
    other = next((p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.h5"))), None)
    hint = f" ({other} is not read; save the model again with safe_serialization)" if other else ""
    raise InputError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}{hint}")


def _backbone_name(stored: str) -> str | None:
    """Return the parameter name of a stored tensor, or None for old mask buffers and the head of a classifier."""
    name = stored.removeprefix("transformer.")
    if _CAUSAL_BUFFER.fullmatch(name) or name.startswith("score."):
        return None
    return name


def validate_weights(folder: str | os.PathLike[str], config: GPT2Config) -> None:
    """Check the names and shapes of a folder's tensors against ``config``; only the headers are read.

    Args:
        folder: a local Hugging Face folder.
        config: the architecture that the tensors must have.

    Raises:
        InputError: a file cannot be read, or a tensor is missing, unexpected, duplicated, of another shape or not of
            floating-point numbers.
    """
    folder = Path(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(folder):
        _read_shapes(file, shapes)
    _check_size(folder, shapes, config)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in GPT2(config).state_dict().items()}
    head = shapes.pop("lm_head.weight", expected["wte.weight"])
    if missing := expected.keys() - shapes.keys():
        raise InputError(f"{folder} lacks tensors of the model that its config.json describes: {listing(missing)}")
    if unexpected := shapes.keys() - expected.keys():
        raise InputError(f"{folder} has tensors that its config.json does not describe: {listing(unexpected)}")
    for name in expected:
        _check_shape(folder, name, shapes[name], expected[name])
    _check_shape(folder, "lm_head.weight", head, expected["wte.weight"])


def _read_shapes(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Add the name and shape, (out, in) for linear layers, of every backbone tensor of a file to ``shapes``.

    Raises:
        InputError: the file cannot be read, or a tensor is already in ``shapes`` or not of floating-point numbers.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 (not a dict)
                name = _backbone_name(stored)
                if name is None:
                    continue
                if name in shapes:
                    raise InputError(f"{file.parent} contains {name} twice")
                tensor = tensors.get_slice(stored)
                if tensor.get_dtype() not in _DTYPES:
                    raise InputError(
                        f"{file.parent}: the dtype of {name} must be one of {', '.join(_DTYPES)}, got "
                        f"{tensor.get_dtype()}"
                    )
                shape = tuple(tensor.get_shape())
                shapes[name] = shape[::-1] if name.endswith(_TRANSPOSED) else shape
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a valid safetensors file: {error}") from None


def _check_size(folder: Path, shapes: dict[str, tuple[int, ...]], config: GPT2Config) -> None:
    """Compare the number of layers and the embeddings with ``config``, before a model of its size is created.

    Raises:
        InputError: ``config`` does not describe the tensors.
    """
    n_layer = len({name.split(".")[1] for name in shapes if name.startswith("h.")})
    if n_layer < config.n_layer:
        raise InputError(
            f"{folder} lacks tensors of the model that its config.json describes: n_layer is {config.n_layer}, but "
            f"there are {n_layer} layers (the first missing one is h.{n_layer})"
        )
    for name, expected in (
        ("wte.weight", (config.vocab_size, config.n_embd)),
        ("wpe.weight", (config.n_positions, config.n_embd)),
    ):
        _check_shape(folder, name, shapes.get(name, expected), expected)


def _check_shape(folder: Path, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise an InputError if a tensor does not have the shape that config.json describes."""
    if shape != expected:
        raise InputError(f"{folder}: {name} must have shape {expected}, as in config.json, got {shape}")


def load(path_or_id: str | os.PathLike[str], dropout: float | None = None) -> GPT2:
    """Load a pretrained GPT-2 of any size in float32.

    Every parameter is loaded from the files; none is initialized randomly.

    Args:
        path_or_id: a Hugging Face folder or hub id (``gpt2``, ``gpt2-medium``, ``distilgpt2``, ...).
        dropout: the dropout probability; by default that of config.json.

    Raises:
        InputError: the folder or id is not available, its tensors are not exactly those that config.json describes, or
            a value is NaN or infinite.
    """
    folder = resolve_checkpoint_dir(path_or_id)
    config = read_config(folder, dropout)
    validate_weights(folder, config)
    with torch.device("meta"):
        model = GPT2(config)
    state: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118
                name = _backbone_name(stored)
                if name is not None:
                    tensor = tensors.get_tensor(stored)
                    if not tensor.isfinite().all():
                        raise InputError(
                            f"{folder}: {name} must be finite, got NaN or infinity; the weights are corrupt"
                        )
                    tensor = tensor.t() if name.endswith(_TRANSPOSED) else tensor
                    # Copied even in float32, because one view would keep the file in memory.
                    state[name] = torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, state["wte.weight"]):
        raise InputError(f"{folder}: lm_head.weight differs from wte.weight; the head must be tied to the embedding")
    model.load_state_dict(state, strict=True, assign=True)
    model.source = str(folder)
    return model.requires_grad_(True)


def hf_config(config: GPT2Config) -> dict[str, Any]:
    """Return the content of a config.json from which ``transformers`` builds the same model."""
    end_of_text = 50256 if config.vocab_size == 50257 else None  # the tokenizer defines it for other vocabularies
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
    """Save ``model`` in float32 as a folder that ``transformers`` loads: config.json and model.safetensors.

    Each file is written atomically.

    Args:
        model: a GPT-2 with exactly its published parameters.
        folder: the folder to write.
        score: the weight (K, C) of a linear head on the last token. With it the folder is loaded as
            ``GPT2ForSequenceClassification``, otherwise as ``GPT2LMHeadModel``.
        settings: additional entries of config.json, such as ``id2label``.

    Raises:
        InputError: the tensors of the model are not those of a plain GPT-2 of its shape.
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
    """Check that the tensors of a model are exactly those of a plain GPT-2 of its shape; see :func:`save`."""
    with torch.device("meta"):
        plain = GPT2(model.config)
    shapes, expected = ({name: tuple(t.shape) for name, t in one.state_dict().items()} for one in (model, plain))
    if added := shapes.keys() - expected.keys():
        reason = _explain_added(model, plain, min(added))
        raise InputError(f"a pretrained folder cannot contain {listing(added)}: {reason}")
    if different := {name for name in expected if shapes.get(name) != expected[name]}:
        name = min(different)
        raise InputError(
            f"{name} must have shape {expected[name]}, as in {model.config}, got {shapes.get(name, 'no such tensor')}; "
            "surgery that changes shapes must change model.config too"
        )


def _explain_added(model: GPT2, plain: GPT2, name: str) -> str:
    """Explain which module contains a tensor that a plain GPT-2 does not have, and how to save it."""
    if name.startswith(("prefix.", "prompt.")):
        return "prefixes and soft prompts are saved in the format of peft (gpt2_pl.surgery.peft_format)"
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
    return f"surgery added {name} to the GPT-2 itself, and a plain GPT-2 has no such tensor"


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file atomically; see :func:`~gpt2_pl.filesystem.atomic_write` for the exceptions."""
    with atomic_write(path, "wb") as file:
        try:
            save_file(tensors, file.name, metadata={"format": "pt"})
        except SafetensorError as error:  # its errno is only in the text
            if (match := re.search(r"os error ([0-9]+)", str(error))) is None:
                raise
            raise OSError(int(match[1]), str(error)) from None


def weights_sha256(model: GPT2) -> str:
    """Return the SHA-256 of the names, shapes and float32 values of the published tensors, the identity of a base.

    Equal weights have equal digests, regardless of path, number of shards and tensors added by surgery.
    """
    sha = hashlib.sha256()
    state = model.state_dict()
    for name, tensor in sorted((name, state[name]) for name in model.base_names & state.keys()):
        sha.update(f"{name} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy())
    return sha.hexdigest()
