"""Adapters in peft's format: gpt2_pl.load and classify give the predictions of the run that was exported."""

import json
import shutil

import numpy as np
import pytest
from helpers.perturbed import perturb
from helpers.refusals import refusal
from helpers.row_files import data, rows_of, write
from helpers.saved_runs import saved_run

import gpt2_pl
from gpt2_pl.commands import main
from gpt2_pl.datamodules import TextCorpus
from gpt2_pl.surgery import LoRA, PrefixTuning
from gpt2_pl.tasks import LanguageModel, SentimentClassifier

TEXTS = ["a fine film", "the plot is a mess", "so it goes"]


@pytest.fixture(params=[LoRA(rank=2), PrefixTuning(length=3)], ids=["lora", "prefix"])
def exported(request, base, tmp_path):
    """The folders of a run, of its adapter, and of its base."""
    place = shutil.copytree(base, tmp_path / "base")
    file = write(tmp_path / "run/rows.csv", rows_of("a film", "the plot"))
    task = perturb(SentimentClassifier(base=str(place), num_classes=2, surgery=[request.param]))
    rows = data(place, file, val_file=str(file), template="Say: {sentence} So:", labels=["bad", "good"], max_length=32)
    run = saved_run(tmp_path / "run", task, rows)
    main(["export", str(run), "--format", "peft", "--out", str(tmp_path / "adapter")])
    return run, tmp_path / "adapter", place


def test_load_adapter_gives_the_probabilities_of_its_run(exported, tmp_path):
    run, adapter, _ = exported
    model, expected = gpt2_pl.load(adapter), gpt2_pl.load(run).predict_proba(TEXTS)
    assert np.ptp(expected[:, 0]) > 1e-3
    np.testing.assert_allclose(model.predict_proba(TEXTS), expected, atol=2e-5)
    assert model.labels == ["bad", "good"]
    out = tmp_path / "out.jsonl"
    main(["classify", str(adapter), "--text", TEXTS[0], "--out", str(out)])
    assert json.loads(out.read_text())["p(good)"] == pytest.approx(expected[0, 1], abs=2e-5)


def test_load_adapter_of_a_moved_base_asks_for_it(exported, tmp_path):
    _, adapter, base = exported
    expected = gpt2_pl.load(adapter).predict_proba(TEXTS)
    moved = base.rename(tmp_path / "moved")
    error = str(refusal(gpt2_pl.load, adapter))
    assert "give its new place (base, --base)" in error
    assert "adapter_config.json" in error
    np.testing.assert_array_equal(gpt2_pl.load(adapter, base=str(moved)).predict_proba(TEXTS), expected)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    assert "names no base" in str(refusal(gpt2_pl.load, adapter))


def test_load_adapter_of_peft_alone_has_numbered_classes_and_the_bases_tokenizer(exported):
    run, adapter, _ = exported
    for name in ("task.json", "tokenizer.json"):
        (adapter / name).unlink()
    model, expected = gpt2_pl.load(adapter), gpt2_pl.load(run).predict_proba(TEXTS)
    assert model.labels == ["LABEL_0", "LABEL_1"]
    np.testing.assert_allclose(model.predict_proba([f"Say: {text} So:" for text in TEXTS]), expected, atol=2e-5)


def test_load_adapter_of_a_language_model_continues_as_its_run(base, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/text.txt").write_text("the film was fine " * 50)
    corpus = TextCorpus(val_file=str(tmp_path / "run/text.txt"), tokenizer=str(base), max_length=16)
    run = saved_run(tmp_path / "run", perturb(LanguageModel(base=str(base), surgery=[LoRA(rank=2)])), corpus)
    main(["export", str(run), "--format", "peft", "--out", str(tmp_path / "adapter")])
    texts = [gpt2_pl.load(folder).generate(["the film"], max_new_tokens=8, temperature=0.0)
             for folder in (run, tmp_path / "adapter")]  # fmt: skip
    assert texts[0] == texts[1]
