"""The plots of a comparison."""

from __future__ import annotations

import io
from typing import Any

from gpt2_pl.experiments.comparison import Comparison
from gpt2_pl.experiments.tables import COSTS
from gpt2_pl.utils.plots import drawing, plain


def plot_names(comparison: Comparison) -> list[str]:
    """Return the names of the plots that :func:`plots` makes."""
    return ["curves", "costs"] if comparison.groups else []


def plots(comparison: Comparison) -> dict[str, bytes]:
    """Return PNG images: learning curves, and scores against costs."""
    if not comparison.groups:
        return {}
    images = {}
    for name, figure in zip(plot_names(comparison), (_learning_curves(comparison), _costs(comparison)), strict=True):
        file = io.BytesIO()
        with drawing():
            figure.savefig(file, format="png", dpi=110)
        images[name] = file.getvalue()
    return images


def _learning_curves(comparison: Comparison) -> Any:
    """Return a figure of the monitored score by epoch, a line for every run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    figure.subplots_adjust(left=0.12, right=0.98, bottom=0.11, top=0.93)  # finding margins takes longer than drawing
    axes = figure.subplots()
    name = comparison.monitor
    for i, group in enumerate(comparison.groups):
        for n, run in enumerate(group.runs):
            points = [(epoch["epoch"], epoch[name]) for epoch in run.record["epochs"] if name in epoch]
            axes.plot(*zip(*points, strict=True), color=f"C{i % 10}", marker="o", markersize=3, alpha=0.8,
                      linestyle="-" if i < 10 else "--", label=_label(group.label) if n == 0 else None)  # fmt: skip
    axes.set(xlabel="epoch", ylabel=_label(name), title=f"{_label(comparison.task)}: learning curves")
    lengths = [run.record["epochs"][-1]["epoch"] for group in comparison.groups for run in group.runs]
    if max(lengths) > 5 * min(lengths):
        axes.set_xscale("log", base=2)
    axes.legend(fontsize=8)
    return figure


def _costs(comparison: Comparison) -> Any:
    """Return a figure of the primary metric by trainable parameters and by CPU time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2))
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.13, top=0.9, wspace=0.04)
    panels = figure.subplots(1, 2, sharey=True)
    metric = comparison.primary_metric
    for axis, cost in zip(panels, ("trainable", "cpu_seconds"), strict=True):
        heading, divisor, _ = COSTS[cost]
        for i, group in enumerate(comparison.groups):
            mean, value = group.mean(metric), group.cost(cost)
            if mean is not None and value:
                point = (value / divisor, mean)
                axis.errorbar(*point, group.std(metric) or 0.0, fmt="o", color=f"C{i % 10}", capsize=3)
                axis.annotate(_label(group.label), point, fontsize=7, xytext=(4, 4), textcoords="offset points")
        axis.set(xlabel=f"{heading} parameters" if cost == "trainable" else heading, xscale="log")
        axis.margins(x=0.25)
    panels[0].set_ylabel(_label(metric))
    figure.suptitle(f"{_label(comparison.task)}: score against cost")
    return figure


def _label(text: str) -> str:
    """Return plain text that matplotlib shows in a legend, even if it starts with an underscore."""
    line = plain(text)
    return f" {line}" if line.startswith("_") else line
