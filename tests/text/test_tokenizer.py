"""Loading of untrusted tokenizers: refused in one line, or deterministic and without changes to the text."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gpt2_pl.errors import InputError
from gpt2_pl.text.tokenizer import load_tokenizer

A, B = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
X = {"SpecialToken": {"id": "[X]", "type_id": 0}}
TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
BERT = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}


def template(single: list[Any], **ids: list[int]) -> dict[str, Any]:
    special = {f"[{name}]": {"id": f"[{name}]", "ids": found, "tokens": ["x"]} for name, found in ids.items()}
    sequences = {"type": "TemplateProcessing", "single": single, "pair": [A, B]}
    return {"post_processor": {**sequences, "special_tokens": special}}


def word_level(vocab: dict[str, int], unk: str = "[UNK]") -> dict[str, Any]:
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": unk}
    return {"model": model, "pre_tokenizer": {"type": "Whitespace"}}


def unigram(unk_id: int | None) -> dict[str, Any]:
    return {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]], "unk_id": unk_id}}


def nested(depth: int) -> dict[str, Any]:
    normalizer: dict[str, Any] = {"type": "Lowercase"}
    for _ in range(depth):
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    return {"normalizer": normalizer}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


# what is changed in a tokenizer.json, its model's settings under "model."; and part of the message
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # panics of the Rust library, when it reads and when it encodes or decodes
    "undefined special token": (template([X, A]), "cannot be used"),
    "pair template for one text": (template([A, B]), "cannot be used"),
    "prefix longer than tokens": ({"model.continuing_subword_prefix": "##"}, "cannot be read"),
    "broken character map": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cannot be read"),
    "replaced empty string": ({"normalizer": replace({"String": ""}, "ab")}, "cannot be used"),
    "chunks of length 0": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "cannot be used"),
    "catastrophic regex": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
        "cannot be used",
    ),
    "decoder that strips beyond": (
        {"decoder": {"type": "Strip", "content": "a", "start": 1000, "stop": 1000}},
        "cannot be used",
    ),
    # errors that it raises when it meets a text
    "word level without its unk": (word_level({"a": 0, "b": 1}), r"Missing \[UNK\]"),
    "word piece without its unk": ({"model": {"type": "WordPiece", "vocab": {"a": 0}, **BERT}}, r"Missing \[UNK\]"),
    "unigram without unk": (unigram(None), "unknown token"),
    "byte pairs without their unk": ({"model.vocab": {"a": 0}, "model.merges": [], "model.unk_token": "[NO]"}, "NO"),
    # errors that it raises when it reads
    "unigram with an unk beyond": (unigram(7), "cannot be read"),
    "invalid regex": ({"normalizer": replace({"Regex": "[["}, "a")}, "cannot be read"),
    "negative id": ({"model.vocab.zzzz": -5}, "-5"),
    "fractional id": ({"model.vocab.zzzz": 5.5}, "5.5"),
    "merge of unknown tokens": ({"model.merges": [["qq", "zz"]]}, "qq"),
    "merge of numbers": ({"model.merges": [[1, 2]]}, "cannot be read"),
    "dropout of 7": ({"model.dropout": 7}, "between 0 and 1"),
    "no model": ({"model": None}, "cannot be read"),
    "model of another type": ({"model": 3}, "cannot be read"),
    "unknown pre-tokenizer": ({"pre_tokenizer": {"type": "Nope"}}, "cannot be read"),
    "deeply nested normalizer": (nested(300), "recursion limit"),
    # what it reads and uses without a word, and changes text or ids with
    "two tokens with one id": ({"model.vocab.zzzz": 5}, "id 5 "),
    "added token at another id": ({"added_tokens": [{"id": 3, "content": "hello", **TOKEN}]}, "'hello'"),
    "added token beyond": ({"added_tokens": [{"id": 300000, "content": "hello", **TOKEN}]}, "'hello'"),
    "template without the text": (template([X], X=[1]), "no token"),
    "template of nothing": (template([]), "no token"),
    "normalizer that deletes all": ({"normalizer": replace({"Regex": r"[\s\S]"}, "")}, "no token"),
    "text that grows without end": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace({"Regex": "."}, "b" * 10)] * 12}},
        "1000 times",
    ),
    "decoder that grows without end": ({"decoder": replace({"Regex": "."}, "b" * 100_000)}, "1000 times"),
    "id of 2 ** 40": ({"model.vocab.zzzz": 2**40}, "cannot be read"),
}
ACCEPTED: dict[str, dict[str, Any]] = {
    "padding": {"padding": {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None,
                            "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}},
    "truncation": {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 10}},
    "id after a hole": {"model.vocab.zzzz": 450},
    "begin of text": template([X, A], X=[7]),
    "nested normalizer": nested(20),
    "word level": word_level({"a": 0, "b": 1, "[UNK]": 2}),
    "word piece": {"model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1}, **BERT}},
    "unigram": unigram(0),
    "merges that repeat": {"repeat": 500},
}  # fmt: skip


def change(folder: Path, changes: dict[str, Any]) -> None:
    """Change keys of a tokenizer.json: those with the prefix ``model.`` in its model, all others at the top level."""
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    for key, value in changes.items():
        if key == "repeat":
            settings["model"]["merges"] *= value
        elif key.startswith("model.vocab."):
            settings["model"]["vocab"][key.removeprefix("model.vocab.")] = value
        elif key.startswith("model."):
            settings["model"][key.removeprefix("model.")] = value
        else:
            settings[key] = value
    if "model" in changes or "model.vocab" in changes:
        settings["added_tokens"] = []
    file.write_text(json.dumps(settings))


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "base")


def changed(folder: Path, base: Path, changes: dict[str, Any]) -> None:
    """Write the base's tokenizer with changes."""
    shutil.copy(base / "tokenizer.json", folder)
    change(folder, changes)


