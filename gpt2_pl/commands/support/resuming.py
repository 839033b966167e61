"""Settings of a resumed run, and the hyperparameters of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gpt2_pl.commands.support.config_merge import CommandLine
from gpt2_pl.errors import InputError
from gpt2_pl.surgery import build
from gpt2_pl.tasks import Task
from gpt2_pl.tasks.checkpoint import read
from gpt2_pl.utils.yaml_json import read_yaml


def run_to_resume(checkpoint: Path, root: Path) -> Path | None:
    """Return the folder of the run that a ``last.ckpt`` resumes, relative to ``root``; None for other checkpoints."""
    run = checkpoint.expanduser().resolve().parents[1]
    if checkpoint.name != "last.ckpt" or not (run / "config.yaml").is_file() or not run.is_relative_to(root.resolve()):
        return None
    return run.relative_to(root.resolve())


# Settings that may change when a run is resumed: locations, speed, outputs and decisions.
_MUTABLE_ON_RESUME = {
    *("base", "config", "tokenizer", "compile", "activation_checkpointing", "batch_size", "eval_batch_size"),
    *("num_val_samples", "num_test_samples", "temperature", "top_p", "line_length_bias", "max_new_tokens", "threshold"),
}
_MUTABLE_SURGERY_ARGUMENTS = {"folder", "dropout", "loraplus_lr_ratio", "init_text"}
_STRATEGIES = ("gpt2_pl.callbacks.DiscriminativeLR", "gpt2_pl.callbacks.GradualUnfreezing")


def _immutable_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings by key that must not change when a run is resumed."""
    immutable = {"seed_everything": settings.get("seed_everything")}
    for part in ("model", "data"):
        content = settings.get(part) or {}
        immutable[f"{part}.class_path"] = content.get("class_path")
        for key, value in (content.get("init_args") or {}).items():
            if key not in _MUTABLE_ON_RESUME and not key.endswith("_file"):
                immutable[f"{part}.{key}"] = list(map(_immutable_surgery, value or [])) if key == "surgery" else value
    callbacks = (settings.get("trainer") or {}).get("callbacks") or []
    immutable["trainer.callbacks"] = [callback for callback in callbacks if callback["class_path"] in _STRATEGIES]
    return immutable


def _immutable_surgery(surgery: dict[str, Any]) -> dict[str, Any]:
    arguments = build(surgery).settings()["init_args"]  # with the defaults of arguments that a file leaves out
    return {**surgery, "init_args": {k: v for k, v in arguments.items() if k not in _MUTABLE_SURGERY_ARGUMENTS}}


def check_same_settings(file: Path, settings: dict[str, Any]) -> None:
    """Check that a run is resumed with the settings of its config.yaml.

    Other settings would partly be ignored: a checkpoint restores the state of the optimizer, including learning rates.

    Args:
        file: config.yaml of the run; a missing one is not checked.
        settings: configuration of the command.

    Raises:
        InputError: a setting differs.
    """
    if not file.is_file():
        return
    content = read_yaml(file)
    saved = _immutable_settings(content if isinstance(content, dict) else {})
    current = _immutable_settings(settings)
    for key, former, value in _differences(saved, current):
        expected = f"{former}, as in the resumed run ({file})"
        message = f"{key} must be {expected}, got {value}; start a new run without ckpt_path to change it"
        raise InputError(message, key=key, value=value, expected=expected)


def _differences(saved: dict[str, Any], current: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield key, saved and current value of the settings that differ; paths of files may differ."""
    for key in saved.keys() & current.keys():
        pair = saved[key], current[key]
        if all(isinstance(value, dict) and "class_path" not in value for value in pair):
            yield from _differences(*pair, f"{path}{key}.")
        elif pair[0] != pair[1] and not key.endswith("_file"):
            yield f"{path}{key}", *pair


def with_hyperparameters(line: CommandLine, checkpoint: str) -> list[str]:
    """Return the parser's arguments with the hyperparameters of a checkpoint as the first configuration file.

    Files and flags override the hyperparameters.

    Args:
        line: the command line.
        checkpoint: path of the checkpoint.

    Raises:
        InputError: the checkpoint is invalid.
    """
    content = read(checkpoint, "ckpt_path", Task)
    stored = dict(content["hyper_parameters"])
    stored.pop("num_classes", None)  # determined by the data
    stored.pop("label_token_ids", None)
    for key, other in (("base", "config"), ("config", "base")):
        if line.states(key):
            stored.pop(other, None)  # a model has either a base or a config
    if line.states("surgery"):
        stored.pop("surgery", None)  # otherwise the parser would append to it
    else:
        stored["surgery"] = [build(settings).settings() for settings in stored.get("surgery") or []] or None
    layer = {"model": {"class_path": content["task"], "init_args": stored}}
    return [line.command, "--config", yaml.safe_dump(layer), *line.arguments[1:]]
