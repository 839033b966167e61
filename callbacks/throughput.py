"""How close training comes to what the machine could do."""

from __future__ import annotations

import time
from functools import cache

import torch

from gpt2_pl.model import GPT2Config

# Dense bfloat16 operations per second, from the makers' data sheets.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "V100": 125e12}


def training_flops(config: GPT2Config, context: float) -> float:
    """Floating-point operations per token of a forward and a backward pass that trains every weight.

    6 per weight that multiplies, the vocabulary included, and 12 L C T for attention (Chowdhery et al. 2022, appendix
    B), without what is recomputed.

    Args:
        config: the GPT-2's shape.
        context: tokens in a row, T.
    """
    L, C = config.n_layer, config.n_embd
    return 6.0 * (12 * L * C * C + config.vocab_size * C) + 12.0 * L * C * context


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second that a device could do.

    For known GPUs the data sheet's dense bfloat16 rate; for everything else what one large matrix product reaches here.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in _PEAKS.items():
            if known in name.replace("-", " ").split():
                return peak
    n = 8192 if device.type == "cuda" else 1536
    a = torch.ones(n, n, device=device, dtype=dtype)

    def seconds() -> float:
        since = time.perf_counter()
        (a @ a)[0, 0].item()
        return time.perf_counter() - since

    seconds()
    return 2.0 * n**3 / min(seconds() for _ in range(5))
