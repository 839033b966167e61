"""Schemas of Hugging Face files: adapter_config.json of peft, config.json and the weight index of a GPT-2.

Keys that do not change the computation are accepted with any value. Import this module where a file is read; see
:mod:`gpt2_pl.utils.schema`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from gpt2_pl.errors import InputError, printable
from gpt2_pl.utils.schema import Count, PromptSpec, Rate, Schema, Size, Text, expect, validate


def _is_simple_pattern(pattern: str) -> bool:
    """Return whether a text is a regular expression without repeated groups, which matches in little time."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return len(re.findall(r"[*+{]", pattern)) <= 4 and not re.search(r"\)\s*[*+{]", pattern)


_Alpha = Annotated[float, Field(ge=-1e9, le=1e9)]
_IS_SIMPLE = expect(_is_simple_pattern, "a regular expression without repeated groups")
_Pattern = Annotated[str, Field(max_length=200), _IS_SIMPLE]


class AdapterConfig(Schema, extra="allow"):
    """The adapter_config.json of ``peft``; unknown keys of later versions must be null, false or empty."""

    base_model_name_or_path: Text | None = None
    peft_type: Literal["IA3", "LN_TUNING", "LORA", "PREFIX_TUNING", "PROMPT_TUNING"]
    r: Size | None = None
    rank_pattern: dict[Text, Size] | None = None
    lora_alpha: _Alpha = 8
    alpha_pattern: dict[_Pattern, _Alpha] | None = None
    lora_dropout: Rate | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None
    bias: Literal["none"] = "none"
    num_transformer_submodules: Literal[1] | None = None
    # The other methods (PiSSA, OLoRA, CorDA, LoftQ ...) change the weights of the base.
    init_lora_weights: Literal[True, False, None, "gaussian", "eva", "orthogonal"] = True


_IGNORED_KEYS = {  # keys of peft with any value: they have no effect, or their effect is stored in the tensors
    *("auto_mapping", "corda_config", "ensure_weight_tying", "eva_config"),
    *("encoder_hidden_size", "exclude_modules", "fan_in_fan_out", "feedforward_modules", "inference_mode"),
    *("init_ia3_weights", "init_weights", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save"),
    *("num_attention_heads", "num_layers", "num_virtual_tokens", "peft_version", "prefix_projection"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "qalora_group_size", "revision", "target_modules", "task_type"),
    *("token_dim", "tokenizer_kwargs", "tokenizer_name_or_path"),
}


def check_adapter(content: Any, where: str) -> AdapterConfig:
    """Check the content of an adapter_config.json.

    Args:
        content: the content of the file.
        where: the path of the file; messages start with it.

    Returns:
        The content as an :class:`AdapterConfig`.

    Raises:
        InputError: naming the invalid key. A key that is unknown here must be null, false or empty.
    """
    config = validate(AdapterConfig, content, where)
    for key, value in (config.model_extra or {}).items():
        if key not in _IGNORED_KEYS and value not in (None, False, [], {}):
            expected = "null, because it is not supported here"
            raise InputError(key=printable(key[:80]), value=value, expected=expected, source=where)
    return config


class PretrainedConfig(Schema, extra="allow"):
    """The config.json of a GPT-2 in Hugging Face's format; its other keys do not affect the model."""

    model_type: Literal["gpt2", "gpt2_pooled"] = "gpt2"  # the latter: a GPT-2 with a head of this library
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh"] = "gelu_new"
    layer_norm_epsilon: Annotated[float, Field(ge=1e-5, le=1e-5)] = 1e-5
    tie_word_embeddings: Literal[True] = True
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False
    vocab_size: Size = 50257
    n_positions: Size = 1024
    n_embd: Size = 768
    n_layer: Size = 12
    n_head: Size = 12
    n_inner: int | None = None
    resid_pdrop: Rate = 0.1
    embd_pdrop: Rate = 0.1
    attn_pdrop: Rate = 0.1


class Decoding(Schema):
    """Settings with which an exported model generates texts; null switches a setting off."""

    max_new_tokens: Size | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Size | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    num_beams: Size | None = None
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    no_repeat_ngram_size: Count | None = None


class ExportedTask(Schema, extra="allow"):
    """The keys of config.json that describe the task of a model, as ``gpt2-pl export`` writes them."""

    id2label: dict[Annotated[str, Field(max_length=10)], Text] | None = None
    decision_threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    pooling: Literal["last", "mean", "max", "mix", "concat"] = "last"
    mean_weight: Annotated[float, Field(ge=0, le=1)] = 0.7
    prompt: PromptSpec | None = None
    decoding: Decoding | None = None
    line_length_bias: bool = True  # of poems


class ShardIndex(Schema, extra="allow"):
    """The model.safetensors.index.json of weights that are stored in several files."""

    weight_map: dict[Text, Annotated[str, Field(max_length=255)]]
