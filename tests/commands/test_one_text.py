"""classify, generate and chat for single texts: arguments, standard input, standard output and a conversation."""

import csv
import io
import json
import signal
import sys
from datetime import date
from decimal import Decimal

import pyarrow
import pytest
from helpers.refusals import refused
from helpers.saved_runs import saved_run
from pyarrow import parquet

import gpt2_pl
from gpt2_pl import decoding
from gpt2_pl.commands import main
from gpt2_pl.datamodules import IMDB, QuoraPairs, Sonnets, SourceTargetPairs
from gpt2_pl.errors import printable
from gpt2_pl.tasks import DataToText, LanguageModel, ParaphraseDetector, PoemGenerator, SentimentClassifier


@pytest.fixture(scope="module")
def runs(base, files, pair_files, poem_files, tmp_path_factory):
    """Runs of three tasks."""
    folder, settings = tmp_path_factory.mktemp("runs"), {"tokenizer": str(base), "max_length": 48}
    reviews = IMDB(val_file=str(files["val"]), **settings)
    pairs = QuoraPairs(val_file=str(pair_files["val"]), **settings)
    poems = Sonnets(val_file=str(poem_files["val"]), **settings)
    return {
        "reviews": saved_run(folder / "reviews", SentimentClassifier(base=str(base), num_classes=2), reviews),
        "pairs": saved_run(folder / "pairs", ParaphraseDetector(base=str(base)), pairs),
        "poems": saved_run(folder / "poems", PoemGenerator(base=str(base), max_new_tokens=12), poems),
    }


@pytest.fixture
def typed(monkeypatch):
    """Set standard input."""

    def typed(content):
        content = content if isinstance(content, bytes) else content.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return typed


def output(capsys, *args):
    """Run a command and return its standard output."""
    capsys.readouterr()
    main([*map(str, args)])
    return capsys.readouterr().out


def test_classify_text_displays_classes_in_80_columns_without_control_characters(runs, capsys):
    text = "a fine\nfilm \x1b[31m " + "and so on " * 30
    (probabilities,) = gpt2_pl.load(runs["reviews"]).predict_proba([text])
    shown = output(capsys, "classify", runs["reviews"], "--precision=32-true", "--text", text)
    lines = shown.splitlines()
    assert lines[0].startswith(r"a fine film \x1b[31m and so on")
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in shown
    found = {line.split()[0]: float(line.split()[1]) for line in lines[1:]}
    assert found == {name: round(p, 4) for name, p in zip(("negative", "positive"), probabilities, strict=True)}
    numbers = output(capsys, "classify", runs["reviews"], "--precision=32-true", "--labels=numbers", "--text", text)
    assert sorted(line.split()[0] for line in numbers.splitlines()[1:]) == ["0", "1"]


def test_classify_pairs_as_json_equals_predictor(runs, capsys):
    pairs = [("how do I", "the clock"), ("a", "b")]
    args = [arg for pair in pairs for arg in ("--text", *pair)]
    out = output(capsys, "classify", runs["pairs"], "--precision=32-true", "--json", *args)
    rows = [json.loads(line) for line in out.splitlines()]
    probabilities = gpt2_pl.load(runs["pairs"]).predict_proba(pairs)
    assert [(row["row"], row["sentence1"], row["sentence2"]) for row in rows] == [(1, *pairs[0]), (2, *pairs[1])]
    assert [row["p(duplicate)"] for row in rows] == pytest.approx(probabilities[:, 1].tolist(), abs=1e-6)


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "lines"])
def test_classify_standard_input_and_output_keep_columns(form, runs, typed, capsys):
    rows = [{"id": "x7", "sentence": "a film, and é"}, {"id": "x8", "sentence": "the plot"}]
    model = gpt2_pl.load(runs["reviews"])
    labels = [str(model.labels.index(name)) for name in model.predict([row["sentence"] for row in rows])]
    if form == "jsonl":
        typed("".join(map(lambda row: json.dumps(row) + "\n", rows)))
    elif form == "lines":
        typed("a film, and é\r\n\n  \nthe plot")
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], delimiter="\t" if form == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        typed(text.getvalue())
    keep = ["--lines", "--columns", "row=id"] if form == "lines" else ["--keep", "id", "--columns", "id"]
    command = ["classify", runs["reviews"], "--input=-", "--out=-", "--labels=numbers", "--precision=32-true"]
    out = output(capsys, *command, *keep, "sentence", "prediction=My Label")
    found = list(csv.DictReader(io.StringIO(out)))
    assert list(found[0]) == ["id", "sentence", "My Label"]
    assert [row["sentence"] for row in found] == [row["sentence"] for row in rows]
    assert [row["id"] for row in found] == (["1", "2"] if form == "lines" else ["x7", "x8"])
    assert [row["My Label"] for row in found] == labels


