"""Loading and saving of GPT-2 weights in Hugging Face folders.

Hugging Face stores the weights of the four projections of a block as (in, out); this library uses the (out, in) of
``nn.Linear``. They are transposed once in :func:`load` and once in :func:`save`, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt2_pl.errors import InputError, listing, require
from gpt2_pl.filesystem import WEIGHTS, WEIGHTS_INDEX, atomic_write, resolve_checkpoint_dir
from gpt2_pl.model import GPT2, GPT2Config
from gpt2_pl.utils.yaml_json import read_json

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_CAUSAL_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask in old checkpoints
_DTYPES = ("F32", "F16", "BF16", "F64")
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_DROPOUT_RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
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
        expected = f"{4 * config.n_embd}, 4 * n_embd, or null"
        raise InputError(key="n_inner", value=config.n_inner, expected=expected, source=file)
    rates = {key: getattr(config, key) for key in _DROPOUT_RATES}
    if dropout is None and len(set(rates.values())) > 1:
        raise InputError(f"the three dropout rates must be equal, got {rates}; set `dropout`", source=file)
    sizes = {key: getattr(config, key) for key in _SIZES}
    try:
        return GPT2Config(**sizes, dropout=config.resid_pdrop if dropout is None else dropout)
    except InputError as error:
        raise InputError(error, key=error.key, source=file) from None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if index.is_file():
        from gpt2_pl.utils.hugging_face_schema import ShardIndex
        from gpt2_pl.utils.schema import validate

        names = sorted(set(validate(ShardIndex, read_json(index), str(index)).weight_map.values()))
        for name in names:
            if Path(name).name != name or not os.path.isfile(folder / name):
                raise InputError(key="weight_map", value=name, expected="files of the same folder", source=index)
        return [folder / name for name in names]
    other = next((p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.h5"))), None)
    hint = f" ({other} is not read; save the model again with safe_serialization)" if other else ""
    raise InputError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}{hint}")


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the parameter name and the safetensors slice of every tensor of a folder's weight files.

    The mask buffers of old checkpoints and the head of a classifier are skipped.

    Raises:
        InputError: a file cannot be read.
    """
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for stored in tensors.offset_keys():
                    name = stored.removeprefix("transformer.")
                    if not _CAUSAL_BUFFER.fullmatch(name) and not name.startswith("score."):
                        yield name, tensors.get_slice(stored)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a valid safetensors file: {error}") from None


def load_head(folder: str | os.PathLike[str]) -> tuple[Tensor, Tensor] | None:
    """Load the head of a classifier or regressor from a folder's weight files.

    Args:
        folder: a local Hugging Face folder.

    Returns:
        The weight (K, C) and the bias (K,) of the head, a zero bias if none is stored; None for a model without a head.

    Raises:
        InputError: a file cannot be read, or the head is not a matrix, or not finite.
    """
    found: dict[str, Tensor] = {}
    for file in _weight_files(Path(folder)):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in tensors.offset_keys() if name.startswith("score.")}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a valid safetensors file: {error}") from None
    if not found:
        return None
    for name, tensor in found.items():
        is_valid = name in ("score.weight", "score.bias") and tensor.is_floating_point() and tensor.isfinite().all()
        require(bool(is_valid), name, tensor, "finite floating-point numbers of the weight or bias of a head", folder)
    weight = found.get("score.weight")
    if weight is None or weight.dim() != 2 or not len(weight):
        raise InputError(key="score.weight", value=weight, expected="a matrix (classes, features)", source=folder)
    return weight.float(), found.get("score.bias", weight.new_zeros(len(weight))).float()


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
    for name, tensor in _stored_tensors(folder):
        if name in shapes:
            raise InputError(f"{folder} contains {name} twice")
        if (dtype := tensor.get_dtype()) not in _DTYPES:
            raise InputError(f"the dtype of {name} must be one of {', '.join(_DTYPES)}, got {dtype}", source=folder)
        shape = tuple(tensor.get_shape())
        shapes[name] = shape[::-1] if name.endswith(_TRANSPOSED) else shape
    # The sizes of config.json are compared before a model of these sizes is created.
    embeddings = {"wte.weight": (config.vocab_size, config.n_embd), "wpe.weight": (config.n_positions, config.n_embd)}
    _check_shapes(folder, shapes, embeddings)
    n_layer = len({name.split(".")[1] for name in shapes if name.startswith("h.")})
    if n_layer < config.n_layer:
        raise InputError(
            f"{folder}: config.json's n_layer is {config.n_layer}, but there are {n_layer} layers", key="n_layer"
        )
    with torch.device("meta"):
        expected = _shapes(GPT2(config))
    if "lm_head.weight" in shapes:
        expected["lm_head.weight"] = expected["wte.weight"]
    _check_shapes(folder, shapes, expected)
    if unexpected := shapes.keys() - expected.keys():
        raise InputError(f"{folder} has tensors that its config.json does not describe: {listing(unexpected)}")


