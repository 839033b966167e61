"""A comparison as Markdown, HTML, CSV and JSON.

Texts of runs, such as names of classes and files, are untrusted: every format shows them as text.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from gpt2_pl import __version__
from gpt2_pl.errors import printable
from gpt2_pl.experiments.budgets import (
    BEST_OF_CAPTION,
    TUNING_CAPTION,
    best_of_table,
    budget_caption,
    budget_costs,
    budget_table,
    tuning_as_json,
    tuning_table,
)
from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.costs import COSTS
from gpt2_pl.experiments.differences import LEVEL, Difference
from gpt2_pl.experiments.factors import EFFECT_CAPTION, effect_table, factor_effects
from gpt2_pl.experiments.hybrids import Interaction, hybrid_caption, hybrid_table, interactions
from gpt2_pl.experiments.learning_curves import crossing_caption, crossing_table, crossings
from gpt2_pl.experiments.reference_comparison import (
    REFERENCE_CAPTION,
    TEXT_REFERENCE_CAPTION,
    reference_table,
    text_reference_table,
)
from gpt2_pl.experiments.run import Run, counted_runs
from gpt2_pl.experiments.run_group import RunGroup
from gpt2_pl.experiments.statistics.selection import MIN_ROWS
from gpt2_pl.experiments.tables import (
    ARM_CAPTION,
    COST_CAPTION,
    SCORE_CAPTION,
    SECONDARY_CAPTION,
    SUMMARY_CAPTION,
    Table,
    arm_table,
    cost_table,
    difference_caption,
    difference_table,
    heading,
    score_table,
    secondary_table,
    selection_caption,
    selection_table,
    summary_table,
)
from gpt2_pl.experiments.units import Unit

if TYPE_CHECKING:
    from markupsafe import Markup

CROSSED = "; no row is scored by an epoch that it chose (half-splits)"
_MAX_COLUMNS = 8  # of a table on the page that has fewer rows
_MAX_TEXT = 1000  # characters of a run's text in one place


def file_name(text: str) -> str:
    """Return a text as a part of a file's name."""
    return re.sub(r"[^\w-]+", "_", text)[:100] or "_"


def line(text: object) -> str:
    """Return a text as one line of printable characters and bounded length."""
    words = " ".join(str(text).split())
    return printable(words if len(words) <= _MAX_TEXT else f"{words[:_MAX_TEXT]}...")


def markdown_text(text: str) -> str:
    """Escape a text for Markdown: no HTML, code, link or image, and no new cell or line."""
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"([\\|`])", r"\\\1", line(text)))
    return text.replace("](", "]\\(")


def _csv_text(text: object) -> str:
    """Escape a text for CSV, so that no spreadsheet evaluates it as a formula."""
    escaped = line(text)
    return f"'{escaped}" if escaped.startswith(("=", "+", "-", "@")) else escaped


def about(comparison: Comparison) -> str:
    """Return what all runs of a comparison share: the evaluated rows and the base."""
    key = comparison.comparison_key
    if not key:
        return "No run of this task can be compared."
    count = comparison.num_dropped
    dropped = f"; {count:,} more {'is' if count == 1 else 'are'} dropped, as not all runs have them" if count else ""
    rows = "" if key["rows"] is None else f" ({key['rows']:,} rows{dropped})"
    base = key["base"]
    start = "No base: trained from a random start" if base is None else f"Base: digest {str(base)[:12]}"
    chose = ", which also chose the epoch: optimistic" if comparison.is_optimistic else ""
    crossed = ""
    if comparison.is_crossed:
        is_few = (key["rows"] or MIN_ROWS) < MIN_ROWS
        crossed = f"; the last epoch, because fewer than {MIN_ROWS} rows cannot choose one" if is_few else CROSSED
    return f"Scored on {key['data']}{rows}{chose}{crossed}. {start}."


