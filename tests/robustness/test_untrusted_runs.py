"""Untrusted run folders: compare refuses wrong types and sizes, and escapes every text."""

import csv
import json
import re
import shutil
import time

import numpy as np
import pytest
from helpers.refusals import refused
from helpers.runs import fake_run

from gpt2_pl.commands import main

EVIL_TEXT = [
    "../../x",
    '<script>alert("x")</script>',
    "a|b",
    "[x](javascript:alert(1))",
    "$\\frac{$",
    "x\n# y",
]


@pytest.fixture
def hostile(tmp_path):
    """Runs with hostile texts in their records."""
    generator = np.random.default_rng(0)
    for n, text in enumerate(EVIL_TEXT):
        for strategy in (text, f"{text} more"):
            right = generator.random(30) < 0.6
            folder = fake_run(tmp_path / f"runs/{n}/{len(strategy)}/version_1", "x", 1, right)
            account = json.loads((folder / "metrics.json").read_text())
            account |= {"task": text, "configs": [f"configs/strategy/{strategy.replace('/', '_')}.yaml"]}
            account["data"]["files"] = {"val": f"/data/{text.replace('/', '_')}.csv"}
            account["scores"][f"val/{text}"] = 0.5
            (folder / "metrics.json").write_text(json.dumps(account))
    unfinished = fake_run(tmp_path / "runs/<img src=x>/version_1", "x", 1, [True], status="<b>running</b>")
    assert unfinished.is_dir()
    return tmp_path / "runs"


def test_compare_hostile_run_texts_are_escaped_in_reports(hostile, tmp_path, monkeypatch):
    out = tmp_path / "place/report"
    main(["compare", str(hostile), "--out", str(out)])
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "place"}
    assert [path.name for path in out.parent.iterdir()] == ["report"]
    assert all(
        path.is_file() and path.suffix in (".md", ".html", ".json", ".csv", ".tex", ".png", ".pdf", ".svg")
        for path in out.iterdir()
    )
    assert sum(path.suffix == ".png" for path in out.iterdir()) == 2 * len(EVIL_TEXT)
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "<script" not in page + text
    assert "&lt;script&gt;" in page
    assert not re.search(r"<(img src=x|b>)", page + text)
    links = re.findall(r"\]\((.*?)\)", text)  # the report's own images
    assert len(links) == text.count("](") == 2 * len(EVIL_TEXT)
    assert all((out / link).is_file() and "/" not in link for link in links)
    assert "\n# y" not in text
    assert set(re.findall(r"<([a-z0-9]+)", page.partition("<body>")[2])) <= {
        *("h1", "h2", "p", "div", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "img", "details", "summary",
          "wbr")
    }  # fmt: skip
    with (out / "report.csv").open(newline="") as file:
        assert {row["task"] for row in csv.DictReader(file)} == {" ".join(text.split()) for text in EVIL_TEXT}


# Values of metrics.json, and the key of the error.
WRONG_TYPES = [
    ("scores", 3, "scores"), ("scores", {"val/accuracy": "x"}, "scores.val/accuracy"),
    ("scores", {"val/accuracy": 10**400}, "scores.val/accuracy"), ("epochs", {"a": 1}, "epochs"),
    ("epochs", [3], "epochs[0]"), ("epochs", [{"val/accuracy": 0.5}], "epochs[0]"),
    ("epochs", [{"epoch": 1e300}], "epochs[0].epoch"),
    ("parameters", {"trainable": "x"}, "parameters.trainable"),
    ("parameters", {"trainable": 10**400, "total": 1}, "parameters.trainable"), ("seconds", "x", "seconds"),
    ("seconds", 1e308, "seconds"), ("seconds", float("nan"), "seconds"),
    ("task", {}, "task"), ("monitor", [1], "monitor"), ("seed", "x", "seed"), ("seed", True, "seed"),
    ("configs", "x", "configs"), ("configs", [3], "configs[0]"), ("configs", [{}], "configs[0]"), ("data", 3, "data"),
    ("data", {"rows": 3}, "data.rows"), ("data", {"files": "x"}, "data.files"),
    ("data", {"rows": {"val": "many"}}, "data.rows.val"), ("data", {"labels": "ab"}, "data.labels"),
    ("base", "x", "base"), ("base", {"seconds": "x"}, "base.seconds"),
    ("base", {"cpu_seconds": [1]}, "base.cpu_seconds"),
    ("base", {"paht": "x"}, "base.paht"), ("peak_memory_bytes", "x", "peak_memory_bytes"),
    ("checkpoint_bytes", 10**400, "checkpoint_bytes"), ("cpu_seconds", "x", "cpu_seconds"), ("status", 3, "status"),
    ("mode", "up", "mode"), ("unknown", 1, "unknown"), ("versions", {"torch": 2}, "versions.torch"),
    ("task", "\ud800", "task"), ("configs", ["configs/strategy/\ud800.yaml"], "configs[0]"),
]  # fmt: skip
MISSING = [("scores", None), ("parameters", {}), ("parameters", None), ("seconds", None)]  # of a finished run


