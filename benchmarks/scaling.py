"""Speed and memory of a language model's training step for different lengths, batch sizes and models.

    python benchmarks/scaling.py [--record]

GPT-2's vocabulary, random tokens, bf16, AdamW, dropout 0.1. Points are measured in alternation, each in a
separate process. Memory is the peak memory minus that after a step of one token, so that weights, gradients and the
optimizer's moments are not included.
"""

from __future__ import annotations

import argparse
import json
import statistics

from harness import Figures, arguments, compare, now, peak_gb, take_turns

SIZES = {"tiny": (320, 6, 5), "small": (768, 12, 12), "medium": (1024, 24, 16)}  # width, blocks, heads
POINTS = {
    **{f"GPT-2 small, 4 rows of {T} tokens": ("small", 4, T) for T in (64, 128, 256, 512, 1024)},
    **{f"GPT-2 small, {B} rows of 128 tokens": ("small", B, 128) for B in (1, 2, 8, 16, 32)},
    **{f"GPT-2 {size}, 4 rows of 256 tokens": (size, 4, 256) for size in ("tiny", "medium")},
}


def measure(args: argparse.Namespace) -> Figures:
    """Measure one point in this process."""
    import torch

    from gpt2_pl import GPT2, GPT2Config
    from gpt2_pl.kernels.malloc import disable_malloc_trim
    from gpt2_pl.losses import cross_entropy

    size, B, T = POINTS[args.arm]
    C, L, H = SIZES[size]
    disable_malloc_trim()  # as callbacks.Environment does
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT2(GPT2Config(n_embd=C, n_layer=L, n_head=H)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, model.config.vocab_size, (B, T + 1), device=device)

    def step(ids: torch.Tensor) -> float:
        since = now()
        with torch.autocast(device, torch.bfloat16):
            total, n = cross_entropy(model(ids[:, :-1]), model.head_weight, ids[:, 1:])
        (total / n).backward()
        optimizer.step()
        optimizer.zero_grad()
        return now() - since

    step(tokens[:1, :2])
    before = peak_gb()
    step(tokens)
    seconds = statistics.median(step(tokens) for _ in range(args.steps))
    return {"tokens/s": B * T / seconds, "memory of a step, GB": peak_gb() - before}


def main() -> None:
    """Measure all points in alternation and print their medians."""
    parser = arguments(__doc__, list(POINTS), rounds=1)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args)))
        return
    for point, figures in take_turns(list(POINTS), args.rounds).items():
        compare(f"language model, {point}", {point: figures}, args.record)


if __name__ == "__main__":
    main()
