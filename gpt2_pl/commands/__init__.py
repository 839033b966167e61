"""The command line, ``gpt2-pl``: fit, validate, test and predict from overlaid configuration files."""

from __future__ import annotations

import gc
import os
import sys
from argparse import ArgumentError
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from gpt2_pl.commands.support.process import guard_streams, interrupts, output_failure, shorten_warnings, watch_launcher

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMMANDS = {
    "fit": "train a model; then test its best checkpoint where there is a test set",
    "validate": "score a checkpoint on the validation set",
    "test": "score a checkpoint on the test set",
    "predict": "write the class probabilities of unlabelled rows",
    "classify": "say of every row of a file what a run's model takes it for",
    "generate": "continue prompts with a run's language model",
    "compare": "set runs side by side: scores over seeds, differences and how sure they are, cost",
    "sweep": "run a grid of tasks, strategies and seeds, or what is left of it",
    "configs": "list, print or copy the configurations that come with the library",
    "export": "write a run's model as a folder for transformers or peft",
}
_HELP = """usage: gpt2-pl COMMAND --config FILE [--config FILE ...] [--KEY VALUE ...]
       gpt2-pl classify RUN --input FILE --out FILE
       gpt2-pl generate RUN --prompt_file FILE --out FILE
       gpt2-pl compare RUN RUN ... --out FOLDER
       gpt2-pl sweep FILE.yaml
       gpt2-pl export RUN --format hf|peft --out FOLDER
       gpt2-pl configs [list | show NAME | copy NAME [FOLDER]]

{commands}

Configuration files and flags count from left to right, later over earlier:

  gpt2-pl fit --config quickstart
  gpt2-pl fit --config task/sst5 --config strategy/linear_probe --model.base gpt2
  gpt2-pl test --config RUN/config.yaml --ckpt_path RUN/checkpoints/best.ckpt

A configuration is a file, or the name of one that comes with the library.

A run leaves its configuration, checkpoints, scores, predictions and TensorBoard events in
lightning_logs/NAME/version_N. `gpt2-pl COMMAND --help` lists the keys,
and `gpt2-pl fit --model.help CLASS` and `--data.help CLASS` those of a task and of its data.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Input that cannot be used ends it with one line and exit status 2; a run that cannot go on and a failure of the
    machine with one line and 1; Ctrl-C with one line and 130.
    """
    alone = args is None  # the process is this program's
    try:
        if alone:
            guard_streams()
            interrupts.install()
            watch_launcher()
            shorten_warnings()
        _main(list(sys.argv[1:] if args is None else args), alone)
    except BaseException as error:
        from gpt2_pl.errors import is_interrupt

        code = error.code if isinstance(error, SystemExit) else 1
        if code != 130 and is_interrupt(error):  # with 130, a command has printed a line of its own
            interrupts.report()
            raise SystemExit(130) from None
        if code:
            raise
    finally:
        interrupts.advice = str
    if alone and (failure := output_failure()) is not None:
        _fail(f"standard output: {failure.strerror}", 1)


def _main(args: list[str], alone: bool) -> None:
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # has torch execute pickles where nobody forbids it
    os.environ.pop("JSONARGPARSE_DEFAULT_ENV", None)  # has the parser take settings from the environment
    if not args or args[0] in ("-h", "--help", "--version"):
        from gpt2_pl import __version__

        commands = "\n".join(f"  {name:10}{text}" for name, text in _COMMANDS.items())
        print(f"gpt2-pl {__version__}" if args[:1] == ["--version"] else _HELP.format(commands=commands), end="\n")
        return
    if args[0] not in _COMMANDS:
        from gpt2_pl.errors import did_you_mean

        near = did_you_mean(args[0], _COMMANDS) or ";"
        _fail(f"unknown command {args[0]!r}{near} commands are {', '.join(_COMMANDS)}")
    try:
        os.getcwd()
    except OSError as error:
        _fail(f"the working folder cannot be used: {error.strerror}; change to one that exists")
    reserve = bytearray(2**24)  # of memory, given up when there is none, to say so
    try:
        if args[0] in ("classify", "compare", "configs", "export", "generate", "sweep"):
            _imported(args[0], alone).main(args[1:])
        else:
            _run(args, alone)
    except Exception as error:
        del reserve
        _end(error)