def _tables(comparison: Comparison) -> list[tuple[str, Table]]:
    """Return the tables of a comparison with their captions."""
    if not comparison.groups:
        return []
    baseline, budgets = comparison.baseline_name, budget_costs(comparison)
    tables = [
        (ARM_CAPTION.format(metric=heading(comparison.primary_metric)), arm_table(comparison)),
        (difference_caption(comparison), difference_table(comparison)),
        (selection_caption(comparison), selection_table(comparison)),
        (REFERENCE_CAPTION.format(metric=heading(comparison.primary_metric)), reference_table(comparison)),
        (TEXT_REFERENCE_CAPTION, text_reference_table(comparison)),
        (hybrid_caption(comparison), hybrid_table(comparison)),
        (crossing_caption(comparison), crossing_table(comparison)),
        (
            EFFECT_CAPTION + " Seeds are not paired here." * comparison.is_paired,
            effect_table(comparison, factor_effects(comparison)),
        ),
        (SCORE_CAPTION.format(monitor=comparison.monitor), score_table(comparison)),
        (SECONDARY_CAPTION.format(baseline=baseline), secondary_table(comparison)),
        (COST_CAPTION, cost_table(comparison)),
        (TUNING_CAPTION.format(monitor=comparison.monitor), tuning_table(comparison)),
        *((budget_caption(comparison, cost), budget_table(comparison, cost)) for cost in budgets),
        (BEST_OF_CAPTION.format(monitor=comparison.monitor), best_of_table(comparison)),
    ]
    return [(caption, table) for caption, table in tables if table[1] and len(table[0]) > 1]


def notes(comparison: Comparison) -> list[str]:
    """Return the lines below the tables: each difference with its variances, notices, and notes."""
    lines = []
    for group in comparison.groups:
        found = group.differences.get(comparison.primary_metric)
        lines += [f"{group.label}: {found.line()}"] if found is not None else []
        lines += [f"{group.label}: {notice}" for notice in (*(found.notices if found else ()), *group.notices)]
    return [*lines, *comparison.notes]


# Markdown


def markdown_table(table: Table) -> list[str]:
    """Return the lines of a Markdown table."""
    headings, cells = table
    escaped = [[markdown_text(cell) for cell in row] for row in (headings, *cells)]
    escaped.insert(1, ["---"] * len(headings))
    return [f"| {' | '.join(row)} |" for row in escaped]


def markdown(comparisons: list[Comparison], images: Mapping[str, Mapping[str, str]]) -> str:
    """Return the whole report.

    Args:
        comparisons: one for every task.
        images: for every task the names and the files of its plots.
    """
    sections = [f"# Comparison of {counted_runs(_runs(comparisons))}\n"]
    if any(comparison.groups for comparison in comparisons):
        summary = markdown_table(summary_table(comparisons))
        sections.append("\n".join(["## In short", "", *summary, "", SUMMARY_CAPTION, ""]))
    for comparison in comparisons:
        sections.append(_markdown_section(comparison, images.get(comparison.task, {})))
    return "\n".join(sections)


def _markdown_section(comparison: Comparison, images: Mapping[str, str]) -> str:
    task = markdown_text(comparison.task)
    lines = [f"## {task}", "", markdown_text(about(comparison)), ""]
    for caption, table in _tables(comparison):
        lines += [markdown_text(caption), "", *markdown_table(table), ""]
    lines += [f"![{task}: {name}]({file})" for name, file in images.items()]
    lines += ["", *(f"- {markdown_text(note)}" for note in notes(comparison))]
    return "\n".join(lines) + "\n"


# HTML


