"""Directive ``{strategy} NAME``: what a strategy trains, its configuration, and its results in the recorded runs."""

import csv
import functools
import statistics
from pathlib import Path

import torch
import yaml
from sphinx.util.docutils import SphinxDirective

from gpt2_pl import GPT2, GPT2Config, tasks
from gpt2_pl.surgery import build

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "benchmarks" / "results" / "report.csv"
RENAMED = {"prefix": "prefix_tuning", "prompt": "prompt_tuning", "prompt_words": "hard_prompt"}  # since these runs


def trained_parameters(name: str) -> tuple[int, int]:
    """Return the number of trained and of all parameters of GPT-2 small under a strategy, without a head."""
    content = yaml.safe_load((ROOT / "configs" / "strategy" / f"{name}.yaml").read_text(encoding="utf-8"))
    arguments = content.get("model", {}).get("init_args", {})
    changes = arguments.get("surgery+", [])
    with torch.device("meta"):
        model = GPT2(GPT2Config())
        total = sum(parameter.numel() for parameter in model.parameters())
        model.requires_grad_(arguments.get("train_base", not changes))
        for change in changes:
            model = build(change).apply(model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad), total


@functools.cache
def results() -> dict[tuple[str, str], list[tuple[str, float]]]:
    """Return metric and value of the primary score of every seed, by task and strategy."""
    scores = {}
    with REPORT.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            task = getattr(tasks, row["task"])
            metric = task.primary or task.monitor
            strategy = RENAMED.get(row["strategy"], row["strategy"])
            scores.setdefault((row["task"], strategy), []).append((metric, float(row[metric])))
    return scores


def summary(task: str, values: list[tuple[str, float]]) -> str:
    """Return mean and standard deviation over seeds."""
    info = getattr(tasks, task).metric_info[values[0][0].partition("/")[2]]
    scores = [value * (100 if info.percent else 1) for _, value in values]
    deviation = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{deviation}{' %' if info.percent else ''}"


class Strategy(SphinxDirective):
    """Cost, configuration and results of a strategy."""

    required_arguments = 1

    def run(self):
        """Return the sections."""
        name = self.arguments[0]
        trained, total = trained_parameters(name)
        for path in (REPORT, ROOT / "configs" / "strategy" / f"{name}.yaml"):
            self.env.note_dependency(path)
        lines = [
            "## Cost",
            "",
            f"Of GPT-2 small, {trained:,} parameters train ({trained / total:.2%} of {total:,}), and the head of a "
            "classifier or regressor.",
            "",
            "## Configuration",
            "",
            f"```{{literalinclude}} /../configs/strategy/{name}.yaml",
            ":language: yaml",
            "```",
            "",
            *self.measured(name),
        ]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)

    @staticmethod
    def measured(name: str) -> list[str]:
        """Return the section of results; nothing for a strategy without recorded runs."""
        rows = [
            f"| {task} | {values[0][0]} | {summary(task, values)} | {summary(task, results()[task, 'full'])} |"
            f" {len(values)} |"
            for (task, strategy), values in results().items()
            if strategy == name and (task, "full") in results()
        ]
        header = ["| task | score | this strategy | full fine-tuning | seeds |", "| --- | --- | --- | --- | --- |"]
        note = (
            "Mean and standard deviation over seeds, of a small GPT-2 with 10 M parameters. [Results](../results.md) "
            "has the settings, the intervals of the differences and the costs."
        )
        return ["## Measured", "", *header, *rows, "", note] if rows else []


def setup(app):
    """Register the directive."""
    app.add_directive("strategy", Strategy)
    return {"parallel_read_safe": True}
