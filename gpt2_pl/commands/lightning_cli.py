"""fit, validate, test and predict, through LightningCLI.

A run is a task, a strategy and a trainer, each a configuration. Later ones
replace keys of earlier ones, and flags do so too:

  gpt2-pl fit --config task/sst5 --config strategy/lora --config trainer/cpu --data.batch_size 32

--task X and --strategy X are short for --config task/X and --config strategy/X, and --lr X for
--model.optimizer.init_args.lr X:

  gpt2-pl fit --task sst5 --strategy lora --lr 1e-4

To choose, and to see the options of what is chosen:

  gpt2-pl configs                        list tasks, strategies and trainers
  gpt2-pl configs show strategy/lora     print one; copy instead of show copies it
  gpt2-pl fit --model.help gpt2_pl.tasks.SentimentClassifier       a task
  gpt2-pl fit --data.help gpt2_pl.datamodules.SST5                 its data
  gpt2-pl fit --model.surgery.help gpt2_pl.surgery.LoRA            a strategy
  gpt2-pl fit --config task/sst5 --print_config    all settings, without a run

"""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from gpt2_pl import callbacks
from gpt2_pl.commands.support.closing import (
    early_end,
    print_report,
    resume_advice,
    score_untrained,
    validate_final_weights,
)
from gpt2_pl.commands.support.config_merge import CommandLine, as_list, check_order, validate_strategy_combination
from gpt2_pl.commands.support.failures import explain_instantiation, explain_run_failure
from gpt2_pl.commands.support.lightning_parser import Parser
from gpt2_pl.commands.support.messages import explain
from gpt2_pl.commands.support.process import LAUNCHER, interrupts, rank
from gpt2_pl.commands.support.resuming import check_same_settings, run_to_resume, with_hyperparameters
from gpt2_pl.commands.support.run_dir import RunTensorBoardLogger, SaveRunConfig
from gpt2_pl.commands.support.settings import check_logging, complete_settings, restore_counts
from gpt2_pl.commands.support.terminal import wrapped
from gpt2_pl.commands.support.training_checks import (
    FINDERS,
    check_optimizer,
    check_processes,
    check_training,
    needs_training,
)
from gpt2_pl.errors import InputError, causes, printable, require
from gpt2_pl.experiments.run import RUNS
from gpt2_pl.experiments.run_lock import RunLock
from gpt2_pl.filesystem import require_writable
from gpt2_pl.tasks import Task
from gpt2_pl.utils.registry import class_path
from gpt2_pl.utils.trainer import callbacks_of
from gpt2_pl.utils.yaml_json import load_yaml


@dataclass
class RunSettings:
    """Keys of a run itself.

    Args:
        name: the run's folder: lightning_logs/NAME/version_N
        version: the run's folder is lightning_logs/NAME/VERSION, for a number N version_N; by default version_N with
            the next free N, or that of the resumed run if ckpt_path is a last.ckpt
        early_stopping_patience: stop after this many validations without a better score; null never stops early
        checkpoint_every_n_steps: write checkpoints/last.ckpt every N optimizer steps, in addition to after every epoch
        on_non_finite_loss: error stops at a NaN or infinite loss; skip leaves the step out and counts it
        save_predictions: best keeps the rows of the best epoch; every_epoch also those of every validation, in
            validations/step_N of the run's folder, from which compare corrects the selection of the epoch
    """

    name: str = "run"
    version: str | None = None
    early_stopping_patience: int | None = None
    checkpoint_every_n_steps: int | None = None
    on_non_finite_loss: Literal["error", "skip"] = "error"
    save_predictions: Literal["best", "every_epoch"] = "best"


