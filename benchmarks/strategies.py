"""Parameters, time and memory of a training step under strategies that adapt GPT-2.

    python benchmarks/strategies.py [--strategies lora ia3 ...] [--memory] [--record]

An arm is the surgery of a file in configs/strategy on a classifier with GPT-2 small's shape and random weights, which
trains on one random batch, bf16, with fused AdamW. Times are measured in alternation in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Figures, arguments, compare, now, peak_gb, take_turns, turns_here

CONFIGS = Path(__file__).parents[1] / "configs" / "strategy"
DEFAULT = (
    "lora",
    "pissa",
    "ia3",
    "bitfit",
    "layernorm",
    "adapter_houlsby",
    "adapter_pfeiffer",
    "prefix_tuning",
    "full",
)


def settings(strategy: str) -> dict[str, Any]:
    """Return surgery and train_base of a file in configs/strategy."""
    import yaml

    content = yaml.safe_load((CONFIGS / f"{strategy}.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    return {"surgery": content.get("surgery+"), "train_base": content.get("train_base")}


def trainer(strategy: str, args: argparse.Namespace) -> tuple[Any, Callable[[], float]]:
    """Return a classifier under a strategy, and a function that trains one step and returns its seconds.

    On a CPU the seconds are those of the processor, so that other load on the machine matters less.
    """
    import torch
    import torch.nn.functional as F

    from gpt2_pl.tasks import SentimentClassifier

    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = now if device == "cuda" else time.process_time
    torch.manual_seed(0)
    task = SentimentClassifier(base=args.base, num_classes=5, **settings(strategy))
    task.configure_model()
    task.to(device).train()
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    ids = torch.randint(50257, (args.batch, args.tokens), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "row": torch.arange(args.batch, device=device)}
    labels = torch.randint(5, (args.batch,), device=device)

    def step() -> float:
        since = clock()
        with torch.autocast(device, torch.bfloat16):
            F.cross_entropy(task(batch)[0].float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return clock() - since

    step()
    return task, step


def main() -> None:
    """Measure all strategies in alternation and print medians and ratios to the first."""
    names = [path.stem for path in CONFIGS.glob("*.yaml")]
    parser = arguments(__doc__, names)
    parser.add_argument("--strategies", nargs="+", choices=names, default=list(DEFAULT), help="the first is the peer")
    parser.add_argument("--steps", type=int, default=4, help="steps per strategy and round")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--memory", action="store_true", help="measure memory instead, in a process for each strategy")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        _, step = trainer(args.arm, args)
        step()
        print(json.dumps({"peak memory, GB": peak_gb()}))
        return
    from gpt2_pl import GPT2, GPT2Config
    from gpt2_pl.kernels.malloc import disable_malloc_trim

    disable_malloc_trim()  # as callbacks.Environment does
    with tempfile.TemporaryDirectory() as args.base:
        GPT2(GPT2Config()).save_pretrained(args.base)
        if args.memory:
            found = take_turns(args.strategies, args.rounds, ["--base", args.base])
        else:
            built = {strategy: trainer(strategy, args) for strategy in args.strategies}
            for strategy, (task, _) in built.items():
                print(strategy, sum(p.numel() for p in task.backbone.parameters() if p.requires_grad), "trained")
            found = turns_here({name: timed(step, args.steps) for name, (_, step) in built.items()}, args.rounds)
    work = f"strategies, {args.strategies[0]}, {args.batch} rows of {args.tokens} tokens, bf16"
    compare(work, found, args.record)


def timed(step: Callable[[], float], steps: int) -> Callable[[], Figures]:
    """Return a function that measures some steps."""
    return lambda: {"seconds a step": statistics.median(step() for _ in range(steps))}


if __name__ == "__main__":
    main()
