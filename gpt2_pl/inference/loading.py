"""Loading of the trained model and the tokenizer of a run, or of an exported or pretrained folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.errors import InputError, describe_failure, nearest
from gpt2_pl.experiments.run import RUNS
from gpt2_pl.filesystem import HUB_ID, require_file, resolve_checkpoint_dir

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2_pl.inference.predictor import Precision, Predictor
    from gpt2_pl.tasks import Task


def load(
    source: str | os.PathLike[str],
    *,
    ckpt_path: str | os.PathLike[str] | None = None,
    base: str | None = None,
    calibrated: bool = False,
    precision: Precision = "32-true",
) -> Predictor:
    """Load a trained model to predict from texts.

    Args:
        source: folder of a run; a Hugging Face folder or hub id, such as one that ``gpt2-pl export --format hf`` has
            written, or ``gpt2``; or the folder of an adapter that ``gpt2-pl export --format peft`` or peft has written.
        ckpt_path: checkpoint of the run; defaults to that of the best epoch.
        base: new path or hub id of the pretrained base of the run or adapter, if it has moved since training.
        calibrated: whether class probabilities are scaled by the temperature that ``gpt2-pl inspect`` has fitted.
        precision: ``bf16-mixed`` computes in bfloat16 with weights in float32, ``bf16-true`` has weights in bfloat16.

    Returns:
        The model, with the methods ``predict``, ``predict_proba`` and ``generate``.

    Raises:
        InputError: there is no such model, or it cannot be used.
    """
    from gpt2_pl.inference.predictor import Predictor

    try:
        folder = Path(source).expanduser()
    except RuntimeError:  # an unknown ~user
        raise InputError(f"RUN: there is no folder {source}", key="RUN", value=str(source)) from None
    if ckpt_path is None and _is_pretrained(folder):
        from gpt2_pl.inference.exported import load_exported
        from gpt2_pl.text.tokenizer import load_tokenizer, validate_vocab_size

        for key, value in (("base", base), ("calibrated", calibrated or None)):
            if value is not None:
                raise InputError(key=key, value=value, expected=f"used with the folder of a run; {source} is not one")
        found = _resolve(folder, source)
        task = load_exported(found)
        tokenizer = load_tokenizer(found, "RUN")
        validate_vocab_size(tokenizer, task.config.vocab_size, "the model", "RUN's tokenizer.json")
        return Predictor(task, tokenizer, str(source), precision)
    if ckpt_path is None and os.path.isfile(folder / "adapter_config.json"):
        from gpt2_pl.inference.exported import load_adapter
        from gpt2_pl.text.tokenizer import load_tokenizer, validate_vocab_size

        if calibrated:
            raise InputError(
                key="calibrated", value=True, expected=f"used with the folder of a run; {source} is not one"
            )
        task = load_adapter(folder, base)
        tokenizer = load_tokenizer(folder if (folder / "tokenizer.json").is_file() else str(task.base), "RUN")
        validate_vocab_size(tokenizer, task.config.vocab_size, "the model", "RUN's tokenizer.json")
        return Predictor(task, tokenizer, str(source), precision)
    checkpoint = best_checkpoint(folder) if ckpt_path is None else Path(ckpt_path)
    temperature = read_temperature(folder) if calibrated else 1.0
    task = load_checkpoint(checkpoint, base)
    tokenizer = load_run_tokenizer(folder, task.config.vocab_size)
    return Predictor(task, tokenizer, str(checkpoint), precision, temperature)


def _is_pretrained(folder: Path) -> bool:
    """Return whether a path is a Hugging Face folder, or no path at all and maybe a hub id."""
    if os.path.isdir(folder):
        return (folder / "config.json").is_file() and not (folder / "checkpoints").is_dir()
    owner = folder.parts[0] if len(folder.parts) > 1 else ""
    return bool(HUB_ID.fullmatch(str(folder))) and not (owner and os.path.exists(owner))


def _resolve(folder: Path, source: str | os.PathLike[str]) -> Path:
    """Return the local folder of a Hugging Face folder or hub id; see :func:`load`."""
    try:
        return resolve_checkpoint_dir(str(source), "RUN")
    except InputError as error:
        if os.path.isdir(folder):
            raise
        message = f"RUN: there is no folder {folder}{similar_run(folder)}, and {str(error).removeprefix('RUN: ')}"
        raise InputError(message, key="RUN", value=str(source)) from None


def read_temperature(run: Path) -> float:
    """Return the temperature that was fitted on the validation rows of a run.

    Raises:
        InputError: the run has no valid temperature.
    """
    from gpt2_pl.experiments.inspection.calibration import CALIBRATION_FILE
    from gpt2_pl.utils.run_schema import CalibrationRecord
    from gpt2_pl.utils.schema import validate
    from gpt2_pl.utils.yaml_json import read_json

    file = run / CALIBRATION_FILE
    if not file.is_file():
        message = f"{file} does not exist; write it with: gpt2-pl inspect {run} --out FOLDER"
        raise InputError(message, key="calibrated", value=True)
    return validate(CalibrationRecord, read_json(file), str(file)).temperature


def best_checkpoint(run: Path) -> Path:
    """Return the path of the best checkpoint in the folder of a run.

    Raises:
        InputError: the folder does not exist or has no such checkpoint.
    """
    file = run / "checkpoints" / "best.ckpt"
    if not os.path.isdir(run):  # unlike Path.is_dir, it does not raise an error for names that are too long
        raise InputError(f"RUN: there is no folder {run}{similar_run(run)}", key="RUN", value=run)
    if not os.path.exists(file):
        message = f"RUN: {run} has no checkpoints/best.ckpt; the folder of a run is {RUNS}/NAME/version_N"
        raise InputError(message, key="RUN", value=run)
    return file


def similar_run(run: Path) -> str:
    """Return a hint ``"; did you mean FOLDER?"`` for a run folder that does not exist, or an empty string."""
    names = [folder.name for folder in run.parent.iterdir() if folder.is_dir()] if os.path.isdir(run.parent) else []
    near = nearest(run.name, names)
    return "" if near is None else f"; did you mean {run.with_name(near)}?"


def require_protocol(task: object, protocol: type, checkpoint: str | Path) -> None:
    """Check that the task of a checkpoint implements a protocol.

    Raises:
        InputError: the task lacks a member.
    """
    if isinstance(task, protocol):
        return
    from gpt2_pl.tasks.protocols import NumberPredictor, TextClassifier, TextGenerator, lacks
    from gpt2_pl.utils.registry import class_path

    name, is_predictor = class_path(type(task)), isinstance(task, NumberPredictor | TextClassifier)
    if protocol in (NumberPredictor, TextClassifier) and isinstance(task, TextGenerator) and not is_predictor:
        message = f"{name} generates texts and does not classify; use gpt2-pl generate, or generate() in Python"
    elif protocol is TextGenerator and is_predictor:
        what = "classes" if isinstance(task, TextClassifier) else "numbers"
        message = f"{name} predicts {what} and generates no texts; use gpt2-pl classify, or predict() in Python"
    else:
        message = lacks(task, protocol)
    raise InputError(f"{checkpoint}: {message}", key="RUN")


def load_checkpoint(checkpoint: Path, base: str | None = None) -> Task:
    """Load the trained task of a checkpoint on the CPU.

    Args:
        checkpoint: path of the checkpoint, of any task.
        base: path or hub id of the pretrained base; defaults to the one that the checkpoint names.

    Returns:
        The task.

    Raises:
        InputError: the checkpoint cannot be loaded, or ``base`` is given for a checkpoint with all weights.
    """
    from gpt2_pl.tasks import Task
    from gpt2_pl.tasks.checkpoint import read

    content = read(checkpoint, "checkpoint", Task)
    if base is not None and content["base"].get("complete"):
        raise InputError(f"base: {checkpoint} contains all weights; omit --base", key="base", value=base)
    overrides = {} if base is None else {"base": base}
    try:
        cls: Any = Task.find(content["task"])
        return cls.load_from_checkpoint(checkpoint, map_location="cpu", **overrides)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:  # values of unexpected types
        if describe_failure(error) is not None:  # for example, out of memory
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{checkpoint} is not valid for its task: {reason[:200]}") from error


def load_run_tokenizer(run: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a run.

    Args:
        run: folder of the run.
        vocab_size: vocabulary size of its model.

    Raises:
        InputError: there is no tokenizer, it cannot be read, or its vocabulary is larger than that of the model.
    """
    from gpt2_pl.text.tokenizer import load_tokenizer, validate_vocab_size

    require_file(run / "tokenizer.json", "RUN")  # load_tokenizer would accept the name of a model on the hub
    tokenizer = load_tokenizer(run, "RUN")
    validate_vocab_size(tokenizer, vocab_size, "the model", "RUN's tokenizer.json")
    return tokenizer
