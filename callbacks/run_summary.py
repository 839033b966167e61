"""The record of a run: scores by epoch, cost and settings, in metrics.json and in tables."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.table import Table
from torch import Tensor

from gpt2_pl.callbacks.forgetting import Forgetting
from gpt2_pl.callbacks.hyperparameters import log_epoch, log_settings
from gpt2_pl.callbacks.non_finite_loss import NonFiniteLossGuard
from gpt2_pl.callbacks.run_folder import run_folder
from gpt2_pl.callbacks.throughput import Throughput
from gpt2_pl.callbacks.writers import goodness, log_text
from gpt2_pl.errors import RunError
from gpt2_pl.filesystem import atomic_write, hub_id
from gpt2_pl.pretrained import provenance
from gpt2_pl.tasks.protocols import LayeredModule
from gpt2_pl.utils.digests import code_digests
from gpt2_pl.utils.trainer import find_callbacks

Scores = dict[str, float]

_LAYER_COLUMNS = ["layer", "parameters", "trainable", "peak learning rate"]
PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "datasets", "tokenizers", "safetensors")


class RunSummary(Callback):
    """Collects the scores of a run and writes ``metrics.json`` to the run folder after every epoch and stage.

    The cost of the run is that of the :class:`~gpt2_pl.callbacks.Throughput` callback, if there is one. Loggers receive
    the settings when training starts, and the final scores after training and every evaluation.

    Args:
        files: the configuration files of the run.
        settings: the configuration of the run, as plain values; by default no settings are logged.

    Attributes:
        epochs: for every epoch its number from 1, its training scores and its best validation scores.
        scores: scores of evaluations after training.
        layers: what of every layer trained at the end of the last epoch; see :func:`layer_table`.
        has_trained: whether training has started in this process.
        expects_test: the run is finished only when its best checkpoint has been tested.
    """

    def __init__(self, files: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> None:
        self.files, self.settings = list(files), settings
        self.epochs: list[Scores] = []
        self.scores: Scores = {}
        self.layers: list[dict[str, Any]] = []
        self.expects_test = False
        self.has_trained = self._fitting = False
        self._val_metrics: Scores = {}  # of the current epoch
        self.software: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Determine whether a checkpoint will be loaded for training or for an evaluation, and which code runs."""
        self._fitting, self.has_trained = stage == "fit", False
        self.software = self.software or _software()

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """Return the scores so far."""
        return {"epochs": self.epochs, "val_metrics": self._val_metrics, "layers": self.layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the record of an interrupted run; an evaluation starts a new one."""
        if self._fitting:
            self.epochs = state_dict.get("epochs") or []
            self._val_metrics = state_dict.get("val_metrics") or {}
            self.layers = state_dict.get("layers") or []

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that training starts: every checkpoint has been restored."""
        self.has_trained = True
        self._log_settings(trainer, {})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch to the record."""
        scores = _of_split(trainer.callback_metrics, "train/")
        scores.pop("train/loss_step", None)
        epoch = trainer.current_epoch + 1
        if self.epochs and self.epochs[-1]["epoch"] == epoch:  # the run ended within this epoch, and was resumed
            self._keep_better(pl_module, _of_split(self.epochs.pop(), "val/"))
        self.epochs.append({"epoch": epoch, **scores, **self._val_metrics})
        self._val_metrics = {}
        self._log_layers(trainer, pl_module)
        if trainer.is_global_zero:
            log_epoch(trainer, self.epochs[-1], str(getattr(pl_module, "monitor", "val/loss")))
        self._write(trainer, pl_module, "running")

    def _log_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what of every layer trained in this epoch and at what rate, and log it when it has changed."""
        before, self.layers = self.layers, layer_table(trainer, pl_module)
        count = sum(layer["trainable"] for layer in self.layers)
        for logger in trainer.loggers:
            logger.log_metrics({"trainable_parameters": count}, step=trainer.global_step)
        if self.layers != before and trainer.is_global_zero:
            rows = [_LAYER_COLUMNS, ["---"] * 4, *_layer_rows(self.layers)]
            log_text(trainer, "layers", "\n".join(f"| {' | '.join(row)} |" for row in rows))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record of a training that has ended."""
        done = "trained" if self.expects_test else "finished"
        self._finish(trainer, pl_module, "interrupted" if trainer.interrupted else done)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record that training failed. Nothing is written if restoring a checkpoint failed."""
        if self._fitting and trainer.training and (self.has_trained or trainer.ckpt_path is None):
            stopped = isinstance(exception, KeyboardInterrupt | SIGTERMException)
            with suppress(RunError):  # a full disk, which the exception reports
                self._write(trainer, pl_module, "interrupted" if stopped else "failed")

    # Evaluation

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the scores of an epoch's validation; write those of the validate command."""
        if trainer.state.fn == "validate":
            self._write_evaluation(trainer, pl_module, "val/")
        elif not trainer.sanity_checking:
            self._keep_better(pl_module, _of_split(trainer.callback_metrics, "val/"))

    def _keep_better(self, pl_module: LightningModule, scores: Scores) -> None:
        """Keep the best validation of the epoch, the one that ``best.ckpt`` may hold."""
        if not self._val_metrics or _goodness(pl_module, scores) > _goodness(pl_module, self._val_metrics):
            self._val_metrics = scores

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the test scores."""
        self._write_evaluation(trainer, pl_module, "test/")

    def _write_evaluation(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        self.scores.update(_of_split(trainer.callback_metrics, split))
        is_last = split == "test/" or not self.expects_test
        self._finish(trainer, pl_module, "finished" if is_last else "trained")

    # Results

    def _finish(self, trainer: Trainer, pl_module: LightningModule, status: str) -> None:
        """Write the record and log the final scores."""
        self._write(trainer, pl_module, status)
        scores = self.final_scores(pl_module)
        self._log_settings(trainer, {name: value for name, value in scores.items() if "/" in name})
        for logger in trainer.loggers:
            logger.save()

    def _log_settings(self, trainer: Trainer, scores: Scores) -> None:
        if trainer.is_global_zero and self.settings is not None:
            strategies = [file.stem for file in map(Path, self.files) if file.parent.name == "strategy"]
            log_settings(trainer, {"strategy": "+".join(strategies), **self.settings}, scores)

    def final_scores(self, pl_module: LightningModule) -> Scores:
        """Return the validation scores of the best epoch, and those of evaluations since."""
        if not self.epochs:
            return self.scores
        best = self.best_epoch(pl_module)
        val_scores = _of_split(best, "val/")
        return {**val_scores, **({"best_epoch": best["epoch"]} if val_scores else {}), **self.scores}

    def best_epoch(self, pl_module: LightningModule) -> Scores:
        """Return the scores of the epoch that is best by the task's ``monitor``; the first of equals."""
        return max(self.epochs, key=lambda scores: _goodness(pl_module, scores))

    def _write(self, trainer: Trainer, pl_module: LightningModule, status: str) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero or folder is None:
            return
        best = folder / "checkpoints" / "best.ckpt"
        size = best.stat().st_size if best.is_file() else None
        record = {"status": status, **self.build_record(trainer, pl_module), "checkpoint_bytes": size}
        with atomic_write(folder / "metrics.json") as file:
            json.dump(record, file, indent=2)

    def build_record(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the content of metrics.json: times in seconds, sizes in bytes, all measured by process 0."""
        parameters = list(pl_module.parameters())
        datamodule: Any = getattr(trainer, "datamodule", None)
        task: Any = pl_module
        metric_info = {**task.metric_info}
        for callback in find_callbacks(trainer, Forgetting):
            metric_info |= callback.metric_info
        cost = [throughput.record(trainer) for throughput in find_callbacks(trainer, Throughput)]
        return {
            "task": type(pl_module).__name__,
            "configs": self.files,
            "monitor": pl_module.monitor,
            "mode": pl_module.mode,
            "primary": pl_module.primary or pl_module.monitor,
            "metrics": {name: asdict(info) for name, info in metric_info.items()},
            "scores": self.final_scores(pl_module),
            "score_signatures": getattr(pl_module, "score_signatures", {}),
            "score_note": getattr(pl_module, "table_caption", None),
            "epochs": self.epochs,
            "parameters": {
                "trainable": sum(layer["trainable"] for layer in self.layers)  # at the end of training
                or sum(p.numel() for p in parameters if p.requires_grad and trainer.max_epochs != 0),
                "total": sum(p.numel() for p in parameters),
                "layers": self.layers,
            },
            **(cost[0] if cost else {}),
            "threads": torch.get_num_threads(),
            "steps": trainer.global_step,
            "skipped_steps": sum(guard.skipped for guard in find_callbacks(trainer, NonFiniteLossGuard)),
            "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
            "processes": trainer.world_size,
            "precision": str(trainer.precision),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "base": {
                "path": pl_module.base,
                "hub_id": None if pl_module.base is None else hub_id(str(pl_module.base)),
                "digest": pl_module.base_digest,
                **provenance(str(pl_module.base)),
            },
            "data": datamodule.description() if hasattr(datamodule, "description") else None,
            **self.software,
        }

    def table(self, pl_module: LightningModule) -> Table:
        """Return a table of the training scores and the best validation of every epoch; the best is marked."""
        names = getattr(pl_module, "displayed_metrics", ("loss",))
        columns = [f"{split}/{name}" for name in names for split in ("train", "val")]
        table = Table(title="Scores by epoch", caption=getattr(pl_module, "table_caption", None))
        for header in ("epoch", *(column.replace("/", " ").replace("macro_f1", "macro F1") for column in columns)):
            table.add_column(header, justify="right")
        best = self.final_scores(pl_module).get("best_epoch")
        for scores in self.epochs:
            cells = [f"{scores[column]:.4f}" if column in scores else "" for column in columns]
            mark = "*" if scores["epoch"] == best else ""
            table.add_row(f"{int(scores['epoch'])}{mark}", *cells, style="bold" if mark else None)
        return table

    def layer_table(self) -> Table:
        """Return a table of what trained in the last epoch and at what rate; equal blocks share a row."""
        table = Table(title="Trainable parameters by layer, last epoch")
        for header in _LAYER_COLUMNS:
            table.add_column(header, justify="left" if header == "layer" else "right")
        for row in _layer_rows(self.layers):
            table.add_row(*row)
        return table


def _software() -> dict[str, Any]:
    """Return the digests of the code that is imported now, which may be edited later, and the versions of packages."""
    versions = {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}}
    return {"code": code_digests(), "versions": versions}


def _goodness(pl_module: LightningModule, scores: Mapping[str, float]) -> float:
    """Return the monitored score, greater is better; no score is the least."""
    return goodness(pl_module, scores.get(str(pl_module.monitor), math.nan))


def layer_table(trainer: Trainer, pl_module: LightningModule) -> list[dict[str, Any]]:
    """Return for every layer its parameters, how many of them train now, and their optimizer groups' peak rates."""
    layers = pl_module.layer_groups() if isinstance(pl_module, LayeredModule) else {}
    rates: dict[int, float] = {}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            rates.update({id(p): float(group.get("initial_lr", group["lr"])) for p in group["params"]})
    return [
        {
            "layer": layer,
            "parameters": sum(p.numel() for _, p in parameters),
            "trainable": sum(p.numel() for _, p in parameters if p.requires_grad),
            "peak_rates": sorted({rates[id(p)] for _, p in parameters if p.requires_grad and id(p) in rates}),
        }
        for layer, parameters in layers.items()
    ]


def _layer_rows(layers: list[dict[str, Any]]) -> list[list[str]]:
    """Return rows of text; adjacent blocks with the same figures share one, and layers without parameters none."""
    rows: list[list[str]] = []
    for layer in (one for one in layers if one["parameters"]):
        figures = [f"{layer['parameters']:,}", f"{layer['trainable']:,}"]
        figures.append(", ".join(f"{rate:.3g}" for rate in layer["peak_rates"]) or "frozen")
        if rows and rows[-1][1:] == figures and layer["layer"].startswith("block.") and "block." in rows[-1][0]:
            rows[-1][0] = f"{rows[-1][0].partition(' to ')[0]} to {layer['layer'].removeprefix('block.')}, each"
        else:
            rows.append([layer["layer"], *figures])
    total, trainable = (sum(layer[key] for layer in layers) for key in ("parameters", "trainable"))
    rows.append(["all", f"{total:,}", f"{trainable:,}", f"{trainable / max(total, 1):.2%} trainable"])
    return rows


def _of_split(scores: Mapping[str, float | Tensor], split: str) -> Scores:
    """Return the scores whose names start with ``split``, such as ``val/``, as numbers."""
    chosen = {name: value for name, value in scores.items() if name.startswith(split)}
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in chosen.items()}
