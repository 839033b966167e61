"""Commands and calls that end with an error of one line."""

import pytest

from gpt2_pl.errors import InputError, causes, shorten


class Refusal(str):
    """Error line of a command, with the InputError that caused it, or None for an error of the parser."""

    error: InputError | None

    @property
    def key(self):
        """Key of the InputError; empty if there is none."""
        return self.error.key if self.error is not None else ""


def names(error, key):
    """Return whether the key of an InputError or a Refusal, or its text where it has no key, contains a key."""
    return key in (error.key or str(error))


def refused(run, capsys, *args):
    """Run a command that must exit with status 2 and one line on standard error; return the line."""
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.strip()]
    assert "Traceback" not in "".join(lines)
    assert len(lines) == 1, lines
    refusal = Refusal(lines[-1])
    refusal.error = next((error for error in causes(stopped.value) if isinstance(error, InputError)), None)
    return refusal


def refusal(call, *args, case=""):
    """Call a function that must raise an InputError of one line; return the error. A failure names the case."""
    try:
        call(*args)
    except InputError as error:
        assert "\n" not in str(error), shorten(case)
        return error
    pytest.fail(f"not refused: {shorten(case or args)}")
