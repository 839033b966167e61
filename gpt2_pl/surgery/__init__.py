"""PEFT methods: adapters, virtual tokens, selections of parameters, and adapters in the format of ``peft``."""

from gpt2_pl.kernels.prepacked_linear import MergeableLayer
from gpt2_pl.surgery.base import Surgery, build, merge, unmerge
from gpt2_pl.surgery.bottleneck import BottleneckAdapter
from gpt2_pl.surgery.ia3 import IA3, IA3Linear
from gpt2_pl.surgery.lora import Adapter, DoRALinear, LoRA, LoRAEmbedding, LoRALinear, PiSSALinear
from gpt2_pl.surgery.peft_format import PeftAdapter
from gpt2_pl.surgery.selection import BitFit, LayerNormTuning
from gpt2_pl.surgery.virtual_tokens import PrefixTuning, PromptTuning

__all__ = [
    "IA3",
    "Adapter",
    "BitFit",
    "BottleneckAdapter",
    "DoRALinear",
    "IA3Linear",
    "LayerNormTuning",
    "LoRA",
    "LoRAEmbedding",
    "LoRALinear",
    "MergeableLayer",
    "PeftAdapter",
    "PiSSALinear",
    "PrefixTuning",
    "PromptTuning",
    "Surgery",
    "build",
    "merge",
    "unmerge",
]
