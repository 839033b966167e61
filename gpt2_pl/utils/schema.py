"""Base classes, field types and error messages of the pydantic schemas of files.

The schemas are in :mod:`~gpt2_pl.utils.run_schema` (metrics.json and sweep.json),
:mod:`~gpt2_pl.utils.checkpoint_schema` (checkpoints) and :mod:`~gpt2_pl.utils.hugging_face_schema` (files of peft and
transformers). Each is a pydantic model that is strict about types and keys. :func:`validate` turns the first of
pydantic's errors into one line: ``FILE: KEY must be X, got Y``.

Import these modules where a file is read, not at the top of a module: importing pydantic takes a fifth of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from gpt2_pl.errors import InputError, printable, shorten


class Schema(BaseModel):
    """Base of all schemas: types are not converted; unknown keys and non-finite numbers are rejected.

    A subclass with the class argument ``extra="allow"`` accepts unknown keys.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


S = TypeVar("S", bound=Schema)


def validate(schema: type[S], content: Any, where: str, part: str = "") -> S:
    """Check plain values against a schema.

    Args:
        schema: the schema.
        content: the values, as read from a file.
        where: the path of the file; messages start with it.
        part: the key of the file at which ``content`` is stored; empty for the content of the whole file.

    Returns:
        The values as an instance of ``schema``.

    Raises:
        InputError: naming the first invalid key, its value and the expected value.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
    raise _input_error(details, where, part)


def _input_error(details: ErrorDetails, where: str, part: str) -> InputError:
    """Return the error for one of pydantic's errors; see :func:`validate` for the arguments."""
    kind, value, message = details["type"], details["input"], details["msg"]
    key = _format_path((part, *details["loc"]) if part else details["loc"])
    if kind == "missing":
        return InputError(f"{key} is missing", key=key, source=where)
    if kind == "extra_forbidden":
        return InputError(f"unknown key {key}", key=key, source=where)
    rule = message.partition(" should ")[2].partition(" or instance of ")[0] or f"be {message}"
    return InputError(f"{key or 'its content'} must {rule}, got {shorten(value)}", key=key, value=value, source=where)


def _format_path(location: tuple[int | str, ...]) -> str:
    """Format a location as a path: ``("epochs", 0, "val/loss")`` -> ``epochs[0].val/loss``."""
    if location[-1:] == ("[key]",):
        outer = _format_path(location[:-2])
        return f"a key of {outer}" if outer else "a key"
    parts = (f"[{part}]" if isinstance(part, int) else f".{printable(part[:80])}" for part in location)
    return "".join(parts).removeprefix(".")


def expect(is_valid: Callable[[Any], bool], expected: str) -> AfterValidator:
    """Create a validator for a condition that no type expresses.

    Example: ``Annotated[float, expect(lambda x: x % 2 == 0, "an even number")]``.

    Args:
        is_valid: the condition, called after the value's type has been checked.
        expected: the expected value, for the message ``KEY must be EXPECTED, got VALUE``.
    """

    def check(value: Any) -> Any:
        if not is_valid(value):
            raise PydanticCustomError("unexpected", "{expected}", {"expected": expected})
        return value

    return AfterValidator(check)


# Field types

VISIBLE = expect(lambda text: printable(text, keep="\t\n\r") == text, "text without control characters")
Text = Annotated[str, Field(max_length=100_000)]
Name = Annotated[str, Field(max_length=300), VISIBLE]
Size = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Figure = Annotated[float, Field(gt=-1e300, lt=1e300)]
Rate = Annotated[float, Field(ge=0, lt=1)]
_IS_SCORE = expect(lambda value: not 1e300 <= abs(value) < float("inf"), "a number of absolute value below 1e300")
Score = Annotated[float, Field(allow_inf_nan=True), _IS_SCORE]  # NaN and infinity are valid: a run may diverge
Scores = Annotated[dict[Name, Score], Field(max_length=1000)]
EpochScores = Annotated[
    Scores,
    expect(
        lambda scores: float(scores.get("epoch", -1)).is_integer() and scores.get("epoch", -1) >= 0,
        "scores of an epoch and its number, epoch, from 0",
    ),
]


class PromptSpec(Schema, extra="allow"):
    """Prompt format of a task: template and class names of a classifier; a user's datamodule may add keys."""

    template: Text | None = None
    target: Text | None = None
    normalize: Annotated[list[Name], Field(max_length=100)] | None = None
    labels: list[Text] | None = None
    columns: dict[Text, list[Text]] | None = None
    max_length: Count | None = None
    quoting: bool | None = None
    prompt_lines: Count | None = None
