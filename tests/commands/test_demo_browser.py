"""The page of demo in headless Chromium: every kind of run is typed to and answers as classify and generate do."""

from urllib.parse import urlsplit

import pytest
from helpers import browser
from helpers.browser import ENTER, Browser
from helpers.demo_pages import served
from helpers.demo_runs import GIVEN, demo_runs

import gpt2_pl
from gpt2_pl.commands.support.demo_answers import DemoRun
from gpt2_pl.errors import printable

pytestmark = pytest.mark.skipif(not browser.is_installed(), reason="Chromium and chromedriver are not installed")
DONE = """
    const answers = [...document.querySelectorAll('.demo-answer')];
    return answers.length > 0 && answers.every(e => e.matches('.problem, [data-state=done]'));"""


@pytest.fixture(scope="module")
def runs(base, files, pair_files, poem_files, tmp_path_factory):
    """A run of each kind."""
    return demo_runs(tmp_path_factory.mktemp("runs"), base, files, pair_files, poem_files)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


def loaded(folder):
    return DemoRun(folder, gpt2_pl.load(folder))


def forget(chromium):
    """Empty the page, so that the next answer is the next question's."""
    chromium.run("document.querySelectorAll('.demo-answer').forEach(e => e.remove())")


def asked(chromium, *texts, button="#ask"):
    """Type texts, press a button, and wait for all answers."""
    for i, text in enumerate(texts):
        chromium.paste(f"#text-{i} textarea", text)
    forget(chromium)
    chromium.click(button)
    chromium.wait(DONE)


def squeezed(text):
    """Return a text without white space, as a page shows it."""
    return "".join(printable(text, keep="\n\t").split())


def test_page_of_every_kind_answers_what_is_typed_and_requests_no_other_host(runs, chromium):
    text = 'a "fine" <b>film</b> & ${1 + 1} {{value}}'
    for kind in ("reviews", "pairs", "numbers", "poems", "language", "targets"):
        model, texts = gpt2_pl.load(runs[kind]), [text, "the plot"] if kind == "pairs" else [text]
        with served([loaded(runs[kind])], GIVEN, title=kind) as url:
            chromium.requested()
            chromium.open(url)
            chromium.wait("return document.querySelector('h1')?.innerText === arguments[0]", kind)
            asked(chromium, *texts)
            shown = chromium.text("#answer-0")
            if model.is_generator:
                assert squeezed(model.generate(texts)[0]) in squeezed(shown), kind
            elif model.is_regressor:
                assert shown.split()[0] == f"{model.predict(texts)[0]:g}"
            else:
                assert chromium.text("#answer-0 .verdict") == model.predict([texts])[0]
                found = dict(zip(chromium.texts(".name"), chromium.texts(".probability"), strict=True))
                assert found == {
                    name: f"{p:.4f}" for name, p in zip(model.labels, model.predict_proba([texts])[0], strict=True)
                }
            if not model.is_generator:
                assert chromium.texts(".words") == texts
            requested = [urlsplit(address) for address in chromium.requested()]
            inside = ("data", "blob", "chrome", "chrome-untrusted")  # of which the last is the browser's own first page
            hosts = {address.netloc for address in requested if address.scheme not in inside}
            assert hosts == {urlsplit(url).netloc}, kind
            assert [entry for entry in chromium.log("browser") if entry["level"] == "SEVERE"] == [], kind


def test_page_of_two_runs_shows_both_and_is_as_wide_as_a_telephone(runs, chromium):
    examples = [["a film"], ["the plot is a mess"]]
    with served([loaded(runs["reviews"]), loaded(runs["numbers"])], GIVEN, examples) as url:
        for width in (390, 1400):
            chromium.resize(width, 900)
            chromium.open(url)
            asked(chromium, "the plot is a mess")
            left, right = (chromium.run("return document.getElementById(arguments[0]).getBoundingClientRect()", name)
                           for name in ("answer-0", "answer-1"))  # fmt: skip
            assert (left["x"] < right["x"]) == (width == 1400)
            assert (left["y"] < right["y"]) == (width == 390)
            assert chromium.run("return document.documentElement.scrollWidth") <= width
            for i, kind in enumerate(("reviews", "numbers")):
                (value,) = gpt2_pl.load(runs[kind]).predict(["the plot is a mess"])
                assert chromium.text(f"#answer-{i} .verdict") == (value if i == 0 else f"{value:g}")


def test_page_answers_wrong_input_by_a_sentence_and_goes_on(runs, chromium):
    chromium.resize(1400, 900)
    problem = "RUN: other has no checkpoints/best.ckpt"
    with served([loaded(runs["reviews"]), DemoRun("other", problem=problem)], GIVEN, [["a film"]]) as url:
        chromium.open(url)
        chromium.element(".demo-heading .problem")
        assert problem in chromium.text("body")
        for text, words in (
            ("", "sentence must not be empty"),
            (" \n ", "sentence must not be empty"),
            ("x" * 10_000, "sentence must have at most 4,000 characters, got 10,000"),
        ):
            asked(chromium, text)
            assert words in chromium.text("#answer-0 [role=alert]"), text[:9]
        chromium.type("#text-0 textarea", "a fine film")
        forget(chromium)
        chromium.call("POST", f"/element/{chromium.element('#text-0 textarea')}/value", {"text": "\ue008" + ENTER})
        chromium.wait(DONE)
        assert chromium.text("#answer-0 .verdict") == gpt2_pl.load(runs["reviews"]).predict(["a fine film"])[0]


@pytest.mark.slow
def test_page_controls_change_the_text_and_another_text_has_the_next_seed(runs, chromium):
    model = gpt2_pl.load(runs["language"])
    with served([loaded(runs["language"])], {**GIVEN, "seed": 5}) as url:
        chromium.open(url)
        asked(chromium, "the")
        assert squeezed(model.generate(["the"], seed=5)[0]) in squeezed(chromium.text("#answer-0"))
        asked(chromium, button="#again")
        assert squeezed(model.generate(["the"], seed=6)[0]) in squeezed(chromium.text("#answer-0"))
        chromium.click(".label-wrap")
        for control, value in (("temperature", "0"), ("max_new_tokens", "4")):
            chromium.paste(f"#{control} input[type=number]", value)
            chromium.run("document.querySelector(arguments[0]).dispatchEvent(new Event('change', {bubbles: true}))",
                         f"#{control} input[type=number]")  # fmt: skip
        asked(chromium)
        (expected,) = model.generate(["the"], temperature=0, max_new_tokens=4)
        assert squeezed(chromium.text("#answer-0")).startswith(squeezed(expected))
