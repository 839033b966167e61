"""Training speed and memory of GPT-2 small's shape on SST-5: this library and transformers' Trainer.

    python benchmarks/speed.py --train_file F --tokenizer FOLDER [--method full|lora] [--precision bf16|fp32]

Three arms take turns, each in a process of its own: ours, Trainer as it comes (rows in random order), and Trainer with
rows grouped by length. All train one epoch on the same rows, from the same random weights, with fused AdamW and
clipping. ``lora`` trains adapters of rank 8 beside c_attn and c_fc, Trainer's made by peft.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ARMS = ("ours", "transformers, default", "transformers, grouped by length")
COLUMNS = ("sentence", "sentiment")
ADAPTER: dict[str, Any] = {"rank": 8, "alpha": 16, "dropout": 0.1, "targets": ["c_attn", "c_fc"]}


def subset(file: str, n: int) -> list[dict[str, str]]:
    """The same n random rows for every arm."""
    with open(file, encoding="utf-8", newline="") as lines:
        rows = [{column: row[column] for column in COLUMNS} for row in csv.DictReader(lines, delimiter="\t")]
    return random.Random(0).sample(rows, n)


def ours(args: argparse.Namespace, folder: str) -> float:
    """Seconds of the training epoch."""
    import torch
    from lightning.pytorch import Callback, Trainer, seed_everything

    from callbacks import Reproducibility
    from datamodules import SST5
    from gpt2_pl.surgery import LoRA
    from gpt2_pl.tasks import SentimentClassifier

    class Clock(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    seed_everything(0, verbose=False)
    file = Path(folder) / "rows.csv"
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, delimiter="\t")
        writer.writeheader()
        writer.writerows(subset(args.train_file, args.steps * args.batch_size))
    data = SST5(train_file=str(file), val_file=str(file), tokenizer=args.tokenizer, batch_size=args.batch_size)
    model = SentimentClassifier(
        base=args.base,
        num_classes=5,
        head_dropout=0.0,
        surgery=[LoRA(**ADAPTER)] if args.method == "lora" else None,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-5, fused=True),
    )
    clock = Clock()
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed" if args.precision == "bf16" else "32-true",
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Reproducibility(), clock],
    ).fit(model, data)
    return clock.seconds


def theirs(args: argparse.Namespace, folder: str, grouped: bool) -> float:
    """Seconds of the training epoch."""
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
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    set_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(args.tokenizer), pad_token=END_OF_TEXT)
    rows = [
        {**tokenizer(f"Review: {row['sentence'].strip()} Sentiment:"), "labels": int(row["sentiment"])}
        for row in subset(args.train_file, args.steps * args.batch_size)
    ]
    model = GPT2ForSequenceClassification.from_pretrained(args.base, num_labels=5, pad_token_id=tokenizer.pad_token_id)
    if args.method == "lora":
        from peft import LoraConfig, get_peft_model

        settings = {"r": ADAPTER["rank"], "lora_alpha": ADAPTER["alpha"], "lora_dropout": ADAPTER["dropout"]}
        model = get_peft_model(
            model, LoraConfig(**settings, target_modules=ADAPTER["targets"], fan_in_fan_out=True, task_type="SEQ_CLS")
        )
    clock = Clock()
    Trainer(
        model,
        TrainingArguments(
            folder,
            learning_rate=2e-5,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=1,
            bf16=args.precision == "bf16",
            train_sampling_strategy="group_by_length" if grouped else "random",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[clock],
    ).train()
    return clock.seconds


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One arm in this process: examples per second of training, and the most memory the process held, in GB."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = ours(args, folder) if args.arm == ARMS[0] else theirs(args, folder, args.arm == ARMS[2])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return {"examples_per_second": args.steps * args.batch_size / seconds, "peak_gb": peak}


def main() -> None:
    """All arms in turn, medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--method", choices=["full", "lora"], default="full")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", default="speed.json")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args)))
        return
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as base:
        code = f"from gpt2_pl import GPT2, GPT2Config; GPT2(GPT2Config()).save_pretrained({base!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
        for arm in ARMS * args.rounds:
            command = [sys.executable, *sys.argv, "--base", base, "--arm", arm]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[arm].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(arm, results[arm][-1], flush=True)
            Path(args.out).write_text(json.dumps({"settings": vars(args), **results}, indent=2))
    for arm in ARMS[1:]:
        pairs = list(zip(results[ARMS[0]], results[arm], strict=True))
        for key in pairs[0][0]:
            ratio = statistics.median(a[key] / b[key] for a, b in pairs)
            print(f"ours / {arm}: {key} {ratio:.2f}")


if __name__ == "__main__":
    main()
