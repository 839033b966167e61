"""gpt2-pl inspect: pages and tables of real and hostile runs, two runs, numbers, poems, and broken files."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import started as start
from helpers.predicted_rows import write_rows, write_run
from helpers.refusals import names, refused

from gpt2_pl.commands import main
from gpt2_pl.experiments.error_analysis import expected_calibration_error
from gpt2_pl.experiments.inspection.calibration import CalibrationScores
from gpt2_pl.experiments.inspection.predictions import read_predictions
from gpt2_pl.experiments.inspection.summary import Agreement
from gpt2_pl.text.metrics import chrf

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def folder(tmp_path):
    """A run with validation and test rows."""
    folder = write_run(tmp_path / "run")
    write_rows(folder, "val", n=80)
    return write_rows(folder, "test", n=60)


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_inspect_run_writes_page_tables_and_temperature(folder, tmp_path, capsys):
    out = tmp_path / "out"
    main(["inspect", str(folder), "--out", str(out), "--rows", "7"])
    shown = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "index.html", "rows.csv", "classes.csv", "confusions.csv", "slices.csv", "calibration.csv"
    }  # fmt: skip
    page = (out / "index.html").read_text()
    for word in ("In short", "Rows with the highest loss", "Confusions", "Calibration", "Slices", ">test<", ">lora<"):
        assert word in page
    assert not re.search(r"""(src|href)=["'](?!data:image/png|#section-)""", page)
    assert page.count("data:image/png;base64,") == 1
    rows = read_predictions(folder / "predictions_test.csv")
    worst = table(out / "rows.csv")
    assert [int(row["row"]) - 1 for row in worst] == np.argsort(-rows.losses, kind="stable")[:7].tolist()
    assert [float(row["loss"]) for row in worst] == sorted(rows.losses, reverse=True)[:7]
    assert "test, 60 rows" in shown
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 80
    stored = json.loads((folder / "calibration.json").read_text())
    validation = read_predictions(folder / "predictions_val.csv")
    grid = np.exp(np.linspace(-3, 3, 3001))
    losses = [validation.scaled(temperature).losses.mean() for temperature in grid]
    assert stored["temperature"] == pytest.approx(grid[int(np.argmin(losses))], rel=5e-3)
    assert (stored["split"], stored["rows"]) == ("val", 80)
    scaled = [row for row in table(out / "calibration.csv") if row["probabilities"] == "temperature-scaled"]
    gaps = [int(row["rows"]) * abs(float(row["confidence"]) - float(row["accuracy"])) for row in scaled]
    assert sum(gaps) / 60 == pytest.approx(expected_calibration_error(rows.scaled(stored["temperature"])))


def test_inspect_split_option_selects_the_file(folder, tmp_path, capsys):
    main(["inspect", str(folder), "--out", str(tmp_path / "out"), "--split", "val"])
    shown = capsys.readouterr().out
    assert "val, 80 rows" in shown
    assert "2-fold" in shown


def test_calibration_without_validation_rows_stores_nothing(folder, tmp_path, capsys):
    (folder / "predictions_val.csv").unlink()
    main(["inspect", str(folder), "--out", str(tmp_path / "out")])
    assert "not written" in capsys.readouterr().out
    assert not (folder / "calibration.json").exists()
    assert "halved at random" in (tmp_path / "out/index.html").read_text()


def test_inspect_run_of_few_rows_has_no_temperature(tmp_path):
    folder = write_rows(write_run(tmp_path / "run"), "val", n=1)
    main(["inspect", str(folder), "--out", str(tmp_path / "out")])
    assert "too few rows" in (tmp_path / "out/index.html").read_text()


def test_inspect_tuned_threshold_counts_the_files_predictions(folder, tmp_path):
    file = folder / "predictions_val.csv"
    lines = list(csv.reader(file.open(newline="")))
    for line in lines[1:]:
        line[3] = "low"
    with file.open("w", newline="") as written:
        csv.writer(written).writerows(lines)
    rows = read_predictions(file)
    assert rows.hits.sum() == sum(line[2] == "low" for line in lines[1:])
    main(["inspect", str(folder), "--out", str(tmp_path / "out"), "--split", "val"])
    assert "not the most probable class, as with a tuned threshold" in (tmp_path / "out/index.html").read_text()
    hits = rows.probabilities.argmax(1) == rows.labels
    assert CalibrationScores.of(rows).accuracy == hits.mean()


