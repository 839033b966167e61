"""The documentation names files, options and configurations that exist."""

import importlib
import inspect
import json
import re

import pytest
from helpers.configs import ROOT

from gpt2_pl.configs import packaged_configs

PAGES = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def arguments(package: str) -> set[str]:
    """Return the names of the arguments of all public classes of a package, base classes included."""
    module = importlib.import_module(package)
    classes = [base for name in module.__all__ for base in getattr(module, name).__mro__]
    return {name for cls in classes for name in inspect.signature(cls.__init__).parameters}


@every_page
def test_page_links_resolve(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("https://") and not (page.parent / link).exists()] == []


@every_page
def test_page_lines_are_at_most_120_characters_long(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


@every_page
@pytest.mark.parametrize(("key", "package"), [("model", "gpt2_pl.tasks"), ("data", "gpt2_pl.datamodules")])
def test_page_flags_are_arguments_of_public_classes(page, key, package):
    flags = set(re.findall(rf"--{key}\.(\w+)", page.read_text(encoding="utf-8"))) - {"help"}
    assert flags - arguments(package) == set()


@every_page
def test_page_configurations_exist(page):
    names = set(re.findall(r"--config (\w+(?:/\w+)?)(?![\w/.])", page.read_text(encoding="utf-8")))
    assert names - {"CONFIG", "RUN"} - packaged_configs().keys() == set()


def test_readme_layout_names_existing_files_and_every_module_of_the_model():
    tree = re.search(r"\n    cli\.py .*?\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[0]
    folders, paths = [ROOT], set()
    for line in tree.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 2
        names = re.match(r"(\S+(?: \S+\.py)?)", line.strip())[1].split()
        folders = [*folders[: depth + 1], folders[depth] / names[0]]
        paths |= {folders[depth] / name for name in names}
    assert [str(path) for path in paths if not path.exists()] == []
    assert {path for path in (ROOT / "gpt2_pl").glob("*.py") if not path.name.startswith("__")} <= paths


@pytest.mark.parametrize(
    ("page", "kinds"), [("strategies.md", ["strategy"]), ("configuration.md", ["task", "trainer"])]
)
def test_guide_lists_every_configuration(page, kinds):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    names = [name for name in packaged_configs() if name.partition("/")[0] in kinds]
    assert [name for name in names if f"`{name}`" not in text and f"`{name.partition('/')[2]}`" not in text] == []


def test_speed_tables_equal_the_recorded_measurements(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    harness = importlib.import_module("harness")
    rows = json.loads(harness.MEASURED.read_text(encoding="utf-8"))
    assert harness.BEGIN + harness.table(rows) + harness.END in harness.PAGE.read_text(encoding="utf-8")
