"""Escaping of untrusted text wherever it is printed, and one-line messages of bounded length."""

import itertools
import json
import sys
import time
import unicodedata

import pytest
import torch
import yaml
from conftest import ROOT
from helpers.refusals import names, refused
from helpers.runs import fake_run
from safetensors.torch import load_file, save_file

from gpt2_pl.commands import main
from gpt2_pl.errors import InputError, RunError, printable, shorten

ESCAPE = "\x1b]0;title\x07\x1b[31mred\nsecond line\u202eevil\u2066\x9b2J\ud800"
RAW = "\x1b\x07\x9b\u202e\u2066\ud800"


def test_printable_control_and_bidi_characters_are_escaped_others_kept():
    for point in range(sys.maxunicode + 1):
        character = chr(point)
        category, bidi = unicodedata.category(character), unicodedata.bidirectional(character)
        acts = category in ("Cc", "Cs", "Zl", "Zp") or bidi in (
            "LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")  # fmt: skip
        assert (printable(character) == character) != acts, hex(point)


def test_printable_escapes_are_reversible_and_idempotent():
    assert printable(ESCAPE).encode().decode("unicode_escape") == ESCAPE
    assert printable(printable(ESCAPE)) == printable(ESCAPE)
    assert printable("a\n\tb\x1b", keep="\n") == "a\n\\tb\\x1b"
    assert printable("héllo, 世界 🙂 שלום") == "héllo, 世界 🙂 שלום"


def test_error_message_long_hostile_text_is_one_bounded_line():
    for kind in (InputError, RunError):
        message = str(kind(f"{ESCAPE} and {'x' * 10**7} the end"))
        assert not set(message) & set(RAW + "\n")
        assert "second line" in message
        assert message.endswith("the end")
        assert len(message) < 5000


def test_input_error_from_fields_names_source_key_expected_and_value():
    error = InputError(key="data.batch_size", value=0, expected="at least 1", source="task.yaml")
    assert str(error) == "task.yaml: data.batch_size must be at least 1, got 0"
    assert (error.key, error.value, error.expected, error.source) == ("data.batch_size", 0, "at least 1", "task.yaml")
    assert str(InputError("there is no file a.csv", source="sweep.yaml")) == "sweep.yaml: there is no file a.csv"


def test_refused_command_has_the_key_of_its_error(run, capsys):
    line = refused(run, capsys, "fit", "--config", "quickstart", "--data.batch_size", 0)
    assert line.key == "data.batch_size"
    assert line == f"gpt2-pl: error: {line.error}"


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def aliases():
    value = ["x"] * 9
    for _ in range(60):
        value = [value] * 9
    return value


def cycle():
    value = {}
    value["itself"] = [value]
    return value


def test_shorten_any_value_is_short_and_fast():
    for value, text in (
        ("a\x1b", r"'a\x1b'"),
        ("x" * 10**7, f"'{'x' * 37}...{'x' * 38}'"),
        (3, "3"),
        (1 << 10**7, "a number of 10,000,001 bits"),
        (float("nan"), "nan"),
        (None, "None"),
        ({"a": [1, 2], "b": None}, "{'a': [1, 2], 'b': None}"),
        ((1, "x"), "(1, 'x')"),
        (list(range(10)), "[0, 1, 2, 3, ...]"),
        (torch.zeros(2, 3), "a tensor of shape (2, 3), torch.float32, torch.strided"),
        (torch.eye(3, dtype=torch.float64).to_sparse(), "a tensor of shape (3, 3), torch.float64, torch.sparse_coo"),
        (nested(100_000), "[[[[...]]]]"),
        (aliases(), None),
        (cycle(), None),
        (torch.float32, "torch.float32"),
    ):
        since = time.perf_counter()
        shown = shorten(value)
        assert time.perf_counter() - since < 1.0, shown
        assert len(shown) < 150, shown
        assert text is None or shown == text


# Where it is printed


def test_fit_hostile_tensor_name_is_escaped_in_one_line(run, base, data_flags, capsys, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    name = ESCAPE.replace("\ud800", "")
    tensors = {**load_file(base / "model.safetensors"), name: torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors")
    command = ["fit", "--config", ROOT / "configs/task/imdb.yaml", f"--model.base={folder}", *data_flags]
    line = refused(run, capsys, *command)
    assert r"\x1b]0;title\x07\x1b[31mred\nsecond line\u202e" in line


@pytest.fixture
def hostile(tmp_path):
    """Create finished runs and an unfinished one whose folders, files, strategies and scores have hostile names."""
    text = ESCAPE[:-1]
    for seed, strategy in itertools.product((1, 2), ("full", f"evil{text}`=|x")):
        folder = fake_run(tmp_path / f"runs/{len(strategy)}/version_{seed}", "x", seed, [True, False] * 20)
        account = json.loads((folder / "metrics.json").read_text())
        account |= {"task": "=Task`|\nsecond line", "configs": []}
        account["data"]["files"] = {"val": f"/data/{text}.csv"}
        account["scores"]["@val/x|y"] = 0.5
        (folder / "metrics.json").write_text(json.dumps(account))
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "name": strategy}))
    folder = fake_run(tmp_path / "runs/\x1b[31mred\udc80/version_1", "x", 1, [True], status="running")
    assert folder.is_dir()
    return tmp_path / "runs"


def test_compare_hostile_run_escapes_terminal_and_reports(hostile, tmp_path, capsys):
    out = tmp_path / "out"
    main(["compare", str(hostile), "--out", str(out)])
    shown = capsys.readouterr()
    for text in (
        shown.out,
        shown.err,
        *(file.read_text() for file in out.iterdir() if file.suffix not in (".png", ".pdf")),
    ):
        assert not set(text) & set(RAW)
    assert r"evil\\x1b]0;title" in (out / "report.md").read_text()
    assert r"evil\x1b]0;title" in (out / "report.html").read_text()
    assert not any(line.startswith("second line") for line in (out / "report.md").read_text().splitlines())
    assert not any(cell.startswith(("=", "@")) for line in (out / "report.csv").open() for cell in line.split(","))
    cells = [line for line in (out / "report.md").read_text().splitlines() if line.startswith("| evil")]
    assert cells
    assert all("\\`=\\|x" in line for line in cells)


def test_compare_control_characters_in_metrics_are_refused(tmp_path, run, capsys):
    folder = fake_run(tmp_path / "run", "full", 1, [True, False])
    file = folder / "metrics.json"
    stored = json.loads(file.read_text())
    for key in ("task", "monitor", "status", "configs", "scores"):
        value = {"configs": ["a\x1b[31mb.yaml"], "scores": {"val/\x1b[2J": 0.5}}.get(key, "x\x1b]0;title\x07")
        file.write_text(json.dumps({**stored, key: value}))
        line = refused(run, capsys, "compare", folder, "--out", tmp_path / "out")
        assert f"{file}: " in line, key
        assert names(line, key)
        assert "\\x1b" in line, key
        assert not set(line) & set(RAW), key
