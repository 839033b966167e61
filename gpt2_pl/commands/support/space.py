"""Export of a demo as the folder of a Hugging Face Space: the models, the library, and a program that serves the page.

The folder needs nothing but the packages of its requirements.txt. It has the files of this library, so that it works
with a version that no package index has.
"""

from __future__ import annotations

import json
import platform
import re
import tomllib
from argparse import Namespace
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import gpt2_pl
from gpt2_pl.commands.demo import check_runs, load_runs
from gpt2_pl.commands.export import atomic_directory, export_hf
from gpt2_pl.commands.support.demo_answers import DemoRun
from gpt2_pl.errors import InputError
from gpt2_pl.filesystem import resolve_checkpoint_dir

_MODELS = "models"
_SUFFIXES = {".py", ".jinja", ".css", ".yaml", ".typed"}  # of the files of the library
_MAPPED = ("datamodules", "callbacks", "configs")  # its subpackages that are beside it in a checkout
_APP = '''\
"""Page to try a model in the browser, written by gpt2-pl demo --export."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.chdir(Path(__file__).resolve().parent)

from gpt2_pl.commands import main  # noqa: E402

if __name__ == "__main__":
    arguments = {arguments}
    default = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"
    host, port = os.environ.get("GRADIO_SERVER_NAME", default), os.environ.get("GRADIO_SERVER_PORT", "7860")
    main(["demo", *arguments, "--host", host, "--port", port])
'''
_README = """\
---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
pinned: false
---

# {heading}

A page to try {names} in the browser, written by `gpt2-pl demo --export`.

- Here: `pip install -r requirements.txt`, then `python app.py`, and open http://127.0.0.1:7860.
- As a Space: `hf repo create USER/NAME --repo-type space --space-sdk gradio`, then
  `hf upload USER/NAME . . --repo-type space`.

| path | content |
| --- | --- |
| `app.py` | the program |
| `{models}/` | the model{plural} in safetensors, with tokenizer, classes and prompt |
| `gpt2_pl/` | the library, version {version}, under the Apache License 2.0 |
| `requirements.txt` | the packages that it needs, in the versions that this folder was written with |
"""


def export_space(options: Namespace) -> str:
    """Write the folder.

    Args:
        options: arguments of ``gpt2-pl demo``.

    Returns:
        A line that describes it.

    Raises:
        InputError: a run cannot be loaded, or its model cannot be written as a complete model.
    """
    runs = load_runs(options)
    for run in runs:
        if run.predictor is None:
            raise InputError(run.problem, key="RUN")
    check_runs(runs, options)
    names = " and ".join(run.name for run in runs)
    title = options.title or names
    with atomic_directory(options.export) as folder:
        models = [_export(run, folder / _MODELS, i) for i, run in enumerate(runs, start=1)]
        arguments = [f"{_MODELS}/{name}" for name in models]
        arguments += ["--title", title, "--seed", str(options.seed)]
        for key in ("max_new_tokens", "temperature", "top_k", "top_p"):
            if (value := getattr(options, key)) is not None:
                arguments += [f"--{key}", str(value)]
        for example in options.example:
            arguments += ["--example", *example]
        _write(folder / "app.py", _APP.format(arguments=arguments))
        _write(folder / "README.md", _readme(title, names, len(runs)))
        _write(folder / "requirements.txt", "".join(f"{line}\n" for line in requirements()))
        _write(folder / ".gitattributes", "*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        _copy_library(folder)
    return f"{options.export}: {', '.join(sorted(path.name for path in options.export.iterdir()))}"


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _export(run: DemoRun, folder: Path, number: int) -> str:
    """Write the model of a run, and return the name of its folder."""
    assert run.predictor is not None
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", run.name).strip("-.") or "model"
    name = f"{name}-{number}" if (folder / name).exists() else name
    (folder / name).mkdir(parents=True)
    source = run.source
    if not (source / "tokenizer.json").is_file():  # a hub id, or an adapter with the tokenizer of its base
        is_adapter = (source / "adapter_config.json").is_file()
        source = resolve_checkpoint_dir(str(run.predictor.task.base if is_adapter else source), "RUN")
    try:
        export_hf(run.predictor.task.cpu(), folder / name, source)
    except InputError as error:
        reason = str(error).partition("; ")[0]
        message = f"export: a Space needs the complete model of {run.source}, and {reason}"
        raise InputError(message, key="export", value=run.source) from None
    return name


def _readme(title: str, names: str, n_models: int) -> str:
    """Return the README.md of a Space, whose front matter Hugging Face reads."""
    return _README.format(
        title=json.dumps(title), heading=_escaped(title), names=_escaped(names), models=_MODELS,
        gradio=metadata.version("gradio"), python=".".join(platform.python_version_tuple()[:2]),
        version=gpt2_pl.__version__, plural="s" if n_models > 1 else "",
    )  # fmt: skip


def _escaped(text: str) -> str:
    """Return a text without the meaning of Markdown and HTML."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", " ".join(text.split()))


def requirements() -> list[str]:
    """Return the packages that the library needs to serve the page, in the installed versions."""
    if gpt2_pl.IS_CHECKOUT:
        file = Path(gpt2_pl.__file__).resolve().parents[1] / "pyproject.toml"
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        lines = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    else:
        extras = ("extra == 'demo'", 'extra == "demo"')
        required = metadata.requires("gpt2_pl") or []
        lines = [line for line in required if "extra ==" not in line or line.endswith(extras)]
    found = []
    for line in lines:
        match = re.match(r"([\w.-]+)(\[[\w,-]+\])?", line)
        assert match is not None
        version = metadata.version(match[1]).partition("+")[0]  # without that of a build, such as 2.13.0+cpu
        found.append(f"{match[0]}=={version}")
    return found


def _copy_library(folder: Path) -> None:
    """Copy the files of this library as an installation has them."""
    for source, target in _library_files():
        file = folder / "gpt2_pl" / target
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.read_bytes())


def _library_files() -> Iterator[tuple[Path, Path]]:
    """Yield the path of each file of this library, and its path in the installed package."""
    package = Path(gpt2_pl.__file__).resolve().parent
    roots = [(package, Path())]
    if gpt2_pl.IS_CHECKOUT:
        roots += [(package.parent / name, Path(name)) for name in _MAPPED]
    for root, prefix in roots:
        for file in sorted(root.rglob("*")):
            if file.suffix in _SUFFIXES or file.name == "py.typed":
                yield file, prefix / file.relative_to(root)
