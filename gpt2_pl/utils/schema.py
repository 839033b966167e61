"""Schemas of files: metrics.json, sweep.json, checkpoints, adapter_config.json and config.json of pretrained folders.

Each is a pydantic model, declared once, strict about types and keys. :func:`validate` turns the first of pydantic's
errors into one line: ``FILE: KEY must be X, got Y``. Import this module where a file is read, not at a module's top:
pydantic takes a fifth of a second.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from gpt2_pl.errors import InputError, printable, shorten

_VERSION = r"^([2-9]|[1-9][0-9])(\.[0-9]{1,9}){1,4}((a|b|rc|\.?dev|\.?post)[0-9]{1,9})?(\+[a-z0-9]+)?$"
_MAX_KEYS = 12  # that a message about an unknown key lists
_EXPECTED = {  # pydantic's error type -> what the value must be
    "string_type": "text",
    "string_unicode": "text without halves of surrogate pairs",
    "string_too_long": "text of at most {max_length} characters",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_long": "at most {max_length} values",
    "too_short": "at least {min_length} values",
    "none_required": "null",
    "string_pattern_mismatch": "a version of Lightning from 2.0 on",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
}


class Schema(BaseModel):
    """Base of all schemas: types are not converted, unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


S = TypeVar("S", bound=Schema)


def validate(schema: type[S], content: Any, where: str, part: str = "") -> S:
    """Check plain values against a schema.

    Args:
        schema: the schema.
        content: what a file holds.
        where: the file, with which the message begins.
        part: the key of the file that the content is of; by default the whole file.

    Raises:
        InputError: naming the first key that is wrong, its value, and what it must be.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
    key, kind, value = _path(found["loc"]), found["type"], found["input"]
    key = f"{part}.{key}".strip(".") if not key.startswith("a key") else f"{key} of {part}" if part else key
    if kind == "missing":
        raise InputError(f"{where}: {key} is missing")
    if kind == "extra_forbidden":
        raise InputError(f"{where}: {key} is not a key{_known(schema, found['loc'])}")
    expected = _EXPECTED.get(kind, found["msg"]).format(**found.get("ctx", {}))
    if not key:
        raise InputError(f"{where} must hold {expected}, got {shorten(value)}")
    raise InputError(f"{where}: {key} must be {expected}, got {shorten(value)}")


def _path(location: tuple[int | str, ...]) -> str:
    """``("epochs", 0, "val/loss")`` -> ``epochs[0].val/loss``."""
    if location[-1:] == ("[key]",):
        outer = _path(location[:-2])
        return f"a key of {outer}" if outer else "a key"
    parts = (f"[{part}]" if isinstance(part, int) else f".{printable(part[:80])}" for part in location)
    return "".join(parts).removeprefix(".")


def _known(schema: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """What a message about an unknown key adds: the nearest key, or the keys that there are."""
    for part in location[:-1]:
        if isinstance(part, str) and part in (names := _fields(schema)):
            schema = next((model for model in _models(names[part].annotation)), schema)
    keys = list(_fields(schema))
    if near := difflib.get_close_matches(str(location[-1]), keys, 1):
        return f"; did you mean {near[0]}?"
    return f"; the keys are {', '.join(keys)}" if len(keys) <= _MAX_KEYS else ""


def _fields(schema: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in schema.model_fields.items()}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The schemas within a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def expect(good: Callable[[Any], bool], expected: str) -> AfterValidator:
    """A validator for what no type says: ``Annotated[float, expect(lambda x: x % 2 == 0, "an even number")]``."""

    def check(value: Any) -> Any:
        if not good(value):
            raise PydanticCustomError("unexpected", "{expected}", {"expected": expected})
        return value

    return AfterValidator(check)


def is_text(value: Any) -> bool:
    """Whether this is text that can be encoded: without halves of surrogate pairs."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


_VISIBLE = expect(lambda text: printable(text, keep="\t\n\r") == text, "text without control characters")
Text = Annotated[str, Field(max_length=100_000)]
Name = Annotated[str, Field(max_length=300), _VISIBLE]
Size = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Figure = Annotated[float, Field(gt=-1e300, lt=1e300)]
Score = Annotated[  # of a run that diverged also NaN or infinity
    float,
    Field(allow_inf_nan=True),
    expect(lambda value: not 1e300 <= abs(value) < float("inf"), "a number of absolute value below 1e300"),
]
_Scores = Annotated[dict[Name, Score], Field(max_length=1000)]
_Epoch = Annotated[_Scores, expect(lambda scores: "epoch" in scores, "scores of an epoch and its number, epoch")]
_FILES = expect(
    lambda value: value is None or is_text(value) or (isinstance(value, list) and all(map(is_text, value))),
    "a file or a list of files",
)


