"""Plots: literal class names, and a bounded cost for 500 classes."""

import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from gpt2_pl.utils.plots import MAX_CELLS, MAX_TICKS, confusion_figure, confusion_image, drawing, plain

ODD = ["$", "$$", "$x^2$", r"\$", r"a\$b$c$", r"$\frac{1}{$", r"\alpha_{", "%", "#", "~^", "_hidden", ""]


def pixels(text, **settings):
    figure = Figure(figsize=(4, 1))
    figure.text(0.1, 0.4, text, **settings)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def test_plain_special_characters_are_drawn_literally():
    wrong = [text for text in ODD if not np.array_equal(pixels(plain(text)), pixels(text, parse_math=False))]
    assert wrong == []


def test_plain_text_is_shortened_and_escaped():
    assert plain("a\x1b[31m\nb\tc") == r"a\x1b[31m b c"
    assert len(plain("x" * 10_000)) == 60


@pytest.mark.parametrize("K", [2, MAX_CELLS])
def test_confusion_figure_has_true_classes_in_rows(K):
    counts = np.random.default_rng(K).integers(0, 100, (K, K))
    counts[1] = 0  # a class without rows
    (axes, *_) = confusion_figure(counts, [f"class {i}" for i in range(K)], "val").axes
    shown = {(round(y), round(x)): int(text.get_text()) for text in axes.texts for x, y in [text.get_position()]}
    assert shown == {(i, j): counts[i, j] for i in range(K) for j in range(K)}
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == [f"class {i}" for i in range(K)]
    (image,) = axes.get_images()
    np.testing.assert_allclose(image.get_array(), counts / np.maximum(counts.sum(1, keepdims=True), 1))


@pytest.mark.parametrize("K", [MAX_CELLS + 1, 500])
def test_confusion_figure_of_many_classes_has_few_texts(K):
    counts = np.eye(K, dtype=int) * 1000
    figure = confusion_figure(counts, [f"c{i}" for i in range(K)], "val")
    assert len(figure.findobj(Text)) < 4 * MAX_TICKS + 40
    (axes, *_) = figure.axes
    assert not axes.texts
    for labels, places in ((axes.get_xticklabels(), axes.get_xticks()), (axes.get_yticklabels(), axes.get_yticks())):
        assert [label.get_text() for label in labels] == [f"c{place}" for place in places]
        assert 15 <= len(labels) <= MAX_TICKS


def test_confusion_image_unusual_names_and_usetex_is_drawn_in_one_size():
    shapes = set()
    with warnings.catch_warnings(), matplotlib.rc_context({"text.usetex": True}):
        warnings.simplefilter("error")
        for K in (2, len(ODD), 77, 500):
            names = [*ODD, "喜欢", "\U0001f600", "\x00\x1b[2J", "a long name " * 50, *map(str, range(500))][:K]
            shapes.add(confusion_image(np.full((K, K), 123_456), names, "$val").shape)
    assert shapes == {(600, 700, 3)}


def test_drawing_exception_restores_matplotlib_settings():
    before = dict(matplotlib.rcParams)
    with pytest.raises(KeyError), drawing():
        raise KeyError
    assert dict(matplotlib.rcParams) == before
