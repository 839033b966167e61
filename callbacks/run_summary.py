"""The account of a run: scores by epoch, cost, settings; in metrics.json, in TensorBoard and on the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from gpt2_pl.callbacks.non_finite_loss import NonFiniteLossGuard
from gpt2_pl.callbacks.pictures import log_text
from gpt2_pl.callbacks.run_folder import run_folder
from gpt2_pl.errors import InputError, RunError
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.pretrained import provenance
from gpt2_pl.tasks.base import Task
from gpt2_pl.utils.machine import peak_process_memory
from gpt2_pl.utils.peak_flops import peak_flops

Scores = dict[str, float]


class RunSummary(Callback):
    """Keeps the account of a run and writes it to ``metrics.json`` in the run folder after every epoch and stage.

    Args:
        settings: the run's configuration, shown on TensorBoard's HPARAMS page together with the final scores.
        files: the configuration files that it was laid together from.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None, files: Sequence[str] = ()) -> None:
        self.settings, self.files = dict(settings or {}), list(files)
        self.epochs: list[Scores] = []
        self.scores: Scores = {}  # of evaluations after training
        self.seconds = 0.0  # spent training, validation included
        self.examples = self.tokens = 0  # trained on, all processes together
        self.training_seconds = 0.0  # of them, spent in training batches
        self.peak_memory_before = 0  # of the processes of a run that was stopped
        self.val_metrics: Scores = {}  # in the epoch that is under way
        self.layers: list[dict[str, Any]] = []  # what trained, at the end of the last epoch
        self.cpu_seconds = 0.0  # of all of this process's threads, in those seconds
        self.test_follows = False  # the run is finished only when its best checkpoint has been tested
        self._since = self._cpu_since = 0.0
        self._logged = (0, 0.0)  # tokens and seconds when the speed was logged last
        self._fitting = self.began = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note whether this is training: checkpoints are also loaded to be tested."""
        self._fitting, self.began = stage == "fit", False

    # What a resumed run takes over

    def state_dict(self) -> dict[str, Any]:
        """The account so far."""
        seconds, cpu_seconds = self._spent()
        return {
            "epochs": self.epochs,
            "val_metrics": self.val_metrics,
            "layers": self.layers,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "examples": self.examples,
            "tokens": self.tokens,
            "training_seconds": self.training_seconds,
            "peak_memory_before": max(self.peak_memory_before, peak_memory()),
        }

    def _spent(self) -> tuple[float, float]:
        """Seconds of training so far, by the wall's clock and the processor's."""
        if not self._since:
            return self.seconds, self.cpu_seconds
        return (
            self.seconds + time.perf_counter() - self._since,
            self.cpu_seconds + time.process_time() - self._cpu_since,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the account of the run that was stopped; testing a checkpoint takes nothing over."""
        if not self._fitting:
            return
        for key in self.state_dict():
            if state_dict.get(key) is not None:
                setattr(self, key, state_dict[key])
        self._logged = (self.tokens, self.training_seconds)

    # Training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since, self._cpu_since = time.perf_counter(), time.process_time()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whatever was to be restored is: tell TensorBoard the settings and which scores will be final."""
        self.began = True
        self._show_settings(trainer, {})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of the batch."""
        self._batch_since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        if getattr(pl_module, "decoded_last_step", False):
            return  # such a step reads other tokens than the batch's
        self.training_seconds += time.perf_counter() - self._batch_since
        self.examples += int(batch.get("global_rows", len(batch["input_ids"])))
        self.tokens += int(batch.get("global_tokens") or int(batch["attention_mask"].sum()) * trainer.world_size)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (batch_idx + 1) % every == 0 and trainer.loggers:
            tokens, seconds = self.tokens - self._logged[0], self.training_seconds - self._logged[1]
            self._logged = (self.tokens, self.training_seconds)
            speed = {"train/tokens_per_second": tokens / seconds}
            if (flops := self._flops(trainer, pl_module)) is not None:
                speed["train/mfu"] = flops * tokens / seconds
            for logger in trainer.loggers:
                logger.log_metrics(speed, step=trainer.global_step)

    def _flops(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        """The share of the machine's peak that a token per second takes; None where the operations are not known."""
        if not isinstance(pl_module, Task) or not self.examples:
            return None
        flops = pl_module.training_flops_per_token(self.tokens / self.examples)
        if flops is None:
            return None
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        peak = peak_flops(pl_module.device, dtype) * trainer.world_size
        return flops / peak

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down the epoch."""
        scores = _scores(trainer, "train/")
        scores.pop("train/step_loss", None)
        epoch = trainer.current_epoch + 1
        if self.epochs and self.epochs[-1]["epoch"] == epoch:  # the run ended within this epoch, and was continued
            self._keep_better(pl_module, _of_split(self.epochs.pop(), "val/"))
        self.epochs.append({"epoch": epoch, **scores, **self.val_metrics})
        self.val_metrics = {}
        self._log_layers(trainer, pl_module)
        self._write(trainer, pl_module, "running")

    def _log_layers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what of every layer trained in this epoch, and at what rate; tell loggers when it has changed."""
        before, self.layers = self.layers, layer_table(trainer, pl_module)
        count = sum(layer["trainable"] for layer in self.layers)
        for logger in trainer.loggers:
            logger.log_metrics({"trainable_parameters": count}, step=trainer.global_step)
        if self.layers != before and trainer.is_global_zero:
            rows = [["layer", "parameters", "trainable", "peak rate"], ["---"] * 4, *_layer_rows(self.layers)]
            log_text(trainer, "layers", "\n".join(f"| {' | '.join(row)} |" for row in rows))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down the scores of the best epoch."""
        self.seconds, self.cpu_seconds = self._spent()
        self._since = 0.0
        done = "trained" if self.test_follows else "finished"
        self._write(trainer, pl_module, "interrupted" if trainer.interrupted else done)
        self._log_final(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write down that training broke off; what was reached stays, as does all where a checkpoint was refused.

        Raises:
            InputError: what broke off was restoring a checkpoint, which Lightning does.
        """
        if self._fitting and trainer.training and (self.began or trainer.ckpt_path is None):
            stopped = isinstance(exception, KeyboardInterrupt | SIGTERMException)
            with suppress(RunError):  # a full disk, of which the exception tells
                self._write(trainer, pl_module, "interrupted" if stopped else "failed")
        if (
            isinstance(exception, _RESTORING)
            and not isinstance(exception, InputError)
            and _raised_while_restoring(exception)
        ):
            reason = (str(exception).strip() or type(exception).__name__).splitlines()[0]
            what = f"{type(exception).__name__}: {reason[:200]}"
            raise InputError(f"ckpt_path: {trainer.ckpt_path} cannot be gone on with: {what}") from exception

    def final_scores(self, pl_module: LightningModule) -> Scores:
        """The validation scores of the best epoch, and whatever was evaluated since."""
        if not self.epochs:
            return self.scores
        best = self.best_epoch(pl_module)
        of_best = _of_split(best, "val/")
        return {**of_best, **({"best_epoch": best["epoch"]} if of_best else {}), **self.scores}

    def best_epoch(self, pl_module: LightningModule) -> Scores:
        """The scores of the epoch that is best by the task's ``monitor``; the first of equals."""
        return max(self.epochs, key=lambda scores: _goodness(pl_module, scores))

    # Evaluation

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the scores for the epoch's row; write down those of a validation that stands by itself."""
        if trainer.state.fn == "validate":
            self._evaluated(trainer, pl_module)
        elif not trainer.sanity_checking:
            self._keep_better(pl_module, _scores(trainer, "val/"))

    def _keep_better(self, pl_module: LightningModule, scores: Scores) -> None:
        """Let the epoch's row hold its best validation, which is the one that ``best.ckpt`` may be of."""
        if not self.val_metrics or _goodness(pl_module, scores) > _goodness(pl_module, self.val_metrics):
            self.val_metrics = scores

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down the test scores."""
        self._evaluated(trainer, pl_module)

    def _evaluated(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.scores.update(_scores(trainer, "val/" if trainer.state.fn == "validate" else "test/"))
        self._write(trainer, pl_module, "finished")
        self._log_final(trainer, pl_module)

    # Where it goes

    def _log_final(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scores = {f"hp/{k.replace('/', '_')}": v for k, v in self.final_scores(pl_module).items() if "/" in k}
        self._show_settings(trainer, scores)
        for logger in trainer.loggers:
            logger.save()

    def _show_settings(self, trainer: Trainer, scores: Scores) -> None:
        """Tell loggers the settings, and TensorBoard's HPARAMS page also the final scores."""
        if not (trainer.is_global_zero and self.settings):
            return
        strategy = "+".join(Path(file).stem for file in self.files if Path(file).parent.name == "strategy")
        settings = {
            "strategy": strategy,
            **{key: value for key, value in flatten_dict(self.settings) if value is not None},
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _write_hparams(Path(logger.log_dir) / "final", settings, scores, trainer.global_step)
            elif not scores:
                logger.log_hyperparams(settings)

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
        """What ``metrics.json`` holds. Seconds are wall-clock, CPU seconds of all threads, memory is in bytes; all are
        of process 0, which alone asks."""
        parameters = list(pl_module.parameters())
        datamodule: Any = getattr(trainer, "datamodule", None)
        metric_info: Any = pl_module.metric_info
        seconds, cpu_seconds = self._spent()
        return {
            "task": type(pl_module).__name__,
            "configs": self.files,
            "monitor": pl_module.monitor,
            "mode": pl_module.mode,
            "primary": pl_module.primary or pl_module.monitor,
            "metrics": {name: asdict(info) for name, info in metric_info.items()},
            "scores": self.final_scores(pl_module),
            "score_signatures": getattr(pl_module, "score_signatures", {}),
            "epochs": self.epochs,
            "parameters": {
                "trainable": sum(layer["trainable"] for layer in self.layers)  # at the end of training
                or sum(p.numel() for p in parameters if p.requires_grad),
                "total": sum(p.numel() for p in parameters),
                "layers": self.layers,
            },
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "examples_per_second": self.examples / self.training_seconds if self.training_seconds else None,
            "tokens_per_second": self.tokens / self.training_seconds if self.training_seconds else None,
            "mfu": self._mfu(trainer, pl_module),
            "peak_memory_bytes": max(self.peak_memory_before, peak_memory()),
            "threads": torch.get_num_threads(),
            "steps": trainer.global_step,
            "skipped_steps": _skipped(trainer),
            "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
            "processes": trainer.world_size,
            "precision": str(trainer.precision),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "base": {"path": pl_module.base, "digest": pl_module.base_digest, **provenance(str(pl_module.base))},
            "data": datamodule.description() if hasattr(datamodule, "description") else None,
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in _PACKAGES}},
        }

    def _mfu(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        flops = self._flops(trainer, pl_module) if self.training_seconds else None
        return None if flops is None else flops * self.tokens / self.training_seconds

    def table(self, pl_module: LightningModule) -> Any:
        """Training scores and the best validation of every epoch, as a rich table; the best epoch is marked."""
        from rich.table import Table

        table = Table(title="Scores by epoch", caption=getattr(pl_module, "table_caption", None))
        columns = [f"{split}/{name}" for name in displayed_metrics(pl_module) for split in ("train", "val")]
        table.add_column("epoch", justify="right")
        for column in columns:
            table.add_column(column.replace("/", " ").replace("macro_f1", "macro F1"), justify="right")
        best = self.final_scores(pl_module).get("best_epoch")
        for scores in self.epochs:
            shown = [f"{scores[column]:.4f}" if column in scores else "" for column in columns]
            mark = "*" if scores["epoch"] == best else ""
            table.add_row(f"{int(scores['epoch'])}{mark}", *shown, style="bold" if mark else None)
        return table

    def layer_table(self) -> Any:
        """What of every layer trained in the last epoch, and at what rate; equal blocks share a row."""
        from rich.table import Table

        table = Table(title="What trained, at the end")
        table.add_column("layer")
        for column in ("parameters", "trainable", "peak rate"):
            table.add_column(column, justify="right")
        for row in _layer_rows(self.layers):
            table.add_row(*row)
        return table


def _goodness(pl_module: LightningModule, scores: Mapping[str, float]) -> float:
    """The monitored score, greater where better; that of no score and of NaN is the least, as in ModelCheckpoint."""
    value = scores.get(str(pl_module.monitor), math.nan)
    return -math.inf if math.isnan(value) else value if pl_module.mode == "max" else -value


def displayed_metrics(pl_module: Any) -> tuple[str, ...]:
    """The scores of an epoch that are shown."""
    return getattr(pl_module, "displayed_metrics", ("loss",))


def layer_table(trainer: Trainer, pl_module: LightningModule) -> list[dict[str, Any]]:
    """Of every layer: its parameters, how many of them train now, and the peak rates of its optimizer groups."""
    named: Any = getattr(pl_module, "layer_groups", dict)
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
        for layer, parameters in named().items()
    ]


