"""DataToText against transformers and sacrebleu, and the commands on its runs."""

import csv
import json
import math

import numpy as np
import pytest
import sacrebleu
import torch
from conftest import ROOT, metrics
from helpers.cards import card, executed
from helpers.refusals import refusal, refused
from helpers.trainers import trainer
from transformers import GPT2LMHeadModel

from gpt2_pl.commands import main
from gpt2_pl.datamodules import WebNLG
from gpt2_pl.experiments.run import Run
from gpt2_pl.tasks import DataToText
from gpt2_pl.text.overlap import rouge_l
from gpt2_pl.text.tokenizer import END_OF_TEXT, load_tokenizer
from gpt2_pl.utils.run_schema import check_metrics

CONFIG = ROOT / "configs"
THINGS, MOODS = ("film", "plot", "camera", "cast"), ("funny", "cold", "boring", "slow", "fine")
BEAMS = 3


def write(file, seed, n, is_list):
    """Write n sets of one or two triples with two references each, as lines of one reference or as lists."""
    draw, rows = np.random.default_rng(seed), []
    for i in range(n):
        pairs = [(draw.choice(THINGS), draw.choice(MOODS)) for _ in range(1 + i % 2)]
        source = f"{i} | " + " | ".join(f"{thing} : mood : {mood}" for thing, mood in pairs)
        texts = [" and ".join(form.format(*pair) for pair in pairs) for form in ("the {0} is {1}", "a {1} {0}")]
        if is_list:
            rows.append({"source": source, "references": texts, "seen": i % 3 > 0})
        else:
            rows += [{"source": source, "target": text} for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file):
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("webnlg")
    return {
        "train": write(folder / "train.jsonl", 0, 30, False),
        "val": write(folder / "val.jsonl", 1, 6, True),
        "test": write(folder / "test.jsonl", 2, 9, True),
    }


@pytest.fixture(scope="module")
def fitted_run(fitted, base, data):
    """Return a run of three epochs."""
    return fitted(
        "fit", "--config", CONFIG / "task/webnlg.yaml", f"--model.base={base}", "--trainer.max_epochs=3",
        *(f"--data.{split}_file={file}" for split, file in data.items()), "--trainer.accelerator=cpu",
        "--trainer.precision=32-true", f"--model.num_beams={BEAMS}", "--model.max_new_tokens=12",
        "--model.optimizer.init_args.lr=1e-2", "--data.batch_size=4", "--data.eval_batch_size=4",
        "--data.train_references=first", "--model.score_every_n_epochs=2", "--model.num_samples=2",
    )  # fmt: skip


def test_fit_scores_equal_sacrebleu_and_row_scores_equal_them(fitted_run):
    account, rows = metrics(fitted_run)["scores"], read(fitted_run / "losses_test.csv")
    check_metrics(metrics(fitted_run), "metrics.json")
    texts, references = [row["generated"] for row in rows], [json.loads(row["references"]) for row in rows]
    assert len(rows) == 9
    assert len(set(texts)) > 1
    groups = {"": range(9), "_seen": [1, 2, 4, 5, 7, 8], "_unseen": [0, 3, 6]}
    for suffix, group in groups.items():
        found, streams = [texts[i] for i in group], list(zip(*(references[i] for i in group), strict=True))
        expected = {
            "bleu": sacrebleu.corpus_bleu(found, streams).score,
            "chrf": sacrebleu.corpus_chrf(found, streams).score,
            "rouge_l": sum(rouge_l(texts[i], references[i]) for i in group) / len(group),
        }
        for name, value in expected.items():
            assert account[f"test/{name}{suffix}"] == pytest.approx(value, rel=1e-5), (name, suffix)
    assert account["test/bleu"] > 0
    assert metrics(fitted_run)["score_signatures"]["test/bleu"].startswith("nrefs:2|case:mixed|eff:no|tok:13a")
    epochs = metrics(fitted_run)["epochs"]
    assert ["val/bleu" in epoch for epoch in epochs] == [False, True, False]
    of_rows = Run.read(fitted_run).row_scores["test"].scores
    assert {f"test/{name}{suffix}" for name in ("bleu", "chrf", "rouge_l") for suffix in groups} < set(of_rows)
    for name, of_row in of_rows.items():
        value = math.exp(of_row.value) if name == "test/perplexity" else of_row.value
        assert value == pytest.approx(account[name], rel=1e-4), name
        assert of_row.contributions.shape == (9,)
    seen = of_rows["test/bleu_seen"]
    assert seen.contributions[[0, 3, 6]] == pytest.approx([seen.value] * 3)  # these rows are not part of it
    assert len(set(seen.contributions.round(6))) > 2
    samples = (fitted_run / "texts_test.txt").read_text()
    assert samples.count("generated: ") == 2
    assert f"generated: {texts[0]}\nreference: {references[0][0]}" in samples


