"""Run folders with predictions of rows."""

import csv
import json

import numpy as np
import yaml

CLASSES = ("low", "mid", "high")


def write_run(folder, record=None, data=None, task="SentimentClassifier"):
    """A run's folder without rows."""
    folder.mkdir(parents=True)
    account = {"status": "finished", "task": task, "monitor": "val/accuracy", "configs": ["strategy/lora"],
               **(record or {})}  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(account))
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "x", "data": {"init_args": data or {}}}))
    return folder


def write_rows(folder, split, n=60, seed=0, classes=CLASSES, texts=None, sharpness=4.0, shift=0):
    """Predictions of labels that depend on the text alone, so that all seeds have the same rows."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n, len(classes))) * sharpness
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    fixed = np.random.default_rng(n)
    labels = fixed.integers(len(classes), size=n)
    texts = texts or [" ".join(["film"] * k) + (" is not" if k % 3 else " is") for k in fixed.integers(1, 20, size=n)]
    with (folder / f"predictions_{split}.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["row", "text", "label", "prediction", *(f"p({name})" for name in classes)])
        for i in range(n):
            cells = [f"{value:.6f}" for value in p[i]]
            text = texts[i % len(texts)]
            table.writerow([i + 1 + shift, text, classes[labels[i]], classes[p[i].argmax()], *cells])
    return folder