_RESTORING = (
    *(ArithmeticError, AttributeError, LookupError, MisconfigurationException, RuntimeError, TypeError, ValueError),
)
_RESTORES = (
    ("restore", "checkpoint_connector.py"),
    ("resume_start", "checkpoint_connector.py"),
    ("_load_combined_loader_states", "fit_loop.py"),
)


def _raised_while_restoring(exception: BaseException) -> bool:
    """Whether it was raised while Lightning restored a checkpoint."""
    frames = traceback.extract_tb(exception.__traceback__)
    return any(f.name.startswith(name) and f.filename.endswith(file) for f in frames for name, file in _RESTORES)


def _write_hparams(folder: Path, settings: dict[str, Any], scores: Scores, step: int) -> None:
    """Write a row of TensorBoard's HPARAMS page, as a run of its own; with scores it is finished.

    The page takes what it shows from all such runs, as long as none of them says what an experiment consists of, as
    torch's ``add_hparams`` does: then it shows the keys and scores of that run's task alone.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    _, start, end = hparams(settings, {})
    with SummaryWriter(str(folder)) as writer:
        writer._get_file_writer().add_summary(start)
        for name, value in scores.items():
            writer.add_scalar(name, value, step)
        if scores:
            writer._get_file_writer().add_summary(end)


def _scores(trainer: Trainer, split: str) -> Scores:
    """What was logged of a split."""
    return {k: v.item() for k, v in _of_split(trainer.callback_metrics, split).items()}


def _of_split(scores: Mapping[str, Any], split: str) -> dict[str, Any]:
    """The scores whose names begin with ``split``, such as ``val/``."""
    return {name: value for name, value in scores.items() if name.startswith(split)}


def _layer_rows(layers: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of text; neighbouring blocks with the same figures share one."""
    rows: list[list[str]] = []
    for layer in layers:
        figures = [f"{layer['parameters']:,}", f"{layer['trainable']:,}"]
        figures.append(", ".join(f"{rate:.3g}" for rate in layer["peak_rates"]) or "frozen")
        if rows and rows[-1][1:] == figures and layer["layer"].startswith("block.") and "block." in rows[-1][0]:
            rows[-1][0] = f"{rows[-1][0].partition(' to ')[0]} to {layer['layer'].removeprefix('block.')}, each"
        else:
            rows.append([layer["layer"], *figures])
    total, trainable = (sum(layer[key] for layer in layers) for key in ("parameters", "trainable"))
    rows.append(["all", f"{total:,}", f"{trainable:,}", f"{trainable / max(total, 1):.2%} train"])
    return rows


_PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "datasets", "tokenizers", "safetensors")


def _skipped(trainer: Trainer) -> int:
    """Steps that were left out because their loss was no number."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return sum(callback.skipped for callback in callbacks if isinstance(callback, NonFiniteLossGuard))


def peak_memory() -> int:
    """Bytes: the most the GPU's allocator held, or without a GPU the most this process occupied."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_process_memory()


def flatten_dict(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as dotted names and plain values."""
    pairs: list[tuple[str, Any]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}".replace(".init_args.", ".").removesuffix(".class_path")
        if isinstance(value, Mapping):
            pairs += flatten_dict(value, f"{prefix}{key}.")
        else:
            pairs.append((name, value if isinstance(value, bool | int | float | str | None) else str(value)))
    return pairs