def refuse(folder: Path, words: str | None = None) -> None:
    """Check that a tokenizer is refused in one line that names its setting and its folder."""
    with pytest.raises(InputError, match=words) as caught:
        load_tokenizer(folder, "data.tokenizer")
    message = str(caught.value)
    assert message.startswith("data.tokenizer: ")
    assert str(folder) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 500 + len(str(folder))


def test_load_tokenizer_unusable_file_raises_one_line(base, folder, capfd, subtests):
    for name, (changes, words) in REFUSED.items():
        with subtests.test(name):
            changed(folder, base, changes)
            refuse(folder, words)
            assert capfd.readouterr() == ("", "")  # a panic writes to standard error by itself


def test_load_tokenizer_malformed_json_raises_one_line(folder, capfd, subtests):
    for content in (b"", b"{", b"[1, 2]", b'"text"', b"null", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b'{"version": NaN}',
                    b"[" * 100_000, b'{"model": "\\ud800"}', b"\0", b"{}", b'{"added_tokens": 3}',
                    b'{"added_tokens": [3]}', b'{"model": {"vocab": 3}}'):  # fmt: skip
        with subtests.test(content=content[:30]):
            (folder / "tokenizer.json").write_bytes(content)
            refuse(folder)
            assert capfd.readouterr() == ("", "")


def test_load_tokenizer_unusual_file_encodes_the_complete_text(base, folder, subtests):
    for name, changes in ACCEPTED.items():
        with subtests.test(name):
            changed(folder, base, changes)
            ids = load_tokenizer(folder).encode("a b a b a b", add_special_tokens=False).ids
            assert 6 <= len(ids) < 20  # neither cut nor padded


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value of a tokenizer.json, but only three entries of the vocabulary and the merges."""
    yield path
    if isinstance(value, dict | list):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, part in items[:3] if path[-1:] in (("vocab",), ("merges",)) else items:
            yield from leaves(part, (*path, key))


BAD_VALUES = [None, True, -1, 0, 1.5, 2**63, float("nan"), "", "x" * 10**6, "\x1b[31m", "\ud800", [], {}, [["a"]]]


def test_load_tokenizer_bad_value_is_refused_or_survives_serialization(base, tmp_path, capfd):
    whole = (base / "tokenizer.json").read_text()
    refusals = 0
    for bad, path in itertools.product(BAD_VALUES, leaves(json.loads(whole))):
        settings = json.loads(whole)
        holder = {"": settings}
        for key in ("", *path)[:-1]:
            holder = holder[key]
        holder[("", *path)[-1]] = bad
        (tmp_path / "tokenizer.json").write_text(json.dumps(settings if path else bad))
        try:
            tokenizer = load_tokenizer(tmp_path)
        except InputError as error:
            assert len(str(error).splitlines()) == 1, (bad, path)
            refusals += 1
            continue
        ids = tokenizer.encode("a film, it's 漢").ids
        (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())  # as a run keeps it
        assert load_tokenizer(tmp_path).encode("a film, it's 漢").ids == ids, (bad, path)
    assert refusals > 100
    assert capfd.readouterr() == ("", "")


def test_load_tokenizer_bpe_dropout_is_off(folder):
    text = "this film is a wonderful and moving story"
    expected = load_tokenizer(folder).encode(text).ids
    change(folder, {"model.dropout": 0.5})
    drawn = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len({tuple(drawn.encode(text).ids) for _ in range(20)}) > 1
    tokenizer = load_tokenizer(folder)
    assert all(tokenizer.encode(text).ids == expected for _ in range(20))
    assert all(found.ids == expected for found in tokenizer.encode_batch([text] * 20))
    assert json.loads(tokenizer.to_str())["model"]["dropout"] is None  # which a run's tokenizer.json is made of


def test_tokenizer_failure_after_loading_raises_input_error(folder):
    """A regex that exceeds the library's backtracking limit only for a text that loading does not try."""
    pattern = {"Regex": "(q+)+$"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    change(folder, {"pre_tokenizer": split})
    tokenizer = load_tokenizer(folder, "data.tokenizer")
    for call in (lambda text: tokenizer.encode(text), lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(InputError, match=r"data\.tokenizer: .*Regex search error"):
            call("q" * 40 + "!")
