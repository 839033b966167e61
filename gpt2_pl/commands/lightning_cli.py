"""fit, validate, test and predict, through LightningCLI."""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from gpt2_pl.callbacks import (
    AtomicCheckpointIO,
    EndOfTraining,
    Environment,
    EpochLines,
    HyperparameterLogger,
    NonFiniteLossGuard,
    PictureWriter,
    PredictionWriter,
    Reproducibility,
    ResumableEarlyStopping,
    ResumableModelCheckpoint,
    RunFolder,
    RunModelSummary,
    RunProgressBar,
    RunSummary,
    SampleWriter,
    Throughput,
)
from gpt2_pl.commands.support.closing import early_end, print_report, resume_advice
from gpt2_pl.commands.support.config_merge import (
    CommandLine,
    check_order,
    check_same_settings,
    run_to_resume,
    validate_strategy_combination,
    with_hyperparameters,
)
from gpt2_pl.commands.support.lightning_parser import Parser
from gpt2_pl.commands.support.process import LAUNCHER, interrupts, rank
from gpt2_pl.commands.support.run_dir import RunTensorBoardLogger, SaveRunConfig
from gpt2_pl.commands.support.settings import check_logging, complete_settings
from gpt2_pl.commands.support.training_checks import check_optimizer, check_processes, check_training
from gpt2_pl.errors import InputError, causes, printable
from gpt2_pl.experiments.run import RUNS
from gpt2_pl.experiments.run_lock import RunLock
from gpt2_pl.filesystem import require_writable
from gpt2_pl.surgery import Surgery
from gpt2_pl.tasks import Task
from gpt2_pl.utils.registry import class_path
from gpt2_pl.utils.trainer import callbacks_of

_INTRODUCTION = """A run is a task, a strategy and a trainer, each a configuration. Later ones
replace keys of earlier ones, and flags do so too:

  gpt2-pl {command} --config task/sst5 --config strategy/lora --config trainer/cpu --data.batch_size 32

To choose, and to see the options of what is chosen:

  gpt2-pl configs                        list tasks, strategies and trainers
  gpt2-pl configs show strategy/lora     print one; copy instead of show copies it
  gpt2-pl {command} --model.help gpt2_pl.tasks.SentimentClassifier       a task
  gpt2-pl {command} --data.help gpt2_pl.datamodules.SST5                 its data
  gpt2-pl {command} --model.surgery.help gpt2_pl.surgery.LoRA            a strategy
  gpt2-pl {command} --config task/sst5 --print_config    all settings, without a run

"""


