"""Archives of the records of runs: what they keep, and what is done with them."""

import csv
import io
import json
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from helpers.runs import fake_run
from helpers.searches import fake_search, sweep_run

from gpt2_pl.commands import main
from gpt2_pl.commands.compare import read_runs
from gpt2_pl.errors import InputError
from gpt2_pl.experiments import archive
from gpt2_pl.experiments.archive import unpack, write_archive


@pytest.fixture
def swept(tmp_path):
    """A sweep of two strategies with searches of two trials, the second of which failed before its first epoch."""
    generator = np.random.default_rng(0)
    for strategy in ("full", "lora"):
        for seed in (1, 2):
            folder = sweep_run(
                tmp_path / f"s/quora/{strategy}/seed_{seed}", strategy, seed, generator.random(100) < 0.7
            )
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints/best.ckpt").write_bytes(bytes(10**6))
        search = fake_search(tmp_path / "s/quora", strategy, [0.7, None])
        for name in ("metrics.json", "config.yaml", "predictions_val.csv"):
            (search / "trial_1" / name).unlink()
        search.with_name(f"{strategy}.journal").write_text("{}\n")
    return tmp_path


def printed(capsys, *paths):
    main(["compare", *map(str, paths), "--margin", "1"])
    return capsys.readouterr().out


def test_compare_archive_prints_what_it_prints_of_the_folder(swept, capsys):
    of_folder = printed(capsys, swept / "s")
    main(["archive", str(swept / "s"), "--out", str(swept / "s.tar.xz")])
    assert "s.tar.xz: 6 runs, " in capsys.readouterr().out
    assert (swept / "s.tar.xz").stat().st_size < 20_000
    shutil.rmtree(swept / "s")
    shutil.rmtree(swept / "s.search")
    note = "note: 2 search trials are left out, because they prepare other runs"
    assert printed(capsys, swept / "s.tar.xz").replace(note, "").split() == of_folder.split()
    report = swept / "report"
    main(["compare", str(swept / "s.tar.xz"), f"--out={report}"])
    capsys.readouterr()
    rows = csv.DictReader((report / "report.csv").read_text().splitlines())
    assert sorted(row["run"] for row in rows) == sorted(
        str(swept / f"s.tar.xz/s/quora/{strategy}/seed_{seed}") for strategy in ("full", "lora") for seed in (1, 2)
    )
    main(["power", str(swept / "s.tar.xz"), "--difference", "1"])
    assert "lora against full" in capsys.readouterr().out


def test_write_archive_twice_gives_equal_files_and_tar_unpacks_the_records(swept, tmp_path):
    folder = swept / "s"
    for name in ("a", "b"):
        assert write_archive([folder], tmp_path / f"{name}.tar.xz") == 6
    assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes()
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xJf", tmp_path / "a.tar.xz", "-C", tmp_path / "out"], check=True)
    kept = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").glob("**/*") if path.is_file()}
    originals = [path for part in ("s", "s.search") for path in (swept / part).glob("**/*") if path.is_file()]
    assert {swept / name for name in kept} == {path for path in originals if path.suffix != ".ckpt"}
    assert all((tmp_path / "out" / name).read_bytes() == (swept / name).read_bytes() for name in kept)
    assert all(int((tmp_path / "out" / name).stat().st_mtime) == int((swept / name).stat().st_mtime) for name in kept)


def test_archive_without_validation_rows_compares_test_scores_alike(swept, capsys):
    for folder in (swept / "s").glob("quora/*/seed_*"):
        shutil.copy(folder / "predictions_val.csv", folder / "predictions_test.csv")
        record = json.loads((folder / "metrics.json").read_text())
        record["scores"]["test/accuracy"] = record["scores"]["val/accuracy"]
        (folder / "metrics.json").write_text(json.dumps(record))
    validated = fake_run(swept / "s/quora/alone/seed_1", "alone", 1, np.ones(100, bool))
    of_folder = printed(capsys, *(swept / "s/quora" / strategy for strategy in ("full", "lora")))
    main(["archive", str(swept / "s"), "--out", str(swept / "small.tar.xz"), "--without_validation_rows"])
    capsys.readouterr()
    with tarfile.open(swept / "small.tar.xz") as file:
        names = [name for name in file.getnames() if name.endswith("_val.csv")]
    assert names == [f"{(validated / 'predictions_val.csv').relative_to(swept)}"]
    shutil.rmtree(swept / "s/quora/alone")
    main(["archive", str(swept / "s"), "--out", str(swept / "both.tar.xz"), "--without_validation_rows"])
    capsys.readouterr()
    note = "note: 2 search trials are left out, because they prepare other runs"
    assert printed(capsys, swept / "both.tar.xz").replace(note, "").split() == of_folder.split()


