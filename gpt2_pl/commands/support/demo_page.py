"""Page of ``gpt2-pl demo``, in Gradio.

Gradio's telemetry, run history, interface description and footer are off, and its theme uses the fonts of the system.
:mod:`gpt2_pl.commands.support.demo_server` serves the page and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from itertools import chain
from typing import Any, NamedTuple

import gradio as gr
from fastapi import FastAPI

from gpt2_pl.commands.support.demo_answers import MAX_CHARACTERS, DemoRun, Worker, named, waiting

_QUEUE = 64  # requests that wait; further ones are refused
_COLUMN = 320  # pixels, below which two runs are shown one below the other
_FONT = ["system-ui", "sans-serif"]
_MONO = ["ui-monospace", "monospace"]


class Setting(NamedTuple):
    """Control of generation.

    Args:
        name: argument of :meth:`~gpt2_pl.inference.predictor.Predictor.generate`.
        component: the control.
        initial: its value on the page; while it is unchanged, every run keeps its own setting.
    """

    name: str
    component: Any
    initial: Any


def build(
    runs: Sequence[DemoRun], given: Mapping[str, Any], examples: Sequence[Sequence[str]], title: str, worker: Worker
) -> gr.Blocks:
    """Build the page.

    Args:
        runs: one or two runs, at least one of them with a model.
        given: settings of generation of the command line, by argument of
            :meth:`~gpt2_pl.inference.predictor.Predictor.generate`; those that are None are the task's.
        examples: texts that the page offers, one for each input.
        title: title of the page.
        worker: thread of the models.
    """
    inputs = next(run.inputs for run in runs if run.predictor is not None)
    models = [run.predictor for run in runs if run.predictor is not None]
    is_generator = any(model.is_generator for model in models)
    is_long = is_generator and not models[0].prompt.fields
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {_plain(title)}", elem_classes="demo-title")
        with gr.Row(equal_height=False):
            for run in runs:
                with gr.Column(min_width=_COLUMN):
                    gr.HTML(run.heading(run.name if run.name != title else ""), elem_classes="demo-run")
        with gr.Row():
            texts = [
                gr.Textbox(label=name, lines=4 if is_long else 2, max_lines=12, elem_id=f"text-{i}", autofocus=i == 0)
                for i, name in enumerate(inputs)
            ]
        if examples:
            rows = [[*example] for example in examples]
            gr.Examples(rows, texts, label="Examples", cache_examples=False, api_visibility="private")
        settings = _settings(models, given) if is_generator else []
        with gr.Row():
            ask = gr.Button("Continue" if is_long else "Write" if is_generator else "Ask", variant="primary",
                            elem_id="ask")  # fmt: skip
            again = gr.Button("Another text", elem_id="again", visible=any(s.name == "seed" for s in settings))
        with gr.Row(equal_height=False):
            shown = []
            for i in range(len(runs)):
                with gr.Column(min_width=_COLUMN):
                    shown.append(gr.HTML(elem_classes="demo-run", elem_id=f"answer-{i}"))
        gr.HTML(
            f'<p class="demo-foot">A text has at most {MAX_CHARACTERS:,} characters. Nothing that you type is stored. '
            "The model repeats patterns of its training data; it may be wrong.</p>"
        )
        answer = _handler(runs, len(inputs), settings, given, worker)
        components = [*texts, *(setting.component for setting in settings)]
        event: dict[str, Any] = {"inputs": components, "outputs": shown, "api_visibility": "private"}
        event |= {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal"}
        gr.on([ask.click, *(text.submit for text in texts)], answer, **event)
        for setting in settings:
            if setting.name == "seed":
                seed = setting.component
                other = again.click(
                    None, seed, seed, js="(seed) => (seed || 0) + 1", show_progress="hidden", api_visibility="private"
                )
                other.then(answer, **event)
    page.queue(max_size=_QUEUE, default_concurrency_limit=1)
    return page


def mount(page: gr.Blocks) -> FastAPI:
    """Return the application that serves a page."""
    css = resources.files("gpt2_pl.commands.support").joinpath("demo.css").read_text(encoding="utf-8")
    theme = gr.themes.Default(font=_FONT, font_mono=_MONO)
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        application, page, path="/", footer_links=[], run_history=False, allowed_paths=[], show_error=False,
        ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False, theme=theme, css=css,
        max_file_size=0,
    )  # fmt: skip
    return application


def _plain(text: str) -> str:
    """Return a text without the characters that Markdown or HTML read."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-.!|~<>&$" else c for c in " ".join(text.split()))


def _settings(models: Sequence[Any], given: Mapping[str, Any]) -> list[Setting]:
    """Show the controls of generation, and return them: the length and, for models that sample, how they do."""
    decodings = [_decoding(model, given) for model in models if model.is_generator]
    limit = max(1, max(model.task.max_length for model in models if model.is_generator) - 1)
    length = min(limit, decodings[0][0])
    sampling = [settings for _, settings in decodings if "num_beams" not in settings]
    settings: list[Setting] = []
    with gr.Accordion("Settings", open=False):
        label = "Longest text, in tokens"
        slider = gr.Slider(1, limit, value=length, step=1, label=label, elem_id="max_new_tokens")
        settings.append(Setting("max_new_tokens", slider, length))
        if sampling:
            heat = sampling[0]["temperature"]
            info = "0 always takes the most probable token; the higher, the more surprising"
            slider = gr.Slider(
                0, max(2.0, heat), value=heat, step=0.05, label="Temperature", info=info, elem_id="temperature"
            )
            settings.append(Setting("temperature", slider, heat))
            info = "the same number gives the same text"
            number = gr.Number(given["seed"], label="Seed", info=info, precision=0, elem_id="seed")
            settings.append(Setting("seed", number, None))
        if len(sampling) < len(decodings):
            beams = next(settings["num_beams"] for _, settings in decodings if "num_beams" in settings)
            gr.Markdown(f"{'One of the models searches' if sampling else 'It searches'} for the most probable text, "
                        f"with {beams} beams, and draws no random numbers.")  # fmt: skip
    return settings


def _decoding(model: Any, given: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return how a model generates texts, with the settings of the command line."""
    options = {key: value for key, value in given.items() if key not in ("seed", "max_new_tokens")}
    return model.decoding(given["max_new_tokens"], options)


def _handler(
    runs: Sequence[DemoRun], n_texts: int, settings: Sequence[Setting], given: Mapping[str, Any], worker: Worker
) -> Callable[..., Iterator[Any]]:
    """Return the function that yields the answers of all runs to the values of the components."""

    def answer(*values: Any) -> Iterator[Any]:
        texts = values[:n_texts]
        chosen = dict(given)
        for setting, value in zip(settings, values[n_texts:], strict=True):
            if value is not None and value != setting.initial:
                chosen[setting.name] = value
        shown = [waiting() if run.predictor is not None else "" for run in runs]
        yield shown if len(runs) > 1 else shown[0]
        answers = (
            ((i, html) for html in run.answers(texts, chosen if run.is_generator else {}, worker))
            for i, run in enumerate(runs)
        )
        for i, html in chain.from_iterable(answers):
            shown[i] = named(html, runs[i].name) if len(runs) > 1 else html
            yield shown if len(runs) > 1 else shown[0]

    return answer
