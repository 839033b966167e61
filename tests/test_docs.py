"""The documentation names files, options and configurations that exist."""

import importlib
import inspect
import json
import re

import pytest
from helpers.configs import ROOT

from gpt2_pl.configs import packaged_configs

FILES = ("README.md", "SECURITY.md", "CONTRIBUTING.md")
PAGES = [ROOT / name for name in FILES] + sorted((ROOT / "docs").rglob("*.md"))
NOTEBOOKS = {page: json.loads(page.read_text(encoding="utf-8")) for page in sorted((ROOT / "docs").rglob("*.ipynb"))}
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES} | {
    page: "\n".join("".join(cell["source"]) for cell in notebook["cells"]) for page, notebook in NOTEBOOKS.items()
}


def arguments(package: str) -> set[str]:
    """Return the names of the arguments of all public classes of a package, base classes included."""
    module = importlib.import_module(package)
    classes = [base for name in module.__all__ for base in getattr(module, name).__mro__]
    return {name for cls in classes for name in inspect.signature(cls.__init__).parameters}


def matches(pattern: str) -> set[tuple[str, str]]:
    """Return page and match of a pattern with one group, over all pages."""
    return {(page.name, match) for page, text in TEXTS.items() for match in re.findall(pattern, text)}


def test_page_links_resolve():
    links = [(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\(([^)#]+)\)", text)]
    assert len(links) > 30
    assert [
        pair for pair in links if not pair[1].startswith("https://") and not (pair[0].parent / pair[1]).exists()
    ] == []


def test_page_lines_are_at_most_120_characters_long():
    lines = [(page.name, line) for page, text in TEXTS.items() for line in text.splitlines()]
    assert [pair for pair in lines if len(pair[1]) > 120 and not pair[1].startswith("|")] == []


@pytest.mark.parametrize(("key", "package"), [("model", "gpt2_pl.tasks"), ("data", "gpt2_pl.datamodules")])
def test_page_flags_are_arguments_of_public_classes(key, package):
    flags, known = matches(rf"--{key}\.(\w+)"), {*arguments(package), "help"}
    assert flags
    assert {pair for pair in flags if pair[1] not in known} == set()


def test_page_configurations_exist():
    names, known = matches(r"--config (\w+(?:/\w+)*)(?![\w/.])"), {*packaged_configs(), "CONFIG", "RUN"}
    assert names
    assert {pair for pair in names if pair[1] not in known} == set()


def test_layout_names_existing_files_and_every_module_of_the_model():
    tree = re.search(r"\n    cli\.py .*?\n\n", TEXTS[ROOT / "docs" / "architecture.md"], re.S)[0]
    folders, paths = [ROOT], set()
    for line in tree.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 2
        names = re.match(r"(\S+(?: \S+\.py)?)", line.strip())[1].split()
        folders = [*folders[: depth + 1], folders[depth] / names[0]]
        paths |= {folders[depth] / name for name in names}
    assert [str(path) for path in paths if not path.exists()] == []
    assert {path for path in (ROOT / "gpt2_pl").glob("*.py") if not path.name.startswith("__")} <= paths


def test_guide_lists_every_configuration():
    for page, kinds in (("strategies.md", ["strategy"]), ("configuration.md", ["task", "trainer"])):
        text = TEXTS[ROOT / "docs" / page]
        names = [name for name in packaged_configs() if name.partition("/")[0] in kinds]
        assert len(names) > 5
        assert [name for name in names if f"`{name}`" not in text and f"`{name.partition('/')[2]}`" not in text] == []


def test_every_strategy_has_a_page_that_the_index_and_the_overview_link():
    names = {name.partition("/")[2] for name in packaged_configs() if name.startswith("strategy/")}
    folder = ROOT / "docs" / "strategies"
    assert {page.stem for page in folder.glob("*.md")} - {"index"} == names
    assert set(re.findall(r"^\w+$", TEXTS[folder / "index.md"], re.M)) == names
    assert set(re.findall(r"\(strategies/(\w+)\.md\)", TEXTS[ROOT / "docs" / "strategies.md"])) == names
    assert [name for name in names if f"```{{strategy}} {name}\n" not in TEXTS[folder / f"{name}.md"]] == []


def test_notebooks_are_listed_and_have_no_outputs():
    """The build of the site executes them, so that it shows what the library of that day prints."""
    listed = re.findall(r"^\w+$", TEXTS[ROOT / "docs" / "tutorials" / "index.md"], re.M)
    assert sorted(listed) == [page.stem for page in NOTEBOOKS]
    cells = [cell for notebook in NOTEBOOKS.values() for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 50
    assert [cell["source"] for cell in cells if cell["outputs"] or cell["execution_count"]] == []


def test_speed_tables_equal_the_recorded_measurements(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    harness = importlib.import_module("harness")
    rows = json.loads(harness.MEASURED.read_text(encoding="utf-8"))
    assert harness.BEGIN + harness.table(rows) + harness.END in harness.PAGE.read_text(encoding="utf-8")
