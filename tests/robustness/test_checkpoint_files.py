"""Hostile and damaged checkpoint files: each is refused in one line, quickly and with little memory."""

import struct
import time
import tracemalloc
import zipfile

import pytest
import torch
from conftest import ROOT
from helpers.checkpoints import content
from helpers.refusals import refusal
from helpers.refusals import refused as refused_by_command

from gpt2_pl.tasks import Task, checkpoint
from gpt2_pl.tasks.checkpoint import read


def pickled(body):
    """Return a pickle of protocol 2."""
    return b"\x80\x02" + body + b"."


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


def aliases(n):
    """Return the pickle of nested lists, n deep, each with nine references to the next."""
    return b"]q\x00" + b"".join(b"]q" + bytes([i]) + b"(" + (b"h" + bytes([i - 1])) * 9 + b"e" for i in range(1, n))


def as_task(value, before=b""):
    """Return the pickle of a checkpoint whose task is the given value."""
    return pickled(before + b"}" + text(b"task") + value + b"s")


def claim(pickle, at, size):
    """Return the pickle with another size of a tensor of 7 elements."""
    places = [i for i in range(len(pickle)) if pickle[i : i + 2] == b"K\x07"]
    place = places[at]
    return pickle[:place] + b"\x8a\x06" + size.to_bytes(6, "little") + pickle[place + 2 :]


MANY = "20,000"
BOMBS = {
    "compressed": ({}, zipfile.ZIP_DEFLATED, "compressed"),
    "bomb": ({"data.pkl": lambda _: pickled(text(bytes(10**8)))}, zipfile.ZIP_DEFLATED, "compressed"),
    "large values": ({"data.pkl": lambda _: pickled(text(bytes(2 * 10**7)))}, 0, "16,777,216"),
    "many values": ({"data.pkl": lambda _: pickled(b"](" + b"K\x01" * 3 * 10**4 + b"e")}, 0, MANY),
    "deep": ({"data.pkl": lambda _: pickled(b"]" * 10**4 + b"a" * (10**4 - 1))}, 0, "100 deep"),
    "aliases": ({"data.pkl": lambda _: pickled(aliases(60))}, 0, MANY),
    "task of aliases": ({"data.pkl": lambda _: as_task(b"h\x3b", aliases(60))}, 0, MANY),
    "cycle": ({"data.pkl": lambda _: pickled(b"]q\x00h\x00a")}, 0, "100 deep"),
    "task of bytes": ({"data.pkl": lambda _: as_task(b"K\x01")}, 0, "task"),
    "list": ({"data.pkl": lambda _: pickled(b"]")}, 0, "task"),
    "long task": ({"data.pkl": lambda _: as_task(text(b"x" * 10**7))}, 0, "is not a task"),
    "escape": ({"data.pkl": lambda _: as_task(text(b"\x1b[31mTask\n"))}, 0, r"\x1b[31mTask"),
    "long number": ({"data.pkl": lambda _: pickled(b"\x8b\x40\x42\x0f\0" + b"\x01" * 10**6)}, 0, "checkpoint"),
    "empty pickle": ({"data.pkl": lambda _: b""}, 0, "is not a checkpoint"),
    "half a pickle": ({"data.pkl": lambda data: data[:-9]}, 0, "is not a checkpoint"),
    "no pickle": ({"data.pkl": lambda _: None}, 0, "is not a checkpoint"),
    "no data": ({"data/0": lambda _: None}, 0, "is not a checkpoint"),
    "large tensor": ({"data.pkl": lambda data: claim(data, 1, 10**12)}, 0, "is not a checkpoint"),
}  # fmt: skip


def repacked(source, target, changes, compression):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = old.read(name)
            for ending, change in changes.items():
                if name.endswith(f"/{ending}"):
                    data = change(data)
            if data is not None:
                new.writestr(name, data)


@pytest.fixture
def good(tmp_path):
    file = tmp_path / "good.ckpt"
    torch.save(content(base={"complete": False}, state_dict={"head": torch.ones(7)}), file)
    read(file, "ckpt_path", Task)
    return file


def refused(file, words, case):
    tracemalloc.start()
    try:
        since = time.process_time()
        error = refusal(read, file, "ckpt_path", Task, case=case)
        assert time.process_time() - since < 30.0, case  # under 3 without tracing
        assert tracemalloc.get_traced_memory()[1] < 5 * 10**8, case
    finally:
        tracemalloc.stop()
    assert words in str(error), case
    assert str(error).startswith(f"ckpt_path: {file}"), case
    assert len(str(error)) < 5000, case


def test_read_hostile_archive_is_refused(good, tmp_path, monkeypatch):
    """Use a hundredth of the limit of values, since tracing of memory is slow."""
    monkeypatch.setattr(checkpoint, "_MAX_VALUES", 20_000)
    for name, (changes, compression, words) in BOMBS.items():
        file = tmp_path / f"{name}.ckpt"
        repacked(good, file, changes, compression)
        refused(file, words, name)
        file.unlink()


def test_commands_archive_with_shortened_record_is_refused(run, base, data_flags, capsys, tmp_path):
    """A memory-mapped read would continue past the end of the record without an error."""
    fit = ["--config", ROOT / "configs/task/imdb.yaml", f"--model.base={base}", *data_flags, "--data.max_length=32"]
    folder = run("fit", *fit, "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
                 "--trainer.limit_train_batches=1")  # fmt: skip
    repacked(folder / "checkpoints/last.ckpt", tmp_path / "short.ckpt", {"data/3": lambda data: data[:-8]}, 0)
    capsys.readouterr()
    for command in ("fit", "test"):
        line = refused_by_command(run, capsys, command, *fit, f"--ckpt_path={tmp_path / 'short.ckpt'}")
        assert "short.ckpt" in line
        assert "record size" in line


def test_read_truncated_archive_is_refused(good, tmp_path):
    whole = good.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9, 0.99):
        (tmp_path / "half.ckpt").write_bytes(whole[: int(share * len(whole))])
        refused(tmp_path / "half.ckpt", "is not a checkpoint", share)


def test_read_archive_with_false_record_size_is_refused(good, tmp_path):
    """The archive's directory gives a record a size of gigabytes."""
    data = good.read_bytes()
    place = data.rindex(b"PK\x01\x02")
    lying = data[: place + 20] + struct.pack("<II", 2**31, 2**31) + data[place + 28 :]
    (tmp_path / "lying.ckpt").write_bytes(lying)
    refused(tmp_path / "lying.ckpt", "larger than the file", "false size")


def test_read_repacked_archive_without_changes_is_accepted(good, tmp_path):
    repacked(good, tmp_path / "same.ckpt", {}, zipfile.ZIP_STORED)
    assert torch.equal(read(tmp_path / "same.ckpt", "ckpt_path", Task)["state_dict"]["head"], torch.ones(7))
