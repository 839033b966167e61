"""Directives that read the keys of configurations and the options of commands from the library itself.

``config-keys MODULE ...`` lists the arguments of the public classes of modules as the parser of ``fit`` sees them,
``class-keys CLASS`` those of one class, ``schema-keys CLASS`` the fields of a schema, and ``command-help COMMAND`` the
help page of a command. They are used in reStructuredText.
"""

import contextlib
import importlib
import inspect
import io
import os
import re

import jsonargparse
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

from gpt2_pl.commands import main

HEADER = ("key", "type", "default", "meaning")
HIDDEN = "==SUPPRESS=="


def type_name(annotation) -> str:
    """Return a type without the names of modules: ``float | None``."""
    text = getattr(annotation, "__name__", None) if inspect.isclass(annotation) else str(annotation)
    text = re.sub(r"typing\.Optional\[(.*)\]$", r"\1 | None", str(text))
    return re.sub(r"<class '([^']*)'>", r"\1", re.sub(r"\b(?:\w+\.)+(?=\w)", "", text))


def arguments(cls) -> list[tuple[str, str, str, str]]:
    """Return key, type, default and description of every argument of a class."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(cls, "init_args")
    rows = []
    for action in parser._actions:
        key = action.dest.removeprefix("init_args.")
        if action.help == HIDDEN or action.default == HIDDEN or action.dest in ("help", "init_args") or "." in key:
            continue
        annotation = getattr(action, "_typehint", None) or action.type
        default = "required" if action.required else f"``{yaml_value(action.default)}``"
        rows.append((f"``{key}``", f"``{type_name(annotation)}``", default, action.help or ""))
    return rows


def yaml_value(value) -> str:
    """Return a default as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, jsonargparse.Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_value(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(yaml_value, value)) + "]"
    text = str(value)
    return repr(value) if isinstance(value, str) and (not text.strip() or "\n" in text) else text


def table(rows, header=HEADER) -> list[str]:
    """Return the lines of a table in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", "   :class: keys", ""]
    for row in [header, *rows]:
        lines += [f"   {'  ' if column else '* '}- {' '.join(cell.split())}" for column, cell in enumerate(row)]
    return lines


def public_classes(name: str):
    """Yield public path and class of the public classes of a module."""
    module = importlib.import_module(name)
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    for public in names:
        cls = getattr(module, public)
        if inspect.isclass(cls) and cls.__module__.startswith(name) and not getattr(cls, "_is_protocol", False):
            yield f"{name}.{public}", cls


class ConfigKeys(SphinxDirective):
    """Sections with the arguments of the classes of modules."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        """Return the sections."""
        lines = []
        for path, cls in (pair for module in self.arguments[0].split() for pair in public_classes(module)):
            if rows := arguments(cls):
                name = path.rpartition(".")[2]
                summary = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
                lines += [name, "~" * len(name), "", f":class:`{path}`: {summary}", "", *table(rows), ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


class ClassKeys(SphinxDirective):
    """Table of the arguments of one class, with the option ``brief`` without their descriptions."""

    required_arguments = 1
    option_spec = {"brief": directives.flag}

    def run(self):
        """Return the table."""
        module, _, name = self.arguments[0].rpartition(".")
        rows = arguments(getattr(importlib.import_module(module), name))
        lines = table([row[:3] for row in rows], HEADER[:3]) if "brief" in self.options else table(rows)
        return self.parse_text_to_nodes("\n".join(lines))


class SchemaKeys(SphinxDirective):
    """Table of the fields of a schema of a file."""

    required_arguments = 1

    def run(self):
        """Return the table."""
        module, _, name = self.arguments[0].rpartition(".")
        fields = getattr(importlib.import_module(module), name).model_fields
        rows = [
            (
                f"``{key}``",
                f"``{type_name(field.annotation)}``",
                "required" if field.is_required() else f"``{yaml_value(field.get_default())}``",
            )
            for key, field in fields.items()
        ]
        return self.parse_text_to_nodes("\n".join(table(rows, HEADER[:3])))


class CommandHelp(SphinxDirective):
    """Help page of a command, or of the program."""

    optional_arguments = 1

    def run(self):
        """Return the text."""
        with contextlib.redirect_stdout(io.StringIO()) as stream, contextlib.suppress(SystemExit):
            main([*self.arguments, "--help"])
        assert stream.getvalue().strip(), self.arguments
        return [nodes.literal_block(stream.getvalue(), stream.getvalue(), language="text")]


def setup(app):
    """Register the directives."""
    os.environ["COLUMNS"] = "100"  # width of the help pages
    app.add_directive("config-keys", ConfigKeys)
    app.add_directive("class-keys", ClassKeys)
    app.add_directive("schema-keys", SchemaKeys)
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
