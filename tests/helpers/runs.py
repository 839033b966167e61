"""Folders of runs as training leaves them."""

import csv
import json

import numpy as np
import yaml


def fake_run(
    folder, strategy, seed, right, lr=1e-3, status="finished", base="abc", rows=None, configs=True, text="a, b"
):
    """A run's folder as training leaves it, with these outcomes."""
    folder.mkdir(parents=True)
    score = float(np.mean(right))
    account = {
        "status": status, "task": "ParaphraseDetector", "monitor": "val/accuracy", "seed": seed,
        "configs": ["configs/task/quora.yaml", f"configs/strategy/{strategy}.yaml"] if configs else [],
        "scores": {"val/accuracy": score, "val/loss": 1 - score, "best_epoch": 2},
        "epochs": [{"epoch": n, "val/accuracy": score - 0.1 * (2 - n), "val/loss": 1 - score} for n in (1, 2, 3)],
        "parameters": {"trainable": 1000, "total": 2000}, "seconds": 90.0, "examples_per_second": 50.0 + seed,
        "peak_memory_bytes": 10**9, "checkpoint_bytes": 4 * 10**6, "base": {"path": "x", "digest": base},
        "data": {"files": {"train": ["/a/b/train.csv"], "val": f"/{seed}/dev.csv"}, "labels": ["no", "yes"],
                 "rows": rows or {"train": 100, "val": len(right)}},
    }  # fmt: skip
    settings = {
        "seed_everything": seed,
        "name": f"{strategy}-{seed}",
        "model": {"class_path": "T", "init_args": {"optimizer": {"init_args": {"lr": lr}}, "base": f"/{seed}/base"}},
        "data": {"init_args": {"val_file": f"/{seed}/dev.csv", "batch_size": 8}},
        "trainer": {"max_epochs": 3, "logger": seed == 1},
    }
    (folder / "metrics.json").write_text(json.dumps(account))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with (folder / "predictions_val.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["row", "text", "label", "prediction", "p(no)", "p(yes)"])
        table.writerows([i, f"{text}\n{i}", "yes", "yes" if good else "no", 0.5, 0.5] for i, good in enumerate(right))
    return folder
