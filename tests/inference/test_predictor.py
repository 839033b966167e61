"""gpt2_pl.load: predictions for texts against single forward passes, transformers, and each other."""

import json

import numpy as np
import pytest
import torch
from conftest import WORDS
from helpers.perturbed import perturb
from helpers.refusals import refusal
from helpers.saved_runs import saved_run
from helpers.trainers import trainer
from transformers import AutoModelForSequenceClassification, GPT2LMHeadModel

import gpt2_pl
from gpt2_pl.commands import main
from gpt2_pl.datamodules import IMDB, QuoraPairs, Sonnets, SourceTargetPairs, TextCorpus, TextRegression
from gpt2_pl.errors import InputError
from gpt2_pl.surgery import LoRA, PrefixTuning, PromptTuning
from gpt2_pl.tasks import (
    DataToText,
    LanguageModel,
    ParaphraseDetector,
    PoemGenerator,
    SentimentClassifier,
    TextRegressor,
)
from gpt2_pl.text.poems import split_lines
from gpt2_pl.text.tokenizer import load_tokenizer

TEXTS = ["A fine film", "the plot is a mess", "so long " * 60, "It's bad, isn't it?"]
PAIRS = [("how do I fix a clock", "how can I repair a clock"), ("a", "the film")]


@pytest.fixture(scope="module")
def reviews(base, files, tmp_path_factory):
    """A classifier with an adapter whose texts are normalized."""
    data = IMDB(val_file=str(files["val"]), tokenizer=str(base), max_length=40, template="Say: {sentence} So:",
                normalize=["lowercase", "space_punctuation"], quoting=False)  # fmt: skip
    task = perturb(SentimentClassifier(base=str(base), num_classes=2, surgery=[LoRA(rank=2)]))
    return saved_run(tmp_path_factory.mktemp("reviews"), task, data)


def test_checkpoint_of_normalized_texts_is_refused_for_data_without(reviews, base, files):
    data = IMDB(val_file=str(files["val"]), tokenizer=str(base), max_length=40, template="Say: {sentence} So:")
    task = SentimentClassifier(base=str(base), num_classes=2, surgery=[LoRA(rank=2)])
    with pytest.raises(InputError, match=r"data\.normalize must be"):
        trainer().validate(task, data, ckpt_path=str(reviews / "checkpoints/best.ckpt"), verbose=False)


def probabilities(model, tokenizer, texts):
    """Probabilities by transformers, one text at a time."""
    ids = [torch.tensor([tokenizer.encode(text).ids]) for text in texts]
    with torch.no_grad():
        return torch.cat([model(one).logits.softmax(-1) for one in ids]).numpy()


def test_predict_proba_of_run_and_export_equals_transformers(reviews, tmp_path):
    main(["export", str(reviews), "--format", "hf", "--out", str(tmp_path / "hf")])
    texts = [text for text in TEXTS if len(text) < 100]
    shown = ["a fine film", "the plot is a mess", "it 's bad , isn 't it ?"]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    tokenizer = load_tokenizer(tmp_path / "hf")
    expected = probabilities(theirs, tokenizer, [f"Say: {text} So:" for text in shown])
    assert np.ptp(expected[:, 0]) > 1e-3
    for folder in (reviews, tmp_path / "hf"):
        model = gpt2_pl.load(folder)
        assert model.prompt.quoting is False
        np.testing.assert_allclose(model.predict_proba(texts), expected, atol=2e-5)
        assert model.predict(texts, batch_size=2) == [model.labels[i] for i in expected.argmax(1)]
        np.testing.assert_allclose(model.predict_proba(TEXTS)[[0, 1, 3]], expected, atol=2e-5)  # one is truncated
    assert len(gpt2_pl.load(reviews).predict([])) == 0


