"""Training speed and memory of GPT-2 small's shape on real rows: this library and transformers' Trainer.

    python benchmarks/speed.py --task sst5|quora --train_file F --tokenizer FOLDER [--method full|lora|probe] [--record]

The arms, measured in alternation, are this library, Trainer with default settings (rows in random order), Trainer with
rows grouped by length and, for full fine-tuning, only the matrix products of this library's batches, with weights in
PyTorch's layout. Each arm trains on batches of its own plan for the whole file, sampled evenly from the shortest to the
longest, so that the share of padding is that of an epoch (this library batches the sampled rows again). Tokens are
counted without padding. All arms start from the same random weights, use fused AdamW and gradient clipping, and train
one untimed epoch first, because in nearly all steps of a real run memory has already been allocated. ``lora`` trains
adapters of rank 8 on c_attn and c_fc, with peft in Trainer. ``probe`` trains only the head for six epochs; all of them
are timed, including this library's computation of the features.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Figures, arguments, compare, now, peak_gb, take_turns

OURS, DEFAULT, GROUPED, PRODUCTS = "ours", "Trainer", "Trainer, grouped by length", "its matrix products alone"
COLUMNS = {"sst5": ("sentence", "sentiment"), "quora": ("sentence1", "sentence2", "is_duplicate")}
CLASSES = {"sst5": 5, "quora": 2}
ADAPTER: dict[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.1, "targets": ["c_attn", "c_fc"]}


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Return the rows of every arm, batch after batch, with their numbers of tokens."""
    import numpy as np
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    from gpt2_pl.datamodules import SST5, QuoraPairs
    from gpt2_pl.datamodules.batching import training_batches
    from gpt2_pl.text.tokenizer import load_tokenizer

    with open(args.train_file, encoding="utf-8", newline="") as lines:
        rows = [{name: row[name] for name in COLUMNS[args.task]} for row in csv.DictReader(lines, delimiter="\t")]
    template = (SST5 if args.task == "sst5" else QuoraPairs)(train_file=args.train_file, tokenizer="").template
    texts = [template.fill(row) for row in rows]
    lengths = np.array([len(found) for found in load_tokenizer(args.tokenizer).encode_batch(texts)])
    size = args.batch_size
    orders = {
        OURS: np.concatenate([rows for rows in training_batches(lengths, size, seed=0, epoch=0) if len(rows) == size]),
        DEFAULT: np.random.default_rng(0).permutation(len(rows)),
        GROUPED: np.array(
            get_length_grouped_indices(lengths.tolist(), size, generator=torch.Generator().manual_seed(0))
        ),
    }
    chosen = {}
    for arm, order in orders.items():
        batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        batches.sort(key=lambda batch: lengths[batch].sum())
        drawn = [batches[int((i + 0.5) * len(batches) / args.steps)] for i in range(args.steps)]
        drawn = [drawn[i] for i in np.random.default_rng(1).permutation(args.steps)]
        chosen[arm] = np.concatenate(drawn).tolist()
    return {
        arm: [{"text": texts[i], "tokens": int(lengths[i]), **rows[i]} for i in indices]
        for arm, indices in chosen.items()
    }


def datamodule(args: argparse.Namespace, rows: list[dict[str, Any]], folder: str) -> Any:
    """Create this library's datamodule of the rows, with files in ``folder``."""
    from gpt2_pl.datamodules import SST5, QuoraPairs

    files = {"train": Path(folder) / "train.csv", "val": Path(folder) / "val.csv"}
    for split, file in files.items():
        with file.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, COLUMNS[args.task], delimiter="\t", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows if split == "train" else rows[:2])
    make = SST5 if args.task == "sst5" else QuoraPairs
    return make(
        train_file=str(files["train"]),
        val_file=str(files["val"]),
        tokenizer=args.tokenizer,
        batch_size=args.batch_size,
    )


def ours(args: argparse.Namespace, rows: list[dict[str, Any]], folder: str) -> tuple[int, float]:
    """Train with this library and return the number of tokens and the seconds."""
    import torch
    from lightning.pytorch import Callback, Trainer, seed_everything

    from gpt2_pl.callbacks import Reproducibility
    from gpt2_pl.surgery import LoRA
    from gpt2_pl.tasks import ParaphraseDetector, SentimentClassifier

    class Clock(Callback):
        tokens = 0

        def on_fit_start(self, *_: Any) -> None:  # before the features of a probe are computed
            self.start = now()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.tokens += int(batch["attention_mask"].sum())

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.end = now()
            if args.method != "probe" and trainer.current_epoch == 0:
                self.start, self.tokens = self.end, 0

    seed_everything(0, verbose=False)
    model = (SentimentClassifier if args.task == "sst5" else ParaphraseDetector)(
        base=args.base,
        num_classes=CLASSES[args.task],
        head_dropout=0.0,
        surgery=[LoRA(**ADAPTER)] if args.method == "lora" else None,
        train_base=False if args.method == "probe" else None,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-5, weight_decay=0.01, fused=True),
        compile=args.compile,
    )
    clock = Clock()
    Trainer(
        max_epochs=args.epochs,
        accelerator="auto",
        precision="bf16-mixed" if args.precision == "bf16" else "32-true",
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Reproducibility(), clock],
    ).fit(model, datamodule(args, rows, folder))
    return clock.tokens, clock.end - clock.start


