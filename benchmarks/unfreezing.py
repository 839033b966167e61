"""Seconds per training step by what trains: head alone, top 3, top 6, all blocks. GPT-2 small's shape, in turn.

python benchmarks/unfreezing.py [--rounds 3] [--tokens 32] [--batch 16]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from callbacks import GradualUnfreezing
from gpt2_pl import GPT2Config
from gpt2_pl.tasks import SentimentClassifier


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps per stage and round")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    torch.manual_seed(0)
    task = SentimentClassifier(config=GPT2Config(), num_classes=5)
    task.configure_model()
    layers = task.layer_groups()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(50257, (given.batch, given.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "row": torch.arange(given.batch)}
    labels = torch.randint(5, (given.batch,))
    blocks = [f"block.{i}" for i in range(12)]
    top = {"head": 0, "top 3": 3, "top 6": 6, "all": 12}
    stages = {name: {"ln_f", "head", *(blocks[-n:] if n else []), *(["embeddings"] if n == 12 else [])}
              for name, n in top.items()}  # fmt: skip
    assert GradualUnfreezing().stage_layers(list(layers))[0] == ["ln_f", "head"]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(task(batch)[0].float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(given.rounds):
        for name, training in stages.items():
            for layer, parameters in layers.items():
                for _, parameter in parameters:
                    parameter.requires_grad_(layer in training)
            step()
            for _ in range(given.steps):
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
    whole = statistics.median(seconds["all"])
    print(f"{'trains':8} {'s/step':>7} {'of all':>7}")
    for name, times in seconds.items():
        print(f"{name:8} {statistics.median(times):7.3f} {statistics.median(times) / whole:7.2f}")


if __name__ == "__main__":
    main()