def test_fit_loss_and_beams_equal_transformers(fitted_run, base, data, tmp_path):
    main(["export", str(fitted_run), "--format", "hf", "--out", str(tmp_path / "hf")])
    shown = executed(tmp_path / "hf")["settings"]
    assert {**shown, "max_new_tokens": 12} == {
        "num_beams": BEAMS, "length_penalty": 0.8, "do_sample": False, "max_new_tokens": 12
    }  # fmt: skip
    assert "generates a text for a source" in card(tmp_path / "hf")
    reference, tokenizer = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval(), load_tokenizer(base)
    rows, end = read(fitted_run / "losses_test.csv"), tokenizer.token_to_id(END_OF_TEXT)
    settings = {"num_beams": BEAMS, "length_penalty": 0.8, "do_sample": False, "max_new_tokens": 12}
    for row, line in zip(rows, data["test"].read_text().splitlines(), strict=True):
        prompt = tokenizer.encode(json.loads(line)["source"] + "\n").ids
        target = tokenizer.encode(json.loads(line)["references"][0]).ids
        ids = torch.tensor([[*prompt, *target, end]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            loss = reference(ids, labels=labels).loss.item() * (len(target) + 1)
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-3)
        assert int(row["n_tokens"]) == len(target) + 1
        found = reference.generate(torch.tensor([prompt]), eos_token_id=end, pad_token_id=end, **settings)[0].tolist()
        new = found[len(prompt) :]
        assert row["generated"] == tokenizer.decode(new[: [*new, end].index(end)]).strip()


def test_commands_generate_the_same_targets_for_new_sources(fitted_run, data, run, tmp_path):
    rows = read(fitted_run / "losses_test.csv")
    config = ["--config", fitted_run / "config.yaml", "--ckpt_path", fitted_run / "checkpoints/best.ckpt"]
    folder = run("predict", *config, f"--data.predict_file={data['test']}", "--name=predicted")
    predicted = read(folder / "texts_predict.csv")
    assert [row["target"] for row in predicted] == [row["generated"] for row in rows]
    assert [row["source"] for row in predicted] == [row["text"] for row in rows]
    run("validate", *config, f"--data.val_file={data['test']}", "--name=validated")
    validated = read(folder.parents[1] / "validated/version_0/losses_val.csv")
    assert [row["generated"] for row in validated] == [row["generated"] for row in rows]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{row['text']}\n"}) + "\n" for row in rows))
    flags = [f"--num_beams={BEAMS}", "--length_penalty=0.8", "--max_new_tokens=12"]
    run("generate", fitted_run, "--prompt_file", prompts, "--out", tmp_path / "out.jsonl", *flags)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in written] == [row["generated"] for row in rows]
    run("generate", fitted_run, "--prompt_file", prompts, "--out", tmp_path / "as_is.jsonl", "--as_is")
    written = [json.loads(line) for line in (tmp_path / "as_is.jsonl").read_text().splitlines()]  # with the run's beams
    assert [row["text"].removeprefix(row["prompt"]).strip() for row in written] == [row["generated"] for row in rows]


def test_references_are_runs_on_the_same_rows(fitted_run, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["references", str(fitted_run), "--name=refs", "--draws=2"])
    run, test = Run.read(fitted_run), [json.loads(line) for line in data["test"].read_text().splitlines()]
    first = {row["source"]: row["target"] for row in map(json.loads, reversed(data["train"].read_text().splitlines()))}
    found = {}
    for file in (tmp_path / "lightning_logs/refs").glob("*/*/metrics.json"):
        reference, rows = Run.read(file.parent), read(file.parent / "losses_test.csv")
        assert reference.comparison_key("test") == run.comparison_key("test")
        found[f"{file.parts[-3]} {file.parts[-2]}"] = texts = [row["generated"] for row in rows]
        expected = sacrebleu.corpus_bleu(texts, list(zip(*(row["references"] for row in test), strict=True))).score
        assert reference.score("test/bleu") == pytest.approx(expected)
        assert reference.row_scores["test"].scores["test/bleu"].value == pytest.approx(expected)
    assert found["copy_source version_0"] == [row["source"] for row in test]
    assert set(found["nearest_source version_0"]) <= set(first.values())
    draws = [found[f"random_continuation version_{i}"] for i in range(2)]
    assert draws[0] != draws[1]
    assert {text for texts in draws for text in texts} <= set(first.values())


def test_inspect_shows_generated_texts_and_references(fitted_run, tmp_path):
    main(["inspect", str(fitted_run), "--out", str(tmp_path / "one")])
    main(["inspect", str(fitted_run), str(fitted_run), "--out", str(tmp_path / "two")])
    rows, shown = read(fitted_run / "losses_test.csv"), read(tmp_path / "one/rows.csv")
    worst = max(rows, key=lambda row: float(row["loss"]) / int(row["n_tokens"]))
    assert [shown[0][key] for key in ("text", "generated")] == [worst["text"], worst["generated"]]
    assert json.loads(worst["references"])[0] in shown[0]["references"]
    assert worst["generated"] in (tmp_path / "one/index.html").read_text()
    assert read(tmp_path / "two/rows.csv")[0]["generated (second)"] in {row["generated"] for row in rows}


def test_data_to_text_limited_test_generates_evaluated_rows_only(base, data):
    task = DataToText(base=str(base), num_beams=2, max_new_tokens=3)
    tested = trainer(limit_test_batches=1)
    tested.test(task, WebNLG(test_file=str(data["test"]), tokenizer=str(base), eval_batch_size=4))
    assert len(task.generated) == 4
    assert len(list(task.row_table("test").rows)) == 4
    assert {"test/bleu", "test/perplexity"} <= set(tested.logged_metrics)


def test_data_to_text_settings_out_of_range_are_refused(base, run, capsys):
    for settings, message in (
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"length_penalty": 99.0}, "length_penalty must be in [-10, 10], got 99.0"),
        ({"num_samples": -1}, "num_samples must be at least 0"),
        ({"score_every_n_epochs": 0}, "score_every_n_epochs must be null or at least 1, got 0"),
    ):
        assert message in str(refusal(lambda given=settings: DataToText(base=str(base), **given)))
    line = refused(run, capsys, "fit", "--config", CONFIG / "task/webnlg.yaml", f"--model.base={base}",
                   "--data.train_file=nowhere.jsonl", "--model.num_beams=0")  # fmt: skip
    assert "num_beams" in line
