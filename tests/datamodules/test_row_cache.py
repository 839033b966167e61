"""The cache of encoded rows: its key, files that change, and files of it that are damaged or cannot be written."""

import json
import multiprocessing
import os

import datasets
import pyarrow as pa
import pytest
from helpers.row_files import ENDINGS, data, rows_of, texts, write

from gpt2_pl.datamodules import cache as cache_module
from gpt2_pl.errors import InputError, RunError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of its own for every test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder / "gpt2_pl"


def test_setup_changed_file_with_same_mtime_reads_the_change(base, tmp_path):
    for ending in ENDINGS:
        file = tmp_path / f"rows{ending}"
        for text in ("good film", "evil film", "good film"):
            write(file, rows_of(text))
            os.utime(file, ns=(10**18, 10**18))
            assert texts(data(base, file)) == [text], ending
        write(tmp_path / f"other{ending}", rows_of("evil film")).replace(file)
        os.utime(file, ns=(10**18, 10**18))
        assert texts(data(base, file)) == ["evil film"], ending


def test_cache_key_covers_every_option(base, tmp_path, cache):
    """Compare the rows read with each option from a shared cache and from an empty one."""
    file, other = tmp_path / "rows.csv", tmp_path / "other"
    file.write_text('sentence,label,more\n"a ""good"" film",1,fine\nbad,0,worse\n', encoding="utf-8")
    other.mkdir()
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = [{}, {"template": "It is {sentence}"}, {"labels": ["x", "0", "1"]}, {"labels": ["1", "0"]},
               {"max_length": 3}, {"columns": {"sentence": "more"}}, {"quoting": False, "on_invalid_row": "skip"},
               {"on_invalid_row": "skip"}, {"tokenizer": str(other)}]  # fmt: skip

    def outcome(option):
        module = data(base, file, **option)
        found = texts(module)
        rows = module.encoded["test"]
        return found, rows.values.tolist(), rows.offsets.tolist(), rows.labels.tolist()

    together = [outcome(option) for option in options]
    assert len(list(cache.glob("*.arrow"))) == len(options)
    assert [outcome(option) for option in options] == together
    for option, found in zip(options, together, strict=True):
        for old in cache.glob("*.arrow"):
            old.unlink()
        assert outcome(option) == found
    assert len({repr(found) for found in together}) == len(options) - 1  # on_invalid_row: skip, where none is bad


def damage_cut(content):
    return content[: len(content) // 2]


def damage_middle(content):
    middle = len(content) // 2
    return content[:middle] + b"\0" * 64 + content[middle + 64 :]


def other_table(content):
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, pa.schema([("sentence", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([pa.array(["ANOTHER"])], names=["sentence"]))
    return out.getvalue().to_pybytes()


DAMAGE = {
    "empty": lambda content: b"",
    "a byte": lambda content: b"x",
    "cut": damage_cut,
    "without its last byte": lambda content: content[:-1],
    "without its digest": lambda content: content[:-32],
    "longer": lambda content: content + b"\0",
    "zeros": lambda content: b"\0" * len(content),
    "zeros in the middle": damage_middle,
    "one bit": lambda content: content[:-40] + bytes([content[-40] ^ 1]) + content[-39:],
    "another table": other_table,
}


REPLACED = {
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "fifo": os.mkfifo,
}


def test_setup_damaged_cache_is_rebuilt(base, tmp_path, cache, recwarn, subtests):
    file = write(tmp_path / "rows.csv", rows_of("film", "plot"))
    expected = texts(data(base, file))
    (cached,) = cache.iterdir()
    content = cached.read_bytes()
    for how in (*DAMAGE, *REPLACED):
        with subtests.test(how):
            cached.unlink()
            if how in DAMAGE:
                cached.write_bytes(DAMAGE[how](content))
            else:
                REPLACED[how](cached)
            for _ in range(2):
                module = data(base, file)
                assert texts(module) == expected
                assert module.encoded["test"].labels.tolist() == [0, 1]
            assert [path.name for path in cache.iterdir()] == [cached.name]
            assert cached.read_bytes() == content
    assert not [warning for warning in recwarn if "cache" in str(warning.message)]


def test_setup_unreadable_cache_is_rebuilt(base, tmp_path, cache, monkeypatch):
    file = write(tmp_path / "rows.csv", rows_of("film", "plot"))
    expected, refused = texts(data(base, file)), []
    memory_map = pa.memory_map

    def refuse(path):
        if not refused:
            refused.append(path)
            raise PermissionError(13, "Permission denied", path)
        return memory_map(path)

    monkeypatch.setattr(pa, "memory_map", refuse)
    assert texts(data(base, file)) == expected
    assert refused


def test_setup_unwritable_cache_is_refused(base, tmp_path, cache):
    cache.write_text("")
    with pytest.raises(InputError, match=rf"{cache}/.* cannot be written"):
        data(base, write(tmp_path / "rows.csv", rows_of("film", "plot"))).setup()


def test_setup_complete_cache_is_read_without_writing(base, tmp_path, cache, monkeypatch, recwarn):
    file = write(tmp_path / "rows.csv", rows_of("film", "plot"))
    expected = texts(data(base, file))
    monkeypatch.setattr(cache_module, "atomic_write", lambda *arguments: pytest.fail("it is written to"))
    assert texts(data(base, file)) == expected
    assert not [warning for warning in recwarn if "cache" in str(warning.message)]


def test_setup_refused_data_leaves_cache_empty(base, tmp_path, cache):
    file = write(tmp_path / "rows.csv", rows_of(*("film" for _ in range(12_000)), " "))
    with pytest.raises(InputError, match=r"row 12001: .*'sentence'.* got ' '"):
        data(base, file).setup()
    assert not list(cache.iterdir())


def fit_one(base, file, folder, results):
    datasets.config.HF_DATASETS_CACHE = folder
    results.put(len(texts(data(base, file))))


def test_setup_concurrent_processes_share_one_cache_file(base, tmp_path, cache):
    file = write(tmp_path / "rows.csv", rows_of(*(f"film {i}" for i in range(3000))))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=fit_one, args=(base, file, cache.parent, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=100) for _ in processes]
    for process in processes:
        process.join()
    assert found == [3000] * 3
    assert len(list(cache.iterdir())) == 1


def test_setup_cache_unverifiable_after_writing_raises(base, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_read_verified", lambda file: None)
    with pytest.raises(RunError, match=r"\.arrow"):
        data(base, write(tmp_path / "rows.csv", rows_of("film", "plot"))).setup()
