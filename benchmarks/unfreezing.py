"""Training step with only the head, the top 3, the top 6 or all blocks trained, in alternation; GPT-2 small, bf16.

python benchmarks/unfreezing.py [--tokens 32] [--batch 64] [--record]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Figures, arguments, compare, now, turns_here

from gpt2_pl import GPT2Config
from gpt2_pl.callbacks import GradualUnfreezing
from gpt2_pl.kernels.malloc import disable_malloc_trim
from gpt2_pl.tasks import SentimentClassifier


def main() -> None:
    """Measure all stages and print medians and ratios."""
    parser = arguments(__doc__, [])
    parser.add_argument("--steps", type=int, default=4, help="steps per stage and round")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = SentimentClassifier(config=GPT2Config(), num_classes=5)
    disable_malloc_trim()  # as callbacks.Environment does
    task.configure_model()
    task.to(device)
    layers = task.layer_groups()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(50257, (args.batch, args.tokens), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "row": torch.arange(args.batch, device=device)}
    labels = torch.randint(5, (args.batch,), device=device)
    blocks = [f"block.{i}" for i in range(12)]
    top = {"head": 0, "top 3 blocks": 3, "top 6 blocks": 6, "all": 12}
    stages = {name: {"ln_f", "head", *(blocks[-n:] if n else []), *(["embeddings"] if n == 12 else [])}
              for name, n in top.items()}  # fmt: skip
    assert set(GradualUnfreezing().stage_layers(list(layers))[0]) == stages["head"]

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            F.cross_entropy(task(batch)[0].float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def timed(training: set[str]) -> Callable[[], Figures]:
        def measure() -> Figures:
            for layer, parameters in layers.items():
                for _, parameter in parameters:
                    parameter.requires_grad_(layer in training)
            step()
            seconds = []
            for _ in range(args.steps):
                since = now()
                step()
                seconds.append(now() - since)
            return {"seconds a step": statistics.median(seconds)}

        return measure

    found = turns_here({name: timed(training) for name, training in stages.items()}, args.rounds)
    compare(
        f"gradual unfreezing, the head's stage, {args.batch} rows of {args.tokens} tokens, bf16", found, args.record
    )


if __name__ == "__main__":
    main()
