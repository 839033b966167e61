"""Imports run one way: gpt2_pl <- datamodules, callbacks <- commands, cli; its core knows no Lightning."""

import ast
import os
import statistics
import subprocess
import sys
import time

import pytest
from conftest import ROOT

OUTSIDE = {"tasks"}  # what of gpt2_pl is Lightning's; all the rest is the core


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize(
    ("package", "banned"),
    [
        ("gpt2_pl", {"datamodules", "callbacks", "commands", "cli"}),
        ("datamodules", {"callbacks", "commands", "cli"}),
        ("callbacks", {"datamodules", "commands", "cli"}),
    ],
)
def test_packages_import_one_way(package, banned):
    for file in (ROOT / package).rglob("*.py"):
        assert not banned & set(imported(file)), file


def test_the_core_knows_no_lightning():
    files = [file for file in (ROOT / "gpt2_pl").rglob("*.py") if file.parent.name not in OUTSIDE]
    assert {"model", "cuda_graph", "lora", "runs"} <= {file.stem for file in files}
    for file in files:
        assert not {"lightning", "datamodules"} & set(imported(file)), file


def test_every_module_can_be_the_first_that_is_imported():
    """Modules that import one another in a circle work or not, according to where one begins."""
    code = """
import importlib, pkgutil, sys
import torch, lightning.pytorch, transformers
ours = ("gpt2_pl", "datamodules", "callbacks", "commands")
names = [m.name for package in ours for m in pkgutil.walk_packages([package], package + ".")]
assert len(names) > 50, names
for name in [*ours, *names]:
    for loaded in [n for n in sys.modules if n.split(".")[0] in ours]:
        del sys.modules[loaded]
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args", [["--help"], ["--version"], []])
def test_help_needs_no_torch(args):
    code = f"import sys, cli; cli.main({args!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("alone", [False, True])
def test_what_a_caller_holds_is_not_withheld_from_the_garbage_collector(alone):
    """Only in a process of the program's own does what is there when a command is imported stay until the end."""
    code = f"""
import gc, weakref, cli
class Cycle: pass
cycle = Cycle()
cycle.itself = cycle
alive = weakref.ref(cycle)
del cycle
cli._imported("compare", alone={alone})
assert gc.isenabled()
gc.collect()
assert (alive() is not None) == (gc.get_freeze_count() > 0) == {alone}
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_help_is_quick():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "cli.py", "--help"], cwd=ROOT, env=os.environ, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 4
