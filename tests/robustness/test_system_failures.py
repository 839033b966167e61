"""System failures (disks, files, memory, streams): every command ends with one line or none."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers.refusals import refused
from helpers.runs import fake_run

from gpt2_pl.commands import main
from gpt2_pl.errors import InputError, RunError, describe_failure, is_full
from gpt2_pl.filesystem import atomic_write, require_file, require_writable, reraise_disk_full

QUICK = [f"--config={ROOT}/configs/quickstart.yaml", "--data.n_train=60", "--trainer.precision=32-true",
         "--trainer.max_epochs=1"]  # fmt: skip
COMMANDS = ("fit", "test", "classify", "compare", "export")
# Numbers without a name are not of every system.
ERRORS = [getattr(errno, name) for name in ("EIO", "ENOSPC", "EROFS", "ESTALE", "EMFILE", "EACCES", "ENAMETOOLONG")]


def failure(number, path=None):
    return OSError(number, os.strerror(number), *([] if path is None else [str(path)]))


# What an error says


def raised(make):
    """Return the error that a function raises."""
    try:
        make()
    except Exception as error:
        return error
    raise AssertionError


def from_worker():
    """Raise the error by which torch's DataLoader replaces that of a worker."""
    from torch._utils import ExceptionWrapper

    try:
        raise failure(errno.EIO, "rows.arrow")
    except OSError:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    pickle.loads(pickle.dumps(wrapper)).reraise()


def from_rust():
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, "/nonexistent/folder/file")


def wrapped():
    try:
        raise failure(errno.ENOSPC)
    except OSError as error:
        raise ValueError("a library's own") from error


def while_handling():
    try:
        raise failure(errno.ESTALE, "a")
    except OSError:
        raise ValueError("a library's own")  # noqa: B904


DESCRIBED = [
    (lambda: os.open("/nonexistent/a", os.O_RDONLY), "/nonexistent/a: No such file or directory"),
    (lambda: os.rename("/nonexistent/a", "/b"), "/nonexistent/a -> /b: No such file or directory"),
    (wrapped, os.strerror(errno.ENOSPC)),
    (while_handling, f"a: {os.strerror(errno.ESTALE)}"),
    (from_worker, os.strerror(errno.EIO)),
    (from_rust, os.strerror(errno.ENOENT)),
    (lambda: torch.empty(10**15), "there is not enough memory for another 4000000000000000 bytes; a smaller batch"),
    (lambda: np.empty(10**15), "there is not enough memory for another 7.11 PiB"),
    (lambda: bytearray(10**15), "there is not enough memory"),
]


def test_describe_failure_of_system_errors_is_one_line():
    for make, line in DESCRIBED:
        described = describe_failure(raised(make))
        assert described is not None, line
        assert described.startswith(line), line
        assert "\n" not in described, line


def test_describe_failure_of_device_memory_names_the_amount():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total of ...\nmore")
    assert describe_failure(error).startswith("there is not enough memory on the device for another 20.00 MiB; ")


def probed():
    try:
        os.stat("/nonexistent")
    except OSError:
        raise KeyError("a fault of the program")  # noqa: B904


def test_describe_failure_of_program_errors_returns_none():
    for make in (lambda: {}["a"], probed, lambda: torch.zeros(2) @ torch.zeros(3), lambda: os.close(10**6)):
        error = raised(make)
        assert describe_failure(error) is None, error


def test_reraise_disk_full_names_the_written_file_and_keeps_other_errors(tmp_path):
    path = tmp_path / "out"
    for number in (errno.ENOSPC, errno.EIO):
        with pytest.raises(Exception, match=f"{path}"), reraise_disk_full(path):
            raise failure(number)
    with pytest.raises(OSError, match="input"), reraise_disk_full(path):  # of a file that was read meanwhile
        raise failure(errno.EIO, "input")
    with pytest.raises(InputError, match="row 3"), reraise_disk_full(path):
        raise InputError("row 3 cannot be read") from failure(errno.EIO)
    assert is_full(failure(errno.ENOSPC))
    assert not is_full(failure(errno.EIO))


