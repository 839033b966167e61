"""Hostile and damaged checkpoint files: each is refused in one line, quickly and with little memory."""

import struct
import time
import tracemalloc
import zipfile

import pytest
import torch
from conftest import ROOT
from helpers.checkpoints import content
from helpers.refusals import refused as refused_by_command

from gpt2_pl.errors import InputError
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


MANY = "more than 2,000,000 values"
BOMBS = {
    "compressed": ({}, zipfile.ZIP_DEFLATED, "its entries must not be compressed"),
    "bomb": ({"data.pkl": lambda _: pickled(text(bytes(10**8)))}, zipfile.ZIP_DEFLATED, "must not be compressed"),
    "large values": ({"data.pkl": lambda _: pickled(text(bytes(2 * 10**7)))}, 0, "more than 16,777,216 bytes"),
    "many values": ({"data.pkl": lambda _: pickled(b"](" + b"K\x01" * 3 * 10**5 + b"e")}, 0, MANY),
    "deep": ({"data.pkl": lambda _: pickled(b"]" * 10**5 + b"a" * (10**5 - 1))}, 0, "values more than 100 deep"),
    "aliases": ({"data.pkl": lambda _: pickled(aliases(60))}, 0, MANY),
    "task of aliases": ({"data.pkl": lambda _: as_task(b"h\x3b", aliases(60))}, 0, MANY),
    "cycle": ({"data.pkl": lambda _: pickled(b"]q\x00h\x00a")}, 0, "values more than 100 deep"),
    "task of bytes": ({"data.pkl": lambda _: as_task(b"K\x01")}, 0, "task must be the path of a class"),
    "list": ({"data.pkl": lambda _: pickled(b"]")}, 0, "task must be the path of a class"),
    "long task": ({"data.pkl": lambda _: as_task(text(b"x" * 10**7))}, 0, "which is not a task of this library"),
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


def refused(file, words):
    tracemalloc.start()
    since = time.process_time()
    with pytest.raises(InputError) as caught:
        read(file, "ckpt_path", Task)
    assert time.process_time() - since < 30.0  # under 3 without tracing
    assert tracemalloc.get_traced_memory()[1] < 5 * 10**8
    tracemalloc.stop()
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"ckpt_path: {file}")
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("name", BOMBS)
def test_read_hostile_archive_is_refused(name, good, tmp_path, monkeypatch):
    """Use a tenth of the limit of values, since tracing of memory is slow."""
    changes, compression, words = BOMBS[name]
    monkeypatch.setattr(checkpoint, "_MAX_VALUES", 200_000)
    repacked(good, tmp_path / "hostile.ckpt", changes, compression)
    refused(tmp_path / "hostile.ckpt", words.replace("2,000,000", "200,000"))


def test_read_too_many_values_is_refused_within_seconds(good, tmp_path):
    changes = {"data.pkl": lambda _: pickled(b"](" + b"K\x01" * (2 * 10**6 + 1) + b"e")}
    repacked(good, tmp_path / "many.ckpt", changes, 0)
    since = time.process_time()
    with pytest.raises(InputError, match=MANY):
        read(tmp_path / "many.ckpt", "ckpt_path", Task)
    assert time.process_time() - since < 10.0


def test_commands_archive_with_shortened_record_is_refused(run, base, data_flags, capsys, tmp_path):
    """A memory-mapped read would continue past the end of the record without an error."""
    fit = ["--config", ROOT / "configs/task/imdb.yaml", f"--model.base={base}", *data_flags, "--data.max_length=32"]
    folder = run("fit", *fit, "--trainer.max_epochs=1", "--trainer.accelerator=cpu")
    repacked(folder / "checkpoints/last.ckpt", tmp_path / "short.ckpt", {"data/3": lambda data: data[:-8]}, 0)
    capsys.readouterr()
    for command in ("fit", "test"):
        line = refused_by_command(run, capsys, command, *fit, f"--ckpt_path={tmp_path / 'short.ckpt'}")
        assert "short.ckpt cannot be resumed: RuntimeError: record size" in line


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_read_truncated_archive_is_refused(share, good, tmp_path):
    whole = good.read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: int(share * len(whole))])
    refused(tmp_path / "half.ckpt", "is not a checkpoint of this library")


def test_read_archive_with_false_record_size_is_refused(good, tmp_path):
    """The archive's directory gives a record a size of gigabytes."""
    data = good.read_bytes()
    place = data.rindex(b"PK\x01\x02")
    lying = data[: place + 20] + struct.pack("<II", 2**31, 2**31) + data[place + 28 :]
    (tmp_path / "lying.ckpt").write_bytes(lying)
    refused(tmp_path / "lying.ckpt", "its entries are larger than the file")


def test_read_repacked_archive_without_changes_is_accepted(good, tmp_path):
    repacked(good, tmp_path / "same.ckpt", {}, zipfile.ZIP_STORED)
    assert torch.equal(read(tmp_path / "same.ckpt", "ckpt_path", Task)["state_dict"]["head"], torch.ones(7))