# Slices


def test_inspect_slices_of_patterns_and_columns_are_those_of_the_rows(folder, tmp_path):
    rows = read_predictions(folder / "predictions_test.csv")
    record = json.loads((folder / "metrics.json").read_text())
    record["data"] = {"columns": {"sentence": ["review", "sentence"]}}
    (folder / "metrics.json").write_text(json.dumps(record))
    data = tmp_path / "data.csv"
    with data.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["sentence", "source"], *([text, "AB"[i % 2]] for i, text in enumerate(rows.texts))]
        )
    out = tmp_path / "out"
    command = ["inspect", str(folder), "--out", str(out), "--data", str(data), "--column", "source", "--slice"]
    main([*command, "short=^film is"])
    found = {row["slice"]: row for row in table(out / "slices.csv")}
    assert int(found["source A"]["rows"]) == 30
    assert float(found["source B"]["accuracy"]) == pytest.approx(rows.hits[1::2].mean())
    short = np.array([text.startswith("film is") for text in rows.texts])
    assert int(found["with short"]["rows"]) == short.sum()
    assert {"with negation", "without negation", "label low"} <= found.keys()
    data.write_text(data.read_text().replace("film", "other", 1))
    with pytest.raises(SystemExit):
        main([*command, "short=^film is"])


def test_inspect_column_of_the_configured_file_is_read(tmp_path, monkeypatch, run, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_rows(write_run(tmp_path / "run", data={"train_file": "rows.tsv"}), "val", n=30, shift=100)
    (tmp_path / "rows.tsv").write_text("\n".join(["kind\ttext", *(f"{'ab'[i % 2]}\tx" for i in range(130))]))
    main(["inspect", "run", "--out", "out", "--column", "kind"])
    found = {row["slice"]: int(row["rows"]) for row in table(tmp_path / "out/slices.csv")}
    assert (found["kind a"], found["kind b"]) == (15, 15)
    (tmp_path / "rows.tsv").rename(tmp_path / "moved.tsv")
    assert "--data" in refused(run, capsys, "inspect", folder, "--out", "out", "--column", "kind")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--slice", "negation"], "slice"),
        (["--slice", "=x"], "slice"),
        (["--slice", "x=("], "pattern"),
        (["--rows", "0"], "rows"),
        (["--rows", "100000"], "rows"),
        (["--column", "source"], "data"),
        (["--column", "source", "--data", "missing.csv"], "data"),
        (["--column", "nothing", "--data", "{data}"], "column"),
        (["--column", "id", "--data", "{data}"], "column"),
        (["--column", "source", "--data", "{short}"], "data"),
        (["--split", "train"], "split"),
    ],
)
def test_inspect_invalid_option_is_refused_by_name(folder, tmp_path, run, capsys, options, key):
    for name, n in (("data", 60), ("short", 30)):
        lines = ["id,source", *(f"{i},{'ab'[i % 2]}" for i in range(n))]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    given = [text.format(data=tmp_path / "data.csv", short=tmp_path / "short.csv") for text in options]
    line = refused(run, capsys, "inspect", folder, "--out", tmp_path / "out", *given)
    assert names(line, key), line
    assert not (tmp_path / "out").exists()


# Two runs


