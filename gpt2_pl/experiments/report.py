"""A comparison as tables, plots and a page."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2_pl.errors import printable
from gpt2_pl.experiments.comparison import Comparison, RunGroup
from gpt2_pl.experiments.inference import EffectEstimate
from gpt2_pl.utils.plots import drawing, plain

_COSTS = {  # name -> heading, divisor, digits
    "trainable": ("trainable", 1, 0),
    "checkpoint_bytes": ("checkpoint, MB", 1e6, 1),
    "examples_per_second": ("examples/s", 1, 1),
    "peak_memory_bytes": ("peak memory, GB", 1e9, 2),
    "seconds": ("minutes", 60, 1),
    "cpu_seconds": ("CPU minutes", 60, 1),
    "seconds_to_best": ("minutes to best", 60, 1),
}
_LONGEST_TEXT = 1000  # characters of others' text in one place of a report


def file_name(text: str) -> str:
    """A text as part of a file's name in one folder."""
    return re.sub(r"[^\w-]+", "_", text)[:100] or "_"


def _line(text: object) -> str:
    """A text as one line of printable characters and bounded length."""
    line = " ".join(str(text).split())
    return printable(line if len(line) <= _LONGEST_TEXT else f"{line[:_LONGEST_TEXT]}...")


def _plain(text: str) -> str:
    """A text in Markdown, as itself: no HTML, code, link or image, no further cell or line."""
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"([\\|`])", r"\\\1", _line(text)))
    return text.replace("](", "]\\(")


def _shown(text: str) -> str:
    """A text in a plot, as itself, and not hidden from the legend by an underscore."""
    line = plain(text)
    return f" {line}" if line.startswith("_") else line


def _escaped(text: str) -> str:
    """A text in HTML, as itself."""
    return html.escape(_line(text))


def _cell(text: object) -> str:
    """A text in CSV that no spreadsheet takes for a formula."""
    line = _line(text)
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line


# Tables


def rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells of a comparison's table of scores and costs."""
    names = comparison.scores()
    headings = ["strategy", "seeds", *(_heading(name) for name in names)]
    has_best = len({len(group.runs) for group in comparison.groups} | {1}) > 1
    headings += [*(["best seed"] if has_best else []), *(heading for heading, _, _ in _COSTS.values())]
    cells = []
    for group in comparison.groups:
        cells.append(
            [
                group.label,
                str(len(group.runs)),
                *(_score(comparison, group, name) for name in names),
                *([_best(comparison, group)] if has_best else []),
                *(_number(group.cost(name), divisor, digits) for name, (_, divisor, digits) in _COSTS.items()),
            ]
        )
    return headings, cells


def difference_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells of a comparison's table of differences; none where rows have no outcomes."""
    names = list(dict.fromkeys(name for group in comparison.groups for name in group.over_texts))
    headings = ["strategy"]
    for name in names:
        headings += [f"{_heading(name)}: difference over texts", "over texts and seeds"]
    cells = []
    for group in comparison.groups[1:]:
        row = [group.label]
        for name in names:
            row.append(_difference(comparison, group.over_texts.get(name), name, True))
            row.append(_difference(comparison, group.over_seeds.get(name), name, False))
        cells.append(row)
    return headings, cells if names else []


def _heading(name: str) -> str:
    return name.replace("val/", "").replace("_", " ")


def _scaled(comparison: Comparison, name: str, value: float) -> str:
    return (
        f"{100 * value:.1f}"
        if comparison.metric(name).get("percent")
        else f"{value:.3g}"
        if abs(value) < 10
        else f"{value:.1f}"
    )


def _score(comparison: Comparison, group: RunGroup, name: str) -> str:
    mean, spread = group.mean(name), group.std(name)
    if mean is None:
        return ""
    return _scaled(comparison, name, mean) + (f" ± {_scaled(comparison, name, spread)}" if spread is not None else "")


def _best(comparison: Comparison, group: RunGroup) -> str:
    name = comparison.primary_metric
    values = group.values(name)
    return _scaled(comparison, name, (max if comparison.higher_is_better(name) else min)(values)) if values else ""


def _difference(comparison: Comparison, found: EffectEstimate | None, name: str, with_mean: bool) -> str:
    if found is None:
        return ""
    mean, low, high = (_scaled(comparison, name, value) for value in found[:3])
    signed = ["+" * (not text.startswith("-")) + text for text in (mean, low, high)]
    p = f"p {found.p:.3f}" if found.p >= 0.001 else "p < 0.001"
    return f"{signed[0] + ' ' if with_mean else ''}[{signed[1]}, {signed[2]}], {p}"


def _number(value: float | None, divisor: float, digits: int) -> str:
    return "" if value is None else f"{value / divisor:,.{digits}f}"


