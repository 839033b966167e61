"""Untrusted predictions: inspect escapes every text and refuses broken files by name."""

import csv
import re

import pytest
from helpers.predicted_rows import write_rows, write_run
from helpers.refusals import refused

from gpt2_pl.commands import main

EVIL = [
    '<script>alert("x")</script>', "=HYPERLINK(\"http://x\")", "+1", "-1+1", "@SUM(A1)", "\x1b[31mred", "a\u202eb",
    "\uff1dcmd", "tab\t=1", "$\\frac{$", "a|b", "</td></table><h1>", "x" * 3000, "{{ 7 * 7 }}", "",
]  # fmt: skip


def test_inspect_hostile_texts_are_escaped_in_page_tables_and_terminal(tmp_path, capsys):
    folder = write_run(tmp_path / "run<i>", record={"task": "<b>t</b>", "configs": ["strategy/<u>s"]})
    classes = ("=1+1", "<script>x", "c" * 500)
    write_rows(folder, "val", n=60, classes=classes, texts=EVIL)
    other = write_rows(write_run(tmp_path / "other"), "val", n=60, seed=3, classes=classes, texts=EVIL)
    out = tmp_path / "out"
    main(["inspect", str(folder), str(other), "--out", str(out), "--slice", "<em>=a"])
    shown, page = capsys.readouterr().out, (out / "index.html").read_text()
    body = page.partition("<body>")[2]
    assert set(re.findall(r"<([a-z0-9]+)", body)) <= {
        "header", "h1", "h2", "nav", "ol", "li", "a", "main", "section", "p", "ul", "img", "div", "table", "caption",
        "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    for text in (page, shown):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert "{{ 7 * 7 }}" in page
    assert "x" * 700 not in page
    for file in out.glob("*.csv"):
        for row in csv.reader(file.open(newline="")):
            assert not [cell for cell in row if re.match("[=+@\t\r\uff1d]", cell) or re.match("-[^0-9]", cell)]
            assert not [cell for cell in row if re.match("-", cell) and not re.fullmatch(r"-[\d.e-]+", cell)]


BROKEN = {
    "": "no column row",
    "row,text,label,prediction,p(a),p(b)\n": "no rows",
    "row,text,label,prediction,p(a)\n1,x,a,a,1\n": "2 to 200 classes",
    "row,text,label,prediction,p(a),p(b),p(b)\n1,x,a,a,1,0,0\n": "different names",
    "row,text,label,prediction,p(a),p(b)\n1,x,c,a,1,0\n": "'c' is no class",
    "row,text,label,prediction,p(a),p(b)\n1,x,a,c,1,0\n": "'c' is no class",
    "row,text,label,prediction,p(a),p(b)\n1,x,a,a,1\n": "6 values",
    "row,text,label,prediction,p(a),p(b)\n1,x,a,a,0.9,0.9\n": "sum 1",
    "row,text,label,prediction,p(a),p(b)\n1,x,a,a,nan,0.9\n": "sum 1",
    "row,text,label,prediction,p(a),p(b)\n1,x,a,a,-0.5,1.5\n": "sum 1",
    "row,text,label,prediction,p(a),p(b)\n1,x,a,a,x,1\n": "could not convert",
    "row,text,label,prediction,p(a),p(b)\nx,x,a,a,0,1\n": "row number",
    'row,text,label,prediction,p(a),p(b)\n1,"x,a,a,0,1\n': "unexpected end",
    "row,label,prediction,p(a),p(b)\n1,a,a,0,1\n": "no column text",
    "row,text,label,prediction\n1,x,0.5,inf\n": "finite numbers",
}


@pytest.mark.parametrize("content", BROKEN)
def test_inspect_broken_predictions_are_refused_by_file(tmp_path, run, capsys, content):
    folder = write_run(tmp_path / "run")
    (folder / "predictions_val.csv").write_text(content)
    if "label" not in content:
        line = refused(run, capsys, "inspect", folder, "--out", tmp_path / "out")
        assert "predictions_val.csv has no column label" in line
        return
    line = refused(run, capsys, "inspect", folder, "--out", tmp_path / "out")
    assert BROKEN[content] in line
    assert str(folder / "predictions_val.csv") in line
    assert not (tmp_path / "out").exists()
