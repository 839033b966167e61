"""Entry point of the command line.

usage: gpt2-pl COMMAND --config FILE [--config FILE ...] [--KEY VALUE ...]
       gpt2-pl classify RUN --text TEXT | --input FILE --out FILE
       gpt2-pl generate RUN --prompt TEXT | --prompt_file FILE --out FILE
       gpt2-pl chat RUN
       gpt2-pl demo RUN [RUN]
       gpt2-pl submit RUN --format cs224n
       gpt2-pl compare RUN RUN ... [--margin M] [--out FOLDER] [--check FILE.yaml]
       gpt2-pl power RUN RUN ... --difference D
       gpt2-pl references RUN
       gpt2-pl inspect RUN [RUN] --out FOLDER
       gpt2-pl sweep FILE.yaml
       gpt2-pl archive RUN RUN ... --out FILE.tar.xz
       gpt2-pl verify RUN [--steps N|all]
       gpt2-pl export RUN --format hf|peft --out FOLDER
       gpt2-pl merge "RUN + 0.5*RUN" --out FOLDER
       gpt2-pl configs [list | show NAME | copy NAME [FOLDER]]

  fit         train a model and, if there are test data, test its best checkpoint
  validate    evaluate a checkpoint on the validation set
  test        evaluate a checkpoint on the test set
  predict     write the class probabilities of unlabeled rows
  classify    classify texts or every row of a file with a trained model
  generate    continue prompts with a trained language model
  chat        type texts, and see their classes or continuations
  demo        try a model, or two side by side, on a page in the browser
  submit      write the prediction files that a course asks for
  compare     compare runs: differences with intervals and verdicts, costs, figures
  power       plan an experiment: what numbers of seeds and texts can show
  references  compute baselines for the data of a run, such as a bag of words
  inspect     show where a run errs: worst rows, confusions, calibration, slices
  sweep       run or resume a grid of tasks, strategies and seeds
  archive     pack the records of runs, without weights, into a small file for compare
  verify      repeat the first steps of a run and compare the weights bit for bit
  configs     list, print or copy the included configuration files
  export      convert a trained model for transformers or peft
  merge       combine LoRA adapters of one base linearly into one adapter

Configuration files and flags apply from left to right; later values override earlier ones:

  gpt2-pl fit --config quickstart
  gpt2-pl fit --config task/sst5 --config strategy/linear_probe --model.base gpt2
  gpt2-pl fit --task sst5 --strategy linear_probe --model.base gpt2    # the same
  gpt2-pl test --config RUN/config.yaml --ckpt_path RUN/checkpoints/best.ckpt

FILE is a path or the name of an included configuration (`gpt2-pl configs` lists them).

A run writes its configuration, checkpoints, scores, predictions and TensorBoard events to
lightning_logs/NAME/version_N. `gpt2-pl COMMAND --help` lists the keys of a command,
`gpt2-pl fit --model.help CLASS` those of a task and `--data.help CLASS` those of its data.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from gpt2_pl.commands.support.process import interrupts, output_failure, set_up_process
from gpt2_pl.commands.support.terminal import wrapped

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
_COMMANDS = (
    *_TRAINER_COMMANDS,
    "classify",
    "generate",
    "chat",
    "demo",
    "submit",
    "compare",
    "power",
    "references",
    "inspect",
    "sweep",
    "archive",
    "verify",
    "configs",
    "export",
    "merge",
)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Errors end it with a one-line message: invalid input with exit status 2, a failed run or machine with status 1, and
    Ctrl-C with status 130.

    Args:
        args: arguments of the program. If None, they are those of ``sys.argv``, and the process belongs to this
            program: its streams, signal handlers and garbage collector are set up for it.
    """
    owns_process = args is None
    try:
        if owns_process:
            set_up_process()
        _main(list(sys.argv[1:] if args is None else args))
    except BaseException as error:
        from gpt2_pl.errors import is_interrupt

        code = error.code if isinstance(error, SystemExit) else 1
        if code != 130 and is_interrupt(error):  # with status 130, the command has already printed a message
            interrupts.report()
            raise SystemExit(130) from None
        if code:
            raise
    finally:
        interrupts.advice = str
    if owns_process and (failure := output_failure()) is not None:
        _fail(f"standard output: {failure.strerror}", 1)


