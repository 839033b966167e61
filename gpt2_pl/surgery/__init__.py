"""PEFT methods: LoRA, prefix-tuning, prompt tuning, selections of parameters, and adapters in ``peft``'s format."""

from gpt2_pl.kernels.prepacked_linear import MergeableLayer
from gpt2_pl.surgery.base import Surgery, build, merge, unmerge
from gpt2_pl.surgery.lora import Adapter, DoRALinear, LoRA, LoRAEmbedding, LoRALinear
from gpt2_pl.surgery.peft_format import PeftAdapter
from gpt2_pl.surgery.selection import BitFit, LayerNormTuning
from gpt2_pl.surgery.virtual_tokens import PrefixTuning, PromptTuning

__all__ = [
    "Adapter",
    "BitFit",
    "DoRALinear",
    "LayerNormTuning",
    "LoRA",
    "LoRAEmbedding",
    "LoRALinear",
    "MergeableLayer",
    "PeftAdapter",
    "PrefixTuning",
    "PromptTuning",
    "Surgery",
    "build",
    "merge",
    "unmerge",
]
