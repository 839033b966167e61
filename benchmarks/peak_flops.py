"""What a machine could compute at most, beside which training is measured."""

from __future__ import annotations

import time
from functools import cache

import torch

# Dense bfloat16 operations per second, from the makers' data sheets.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "V100": 125e12}


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
