"""fit, validate, test and predict, through LightningCLI."""

from __future__ import annotations

import inspect
import os
import pydoc
import re
import shlex
import signal
import sys
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from gpt2_pl.callbacks import (
    AtomicCheckpointIO,
    EndOfTraining,
    Environment,
    EpochLines,
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
    run_folder,
)
from gpt2_pl.commands.support.config_merge import (
    CommandLine,
    check_name,
    check_order,
    check_ranges,
    check_same_settings,
    run_to_resume,
    validate_strategy_combination,
    with_hyperparameters,
)
from gpt2_pl.commands.support.dumps import NOTES, readable
from gpt2_pl.commands.support.process import LAUNCHER, interrupts, program, rank
from gpt2_pl.commands.support.run_dir import RunTensorBoardLogger, SaveRunConfig
from gpt2_pl.commands.support.training_checks import check_optimizer, check_processes, check_training
from gpt2_pl.errors import InputError, causes, describe_failure, printable
from gpt2_pl.experiments.run import RUNS
from gpt2_pl.experiments.run_lock import RunLock
from gpt2_pl.filesystem import atomic_write, require_writable
from gpt2_pl.model import GPT2Config
from gpt2_pl.surgery import Surgery
from gpt2_pl.tasks import Task
from gpt2_pl.tasks.averaging import blocks_resuming
from gpt2_pl.utils.registry import class_path
from gpt2_pl.utils.yaml_json import check_yaml

_load_yaml = jsonargparse.get_loader("yaml")


def _load_bounded_yaml(text: str) -> Any:
    """Load YAML as the parser does, within limits: also files that files name, and the values of flags.

    A value that begins with ``#``, such as the name of a file, is text and not a comment.
    """
    check_yaml(text, "a configuration")
    value = _load_yaml(text)
    return text if value is None and text.startswith("#") and "\n" not in text else value