def test_classify_file_keeps_columns_in_every_format(runs, tmp_path, capsys):
    source = tmp_path / "in.csv"
    source.write_text("sentence,id,note\nthe plot,7,a\nzz,8,\n")
    for name in ("o.csv", "o.jsonl"):
        main(["classify", str(runs["reviews"]), f"--input={source}", f"--out={tmp_path / name}", "--keep=note",
              "--keep=id"])  # fmt: skip
    with (tmp_path / "o.csv").open(newline="") as file:
        found = list(csv.reader(file))
    assert found[0][:5] == ["row", "note", "id", "sentence", "prediction"]
    assert [row[:4] for row in found[1:]] == [["1", "a", "7", "the plot"], ["2", "", "8", "zz"]]
    assert [json.loads(line)["id"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == ["7", "8"]


def test_classify_parquet_to_json_keeps_dates_and_decimals_as_text(runs, tmp_path, capsys):
    source = tmp_path / "in.parquet"
    kept = {"day": date(2026, 1, 2), "price": Decimal("1.50")}
    parquet.write_table(pyarrow.Table.from_pylist([{"sentence": "the plot", **kept}]), source)
    keep = [arg for name in kept for arg in ("--keep", name)]
    row = json.loads(output(capsys, "classify", runs["reviews"], "--input", source, "--json", *keep))
    assert {name: row[name] for name in kept} == {name: str(value) for name, value in kept.items()}


def test_classify_contradictory_arguments_are_refused(runs, typed, run, capsys, tmp_path):
    source = tmp_path / "in.csv"
    source.write_text("sentence,prediction\na,b\n")
    for args, words in (
        ([], "--text"),
        (["--text", "a", "--input", source], "--text"),
        (["--input", source], "--out -"),
        (["--text", "a", "b"], "1 text, sentence"),
        (["--text", "a", "--columns", "row"], "columns"),
        (["--text", "a", "--quoting", "true"], "quoting"),
        (["--text", "a", "--on_invalid_row", "skip"], "on_invalid_row"),
        (["--input", source, "--out=-", "--columns", "nothing"], "nothing"),
        (["--input", source, "--out=-", "--columns", "row=x", "prediction=x"], "different names"),
        (["--input", source, "--out=-", "--keep", "nothing"], "nothing"),
        (["--input", source, "--out=-", "--keep", "prediction"], "--keep must be other columns"),
        (["--input", source, "--out=x.csv", "--json"], "json"),
        (["--text", "a \udce9"], "UTF-8"),
        (["--text", " "], "non-empty"),
    ):
        assert words in refused(run, capsys, "classify", runs["reviews"], *args), args
    pairs = runs["pairs"]
    assert "2 texts, sentence1, sentence2" in refused(run, capsys, "classify", pairs, "--text", "a")
    assert "one field" in refused(run, capsys, "classify", pairs, "--input", source, "--lines", "--out=-")
    for content, words in (("", "empty"), ("a,b\n1,2\n", "sentence"), ('{"sentence": 3}', "standard input, row 1")):
        typed(content)
        line = refused(run, capsys, "classify", runs["reviews"], "--input=-", "--out=-")
        assert words in line, content
        assert "/tmp" not in line


def test_generate_prompt_of_base_folder_equals_predictor(base, capsys, typed, tmp_path):
    settings = ["--max_new_tokens=6", "--seed=3"]
    expected = gpt2_pl.load(base).generate(["a film", "the"], max_new_tokens=6, seed=3)
    shown = output(capsys, "generate", base, "--prompt", "a film", "--prompt", "the", *settings, "--json")
    rows = [json.loads(line) for line in shown.splitlines()]
    assert rows == [{"prompt": p, "text": t} for p, t in zip(("a film", "the"), expected, strict=True)]
    for content in ("a film\nthe\n", '{"prompt": "a film"}\n{"prompt": "the"}\n'):
        typed(content)
        assert output(capsys, "generate", base, "--prompt_file=-", "--out=-", *settings) == "".join(
            f"{text}\n\n" for text in expected
        )


def test_generate_with_compile_decodes_with_the_compiled_step(base, capsys, monkeypatch):
    calls = []

    def step(*given):
        calls.append(given)
        return decoding._decode_logits(*given)

    monkeypatch.setattr(decoding, "_compiled_logits", lambda: step)
    settings = ("--prompt", "a film", "--max_new_tokens=6", "--seed=3")
    texts = [output(capsys, "generate", base, *settings, *more) for more in ((), ("--compile",))]
    assert texts[0] == texts[1]
    assert len(calls) == 5  # the first token follows the prompt


def test_generate_prompt_of_poem_run_is_a_poem(runs, capsys, run):
    lines = output(capsys, "generate", runs["poems"], "--prompt", "a day\n\n  a night").splitlines()
    assert lines[:2] == ["a day", "a night"]
    for args, words in (([], "prompt_file"), (["--prompt", "a", "--as_is", "--poems"], "as_is"),
                        (["--prompt_file", "x"], "--out"), (["--prompt", "a", "b"], "prompt 1")):  # fmt: skip
        assert words in refused(run, capsys, "generate", runs["poems"], *args), args
    assert "generates no texts; use gpt2-pl classify" in refused(
        run, capsys, "generate", runs["reviews"], "--prompt", "a"
    )
    bias = ["--prompt", "a", "--no_line_length_bias"]
    assert "used with poems" in refused(run, capsys, "generate", runs["poems"], *bias, "--as_is")


def test_chat_answers_every_text_until_the_end_of_input(runs, base, typed, capsys):
    typed("a fine film\n\nthe plot\n")
    lines = output(capsys, "chat", runs["reviews"]).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line.startswith("  ")].count("positive") == 2
    typed("how do I\na clock\n")
    assert "  duplicate" in output(capsys, "chat", runs["pairs"])
    model = gpt2_pl.load(runs["poems"])
    (poem,) = model.generate(["a day\na night"])
    poem = printable(poem, keep="\n\t").removeprefix("a day\na night\n")
    for end in ("\n\n", "\n"):  # a blank line, the end of input
        typed(f"a day\na night{end}")
        shown = output(capsys, "chat", runs["poems"])
        assert "".join(poem.split()) in "".join(shown.split())
    typed("a film\nthe\n")
    shown = output(capsys, "chat", base, "--max_new_tokens=5", "--temperature=0")
    for text in gpt2_pl.load(base).generate(["a film", "the"], max_new_tokens=5, temperature=0):
        text = text.removeprefix("a film").removeprefix("the").rstrip("\ufffd\n")
        assert printable(text, keep="\n\t") in shown


def test_chat_of_sources_prints_targets_and_errors(base, tmp_path, typed, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"source": "a", "target": "b"}\n')
    data = SourceTargetPairs(val_file=str(rows), tokenizer=str(base), max_length=50)
    run = saved_run(tmp_path, DataToText(base=str(base), num_beams=2, max_new_tokens=5), data)
    typed("so long " * 60 + "\na film\n")
    shown = output(capsys, "chat", run)
    assert "error: prompt 1 must have at most 63 tokens" in shown
    assert gpt2_pl.load(run).generate(["a film"])[0] in shown


def test_chat_ctrl_c_stops_a_generation_and_leaves_at_the_prompt(base, typed, capsys, monkeypatch):
    continue_prompts, calls = LanguageModel.continue_prompts, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return continue_prompts(*args, **kwargs)

    monkeypatch.setattr(LanguageModel, "continue_prompts", interrupted)
    typed("a film\nthe\n")
    assert "(stopped)" in output(capsys, "chat", base, "--max_new_tokens=5")
    assert len(calls) == 2

    def press(_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("builtins.input", press)
    assert output(capsys, "chat", base).count("\n") <= 3
    assert len(calls) == 2


def test_chat_settings_of_generation_for_a_classifier_are_refused(runs, run, capsys):
    assert "top_p" in refused(run, capsys, "chat", runs["reviews"], "--top_p=0.5")
    assert "temperature" in refused(run, capsys, "chat", runs["poems"], "--temperature=-1")
