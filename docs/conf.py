"""Configuration of the documentation site; CONTRIBUTING.md has the command that builds it."""

import os
import pkgutil
import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

import gpt2_pl  # noqa: E402

project = "gpt2_pl"
author = "The gpt2_pl authors"
copyright = "The gpt2_pl authors, Apache-2.0"
release = version = gpt2_pl.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "config_keys",
    "strategy_pages",
]
exclude_patterns = ["_extensions", "**.ipynb_checkpoints", "jupyter_execute"]
nitpicky = True  # every cross-reference must resolve
nitpick_ignore_regex = [
    ("py:.*", r"(?!gpt2_pl).*"),  # types of other libraries have no page here
    ("py:class", r"gpt2_pl\.kernels\.cuda_graph\.Output"),  # a type variable
]

# Markdown and notebooks
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_execution_in_temp = True  # notebooks write files

# Reference
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "no-value": True}
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = True
napoleon_use_rtype = False

# HTML: no page may request anything from another host
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"gpt2_pl {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
templates_path: list[str] = []

warnings.filterwarnings("ignore", category=DeprecationWarning)


ROOT_PAGES = {
    "RESULTS.md": "results",
    "SECURITY.md": "security",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
}
REPOSITORY = "https://github.com/gpt2-pl/gpt2_pl/blob/main"


def read_source(app, docname, source):
    """Fill the pages of files of the root, and point links to files outside docs/ to their page or the repository.

    In the repository, such a page only links to its file.
    """
    folder = (ROOT / "docs" / docname).parent
    for name in (name for name, page in ROOT_PAGES.items() if page == docname):
        source[0], folder = (ROOT / name).read_text(encoding="utf-8"), ROOT
        app.env.note_dependency(ROOT / name)

    def link(match):
        target, _, anchor = match[2].partition("#")
        path = (folder / target).resolve()
        if match[2].startswith(("https://", "#")) or not path.is_relative_to(ROOT):
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        if name in ROOT_PAGES or path.is_relative_to(ROOT / "docs") or path.suffix == ".png":
            path = ROOT / "docs" / f"{ROOT_PAGES[name]}.md" if name in ROOT_PAGES else path
            target = os.path.relpath(path, (ROOT / "docs" / docname).parent)
        else:
            target = f"{REPOSITORY}/{name}"
        return f"{match[1]}({target}{anchor and '#' + anchor})"

    if app.env.doc2path(docname).suffix == ".md":
        source[0] = re.sub(r"(\])\(([^()\s]+)\)", link, source[0])


def resolve_reference(app, env, node, contnode):
    """Resolve the path of a class in its module, such as gpt2_pl.tasks.base.Task, to the documented one."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("gpt2_pl."):
        return None
    names = [target, defining_name(target)]
    domain = env.domains["py"]
    for name in names:
        parts = name.split(".")
        for candidate in (name, *(".".join(parts[:cut] + parts[cut + 1 :]) for cut in range(1, len(parts) - 1))):
            if found := domain.find_obj(env, None, None, candidate, None, 0):
                xref = (env, node["refdoc"], app.builder, found[0][1].objtype, found[0][0], node, contnode)
                return domain.resolve_xref(*xref)
    return None


def defining_name(target):
    """Return the path of an object, in the module and the class that define it."""
    try:
        value = pkgutil.resolve_name(target)
        return f"{value.__module__}.{value.__qualname__}"
    except (ImportError, AttributeError):
        return target


def setup(app):
    app.connect("source-read", read_source)
    app.connect("missing-reference", resolve_reference)
