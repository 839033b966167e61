"""Generation speed compared with transformers, in alternation within one process.

    python benchmarks/generation.py [--batch 12] [--prompt 40] [--new 128] [--dtype bfloat16] [--record]

GPT-2 small's shape with random weights, top-p 0.9. gpu.py measures compiled generation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from harness import Figures, arguments, compare, now, turns_here
from transformers import GPT2LMHeadModel

from gpt2_pl import GPT2, GPT2Config, generate


def main() -> None:
    """Measure both and print medians and their ratio."""
    parser = arguments(__doc__, [])
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=40)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = GPT2(GPT2Config()).eval()
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    ours, theirs = (model.to(device, getattr(torch, args.dtype)) for model in (ours, theirs))
    ids = torch.randint(0, 50257, (args.batch, args.prompt), device=device)
    mask = torch.ones_like(ids)

    def run_ours(n: int) -> None:
        generate(ours, ids, max_new_tokens=n, top_p=0.9, seed=0)

    def run_theirs(n: int) -> None:
        settings = {"do_sample": True, "top_p": 0.9, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
        theirs.generate(ids, attention_mask=mask, max_new_tokens=n, **settings)

    def timed(run: Callable[[int], None]) -> Callable[[], Figures]:
        def measure() -> Figures:
            since = now()
            run(args.new)
            return {"new tokens/s": args.batch * args.new / (now() - since)}

        run(args.new if device == "cuda" else 4)  # to warm up
        return measure

    found = turns_here({"ours": timed(run_ours), "transformers": timed(run_theirs)}, args.rounds)
    work = f"generation, {args.batch} prompts of {args.prompt}, {args.new} new, {args.dtype}"
    compare(work, found, args.record)


if __name__ == "__main__":
    main()