@pytest.mark.parametrize("kind", ["threshold", "verbalizer", "prefix", "prompt"])
def test_predict_pairs_equals_single_forward_passes(kind, base, pair_files, tmp_path):
    settings = {
        "threshold": {"threshold": 0.37},
        "verbalizer": {"head": "verbalizer", "label_words": [" no", " yes"]},
        "prefix": {"surgery": [PrefixTuning(length=3)]},
        "prompt": {"surgery": [PromptTuning(length=3)]},
    }[kind]
    data = QuoraPairs(val_file=str(pair_files["val"]), tokenizer=str(base), template=WORDS, max_length=55)
    task = ParaphraseDetector(base=str(base), **settings)
    run = saved_run(tmp_path, task if kind == "verbalizer" else perturb(task), data)
    model, tokenizer, expected = gpt2_pl.load(run), data.tokenizer, []
    for first, second in PAIRS:
        ids = torch.tensor([tokenizer.encode(WORDS.format(sentence1=first, sentence2=second)).ids])
        with torch.no_grad():
            logits = task.eval()({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]
        expected.append(logits.softmax(-1).squeeze(0).numpy())
    columns = ("sentence1", "sentence2"), ("#1 String", "question2")
    named = [[dict(zip(names, pair, strict=True)) for pair in PAIRS] for names in columns]
    given = [PAIRS, [list(pair) for pair in PAIRS], *named]
    for texts in given:
        np.testing.assert_allclose(model.predict_proba(texts), expected, atol=2e-6)
    bound = 0.37 if kind == "threshold" else 0.5
    names = ["duplicate" if p[1] >= bound else "not_duplicate" for p in expected]
    assert model.predict(PAIRS) == names


def test_predict_numbers_equals_export(base, files, tmp_path):
    data = TextRegression(val_file=str(files["val"]), label_column="sentiment", tokenizer=str(base), max_length=60)
    run = saved_run(tmp_path / "run", perturb(TextRegressor(base=str(base), train_base=True)), data)
    main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "hf")])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    texts = ["a fine film", "bad"]
    with torch.no_grad():
        expected = [theirs(torch.tensor([data.tokenizer.encode(text).ids])).logits.item() for text in texts]
    for folder in (run, tmp_path / "hf"):
        model = gpt2_pl.load(folder)
        assert model.predict(texts) == pytest.approx(expected, abs=2e-5)
        assert "predict_proba" in str(refusal(model.predict_proba, texts))


def test_generate_of_pretrained_folder_equals_greedy_transformers(base):
    model, tokenizer = gpt2_pl.load(base), load_tokenizer(base)
    theirs = GPT2LMHeadModel.from_pretrained(base).eval()
    prompts = ["a fine film", "the"]
    found = model.generate(prompts, temperature=0, max_new_tokens=7)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        expected = theirs.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=0)[0].tolist()
        end = tokenizer.token_to_id("<|endoftext|>")
        assert text == tokenizer.decode(expected[: [*expected, end].index(end)], skip_special_tokens=False)
    assert model.generate(prompts, seed=1) == model.generate(prompts, seed=1, batch_size=1)
    assert model.generate(prompts, seed=1) != model.generate(prompts, seed=2)
    pieces = []
    (text,) = model.generate(["the"], seed=1, max_new_tokens=9, on_text=pieces.append)
    assert len(pieces) > 1
    assert "the" + "".join(pieces) == text.rstrip("\ufffd")  # the end may be a part of a character


def test_generate_poems_completes_the_first_lines(base, poem_files, tmp_path):
    data = Sonnets(val_file=str(poem_files["val"]), tokenizer=str(base), max_length=60)
    task = perturb(PoemGenerator(base=str(base), temperature=1.2, top_p=0.95, max_new_tokens=20))
    model = gpt2_pl.load(saved_run(tmp_path, task, data))
    (poem,) = model.generate(["  the first line\n\n  and the second\n"], seed=4)
    assert split_lines(poem)[:2] == ["the first line", "and the second"]
    assert poem.endswith("\n")
    (plain,) = model.generate(["the first line"], temperature=0, as_is=True, max_new_tokens=5)
    assert plain.startswith("the first line")
    sampling = {"temperature": 1.2, "top_p": 0.95, "top_k": None}
    assert model.decoding(None, {"top_p": 0.8}) == (20, sampling | {"top_p": 0.8})
    assert model.decoding(3, {"top_k": 5}) == (3, sampling | {"top_k": 5})
    assert model.decoding(3, {"num_beams": 2}) == (3, {"num_beams": 2})
    with pytest.raises(InputError, match="does not classify; use gpt2-pl generate"):
        model.predict(["a"])


@pytest.mark.parametrize("kind", ["poems", "targets"])
def test_generate_of_exported_folder_decodes_as_the_task_of_the_run(kind, base, poem_files, tmp_path):
    if kind == "poems":
        data = Sonnets(val_file=str(poem_files["val"]), tokenizer=str(base), max_length=60)
        settings = {"temperature": 1.2, "top_p": None, "line_length_bias": False, "max_new_tokens": 20}
        task = PoemGenerator(base=str(base), **settings)
    else:
        (tmp_path / "rows.jsonl").write_text('{"source": "a film", "target": "the film"}\n')
        data = SourceTargetPairs(val_file=str(tmp_path / "rows.jsonl"), tokenizer=str(base), max_length=50)
        task = DataToText(base=str(base), num_beams=3, length_penalty=0.5, max_new_tokens=8)
    run = saved_run(tmp_path / "run", perturb(task), data)
    main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "hf")])
    model, exported = gpt2_pl.load(run), gpt2_pl.load(tmp_path / "hf")
    assert exported.decoding(None, {}) == model.decoding(None, {})
    assert exported.generate(["a film"], seed=2) == model.generate(["a film"], seed=2)


