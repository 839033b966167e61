"""Training speed and memory of GPT-2 small's shape on real rows: this library and transformers' Trainer.

    python benchmarks/speed.py --task sst5|quora --train_file F --tokenizer FOLDER [--method full|lora|probe] [--record]

Arms take turns: ours, Trainer as it comes (rows in random order), Trainer with rows grouped by length, and, for full
fine-tuning, our batches' matrix products alone, which is as fast as this machine can be. All train on the same rows,
from the same random weights, with fused AdamW and clipping. ``lora`` trains adapters of rank 8 beside c_attn and c_fc,
Trainer's made by peft; ``probe`` trains the head alone for six epochs. Timed is training from its first epoch's begin
to its last one's end; with ``probe`` also what comes before, where this library computes the features.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from in_turn import Figures, arguments, compare, peak_gb, take_turns

OURS, DEFAULT, GROUPED, PRODUCTS = "ours", "Trainer", "Trainer, grouped by length", "its matrix products alone"
COLUMNS = {"sst5": ("sentence", "sentiment"), "quora": ("sentence1", "sentence2", "is_duplicate")}
CLASSES = {"sst5": 5, "quora": 2}
ADAPTER: dict[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.1, "targets": ["c_attn", "c_fc"]}


def subset(args: argparse.Namespace) -> list[dict[str, str]]:
    """The same random rows for every arm."""
    with open(args.train_file, encoding="utf-8", newline="") as lines:
        rows = [{name: row[name] for name in COLUMNS[args.task]} for row in csv.DictReader(lines, delimiter="\t")]
    return random.Random(0).sample(rows, args.steps * args.batch_size)


def data(args: argparse.Namespace, folder: str) -> Any:
    """Our datamodule of these rows."""
    from datamodules import SST5, QuoraPairs

    rows = subset(args)
    files = {"train": Path(folder) / "train.csv", "val": Path(folder) / "val.csv"}
    for split, file in files.items():
        with file.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, COLUMNS[args.task], delimiter="\t")
            writer.writeheader()
            writer.writerows(rows if split == "train" else rows[:2])
    make = SST5 if args.task == "sst5" else QuoraPairs
    return make(
        train_file=str(files["train"]),
        val_file=str(files["val"]),
        tokenizer=args.tokenizer,
        batch_size=args.batch_size,
    )


def ours(args: argparse.Namespace, folder: str) -> float:
    """Seconds of training."""
    import torch
    from lightning.pytorch import Callback, Trainer, seed_everything

    from callbacks import Reproducibility
    from gpt2_pl.surgery import LoRA
    from gpt2_pl.tasks import ParaphraseDetector, SentimentClassifier

    class Clock(Callback):
        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 0 and args.method != "probe":
                self.start = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.end = time.perf_counter()

    seed_everything(0, verbose=False)
    model = (SentimentClassifier if args.task == "sst5" else ParaphraseDetector)(
        base=args.base,
        num_classes=CLASSES[args.task],
        head_dropout=0.0,
        surgery=[LoRA(**ADAPTER)] if args.method == "lora" else None,
        train_base=False if args.method == "probe" else None,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-5, fused=True),
    )
    rows, clock = data(args, folder), Clock()
    clock.start = time.perf_counter()
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
    ).fit(model, rows)
    return clock.end - clock.start


def theirs(args: argparse.Namespace, folder: str, grouped: bool) -> float:
    """Seconds of training."""
    import torch
    from transformers import (
        DataCollatorWithPadding,
        GPT2ForSequenceClassification,
        PreTrainedTokenizerFast,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    from gpt2_pl.tokenizer import END_OF_TEXT, load_tokenizer

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.end = time.perf_counter()

    set_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(args.tokenizer), pad_token=END_OF_TEXT)
    template, label = data(args, folder).template, COLUMNS[args.task][-1]
    rows = [{**tokenizer(template.fill(row)), "labels": int(row[label])} for row in subset(args)]
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
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            bf16=args.precision == "bf16",
            train_sampling_strategy="group_by_length" if grouped else "random",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[clock],
    ).train()
    return clock.end - clock.start


def products(args: argparse.Namespace, folder: str) -> float:
    """Seconds of the matrix products of our epoch: those of every layer, forward and backward, in its shapes."""
    import torch

    from gpt2_pl import GPT2Config

    config, dtype = GPT2Config(), torch.bfloat16 if args.precision == "bf16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    C, H, L = config.n_embd, config.n_head, config.n_layer
    layer_shapes = ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C))
    weights = [[torch.randn(shape, device=device, dtype=dtype) for shape in layer_shapes] for _ in range(L)]
    rows = data(args, folder)
    rows.prepare_data()
    rows.setup("fit")
    shapes = [batch["input_ids"].shape for batch in rows.train_dataloader()]

    def train(B: int, T: int) -> None:
        new = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
        inputs = {(n, w): new(n, w) for n in (B * T, B) for w in (C, 4 * C)}
        outputs = {(n, w): new(n, w) for n in (B * T, B) for w in (3 * C, C, 4 * C)}
        heads, weights_of = new(B * H, T, C // H), {Q: new(B * H, Q, T) for Q in (T, 1)}
        since = time.perf_counter()
        for i, layers in enumerate(weights):
            last = i == L - 1  # whose outputs are computed where they are read, at one place a row
            for layer, weight in enumerate(layers):
                n = B if last and layer > 0 else B * T
                x, gradient = inputs[n, weight.size(1)], outputs[n, weight.size(0)]
                x @ weight.T, gradient @ weight, gradient.T @ x
            queries, scores = (heads[:, :1], weights_of[1]) if last else (heads, weights_of[T])
            for _ in range(2):  # q k^T and its gradients, and weights v and its gradients
                queries @ heads.transpose(1, 2), scores @ heads, scores.transpose(1, 2) @ queries
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - since)

    seconds: list[float] = []
    for B, T in [shapes[0], *shapes]:  # the first to warm up
        train(B, T)
    return sum(seconds[1:])


def measure(args: argparse.Namespace) -> Figures:
    """One arm in this process: examples per second of training, and the most memory the process held."""
    with tempfile.TemporaryDirectory() as folder:
        if args.arm == OURS:
            seconds = ours(args, folder)
        elif args.arm == PRODUCTS:
            seconds = products(args, folder)
        else:
            seconds = theirs(args, folder, args.arm == GROUPED)
    figures = {"examples/s": args.epochs * args.steps * args.batch_size / seconds}
    return figures if args.arm == PRODUCTS else {**figures, "peak memory, GB": peak_gb()}


def main() -> None:
    """All arms in turn, medians and ratios."""
    parser = arguments(__doc__, [OURS, DEFAULT, GROUPED, PRODUCTS])
    parser.add_argument("--task", choices=list(COLUMNS), default="sst5")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--method", choices=["full", "lora", "probe"], default="full")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--steps", type=int, default=8, help="of an epoch")
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    args.epochs = 6 if args.method == "probe" else 1
    if args.arm:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as base:
        code = f"from gpt2_pl import GPT2, GPT2Config; GPT2(GPT2Config()).save_pretrained({base!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
        arms = [OURS, DEFAULT, GROUPED] + ([PRODUCTS] if args.method == "full" else [])
        found = take_turns(arms, args.rounds, ["--base", base])
    task = {"sst5": "SST-5", "quora": "Quora pairs"}[args.task]
    method = {"full": "full fine-tuning", "lora": "LoRA", "probe": "linear probe, 6 epochs"}[args.method]
    compare(f"{task}, {method}, batch {args.batch_size}, {args.precision}", found, args.record)


if __name__ == "__main__":
    main()
