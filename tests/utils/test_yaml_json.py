"""Limits of the YAML and JSON readers: expensive files are refused before they use time or memory."""

import json
import os
import resource
import signal
import time

import pytest
import yaml
from conftest import ROOT

from gpt2_pl.errors import InputError
from gpt2_pl.utils.yaml_json import MAX_DEPTH, check_yaml, load_yaml, read_json, read_yaml

LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
MERGES = "a0: &a0 {k: x}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9))
BOMBS = {  # text and part of the message
    "laughs": (LAUGHS, "aliases"),
    "merges": (MERGES, "aliases"),
    "text": (f"a: &a {'x' * 10**5}\nb: [{','.join(['*a'] * 1000)}]\n", "aliases"),
    "cycle": ("model: &a {init_args: *a}\n", "line 1"),
    "deep": ("[" * 10**5 + "]" * 10**5, "100 deep"),
    "dashes": ("- " * 10**5 + "x", "100 deep"),
    "braces": ("{a: " * 10**5 + "}" * 10**5, "100 deep"),
    "sixty": ("a: " + ":".join(["1"] * 4 * 10**5), "799,999"),
    "digits": ("a: " + "1" * 10**6, "1,000,000"),
    "long": ("a: " + "x" * 2**20, "1,048,576"),
    "date": ("a: 2001-99-99", "not YAML"),
    "tag": ("a: !!python/object:os.system {}", "not YAML"),
    "two": ("a: 1\n---\nb: 2\n", "not YAML"),
    "key": ("{[1]: 2, {a: 1}: 3}", "not YAML"),
    "undefined": ("a: *b\n", "not YAML"),
}


@pytest.fixture
def bounded():
    """Limit a test to 10 s of processor time and 2 GB of additional memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 2**30, before[1]))
    signal.alarm(60)
    since = time.process_time()
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - since < 10.0


@pytest.mark.usefixtures("bounded")
def test_load_yaml_resource_bombs_are_refused_within_limits(subtests):
    for name, (text, words) in BOMBS.items():
        with subtests.test(name):
            with pytest.raises(InputError) as caught:
                load_yaml(text, "some.yaml")
            assert str(caught.value).startswith("some.yaml")
            assert words in str(caught.value)


def test_read_yaml_shipped_files_equal_the_plain_parser():
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(files) > 30
    assert [file for file in files if read_yaml(file) != yaml.safe_load(file.read_text(encoding="utf-8"))] == []


def test_load_yaml_aliases_within_the_limits_are_kept():
    text = "a: &a [1, 2]\nb: {<<: &m {k: v, l: *a}, l: 3}\nc: [*a, *m, &x x, *x]\nd: &e {}\ne: *e\n"
    assert load_yaml(text, "x") == yaml.safe_load(text)
    assert load_yaml("", "x") is None
    many = yaml.safe_dump({"labels": [f"class number {i}" for i in range(20_000)]})
    assert load_yaml(many, "x") == yaml.safe_load(many)
    check_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")


BAD_JSON = {
    "open": (b"[" * 10**6, "100 deep"),
    "deep": (b"[" * 101 + b"]" * 101, "100 deep"),
    "objects": (b'{"a":' * 500 + b"1" + b"}" * 500, "100 deep"),
    "large": (b" " * 2**25, "16,777,216"),
    "latin": (b"\xff\xfe", "not UTF-8"),
    "half": (b"{", "not JSON"),
    "empty": (b"", "not JSON"),
    "digits": (b"1" * 10**5, "not JSON"),
}


def test_read_json_invalid_or_oversized_file_is_refused(tmp_path, subtests):
    for name, (content, words) in BAD_JSON.items():
        with subtests.test(name):
            (tmp_path / "x.json").write_bytes(content)
            with pytest.raises(InputError, match=r"x\.json") as caught:
                read_json(tmp_path / "x.json")
            assert words in str(caught.value)


def test_read_json_file_within_the_limits_equals_the_plain_parser(tmp_path):
    content = {"a": [1, 2.5, None, True, "x\u00e9", {}], "deep": json.loads("[" * 98 + "]" * 98), "nan": 1e999}
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert read_json(tmp_path / "x.json") == content
    for missing in (tmp_path / "none.json", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(InputError) as caught:
            read_json(missing)
        assert missing.name in str(caught.value)


def test_load_yaml_key_given_twice_is_refused_with_its_lines():
    for text, key, line, first in (
        ("a: 1\nb: 2\na: 3\n", "a", 3, 1),
        ("a:\n  - {b: 1, 'b': 2}\n", "b", 2, 2),
        ('a: &k {b: 1}\n? *k\n: 1\nc:\n  d: {}\n  e: []\n  "d": 1\n', "d", 7, 5),
        ("2: a\n2: b\n", "2", 2, 1),
    ):
        with pytest.raises(InputError, match=rf"x\.yaml, line {line}: .*'{key}'.* line {first}"):
            load_yaml(text, "x.yaml")


def test_load_yaml_equal_keys_of_different_mappings_equals_plain_parser():
    for text in ("2: a\n'2': b\n", "a: &k {b: 1}\nc: {<<: *k, b: 2}\nd: {e: e, f: e}\n", "- a: 1\n- a: 1\n"):
        assert load_yaml(text, "x") == yaml.safe_load(text)
    for text in ("a: {b: 1}\nc: {b: 1}\n- ", "{? [a] : 1}"):  # which the plain parser refuses too
        with pytest.raises(yaml.YAMLError):
            yaml.safe_load(text)
        with pytest.raises(InputError):
            load_yaml(text, "x")