# Every command


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    before, place = Path.cwd(), tmp_path_factory.mktemp("trained")
    os.chdir(place)
    main(["fit", *QUICK, "--trainer.enable_progress_bar=false"])
    os.chdir(before)
    return place / "lightning_logs"


@pytest.fixture
def trained(trained_once, run, tmp_path):
    """A run's folder in the working directory."""
    shutil.copytree(trained_once, tmp_path / "lightning_logs")
    (tmp_path / "rows.csv").write_text("sentence\na fine film\n")
    return Path("lightning_logs/quickstart/version_0")


def arguments(command, folder):
    return {
        "fit": QUICK,
        "test": [f"--config={folder}/config.yaml", f"--ckpt_path={folder}/checkpoints/best.ckpt"],
        "classify": [folder, "--input", "rows.csv", "--out", "o.csv"],
        "compare": [folder, "--out", "o"],
        "export": [folder, "--format", "hf", "--out", "o"],
    }[command]


def ends_in_one_line(run, capsys, command, folder):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(command, *arguments(command, folder))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("gpt2-pl: ", "Traceback"))]
    assert len(lines) == 1, lines
    assert stop.value.code in (1, 2)
    return lines[0]


def test_commands_write_error_is_one_line_and_keeps_files(trained, run, capsys, monkeypatch, tmp_path):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    for i, number in enumerate(ERRORS):
        command = COMMANDS[i % len(COMMANDS)]

        def fails(descriptor, number=number):
            raise failure(number)

        monkeypatch.setattr("gpt2_pl.filesystem.os.fsync", fails)
        line = ends_in_one_line(run, capsys, command, trained)
        assert os.strerror(number) in line or (number == errno.ENOSPC and "disk full while writing" in line), line
        shutil.rmtree(tmp_path / "o", ignore_errors=True)
        assert not list(tmp_path.rglob(".*.part"))
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_commands_read_error_is_one_line(command, trained, run, capsys, monkeypatch, tmp_path):
    """Fail when files of the run are opened and when they are looked up."""
    folders = (trained, trained.resolve())
    for i, number in enumerate(ERRORS):
        name = ("open", "stat")[i % 2]
        real = getattr(Path, name)

        def fails(path, *args, real=real, number=number, **kwargs):
            if any(folder in path.parents for folder in folders):
                raise failure(number, path)
            return real(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Path, name, fails)
            line = ends_in_one_line(run, capsys, command, trained)
        assert os.strerror(number) in line or "there is no" in line, line
        shutil.rmtree(tmp_path / "o", ignore_errors=True)
    assert not list(tmp_path.rglob(".*.part"))


OUT_OF_MEMORY = [
    ("fit", "gpt2_pl.tasks.SentimentClassifier.training_step", torch.empty),
    ("fit", "gpt2_pl.datamodules.synthetic.ToySentiment.setup", bytearray),
    ("test", "gpt2_pl.tasks.SentimentClassifier.test_step", torch.empty),
    ("classify", "gpt2_pl.inference.predictor.Predictor.predict_ids", torch.empty),
    ("compare", "gpt2_pl.commands.compare.plots", bytearray),
    ("export", "gpt2_pl.commands.export.export_hf", torch.empty),
]


def test_commands_out_of_memory_is_one_line(trained, run, capsys, monkeypatch):
    for command, moment, allocate in OUT_OF_MEMORY:
        with monkeypatch.context() as patch:
            patch.setattr(moment, lambda *_, allocate=allocate, **__: allocate(10**15))
            assert "there is not enough memory" in ends_in_one_line(run, capsys, command, trained), moment
        shutil.rmtree("o", ignore_errors=True)


# Folders


def test_fit_and_sweep_log_folder_that_is_not_a_folder_is_refused(run, tmp_path, capsys):
    Path("s.yaml").write_text(f"tasks: {{t: {{configs: [{QUICK[0][9:]}], strategies: {{full: {{configs: []}}}}}}}}")
    logs = Path("lightning_logs")
    for what in ("dangling", "loop", "file"):
        if what == "file":
            logs.touch()
        else:
            logs.symlink_to("/nonexistent/disk" if what == "dangling" else "lightning_logs")
        for command in (["fit", *QUICK], ["sweep", "s.yaml"]):
            line = refused(run, capsys, *command)
            assert f"{tmp_path}/lightning_logs: " in line, what
        logs.unlink()


