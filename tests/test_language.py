"""Words that the code does not use, because the field has a standard term for what they mean."""

import ast
import io
import re
import tokenize

from helpers.configs import ROOT

FOLDERS = ("gpt2_pl", "datamodules", "callbacks")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
BANNED_PROSE = re.compile(r"\b(said|told|whom|vouch\w*|(?<!there )is none|goes on|gone on|no key)\b|\bwhole_")
BANNED_NAME = re.compile(
    r"(?<![a-z])(said|told|whom|vouch\w*|is_none|goes_on|gone_on|no_key)(?![a-z])|(?<![a-z])whole_"
)


def banned_words(source: str) -> list[str]:
    """Return ``line: text`` for every identifier, and line of a comment or docstring, with a banned word."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    found = [(token.start[0], token.string) for token in tokens
             if token.type == tokenize.NAME and BANNED_NAME.search(token.string.lower())]  # fmt: skip
    texts = [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            texts += enumerate(lines[docstring.lineno - 1 : docstring.end_lineno], docstring.lineno)
    found += [(line, text) for line, text in texts if BANNED_PROSE.search(text)]
    return [f"{line}: {text.strip()}" for line, text in found]


def test_source_files_use_no_banned_word():
    assert len(FILES) > 50
    for file in FILES:
        assert banned_words(file.read_text(encoding="utf-8")) == [], file


def test_banned_words_are_found_in_names_comments_and_docstrings():
    source = (
        "whole_file = said = 1  # which nobody was told; there is none\n"
        "chrf_whole_poem = unsaid = None  # x is None\n"
        "def f():\n    '''Read files.\n\n    nobody vouches for them.\n    '''\n    return 'told'\n"
    )
    assert banned_words(source) == [
        "1: whole_file", "1: said", "2: chrf_whole_poem",
        "1: # which nobody was told; there is none", "6: nobody vouches for them.",
    ]  # fmt: skip
