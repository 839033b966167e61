"""Generation: new tokens per second beside transformers', in turn within one run.

    python benchmarks/generation.py [--batch 12] [--prompt 40] [--new 128] [--rounds 3]

GPT-2 small's shape with random weights, top-p 0.9, in float32 and bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import GPT2LMHeadModel

from gpt2_pl import GPT2, GPT2Config, generate


def main() -> None:
    """Measure both and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=40)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (getattr(torch, name) for name in args.dtypes):
        ours = GPT2(GPT2Config()).eval()
        with tempfile.TemporaryDirectory() as folder:
            ours.save_pretrained(folder)
            theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
        ours, theirs = ours.to(device, dtype), theirs.to(device, dtype)
        if args.compile:
            for block in ours.h:
                block.compile(dynamic=True)
        ids = torch.randint(0, 50257, (args.batch, args.prompt), device=device)
        mask = torch.ones_like(ids)

        def run_ours(n: int, model: GPT2 = ours, ids: torch.Tensor = ids) -> None:
            generate(model, ids, max_new_tokens=n, top_p=0.9, seed=0)

        def run_theirs(
            n: int, model: GPT2LMHeadModel = theirs, ids: torch.Tensor = ids, mask: torch.Tensor = mask
        ) -> None:
            settings = {"do_sample": True, "top_p": 0.9, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
            model.generate(ids, attention_mask=mask, max_new_tokens=n, **settings)

        runs: dict[str, Callable[[int], None]] = {"ours": run_ours, "transformers": run_theirs}
        for run in runs.values():
            run(4)  # warm up
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                since = time.perf_counter()
                run(args.new)
                rates[name].append(args.batch * args.new / (time.perf_counter() - since))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        print(
            f"{dtype}: "
            + ", ".join(
                f"{name} {rate:.0f} new tokens/s {[round(r) for r in rates[name]]}" for name, rate in medians.items()
            )
            + f", ratio {medians['ours'] / medians['transformers']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
