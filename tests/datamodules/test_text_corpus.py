"""TextCorpus: long texts in bounded memory, rows of any length, and the cache of tokens."""

import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_pl.datamodules import TextCorpus, language_modeling
from gpt2_pl.errors import InputError
from gpt2_pl.text.tokenizer import END_OF_TEXT, load_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "gpt2_pl"


class Watched:
    """A tokenizer that records how many characters it encodes at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.longest, self.total = tokenizer, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def _note(self, n: int) -> None:
        self.longest, self.total = max(self.longest, n), self.total + n

    def encode(self, text: str, **options: Any) -> Any:
        self._note(len(text))
        return self.tokenizer.encode(text, **options)

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self._note(sum(map(len, texts)))
        return self.tokenizer.encode_batch(texts, **options)


def corpus(file: Path, base: Path, **options: Any) -> tuple[TextCorpus, Watched]:
    """A corpus to test on, set up, and its tokenizer."""
    data = TextCorpus(test_file=str(file), tokenizer=str(base), max_length=32, **options)
    data._tokenizer = watched = Watched(load_tokenizer(base))  # type: ignore[assignment]
    data.setup()
    return data, watched


def tokens(data: TextCorpus) -> list[int]:
    return data.encoded["test"].values.tolist()


def write_jsonl(file: Path, texts: list[str | None]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


TEXTS = {
    "words without line ends": "a wonderful film about love, and nothing else. " * 3500,
    "one long word": f"{'wonderful' * 10_000} film and a film " * 2,
    "lines": "The film number 1 is fine.\n\n\n  And 12 people saw it,\nall of them twice.\n" * 2000,
    "windows line ends": "one two\r\n\r\nthree\r\n" * 9_000,
    "short": "a film",
}


def test_text_corpus_long_text_equals_full_encoding_in_bounded_memory(base, tmp_path):
    file = tmp_path / "text.txt"
    for name, text in TEXTS.items():
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
        data, tokenizer = corpus(file, base)
        whole = tokenizer.tokenizer.encode(text.replace("\r\n", "\n")).ids
        assert tokens(data) == [*whole, tokenizer.token_to_id(END_OF_TEXT)], name
        assert tokenizer.longest <= 1 << 17, name


def test_text_corpus_rows_of_any_length_keep_order_in_bounded_memory(base, tmp_path):
    texts = ["a film", "  ", "a long film. " * 12_000, None, "the end", *["a story of " * 900] * 40, "\n" * 9, "fine "]
    data, tokenizer = corpus(write_jsonl(tmp_path / "rows.jsonl", texts), base)
    end, encode = tokenizer.token_to_id(END_OF_TEXT), tokenizer.tokenizer.encode
    expected = [i for text in texts if text and text.strip() for i in (*encode(text.strip()).ids, end)]
    assert tokens(data) == expected
    assert tokenizer.longest <= 1 << 17


def test_text_corpus_special_tokens_and_empty_texts_are_left_out(base, tmp_path):
    """Use a post-processor that would add its tokens to every piece and every row."""
    folder = shutil.copytree(base, tmp_path / "base")
    changed = json.loads((folder / "tokenizer.json").read_text())
    x, a, b = {"SpecialToken": {"id": "x", "type_id": 0}}, *({"Sequence": {"id": n, "type_id": 0}} for n in "AB")
    changed["post_processor"] = {"type": "TemplateProcessing", "single": [x, a, x], "pair": [a, b],
                                  "special_tokens": {"x": {"id": "x", "ids": [7], "tokens": ["x"]}}}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(changed))
    text = "a good film. " * 11_000
    (tmp_path / "text.txt").write_text(text)
    plain = load_tokenizer(base)
    end = plain.token_to_id(END_OF_TEXT)
    assert tokens(corpus(tmp_path / "text.txt", folder)[0]) == [*plain.encode(text).ids, end]
    rows = write_jsonl(tmp_path / "rows.jsonl", ["a film", " ", "the plot", ""])
    expected = [*plain.encode("a film").ids, end, *plain.encode("the plot").ids, end]
    assert tokens(corpus(rows, folder)[0]) == expected


def pieces_of(file: Path) -> list[str]:
    data = TextCorpus(train_file=str(file), vocab_size=300)
    return [piece for text in data._texts(data._sources("train")) for piece in text]


def test_texts_pieces_for_tokenizer_training_keep_all_words(base, tmp_path, monkeypatch):
    monkeypatch.setattr(language_modeling, "_PIECE_CHARACTERS", 50)
    split = load_tokenizer(base).pre_tokenizer.pre_tokenize_str
    file = tmp_path / "text.txt"
    for line in ("word word word.\n\n", "one two\n\n", "a  \n \n\tb\n", "x\n\n\n  y z\n", "no ends "):
        file.write_text(line * 60)
        pieces = pieces_of(file)
        assert "".join(pieces) == line * 60
        assert max(map(len, pieces)) <= 50, line
        words = Counter(word for piece in pieces for word, _ in split(piece))
        assert words == Counter(word for word, _ in split(line * 60)), line


def test_texts_pieces_without_whitespace_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(language_modeling, "_PIECE_CHARACTERS", 50)
    for text in ("x" * 1000, "x " + "y" * 1000, " " * 1000):
        (tmp_path / "text.txt").write_text(text)
        pieces = pieces_of(tmp_path / "text.txt")
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 50


FRAGMENTS = ("a", "the ", " ", "  ", "\n", "\r\n", "\t", "'", "'s", "1", "23", "é", "漢", "😀", ".", "film", "ing", "A",
             "<|endoftext|>", "<|end", "\u00a0", "\u3000", "\x1c")  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=4), st.integers(1, 400), st.randoms())
@settings(max_examples=40, deadline=None)
def test_pieces_have_the_tokens_of_the_complete_text(base, fragments, n, random):
    tokenizer = load_tokenizer(base)
    text = " a word".join("".join(random.choices(fragments, k=4)) for _ in range(n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_modeling, "_PIECE_CHARACTERS", 100)
        pieces = list(language_modeling._pieces(io.StringIO(text)))
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


# The cache


def test_text_corpus_changed_file_with_same_mtime_is_read_again(base, tmp_path):
    for ending, content in {".txt": "{0}", ".csv": "text\n{0}\n", ".jsonl": '{{"text": "{0}"}}\n'}.items():
        file = tmp_path / f"text{ending}"
        for text in ("a good film", "a long film"):
            file.write_text(content.format(text))
            os.utime(file, (10**9, 10**9))
            data, tokenizer = corpus(file, base)
            assert tokens(data) == [*tokenizer.encode(text).ids, tokenizer.token_to_id(END_OF_TEXT)], ending


def test_text_corpus_equal_contents_are_tokenized_once(base, tmp_path):
    text = "a good film, " * 100
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(text)
    data, tokenizer = corpus(tmp_path / "one.txt", base)
    assert tokenizer.total >= len(text)
    again, tokenizer = corpus(tmp_path / "two.txt", base)
    assert tokenizer.total == 0
    assert tokens(data) == tokens(again)
    assert not again.encoded["test"].values.flags.owndata  # it is mapped from the file


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _zero(file: Path) -> None:
    """Zero the second half, as after a power failure before the last pages were written."""
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2] + bytes(size - size // 2))


DAMAGES = {
    "cut short": _truncate,
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("not tokens"),
    "of another type": lambda file: file.write_bytes(np.zeros(100).tobytes()),
    "zeros at its end": _zero,
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0\0"),
    "a link to nothing": lambda file: (file.unlink(), file.symlink_to("nowhere")),
}


def test_text_corpus_damaged_cache_is_rebuilt_without_output(base, tmp_path, cache, capfd, recwarn, subtests):
    file = tmp_path / "text.txt"
    file.write_text("a good film, " * 100)
    expected = tokens(corpus(file, base)[0])
    (cached,) = cache.iterdir()
    for name, damage in DAMAGES.items():
        with subtests.test(name):
            damage(cached)
            data, tokenizer = corpus(file, base)
            assert tokens(data) == expected
            assert tokenizer.total > 0
            assert capfd.readouterr() == ("", "")
            assert not recwarn.list
            _, tokenizer = corpus(file, base)
            assert tokenizer.total == 0  # the cache is whole again


def test_text_corpus_file_changed_while_read_is_refused_and_not_cached(base, tmp_path, cache):
    file = tmp_path / "text.txt"
    file.write_text("a good film, " * 100)
    tokenizer = load_tokenizer(base)

    class Writing(Watched):
        def get_vocab(self) -> Any:
            file.write_text("another film, " * 100)
            return self.tokenizer.get_vocab()

    data = TextCorpus(test_file=str(file), tokenizer=str(base), max_length=32)
    data._tokenizer = Writing(tokenizer)  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"text\.txt changed"):
        data.setup()
    assert not list(cache.iterdir())


def test_text_corpus_pattern_in_file_name_is_read_literally(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in ("x1.txt", "ab.txt", "b.txt"):
        Path(other).write_text("another text")
    for name in ("x[1].txt", "a*.txt", "a?.txt", "zip:::b.txt", "$HOME.txt", "~.txt"):
        Path(name).write_text(f"a film in {name}")  # no two files have one cache
        data, tokenizer = corpus(Path(name), base)
        assert tokens(data) == [*tokenizer.encode(f"a film in {name}").ids, tokenizer.token_to_id(END_OF_TEXT)], name