def test_generate_of_sources_fills_the_template_and_uses_the_beams_of_the_task(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"source": f"a {w}", "target": f"the {w}"}) + "\n" for w in ("film", "plot")))
    data = SourceTargetPairs(val_file=str(rows), tokenizer=str(base), max_length=50)
    task = perturb(DataToText(base=str(base), num_beams=3, length_penalty=0.5, max_new_tokens=8))
    model = gpt2_pl.load(saved_run(tmp_path, task, data))
    sources = ["a film", "a much longer plot"]
    ids = [model.tokenizer.encode(f"{source}\n").ids for source in sources]
    new = task.eval().continue_prompts(model.tokenizer, ids, [0, 0], 8, num_beams=3, length_penalty=0.5)
    expected = [model.tokenizer.decode(row).strip() for row in new]
    assert model.generate(sources) == model.generate([{"source": text} for text in sources]) == expected
    assert model.decoding(None, {"top_p": 0.8})[1] == {"temperature": 1.0, "top_k": None, "top_p": 0.8}
    whole = model.generate([f"{source}\n" for source in sources], as_is=True)
    assert [text.removeprefix(f"{source}\n").strip() for text, source in zip(whole, sources, strict=True)] == expected


def test_predictor_invalid_texts_are_refused(reviews, base):
    model = gpt2_pl.load(reviews)
    for texts, words in (
        ("a film", "a list"),
        ([("a", "b")], "text 1 must be 1 text, sentence"),
        ([" \n"], "text 1 must be a non-empty string"),
        (["a", 3], "text 2"),
        ([{"comment": "a"}], "text 1"),
        (["a \udce9"], "UTF-8"),
    ):
        assert words in str(refusal(model.predict, texts)), texts
    assert "batch_size" in str(refusal(lambda: model.predict(["a"], batch_size=0)))
    assert "generates no texts" in str(refusal(model.generate, ["a"]))
    pretrained = gpt2_pl.load(base)
    assert "a list" in str(refusal(pretrained.generate, "abc"))
    cases = (([("a", "b")], "prompt 1"), ([{"text": "a"}], "prompt 1"), (["so long " * 90], "at most 63"))
    for prompts, words in cases:
        assert words in str(refusal(pretrained.generate, prompts)), prompts
    for key, settings in (
        ("top_p", {"top_p": 2.0}),
        ("length_penalty", {"length_penalty": 2.0}),
        ("temperature", {"num_beams": 2, "temperature": 0.5}),
        ("seed", {"seed": 1.5}),
    ):
        assert refusal(lambda settings: pretrained.generate(["a"], **settings), settings).key == key


def test_load_of_changed_head_or_class_names_is_refused(reviews, tmp_path):
    main(["export", str(reviews), "--format", "hf", "--out", str(tmp_path / "hf")])
    file = tmp_path / "hf/config.json"
    config = json.loads(file.read_text())
    for change, words in (
        ({"id2label": {"0": "a", "1": "a"}}, "id2label"),
        ({"id2label": {"0": "a"}}, "id2label"),
        ({"pooling": "sum"}, "pooling"),
        ({"pooling": "concat"}, "score.weight"),
        ({"prompt": {"template": "no field", "columns": {"a": ["a"]}}}, "template"),
        ({"prompt": {"template": "{a}", "normalize": ["upper"], "columns": {"a": ["a"]}}}, "normalize"),
        ({"prompt": {"template": "{a}", "max_length": 65, "columns": {"a": ["a"]}}}, "max_length of 1 to 64"),
        ({"decision_threshold": 1.5}, "decision_threshold"),
    ):
        file.write_text(json.dumps(config | change))
        assert words in str(refusal(gpt2_pl.load, tmp_path / "hf")), change
    file.write_text(json.dumps(config | {"prompt": {"template": "{title}: {body}"}}))
    model = gpt2_pl.load(tmp_path / "hf")
    assert model.predict([{"title": "a", "body": "film"}]) == model.predict([("a", "film")])
    assert "base" in str(refusal(lambda: gpt2_pl.load(tmp_path / "hf", base="gpt2")))
    assert "there is no folder" in str(refusal(gpt2_pl.load, tmp_path / "nowhere"))
    assert "there is no folder ~nouser" in str(refusal(gpt2_pl.load, "~nouser/x"))
    assert "bf16-mixed" in str(refusal(lambda: gpt2_pl.load(reviews, precision="bf16")))


def test_load_of_language_model_run_continues_texts(base, files, tmp_path):
    data = TextCorpus(val_file=str(files["val"]), column="sentence", tokenizer=str(base), max_length=32)
    run = saved_run(tmp_path, LanguageModel(base=str(base), surgery=[PromptTuning(length=2)]), data)
    (text,) = gpt2_pl.load(run).generate(["a fine film"], max_new_tokens=5)
    assert text.startswith("a fine film")
