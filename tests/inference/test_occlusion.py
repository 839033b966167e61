"""Words that moved a prediction, against a loop over texts without a word."""

import re

import pytest
from conftest import WORDS
from helpers.perturbed import perturb
from helpers.refusals import refusal
from helpers.saved_runs import saved_run

import gpt2_pl
from gpt2_pl.datamodules import IMDB, QuoraPairs, TextRegression
from gpt2_pl.inference import occlusion
from gpt2_pl.inference.occlusion import occlude, parts
from gpt2_pl.surgery import LoRA
from gpt2_pl.tasks import ParaphraseDetector, SentimentClassifier, TextRegressor

TEXT = "A fine\n film , but  the plot 's a mess !"


@pytest.fixture(scope="module")
def models(base, files, pair_files, tmp_path_factory):
    """A classifier, a detector of pairs and a regressor."""
    folder, settings = tmp_path_factory.mktemp("runs"), {"tokenizer": str(base), "max_length": 60}
    val = str(files["val"])
    reviews = IMDB(val_file=val, template="Say: {sentence} So:", normalize=["lowercase"], **settings)
    numbers = TextRegression(val_file=val, label_column="sentiment", **settings)
    pairs = QuoraPairs(val_file=str(pair_files["val"]), template=WORDS, **settings)
    tasks = {
        "reviews": (SentimentClassifier(base=str(base), num_classes=2, surgery=[LoRA(rank=2)]), reviews),
        "numbers": (TextRegressor(base=str(base)), numbers),
        "pairs": (ParaphraseDetector(base=str(base), threshold=0.37), pairs),
    }
    return {name: gpt2_pl.load(saved_run(folder / name, perturb(task), data)) for name, (task, data) in tasks.items()}


def loop(model, texts):
    """Effects of the words, one forward pass at a time."""
    full, effects = model.predictions([texts])[0], []
    for number, text in enumerate(texts):
        for match in re.finditer(r"\S+\s*", text):
            left = text[: match.start()] + text[match.end() :]
            without = [*texts[:number], left, *texts[number + 1 :]]
            if not left.strip():
                continue
            (other,) = model.predictions([without])
            index = full.class_index
            effects.append(
                full.value - other.value if index is None else full.probabilities[index] - other.probabilities[index]
            )
    return effects


@pytest.mark.parametrize("kind", ["reviews", "numbers", "pairs"])
def test_occlude_equals_a_loop_over_texts_without_a_word(kind, models):
    model = models[kind]
    texts = [TEXT, "how can I fix it"] if kind == "pairs" else [TEXT]
    prediction, effects = occlude(model, texts)
    assert prediction.value == pytest.approx(model.predictions([texts])[0].value)
    fields = dict(zip(model.prompt.fields, texts, strict=True))
    assert [fields[part.field][part.start : part.end] for part in effects] == " ".join(texts).split()
    assert [part.effect for part in effects] == pytest.approx(loop(model, texts), abs=2e-6)
    assert max(abs(part.effect) for part in effects) > 1e-4
    for part in effects[:3]:
        text = fields[part.field]
        left = text[: part.start] + text[part.end :].lstrip()
        (other,) = model.predictions([{**fields, part.field: left}])
        assert part.without.class_index == other.class_index


def test_occlude_text_of_one_word_has_no_effects(models):
    assert occlude(models["reviews"], "film")[1] == []
    assert [part.field for part in occlude(models["pairs"], ["film", "a film"])[1]] == ["sentence2"] * 2


def test_occlude_long_text_leaves_out_neighbouring_words_together(models, monkeypatch):
    model, text = models["reviews"], "a film and so on " * 40
    (row,) = model.prompt.rows([text])
    spans = [(part.start, part.end) for part in occlude(model, text)[1]]
    assert 50 <= len(spans) <= occlusion.MAX_PARTS
    assert next(text[start:end] for start, end in spans) == "a film and so"
    assert " ".join(text[start:end] for start, end in spans) == text.strip()
    monkeypatch.setattr(occlusion, "MAX_TOKENS", 4 * 60)
    assert len(occlude(model, text)[1]) == 4
    assert parts(row, 0) == [("sentence", 0, len(text.strip()))]


def test_occlude_invalid_text_is_refused(models, base):
    model = models["reviews"]
    assert "non-empty" in str(refusal(occlude, model, " "))
    assert "1 text, sentence" in str(refusal(occlude, model, ["a", "b"]))
    assert "does not classify" in str(refusal(occlude, gpt2_pl.load(base), "a film"))
