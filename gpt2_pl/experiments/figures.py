"""The figures of a comparison: learning curves, scores against costs, scores within a budget, and by training rows.

Every strategy has a colour and a marker of its own, in a legend beside the axes, so that no text covers data. Colours
are those of Okabe and Ito (2008), which colour-blind readers can distinguish.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_pl.experiments.budgets import best_of, budget_costs, independent_trials
from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.costs import COSTS, budget_cost
from gpt2_pl.experiments.learning_curves import Curve, curves, size_unit
from gpt2_pl.experiments.run_group import RunGroup
from gpt2_pl.experiments.trials import Trials
from gpt2_pl.experiments.units import Unit
from gpt2_pl.utils.plots import drawing, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", ":", "-.")
_REFERENCE_COLOR = "#666666"
_REFERENCE = "(reference)"
_PALE = 0.4  # opacity of imprecise estimates
_MAX_TICKS = 8  # of the sizes of the training set
_MAX_LEGEND = 24  # further strategies are drawn without an entry in the legend
_MAX_LABEL = 34  # characters of a strategy in the legend
_DPI = 150


def plot_names(comparison: Comparison) -> list[str]:
    """Return the names of the figures that :func:`plots` draws."""
    return list(_figures(comparison))


def _figures(comparison: Comparison) -> dict[str, Callable[[Comparison], Figure]]:
    """Return the functions that draw a comparison, by the name of the figure."""
    if not comparison.groups:
        return {}
    budgets = {"budgets": _budgets} if budget_costs(comparison) else {}
    sizes = {"sizes": _sizes} if comparison.has_sizes else {}
    return {"curves": _learning_curves, "costs": _costs, **budgets, **sizes}


def plots(comparison: Comparison) -> dict[str, dict[str, bytes]]:
    """Draw the figures of a comparison.

    Returns:
        For each name, the content of the file in each of the ``FORMATS``.
    """
    images: dict[str, dict[str, bytes]] = {}
    figures = _figures(comparison)
    if not figures:
        return {}
    with drawing():
        for name, draw in figures.items():
            figure, images[name] = draw(comparison), {}
            for kind in FORMATS:
                file = io.BytesIO()
                dates = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
                figure.savefig(file, format=kind, dpi=_DPI, metadata=dates)
                images[name][kind] = file.getvalue()
    return images


def _learning_curves(comparison: Comparison) -> Figure:
    """Draw the monitored score by epoch: the mean over seeds, and a band from the lowest to the highest seed."""
    from matplotlib.ticker import MaxNLocator

    name = comparison.monitor
    unit = comparison.unit(name)
    figure, axes = _figure(1)
    for i, group in enumerate(comparison.groups):
        if (curve := _curve(group, name, unit)) is not None:
            color, marker, line = _style(i)
            _draw_curve(axes[0], curve, color, marker=marker, linestyle=line, label=_label(group.label, i))
    for i, reference in enumerate(comparison.references):
        _draw_reference(axes[0], reference, name, unit, i)
    axes[0].set(xlabel="epoch", ylabel=_axis(name, unit), title=f"{plain(comparison.task)}: learning curves")
    axes[0].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes[0].margins(x=0.03)
    _add_legend(figure, axes[0])
    return figure


def _costs(comparison: Comparison) -> Figure:
    """Draw the primary metric, with its standard deviation over seeds, by trainable parameters and by time."""
    name = comparison.primary_metric
    unit = comparison.unit(name)
    costs = [cost for cost in ("trainable", "cpu_seconds") if any(group.cost(cost) for group in comparison.groups)]
    figure, axes = _figure(len(costs) or 1)
    for axis, cost in zip(axes, costs or ["trainable"], strict=True):
        heading_text, divisor, _ = COSTS[cost]
        for i, group in enumerate(comparison.groups):
            mean, value = group.mean(name), group.cost(cost)
            if mean is not None and np.isfinite(mean) and value:
                color, marker, _ = _style(i)
                error = _shown(unit, group.std(name) or 0.0)
                axis.errorbar(value / divisor, _shown(unit, mean), error, fmt=marker, color=color, capsize=3,
                              label=_label(group.label, i))  # fmt: skip
        for i, reference in enumerate(comparison.references):
            _draw_reference(axis, reference, name, unit, i)
        _set_log_axis(axis, "trainable parameters" if cost == "trainable" else heading_text)
    axes[0].set_ylabel(_axis(name, unit))
    figure.suptitle(f"{plain(comparison.task)}: score against cost", fontsize=12)
    _add_legend(figure, axes[-1], *axes[:-1])
    return figure


def _budgets(comparison: Comparison) -> Figure:
    """Draw the monitored score by what was spent: on the trials of a search, or on the epochs of a run without one."""
    name, costs = comparison.monitor, budget_costs(comparison)
    unit = comparison.unit(name)
    figure, axes = _figure(len(costs))
    for axis, cost in zip(axes, costs, strict=True):
        for i, group in enumerate(comparison.groups):
            if (trials := independent_trials(group)) is not None:
                _draw_trials(axis, comparison, trials, cost, i, group.label)
            elif group.trials is None and (curve := _curve(group, name, unit, cost)) is not None:
                color, marker, _ = _style(i)
                _draw_curve(axis, curve, color, marker=marker, markerfacecolor="white", linestyle="--", linewidth=1.0,
                            label=_label(group.label, i, "no search"))  # fmt: skip
        for i, reference in enumerate(comparison.references):
            _draw_reference(axis, reference, name, unit, i)
        _set_log_axis(axis, COSTS[cost][0])
    axes[0].set_ylabel(_axis(name, unit))
    figure.suptitle(f"{plain(comparison.task)}: score within a budget", fontsize=12)
    _add_legend(figure, axes[-1], *axes[:-1])
    return figure


def _sizes(comparison: Comparison) -> Figure:
    """Draw the primary metric by the number of training rows, with bands from the lowest to the highest seed."""
    name = comparison.primary_metric
    unit = comparison.unit(name)
    figure, axes = _figure(1)
    for i, curve in enumerate(curves(comparison)):
        color, marker, line = _style(i)
        _draw_curve(axes[0], _size_curve(curve, name, unit), color, marker=marker, linestyle=line,
                    label=_label(curve.strategy, i))  # fmt: skip
    for i, curve in enumerate(curves(comparison, references=True)):
        label = f"{_label(curve.strategy, 0)} {_REFERENCE}"
        _draw_curve(axes[0], _size_curve(curve, name, unit), _REFERENCE_COLOR, linestyle=_LINES[1 + i % 3], label=label)
    _set_log_axis(axes[0], size_unit(comparison))
    tried = sorted({size for curve in curves(comparison) for size in curve.groups})
    if len(tried) <= _MAX_TICKS:
        axes[0].set_xticks(tried, [f"{size:,}" for size in tried], minor=False)
        axes[0].minorticks_off()
    axes[0].set(
        ylabel=_axis(name, unit), title=f"{plain(comparison.task)}: learning curves over {size_unit(comparison)}"
    )
    _add_legend(figure, axes[0])
    return figure


def _size_curve(curve: Curve, name: str, unit: Unit) -> tuple[list[float], list[list[float]]]:
    """Return the numbers of rows, and the scores of all seeds with each of them."""
    scores = [[_shown(unit, value) for value in group.usable_values(name)] for group in curve.groups.values()]
    return [float(size) for size in curve.groups], scores


def _draw_trials(axis: Axes, comparison: Comparison, trials: Trials, cost: str, i: int, label: str) -> None:
    """Draw the expected best of k trials as steps, and the limits of the median best as a band.

    Estimates from more than half of the trials are pale. A lower limit without an upper one is a dotted line.
    """
    unit, divisor = comparison.unit(comparison.monitor), COSTS[cost][1]
    found = [best_of(comparison, trials, k) for k in range(1, len(trials.scores) + 1)]
    found = [one for one in found if np.isfinite(one.expected)]
    x = np.array([(trials.mean_cost(cost, one.k) or np.nan) / divisor for one in found])
    y = np.array([_shown(unit, one.expected) for one in found])
    color, marker, line = _style(i)
    entry = _label(label, i, f"{len(trials.scores)} trials")
    first = sum(not one.is_imprecise for one in found)
    for part, alpha, name in ((slice(first), 1.0, entry), (slice(max(0, first - 1), None), _PALE, None)):
        axis.plot(x[part], y[part], color=color, marker=marker, markersize=4, linestyle=line, drawstyle="steps-post",
                  alpha=alpha, label=name)  # fmt: skip
    limits = [[_shown(unit, np.nan if limit is None else limit) for limit in (one.worse, one.better)] for one in found]
    worse, better = np.repeat(np.array(limits).reshape(-1, 2), 2, axis=0).T
    edges = np.repeat(np.append(x, x[-1:]), 2)[1:-1]  # of the steps: the cost of k trials and of k + 1
    axis.fill_between(edges, worse, better, color=color, alpha=0.15, lw=0)
    alone = np.isnan(better[::2]) & ~np.isnan(worse[::2])
    axis.hlines(worse[::2][alone], edges[::2][alone], edges[1::2][alone], color=color, linestyle=":", linewidth=1.2)


def _draw_curve(axis: Axes, curve: tuple[list[float], list[list[float]]], color: str, **style: Any) -> None:
    """Draw the mean over seeds, and a band from the lowest to the highest seed."""
    x, values = curve
    axis.plot(x, [np.mean(of_seeds) for of_seeds in values], color=color, markersize=4, **style)
    if max(map(len, values)) > 1:
        axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15, lw=0)


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels that share the vertical axis, and space for a legend on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 + 3.4 * columns, 4.5))
    figure.subplots_adjust(left=0.08 if columns > 1 else 0.1, right=0.73 if columns > 1 else 0.66, bottom=0.13, top=0.9,
                           wspace=0.06)  # fmt: skip
    panels = figure.subplots(1, columns, sharey=True, squeeze=False)[0].tolist()
    for axis in panels:
        axis.grid(color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _set_log_axis(axis: Axes, label: str) -> None:
    """Make the horizontal axis logarithmic, with a label and few ticks."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis.margins(x=0.1)
    axis.set_xlabel(label)
    if not np.isfinite(axis.dataLim.minposx):  # no positive value
        return
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    if high < 10 * low:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=4))
    else:
        axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0,) if high > 300 * low else (1.0, 3.0), numticks=8))
    thousands = EngFormatter(sep="")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1 else thousands(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _add_legend(figure: Figure, last: Axes, *others: Axes) -> None:
    """Add one legend for all panels, beside the last one."""
    entries: dict[str, Any] = {}
    for axis in (last, *others):
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        entries = dict(sorted(entries.items(), key=lambda entry: entry[0].endswith(_REFERENCE)))
        last.legend(entries.values(), entries.keys(), loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=8,
                    frameon=False, borderaxespad=0.0)  # fmt: skip


def _draw_reference(axis: Axes, reference: RunGroup, name: str, unit: Unit, i: int) -> None:
    """Draw the score of a reference baseline as a horizontal line."""
    mean = reference.mean(name)
    if mean is not None and np.isfinite(mean):
        label = f"{_label(reference.label, 0)} {_REFERENCE}"
        axis.axhline(
            _shown(unit, mean), color=_REFERENCE_COLOR, linestyle=_LINES[1 + i % 3], linewidth=1.2, label=label
        )


def _curve(
    group: RunGroup, name: str, unit: Unit, cost: str | None = None
) -> tuple[list[float], list[list[float]]] | None:
    """Return the finite scores of all seeds in each epoch.

    Args:
        group: the runs.
        name: name of the score.
        unit: unit of the score.
        cost: cost of the horizontal axis; None for epochs.

    Returns:
        The number of each epoch, or the mean cost until its end, to which all epochs of a run contribute equally; and
        the scores of each epoch. None without scores or costs.
    """
    by_epoch: dict[float, list[tuple[float, float]]] = {}
    for run in group.runs:
        parts = (0.0, 0.0) if cost is None else budget_cost(run.record, cost)
        if parts is None:
            continue
        for n, epoch in enumerate(run.record["epochs"], 1):
            if name in epoch and np.isfinite(epoch[name]):
                spent = epoch["epoch"] if cost is None else parts[0] + parts[1] * n / len(run.record["epochs"])
                by_epoch.setdefault(epoch["epoch"], []).append((spent, _shown(unit, epoch[name])))
    points = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    divisor = 1.0 if cost is None else COSTS[cost][1]
    x = [float(np.mean([spent for spent, _ in point])) / divisor for point in points]
    return (x, [[score for _, score in point] for point in points]) if points else None


def _style(i: int) -> tuple[str, str, str]:
    """Return the colour, the marker and the line of the i-th strategy; 64 combinations of colour and marker differ."""
    again = i // len(_COLORS)
    return _COLORS[i % len(_COLORS)], _MARKERS[(i + again) % len(_MARKERS)], _LINES[again % len(_LINES)]


def _shown(unit: Unit, score: float) -> float:
    return 100 * score if unit.is_percent else score


def _axis(name: str, unit: Unit) -> str:
    """Return the label of an axis of scores."""
    name = name.replace("val/", "validation ").replace("/", " ").replace("_", " ")
    return plain(name) + (" (%)" if unit.is_percent else "")


def _label(text: str, i: int, remark: str = "") -> str | None:
    """Return a legend's entry; None for a strategy that is left out of the legend.

    matplotlib leaves out names that start with an underscore.
    """
    if i >= _MAX_LEGEND:
        return None
    line = plain(text, _MAX_LABEL - len(remark)) + (f" ({remark})" if remark else "")
    return f" {line}" if line.startswith("_") else line