def test_compare_metrics_of_wrong_type_are_refused_by_key(tmp_path, run, capsys):
    folder = fake_run(tmp_path / "run", "full", 1, [True, False])
    original = (folder / "metrics.json").read_text()
    for name, value, key in WRONG_TYPES:
        changed(folder, **{name: value})
        line = refused(run, capsys, "compare", folder, "--out", tmp_path / "report")
        assert (line.key, line.error.source) == (key, str(folder / "metrics.json")), (name, str(value)[:50])
        (folder / "metrics.json").write_text(original)
    for name, value in MISSING:
        changed(folder, **{name: value})
        line = refused(run, capsys, "compare", folder, "--out", tmp_path / "report")
        assert f"metrics.json: {name}" in line, value
        (folder / "metrics.json").write_text(original)
    assert not (tmp_path / "report").exists()


def changed(folder, **changes):
    file = folder / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


HUGE = "x" * 2 * 10**6
LAUGHS = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(9))
SIZES = [  # a file, its text, and a part of the message; None where the text is accepted
    ("config.yaml", LAUGHS, "aliases"),
    ("config.yaml", f"name: {HUGE}\n", "larger"),
    ("config.yaml", f"model: {{? {'k' * 10**5} : {list(range(10**5))}}}", "1000"),
    ("config.yaml", f"name: {'-1' * 10**5}x\n", None),
    ("config.yaml", f"model: {{x: {'data.' * 10**5}}}\n", None),
    ("config.yaml", f"data: {{{'data.' * 190}y: 1}}\n", None),
    ("config.yaml", "[" * 10**5, "nested"),
    ("config.yaml", "- 1", "mapping"),
    ("config.yaml", "model: &a {init_args: *a}\n", "alias"),
    ("config.yaml", "model: {a: [[{1: 2, b: 3}]]}\n", "config.yaml"),
    ("config.yaml", 'name: "\\ud800"\n', "config.yaml"),
    ("metrics.json", json.dumps({"task": HUGE}), "task"),
    ("metrics.json", json.dumps({"scores": {HUGE: 1.0}}), "300 characters"),
    ("metrics.json", json.dumps({"scores": {f"val/{i}": 1.0 for i in range(10**5)}}), "1000 items"),
    ("metrics.json", json.dumps({"epochs": ["x"] * 10**5}), "epochs[0]"),
    ("metrics.json", json.dumps({"configs": [f"configs/strategy/{HUGE}.yaml"]}), "configs[0]"),
    ("metrics.json", "[" * 10**6, "nested"),
    ("metrics.json", " " * 2**25, "larger"),
    ("predictions_val.csv", "row,text,label,prediction," + ",".join(f"p({i})" for i in range(3000)), "is broken"),
    ("predictions_val.csv", "row,text,label,prediction,p(a),p(a)\n1,x,a,a,1.0,0.0\n", "is broken"),
    ("predictions_val.csv", "row,text,text,label,prediction,p(a),p(b)\n1,x,x,a,a,1.0,0.0\n", "is broken"),
    ("predictions_val.csv", "row,text,label,prediction,p(a)\n1,x,a,a,1.0,0.0\n", "is broken"),
    ("predictions_val.csv", "row,text,label,prediction\n1,x,a,a,1.0,0.0\n", "is broken"),
]


def test_compare_hostile_files_are_refused_by_name_or_read_within_ten_seconds(tmp_path, run, capsys):
    runs = [fake_run(tmp_path / f"runs/{seed}", "full", seed, [True, False] * 20) for seed in (1, 2)]
    changed(runs[1], configs=[])  # only a run without configuration files is called by its name
    for name, text, named in SIZES:
        original = (runs[1] / name).read_text()
        (runs[1] / name).write_text(text)
        since = time.process_time()
        command = ["compare", tmp_path / "runs", "--out", tmp_path / "report"]
        if named is None:
            main([str(part) for part in command])
            capsys.readouterr()
            shutil.rmtree(tmp_path / "report")
        else:
            line = refused(run, capsys, *command)
            assert name in line, text[:50]
            assert named in line, text[:50]
            assert not (tmp_path / "report").exists(), text[:50]
        assert time.process_time() - since < 10.0, text[:50]
        (runs[1] / name).write_text(original)


def test_compare_non_finite_scores_are_shown(tmp_path):
    for seed, value in enumerate((float("nan"), float("inf"), -1e299, 1e299)):
        folder = fake_run(tmp_path / f"runs/{seed}", "full", seed, [True, False])
        costs = dict.fromkeys(("seconds", "cpu_seconds"), value if abs(value) < 1e300 else 1.0)
        changed(folder, scores={"val/accuracy": value}, **costs, base={"seconds": None},
                seed=seed or None, epochs=[{"epoch": 1, "val/accuracy": value}])  # fmt: skip
    main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "report")])
    assert "nan" in (tmp_path / "report/report.md").read_text()