def page(comparisons: list[Comparison], images: Mapping[str, Mapping[str, bytes]]) -> str:
    """Return the whole report as a page that needs no other file.

    Args:
        comparisons: one for every task.
        images: for every task the names and the PNG data of its plots.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("gpt2_pl.experiments", ""), autoescape=True)
    environment.filters["line"] = line
    environment.filters["breakable"] = _breakable
    sections = []
    for comparison in comparisons:
        encoded = {name: base64.b64encode(png).decode() for name, png in images.get(comparison.task, {}).items()}
        tables = [(caption, _fitting(table)) for caption, table in _tables(comparison)]
        groups = [*comparison.groups, *comparison.references]
        runs = [run.path for group in groups for run in group.runs]
        sections.append({"comparison": comparison, "about": about(comparison), "tables": tables, "images": encoded,
                         "notes": notes(comparison), "runs": runs})  # fmt: skip
    summary = summary_table(comparisons) if any(comparison.groups for comparison in comparisons) else None
    template = environment.get_template("report.html.jinja")
    title = f"Comparison: {', '.join(comparison.task for comparison in comparisons)}"
    return template.render(
        title=title, about=_dates(comparisons), summary=summary, summary_caption=SUMMARY_CAPTION, sections=sections
    )


def _fitting(table: Table) -> Table:
    """Return a table, transposed if it has many columns and fewer rows, so that it fits a narrow page."""
    headings, cells = table
    if len(headings) <= _MAX_COLUMNS or len(cells) + 1 >= len(headings):
        return table
    first, *rows = zip(headings, *cells, strict=True)
    return list(first), [list(row) for row in rows]


def _breakable(text: str) -> Markup:
    """Permit line breaks after the dots and underscores of a long name, and none within ``5 points`` or ``3 %``."""
    from markupsafe import Markup, escape

    escaped = re.sub(r"(?<=[A-Za-z])([._])(?=[A-Za-z])", r"\1<wbr>", str(escape(text)))
    return Markup(re.sub(r"(?<=[0-9±≥]) (?=[0-9%±])|(?<=[±≥≤]) |(?<=^&lt;) ", "&nbsp;", escaped))


def _runs(comparisons: list[Comparison]) -> list[Run]:
    """Return the compared runs, and the references."""
    groups = [g for comparison in comparisons for g in (*comparison.groups, *comparison.references)]
    return [run for group in groups for run in group.runs]


def _dates(comparisons: list[Comparison]) -> str:
    """Return the numbers of runs and references, when their records were written, and the version of this library."""
    runs = _runs(comparisons)
    files = [run.folder / "metrics.json" for run in runs]
    times = [datetime.fromtimestamp(file.stat().st_mtime) for file in files if file.is_file()]
    days = sorted({f"{time:%Y-%m-%d}" for time in times})
    between = f", finished {' to '.join(dict.fromkeys([days[0], days[-1]]))}" if days else ""
    return f"{counted_runs(runs)}{between}; gpt2_pl {__version__}."


# Data


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values."""
    return {
        "task": comparison.task,
        "monitor": comparison.monitor,
        "comparison_key": comparison.comparison_key,
        "primary_metric": comparison.primary_metric if comparison.groups else None,
        "split": comparison.split,
        "crossed": comparison.is_crossed,
        "margin": comparison.margin,
        "paired_seeds": comparison.is_paired,
        "rows_dropped": comparison.num_dropped,
        "notes": comparison.notes,
        "crossings": [asdict(found) for found in crossings(comparison)],
        "interactions": [
            _interaction_as_json(found, comparison.unit(comparison.primary_metric))
            for found in interactions(comparison)
        ],
        "groups": [
            {
                "strategy": group.label,
                "notices": group.notices,
                "runs": [run.path for run in group.runs],
                "scores": {name: group.values(name) for name in comparison.scores()},
                "differences": {name: _difference_as_json(found) for name, found in group.differences.items()},
                "cost": {name: group.cost(name) for name in COSTS},
                "tuning": None if group.trials is None else tuning_as_json(comparison, group.trials),
            }
            for group in comparison.groups
        ],
    }


def _interaction_as_json(found: Interaction, unit: Unit) -> dict[str, Any]:
    """Return an interaction on its internal scale: a fraction for shares, a logarithm for perplexities."""
    low, high = unit.limit_difference(found.contrast.interval(LEVEL), reach=2.0)
    names = dict(zip(("hybrid", "first", "second"), (group.label for group in found.groups), strict=True))
    return {**names, "interaction": found.contrast.estimate, "low": low, "high": high, "p_holm": found.p_adjusted}


def _difference_as_json(found: Difference) -> dict[str, Any]:
    """Return a difference on its internal scale: a fraction for shares, a logarithm for perplexities."""
    contrast = found.contrast
    low, high = found.unit.limit_difference(contrast.interval(LEVEL))
    low_together, high_together = found.unit.limit_difference(found.together)
    numbers = {
        "difference": contrast.estimate,
        "low": low,
        "high": high,
        "low_together": low_together,
        "high_together": high_together,
        "df": contrast.df,
        "p": contrast.p_value(),
        "p_holm": found.p_adjusted,
        "seed_share": contrast.seed_share,
        "detectable": found.detectable,
    }
    return {
        **{name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()},
        "seeds": contrast.num_seeds,
        "texts": contrast.num_texts if found.has_rows else None,
        "population": found.population,
        "verdict": None if found.verdict is None else found.verdict.word,
        "sentence": found.sentence(),
        "notices": found.notices,
    }


def write_csv(comparisons: list[Comparison], writer: Any) -> None:
    """Write one row for every run with a ``csv.writer``."""
    scores = list(dict.fromkeys(name for comparison in comparisons for name in comparison.scores()))
    writer.writerow(["task", "strategy", "seed", "run", *map(_csv_text, scores), *COSTS])
    for comparison in comparisons:
        for group in comparison.groups:
            for run in group.runs:
                costs = [RunGroup(group.label, [run]).cost(name) for name in COSTS]
                values = ["" if (score := run.score(name)) is None else score for name in scores]
                seed = run.record.get("seed")
                names = (_csv_text(comparison.task), _csv_text(group.label), seed, _csv_text(run.path))
                writer.writerow([*names, *values, *costs])
