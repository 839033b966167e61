"""Perplexity of the base's text before and after training, against transformers."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import metrics
from helpers.configs import CONFIGS
from helpers.refusals import names, refused
from transformers import GPT2LMHeadModel

from gpt2_pl.callbacks import Forgetting
from gpt2_pl.datamodules.synthetic import toy_reviews
from gpt2_pl.errors import InputError
from gpt2_pl.text.tokenizer import load_tokenizer


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(row["sentence"] for row in toy_reviews(30, 9)), encoding="utf-8")
    return file


def perplexity(model, tokens, context):
    """Return the perplexity of a model of transformers, context by context and token by token."""
    total, N = 0.0, len(tokens) - 1
    with torch.no_grad():
        for start in range(0, N, context):
            ids = torch.tensor([tokens[start : min(start + context, N)]])
            logits = model(ids).logits[0]
            for t, row in enumerate(logits):
                total += F.cross_entropy(row, torch.tensor(tokens[start + t + 1])).item()
    return math.exp(total / N)


def arguments(base, flags, text, *more):
    return ["fit", f"--config={CONFIGS}/task/imdb.yaml", f"--model.base={base}", *flags, "--data.max_length=40",
            "--trainer.callbacks+=gpt2_pl.callbacks.Forgetting", f"--trainer.callbacks.file={text}",
            "--trainer.precision=32-true", *more]  # fmt: skip


def test_forgetting_perplexities_of_a_classifier_equal_transformers(run, base, data_flags, text, tmp_path):
    settings = ["--config=strategy/lora", "--trainer.max_epochs=2", "--model.optimizer.init_args.lr=0.02",
                "--trainer.callbacks.max_tokens=333"]  # fmt: skip
    folder = run(*arguments(base, data_flags, text, *settings))
    scores = metrics(folder)["scores"]
    tokens = load_tokenizer(base).encode(text.read_text(encoding="utf-8")).ids[:333]
    assert len(tokens) == 333
    before = perplexity(GPT2LMHeadModel.from_pretrained(base).eval(), tokens, 64)
    assert scores["val/initial_base_perplexity"] == pytest.approx(before, rel=1e-4)
    from gpt2_pl.commands import main

    main(["export", str(folder), "--format=hf", "--backbone", f"--out={tmp_path / 'hf'}"])
    after = perplexity(GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval(), tokens, 64)
    assert scores["val/base_perplexity"] == pytest.approx(after, rel=1e-4)
    assert abs(after - before) > 1e-3 * before


def test_forgetting_is_in_the_tables_of_compare_and_changes_no_weight(run, base, data_flags, text, tmp_path):
    flags = ["--trainer.max_epochs=1", "--config=strategy/prefix_tuning"]
    one = run(*arguments(base, data_flags, text, *flags, "--name=one", "--trainer.callbacks.batch_size=3"))
    other = run(*arguments(base, data_flags, text, *flags, "--name=other", "--seed_everything=2"))
    plain = run("fit", f"--config={CONFIGS}/task/imdb.yaml", f"--model.base={base}", *data_flags, "--name=plain",
                "--data.max_length=40", "--trainer.precision=32-true", *flags)  # fmt: skip
    first, last = metrics(one), metrics(plain)
    assert first["metrics"]["base_perplexity"] == {"higher_is_better": False, "percent": False, "shown": False}
    assert {name: first["scores"][name] for name in last["scores"]} == last["scores"]
    run("compare", one, other, "--out", tmp_path / "report", "--baseline=prefix_tuning")
    assert "base perplexity" in (tmp_path / "report/report.md").read_text()


def test_forgetting_of_a_language_model_that_is_not_trained_equals_transformers(run, base, text):
    files = [f"--data.{split}_file={text}" for split in ("train", "val")]
    folder = run("fit", "--config=task/text", f"--model.base={base}", *files, "--trainer.max_epochs=0",
                 "--trainer.callbacks+=gpt2_pl.callbacks.Forgetting", f"--trainer.callbacks.file={text}",
                 "--trainer.precision=32-true")  # fmt: skip
    tokens = load_tokenizer(base).encode(text.read_text(encoding="utf-8")).ids
    scores = metrics(folder)["scores"]
    expected = perplexity(GPT2LMHeadModel.from_pretrained(base).eval(), tokens, 64)
    assert scores["val/base_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert "val/initial_base_perplexity" not in scores


def test_forgetting_file_or_number_out_of_range_is_refused(run, base, data_flags, text, capsys, tmp_path):
    missing = arguments(base, data_flags, tmp_path / "none.txt")
    assert names(refused(run, capsys, *missing), "trainer.callbacks.file")
    assert not (tmp_path / "lightning_logs").exists()
    for options in ({"max_tokens": 1}, {"batch_size": 0}):
        with pytest.raises(InputError, match="must be at least"):
            Forgetting(text, **options)
    text.write_bytes(b"a")
    assert names(refused(run, capsys, *arguments(base, data_flags, text)), "trainer.callbacks.file")
    text.write_bytes(b"\xff\xfe broken")
    assert "UTF-8" in refused(run, capsys, *arguments(base, data_flags, text))
