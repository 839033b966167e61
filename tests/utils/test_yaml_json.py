"""Limits of the YAML and JSON readers: expensive files are refused before they use time or memory."""

import json
import os
import re
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
BOMBS = {
    "laughs": (LAUGHS, "aliases expanded"),
    "merges": (MERGES, "aliases expanded"),
    "text": (f"a: &a {'x' * 10**5}\nb: [{','.join(['*a'] * 1000)}]\n", "aliases expanded"),
    "cycle": ("model: &a {init_args: *a}\n", "the alias *a is recursive"),
    "deep": ("[" * 10**5 + "]" * 10**5, "nested more than 100 deep"),
    "dashes": ("- " * 10**5 + "x", "nested more than 100 deep"),
    "braces": ("{a: " * 10**5 + "}" * 10**5, "nested more than 100 deep"),
    "sixty": ("a: " + ":".join(["1"] * 4 * 10**5), "a number must have at most 1000 characters, got 799,999"),
    "digits": ("a: " + "1" * 10**6, "a number must have at most 1000 characters, got 1,000,000"),
    "long": ("a: " + "x" * 2**20, "has more than 1,048,576 characters"),
    "date": ("a: 2001-99-99", "is not YAML"),
    "tag": ("a: !!python/object:os.system {}", "is not YAML"),
    "two": ("a: 1\n---\nb: 2\n", "is not YAML"),
    "key": ("{[1]: 2, {a: 1}: 3}", "is not YAML"),
    "undefined": ("a: *b\n", "is not YAML"),
}


@pytest.fixture
def bounded():
    """Limit a test to 10 s of CPU time and 2 GB of additional memory."""
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
@pytest.mark.parametrize("name", BOMBS)
def test_load_yaml_resource_bomb_is_refused_within_limits(name):
    text, words = BOMBS[name]
    with pytest.raises(InputError) as caught:
        load_yaml(text, "some.yaml")
    assert str(caught.value).startswith("some.yaml")
    assert words in str(caught.value)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_read_yaml_shipped_file_equals_the_plain_parser(file):
    assert read_yaml(file) == yaml.safe_load(file.read_text(encoding="utf-8"))


def test_load_yaml_aliases_within_the_limits_are_kept():
    text = "a: &a [1, 2]\nb: {<<: &m {k: v, l: *a}, l: 3}\nc: [*a, *m, &x x, *x]\nd: &e {}\ne: *e\n"
    assert load_yaml(text, "x") == yaml.safe_load(text)
    assert load_yaml("", "x") is None
    many = yaml.safe_dump({"labels": [f"class number {i}" for i in range(20_000)]})
    assert load_yaml(many, "x") == yaml.safe_load(many)
    check_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 10**6, "nested more than 100 deep"),
        (b"[" * 101 + b"]" * 101, "nested more than 100 deep"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested more than 100 deep"),
        (b" " * 2**25, "is larger than 16,777,216 bytes"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"1" * 10**5, "is not JSON"),
    ],
    ids=["open", "deep", "objects", "large", "latin", "half", "empty", "digits"],
)
def test_read_json_invalid_or_oversized_file_is_refused(content, words, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json") as caught:
        read_json(tmp_path / "x.json")
    assert words in str(caught.value)


def test_read_json_file_within_the_limits_equals_the_plain_parser(tmp_path):
    content = {"a": [1, 2.5, None, True, "x\u00e9", {}], "deep": json.loads("[" * 98 + "]" * 98), "nan": 1e999}
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert read_json(tmp_path / "x.json") == content
    for missing in (tmp_path / "none.json", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot be read"):
            read_json(missing)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "x.yaml, line 3: the key 'a' is given twice, first in line 1"),
        ("a:\n  - {b: 1, 'b': 2}\n", "x.yaml, line 2: the key 'b' is given twice, first in line 2"),
        ('a: &k {b: 1}\n? *k\n: 1\nc:\n  d: {}\n  e: []\n  "d": 1\n', "line 7: the key 'd' is given twice"),
        ("2: a\n2: b\n", "line 2: the key '2' is given twice"),
    ],
)
def test_load_yaml_key_given_twice_is_refused_with_its_lines(text, words):
    with pytest.raises(InputError, match=re.escape(words)):
        load_yaml(text, "x.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: {b: 1}\nc: {b: 1}\n- ",
        "2: a\n'2': b\n",
        "a: &k {b: 1}\nc: {<<: *k, b: 2}\nd: {e: e, f: e}\n",
        "- a: 1\n- a: 1\n",
        "{? [a] : 1}",
    ],
)
def test_load_yaml_equal_keys_of_different_mappings_equals_plain_parser(text):
    try:
        expected = yaml.safe_load(text)
    except yaml.YAMLError:
        with pytest.raises(InputError, match="is not YAML"):
            load_yaml(text, "x")
    else:
        assert load_yaml(text, "x") == expected