def test_write_archive_unfinished_run_is_left_out(tmp_path):
    fake_run(tmp_path / "runs/a", "full", 1, np.ones(100, bool), status="running")
    with pytest.raises(InputError, match="RUN must be a folder with runs that have ended"):
        write_archive([tmp_path / "runs"], tmp_path / "runs.tar.xz")
    assert not (tmp_path / "runs.tar.xz").exists()
    fake_run(tmp_path / "runs/b", "full", 2, np.ones(100, bool))
    assert write_archive([tmp_path / "runs"], tmp_path / "runs.tar.xz") == 1


def test_write_archive_two_folders_of_one_name_are_refused(tmp_path):
    folders = [fake_run(tmp_path / f"{part}/runs/a", "full", 1, np.ones(100, bool)).parent for part in "xy"]
    with pytest.raises(InputError, match=r"two folders have a file runs/a/config\.yaml"):
        write_archive(folders, tmp_path / "runs.tar.xz")


@pytest.mark.parametrize("path", ["runs.tar", "runs.tar.gz", ".tar"])
def test_archive_command_other_extension_is_refused(swept, path, capsys):
    with pytest.raises(SystemExit):
        main(["archive", str(swept / "s"), "--out", path])
    assert "out must be a file with the extension .tar.xz" in capsys.readouterr().err


def packed(file, *members):
    """Write an archive with members of a name, a type and a content."""
    with tarfile.open(file, "w:xz") as content:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), "/etc/passwd"
            content.addfile(info, io.BytesIO(data))
    return file


@pytest.mark.parametrize(
    "member",
    [
        ("../outside/metrics.json", tarfile.REGTYPE, b"{}"),
        ("a/../../outside/metrics.json", tarfile.REGTYPE, b"{}"),
        ("a/metrics.json", tarfile.SYMTYPE, b""),
        ("a/metrics.json", tarfile.LNKTYPE, b""),
        ("a/metrics.json", tarfile.FIFOTYPE, b""),
        ("a/metrics.json", tarfile.CHRTYPE, b""),
        ("a" * 5000, tarfile.REGTYPE, b"{}"),
        ("..", tarfile.REGTYPE, b"{}"),
        ("C:/metrics.json", tarfile.REGTYPE, b"{}"),
        ("..\\metrics.json", tarfile.REGTYPE, b"{}"),
    ],
)
def test_unpack_hostile_member_writes_nothing_outside(member, tmp_path):
    file = packed(tmp_path / "bad.tar.xz", member)
    folder = tmp_path / "deep/below"
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match=r"bad\.tar\.xz") as caught:
        unpack(file, folder)
    assert len(str(caught.value)) < 600
    assert {path for path in tmp_path.glob("**/*") if path.is_file() and folder not in path.parents} == {file}
    assert not any(path.is_symlink() for path in folder.glob("**/*"))


def test_unpack_absolute_name_is_refused(tmp_path):
    target = tmp_path / "absolute.json"
    file = packed(tmp_path / "bad.tar.xz", (str(target), tarfile.REGTYPE, b"{}"))
    (tmp_path / "below").mkdir()
    with pytest.raises(InputError, match="must be a relative path"):
        unpack(file, tmp_path / "below")
    assert not target.exists()


def test_unpack_too_large_or_broken_archive_is_refused(tmp_path, monkeypatch):
    file = packed(tmp_path / "a.tar.xz", ("a", tarfile.REGTYPE, bytes(2000)), ("b", tarfile.REGTYPE, bytes(10)))
    for name, limit in (("_MAX_BYTES", 2005), ("_MAX_FILES", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(archive, name, limit)
            with pytest.raises(InputError, match=r"a\.tar\.xz must have at most"):
                unpack(file, tmp_path / name)
    whole = file.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:40] + bytes(40) + whole[80:]):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.tar\.xz cannot be unpacked"):
            unpack(file, tmp_path / "below")
    with pytest.raises(InputError, match="there is no file"):
        unpack(tmp_path / "none.tar.xz", tmp_path)


def test_read_runs_archive_without_runs_is_refused(tmp_path):
    file = packed(tmp_path / "a.tar.xz", ("a", tarfile.REGTYPE, b""))
    with archive.unpacked([file]) as paths, pytest.raises(InputError, match=r"a\.tar\.xz"):
        read_runs(paths)
