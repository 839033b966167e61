"""Training step of a language model: speed and memory, with and without unlikelihood, and with transformers.

    python benchmarks/language_model.py [--batch 8] [--context 512] [--precision bf16|fp32] [--record]

GPT-2's shape and vocabulary, random tokens, AdamW, no dropout. Memory is the peak of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from harness import Figures, arguments, compare, now, peak_gb, take_turns
from peak_flops import peak_flops

if TYPE_CHECKING:
    from torch import Tensor

VOCAB_SIZE = 50257
SIZES = {"small": (768, 12, 12), "medium": (1024, 24, 16)}  # width, blocks, heads
PLAIN, UNLIKELIHOOD, TRANSFORMERS = "ours", "with unlikelihood", "transformers, own loop"


def training_flops(n_layer: int, width: int, vocab_size: int, context: int) -> float:
    """Return the FLOPs per token: 6 per weight of a matrix, and 12 L C T (Chowdhery et al. 2022, appendix B)."""
    return 6.0 * (12 * n_layer * width * width + vocab_size * width) + 12.0 * n_layer * width * context


def build_model(args: argparse.Namespace, device: str) -> Any:
    """Create the arm's GPT-2 in training mode, without dropout."""
    import torch

    width, blocks, heads = SIZES[args.size]
    if args.arm == TRANSFORMERS:
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = GPT2Config(n_embd=width, n_layer=blocks, n_head=heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        peer = GPT2LMHeadModel(shape).to(device).train()
        return torch.compile(peer) if args.compile else peer

    from gpt2_pl import model
    from gpt2_pl.kernels.malloc import disable_malloc_trim

    disable_malloc_trim()  # as callbacks.Environment does
    config = model.GPT2Config(n_embd=width, n_layer=blocks, n_head=heads, dropout=0.0)
    gpt2 = model.GPT2(config).to(device).train()
    for block in gpt2.h if args.compile else ():
        block.compile(dynamic=True)
    return gpt2


def mean_loss(args: argparse.Namespace, model: Any, ids: Tensor) -> Tensor:
    """Return the arm's mean loss per token, of ``ids`` (B, T + 1)."""
    from gpt2_pl.losses import cross_entropy, unlikelihood_cross_entropy

    inputs, targets = ids[:, :-1], ids[:, 1:]
    if args.arm == TRANSFORMERS:
        return model(inputs, labels=inputs, use_cache=False).loss  # shifts the labels itself
    if args.arm == PLAIN:
        total, n = cross_entropy(model(inputs), model.head_weight, targets, compiled=args.compile)
    else:
        total, n, _ = unlikelihood_cross_entropy(model(inputs), model.head_weight, targets, 1.0, compiled=args.compile)
    return total / n


def median_step_time(args: argparse.Namespace, step: Callable[[], None]) -> float:
    """Return the median seconds of a step, after warm-up; a GPU is timed over several steps at once."""
    import torch

    warm, rounds, together = (3, 3, args.steps) if torch.cuda.is_available() else (1, args.steps, 1)
    for _ in range(warm):
        step()
    seconds = []
    for _ in range(rounds):
        since = now()
        for _ in range(together):
            step()
        seconds.append((now() - since) / together)
    return statistics.median(seconds)


def measure(args: argparse.Namespace) -> Figures:
    """Measure the speed and memory of one arm in this process."""
    import torch

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    ids = torch.randint(0, VOCAB_SIZE, (args.batch, args.context + 1), device=device)
    ids[:, 1::3] = ids[:, ::3][:, : ids[:, 1::3].size(1)]  # some repetition
    model = build_model(args, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = mean_loss(args, model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    tokens = args.batch * args.context / median_step_time(args, step)
    figures = {"tokens/s": tokens, "peak memory, GB": peak_gb()}
    if device == "cuda":  # peak rates are known only for GPUs
        width, blocks, _ = SIZES[args.size]
        flops = training_flops(blocks, width, VOCAB_SIZE, args.context)
        figures["MFU"] = flops * tokens / peak_flops(torch.device(device), dtype)
    return figures


def main() -> None:
    """Measure all arms in alternation and print medians and ratios."""
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
