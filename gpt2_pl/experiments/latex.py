"""Tables of a comparison for LaTeX, with the package booktabs."""

from __future__ import annotations

import re

from gpt2_pl.errors import printable
from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.tables import arm_table, difference_table, heading

_ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$",
}  # fmt: skip


def latex(comparisons: list[Comparison]) -> str:
    r"""Return a table of every task: scores with intervals, and differences with verdicts.

    Add ``\usepackage{booktabs}`` and ``\usepackage[T1]{fontenc}`` to the document.
    """
    return "\n".join(_table(comparison) for comparison in comparisons if comparison.groups)


def _table(comparison: Comparison) -> str:
    """Return the table of a task."""
    headings, arms = arm_table(comparison)
    scores = [headings.index(name) for name in ("strategy", "seeds", heading(comparison.primary_metric), "95 %")]
    headings, rows = difference_table(comparison)
    shown = [headings.index(name) for name in ("difference", "95 % each", "p (Holm)")]
    differences = {row[0]: [row[i] for i in shown] for row in rows}
    lines = [
        r"\begin{table}", r"\centering", r"\begin{tabular}{lrrlrlr}", r"\toprule",
        " & ".join(["strategy", "seeds", escape(heading(comparison.primary_metric)), r"95\,\%", "difference",
                    r"95\,\%", r"$p$ (Holm)"]) + r" \\",
        r"\midrule",
    ]  # fmt: skip
    for row in arms:
        cells = [*(row[i] for i in scores), *differences.get(row[0], ["", "", ""])]
        lines.append(" & ".join(escape(cell) for cell in cells) + r" \\")
    caption = f"{comparison.task}: {heading(comparison.primary_metric)}, differences to {comparison.baseline_name}."
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{escape(caption)}}}", r"\end{table}", ""]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Escape a text for LaTeX; ranges and negative numbers get the dashes and signs of print."""
    escaped = "".join(_ESCAPES.get(character, character) for character in printable(text))
    return re.sub(r"(?<![\w])([+-])(?=\d)", r"$\1$", escaped)
