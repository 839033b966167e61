"""The figures of a comparison: learning curves, and scores against costs.

Every strategy has a colour and a marker of its own, in a legend beside the axes, so that no text covers data. Colours
are those of Okabe and Ito (2008), which colour-blind readers can distinguish.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_pl.experiments.comparison import Comparison, RunGroup
from gpt2_pl.experiments.tables import COSTS, heading
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
_MAX_LEGEND = 24  # further strategies are drawn without an entry in the legend
_MAX_LABEL = 34  # characters of a strategy in the legend
_DPI = 150


def plot_names(comparison: Comparison) -> list[str]:
    """Return the names of the figures that :func:`plots` draws."""
    return ["curves", "costs"] if comparison.groups else []


def plots(comparison: Comparison) -> dict[str, dict[str, bytes]]:
    """Draw the figures of a comparison.

    Returns:
        For each name, the content of the file in each of the ``FORMATS``.
    """
    if not comparison.groups:
        return {}
    images: dict[str, dict[str, bytes]] = {}
    with drawing():
        for name, figure in zip(
            plot_names(comparison), (_learning_curves(comparison), _costs(comparison)), strict=True
        ):
            images[name] = {}
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
        epochs, values = _curves(group, name, unit)
        if not epochs:
            continue
        color, marker, line = _style(i)
        means = np.array([np.mean(of_epoch) for of_epoch in values])
        axes[0].plot(
            epochs, means, color=color, marker=marker, markersize=4, linestyle=line, label=_label(group.label, i)
        )
        if max(map(len, values)) > 1:
            axes[0].fill_between(
                epochs, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15, lw=0
            )
    for i, reference in enumerate(comparison.references):
        _draw_reference(axes[0], reference, name, unit, i)
    axes[0].set(xlabel="epoch", ylabel=_axis(name, unit), title=f"{plain(comparison.task)}: learning curves")
    axes[0].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes[0].margins(x=0.03)
    _add_legend(figure, axes[0])
    return figure


def _costs(comparison: Comparison) -> Figure:
    """Draw the primary metric, with its standard deviation over seeds, by trainable parameters and by time."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    name = comparison.primary_metric
    unit = comparison.unit(name)
    figure, axes = _figure(2)
    for axis, cost in zip(axes, ("trainable", "cpu_seconds"), strict=True):
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
        axis.margins(x=0.1)
        axis.set(xlabel="trainable parameters" if cost == "trainable" else heading_text, xscale="log")
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0,) if high > 300 * low else (1.0, 3.0), numticks=8))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel(_axis(name, unit))
    figure.suptitle(f"{plain(comparison.task)}: score against cost", fontsize=12)
    _add_legend(figure, axes[-1], axes[0])
    return figure


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


def _curves(group: RunGroup, name: str, unit: Unit) -> tuple[list[float], list[list[float]]]:
    """Return the epochs with a score, and the finite scores of all seeds in each."""
    by_epoch: dict[float, list[float]] = {}
    for run in group.runs:
        for epoch in run.record["epochs"]:
            if name in epoch and np.isfinite(epoch[name]):
                by_epoch.setdefault(epoch["epoch"], []).append(_shown(unit, epoch[name]))
    return sorted(by_epoch), [by_epoch[epoch] for epoch in sorted(by_epoch)]


def _style(i: int) -> tuple[str, str, str]:
    """Return the colour, the marker and the line of the i-th strategy; 64 combinations of colour and marker differ."""
    again = i // len(_COLORS)
    return _COLORS[i % len(_COLORS)], _MARKERS[(i + again) % len(_MARKERS)], _LINES[again % len(_LINES)]


def _shown(unit: Unit, score: float) -> float:
    return 100 * score if unit.is_percent else score


def _axis(name: str, unit: Unit) -> str:
    """Return the label of an axis of scores."""
    return plain(heading(name)) + (" (%)" if unit.is_percent else "")


def _label(text: str, i: int) -> str | None:
    """Return a legend's entry; None for a strategy that is left out of the legend.

    matplotlib leaves out names that start with an underscore.
    """
    if i >= _MAX_LEGEND:
        return None
    line = plain(text, _MAX_LABEL)
    return f" {line}" if line.startswith("_") else line
