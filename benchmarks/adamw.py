"""Optimizer step over GPT-2 small's parameters: this library's AdamW, and torch's fused, multi-tensor and for-loop.

python benchmarks/adamw.py [--record]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Figures, arguments, compare, now, turns_here

from gpt2_pl import GPT2, AdamW, GPT2Config


def main() -> None:
    """Measure all optimizers and print medians and ratios."""
    args = arguments(__doc__, [], rounds=15).parse_args()
    parameters = list(GPT2(GPT2Config()).to("cuda" if torch.cuda.is_available() else "cpu").parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)

    def timed(optimizer: torch.optim.Optimizer) -> Callable[[], Figures]:
        def measure() -> Figures:
            since = now()
            optimizer.step()
            return {"seconds": now() - since}

        measure()  # creates the optimizer's state
        return measure

    optimizers = {
        "ours": AdamW(parameters),
        "torch, fused": torch.optim.AdamW(parameters, fused=True),
        "torch, foreach": torch.optim.AdamW(parameters, foreach=True),
        "torch, one by one": torch.optim.AdamW(parameters, foreach=False),
    }
    found = turns_here({name: timed(optimizer) for name, optimizer in optimizers.items()}, args.rounds)
    compare("AdamW, a step over GPT-2 small", found, args.record)


if __name__ == "__main__":
    main()
