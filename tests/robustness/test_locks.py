"""Locks of run folders: one process at a time writes into a folder."""

import errno
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, metrics

from gpt2_pl.callbacks.run_folder import RunFolder
from gpt2_pl.commands import main
from gpt2_pl.errors import InputError
from gpt2_pl.experiments.run_lock import LOCK, RunLock

QUICK = ["fit", f"--config={ROOT}/configs/quickstart.yaml", "--data.n_train=60", "--trainer.precision=32-true",
         "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]  # fmt: skip


@contextmanager
def held(folder):
    """Hold the lock of a folder in another process, which is killed at the end."""
    ready, tell = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            lock = RunLock(folder)
            os.write(tell, b".")
            signal.pause()
            lock.release()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"."
    try:
        yield holder
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


def refused(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*map(str, args)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_run_lock_held_by_another_process_is_refused_until_it_is_killed(tmp_path):
    folder = tmp_path / "run"
    with held(folder) as holder, pytest.raises(InputError, match=f"{folder} .*process {holder} "):
        RunLock(folder)
    assert (folder / LOCK).is_file()  # of the process that was killed
    lock = RunLock(folder)
    with pytest.raises(InputError, match=f"process {os.getpid()} "):
        RunLock(folder)
    (folder / "config.yaml").touch()
    lock.release()
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    RunLock(folder).release()


def test_run_lock_released_removes_the_empty_folders_it_made(tmp_path):
    (tmp_path / "logs").mkdir()
    RunLock(tmp_path / "logs/a/b").release()
    assert not list((tmp_path / "logs").iterdir())


def test_run_lock_names_the_other_host(tmp_path):
    with held(tmp_path):
        (tmp_path / LOCK).write_text("7 elsewhere\n")
        with pytest.raises(InputError, match="process 7 on elsewhere"):
            RunLock(tmp_path)
        (tmp_path / LOCK).write_text("not a number\n")
        with pytest.raises(InputError, match="another process"):
            RunLock(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks files otherwise")
def test_run_lock_on_file_system_without_locks_warns_and_continues(tmp_path, monkeypatch, capsys):
    import fcntl

    def missing(descriptor, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    RunLock(tmp_path / "run").release()
    assert "has no locks" in capsys.readouterr().err


def test_run_folder_locked_version_is_skipped(tmp_path):
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run/version_0"):
        folder = RunFolder(tmp_path, "run")
        folder.take()
        assert folder.path.name == "version_1"
    with pytest.raises(InputError, match="is in use"):
        RunLock(tmp_path / "run/version_1")


def test_fit_into_folder_of_running_process_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path("lightning_logs/a/v")
    with held(folder) as holder:
        line = refused(capsys, *QUICK, "--name=a", "--version=v")
        assert line.startswith(f"gpt2-pl: error: {folder} is in use: process {holder} ")
    assert [path.name for path in folder.iterdir()] == [LOCK]


def test_commands_on_locked_run_refuse_writing_and_allow_reading(run, capsys):
    folder = run(*QUICK)
    last, best = (folder / "checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
    part = folder / ".metrics.json.abc.part"  # which the live process is writing
    part.touch()
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    config = f"--config={folder}/config.yaml"
    with held(folder):
        assert "is in use" in refused(capsys, *QUICK, f"--ckpt_path={last}")
        assert "is in use" in refused(capsys, "fit", config, f"--ckpt_path={last}")
        assert "is in use" in refused(capsys, "test", config, f"--ckpt_path={last}", "--version=version_0")
        assert run("test", config, f"--ckpt_path={best}").name == "version_1"
        run("compare", folder, "--out", "compared")
        run("export", folder, "--format", "hf", "--out", "exported")
        assert files.items() <= {path: path.stat().st_mtime_ns for path in folder.rglob("*")}.items()
    assert run("test", config, f"--ckpt_path={last}", "--version=version_0") == folder
    run(*QUICK, "--trainer.max_epochs=2", f"--ckpt_path={last}")
    assert len(metrics(folder)["epochs"]) == 2
    assert not list(folder.rglob(".*"))


def test_fit_refused_configuration_leaves_no_version_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(capsys, *QUICK, "--name=a", "--version=v", "--model.optimizer.init_args.lr=-1.0")
    assert not list(tmp_path.iterdir())
