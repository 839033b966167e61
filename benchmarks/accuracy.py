"""Full fine-tuning with this library and with transformers' Trainer, with equal base, rows, template and settings.

    python benchmarks/accuracy.py --task sst5|quora --base FOLDER --train_file F [F] --val_file F --out results.json

Runs both for every seed with the same learning rate, batch size and epochs, writes dev accuracy and macro F1 of every
epoch, and prints those of the last one.
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

from gpt2_pl.datamodules import SST5, QuoraPairs, TextClassification


def data(args: argparse.Namespace) -> TextClassification:
    """Create the task's datamodule, which defines the template, the label column and the training rows."""
    make = SST5 if args.task == "sst5" else QuoraPairs
    return make(
        train_file=args.train_file,
        val_file=args.val_file,
        tokenizer=args.base,
        batch_size=args.batch_size,
        train_fraction=args.train_fraction,
    )


def ours(args: argparse.Namespace, seed: int) -> list[dict[str, float]]:
    """Train with this library and return the dev scores of every epoch."""
    from lightning.pytorch import Trainer, seed_everything

    from gpt2_pl.callbacks import Reproducibility, RunSummary
    from gpt2_pl.optim import LinearWithWarmup
    from gpt2_pl.tasks import ParaphraseDetector, SentimentClassifier

    seed_everything(seed)
    rows = data(args)
    model = (SentimentClassifier if args.task == "sst5" else ParaphraseDetector)(
        base=args.base,
        num_classes=rows.num_classes,
        dropout=args.dropout,
        head_dropout=0.0,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.01, fused=True),
        schedule=LinearWithWarmup(warmup=args.warmup),
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
    trainer.fit(model, rows)
    return [{"accuracy": e["val/accuracy"], "macro_f1": e["val/macro_f1"]} for e in summary.epochs]


def theirs(args: argparse.Namespace, seed: int) -> list[dict[str, float]]:
    """Train GPT2ForSequenceClassification with Trainer, rows grouped by length; return dev scores by epoch."""
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
    p, settings = args.dropout, data(args)
    model = GPT2ForSequenceClassification.from_pretrained(
        args.base,
        num_labels=settings.num_classes,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p,
        pad_token_id=tokenizer.pad_token_id,
    )

    def rows(files: list[str]) -> list[dict[str, Any]]:
        found = []
        for file in files:
            with open(file, encoding="utf-8", newline="") as lines:
                found += list(csv.DictReader(lines, delimiter="\t"))
        chosen = settings._split_indices("train", len(found)) if files == args.train_file else None
        texts = [{field: text.strip() for field, text in row.items() if field} for row in found]
        return [
            {**tokenizer(settings.template.text.format(**texts[i])), "labels": int(texts[i][settings.label_column])}
            for i in (range(len(found)) if chosen is None else chosen.tolist())
        ]

    def scores(prediction: Any) -> dict[str, float]:
        said = torch.from_numpy(np.argmax(prediction.predictions, -1))
        truth = torch.from_numpy(prediction.label_ids)
        return {
            "accuracy": multiclass_accuracy(said, truth, settings.num_classes, average="micro").item(),
            "macro_f1": multiclass_f1_score(said, truth, settings.num_classes, average="macro").item(),
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
            eval_dataset=rows([args.val_file]),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=scores,
        )
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    return [{"accuracy": e["eval_accuracy"], "macro_f1": e["eval_macro_f1"]} for e in history]


def main() -> None:
    """Train both for every seed, print and save the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["sst5", "quora"], default="sst5")
    parser.add_argument("--base", required=True)
    parser.add_argument("--train_file", nargs="+", required=True)
    parser.add_argument("--train_fraction", type=float, default=1.0)
    parser.add_argument("--val_file", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--warmup", type=int, default=40, help="steps")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--out", default="accuracy.json")
    args = parser.parse_args()
    results: dict[str, list[Any]] = {"ours": [], "transformers": []}
    for seed in args.seeds:
        for name, run in (("ours", ours), ("transformers", theirs)):
            results[name].append({"seed": seed, "epochs": run(args, seed)})
            print(name, results[name][-1], flush=True)
            Path(args.out).write_text(json.dumps({"settings": vars(args), **results}, indent=2), encoding="utf-8")
    for name, runs in results.items():
        for score in ("accuracy", "macro_f1"):
            last = [run["epochs"][-1][score] for run in runs]
            spread = statistics.stdev(last) if len(last) > 1 else 0.0
            print(f"{name:12} {score:9} after the last epoch: mean {statistics.mean(last):.4f}, sd {spread:.4f}")


if __name__ == "__main__":
    main()