class GPT2CLI(LightningCLI):
    """LightningCLI with a run folder, resumable checkpoints, early stopping and a record of the run.

    Args:
        args: the command and its arguments.
        digests: callback that receives the digests of the weights; by default one that writes them to the run folder.
    """

    def __init__(self, args: list[str], digests: callbacks.WeightDigests | None = None) -> None:
        self.digests = callbacks.WeightDigests() if digests is None else digests
        self.line = CommandLine(args)
        self.line.import_classes()
        options = (source.name for source in self.line.sources if not source.is_file)
        Parser.help_key = next((name.removesuffix(".help") for name in options if name.endswith(".help")), "")
        self.checkpoint = self.line.checkpoint()
        check_order(self.line)
        self.lock: RunLock | None = None
        self.folder: callbacks.RunFolder | None = None
        self.tested: callbacks.ResumableModelCheckpoint | None = None  # its best checkpoint is tested after training
        arguments = self.line.arguments if self.checkpoint is None else with_hyperparameters(self.line, self.checkpoint)
        interrupts.advice = self._resume_advice
        try:
            super().__init__(
                Task,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                parser_class=Parser,
                save_config_callback=SaveRunConfig,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"exit_on_error": False},
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=arguments,
            )
        finally:
            for lock in (self.lock, None if self.folder is None else self.folder.lock):
                if lock is not None:
                    lock.release()

    # Keys

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the command that is run and the arguments of the trainer's method that are not keys.

        Building the parsers of the other commands would only take time. ``weights_only`` is always True.
        """
        method_arguments = LightningCLI.subcommands()[self.line.command]
        return {self.line.command: {*method_arguments, "weights_only", "return_predictions"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the run itself."""
        if isinstance(parser, Parser):
            command = self.line.command
            introduction = (__doc__ or "").partition("\n\n")[2]
            parser.introduction = introduction.replace("gpt2-pl fit", f"gpt2-pl {command}")
            parser.usage = f"gpt2-pl {command} --config CONFIG [--config CONFIG ...] [--KEY VALUE ...]"
        parser.add_class_arguments(RunSettings, as_group=False, instantiate=False)
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse files and flags.

        Raises:
            InputError: naming the file, the key and the nearest name.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            reason = next((one for one in causes(error) if isinstance(one, InputError)), None)
            if reason is not None:  # of a file that is read while parsing
                raise reason from None
            raise explain(str(error), self.line, self._parser(self.line.command)) from None

    def _parse_ckpt_path(self) -> None:
        """Do nothing: files and flags already override the checkpoint's hyperparameters."""

    def _set_seed(self) -> None:
        """Seed everything, or nothing if the seed is False."""
        seed = self.config[self.subcommand].seed_everything
        expected = f"a number from 0 to {2**32 - 1}, true or false"
        require(isinstance(seed, bool) or 0 <= seed < 2**32, "seed_everything", seed, expected)
        if seed is False:
            os.environ.pop("PL_GLOBAL_SEED", None)  # of the parent process
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Complete the settings, take the run's folder, and reject what contradicts another setting."""
        config = self.config[self.subcommand]
        if config.ckpt_path != self.checkpoint:
            message = f"ckpt_path: {config.ckpt_path} was not read; give a file here as --ckpt_path FILE"
            raise InputError(message, key="ckpt_path", value=config.ckpt_path)
        complete_settings(config, self.line)
        validate_strategy_combination(self.line)
        root = Path(config.trainer.default_root_dir or ".") / RUNS
        resumed = None if self.checkpoint is None else run_to_resume(Path(self.checkpoint), root)
        if self.subcommand == "fit" and resumed is not None and not self.line.has_flag("name", "version"):
            config.name, config.version = str(resumed.parent), resumed.name
        folder = root / config.name / str(config.version)
        resumes = resumed == folder.relative_to(root)
        self._lock_folder(config, folder, resumes)
        if self.subcommand == "fit" and resumes:
            check_same_settings(folder / "config.yaml", self._plain_settings(skip_none=False))
        check_logging(config, self.line.command, self.checkpoint)
        if config.version is not None and (folder / "config.yaml").exists() and not resumes:
            message = f"version: {folder} is the folder of another run; give another, or resume its last.ckpt"
            raise InputError(message, key="version", value=config.version)

    def _lock_folder(self, config: Any, folder: Path, resumes: bool) -> None:
        """Check that a logged run's folder can be written, and lock one that is given by name."""
        if config.trainer.logger is False or config.trainer.fast_dev_run:
            return
        key = "name" if config.trainer.default_root_dir is None else "trainer.default_root_dir"
        require_writable(folder if config.version is not None else folder.parent, key)
        if config.version is not None and rank() == 0:
            self.lock = RunLock(folder)
            for part in folder.rglob(".*.part") if resumes else ():
                part.unlink(missing_ok=True)  # of a file that was being written when the run was killed

    def instantiate_classes(self) -> None:
        """Build the trainer, the data and the model, and reject what does not fit together."""
        try:
            super().instantiate_classes()
        except Exception as error:
            if (reason := explain_instantiation(error, self.line)) is None:
                raise
            raise reason from error
        check_optimizer(self.model.make_optimizer)
        used = callbacks_of(self.trainer)
        for callback in used:
            if hasattr(callback, "check"):
                callback.check(used, self.model)
        check_processes(self.trainer)
        if self.subcommand == "fit":
            check_training(self.trainer, self.model, resumes=self.checkpoint is not None)
        if self.checkpoint is None and self.subcommand != "fit":
            self._warn_if_untrained()
        stated, actual = self.line.last("model.num_classes"), getattr(self.datamodule, "num_classes", None)
        if stated is not None and actual is not None and str(stated) != str(actual):
            message = f"model.num_classes is {stated}, and the data have {actual} classes (data.labels); leave it out"
            raise InputError(message, key="model.num_classes", value=stated, expected=str(actual))

    def _warn_if_untrained(self) -> None:
        """Warn of an evaluation of a model that has not been trained."""
        if needs_training(self.model):
            _print_message("no ckpt_path is given: the model that is evaluated has not been trained")

    # Building

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the logger and the callbacks of every run in addition to the configured ones."""
        config = self.config_init[self.subcommand]
        trainer = {**config["trainer"], **kwargs}
        restore_counts(trainer, self.line)
        added: list[Any] = []
        if trainer["logger"] is not False and not trainer["fast_dev_run"]:
            root = Path(trainer["default_root_dir"] or ".") / RUNS
            self.folder = callbacks.RunFolder(root, config["name"], config["version"], self.lock)
            added.append(self.folder)
            if trainer["logger"] is True:
                trainer["logger"] = RunTensorBoardLogger(self.folder, config["name"], root)
        self.summary = callbacks.RunSummary(self.line.files, self._plain_settings(skip_none=True))
        added += [callbacks.Environment(), callbacks.Reproducibility()]
        added += [
            callbacks.PredictionWriter(config["save_predictions"]),
            callbacks.SampleWriter(),
            callbacks.ImageWriter(),
        ]
        has_bar = self._add_progress(trainer, added)
        if trainer["logger"]:
            added.append(LearningRateMonitor(logging_interval="step"))
        if self.subcommand == "fit":
            self._add_training(config, trainer, added)
        try:
            made = self._instantiate_trainer(trainer, added)
        except (MisconfigurationException, ImportError, TypeError, ValueError, RuntimeError) as error:
            message = " ".join(str(error).split()).replace("Timer(duration=", "Trainer(max_time=")
            raise InputError(f"trainer: {message}", key="trainer") from None
        # The record follows config.yaml and the last validation, and precedes the checkpoints.
        ends: list[Any] = [callbacks.EndOfTraining()] if self.subcommand == "fit" else []
        ends += [callbacks.Throughput(), self.summary, *([self.digests] if self.subcommand == "fit" else [])]
        order = callbacks_of(made)
        place = sum(not isinstance(callback, callbacks.ResumableModelCheckpoint) for callback in order)
        order[place:place] = [*ends, *([] if has_bar else [callbacks.EpochLines()])]
        return made

    @staticmethod
    def _add_progress(trainer: dict[str, Any], added: list[Any]) -> bool:
        """Add the bar and the summary of the model in place of Lightning's; return whether there is a bar."""
        configured = as_list(trainer["callbacks"])
        has_bar = any(isinstance(callback, ProgressBar) for callback in configured)
        if not has_bar:
            terminal = sys.stdout is not None and sys.stdout.isatty()
            has_bar = trainer["enable_progress_bar"] is not False and terminal
            added += [callbacks.RunProgressBar()] if has_bar else []
            trainer["enable_progress_bar"] = has_bar  # else Lightning adds a bar of its own
        if trainer["enable_model_summary"] is not False and not any(isinstance(c, ModelSummary) for c in configured):
            added.append(callbacks.RunModelSummary())
            trainer["enable_model_summary"] = False  # else Lightning adds its own
        return has_bar

    def _add_training(self, config: Any, trainer: dict[str, Any], added: list[Any]) -> None:
        """Add the guard against losses that are not finite, early stopping, ``best.ckpt`` and ``last.ckpt``."""
        added.append(callbacks.NonFiniteLossGuard(config["on_non_finite_loss"]))
        best_score: dict[str, Any] = {"monitor": self.model.monitor, "mode": self.model.mode}
        if (patience := config["early_stopping_patience"]) is not None:
            added.append(callbacks.ResumableEarlyStopping(patience=patience, **best_score))
        if trainer["enable_checkpointing"] is False or trainer["fast_dev_run"]:
            return
        checkpoint = partial(
            callbacks.ResumableModelCheckpoint, enable_version_counter=False, auto_insert_metric_name=False
        )
        steps = config["checkpoint_every_n_steps"]
        last = checkpoint(filename="last", every_n_steps=steps, save_on_train_epoch_end=True, on_sigterm=True)
        validates = trainer["limit_val_batches"] != 0
        self.tested = checkpoint(filename="best", **best_score) if validates else last
        added += [self.tested, last] if validates else [last]
        self.summary.expects_test = self.can_test
        plugins = as_list(trainer["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            trainer["plugins"] = [*plugins, callbacks.AtomicCheckpointIO()]

    def _plain_settings(self, skip_none: bool) -> dict[str, Any]:
        """Return the configuration of the run as plain values."""
        dump = self.parser.dump(self.config, skip_none=skip_none, skip_validation=True)
        return load_yaml(dump, "the configuration")[self.subcommand]

    # Running

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command and translate its errors; when SIGTERM stops it, print how to resume."""
        if self.trainer.num_devices > 1:
            os.environ[LAUNCHER] = str(os.getpid())
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException:
            _print_message(f"stopped by SIGTERM{self._resume_advice()}")
            raise SystemExit(128 + signal.SIGTERM) from None
        except Exception as error:
            if (reason := explain_run_failure(error, self.line, self.trainer)) is None:
                raise
            raise reason from error
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.trainer.strategy.barrier()  # a process that ends closes its connections to those that still work
            torch.distributed.destroy_process_group()

    def _resume_advice(self) -> str:
        """Return the end of the line that says that a training was stopped."""
        folder = None if self.folder is None else self.folder.path
        return "" if self.subcommand != "fit" or folder is None else resume_advice(self.trainer, Path(folder))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        predictions = {"return_predictions": False} if subcommand == "predict" else {}
        return {**super()._prepare_subcommand_kwargs(subcommand), **predictions, "weights_only": True}

    @property
    def can_test(self) -> bool:
        """Whether there is a test set and the task has a test step."""
        return self.datamodule.has_split("test") and is_overridden("test_step", self.model)

    def after_fit(self) -> None:
        """Test the best checkpoint if there is a test set, then print the report."""
        trainer, tested = self.trainer, self.tested
        if trainer.interrupted:
            return
        callbacks_of(trainer)[:] = [one for one in callbacks_of(trainer) if not isinstance(one, FINDERS)]
        if trainer.max_epochs == 0:
            score_untrained(trainer, self.model, self.datamodule, self.can_test)
            self._report("\n  trainer.max_epochs is 0: the model has not been trained")
            return
        note = early_end(trainer, self.summary.has_trained)  # before the test resets the state of training
        validate_final_weights(trainer, self.model, self.datamodule, self.summary, tested)
        if tested is not None and tested.best_model_path and self.can_test:
            if tested.monitor is None:
                _print_message("trainer.limit_val_batches is 0: last.ckpt is tested")
            path = tested.best_model_path
            trainer.test(self.model, self.datamodule, ckpt_path=path, weights_only=True, verbose=False)
        self._report(note)

    def after_validate(self) -> None:
        """Print the report."""
        self._report()

    after_test = after_validate

    def after_predict(self) -> None:
        """Print the report, and whether the task has predictions to write."""
        writers = [one for one in callbacks_of(self.trainer) if isinstance(one, callbacks.PredictionWriter)]
        nothing = f"; no predictions were written: {class_path(type(self.model))} gives no row_table"
        self._report("" if any(writer.wrote for writer in writers) else nothing)

    def _report(self, note: str = "") -> None:
        print_report(self.trainer, self.model, self.summary, self.line.command, self.can_test, note)


def _print_message(message: str) -> None:
    """Print a message in the first process of a run."""
    if rank() == 0:
        print(wrapped(f"gpt2-pl: {printable(message)}", sys.stderr), file=sys.stderr)
