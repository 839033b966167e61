"""Model cards of exported models: their text, and their example as code."""

import contextlib


def card(folder):
    """Return the text of a folder's model card."""
    return (folder / "README.md").read_text(encoding="utf-8")


def executed(folder):
    """Execute the example of a model card in its folder; return its variables."""
    code, variables = card(folder).partition("```python\n")[2].partition("```")[0], {}
    assert len(code.strip().splitlines()) <= 13
    with contextlib.chdir(folder):
        exec(code, variables)
    return variables