def _check_shapes(folder: Path, shapes: dict[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise an InputError if an expected tensor is missing or has another shape."""
    if missing := expected.keys() - shapes.keys():
        raise InputError(f"{folder} lacks tensors of the model that its config.json describes: {listing(missing)}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise InputError(f"{folder}: {name} must have shape {shape}, as in config.json, got {shapes[name]}")


def _shapes(model: GPT2) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


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
    for name, stored in _stored_tensors(folder):
        tensor = stored[:]
        if not tensor.isfinite().all():
            raise InputError(f"{folder}: {name} must be finite, got NaN or infinity; the weights are corrupt")
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
        **{key: getattr(config, key) for key in _SIZES},
        "n_inner": None,
        **dict.fromkeys(_DROPOUT_RATES, config.dropout),
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
    score_bias: Tensor | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Save ``model`` in float32 as a folder that ``transformers`` loads: config.json and model.safetensors.

    Each file is written atomically.

    Args:
        model: a GPT-2 with exactly its published parameters.
        folder: the folder to write.
        score: the weight (K, C) of a linear head on the last token. With it the folder is loaded as
            ``GPT2ForSequenceClassification``, otherwise as ``GPT2LMHeadModel``.
        score_bias: the bias (K,) of a head that ``settings`` name a class for; that of transformers has none.
        settings: additional entries of config.json, such as ``id2label``, which replace others.

    Raises:
        InputError: the tensors of the model are not those of a plain GPT-2 of its shape.
    """
    _check_plain(model)
    state = {
        f"transformer.{name}": tensor.t() if name.endswith(_TRANSPOSED) else tensor
        for name, tensor in model.state_dict().items()
    }
    config = hf_config(model.config)
    if score is not None:
        state["score.weight"] = score
        config["architectures"] = ["GPT2ForSequenceClassification"]
    if score_bias is not None:
        state["score.bias"] = score_bias
    config |= settings or {}
    write_folder(Path(folder), WEIGHTS, state, "config.json", config)


def write_folder(
    folder: Path, weights_name: str, tensors: dict[str, Tensor], config_name: str, config: dict[str, Any]
) -> None:
    """Write a safetensors file in float32 and a JSON file; each of them atomically.

    The exceptions are those of :func:`~gpt2_pl.filesystem.atomic_write`.

    Args:
        folder: the folder of the two files.
        weights_name: name of the safetensors file.
        tensors: its content, in any dtype and on any device.
        config_name: name of the JSON file.
        config: its content.
    """
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(folder / weights_name, "wb") as file:
        save_file(state, file.name, metadata={"format": "pt"})
    with atomic_write(folder / config_name) as file:
        file.write(json.dumps(config, indent=2) + "\n")


def _check_plain(model: GPT2) -> None:
    """Check that the tensors of a model are exactly those of a plain GPT-2 of its shape; see :func:`save`."""
    with torch.device("meta"):
        expected = _shapes(GPT2(model.config))
    shapes = _shapes(model)
    if added := shapes.keys() - expected.keys():
        advice = "gpt2_pl.surgery.merge removes adapters that have a method merged() -> (weight, bias)"
        raise InputError(f"a pretrained folder cannot contain {listing(added)}, which surgery added; {advice}")
    for name, shape in sorted(expected.items()):
        if shapes.get(name) != shape:
            found = shapes.get(name, "no such tensor")
            raise InputError(f"{name} must have shape {shape}, as in {model.config}, got {found}")


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
