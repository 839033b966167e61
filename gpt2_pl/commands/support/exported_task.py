"""What an exported model needs of its task: its head, classes, prompt and decision threshold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from gpt2_pl.datamodules.prompt_template import Template
from gpt2_pl.errors import InputError, listing
from gpt2_pl.utils.registry import class_path
from gpt2_pl.utils.yaml_json import read_json

if TYPE_CHECKING:
    from gpt2_pl.heads import ClassificationHead
    from gpt2_pl.tasks import Task


def task_head(task: Task) -> ClassificationHead | None:
    """Return the linear head of a task, or None if only the backbone has parameters.

    That of a verbalizer has the embeddings of its label words as weights.

    Raises:
        InputError: transformers has no such head.
    """
    import torch

    from gpt2_pl.heads import ClassificationHead, Verbalizer

    head: Any = getattr(task, "head", None)
    if isinstance(head, Verbalizer):
        with torch.no_grad():
            weight = task.backbone.head_weight[head.token_ids].clone()
            linear = ClassificationHead(weight.size(1), weight.size(0))
            linear.linear.weight.copy_(weight)
        return linear
    is_linear = isinstance(head, ClassificationHead)
    supported = ("head.linear.weight", "head.linear.bias") if is_linear else ()
    if unsupported := [name for name, _ in task.head_parameters() if name not in supported]:
        what = f"{listing(unsupported)}, the head of {class_path(type(task))}"
        raise InputError(f"transformers does not support {what}; omit it with --backbone", key="backbone")
    if is_linear and task_pooling(task) is None:
        what = f"the pooling of {class_path(type(task))}, {getattr(task, 'pooling', None)!r}"
        raise InputError(f"transformers does not support {what}; omit the head with --backbone", key="backbone")
    return head if is_linear else None


def task_pooling(task: Task) -> str | None:
    """Return how a task pools hidden states; None for a pooling that is not one of this library."""
    from gpt2_pl.heads import Pooling

    pooling = getattr(task, "pooling", None)
    return pooling if pooling in get_args(Pooling) else None


def class_names(task: Task, head: ClassificationHead | None) -> list[str] | None:
    """Return the names of the classes of a head, or their numbers; [] for a regressor, None without a head."""
    from gpt2_pl.tasks.protocols import NumberPredictor

    if head is None:
        return None
    if isinstance(task, NumberPredictor):
        return []
    n_classes = head.linear.out_features
    labels = (task.prompt_spec or {}).get("labels") or []
    return list(labels) if len(labels) == n_classes else [str(i) for i in range(n_classes)]


def task_settings(task: Task, head: ClassificationHead | None, run: Path) -> dict[str, Any]:
    """Return what a user of an exported model needs of its task: prompt, decoding, classes and threshold.

    Args:
        task: the trained task.
        head: its head; None if it is not exported.
        run: folder of the run.
    """
    settings: dict[str, Any] = {}
    if prompt := task_prompt(task, head, run):
        settings["prompt"] = prompt
    if head is None and (decoding := task_decoding(task)):
        settings["decoding"] = decoding
    if head is None and not getattr(task, "line_length_bias", True):
        settings["line_length_bias"] = False
    labels = class_names(task, head)
    if labels is None:
        return settings
    names = labels or ["prediction"]
    settings["id2label"] = {str(i): name for i, name in enumerate(names)}
    settings["label2id"] = {name: i for i, name in enumerate(names)}
    settings["problem_type"] = "single_label_classification" if labels else "regression"
    if (threshold := decision_threshold(task)) is not None:
        settings["decision_threshold"] = threshold
    return settings


def task_decoding(task: Task) -> dict[str, Any]:
    """Return the settings with which a task generates texts; a user's task may have others than this library knows."""
    from gpt2_pl.utils.hugging_face_schema import Decoding

    return {key: value for key, value in task.decoding.items() if key in Decoding.model_fields}


def decision_threshold(task: Task) -> float | None:
    """Return the smallest probability of class 1 that a task classifies as class 1; None without a threshold."""
    threshold = dict(task.named_buffers()).get("decision_threshold")
    return None if threshold is None else float(threshold)


def task_prompt(task: Task, head: ClassificationHead | None, run: Path) -> dict[str, Any]:
    """Return the prompt format of the training data: the template and what belongs to it, or the lines of a poem.

    Without the head of a classifier or regressor, the model continues texts as they are: its template is left out.
    That of a data-to-text model, which has a target, is kept.
    """
    template = (read_record(run).get("data") or {}).get("template")  # of data whose checkpoints have no prompt
    spec = task.prompt_spec or {"template": template}
    keys: tuple[str, ...] = ("template", "target", "normalize", "columns", "max_length", "quoting", "prompt_lines")
    if head is None and spec.get("target") is None:
        keys = ("prompt_lines",)
    try:
        Template(spec["template"], spec.get("normalize") or ())
    except (InputError, KeyError, TypeError):  # a user's data may have another template, or none
        keys = ("prompt_lines",)
    return {key: spec[key] for key in keys if spec.get(key) is not None}


def read_record(run: Path) -> dict[str, Any]:
    """Return the content of a run's metrics.json, or {} without a valid one."""
    from gpt2_pl.utils.run_schema import check_metrics

    try:
        return check_metrics(read_json(run / "metrics.json"), "metrics.json")
    except InputError:
        return {}