# metrics.json


class Layer(Schema):
    """What of a layer trained."""

    layer: Name
    parameters: Count
    trainable: Count
    peak_rates: list[Figure] = []


class Parameters(Schema):
    """Numbers of parameters."""

    trainable: Count | None = None
    total: Count | None = None
    layers: list[Layer] = []


class Base(Schema):
    """The base of a run, and what it took to make it."""

    path: Text | None = None
    digest: Name | None = None
    origin: Name | None = None
    recipe: Text | None = None
    seconds: Figure | None = None
    cpu_seconds: Figure | None = None


class DataDescription(Schema):
    """A datamodule's description of itself; one of somebody else's may say more."""

    model_config = ConfigDict(extra="allow")

    class_name: Name | None = Field(None, alias="class")
    files: dict[Name, Annotated[Any, _FILES]] | None = None
    hub_id: Text | None = None
    rows: dict[Name, Count | None] | None = None
    labels: list[Text] | None = None


class MetricDescription(Schema):
    """How a metric is read and shown."""

    higher_is_better: bool | None = None
    percent: bool = False
    shown: bool = False


class Metrics(Schema):
    """The account of a run, metrics.json."""

    status: Name | None = None
    task: Name | None = None
    configs: list[Annotated[Text, _VISIBLE]] | None = None
    monitor: Name | None = None
    mode: Literal["min", "max"] | None = None
    primary: Name | None = None
    metrics: dict[Name, MetricDescription] | None = None
    scores: _Scores | None = None
    score_signatures: dict[Name, Name] | None = None
    epochs: Annotated[list[_Epoch], Field(max_length=100_000)] | None = None
    parameters: Parameters | None = None
    seconds: Figure | None = None
    cpu_seconds: Figure | None = None
    examples_per_second: Figure | None = None
    tokens_per_second: Figure | None = None
    training_flops: Figure | None = None
    mfu: Figure | None = None
    peak_memory_bytes: Count | None = None
    checkpoint_bytes: Count | None = None
    threads: Count | None = None
    steps: Count | None = None
    skipped_steps: Count | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    processes: Count | None = None
    precision: Name | None = None
    device: Name | None = None
    base: Base | None = None
    data: DataDescription | None = None
    versions: dict[Name, Name] | None = None


class SweepRecord(Schema):
    """What a run of a sweep was begun with, sweep.json."""

    files: dict[Text, Text]
    flags: dict[Text, Text]
    base: dict[str, Any] | None
    threads: Count = 1


def check_metrics(content: Any, where: str) -> dict[str, Any]:
    """Check the content of metrics.json; what a finished training run must have is there.

    Args:
        content: of the file.
        where: the file, with which the message begins.

    Raises:
        InputError: naming the key.
    """
    found = validate(Metrics, content, where)
    if found.status == "finished" and found.epochs:
        for key in ("scores", "parameters", "seconds", "monitor"):
            if getattr(found, key) is None:
                raise InputError(f"{where}: {key} is missing, and the run is finished")
        for key in ("trainable", "total"):
            if getattr(found.parameters, key) is None:
                raise InputError(f"{where}: parameters.{key} is missing, and the run is finished")
    return dict(content)


# Checkpoints


def _is_number(value: Any) -> bool:
    """Whether this is a real number, or a tensor of one."""
    if isinstance(value, bool | int | float):
        return not isinstance(value, bool)
    return is_tensor(value) and value.numel() == 1 and not value.is_complex()


def is_tensor(value: Any) -> bool:
    """Whether this is a tensor, without importing torch for files that hold none."""
    return hasattr(value, "untyped_storage")


_Number = Annotated[Any, expect(_is_number, "a number")]
_Tensor = Annotated[Any, expect(is_tensor, "a tensor")]


class BaseReference(Schema):
    """The base that a checkpoint's weights were trained on."""

    path: Text | None = None
    digest: Name | None = None
    complete: bool | None = None


class PromptSpec(Schema):
    """How a classifier was asked; a datamodule of somebody else's may say more."""

    model_config = ConfigDict(extra="allow")

    template: Text | None = None
    labels: list[Text] | None = None
    columns: dict[Text, list[Text]] | None = None
    max_length: Count | None = None
    quoting: bool | None = None


class RunSummaryState(Schema):
    """State of gpt2_pl.callbacks.RunSummary."""

    epochs: list[_Epoch] | None = None
    val_metrics: _Scores | None = None
    layers: list[Layer] | None = None