def test_inspect_two_runs_lists_rows_on_which_they_disagree(folder, tmp_path, capsys):
    other = write_rows(write_run(tmp_path / "other"), "test", n=60, seed=5)
    out = tmp_path / "out"
    main(["inspect", str(folder), str(other), "--out", str(out)])
    first, second = (read_predictions(one / "predictions_test.csv") for one in (folder, other))
    pairs = [(bool(a), bool(b)) for a, b in zip(first.hits, second.hits, strict=True)]
    counts = tuple(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
    agreement = Agreement.of(first, second)
    assert tuple(agreement) == counts
    b, c = counts[1:3]
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert agreement.p == pytest.approx(min(1.0, 2 * tail))
    text = "both {}, only first {}, only second {}, neither {}".format(*counts)
    assert text in capsys.readouterr().out
    found = table(out / "disagreements.csv")
    assert {int(row["row"]) for row in found} == {i + 1 for i, (a, b) in enumerate(pairs) if a != b}
    gaps = [abs(float(row["loss_first"]) - float(row["loss_second"])) for row in found]
    assert gaps == sorted(gaps, reverse=True)
    assert "accuracy_second" in table(out / "slices.csv")[0]


def test_inspect_two_runs_with_classes_in_another_order_agree(folder, tmp_path):
    lines = list(csv.reader((folder / "predictions_test.csv").open(newline="")))
    other = write_run(tmp_path / "other")
    with (other / "predictions_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([*line[:4], *line[:3:-1]] for line in lines)
    out = tmp_path / "out"
    main(["inspect", str(folder), str(other), "--out", str(out)])
    assert table(out / "disagreements.csv") == []
    assert {row["accuracy"] == row["accuracy_second"] for row in table(out / "slices.csv")} == {True}


def test_inspect_two_runs_of_other_rows_or_classes_are_refused(folder, tmp_path, run, capsys):
    cases = {
        "classes": {"classes": ("low", "mid", "top")},
        "number of rows": {"n": 59},
        "another text": {"texts": ["film"]},
    }
    for i, (words, options) in enumerate(cases.items()):
        other = write_rows(write_run(tmp_path / f"other{i}"), "test", **{"n": 60, **options})
        line = refused(run, capsys, "inspect", folder, other, "--out", tmp_path / "out")
        assert words in line
        assert str(other / "predictions_test.csv") in line
    write_rows(write_run(tmp_path / "val"), "val", n=80)
    assert "--split" in refused(run, capsys, "inspect", folder, tmp_path / "val", "--out", tmp_path / "out")
    assert "one or two" in refused(run, capsys, "inspect", folder, folder, folder, "--out", tmp_path / "out")


# Numbers and poems


def test_inspect_numbers_sorts_by_absolute_error(tmp_path, run, capsys):
    folder = write_run(tmp_path / "run")
    values = [(3.0, 2.5), (1.0, 4.0), (2.0, 1.0), (-1.0, -1.0)]
    lines = ["row,text,label,prediction,loss", *(f"{i},t{i},{a},{b},0" for i, (a, b) in enumerate(values, 1))]
    (folder / "predictions_val.csv").write_text("\n".join(lines))
    main(["inspect", str(folder), "--out", str(tmp_path / "out")])
    assert [row["row"] for row in table(tmp_path / "out/rows.csv")] == ["2", "3", "1", "4"]
    assert table(tmp_path / "out/rows.csv")[3]["label"] == "-1.0"
    assert "mean absolute error 1.125" in capsys.readouterr().out
    for options in ([folder], ["--slice", "x=y"], ["--column", "x"]):
        assert "p(CLASS)" in refused(run, capsys, "inspect", "--out", tmp_path / "out", folder, *options)
    (folder / "predictions_val.csv").write_text("row,text,label,prediction\n1,a,good,bad\n")
    assert "finite numbers" in refused(run, capsys, "inspect", folder, "--out", tmp_path / "out")


def test_inspect_poems_shows_them_beside_the_true_poems(tmp_path, run, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "run", data={"test_file": "true.txt", "prompt_lines": 1}, task="PoemGenerator")
    poems = {1: ["a rose", "is red & <b>red</b>", "the sky"], 2: ["a day", "of rain and rain", "is gone"]}
    new = {1: ["a rose", "is red & <b>red</b>", "the sky"], 2: ["a day", "red red red red red red red", "blue"]}
    for file, content in ((tmp_path / "true.txt", poems), (folder / "poems_test.txt", new)):
        file.write_text("\n".join(f"{number}\n\n" + "\n".join(lines) + "\n" for number, lines in content.items()))
    main(["inspect", "run", "--out", "out"])
    found = table(tmp_path / "out/rows.csv")
    assert [row["poem"] for row in found] == ["2", "1"]
    assert float(found[0]["chrf"]) == pytest.approx(chrf(["\n".join(new[2][1:])], ["\n".join(poems[2][1:])]))
    assert float(found[0]["distinct_2"]) == pytest.approx(2 / 7)
    assert float(found[0]["seq_rep_4"]) == pytest.approx(1 - 2 / 5)
    page = (tmp_path / "out/index.html").read_text()
    assert page.index("Poem 2") < page.index("Poem 1")
    assert "&lt;b&gt;red&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "poem 2" in capsys.readouterr().out
    (tmp_path / "true.txt").write_text("1\n\na rose\n")
    assert "true.txt" in refused(run, capsys, "inspect", "run", "--out", "out")
    assert "poems" in refused(run, capsys, "inspect", "run", "--slice", "a=b", "--out", "out")
    (folder / "poems_test.txt").write_text("no number")
    assert "poems_test.txt" in refused(run, capsys, "inspect", "run", "--out", "out")


# Missing files and large files


def test_inspect_missing_or_unreadable_files_are_named(tmp_path, run, capsys):
    folder = write_run(tmp_path / "run")
    assert "predictions_test.csv" in refused(run, capsys, "inspect", folder, "--out", tmp_path / "out")
    (folder / "predictions_val.csv").write_bytes(b"row,text,label,prediction,p(a),p(b)\n1,\xff,a,a,1,0\n")
    assert "predictions_val.csv is broken" in refused(run, capsys, "inspect", folder, "--out", tmp_path / "out")
    (folder / "predictions_val.csv").unlink()
    (folder / "predictions_val.csv").mkdir()
    assert "regular file" in refused(run, capsys, "inspect", folder, "--out", tmp_path / "out")
    (folder / "metrics.json").unlink()
    assert "metrics.json" in refused(run, capsys, "inspect", folder, "--out", tmp_path / "out")
    assert "no folder" in refused(run, capsys, "inspect", tmp_path / "rum", "--out", tmp_path / "out")
    assert "no folder" in refused(run, capsys, "inspect", tmp_path / ("r" * 300), "--out", tmp_path / "out")


@pytest.mark.slow
def test_inspect_hundred_thousand_rows_takes_bounded_time_and_space(tmp_path):
    folder = write_run(tmp_path / "run")
    write_rows(folder, "val", n=100_000, texts=[f"a film of {i} words that is not long" for i in range(1000)])
    begin = time.process_time()
    main(["inspect", str(folder), "--out", str(tmp_path / "out")])
    assert time.process_time() - begin < 30
    sizes = [path.stat().st_size for path in (tmp_path / "out").iterdir()]
    assert max(sizes) < 500_000
    done = start(tmp_path, "inspect", str(folder), "--out", "out2")
    assert done.returncode == 0, done.stderr


def test_inspect_starts_without_importing_torch(folder, tmp_path):
    code = (
        "import sys; from gpt2_pl.commands import main; "
        f"main(['inspect', {str(folder)!r}, '--out', {str(tmp_path / 'out')!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
@pytest.mark.parametrize("width", [800, 1400])
def test_inspect_page_in_a_browser_has_no_horizontal_scroll(folder, tmp_path, width):
    classes, other = ("a" * 80, "</title>", "very long name of a class"), tmp_path / "other"
    write_rows(folder, "test", n=60, classes=classes, texts=["w" * 900, "a film that is not long"])
    write_rows(write_run(other), "test", n=60, seed=2, classes=classes, texts=["w" * 900, "a film that is not long"])
    out = tmp_path / "out"
    main(["inspect", str(folder), str(other), "--out", str(out)])
    script = (
        "tables = [...document.querySelectorAll('.wide')].filter(table => table.scrollWidth > table.clientWidth);"
        "document.title = [document.documentElement.scrollWidth, innerWidth, document.images[0].naturalWidth,"
        " tables.length]"
    )
    page = (out / "index.html").read_text()
    policy = re.search(r"<meta http-equiv=[^>]*>", page)[0]
    measured = page.replace(policy, "").replace("</body>", f"<script>{script}</script></body>")
    (out / "measured.html").write_text(measured)

    def browse(*options, file="measured.html"):
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},900",
                     f"--user-data-dir={tmp_path / 'profile'}", *options, (out / file).as_uri()]  # fmt: skip
        return subprocess.run([CHROMIUM, *arguments], capture_output=True, text=True, timeout=120, check=True).stdout

    title = re.search(r"<title>([\d,]+)</title>", browse("--dump-dom"))[1]
    scroll, inner, image, wider_tables = map(int, title.split(","))
    assert inner == width
    assert scroll <= inner
    assert image > 0
    assert wider_tables == 0
    browse(f"--screenshot={tmp_path / 'page.png'}", file="index.html")
    header = (tmp_path / "page.png").read_bytes()[16:24]
    assert int.from_bytes(header[:4], "big") == width


def test_inspect_two_runs_of_poems_puts_the_largest_difference_in_chrf_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    true = {1: ["a rose", "is red", "the sky"], 2: ["a day", "of rain", "is gone"]}
    first = {1: ["a rose", "is red", "the sea"], 2: ["a day", "of ruin", "is gone"]}
    second = {1: ["a rose", "is red", "the sea"], 2: ["a day", "x", "y"]}
    for name, poems in (("true.txt", true), ("one/poems_test.txt", first), ("two/poems_test.txt", second)):
        if name != "true.txt":
            folder = write_run(tmp_path / name[:3], data={"test_file": "true.txt", "prompt_lines": 1})
            lines = f"poem,n_tokens,loss\n1,10,{20 if name[:3] == 'one' else 30}\n2,5,4\n"
            (folder / "losses_test.csv").write_text(lines)
        content = "".join(f"{number}\n" + "\n".join(lines) + "\n" for number, lines in poems.items())
        (tmp_path / name).write_text(content)
    main(["inspect", "one", "two", "--out", "out"])
    found = table(tmp_path / "out/rows.csv")
    assert [row["poem"] for row in found] == ["2", "1"]
    for row, number in zip(found, (2, 1), strict=True):
        scores = [chrf(["\n".join(poems[number][1:])], ["\n".join(true[number][1:])]) for poems in (first, second)]
        assert [float(row["chrF (first)"]), float(row["chrF (second)"])] == pytest.approx(scores)
        assert float(row["chrF difference"]) == pytest.approx(scores[1] - scores[0])
    assert [float(row["loss difference"]) for row in found] == [0.0, 1.0]
    page = (tmp_path / "out/index.html").read_text()
    assert page.count("generated by the second run") == 2


def test_inspect_contexts_lists_highest_losses_and_largest_differences(tmp_path, monkeypatch, run, capsys):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    n, losses = generator.integers(1, 20, 30), generator.gamma(3.0, 1.0, (2, 30))
    for name, loss in zip(("one", "two"), losses, strict=True):
        rows = "".join(f"{i},{n[i]},{float(n[i] * loss[i])},text {i}\n" for i in range(30))
        (write_run(tmp_path / name) / "losses_val.csv").write_text(f"row,n_tokens,loss,text\n{rows}")
    main(["inspect", "one", "--out", "out", "--rows", "5"])
    found = table(tmp_path / "out/rows.csv")
    assert [int(row["row"]) for row in found] == np.argsort(-losses[0])[:5].tolist()
    assert [float(row["loss"]) for row in found] == pytest.approx(sorted(losses[0])[::-1][:5])
    main(["inspect", "one", "two", "--out", "both"])
    found = table(tmp_path / "both/rows.csv")
    order = np.argsort(-abs(losses[1] - losses[0]))
    assert [row["text"] for row in found] == [f"text {i}" for i in order]
    assert [float(row["second minus first"]) for row in found] == pytest.approx((losses[1] - losses[0])[order])
    means = (losses * n).sum(1) / n.sum()
    assert f"{means[1]:.4f}" in capsys.readouterr().out
    (tmp_path / "two/losses_val.csv").write_text("row,n_tokens,loss,text\n1,2,3,other\n")
    assert "other contexts" in refused(run, capsys, "inspect", "one", "two", "--out", "both")
    (tmp_path / "two/losses_val.csv").write_text("row,n_tokens,text\n1,2,other\n")
    assert "no column loss" in refused(run, capsys, "inspect", "two", "--out", "both")
