"""A training step of a language model: time and peak memory, plain, with unlikelihood, and transformers' own.

    python benchmarks/language_model.py [--batch 8] [--context 256] [--rounds 3] [--precision bf16|fp32]

GPT-2 small's shape and vocabulary, random tokens, AdamW. Each measurement is a process of its own, in turn; memory is
that process's peak (without a GPU) less what it had before the first step, and as a whole.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

NAMES = ("plain", "unlikelihood", "transformers")


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step and memory of one way to make it, in this process."""
    import torch

    from gpt2_pl import GPT2, GPT2Config
    from gpt2_pl.losses import cross_entropy, language_model_loss

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = GPT2Config(dropout=0.0)
    ids = torch.randint(0, config.vocab_size, (args.batch, args.context + 1), device=device)
    ids[:, 1::3] = ids[:, ::3][:, : ids[:, 1::3].size(1)]  # some repetition
    model: Any
    if name == "transformers":
        from transformers import GPT2Config as TheirConfig
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel(TheirConfig(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).to(device).train()
    else:
        model = GPT2(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16"):
            if name == "transformers":
                loss = model(ids[:, :-1], labels=ids[:, :-1]).loss  # shifts by itself
            elif name == "plain":
                total, n = cross_entropy(model(ids[:, :-1]), model.head_weight, ids[:, 1:])
                loss = total / n
            else:
                total, n, _ = language_model_loss(model(ids[:, :-1]), model.head_weight, ids[:, 1:], 1.0)
                loss = total / n
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def memory() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)

    before = memory()
    seconds = []
    for _ in range(args.steps + 1):
        since = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - since)
    return {"seconds": statistics.median(seconds[1:]), "memory_GB": memory(), "step_memory_GB": memory() - before}


def main() -> None:
    """Measure all in turn, print medians and ratios to the plain step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for _ in range(args.rounds):
        for name in NAMES:
            command = [sys.executable, *sys.argv, "--only", name]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[name].append(json.loads(output.strip().splitlines()[-1]))
            print(name, found[name][-1], flush=True)
    for name in NAMES:
        for key in ("seconds", "memory_GB", "step_memory_GB"):
            ours, plain = (statistics.median(run[key] for run in found[who]) for who in (name, "plain"))
            print(f"{name:13} {key:15} {ours:7.3f}  {ours / plain:.2f} of plain")


if __name__ == "__main__":
    main()
