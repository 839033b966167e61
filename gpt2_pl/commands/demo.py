"""Try a trained model, or two side by side, on a page in the browser.

The page shows what the run predicts: the probability of each class and the words that moved the decision, a number, or
the text that a language model writes. Only this machine can open it, unless another --host is given. It requires
Gradio: pip install "gpt2_pl[demo]"
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_pl.commands.support.parser import CommandParser
from gpt2_pl.commands.support.process import interrupts
from gpt2_pl.errors import InputError, printable, require
from gpt2_pl.filesystem import require_absent

if TYPE_CHECKING:
    from gpt2_pl.commands.support.demo_answers import DemoRun

_SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p")
_SCORES = {"accuracy": "{:.1%} of the validation texts right", "pearson": "Pearson correlation {:.2f} in validation"}


def main(args: list[str]) -> None:
    """Run ``gpt2-pl demo``.

    Args:
        args: arguments after the name of the command.

    Raises:
        InputError: an argument is invalid, no run can be loaded, or Gradio is not installed.
    """
    options = _parse_arguments(args)
    if find_spec("gradio") is None:
        raise InputError('demo requires Gradio; install it with: pip install "gpt2_pl[demo]"', key="demo")
    if options.export is not None:
        from gpt2_pl.commands.support.space import export_space

        print(printable(export_space(options)))
        return
    from gpt2_pl.commands.support.demo_server import is_loopback, listen

    opened = listen(options.host, options.port)
    try:
        runs = load_runs(options)
        for run in runs:
            if run.problem:
                warnings.warn(run.problem, stacklevel=1)
        check_runs(runs, options)
        if not is_loopback(options.host):
            message = (
                f"--host {options.host}: everyone who reaches this machine can use the page, which has no password"
            )
            print(printable(message), flush=True)
        _serve(runs, options, opened)
    finally:
        opened.close()


def _parse_arguments(args: list[str]) -> Namespace:
    parser = CommandParser(prog="gpt2-pl demo", description=__doc__)
    add = parser.add_argument
    parser.add_plugin()
    run_help = "folder of a run or of an exported or pretrained model, or a hub id; a second one is shown beside it"
    add("runs", metavar="RUN", nargs="+", type=Path, help=run_help)
    parser.add_checkpoint()
    parser.add_calibrated()
    parser.add_sampling()
    add("--seed", type=int, default=0, help="seed of sampling; the page can change it")
    example_help = (
        "text that the page offers; for a template of several fields, one for each; can be given several times"
    )
    add("--example", nargs="+", action="append", metavar="TEXT", default=[], help=f"{example_help} (default: none)")
    add("--title", help="title of the page (default: the names of the runs)")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to serve at; 0.0.0.0 is open to the network")
    port_help = "port to serve at; 0 for any free one (default: the first free one from 7860)"
    add("--port", type=int, metavar="N", help=port_help)
    export_help = (
        "write a folder with the models in safetensors, the library and app.py, which Hugging Face runs as a Space, "
        "instead of serving the page; it must not exist"
    )
    add("--export", type=Path, metavar="FOLDER", help=export_help)
    options = parser.parse_args(args)
    require(len(options.runs) <= 2, "RUN", len(options.runs), "one or two runs")
    is_one = len(options.runs) == 1
    require(is_one or options.ckpt_path is None, "ckpt_path", options.ckpt_path, "used with one run")
    require(options.port is None or 0 <= options.port < 2**16, "port", options.port, "in [0, 65535]")
    if options.export is not None:
        require_absent(options.export, "export")
        for key, default in (("host", "127.0.0.1"), ("port", None), ("calibrated", False)):
            require(getattr(options, key) == default, key, getattr(options, key), "used without --export")
    return options


def load_runs(options: Namespace) -> list[DemoRun]:
    """Load the runs that the arguments name.

    Of two runs, one may lack a model: the page shows the reason in its place.

    Raises:
        InputError: none of them can be loaded.
    """
    from gpt2_pl.commands.support.demo_answers import DemoRun
    from gpt2_pl.commands.support.plugins import import_plugin
    from gpt2_pl.inference.loading import load

    for name in options.plugin or ():
        import_plugin(name)
    runs = []
    for source in options.runs:
        try:
            checkpoint = options.ckpt_path
            predictor = load(source, ckpt_path=checkpoint, base=options.base, calibrated=options.calibrated)
            if not predictor.is_generator:
                predictor.require_prediction()
            runs.append(DemoRun(source, predictor, facts=_facts(source, predictor.task, checkpoint is None)))
        except InputError as error:
            if len(options.runs) == 1 or (runs and runs[0].predictor is None):
                raise
            runs.append(DemoRun(source, problem=str(error)))
    return runs


def check_runs(runs: Sequence[DemoRun], options: Namespace) -> None:
    """Check that the runs read the same number of texts, and that the options fit them.

    Raises:
        InputError: they do not.
    """
    models = [run for run in runs if run.predictor is not None]
    inputs = models[0].inputs
    for run in models[1:]:
        if len(run.inputs) != len(inputs):
            message = f"RUN: {models[0].name} reads {', '.join(inputs)}, and {run.name} reads {', '.join(run.inputs)}"
            raise InputError(f"{message}; two runs on a page must read the same texts", key="RUN")
    given = settings(options)
    generators = [run.predictor for run in models if run.predictor is not None and run.is_generator]
    for model in generators:
        model.decoding(given["max_new_tokens"], {key: given[key] for key in _SAMPLING[1:]})
    for key in _SAMPLING:
        if given[key] is not None and not generators:
            raise InputError(key=key, value=given[key], expected="used with a model that generates texts")
    for example in options.example:
        require(len(example) == len(inputs), "example", example, f"{len(inputs)} texts: {', '.join(inputs)}")


def settings(options: Namespace) -> dict[str, Any]:
    """Return the settings of generation that are given; those that are None are the task's."""
    return {key: getattr(options, key) for key in (*_SAMPLING, "seed")}


def _facts(source: Path, task: Any, is_best: bool) -> list[str]:
    """Return the size of a model and, of the best epoch, a validation score that needs no explanation."""
    facts = [f"{sum(parameter.numel() for parameter in task.parameters()) / 1e6:.1f} million parameters"]
    for name, text in _SCORES.items():
        score = _score(source, name) if is_best else None
        if score is not None:
            facts.append(text.format(score))
    return facts


def _score(source: Path, name: str) -> float | None:
    """Return a validation score of the best epoch of a run, or None."""
    from gpt2_pl.commands.support.exported_task import read_record

    with suppress(InputError, TypeError):
        scores: Mapping[str, Any] = read_record(source).get("scores") or {}
        value = scores.get(f"val/{name}")
        return float(value) if isinstance(value, int | float) else None
    return None


def _serve(runs: Sequence[DemoRun], options: Namespace, opened: Any) -> None:
    """Serve the page until Ctrl-C."""
    from gpt2_pl.commands.support.demo_answers import Worker
    from gpt2_pl.commands.support.demo_page import build, mount
    from gpt2_pl.commands.support.demo_server import serve

    worker = Worker()
    title = options.title or " and ".join(run.name for run in runs)
    application = mount(build(runs, settings(options), options.example, title, worker))
    address = f"http://{_shown_host(options.host)}:{opened.getsockname()[1]}"

    def announce() -> None:
        print(printable(f"{address} shows {title}; Ctrl-C ends it"), flush=True)

    try:
        serve(application, options.host, opened, announce)
    except KeyboardInterrupt:
        interrupts.reset()
        print()
    finally:
        worker.close()


def _shown_host(host: str) -> str:
    """Return the host as it is written in an address."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
