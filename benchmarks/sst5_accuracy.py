"""SST-5 full fine-tuning: this library's run and transformers' Trainer, same base, template, rate, batch and epochs.

    python benchmarks/sst5_accuracy.py --base FOLDER --train_file F --val_file F --out results.json

Runs the two in turn for every seed and writes dev accuracy and macro F1 of the best epoch and of the last one.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

TEMPLATE = "Review: {sentence} Sentiment:"


def ours(args: argparse.Namespace, seed: int) -> list[dict[str, float]]:
    """Dev scores after each epoch, from metrics.json of a run of the command line's own classes."""
    from lightning.pytorch import Trainer, seed_everything

    from callbacks import Reproducibility, RunSummary
    from datamodules import SST5
    from gpt2_pl.optim import Linear
    from gpt2_pl.tasks import SentimentClassifier

    seed_everything(seed)
    data = SST5(train_file=args.train_file, val_file=args.val_file, tokenizer=args.base, batch_size=args.batch_size)
    model = SentimentClassifier(
        base=args.base,
        num_classes=data.num_classes,
        dropout=args.dropout,
        head_dropout=0.0,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.01, fused=True),
        schedule=Linear(warmup=args.warmup),
    )
    summary = RunSummary()
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=tempfile.mkdtemp(),
        callbacks=[Reproducibility(), summary],
    )
    trainer.fit(model, data)
    return [{"accuracy": e["val/accuracy"], "macro_f1": e["val/macro_f1"]} for e in summary.epochs]


def theirs(args: argparse.Namespace, seed: int) -> list[dict[str, float]]:
    """Dev scores after each epoch, from GPT2ForSequenceClassification under Trainer, grouped by length."""
    import numpy as np
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
    from transformers import (
        AutoTokenizer,
        DataCollatorWithPadding,
        GPT2ForSequenceClassification,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    tokenizer.pad_token = tokenizer.eos_token
    p = args.dropout
    model = GPT2ForSequenceClassification.from_pretrained(
        args.base, num_labels=5, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p, pad_token_id=tokenizer.pad_token_id
    )

    def rows(file: str) -> list[dict[str, Any]]:
        with open(file, encoding="utf-8", newline="") as lines:
            return [
                {**tokenizer(TEMPLATE.format(sentence=row["sentence"].strip())), "labels": int(row["sentiment"])}
                for row in csv.DictReader(lines, delimiter="\t")
            ]

    def scores(prediction: Any) -> dict[str, float]:
        said = torch.from_numpy(np.argmax(prediction.predictions, -1))
        truth = torch.from_numpy(prediction.label_ids)
        return {
            "accuracy": multiclass_accuracy(said, truth, 5, average="micro").item(),
            "macro_f1": multiclass_f1_score(said, truth, 5, average="macro").item(),
        }

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                learning_rate=args.lr,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=64,
                num_train_epochs=args.epochs,
                warmup_steps=args.warmup,
                weight_decay=0.01,
                train_sampling_strategy="group_by_length",
                eval_strategy="epoch",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
                use_cpu=True,
            ),
            train_dataset=rows(args.train_file),
            eval_dataset=rows(args.val_file),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=scores,
        )
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    return [{"accuracy": e["eval_accuracy"], "macro_f1": e["eval_macro_f1"]} for e in history]


def main() -> None:
    """Run both for every seed, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--val_file", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--warmup", type=int, default=40, help="steps")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--out", default="sst5_accuracy.json")
    args = parser.parse_args()
    results: dict[str, list[Any]] = {"ours": [], "transformers": []}
    for seed in args.seeds:
        for name, run in (("ours", ours), ("transformers", theirs)):
            results[name].append({"seed": seed, "epochs": run(args, seed)})
            print(name, results[name][-1], flush=True)
            Path(args.out).write_text(json.dumps({"settings": vars(args), **results}, indent=2))
    for name, runs in results.items():
        for score in ("accuracy", "macro_f1"):
            last = [run["epochs"][-1][score] for run in runs]
            spread = statistics.stdev(last) if len(last) > 1 else 0.0
            print(f"{name:12} {score:9} after the last epoch: mean {statistics.mean(last):.4f}, sd {spread:.4f}")


if __name__ == "__main__":
    main()