_CAPTION = (
    "Scores are those of the epoch best by {monitor}: means over seeds ± standard deviation, shares in percent. Costs "
    "are medians over seeds."
)
_DIFFERENCES = (
    "Differences to {baseline}, each with its 95 % interval and two-sided p: over texts, from a paired bootstrap, how "
    "sure the difference of these very models is on other texts; over texts and seeds, how sure that of the "
    "strategies is, by Student's t with the spread over seeds pooled over strategies."
)
IN_SHORT = (
    "Cheapest is the strategy that trains the fewest parameters of those that are not shown to be worse than the "
    "baseline (95 %, over texts and seeds). Differences are to the baseline."
)


def short_rows(comparisons: list[Comparison]) -> tuple[list[str], list[list[str]]]:
    """What to use for which task: the headings and cells of a table of a row a task."""
    headings = ["task", "by", "baseline", "best", "cheapest not shown to be worse"]
    cells = []
    for comparison in comparisons:
        if comparison.groups:
            found = (comparison.groups[0], comparison.best(), comparison.cheapest())
            told = ["not known" if group is None else _summarize_group(comparison, group) for group in found]
            cells.append([comparison.task, _heading(comparison.primary_metric), *told])
    return headings, cells


def _summarize_group(comparison: Comparison, group: RunGroup) -> str:
    """A group in a few words: score, difference, cost."""
    name, first = comparison.primary_metric, comparison.groups[0]
    text = f"{group.label}: {_score(comparison, group, name)}"
    if (found := group.over_seeds.get(name, group.over_texts.get(name))) is not None:
        text += f", {_difference(comparison, found, name, True)}" + ("" if name in group.over_seeds else " over texts")
    share = (group.cost("trainable") or 0.0) / (first.cost("total") or math.inf)
    minutes = group.cost("cpu_seconds")
    return f"{text}; {share:.1%} of the parameters" + ("" if minutes is None else f", {minutes / 60:.1f} CPU minutes")