def test_require_writable_path_through_dangling_link_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for path in (tmp_path / "link", tmp_path / "link/a/b"):
        with pytest.raises(InputError, match=f"out: {path} cannot be created, {tmp_path}/link: No such file"):
            require_writable(path, "out")
    require_writable(tmp_path / "a/b", "out")


def test_require_file_unreadable_file_gives_the_reason(tmp_path, monkeypatch):
    def stale(path, *, follow_symlinks=True):
        raise failure(errno.ESTALE, path)

    monkeypatch.setattr(Path, "stat", stale)
    with pytest.raises(InputError, match=f"input: a .*{os.strerror(errno.ESTALE)}"):
        require_file("a", "input")


def test_atomic_write_on_failing_disk_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("before")
    monkeypatch.setattr(Path, "replace", lambda part, target: (_ for _ in ()).throw(failure(errno.EIO)))
    message = "cannot be written: Input/output error; the previous file is unchanged"
    with pytest.raises(RunError, match=message), atomic_write(path) as file:
        file.write("after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


# Streams, in processes of their own


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A folder with a synthetic run that compare reads quickly."""
    folder = tmp_path_factory.mktemp("fake")
    fake_run(folder / "lightning_logs/a/version_0", "full", 1, [1, 0, 1])
    return folder


def shell(folder, command, **environment):
    """Run a line of bash in which ``gpt2-pl`` is this checkout's."""
    script = f'gpt2-pl() {{ {sys.executable} {ROOT / "cli.py"} "$@"; }}; {command}'
    return subprocess.run(["bash", "-c", script], cwd=folder, env={**os.environ, **environment}, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip


REPORTS = {"report.md", "report.html", "report.csv", "report.json"}


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("gpt2-pl --help | true; exit ${PIPESTATUS[0]}", 0),
        ("gpt2-pl compare lightning_logs/a --out out | true; exit ${PIPESTATUS[0]}", 0),
        ("gpt2-pl compare lightning_logs/a --out out >&- 2>&- <&-", 0),
        ("gpt2-pl compare lightning_logs/nothing --out x 2>&-", 2),
        ("gpt2-pl nonsense 2>/dev/full >&- | true; exit ${PIPESTATUS[0]}", 2),
    ],
)
def test_main_closed_output_streams_are_no_error(command, status, fake):
    done = shell(fake, command)
    assert (done.returncode, done.stderr) == (status, "")
    if "--out out" in command:
        assert {path.name for path in (fake / "out").iterdir()} >= REPORTS
        json.loads((fake / "out/report.json").read_text())
        shutil.rmtree(fake / "out")


@pytest.mark.parametrize("args", ["--help", "compare lightning_logs/a --out full"])
def test_main_output_to_a_full_disk_is_one_line(args, fake):
    done = shell(fake, f"gpt2-pl {args} >/dev/full")
    assert (done.returncode, done.stderr) == (1, "gpt2-pl: error: standard output: No space left on device\n")


def test_main_output_character_outside_the_encoding_is_escaped(fake):
    done = shell(fake, "gpt2-pl compare lightning_logs/a --out \u00fc", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith(r"\xfc: ")


def test_main_deleted_working_folder_is_one_line(fake):
    for command in ("compare a --out b", "fit --config x.yaml"):
        done = shell(fake, f"mkdir gone && cd gone && rmdir ../gone && gpt2-pl {command}")
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("shell-init")]
        assert line.startswith("gpt2-pl: error: the working directory cannot be used: ")


def test_main_too_many_open_files_is_one_line(fake):
    limited = (
        "import resource; from gpt2_pl.commands import main; resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4)); main()"
    )
    done = subprocess.run([sys.executable, "-c", limited, "compare", "lightning_logs/a", "--out", "few"], cwd=fake,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
                          check=False)  # fmt: skip
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert "Too many open files" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the address space")
def test_main_without_memory_is_one_line(fake):
    done = shell(fake, "ulimit -v 400000; gpt2-pl fit --config x.yaml")
    assert (done.returncode, done.stderr) == (1, "gpt2-pl: error: there is not enough memory\n")