jsonargparse.set_loader("yaml", _load_bounded_yaml, exceptions=(yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, fifty lines of usage would hide it, and whose files are whole.

    Flags have their whole names: what reads them before they are parsed knows no other.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    introduction = ""
    help_key = ""  # of the option --KEY.help that is given; nested parsers do not know the keys above theirs

    def add_class_arguments(self, class_type: Any, nested_key: Any = None, **kwargs: Any) -> Any:
        """Add a class's arguments; for ``--KEY.help CLASS`` by their whole keys, and with the class's description."""
        is_help = (self.description or "").startswith(f"Help for --{nested_key}.help=")
        if is_help and f".{self.help_key}".endswith(f".{nested_key}"):
            self.description = (self.description or "").replace(f"--{nested_key}", f"--{self.help_key}", 1)
            nested_key = self.help_key
        added = super().add_class_arguments(class_type, nested_key, **kwargs)
        if is_help and not added:  # no group of arguments shows the description
            title = (inspect.getdoc(class_type) or str(class_type)).partition("\n")[0].rstrip(".")
            self.add_argument_group(title, "It has no arguments.")
        return added

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help: how to choose a run's parts, then the keys."""
        return self.introduction + super().format_help(*args, **kwargs)

    def print_usage(self, file: Any = None) -> None:
        """Print nothing."""

    def dump(self, namespace: Any, *args: Any, **kwargs: Any) -> str:
        """Dump a configuration so that it can be read back; see :func:`gpt2_pl.commands.support.dumps.readable`."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=NOTES)
            text = super().dump(namespace, *args, **kwargs)
        return readable(text, namespace)

    def save(self, namespace: Any, path: Any, *_: Any, **__: Any) -> None:
        """Write a configuration, with what is null, in place of the file that is there.

        Raises:
            RunError: there is no room for it; the file that was there is as it was.
        """
        with atomic_write(Path(path)) as file:
            file.write(self.dump(namespace, skip_none=False))


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
    """LightningCLI with this library's run folder, checkpoints, early stopping and account of the run."""

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

        The parsers of the other commands would be built in vain. ``weights_only`` is always True.
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
        """Keys of the run itself."""
        if isinstance(parser, Parser):
            parser.introduction = _INTRODUCTION.format(command=self.line.command)
            parser.usage = f"gpt2-pl {self.line.command} --config CONFIG [--config CONFIG ...] [--KEY VALUE ...]"
        parser.add_argument("--name", type=str, default="run", help=f"the run's folder: {RUNS}/NAME/version_N")
        parser.add_argument(
            "--version",
            type=str | None,
            default=None,
            help=f"the run's folder is {RUNS}/NAME/VERSION, for a number N version_N; by default version_N with the "
            "next free N, and that of the run that goes on where ckpt_path is a last.ckpt",
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
            help="also write checkpoints/last.ckpt every N optimizer steps, and not after every epoch only",
        )
        parser.add_argument(
            "--on_non_finite_loss",
            type=Literal["error", "skip"],
            default="error",
            help="what to do at a loss that is NaN or infinite: stop, or leave the step out and count it",
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
            if reason is not None:  # of what reads a file within the parser
                raise reason from None
            raise InputError(explain(str(error), self.line, own)) from None

    def _parse_ckpt_path(self) -> None:
        """The checkpoint's hyperparameters lie under files and flags already."""

    def _set_seed(self) -> None:
        """Seed everything, or nothing where the seed is False."""
        seed = self.config[self.subcommand].seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise InputError(f"seed_everything is {seed}; it must be a number from 0 to {2**32 - 1}, true or false")
        if seed is False:
            os.environ.pop("PL_GLOBAL_SEED", None)  # of whoever started this process
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Settle what one key takes from another, so that config.yaml says what the run used."""
        config = self.config[self.subcommand]
        if config.ckpt_path != self.checkpoint:
            raise InputError(f"ckpt_path: {config.ckpt_path} was not read; give a file here as --ckpt_path FILE")
        check_ranges(config)
        check_name(config.name)
        if self.subcommand != "fit" and not self.line.has_flag("version"):
            config.version = None  # a file's is that of the run which it is of
        if config.version is not None:
            check_name(config.version, "version")
            if re.fullmatch(r"-\d+", config.version):
                raise InputError(f"version is {config.version}; it must be a number from 0 or a folder's name")
            if re.fullmatch(r"\d{1,9}", config.version):  # as Lightning names the folder of a number
                config.version = f"version_{int(config.version)}"
        validate_strategy_combination(self.line)
        for key in ("model", "data"):
            if config.get(key) is None:
                raise InputError(f"no {key} is configured; begin with a task's file: --config configs/task/sst5.yaml")
        model, data = config.model.init_args, config.data.init_args
        if model.get("config") is not None:
            try:
                GPT2Config(**vars(model.config))
            except (TypeError, ValueError) as error:
                raise InputError(f"model.config: {error}") from None
        if data.get("tokenizer", "given") is None and model.get("base") is not None:
            data.tokenizer = model.base
        trainer = config.trainer
        if trainer.precision is None and not _has_precision(trainer.plugins):
            trainer.precision = best_precision(trainer.accelerator)
        if trainer.use_distributed_sampler is True:
            trainer.use_distributed_sampler = False  # our loaders share the rows out themselves
        if trainer.logger is None:
            trainer.logger = True
        root = Path(trainer.default_root_dir or ".") / RUNS
        stopped = None if self.checkpoint is None else run_to_resume(Path(self.checkpoint), root)
        if self.subcommand == "fit" and stopped is not None and not self.line.has_flag("name", "version"):
            config.name, config.version = str(stopped.parent), stopped.name
        folder = root / config.name / str(config.version)
        if trainer.logger is not False and not trainer.fast_dev_run:
            require_writable(folder if config.version is not None else folder.parent, "name")
            if config.version is not None and rank() == 0:
                self.lock = RunLock(folder)
                for part in folder.rglob(".*.part") if stopped == folder.relative_to(root) else ():
                    part.unlink(missing_ok=True)  # of a file that was being written when the run was killed
        if self.subcommand == "fit" and stopped == folder.relative_to(root):
            now = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.subcommand]
            check_same_settings(folder / "config.yaml", now)
        if self.subcommand == "predict" and trainer.logger is False:
            raise InputError("trainer.logger is false, and what is predicted goes into the folder of a logged run")
        if self.subcommand == "fit" and trainer.logger is False and not trainer.fast_dev_run:
            self._check_place_without_folder(trainer)
        if config.early_stopping_patience is not None and trainer.limit_val_batches == 0:
            raise InputError(
                "trainer.limit_val_batches is 0, and early_stopping_patience waits for validation scores; "
                "give --early_stopping_patience null"
            )
        if config.version is not None and (folder / "config.yaml").exists() and stopped != folder.relative_to(root):
            raise InputError(f"version: {folder} holds a run already; give another, or go on with its last.ckpt")

    def _check_place_without_folder(self, trainer: Any) -> None:
        """Refuse to overwrite the checkpoints of another run that had no folder of its own either."""
        folder = Path(trainer.default_root_dir or ".") / "checkpoints"
        resumes = self.checkpoint is not None and Path(self.checkpoint).resolve().parent == folder.resolve()
        for file in (folder / "best.ckpt", folder / "last.ckpt"):
            if trainer.enable_checkpointing is not False and not resumes and file.exists():
                raise InputError(
                    f"trainer.logger is false, so that the run has no folder of its own, and {file} exists already; "
                    "move it, or leave trainer.logger out"
                )

    def instantiate_classes(self) -> None:
        """Build everything; a number of classes that is not the data's is refused."""
        from gpt2_pl.commands.support.messages import explain_instantiation

        try:
            super().instantiate_classes()
        except Exception as error:
            if (reason := explain_instantiation(error, self.line)) is None:
                raise
            raise InputError(reason) from error
        check_optimizer(self.model.make_optimizer)
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if hasattr(callback, "check"):
                callback.check(callbacks, self.model)
        check_processes(self.trainer)
        if self.subcommand == "fit":
            check_training(self.trainer, self.model)
            if (
                self.checkpoint is None
                and rank() == 0
                and any(isinstance(c, StochasticWeightAveraging) for c in callbacks)
            ):
                print(
                    "gpt2-pl: with StochasticWeightAveraging a run cannot be resumed once averaging has begun; with "
                    "lightning.pytorch.callbacks.WeightAveraging it can",
                    file=sys.stderr,
                )
        model: Any = self.model
        untrained = model.base is None or getattr(model, "head_name", None) == "linear"
        brings_head = any(type(surgery).load_head is not Surgery.load_head for surgery in model.surgery)
        asked = self.subcommand != "fit" and rank() == 0
        if asked and self.checkpoint is None and untrained and not brings_head:
            print("gpt2-pl: no ckpt_path is given: what is scored has not been trained", file=sys.stderr)
        stated, actual = self.line.last("model.num_classes"), getattr(self.datamodule, "num_classes", None)
        if stated is not None and actual is not None and str(stated) != str(actual):
            raise InputError(
                f"model.num_classes is {stated}, and the data have {actual} classes (data.labels); leave it out"
            )

    # Building

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with our logger and callbacks beside the configured ones."""
        config = self.config_init[self.subcommand]
        trainer = {**config["trainer"], **kwargs}
        callbacks: list[Any] = []
        if trainer["logger"] is not False and not trainer["fast_dev_run"]:
            root = Path(trainer["default_root_dir"] or ".") / RUNS
            self.folder = RunFolder(root, config["name"], config["version"], self.lock)
            callbacks.append(self.folder)
            if trainer["logger"] is True:
                trainer["logger"] = RunTensorBoardLogger(self.folder, config["name"], root)
        self.summary = RunSummary(self.config_settings(), self.line.files)
        callbacks += [
            Environment(),
            Reproducibility(),
            self.summary,
            PredictionWriter(),
            SampleWriter(),
            PictureWriter(),
        ]
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
        if trainer["logger"]:
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        if self.subcommand == "fit":
            callbacks.append(NonFiniteLossGuard(config["on_non_finite_loss"]))
            monitor, mode = self.model.monitor, self.model.mode
            if config["early_stopping_patience"] is not None:
                callbacks.append(ResumableEarlyStopping(monitor, patience=config["early_stopping_patience"], mode=mode))
            if trainer["enable_checkpointing"] is not False and not trainer["fast_dev_run"]:
                validates = trainer["limit_val_batches"] != 0
                callbacks += self._checkpoints(monitor if validates else None, mode, config["checkpoint_every_n_steps"])
                self.summary.test_follows = self.can_test
                plugins = trainer["plugins"] or []
                plugins = plugins if isinstance(plugins, list) else [plugins]
                if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
                    trainer["plugins"] = [*plugins, AtomicCheckpointIO()]
        try:
            made = self._instantiate_trainer(trainer, callbacks)
        except (MisconfigurationException, ImportError, TypeError, ValueError, RuntimeError) as error:
            message = " ".join(str(error).split()).replace("Timer(duration=", "Trainer(max_time=")
            raise InputError(f"trainer: {message}") from None
        order: list[Callback] = made.callbacks  # type: ignore[attr-defined]
        order.remove(self.summary)  # its account begins behind config.yaml, and ends before the checkpoints
        behind = sum(not isinstance(callback, ResumableModelCheckpoint) for callback in order)
        last_validation: list[Callback] = [EndOfTraining()] if self.subcommand == "fit" else []
        order[behind:behind] = [*last_validation, self.summary, *([] if has_bar else [EpochLines()])]
        return made

    def _checkpoints(self, monitor: str | None, mode: str, every_n_steps: int | None) -> list[ResumableModelCheckpoint]:
        """``best`` by ``monitor``, where there is one, and ``last``; the first of them is what will be tested."""
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
        """The run's configuration as plain values."""
        return yaml.safe_load(self.parser.dump(self.config, skip_none=True))[self.subcommand]

    # Running

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; asked to end by SIGTERM, say how to go on."""
        if self.trainer.num_devices > 1:
            os.environ[LAUNCHER] = str(os.getpid())
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException:
            if rank() == 0:
                print(f"gpt2-pl: stopped by SIGTERM{self._resume_advice()}", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM) from None
        except Exception as error:
            from gpt2_pl.commands.support.messages import explain_fault, explain_use

            fault = explain_fault(error, self.line)
            if fault is not None and (isinstance(error, MisconfigurationException) or describe_failure(error)):
                raise InputError(fault) from error  # its own line would name neither file nor class
            if fault is not None:
                raise
            if (reason := explain_use(error, self.line, self.config[subcommand], self.trainer)) is not None:
                raise InputError(reason) from error
            message = " ".join(str(error).split())
            if isinstance(error, MisconfigurationException) or message.startswith("Early stopping conditioned on"):
                raise InputError(f"trainer: {message}") from error
            raise
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.trainer.strategy.barrier()  # none ends, and takes its connections along, while another is at work
            torch.distributed.destroy_process_group()

    def _resume_advice(self) -> str:
        """The end of the line that says that a training was stopped: the command that resumes it."""
        folder = None if self.folder is None else self.folder.path
        if self.subcommand != "fit" or folder is None:
            return ""
        last = Path(folder, "checkpoints", "last.ckpt")
        if not last.is_file():
            return " before the first checkpoint"
        if blocks_resuming(self.trainer):
            return "; it cannot be resumed, because StochasticWeightAveraging has begun to average"
        command = shlex.join([*program(), "fit", "--config", f"{folder}/config.yaml", "--ckpt_path", str(last)])
        return f"; go on with {printable(command)}"

    def _ending(self) -> str:
        """Return why training has made fewer epochs than it was asked for, in a line of its own, or nothing."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        stopping = (one for one in callbacks if isinstance(one, EarlyStopping) and one.wait_count >= one.patience)
        nothing = "" if self.summary.began else "nothing was left to train: "
        if (early := next(stopping, None)) is not None:
            times = f"{early.wait_count} validation{'s' if early.wait_count > 1 else ''}"
            return f"\n  {nothing}stopped early, {early.monitor} has not improved in {times}"
        if nothing:
            return f"\n  {nothing}the checkpoint is at or beyond trainer.max_epochs or trainer.max_steps"
        return ""

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
        """Test the best checkpoint where there is something to test, then say what was run and where it lies."""
        trainer, tested = self.trainer, getattr(self, "tested", None)
        if trainer.interrupted:
            return
        ending = self._ending()  # before the test resets what is known of training
        if tested is not None and tested.best_model_path and self.can_test:
            if tested.monitor is None and trainer.is_global_zero:
                print("gpt2-pl: trainer.limit_val_batches is 0: last.ckpt is tested", file=sys.stderr)
            path = tested.best_model_path
            trainer.test(self.model, self.datamodule, ckpt_path=path, weights_only=True, verbose=False)
        self._report(ending)

    def after_validate(self) -> None:
        """Say where the scores lie."""
        self._report()

    after_test = after_validate

    def after_predict(self) -> None:
        """Say where the predictions lie, or that the task gives none to write."""
        writers = (callback for callback in self.trainer.callbacks if isinstance(callback, PredictionWriter))  # type: ignore[attr-defined]
        if any(writer.wrote for writer in writers):
            self._report()
        else:
            self._report(f"; no predictions were written: {class_path(type(self.model))} gives no row_table")

    def _report(self, ending: str = "") -> None:
        folder = run_folder(self.trainer)
        if not self.trainer.is_global_zero:
            return
        from rich.console import Console

        console = Console()
        if self.summary.epochs:
            console.print(self.summary.table(self.model))
            console.print(self.summary.layer_table())
        for name, value in self.summary.final_scores(self.model).items():
            if "/" in name:
                console.print(f"{printable(name):16} {value:.4f}", markup=False)
        if folder is not None:
            files = ", ".join(sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith(".")))
            done = printable(f"\n{self.subcommand} is done: {folder}{ending}\n  {files}", keep="\n")
            console.print(done, soft_wrap=True, highlight=False, markup=False)
            checkpoints = (Path(folder, "checkpoints", f"{name}.ckpt") for name in ("best", "last"))
            if (best := next(filter(Path.is_file, checkpoints), None)) is not None:
                console.print(f"Its checkpoint:  {best.stat().st_size / 1e6:.1f} MB", highlight=False)
                again = "test" if self.can_test else "validate"
                command = shlex.join([*program(), again, "--config", f"{folder}/config.yaml", "--ckpt_path", str(best)])
                console.print(f"Score it again:  {printable(command)}", soft_wrap=True, highlight=False, markup=False)
            for logger in self.trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    command = shlex.join(["tensorboard", "--logdir", str(logger.save_dir)])
                    console.print(f"Look at it:      {printable(command)}", soft_wrap=True, markup=False)
        elif self.trainer.logger is None:
            console.print(f"\n{self.subcommand} is done; trainer.logger is false: there is no run folder")
            if self.subcommand == "fit" and (path := getattr(getattr(self, "tested", None), "best_model_path", "")):
                console.print(f"Its checkpoint:  {printable(path)}", soft_wrap=True, highlight=False, markup=False)


def _has_precision(plugins: Any) -> bool:
    """Whether one of the configured plugins is a precision."""
    paths = [
        one.class_path for one in (plugins if isinstance(plugins, list) else [plugins]) if hasattr(one, "class_path")
    ]
    classes = [pydoc.locate(path) for path in paths]
    return any(inspect.isclass(one) and issubclass(one, Precision) for one in classes)


def best_precision(accelerator: Any) -> str:
    """``bf16-mixed`` where the hardware multiplies bfloat16 matrices, else ``32-true``."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("auto", "cpu"):
        capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16-mixed" if capable else "32-true"
    return "32-true"
