"""Loading of Hugging Face folders as tasks: models that ``gpt2-pl export`` has written, and other GPT-2 models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpt2_pl import pretrained
from gpt2_pl.datamodules.prompt_template import Template
from gpt2_pl.errors import InputError, require
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
        prompt of the folder. A classifier or regressor without a prompt reads the text alone.

    Raises:
        InputError: a file is invalid, or the head does not fit the model or the names of the classes.
    """
    from gpt2_pl.utils.hugging_face_schema import ExportedTask
    from gpt2_pl.utils.schema import validate

    file = folder / "config.json"
    config = validate(ExportedTask, read_json(file), str(file))
    prompt: dict[str, Any] = config.prompt.model_dump(exclude_none=True) if config.prompt is not None else {}
    head = pretrained.load_head(folder)
    settings: dict[str, Any] = {"base": str(folder), "dropout": 0.0}
    task: Any
    if head is None:
        task = LanguageModel(**settings)
        task.configure_model()
        task.prompt_spec = prompt or None
        return task
    weight, bias = head
    settings |= {"pooling": config.pooling, "mean_weight": config.mean_weight, "head_dropout": 0.0}
    labels = _labels(config, len(weight), str(file))
    if not labels:
        task = TextRegressor(**settings)
    elif config.decision_threshold is not None and len(labels) == 2:
        task = ParaphraseDetector(threshold=config.decision_threshold, **settings)
    else:
        task = SentimentClassifier(num_classes=len(labels), **settings)
    task.configure_model()
    linear = task.head.linear
    for name, tensor, parameter in (("weight", weight, linear.weight), ("bias", bias, linear.bias)):
        shape = tuple(parameter.shape)
        require(tuple(tensor.shape) == shape, f"score.{name}", tensor, f"of shape {shape}", folder)
        with torch.no_grad():
            parameter.copy_(tensor)
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