class ThroughputState(Schema):
    """State of gpt2_pl.callbacks.Throughput."""

    seconds: Figure | None = None
    cpu_seconds: Figure | None = None
    training_seconds: Figure | None = None
    examples: Count | None = None
    tokens: Count | None = None
    flops: Figure | None = None
    peak_memory_bytes: Count | None = None


class PredictionWriterState(Schema):
    """State of gpt2_pl.callbacks.PredictionWriter."""

    best: Score | None = None


class NonFiniteLossGuardState(Schema):
    """State of gpt2_pl.callbacks.NonFiniteLossGuard."""

    skipped: Count


class EarlyStoppingState(Schema):
    """State of Lightning's EarlyStopping, which may grow."""

    model_config = ConfigDict(extra="allow")

    wait_count: Count
    stopped_epoch: Count
    best_score: _Number
    patience: Count


class ModelCheckpointState(Schema):
    """State of Lightning's ModelCheckpoint, which may grow."""

    model_config = ConfigDict(extra="allow")

    monitor: Name | None = None
    dirpath: Text | None = None
    best_model_path: Text
    kth_best_model_path: Text
    last_model_path: Text
    best_model_score: _Number | None = None
    current_score: _Number | None = None
    kth_value: _Number | None = None
    best_k_models: dict[Text, _Number]


class StochasticWeightAveragingState(Schema):
    """State of Lightning's StochasticWeightAveraging, of which no more is used."""

    model_config = ConfigDict(extra="allow")

    n_averaged: Count


class WeightAveragingState(Schema):
    """State of Lightning's WeightAveraging and EMAWeightAveraging, which may grow."""

    model_config = ConfigDict(extra="allow")

    latest_update_step: Count


CALLBACKS: dict[str, type[Schema]] = {  # by class, what its state must be
    "RunSummary": RunSummaryState,
    "Throughput": ThroughputState,
    "PredictionWriter": PredictionWriterState,
    "NonFiniteLossGuard": NonFiniteLossGuardState,
    "ResumableEarlyStopping": EarlyStoppingState,
    "EarlyStopping": EarlyStoppingState,
    "ResumableModelCheckpoint": ModelCheckpointState,
    "ModelCheckpoint": ModelCheckpointState,
    "StochasticWeightAveraging": StochasticWeightAveragingState,
    "WeightAveraging": WeightAveragingState,
    "EMAWeightAveraging": WeightAveragingState,
}


class SurgerySettings(Schema):
    """A surgery's class and arguments."""

    class_path: Name
    init_args: dict[Name, Any] | None = None


class Config(Schema):
    """The shape of a GPT-2, gpt2_pl.model.GPT2Config."""

    vocab_size: Size = 1
    n_positions: Size = 1
    n_embd: Size = 1
    n_layer: Size = 1
    n_head: Size = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Hyperparameters(Schema):
    """What tasks have in common; a task's signature says which others there are."""

    base: Text | None = None
    config: Config | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    surgery: list[SurgerySettings] | None = None
    train_base: bool | None = None


class FitLoop(Schema):
    """Progress of training; the trainer's own loop says which other keys there are."""

    model_config = ConfigDict(extra="allow")

    epoch_progress: dict[str, Any]


class Loops(Schema):
    """Progress of all loops."""

    model_config = ConfigDict(extra="allow")

    fit_loop: FitLoop


class OptimizerState(Schema):
    """State of an optimizer; the optimizer itself says what it must hold."""

    model_config = ConfigDict(extra="allow")

    state: dict[Any, Any]
    param_groups: list[dict[str, Any]]


class Checkpoint(Schema):
    """A checkpoint; tasks and callbacks of others may add keys of their own."""

    model_config = ConfigDict(extra="allow")

    version: Annotated[str, Field(pattern=_VERSION)] = Field(alias="pytorch-lightning_version")
    state_dict: dict[Name, _Tensor]
    hyper_parameters: dict[Name, Any]
    hparams_name: Literal["kwargs"] | None = None
    base: BaseReference
    surgery: list[SurgerySettings] | None = None
    prompt_spec: PromptSpec | None = None
    epoch: Count | None = None
    global_step: Count | None = None
    callbacks: dict[Text, dict[str, Any]] | None = None
    loops: Loops | None = None
    optimizer_states: Annotated[list[OptimizerState], Field(min_length=1)] | None = None
    lr_schedulers: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None


# Files of other libraries, which say much that changes nothing here


def _fixed(*allowed: Any) -> Any:
    """A value that only this library's own choice may be; the first is shown."""
    good = [(type(value), value) for value in allowed]
    words = f"{allowed[0]!r} (nothing else is computed here)"
    return Annotated[Any, expect(lambda value: (type(value), value) in good, words)]


