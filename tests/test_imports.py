"""Import rules: every part imports from lower layers only, and the core does not import Lightning."""

import ast
import importlib.util
import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from conftest import ROOT

import gpt2_pl

LAYERS = [  # each may import from those below; names of one line do not import each other
    ["__main__"],
    ["commands"],
    ["inference"],
    ["datamodules", "callbacks"],
    ["tasks", "experiments"],
    ["surgery"],
    ["generation", "beams", "pretrained"],
    ["decoding"],
    ["model", "text"],
    ["kv_cache", "heads", "losses", "metrics", "optim"],
    ["kernels"],
    ["configs"],
    ["filesystem", "utils"],
    ["errors"],
]
MAPPED = ("datamodules", "callbacks", "configs")  # folders of the root that are installed below gpt2_pl
LEVEL = {name: level for level, names in enumerate(reversed(LAYERS)) for name in names}
EXCEPTIONS = {("model", "pretrained")}  # GPT2.from_pretrained and GPT2.save_pretrained
LIGHTNING = {"tasks", "datamodules", "callbacks", "commands"}


def sources():
    """Yield the part of the library and the path of every module."""
    for file in sorted((ROOT / "gpt2_pl").rglob("*.py")):
        part = file.relative_to(ROOT / "gpt2_pl").parts[0].removesuffix(".py")
        if part != "__init__":
            yield part, file
    for part in MAPPED:
        yield from ((part, file) for file in sorted((ROOT / part).rglob("*.py")))


def imported(file):
    """Yield the dotted names that a file imports anywhere, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_import_layers_cover_every_part_of_the_library():
    assert {part for part, _ in sources()} == LEVEL.keys()


def test_drawing_of_the_architecture_shows_the_layers():
    drawing = ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot()
    assert [[text.text for text in row.findall("{*}text[@class='part']")] for row in drawing.findall("{*}g")] == LAYERS


def test_import_within_library_is_from_a_lower_layer():
    checked = 0
    for part, file in sources():
        for name in imported(file):
            package, _, rest = name.partition(".")
            assert package not in ("cli", *MAPPED), f"{file} imports {name}"
            if package != "gpt2_pl" or not rest:
                continue
            target = rest.partition(".")[0]
            if target == part or target == "__version__" or (part, target) in EXCEPTIONS:
                continue
            assert target in LEVEL, f"{file} imports {name}"
            assert LEVEL[target] < LEVEL[part], f"{part} must not import {target} ({file.name}: {name})"
            checked += 1
    assert checked > 200


def test_import_of_lightning_in_the_core_is_absent():
    importing = {
        part for part, file in sources() for name in imported(file) if name.split(".")[0].endswith("lightning")
    }
    assert importing == LIGHTNING


def test_package_in_checkout_contains_mapped_folders_and_no_other_root_files():
    for name in ("cli", "gpt2_pl", "tests", "benchmarks", "constraints"):
        assert importlib.util.find_spec(f"gpt2_pl.{name}") is None, name
    for mapped in MAPPED:
        assert importlib.util.find_spec(f"gpt2_pl.{mapped}").origin == str(ROOT / mapped / "__init__.py")


def test_public_names_of_the_package_are_no_modules():
    """A module of the same name would replace a function once it is imported."""
    assert {file.stem for file in (ROOT / "gpt2_pl").iterdir()}.isdisjoint(gpt2_pl.__all__)


def test_main_help_version_or_no_arguments_does_not_import_torch():
    code = "import sys; from gpt2_pl.commands import main; [main(args) for args in ([], ['--version'], ['--help'])]"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], cwd=ROOT, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("alone", [False, True])
def test_imported_command_freezes_garbage_only_in_its_own_process(alone):
    """Objects that exist at the import of a command are frozen only in the program's own process."""
    code = f"""
import gc, weakref
from gpt2_pl import commands
class Cycle: pass
cycle = Cycle()
cycle.itself = cycle
alive = weakref.ref(cycle)
del cycle
if {alone}:
    gc.disable()
commands._import_command("compare")
assert gc.isenabled()
gc.collect()
assert (alive() is not None) == (gc.get_freeze_count() > 0) == {alone}
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_cli_help_takes_less_than_two_seconds_of_the_processor():
    before = os.times()
    subprocess.run([sys.executable, "cli.py", "--help"], cwd=ROOT, env=os.environ, check=True, capture_output=True)
    assert sum(os.times()[2:4]) - sum(before[2:4]) < 2


CONCRETE = {
    *("Classifier", "SentimentClassifier", "ParaphraseDetector", "TextRegressor", "PooledTask"),
    *("LanguageModel", "PoemGenerator", "DataToText"),
}


def test_callbacks_and_commands_source_names_no_concrete_task():
    """They use members of Task and protocols only, so that user-defined tasks work as the library's do."""
    for file in sorted([*(ROOT / "callbacks").rglob("*.py"), *(ROOT / "gpt2_pl/commands").rglob("*.py")]):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        named = {node.id for node in nodes if isinstance(node, ast.Name)} & CONCRETE
        named |= {name.rpartition(".")[2] for name in imported(file)} & CONCRETE
        assert not named, f"{file} names {named}"
