"""Peak floating-point performance of a device."""

from __future__ import annotations

import time
from functools import cache

import torch

# Dense bfloat16 operations per second, from the manufacturers' data sheets.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "V100": 125e12}


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak floating-point operations per second of a device.

    For known GPUs in bfloat16 this is the dense rate of the data sheet, otherwise the rate of a large matrix product.
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
