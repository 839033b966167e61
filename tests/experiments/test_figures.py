"""Figures, the page and the LaTeX table of a comparison."""

import json
import re
import shutil
import subprocess
from itertools import pairwise

import numpy as np
import pytest
from helpers.runs import fake_run

from gpt2_pl.commands import main
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.figures import _budgets, _costs, _learning_curves, _set_log_axis, _style, plots
from gpt2_pl.experiments.latex import escape, latex
from gpt2_pl.experiments.run import Run


@pytest.fixture
def folder(tmp_path):
    """Runs of twelve strategies with long names, over two seeds, and a reference."""
    generator = np.random.default_rng(0)
    names = ["full", *(f"strategy_{'with_a_long_name' * (i % 3)}_{i}" for i in range(11))]
    for i, name in enumerate(names):
        for seed in (1, 2):
            run = fake_run(tmp_path / "runs" / name / str(seed), name, seed, generator.random(200) < 0.5 + 0.01 * i)
            record = json.loads((run / "metrics.json").read_text())
            record["parameters"]["trainable"], record["cpu_seconds"] = 10 ** (i % 7), 60.0 * 2**i
            (run / "metrics.json").write_text(json.dumps(record))
    run = fake_run(tmp_path / "runs/words/0", "words", 0, np.arange(200) < 90)
    record = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**record, "reference": "bag_of_words"}))
    return tmp_path / "runs"


@pytest.fixture
def comparison(folder):
    (found,) = compare([Run.read(path.parent) for path in sorted(folder.glob("*/*/metrics.json"))])
    return found


def test_figures_texts_stay_inside_and_off_the_axes(comparison):
    """No text leaves the figure, and the legend covers no axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for figure in (_learning_curves(comparison), _costs(comparison), _budgets(comparison)):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer, outer = canvas.get_renderer(), figure.bbox
        legends = [axis.get_legend() for axis in figure.axes if axis.get_legend() is not None]
        assert len(legends) == 1
        legend = legends[0].get_window_extent(renderer)
        assert outer.x0 <= legend.x0 < legend.x1 <= outer.x1
        assert outer.y0 <= legend.y0 < legend.y1 <= outer.y1
        for axis in figure.axes:
            assert not axis.get_window_extent(renderer).overlaps(legend)
            low, high = sorted(axis.get_xlim())
            ticks = [label for label in axis.get_xticklabels() if low <= label.get_position()[0] <= high]
            texts = [axis.title, axis.xaxis.label, axis.yaxis.label, *ticks]
            boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
            assert all(outer.x0 <= b.x0 and b.x1 <= outer.x1 and outer.y0 <= b.y0 and b.y1 <= outer.y1 for b in boxes)
            tick_boxes = [label.get_window_extent(renderer) for label in ticks if label.get_text()]
            assert not any(one.overlaps(other) for one, other in pairwise(tick_boxes))


def test_learning_curves_show_means_with_a_band_and_references(comparison):
    figure = _learning_curves(comparison)
    (axes,) = figure.axes
    assert axes.get_xscale() == "linear"
    group = comparison.groups[0]
    expected = [np.mean([run.record["epochs"][e]["val/accuracy"] for run in group.runs]) for e in range(3)]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 100 * np.array(expected))
    assert len(axes.collections) == len(comparison.groups)
    assert any(line.get_label() == "bag_of_words (reference)" for line in axes.lines)


def test_log_axis_of_one_decade_has_few_plain_ticks():
    from matplotlib.figure import Figure

    for low, high in ((0.02, 0.055), (3.0, 8.0), (0.2, 3.0)):
        axis = Figure().subplots()
        axis.plot([low, high], [0.0, 1.0])
        _set_log_axis(axis, "CPU minutes")
        limits = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if limits[0] <= tick <= limits[1]]
        labels = axis.xaxis.get_major_formatter().format_ticks(ticks)
        assert 2 <= len(labels) <= 5
        assert [float(label) for label in labels] == pytest.approx(ticks)


def test_figure_styles_of_strategies_differ():
    assert len({_style(i)[:2] for i in range(64)}) == 64


@pytest.mark.slow
def test_plots_are_repeatable_in_every_format(comparison):
    first, second = plots(comparison), plots(comparison)
    assert first["curves"]["pdf"].startswith(b"%PDF")
    assert first["costs"]["png"].startswith(b"\x89PNG")
    assert b"<svg" in first["costs"]["svg"]
    assert first == second


def test_latex_special_characters_are_escaped():
    assert escape("a_b & 50 % {x}") == r"a\_b \& 50 \% \{x\}"
    assert escape("-0.5 to +1.2") == "$-$0.5 to $+$1.2"
    assert escape("lora-r8") == "lora-r8"
    assert "\\input" not in escape("\\input{/etc/passwd}")


def test_latex_table_has_a_row_for_every_strategy(comparison):
    text = latex([comparison])
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + len(comparison.groups)
    assert {line.count(" & ") for line in rows} == {6}
    assert text.count("{") == text.count("}")


def test_report_page_fits_its_window(folder, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    main(["compare", str(folder), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out/report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page loads nothing"
    assert "<h1>Comparison: ParaphraseDetector</h1>" in page
    script = "<script>document.title = [document.documentElement.scrollWidth, innerWidth].join()</script></body>"
    (tmp_path / "page.html").write_text(page.replace("</body>", script))
    for width in (800, 1400):
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
        done = subprocess.run([*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120,
                              check=True)  # fmt: skip
        scroll_width, inner_width = map(int, re.search(r"<title>(\d+),(\d+)</title>", done.stdout).groups())
        assert scroll_width <= inner_width