def _main(args: list[str]) -> None:
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # it would make torch.load execute pickles
    os.environ.pop("JSONARGPARSE_DEFAULT_ENV", None)  # it would make the parser read environment variables
    if not args or args[0] in ("-h", "--help", "--version"):
        from gpt2_pl import __version__

        print(f"gpt2-pl {__version__}" if args[:1] == ["--version"] else (__doc__ or "").partition("\n\n")[2])
        return
    if args[0] not in _COMMANDS:
        from gpt2_pl.errors import did_you_mean

        near = did_you_mean(args[0], _COMMANDS) or ";"
        _fail(f"unknown command {args[0]!r}{near} commands are {', '.join(_COMMANDS)}")
    try:
        os.getcwd()
    except OSError as error:
        _fail(f"the working directory cannot be used: {error.strerror}; change to one that exists")
    reserve = bytearray(2**24)  # freed after an out-of-memory error, so that its message can be printed
    try:
        if args[0] in _TRAINER_COMMANDS:
            _run_trainer_command(args)
        else:
            _import_command(args[0]).main(args[1:])
    except Exception as error:
        del reserve
        _exit_with_error(error, args[0])


def _exit_with_error(error: Exception, command: str) -> NoReturn:
    """Exit with a one-line message if the cause of an error is known; otherwise it is a defect and is raised again."""
    from gpt2_pl.commands.support.parser import with_dashes
    from gpt2_pl.errors import InputError, RunError, causes, describe_failure, is_interrupt

    if is_interrupt(error):
        raise KeyboardInterrupt from None
    if os.environ.get("GPT2_PL_TRACEBACK", "0") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    for cause in causes(error):  # the parser wraps the errors of classes
        if isinstance(cause, InputError):
            _fail(str(cause) if command in _TRAINER_COMMANDS else with_dashes(cause))
        if isinstance(cause, RunError):
            _fail(str(cause), 1)
    if (failure := describe_failure(error)) is not None:
        _fail(failure, 1)
    reason = str(error).partition("\n")[0]
    if any(base.__name__ == "DistError" for base in type(error).__mro__):  # torch.distributed's, at initialization
        _fail(f"the other processes of this run did not connect: {reason}", 1)
    if isinstance(error, RuntimeError) and (" by peer" in reason or "gloo/transport" in reason):
        _fail("another process of this run has ended; resume the run from its last.ckpt", 1)
    raise error


def _fail(message: str, status: int = 2) -> NoReturn:
    from gpt2_pl.errors import InputError

    text = wrapped(f"gpt2-pl: error: {InputError(message)}", sys.stderr)  # an error escapes and shortens its message
    print(text, file=sys.stderr, flush=True)
    raise SystemExit(status)


def _run_trainer_command(args: list[str]) -> None:
    filter_messages()
    _import_command("lightning_cli").GPT2CLI(args=args)


def filter_messages() -> None:
    """Hide warnings and messages of Lightning and torch that do not apply to this program."""
    import logging
    import warnings

    ignored_warnings = (
        "LightningCLI's args parameter",
        ".*does not have many workers",
        ".*LeafSpec",
        ".*is not supported by the model summary",
        "Checkpoint directory .* exists and is not empty",  # a run is resumed in its own folder
        ".*in eval mode at the start of training",  # intended for a frozen GPT-2
        ".*your dataloader is not resumable",  # TrainingLoader resumes at the next batch
        "When using `Trainer.accumulate_grad_batches != 1.` and overriding",  # tasks override hooks of complete steps
        "FSDP2-wrapped module .* returned a view",  # the view is not modified in place
        "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",  # commands differ in callbacks
        r"The number of training batches \(\d+\) is smaller than the logging interval",  # scores are logged per epoch
        "Metric `SpearmanCorrcoef` will save all targets",  # two numbers for every row
        "SWA is currently only supported every epoch. Found LRSchedulerConfig",  # schedules have an interval of steps
        "You're using the WeightAveraging callback with a model that overrides the configure_model",  # never sharded
        "You're using the WeightAveraging callback, but loading a checkpoint outside the 'fit' stage",  # of averages
    )
    for message in ignored_warnings:
        warnings.filterwarnings("ignore", message=message)
    trainer_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    ignored_records = (  # advertisements, unused devices, and messages that this program prints in its own words
        *("Tip: ", "TPU available", "Detected KeyboardInterrupt"),
        "You're using the WeightAveraging callback, but saving a checkpoint outside",
        "Found current_model_state in the checkpoint",
        *("Restoring states from the checkpoint path at", "Loaded model weights from the checkpoint at"),
    )
    trainer_log.addFilter(lambda record: not any(text in record.getMessage() for text in ignored_records))
    import_module("lightning.pytorch")
    libraries = r"(lightning|torch|torchmetrics|jsonargparse)(\.|$)"  # importing Lightning enables its warnings
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=libraries)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide what Lightning reports of a run, such as its seed and devices; its errors are shown."""
    import logging

    names = ("lightning.fabric", "lightning.pytorch")
    loggers = [logging.getLogger(f"{name}{part}") for name in names for part in ("", ".utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _import_command(command: str) -> Any:
    """Import the module of a command.

    Garbage collection is disabled until then if the process belongs to this program: all imported objects live until
    its end. Excluding them from the collection saves at least a fifth of the start-up time.
    """
    module = import_module(f"gpt2_pl.commands.{command}")
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    return module
