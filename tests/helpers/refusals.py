"""Errors of one line."""

import pytest


def refused(run, capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.strip()]
    assert "Traceback" not in "".join(lines)
    assert len(lines) == 1, lines
    return lines[-1]