def _end(error: Exception) -> NoReturn:
    """End with one line where the reason of an error is known; what is left is a fault of this program's."""
    from gpt2_pl.errors import InputError, RunError, describe_failure, is_interrupt

    if is_interrupt(error):
        raise KeyboardInterrupt from None
    if os.environ.get("GPT2_PL_TRACEBACK", "0") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, ArgumentError):
        _fail(" ".join(str(error).split()))
    cause: BaseException | None = error  # the parser wraps what a class raises in errors of its own
    while cause is not None and not isinstance(cause, InputError | RunError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        _fail(str(cause), 2 if isinstance(cause, InputError) else 1)
    if (failure := describe_failure(error)) is not None:
        _fail(failure, 1)
    reason = str(error).partition("\n")[0]
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):  # torch.distributed's, while processes meet
        _fail(f"the other processes of this run did not come, and so this one ends: {reason}", 1)
    if isinstance(error, RuntimeError) and (" by peer" in reason or "gloo/transport" in reason):
        _fail("another process of this run has ended, and so does this one; go on with its last.ckpt", 1)
    raise error


def _fail(message: str, status: int = 2) -> NoReturn:
    from gpt2_pl.errors import InputError

    print(f"gpt2-pl: error: {InputError(message)}", file=sys.stderr)  # as one escaped line of bounded length
    sys.stderr.flush()
    raise SystemExit(status)


def _run(args: list[str], alone: bool) -> None:
    import logging
    import warnings

    noise = (
        "LightningCLI's args parameter",
        ".*does not have many workers",
        ".*LeafSpec",
        ".*is not supported by the model summary",
        "Checkpoint directory .* exists and is not empty",  # a run goes on in its own folder
        ".*in eval mode at the start of training",  # a frozen GPT-2 is meant to be
        ".*your dataloader is not resumable",  # ours goes on with the batch that follows
        "When using `Trainer.accumulate_grad_batches != 1.` and overriding",  # our hooks are those of a whole step
        "FSDP2-wrapped module .* returned a view",  # which nothing changes in place
        "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",  # each command has its own
        r"The number of training batches \(\d+\) is smaller than the logging interval",  # an epoch's scores are logged
        "SWA is currently only supported every epoch. Found LRSchedulerConfig",  # ours is of steps
        "You're using the WeightAveraging callback with a model that overrides the configure_model",  # never sharded
        "You're using the WeightAveraging callback, but loading a checkpoint outside the 'fit' stage",  # of averages
    )
    for message in noise:
        warnings.filterwarnings("ignore", message=message)
    trainer_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    # advertisements; a device that is not used; what a line of our own says
    quiet = (
        *("Tip: ", "TPU available", "Detected KeyboardInterrupt"),
        "You're using the WeightAveraging callback, but saving a checkpoint outside",
        "Found current_model_state in the checkpoint",
    )
    trainer_log.addFilter(lambda record: not any(words in record.getMessage() for words in quiet))
    train = _imported("lightning_cli", alone)
    libraries = r"(lightning|torch|torchmetrics|jsonargparse)(\.|$)"  # Lightning, when imported, shows its own
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=libraries)
    train.GPT2CLI(args=args)


def _imported(command: str, alone: bool) -> Any:
    """The module of a command. In a process of its own, what it imports stays until the end: the garbage collector need
    not look at it, now or later, which saves a fifth of the start or more."""
    if not alone:
        return import_module(f"gpt2_pl.commands.{command}")
    gc.disable()
    module = import_module(f"gpt2_pl.commands.{command}")
    gc.freeze()
    gc.enable()
    return module
