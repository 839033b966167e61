"""A training step of a language model: time and peak memory, plain, with unlikelihood, and transformers' own.

    python benchmarks/language_model.py [--batch 8] [--context 512] [--precision bf16|fp32] [--record]

GPT-2's shape and vocabulary, random tokens, AdamW, no dropout. Memory is the process's
peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from harness import Figures, arguments, compare, now, peak_gb, take_turns
from peak_flops import peak_flops

SIZES = {"small": (768, 12, 12), "medium": (1024, 24, 16)}  # width, blocks, heads
PLAIN, UNLIKELIHOOD, TRANSFORMERS = "ours", "with unlikelihood", "transformers, own loop"


def training_flops(n_layer: int, width: int, vocab_size: int, context: int) -> float:
    """Operations per token: 6 per weight that multiplies, and 12 L C T (Chowdhery et al. 2022, appendix B)."""
    return 6.0 * (12 * n_layer * width * width + vocab_size * width) + 12.0 * n_layer * width * context


def measure(args: argparse.Namespace) -> Figures:
    """Seconds of a step and memory of one way to make it, in this process."""
    import torch

    from gpt2_pl import GPT2, GPT2Config
    from gpt2_pl.kernels.malloc import disable_malloc_trim
    from gpt2_pl.losses import cross_entropy, unlikelihood_cross_entropy

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    width, blocks, heads = SIZES[args.size]
    config = GPT2Config(n_embd=width, n_layer=blocks, n_head=heads, dropout=0.0)
    ids = torch.randint(0, config.vocab_size, (args.batch, args.context + 1), device=device)
    ids[:, 1::3] = ids[:, ::3][:, : ids[:, 1::3].size(1)]  # some repetition
    model: Any
    if args.arm == TRANSFORMERS:
        from transformers import GPT2Config as TheirConfig
        from transformers import GPT2LMHeadModel

        shape = TheirConfig(n_embd=width, n_layer=blocks, n_head=heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        model = GPT2LMHeadModel(shape).to(device).train()
    else:
        disable_malloc_trim()  # as callbacks.Environment does
        model = GPT2(config).to(device).train()
        for block in model.h if args.compile else ():
            block.compile(dynamic=True)
    if args.compile and args.arm == TRANSFORMERS:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16"):
            if args.arm == TRANSFORMERS:
                loss = model(ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss  # shifts by itself
            elif args.arm == PLAIN:
                total, n = cross_entropy(model(ids[:, :-1]), model.head_weight, ids[:, 1:], compiled=args.compile)
                loss = total / n
            else:
                total, n, _ = unlikelihood_cross_entropy(
                    model(ids[:, :-1]), model.head_weight, ids[:, 1:], 1.0, compiled=args.compile
                )
                loss = total / n
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # A GPU is given several steps to do at a time.
    warm, turns, together = (3, 3, args.steps) if device == "cuda" else (1, args.steps, 1)
    for _ in range(warm):
        step()
    seconds = []
    for _ in range(turns):
        since = now()
        for _ in range(together):
            step()
        seconds.append((now() - since) / together)
    tokens = args.batch * args.context / statistics.median(seconds)
    figures = {"tokens/s": tokens, "peak memory, GB": peak_gb()}
    if device == "cuda":  # whose peak the data sheet says
        figures["MFU"] = (
            training_flops(blocks, width, config.vocab_size, args.context)
            * tokens
            / peak_flops(torch.device(device), dtype)
        )
    return figures


def main() -> None:
    """Measure all in turn, print medians and ratios."""
    parser = arguments(__doc__, [PLAIN, UNLIKELIHOOD, TRANSFORMERS])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of GPT-2")
    parser.add_argument("--compile", action="store_true", help="compile the models")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--alone", action="store_true", help="measure the plain step only")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args)))
        return
    found = take_turns([PLAIN] if args.alone else [PLAIN, UNLIKELIHOOD, TRANSFORMERS], args.rounds)
    compiled = ", compiled" if args.compile else ""
    work = f"language model, GPT-2 {args.size}, {args.batch} rows of {args.context} tokens, {args.precision}{compiled}"
    compare(work, found, args.record)


if __name__ == "__main__":
    main()