class GPT2CLI(LightningCLI):
    """LightningCLI with a run folder, resumable checkpoints, early stopping and a record of the run."""

    def __init__(self, args: list[str]) -> None:
        self.line = CommandLine(args)
        self.line.import_classes()
        options = (source.name for source in self.line.sources if not source.is_file)
        Parser.help_key = next((name.removesuffix(".help") for name in options if name.endswith(".help")), "")
        self.checkpoint = self.line.checkpoint()
        for warning in check_order(self.line):
            if rank() == 0:
                print(f"gpt2-pl: warning: {printable(warning)}", file=sys.stderr)
        self.lock: RunLock | None = None
        self.folder: RunFolder | None = None
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
                args=self._parser_arguments(),
            )
        finally:
            for lock in (self.lock, None if self.folder is None else self.folder.lock):
                if lock is not None:
                    lock.release()

    def _parser_arguments(self) -> list[str]:
        return self.line.arguments if self.checkpoint is None else with_hyperparameters(self.line, self.checkpoint)

    # Keys

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the command that is run and the arguments of the trainer's method that are not keys.

        Building the parsers of the other commands would only take time. ``weights_only`` is always True.
        """
        common = {"model", "dataloaders", "datamodule", "weights_only"}
        arguments = {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": common,
            "test": common,
            "predict": common | {"return_predictions"},
        }
        return {self.line.command: arguments[self.line.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the run itself."""
        if isinstance(parser, Parser):
            parser.introduction = _INTRODUCTION.format(command=self.line.command)
            parser.usage = f"gpt2-pl {self.line.command} --config CONFIG [--config CONFIG ...] [--KEY VALUE ...]"
        parser.add_argument("--name", type=str, default="run", help=f"the run's folder: {RUNS}/NAME/version_N")
        parser.add_argument(
            "--version",
            type=str | None,
            default=None,
            help=f"the run's folder is {RUNS}/NAME/VERSION, for a number N version_N; by default version_N with the "
            "next free N, or that of the resumed run if ckpt_path is a last.ckpt",
        )
        parser.add_argument(
            "--early_stopping_patience",
            type=int | None,
            default=None,
            help="stop after this many validations without a better score; null never stops early",
        )
        parser.add_argument(
            "--checkpoint_every_n_steps",
            type=int | None,
            default=None,
            help="write checkpoints/last.ckpt every N optimizer steps, in addition to after every epoch",
        )
        parser.add_argument(
            "--on_non_finite_loss",
            type=Literal["error", "skip"],
            default="error",
            help="error stops at a NaN or infinite loss; skip leaves the step out and counts it",
        )
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse files and flags.

        Raises:
            InputError: naming the file, the key and the nearest name.
        """
        from gpt2_pl.commands.support.messages import check_keys, explain

        own = self._parser(self.line.command)
        check_keys(self.line, own)
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            reason = next((one for one in causes(error) if isinstance(one, InputError)), None)
            if reason is not None:  # of a file that is read while parsing
                raise reason from None
            raise InputError(explain(str(error), self.line, own)) from None

    def _parse_ckpt_path(self) -> None:
        """Do nothing: files and flags already override the checkpoint's hyperparameters."""

    def _set_seed(self) -> None:
        """Seed everything, or nothing if the seed is False."""
        seed = self.config[self.subcommand].seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise InputError(f"seed_everything must be a number from 0 to {2**32 - 1}, true or false, got {seed}")
        if seed is False:
            os.environ.pop("PL_GLOBAL_SEED", None)  # of the parent process
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Complete the settings, take the run's folder, and refuse what contradicts another setting."""
        config = self.config[self.subcommand]
        if config.ckpt_path != self.checkpoint:
            raise InputError(f"ckpt_path: {config.ckpt_path} was not read; give a file here as --ckpt_path FILE")
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
            now = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.subcommand]
            check_same_settings(folder / "config.yaml", now)
        check_logging(config, self.line.command, self.checkpoint)
        if config.version is not None and (folder / "config.yaml").exists() and not resumes:
            raise InputError(f"version: {folder} is the folder of another run; give another, or resume its last.ckpt")

    def _lock_folder(self, config: Any, folder: Path, resumes: bool) -> None:
        """Check that a logged run's folder can be written, and lock one that is given by name."""
        if config.trainer.logger is False or config.trainer.fast_dev_run:
            return
        require_writable(folder if config.version is not None else folder.parent, "name")
        if config.version is not None and rank() == 0:
            self.lock = RunLock(folder)
            for part in folder.rglob(".*.part") if resumes else ():
                part.unlink(missing_ok=True)  # of a file that was being written when the run was killed

    def instantiate_classes(self) -> None:
        """Build the trainer, the data and the model, and refuse what does not fit together."""
        from gpt2_pl.commands.support.messages import explain_instantiation

        try:
            super().instantiate_classes()
        except Exception as error:
            if (reason := explain_instantiation(error, self.line)) is None:
                raise
            raise InputError(reason) from error
        check_optimizer(self.model.make_optimizer)
        callbacks = callbacks_of(self.trainer)
        for callback in callbacks:
            if hasattr(callback, "check"):
                callback.check(callbacks, self.model)
        check_processes(self.trainer)
        if self.subcommand == "fit":
            check_training(self.trainer, self.model)
        if rank() == 0 and self.checkpoint is None:
            self._warn(callbacks)
        stated, actual = self.line.last("model.num_classes"), getattr(self.datamodule, "num_classes", None)
        if stated is not None and actual is not None and str(stated) != str(actual):
            raise InputError(
                f"model.num_classes is {stated}, and the data have {actual} classes (data.labels); leave it out"
            )

    def _warn(self, callbacks: list[Any]) -> None:
        """Warn of a run that cannot be resumed, and of an evaluation of a model that has not been trained."""
        if self.subcommand == "fit":
            if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
                print(
                    "gpt2-pl: with StochasticWeightAveraging a run cannot be resumed once averaging has begun; with "
                    "lightning.pytorch.callbacks.WeightAveraging it can",
                    file=sys.stderr,
                )
            return
        model: Any = self.model
        untrained = model.base is None or getattr(model, "head_name", None) == "linear"
        brings_head = any(type(surgery).load_head is not Surgery.load_head for surgery in model.surgery)
        if untrained and not brings_head:
            print("gpt2-pl: no ckpt_path is given: the model that is evaluated has not been trained", file=sys.stderr)

    # Building

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the logger and the callbacks of every run in addition to the configured ones."""
        config = self.config_init[self.subcommand]
        trainer = {**config["trainer"], **kwargs}
        callbacks: list[Any] = []
        if trainer["logger"] is not False and not trainer["fast_dev_run"]:
            root = Path(trainer["default_root_dir"] or ".") / RUNS
            self.folder = RunFolder(root, config["name"], config["version"], self.lock)
            callbacks.append(self.folder)
            if trainer["logger"] is True:
                trainer["logger"] = RunTensorBoardLogger(self.folder, config["name"], root)
        self.summary = RunSummary(self.line.files)
        callbacks += [Environment(), Reproducibility(), PredictionWriter(), SampleWriter(), PictureWriter()]
        has_bar = self._add_progress(trainer, callbacks)
        if trainer["logger"]:
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        if self.subcommand == "fit":
            self._add_training(config, trainer, callbacks)
        try:
            made = self._instantiate_trainer(trainer, callbacks)
        except (MisconfigurationException, ImportError, TypeError, ValueError, RuntimeError) as error:
            message = " ".join(str(error).split()).replace("Timer(duration=", "Trainer(max_time=")
            raise InputError(f"trainer: {message}") from None
        # The record follows config.yaml and the last validation, and precedes the checkpoints.
        ends: list[Callback] = [EndOfTraining()] if self.subcommand == "fit" else []
        ends += [Throughput(), self.summary, HyperparameterLogger(self.config_settings(), self.summary)]
        order: list[Callback] = callbacks_of(made)
        place = sum(not isinstance(callback, ResumableModelCheckpoint) for callback in order)
        order[place:place] = [*ends, *([] if has_bar else [EpochLines()])]
        return made

    @staticmethod
    def _add_progress(trainer: dict[str, Any], callbacks: list[Any]) -> bool:
        """Add the bar and the summary of the model in place of Lightning's; return whether there is a bar."""
        configured = trainer["callbacks"] or []
        configured = configured if isinstance(configured, list) else [configured]
        has_bar = any(isinstance(callback, ProgressBar) for callback in configured)
        if not has_bar:
            terminal = sys.stdout is not None and sys.stdout.isatty()
            has_bar = trainer["enable_progress_bar"] is not False and terminal
            callbacks += [RunProgressBar()] if has_bar else []
            trainer["enable_progress_bar"] = has_bar  # else Lightning adds a bar of its own
        if trainer["enable_model_summary"] is not False and not any(isinstance(c, ModelSummary) for c in configured):
            callbacks.append(RunModelSummary())
            trainer["enable_model_summary"] = False  # else Lightning adds its own
        return has_bar

    def _add_training(self, config: Any, trainer: dict[str, Any], callbacks: list[Any]) -> None:
        """Add early stopping, checkpoints and the guard against losses that are not finite."""
        callbacks.append(NonFiniteLossGuard(config["on_non_finite_loss"]))
        monitor, mode = self.model.monitor, self.model.mode
        if config["early_stopping_patience"] is not None:
            callbacks.append(ResumableEarlyStopping(monitor, patience=config["early_stopping_patience"], mode=mode))
        if trainer["enable_checkpointing"] is False or trainer["fast_dev_run"]:
            return
        validates = trainer["limit_val_batches"] != 0
        callbacks += self._checkpoints(monitor if validates else None, mode, config["checkpoint_every_n_steps"])
        self.summary.expects_test = self.can_test
        plugins = trainer["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            trainer["plugins"] = [*plugins, AtomicCheckpointIO()]

    def _checkpoints(self, monitor: str | None, mode: str, every_n_steps: int | None) -> list[ResumableModelCheckpoint]:
        """Return the callbacks of ``best.ckpt``, if scores are monitored, and ``last.ckpt``; the first is tested."""
        shared: dict[str, Any] = {"enable_version_counter": False, "auto_insert_metric_name": False}
        best = (
            [] if monitor is None else [ResumableModelCheckpoint(filename="best", monitor=monitor, mode=mode, **shared)]
        )
        last = ResumableModelCheckpoint(
            filename="last", every_n_steps=every_n_steps, save_on_train_epoch_end=True, on_sigterm=True, **shared
        )
        self.tested, *_ = checkpoints = [*best, last]
        return checkpoints

    def config_settings(self) -> dict[str, Any]:
        """Return the configuration of the run as plain values."""
        return yaml.safe_load(self.parser.dump(self.config, skip_none=True))[self.subcommand]

    # Running

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command and translate its errors; when SIGTERM stops it, print how to resume."""
        if self.trainer.num_devices > 1:
            os.environ[LAUNCHER] = str(os.getpid())
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException:
            if rank() == 0:
                print(f"gpt2-pl: stopped by SIGTERM{self._resume_advice()}", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM) from None
        except Exception as error:
            from gpt2_pl.commands.support.run_failures import explain_run_failure

            if (reason := explain_run_failure(error, self.line, self.config[subcommand], self.trainer)) is None:
                raise
            raise InputError(reason) from error
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.trainer.strategy.barrier()  # a process that ends closes its connections to those that still work
            torch.distributed.destroy_process_group()

    def _resume_advice(self) -> str:
        """Return the end of the line that says that a training was stopped."""
        folder = None if self.folder is None else self.folder.path
        return "" if self.subcommand != "fit" or folder is None else resume_advice(self.trainer, Path(folder))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict":
            kwargs["return_predictions"] = False
        return {**kwargs, "weights_only": True}

    @property
    def can_test(self) -> bool:
        """Whether there is a test set and the task has a test step."""
        return self.datamodule.has_split("test") and is_overridden("test_step", self.model)

    def after_fit(self) -> None:
        """Test the best checkpoint if there is a test set, then print the report."""
        trainer, tested = self.trainer, getattr(self, "tested", None)
        if trainer.interrupted:
            return
        note = early_end(trainer, self.summary.has_trained)  # before the test resets the state of training
        if tested is not None and tested.best_model_path and self.can_test:
            if tested.monitor is None and trainer.is_global_zero:
                print("gpt2-pl: trainer.limit_val_batches is 0: last.ckpt is tested", file=sys.stderr)
            path = tested.best_model_path
            trainer.test(self.model, self.datamodule, ckpt_path=path, weights_only=True, verbose=False)
        self._report(note)

    def after_validate(self) -> None:
        """Print the report."""
        self._report()

    after_test = after_validate

    def after_predict(self) -> None:
        """Print the report, and whether the task has predictions to write."""
        callbacks = callbacks_of(self.trainer)
        if any(callback.wrote for callback in callbacks if isinstance(callback, PredictionWriter)):
            self._report()
        else:
            self._report(f"; no predictions were written: {class_path(type(self.model))} gives no row_table")

    def _report(self, note: str = "") -> None:
        best_path = getattr(getattr(self, "tested", None), "best_model_path", "")
        print_report(self.trainer, self.model, self.summary, self.line.command, self.can_test, note, best_path)