def _is_simple_pattern(pattern: str) -> bool:
    """Whether this is a regular expression that takes little time on a module's name: no repeated groups."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return len(re.findall(r"[*+{]", pattern)) <= 4 and not re.search(r"\)\s*[*+{]", pattern)


_Alpha = Annotated[float, Field(ge=-1e9, le=1e9)]
_Rate = Annotated[float, Field(ge=0, lt=1)]
_Pattern = Annotated[
    str, Field(max_length=200), expect(_is_simple_pattern, "a regular expression without repeated groups")
]


class AdapterConfig(Schema):
    """The adapter_config.json of ``peft``; its newer versions add keys, which must be null, false or empty."""

    model_config = ConfigDict(extra="allow")

    peft_type: Literal["LORA", "PREFIX_TUNING", "PROMPT_TUNING"]
    r: Size | None = None
    rank_pattern: dict[Text, Size] | None = None
    lora_alpha: _Alpha = 8
    alpha_pattern: dict[_Pattern, _Alpha] | None = None
    lora_dropout: _Rate | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None
    bias: _fixed("none") = "none"  # type: ignore[valid-type]
    lora_bias: _fixed(False, None) = None  # type: ignore[valid-type]
    layer_replication: _fixed(None, []) = None  # type: ignore[valid-type]
    target_parameters: _fixed(None, []) = None  # type: ignore[valid-type]
    trainable_token_indices: _fixed(None, []) = None  # type: ignore[valid-type]
    alora_invocation_tokens: _fixed(None, []) = None  # type: ignore[valid-type]
    use_qalora: _fixed(False, None) = None  # type: ignore[valid-type]
    use_bdlora: _fixed(None, False) = None  # type: ignore[valid-type]
    arrow_config: _fixed(None) = None  # type: ignore[valid-type]
    num_transformer_submodules: _fixed(1, None) = None  # type: ignore[valid-type]
    # the others (PiSSA, OLoRA, CorDA, LoftQ ...) change the base's own weights
    init_lora_weights: _fixed(True, False, None, "gaussian", "eva", "orthogonal") = True  # type: ignore[valid-type]


_NEUTRAL = {  # keys of peft's that may have any value: they change nothing, or what they change lies in the tensors
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("encoder_hidden_size", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_weights", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save"),
    *("num_attention_heads", "num_layers", "num_virtual_tokens", "peft_version", "prefix_projection"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "qalora_group_size", "revision", "target_modules", "task_type"),
    *("token_dim", "tokenizer_kwargs", "tokenizer_name_or_path"),
}


def check_adapter(content: Any, where: str) -> AdapterConfig:
    """Check the content of an adapter_config.json.

    Args:
        content: of the file.
        where: the file, with which the message begins.

    Raises:
        InputError: naming the key; also one that is unknown here and switched on.
    """
    found = validate(AdapterConfig, content, where)
    for key, value in (found.model_extra or {}).items():
        if key not in _NEUTRAL and value not in (None, False, [], {}):
            raise InputError(
                f"{where}: {printable(key[:80])} must be null, for it is not computed here, got {shorten(value)}"
            )
    return found


class PretrainedConfig(Schema):
    """The config.json of a GPT-2 in Hugging Face's format; it says much else, about other uses."""

    model_config = ConfigDict(extra="allow")

    model_type: _fixed("gpt2") = "gpt2"  # type: ignore[valid-type]
    activation_function: _fixed("gelu_new", "gelu_pytorch_tanh") = "gelu_new"  # type: ignore[valid-type]
    layer_norm_epsilon: _fixed(1e-5) = 1e-5  # type: ignore[valid-type]
    tie_word_embeddings: _fixed(True) = True  # type: ignore[valid-type]
    scale_attn_weights: _fixed(True) = True  # type: ignore[valid-type]
    scale_attn_by_inverse_layer_idx: _fixed(False) = False  # type: ignore[valid-type]
    add_cross_attention: _fixed(False) = False  # type: ignore[valid-type]
    vocab_size: Size = 50257
    n_positions: Size = 1024
    n_embd: Size = 768
    n_layer: Size = 12
    n_head: Size = 12
    n_inner: int | None = None
    resid_pdrop: _Rate = 0.1
    embd_pdrop: _Rate = 0.1
    attn_pdrop: _Rate = 0.1


class ShardIndex(Schema):
    """The model.safetensors.index.json of weights in several files."""

    model_config = ConfigDict(extra="allow")

    weight_map: dict[Text, Annotated[str, Field(max_length=255)]]
