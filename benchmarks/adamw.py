"""One optimizer step over GPT-2 small's parameters: ours, and torch's AdamW fused, multi-tensor and one by one.

    python benchmarks/adamw.py

The four take turns; the medians and their ratios are printed.
"""

from __future__ import annotations

import statistics
import time

import torch

from gpt2_pl import GPT2, AdamW, GPT2Config


def main(rounds: int = 15) -> None:
    """Time and print."""
    parameters = list(GPT2(GPT2Config()).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizers = {
        "ours": AdamW(parameters),
        "torch, fused": torch.optim.AdamW(parameters, fused=True),
        "torch, foreach": torch.optim.AdamW(parameters, foreach=True),
        "torch, one by one": torch.optim.AdamW(parameters, foreach=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:18} {median:.3f} s  {median / medians['torch, fused']:.2f} x fused")


if __name__ == "__main__":
    main()
