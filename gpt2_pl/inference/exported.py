"""Loading of Hugging Face folders as tasks: models that ``gpt2-pl export`` has written, and other GPT-2 models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpt2_pl import pretrained
from gpt2_pl.datamodules.prompt_template import Template
from gpt2_pl.errors import InputError, require
from gpt2_pl.filesystem import resolve_checkpoint_dir
from gpt2_pl.surgery.peft_format import ADAPTER_CONFIG, PeftAdapter
from gpt2_pl.tasks import LanguageModel, ParaphraseDetector, SentimentClassifier, Task, TextRegressor
from gpt2_pl.utils.yaml_json import read_json

if TYPE_CHECKING:
    from gpt2_pl.utils.hugging_face_schema import ExportedTask

_DEFAULT_FIELD = "text"  # of models without a prompt: the template is the text itself


def load_exported(folder: Path) -> Task:
    """Load a GPT-2 in Hugging Face's format as a task, on the CPU.

    Only weights and settings are read; code in the folder is not run.

    Args:
        folder: a local Hugging Face folder, of a language model, a classifier, or a regressor (one label).

    Returns:
        A classifier, which decides by a threshold if the folder has one, a regressor or a language model, with the
        prompt of the folder. A classifier or regressor without a prompt reads the text alone. A language model
        generates texts with the settings of the task that was exported.

    Raises:
        InputError: a file is invalid, or the head does not fit the model or the names of the classes.
    """
    file = folder / "config.json"
    config, head = _read_task(file), pretrained.load_head(folder)
    task = _make_task(config, None if head is None else len(head[0]), file, {"base": str(folder)})
    if head is None:
        return task
    weight, bias = head
    linear = task.head.linear
    for name, tensor, parameter in (("weight", weight, linear.weight), ("bias", bias, linear.bias)):
        shape = tuple(parameter.shape)
        require(tuple(tensor.shape) == shape, f"score.{name}", tensor, f"of shape {shape}", folder)
        with torch.no_grad():
            parameter.copy_(tensor)
    return task


def load_adapter(folder: Path, base: str | None = None) -> Task:
    """Load an adapter in peft's format with its base as a task, on the CPU.

    Args:
        folder: folder that ``gpt2-pl export --format peft`` or ``peft`` has written.
        base: path or hub id of the base; defaults to the one that adapter_config.json names.

    Returns:
        A task as :func:`load_exported` returns it, with the prompt and the classes of task.json if there is one.

    Raises:
        InputError: the base cannot be found, a file is invalid, or the adapter does not fit the base.
    """
    adapter = PeftAdapter(str(folder))
    config, n_labels = adapter.describe()
    found = base or config.base_model_name_or_path
    if found is None:
        message = f"{folder / ADAPTER_CONFIG} names no base; give its path or hub id (base, --base)"
        raise InputError(message, key="base")
    try:
        resolve_checkpoint_dir(found)
    except InputError as error:
        hint = (
            ""
            if base is not None
            else f"; {folder / ADAPTER_CONFIG} names this base: give its new place (base, --base)"
        )
        raise InputError(f"{error}{hint}", key="base", value=found) from None
    file = folder / "task.json"
    task = _read_task(file) if file.is_file() else _task_schema()()
    return _make_task(task, n_labels, file, {"base": found, "surgery": [adapter]})


def _task_schema() -> type[ExportedTask]:
    from gpt2_pl.utils.hugging_face_schema import ExportedTask

    return ExportedTask


def _read_task(file: Path) -> ExportedTask:
    """Return the description of the task in a config.json or task.json."""
    from gpt2_pl.utils.schema import validate

    return validate(_task_schema(), read_json(file), str(file))


def _make_task(config: ExportedTask, n_labels: int | None, file: Path, settings: dict[str, Any]) -> Any:
    """Return a task with its prompt, whose model is built.

    Args:
        config: description of the task.
        n_labels: number of outputs of the head; None without a head.
        file: the file of the description, for error messages.
        settings: arguments of the task that define its model.
    """
    prompt: dict[str, Any] = config.prompt.model_dump(exclude_none=True) if config.prompt is not None else {}
    settings |= {"dropout": 0.0}
    task: Any
    if n_labels is None:
        task = LanguageModel(**settings)
        task.configure_model()
        task.prompt_spec = prompt or None
        task.decoding = {} if config.decoding is None else config.decoding.model_dump(exclude_unset=True)
        task.line_length_bias = config.line_length_bias
        return task
    settings |= {"pooling": config.pooling, "mean_weight": config.mean_weight, "head_dropout": 0.0}
    labels = _labels(config, n_labels, str(file))
    if not labels:
        task = TextRegressor(**settings)
    elif config.decision_threshold is not None and len(labels) == 2:
        task = ParaphraseDetector(threshold=config.decision_threshold, **settings)
    else:
        task = SentimentClassifier(num_classes=len(labels), **settings)
    task.configure_model()
    default: dict[str, Any] = {"max_length": task.max_length}
    if "template" not in prompt:
        names = [_DEFAULT_FIELD, "sentence"]
        default |= {"template": f"{{{_DEFAULT_FIELD}}}", "columns": {_DEFAULT_FIELD: names}}
    elif "columns" not in prompt:
        default["columns"] = {field: [field] for field in Template(prompt["template"]).fields}
    task.prompt_spec = default | prompt | ({"labels": labels} if labels else {})
    return task


def _labels(config: ExportedTask, n_labels: int, where: str) -> list[str]:
    """Return the names of the classes; none for a regressor.

    Raises:
        InputError: they do not fit the head.
    """
    if n_labels == 1:
        return []
    names = config.id2label or {str(i): f"LABEL_{i}" for i in range(n_labels)}
    if set(names) != {str(i) for i in range(n_labels)} or len(set(names.values())) != n_labels:
        expected = f"{n_labels} different names, by the numbers from 0 to {n_labels - 1}"
        raise InputError(key="id2label", value=names, expected=expected, source=where)
    return [names[str(i)] for i in range(n_labels)]