def theirs(args: argparse.Namespace, rows: list[dict[str, Any]], folder: str) -> tuple[int, float]:
    """Train with transformers' Trainer and return the number of tokens and the seconds."""
    import torch
    from transformers import (
        DataCollatorWithPadding,
        GPT2ForSequenceClassification,
        GPT2TokenizerFast,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = now()

        def on_epoch_end(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            self.end = now()
            if args.method != "probe" and state.global_step == args.steps:
                self.start = self.end

    set_seed(0)
    tokenizer = GPT2TokenizerFast.from_pretrained(args.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    label = COLUMNS[args.task][-1]
    model = GPT2ForSequenceClassification.from_pretrained(
        args.base, num_labels=CLASSES[args.task], pad_token_id=tokenizer.pad_token_id
    )
    if args.method == "lora":
        from peft import LoraConfig, get_peft_model

        settings = {"r": ADAPTER["rank"], "lora_alpha": ADAPTER["alpha"], "lora_dropout": ADAPTER["dropout"]}
        model = get_peft_model(
            model, LoraConfig(**settings, target_modules=ADAPTER["targets"], fan_in_fan_out=True, task_type="SEQ_CLS")
        )
    if args.method == "probe":
        model.transformer.requires_grad_(False)
    clock = Clock()
    Trainer(
        model,
        TrainingArguments(
            folder,
            learning_rate=2e-5,
            weight_decay=0.01,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            bf16=args.precision == "bf16",
            torch_compile=args.compile,
            train_sampling_strategy="sequential",  # the plan's order
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=[{**tokenizer(row["text"]), "labels": int(row[label])} for row in rows],
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[clock],
    ).train()
    timed = args.epochs if args.method == "probe" else 1
    return timed * sum(row["tokens"] for row in rows), clock.end - clock.start


def products(args: argparse.Namespace, rows: list[dict[str, Any]], folder: str) -> tuple[int, float]:
    """Return the number of tokens, and the seconds of the matrix products of training on them, forward and backward."""
    import torch

    from gpt2_pl import GPT2Config
    from gpt2_pl.kernels.malloc import disable_malloc_trim

    disable_malloc_trim()
    config, dtype = GPT2Config(), torch.bfloat16 if args.precision == "bf16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    C, H, L = config.n_embd, config.n_head, config.n_layer
    layer_shapes = ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C))
    weights = [[torch.randn(shape, device=device, dtype=dtype) for shape in layer_shapes] for _ in range(L)]
    data = datamodule(args, rows, folder)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    loader.set_epoch(1)  # the epoch that is timed
    masks = [batch["attention_mask"] for batch in loader]

    def train(B: int, T: int) -> float:
        def new(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        inputs = {(n, w): new(n, w) for n in (B * T, B) for w in (C, 4 * C)}
        outputs = {(n, w): new(n, w) for n in (B * T, B) for w in (3 * C, C, 4 * C)}
        heads, weights_of = new(B * H, T, C // H), {Q: new(B * H, Q, T) for Q in (T, 1)}
        since = now()
        for i, layers in enumerate(weights):
            last = i == L - 1  # outputs are computed only at the one position per row that the head reads
            for layer, weight in enumerate(layers):
                n = B if last and layer > 0 else B * T
                x, gradient = inputs[n, weight.size(1)], outputs[n, weight.size(0)]
                x @ weight.T, gradient @ weight, gradient.T @ x
            queries, scores = (heads[:, :1], weights_of[1]) if last else (heads, weights_of[T])
            for _ in range(2):  # q k^T and its gradients, and weights v and its gradients
                queries @ heads.transpose(1, 2), scores @ heads, scores.transpose(1, 2) @ queries
        return now() - since

    for _ in range(2):  # the first pass warms up
        seconds = sum(train(*mask.shape) for mask in masks)
    return sum(int(mask.sum()) for mask in masks), seconds


def measure(args: argparse.Namespace) -> Figures:
    """Measure one arm in this process: tokens per second of training, and peak memory."""
    rows = json.loads(Path(args.plan).read_text(encoding="utf-8"))[OURS if args.arm == PRODUCTS else args.arm]
    run = {OURS: ours, PRODUCTS: products}.get(args.arm, theirs)
    with tempfile.TemporaryDirectory() as folder:
        tokens, seconds = run(args, rows, folder)
    figures = {"tokens of text/s": tokens / seconds}
    return figures if args.arm == PRODUCTS else {**figures, "peak memory, GB": peak_gb()}


def main() -> None:
    """Measure all arms in alternation and print medians and ratios."""
    parser = arguments(__doc__, [OURS, DEFAULT, GROUPED, PRODUCTS])
    parser.add_argument("--task", choices=list(COLUMNS), default="sst5")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--method", choices=["full", "lora", "probe"], default="full")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--compile", action="store_true", help="compile the models")
    parser.add_argument("--steps", type=int, default=6, help="of an epoch")
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    args.epochs = 6 if args.method == "probe" else 2
    if args.arm:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base, rows = f"{folder}/base", Path(folder) / "plan.json"
        code = f"from gpt2_pl import GPT2, GPT2Config; GPT2(GPT2Config()).save_pretrained({base!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
        rows.write_text(json.dumps(plan(args)), encoding="utf-8")
        arms = [OURS, DEFAULT, GROUPED] + ([PRODUCTS] if args.method == "full" else [])
        found = take_turns(arms, args.rounds, ["--base", base, "--plan", str(rows)])
    task = {"sst5": "SST-5", "quora": "Quora pairs"}[args.task]
    method = {"full": "full fine-tuning", "lora": "LoRA", "probe": f"linear probe, {args.epochs} epochs"}[args.method]
    compiled = ", compiled" if args.compile else ""
    compare(
        f"{task}, {method}, {args.steps} batches of {args.batch_size}, {args.precision}{compiled}", found, args.record
    )


if __name__ == "__main__":
    main()
