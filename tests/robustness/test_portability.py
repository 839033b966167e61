"""Portability to Windows and macOS: no dependence on Unix-only modules, functions and file names."""

import ast
import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, metrics
from helpers.refusals import refusal

from gpt2_pl import filesystem
from gpt2_pl.commands.support import settings
from gpt2_pl.utils import machine

OURS = ("gpt2_pl", "datamodules", "callbacks", "configs", "benchmarks")
MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
FUNCTIONS = {
    "os": ("fork", "getuid", "geteuid", "getgid", "getpgid", "getloadavg", "kill", "killpg", "mkfifo", "nice",
           "pread", "pwrite", "register_at_fork", "sched_getaffinity", "setsid", "statvfs", "sysconf", "uname",
           "wait", "waitpid"),
    "signal": ("SIGALRM", "SIGHUP", "SIGKILL", "SIGSTOP", "SIGUSR1", "SIGUSR2", "alarm", "pause", "pthread_kill",
               "pthread_sigmask", "setitimer", "sigwait"),
}  # fmt: skip


def sources():
    for file in [ROOT / "cli.py", *(file for package in OURS for file in (ROOT / package).rglob("*.py"))]:
        yield file, ast.parse(file.read_text(encoding="utf-8"))


def test_sources_use_no_unix_only_modules_or_functions():
    found = []
    for file, tree in sources():
        guarded = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and node not in guarded:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                found += [(file.name, name) for name in names if name in MODULES]
            of = node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else None
            if of is not None and node.attr in FUNCTIONS.get(of, ()):
                found.append((file.name, f"{of}.{node.attr}"))
    assert found == []


def test_sources_text_files_are_opened_with_an_encoding():
    """Windows has another default encoding."""
    found = []
    for file, tree in sources():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            plain, given = isinstance(node.func, ast.Name), {keyword.arg: keyword.value for keyword in node.keywords}
            modes = [value.value for value in (*node.args[1:2], given.get("mode")) if isinstance(value, ast.Constant)]
            of_text = called in ("read_text", "write_text") and not plain
            of_text |= called == "open" and plain and not any("b" in mode for mode in modes)
            if of_text and not {"encoding", None} & given.keys():
                found.append((file.name, node.lineno))
    assert found == []


ELSEWHERE = f"""
import ctypes, importlib, os, pkgutil, signal, sys
# Libraries ask once which system this is: they are imported before it is made another.
import datasets, filelock, lightning.pytorch, multiprocessing.popen_fork, optuna, psutil, pyarrow.parquet, submitit
import tensorboard.backend, torch, torch.distributed.checkpoint.state_dict, torch.distributed.fsdp
import torch.utils.tensorboard, transformers
import lightning.pytorch.trainer.connectors.signal_connector as connector
connector._IS_WINDOWS = True
of_windows = set(map(signal.Signals.__getitem__, ("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM")))
connector._SignalConnector._valid_signals = staticmethod(lambda: of_windows)
MODULES, FUNCTIONS = {MODULES}, {FUNCTIONS}
for name in MODULES:
    if name != "posix":
        sys.modules[name] = None  # its import fails
for module, names in FUNCTIONS.items():
    for name in names:
        if hasattr(sys.modules[module], name):
            delattr(sys.modules[module], name)
load = ctypes.CDLL
def no_program(name, *args, **kwargs):
    if name is None:
        raise TypeError("Windows has no handle of the program itself")
    return load(name, *args, **kwargs)
ctypes.CDLL = no_program
sys.argv[0] = "gpt2-pl"
names = [module.name for module in pkgutil.walk_packages(["gpt2_pl"], "gpt2_pl.")]
for package in {OURS[1:4]}:
    names += [module.name for module in pkgutil.walk_packages([package], f"gpt2_pl.{{package}}.")]
assert len(names) > 50, names
for name in [*names, "cli"]:
    importlib.import_module(name)
os.chdir(sys.argv.pop(1))
sys.modules["cli"].main()
"""


@pytest.mark.slow
def test_fit_without_unix_only_modules_and_functions_works(tmp_path):
    quick = ["fit", f"--config={ROOT}/configs/quickstart.yaml", "--data.n_train=60", "--trainer.max_epochs=1",
             "--trainer.accelerator=cpu", "--name=a", "--version=v"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path, *quick], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=280, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    account = metrics(tmp_path / "lightning_logs/a/v")
    assert account["status"] == "finished"
    assert account["peak_memory_bytes"] > 10**7


def test_peak_process_memory_without_resource_module_uses_psutil(monkeypatch):
    exact = machine.peak_process_memory()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert 10**7 < machine.peak_process_memory() <= exact

    class Windows:
        def memory_info(self):
            return type("Memory", (), {"rss": 1, "peak_wset": 2})

    monkeypatch.setattr(machine.psutil, "Process", Windows)
    assert machine.peak_process_memory() == 2


def test_available_cores_without_cpu_affinity_equals_cpu_count(monkeypatch):
    assert 1 <= machine.available_cores() <= os.cpu_count()
    monkeypatch.delattr(machine.psutil.Process, "cpu_affinity")
    assert machine.available_cores() == os.cpu_count()


def test_peak_process_memory_includes_freed_memory():
    before = machine.peak_process_memory()
    size = before + 2**26 - psutil.Process().memory_info().rss
    with mmap.mmap(-1, size) as pages:
        pages.write(bytes([1]) * size)
    assert machine.peak_process_memory() > max(before, psutil.Process().memory_info().rss)


def test_check_name_invalid_windows_folder_name_is_refused(monkeypatch):
    bad = ["a:b", "C:run", "what?", "a|b", 'a"b', "<a>", "a*", "run.", "run ", "a/nul", "COM1.txt"]
    for name in bad if os.name != "nt" else ():
        settings.check_name(name)
    monkeypatch.setattr(settings, "WINDOWS", True)
    for name in bad:
        assert "Windows" in str(refusal(settings.check_name, name)), name
    for good in ("run", "a.b", "sweep/task/full,lr=0.1", "nullify", "console"):
        settings.check_name(good)


def test_atomic_write_on_windows_retries_while_the_file_is_open(tmp_path, monkeypatch):
    """Windows does not replace an open file."""
    path, replace, refusals = tmp_path / "file", Path.replace, [1, 1]

    def refuse(part, target):
        if refusals:
            refusals.pop()
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(part), None, str(target))
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(filesystem.time, "sleep", lambda seconds: None)
    with pytest.raises(PermissionError), filesystem.atomic_write(path) as file:
        file.write("one")
    monkeypatch.setattr(filesystem, "_IS_WINDOWS", True)
    with filesystem.atomic_write(path) as file:
        file.write("two")
    assert path.read_text(encoding="utf-8") == "two"
    refusals.extend([1] * 50)
    with pytest.raises(PermissionError), filesystem.atomic_write(path) as file:
        file.write("three")
    assert [name.name for name in tmp_path.iterdir()] == ["file"]
    assert path.read_text(encoding="utf-8") == "two"