def table_lines(headings: list[str], cells: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    escaped = [[_plain(cell) for cell in row] for row in (headings, *cells)]
    escaped.insert(1, ["---"] * len(headings))
    return [f"| {' | '.join(row)} |" for row in escaped]


def markdown(
    comparison: Comparison, pictures: Mapping[str, str] | None = None, elsewhere: Sequence[Mapping[str, str]] = ()
) -> str:
    """A comparison as a section of Markdown.

    Args:
        comparison: it.
        pictures: the plots' names and files.
        elsewhere: figures from elsewhere: ``what``, ``figures``, ``source``.
    """
    lines = [f"## {_plain(comparison.task)}", "", _plain(_about(comparison)), ""]
    if comparison.groups:
        lines += [_CAPTION.format(monitor=_plain(comparison.monitor)), "", *table_lines(*rows(comparison)), ""]
        headings, cells = difference_rows(comparison)
        if cells:
            caption = _DIFFERENCES.format(baseline=_plain(comparison.groups[0].label))
            lines += [caption, "", *table_lines(headings, cells), ""]
    lines += [f"![{_plain(comparison.task)}: {name}]({file})" for name, file in (pictures or {}).items()]
    if elsewhere:
        lines += ["", "Elsewhere, on other models:", ""]
        lines += table_lines(*_elsewhere_rows(elsewhere))
    lines += ["", *(f"- {_plain(note)}" for note in comparison.notes)]
    return "\n".join(lines) + "\n"


def _elsewhere_rows(elsewhere: Sequence[Mapping[str, str]]) -> tuple[list[str], list[list[str]]]:
    headings = ["what", "figures", "source"]
    return headings, [[str(row[key]) for key in headings] for row in elsewhere]


def _about(comparison: Comparison) -> str:
    measure = comparison.comparison_key
    if not measure:
        return "No run of this task can be compared."
    rows = "" if measure["rows"] is None else f" ({measure['rows']:,} rows)"
    base = measure["base"]
    start = "No base: trained from a random start" if base is None else f"Base: digest {str(base)[:12]}"
    return f"Scored on {measure['data']}{rows}. {start}."


def as_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain values."""
    return {
        "task": comparison.task,
        "monitor": comparison.monitor,
        "measure": comparison.comparison_key,
        "notes": comparison.notes,
        "groups": [
            {
                "strategy": group.label,
                "runs": [str(run.folder) for run in group.runs],
                "scores": {name: group.values(name) for name in comparison.scores()},
                "over_texts": {name: found._asdict() for name, found in group.over_texts.items()},
                "over_seeds": {name: found._asdict() for name, found in group.over_seeds.items()},
                "cost": {name: group.cost(name) for name in _COSTS},
            }
            for group in comparison.groups
        ],
    }


def write_csv(comparisons: list[Comparison], table: Any) -> None:
    """One row for every run."""
    scores = list(dict.fromkeys(name for comparison in comparisons for name in comparison.scores()))
    table.writerow(["task", "strategy", "seed", "run", *map(_cell, scores), *_COSTS])
    for comparison in comparisons:
        for group in comparison.groups:
            for run in group.runs:
                alone = RunGroup(group.label, [run])
                figures = [run.record["scores"].get(name, "") for name in scores]
                costs = [alone.cost(name) for name in _COSTS]
                texts = (_cell(comparison.task), _cell(group.label), run.record.get("seed"), _cell(run.folder))
                table.writerow([*texts, *figures, *costs])


# Plots and the page


def plot_names(comparison: Comparison) -> list[str]:
    """What :func:`plots` shows."""
    return ["curves", "costs"] if comparison.groups else []


def plots(comparison: Comparison) -> dict[str, bytes]:
    """Learning curves, and scores against what they cost, as PNG."""
    from matplotlib.figure import Figure

    if not comparison.groups:
        return {}
    name = comparison.monitor
    primary_metric = comparison.primary_metric
    curves = Figure(figsize=(7, 4.5))  # margins are given: to find them takes longer than to draw
    curves.subplots_adjust(left=0.12, right=0.98, bottom=0.11, top=0.93)
    axes = curves.subplots()
    for i, group in enumerate(comparison.groups):
        for n, run in enumerate(group.runs):
            points = [(epoch["epoch"], epoch[name]) for epoch in run.record["epochs"] if name in epoch]
            axes.plot(*zip(*points, strict=True), color=f"C{i % 10}", marker="o", markersize=3, alpha=0.8,
                      linestyle="-" if i < 10 else "--", label=_shown(group.label) if n == 0 else None)  # fmt: skip
    axes.set(xlabel="epoch", ylabel=_shown(name), title=f"{_shown(comparison.task)}: learning curves")
    lengths = [run.record["epochs"][-1]["epoch"] for group in comparison.groups for run in group.runs]
    if max(lengths) > 5 * min(lengths):
        axes.set_xscale("log", base=2)
    axes.legend(fontsize=8)
    costs = Figure(figsize=(9, 4.2))
    costs.subplots_adjust(left=0.09, right=0.98, bottom=0.13, top=0.9, wspace=0.04)
    panels = costs.subplots(1, 2, sharey=True)
    for axis, cost in zip(panels, ("trainable", "cpu_seconds"), strict=True):
        heading, divisor, _ = _COSTS[cost]
        for i, group in enumerate(comparison.groups):
            mean, value = group.mean(primary_metric), group.cost(cost)
            if mean is not None and value:
                axis.errorbar(
                    value / divisor, mean, group.std(primary_metric) or 0.0, fmt="o", color=f"C{i % 10}", capsize=3
                )
                axis.annotate(
                    _shown(group.label), (value / divisor, mean), fontsize=7, xytext=(4, 4), textcoords="offset points"
                )
        axis.set(xlabel=f"{heading} parameters" if cost == "trainable" else heading, xscale="log")
        axis.margins(x=0.25)
    panels[0].set_ylabel(_shown(primary_metric))
    costs.suptitle(f"{_shown(comparison.task)}: score against cost")
    pictures = {}
    for shown, figure in zip(plot_names(comparison), (curves, costs), strict=True):
        file = io.BytesIO()
        with drawing():
            figure.savefig(file, format="png", dpi=110)
        pictures[shown] = file.getvalue()
    return pictures


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>gpt2_pl: comparison</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 110em; padding: 0 1em }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse }} td, th {{ padding: .3em .8em; text-align: right;
border-bottom: 1px solid #ddd; white-space: nowrap }} td:first-child, th:first-child {{ text-align: left }}
img {{ max-width: 100% }} p {{ max-width: 60em }}</style></head><body>
{body}
</body></html>
"""


def page(comparison: Comparison, pictures: Mapping[str, bytes], elsewhere: Sequence[Mapping[str, str]] = ()) -> str:
    """A comparison as a section of a page that needs no other file."""
    parts = [f"<h2>{_escaped(comparison.task)}</h2>", f"<p>{_escaped(_about(comparison))}</p>"]
    if comparison.groups:
        parts += [f"<p>{_CAPTION.format(monitor=_escaped(comparison.monitor))}</p>", html_table(*rows(comparison))]
        headings, cells = difference_rows(comparison)
        if cells:
            caption = _DIFFERENCES.format(baseline=_escaped(comparison.groups[0].label))
            parts += [f"<p>{caption}</p>", html_table(headings, cells)]
    for name, picture in pictures.items():
        data = base64.b64encode(picture).decode()
        parts.append(f'<img alt="{_escaped(comparison.task)}: {name}" src="data:image/png;base64,{data}">')
    if elsewhere:
        parts += ["<p>Elsewhere, on other models:</p>", html_table(*_elsewhere_rows(elsewhere))]
    if comparison.notes:
        parts.append(f"<ul>{''.join(f'<li>{_escaped(note)}</li>' for note in comparison.notes)}</ul>")
    return "\n".join(parts)


def html_table(headings: list[str], cells: list[list[str]]) -> str:
    """A table in HTML; all of its text is escaped."""
    table = [[f"<th>{_escaped(heading)}</th>" for heading in headings]]
    table += [[f"<td>{_escaped(cell)}</td>" for cell in row] for row in cells]
    lines = "\n".join(f"<tr>{''.join(row)}</tr>" for row in table)
    return f'<div class="wide"><table>\n{lines}\n</table></div>'
