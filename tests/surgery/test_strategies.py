"""Strategies: composition of configurations, checkpoint contents, and exchange with transformers and peft."""

import functools
import json
import math
import pickle
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from conftest import ROOT, flags, metrics, peft_puts_virtual_tokens, weights
from helpers.refusals import refused
from transformers import AutoTokenizer, GPT2ForSequenceClassification, GPT2LMHeadModel

from gpt2_pl.commands import main
from gpt2_pl.datamodules import IMDB
from gpt2_pl.errors import InputError
from gpt2_pl.model import GPT2, GPT2Config
from gpt2_pl.pretrained import weights_sha256
from gpt2_pl.surgery import LoRA, PeftAdapter, PrefixTuning, PromptTuning
from gpt2_pl.surgery import peft_format as exchange
from gpt2_pl.tasks import SentimentClassifier
from gpt2_pl.text.tokenizer import load_tokenizer

CONFIGS = ROOT / "configs"
SURGERIES = {
    "lora": [LoRA(rank=3, targets=["q", "v", "c_fc"])],
    "dora": [LoRA(rank=2, targets=["c_attn", "mlp.c_proj"], use_dora=True)],
    "dora of thirds": [LoRA(rank=2, targets=["q", "v"], use_dora=True)],
    "rslora": [LoRA(rank=4, use_rslora=True, targets=["c_proj"], layers=0), LoRA(rank=2, targets=["c_fc"])],
    "embedding": [LoRA(rank=3, targets=["wte", "c_fc"], alpha=2)],
    "prefix": [PrefixTuning(4)],
    "network": [PrefixTuning(4, hidden=8)],
    "prompt": [PromptTuning(5)],
}


def arguments(base, data_flags, strategies):
    """Return arguments that fit CFIMDB's format for a short epoch with the given strategies."""
    files = [flag for name in strategies for flag in ("--config", CONFIGS / f"strategy/{name}.yaml")]
    return ["fit", "--config", CONFIGS / "task/imdb.yaml", *files, "--model.base", base, *data_flags,
            "--data.max_length=32", "--trainer.max_epochs=1", "--trainer.limit_train_batches=4",
            "--trainer.precision=32-true"]  # fmt: skip


@pytest.fixture
def fit(run, base, data_flags):
    """Fit with the given strategies."""
    return lambda *strategies, extra=(): run(*arguments(base, data_flags, strategies), *extra)


@pytest.fixture(scope="module")
def done(fitted, base, files):
    """Return the run of a strategy, which the tests of this module share and do not change."""
    return functools.cache(lambda strategy: fitted(*arguments(base, flags(files), [strategy])))


def export(*args):
    main(["export", *map(str, args)])


def used(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_fit_ulmfit_and_lora_configs_combine(fit):
    folder = fit("ulmfit", "lora")
    config = used(folder)
    assert [entry["class_path"].split(".")[-1] for entry in config["trainer"]["callbacks"]] == [
        "GradualUnfreezing", "DiscriminativeLR",
    ]  # fmt: skip
    assert [entry["class_path"] for entry in config["model"]["init_args"]["surgery"]] == ["gpt2_pl.surgery.LoRA"]
    assert config["model"]["init_args"]["pooling"] == "concat"
    layers = {layer["layer"]: layer for layer in metrics(folder)["parameters"]["layers"]}
    assert layers["block.0"]["trainable"] == 0  # one epoch: the first stage
    assert layers["head"]["trainable"] == layers["head"]["parameters"]


def test_fit_surgery_of_two_configs_is_applied_in_order(fit):
    config = used(fit("prefix_tuning", "lora"))["model"]["init_args"]["surgery"]
    assert [entry["class_path"].split(".")[-1] for entry in config] == ["PrefixTuning", "LoRA"]


CONTRADICTORY = {
    ("lora", "dora"): ["h.0.attn.c_attn", "LoRA"],
    ("full", "lora"): ["train_base", "LoRA", "h.0.attn.c_attn.weight"],
    ("lora", "full"): ["train_base", "LoRA"],
    ("prompt_tuning", "prompt_tuning"): ["PromptTuning"],
    ("prefix_tuning", "prefix_tuning"): ["PrefixTuning"],
    ("ulmfit", "llrd"): ["DiscriminativeLR"],
    ("ulmfit", "linear_probe"): ["GradualUnfreezing", "train_base"],
    ("linear_probe", "llrd"): ["DiscriminativeLR", "train_base"],
    ("prefix_tuning", "llrd"): ["DiscriminativeLR"],
    ("full", "linear_probe"): ["full.yaml", "linear_probe.yaml", "train_base"],
    ("linear_probe", "full"): ["full.yaml", "linear_probe.yaml", "train_base"],
    ("lora", "linear_probe"): ["lora.yaml", "linear_probe.yaml"],
    ("linear_probe", "prefix_tuning"): ["prefix_tuning.yaml", "linear_probe.yaml"],
}


def test_fit_contradictory_strategies_are_refused_before_a_run_starts(fit, capsys, tmp_path, subtests):
    for strategies, words in CONTRADICTORY.items():
        with subtests.test("+".join(strategies)):
            line = refused(fit, capsys, *strategies)
            assert all(word in line for word in words), line
            assert not list(tmp_path.glob("lightning_logs/*/*"))


def test_fit_surgery_that_does_not_fit_the_model_is_refused(fit, capsys, tmp_path):
    for extra, value in (
        ("--model.surgery+={class_path: gpt2_pl.surgery.PromptTuning, init_args: {length: 64}}", "64"),
        ("--model.surgery+={class_path: gpt2_pl.surgery.LoRA, init_args: {targets: [query]}}", "query"),
    ):
        assert value in refused(lambda extra=extra: fit("full", extra=["--model.train_base=null", extra]), capsys)
    assert not list(tmp_path.glob("lightning_logs/*/*"))


@pytest.mark.parametrize("strategy", ["lora", pytest.param("prefix_tuning", marks=pytest.mark.slow), "linear_probe"])
def test_checkpoint_frozen_base_is_left_out_and_verified_by_digest(
    strategy, done, run, base, capsys, tmp_path, data_flags
):
    folder = done(strategy)
    account, checkpoint = metrics(folder), folder / "checkpoints/best.ckpt"
    added = {name for name in weights(checkpoint) if name.startswith("gpt2.")}
    assert not {name.removeprefix("gpt2.") for name in added} & GPT2.from_pretrained(base).base_names
    assert (strategy == "linear_probe") == (not added)
    assert account["checkpoint_bytes"] == checkpoint.stat().st_size
    trained = sum(tensor.numel() for name, tensor in weights(checkpoint).items() if "metrics" not in name)
    assert account["parameters"]["trainable"] == trained

    flags = ["--config", CONFIGS / "task/imdb.yaml", "--config", CONFIGS / f"strategy/{strategy}.yaml",
             "--data.max_length=32", "--trainer.precision=32-true", *data_flags]  # fmt: skip
    again = run("test", *flags, "--model.base", base, "--ckpt_path", checkpoint)
    for score in ("test/loss", "test/accuracy"):
        assert metrics(again)["scores"][score] == account["scores"][score]

    task = SentimentClassifier.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()
    assert weights_sha256(GPT2.from_pretrained(base)) == account["base"]["digest"] == task.base_digest
    data = IMDB(test_file=data_flags[-1].partition("=")[2], tokenizer=str(base), max_length=32)
    data.setup("test")
    losses = []
    with torch.no_grad():
        for batch in data.test_dataloader():
            losses.append(torch.nn.functional.cross_entropy(task(batch)[0], batch["labels"], reduction="none"))
    assert torch.cat(losses).mean().item() == pytest.approx(account["scores"]["test/loss"], abs=1e-5)

    other = tmp_path / "other"
    torch.manual_seed(8)
    GPT2(GPT2.from_pretrained(base).config).save_pretrained(other)
    shutil.copy(base / "tokenizer.json", other)
    line = refused(run, capsys, "test", *flags, "--model.base", other, "--ckpt_path", checkpoint)
    assert str(base) in line
    assert str(other) in line
    with pytest.raises(InputError, match=re.escape(str(other))):
        SentimentClassifier.load_from_checkpoint(checkpoint, weights_only=True, base=str(other))
    with pytest.raises(InputError, match="train_base"):
        SentimentClassifier.load_from_checkpoint(checkpoint, weights_only=True, surgery=None, train_base=True)


def test_checkpoint_trained_base_contains_all_weights(done, base):
    checkpoint = done("full") / "checkpoints/best.ckpt"
    task = SentimentClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    assert {f"gpt2.{name}" for name in task.backbone.base_names} <= weights(checkpoint).keys()
    assert not torch.equal(task.backbone.wte.weight, GPT2.from_pretrained(base).wte.weight)


def test_checkpoint_surgery_class_outside_the_library_is_refused(done, capsys, run, tmp_path):
    checkpoint = done("lora") / "checkpoints/best.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["surgery"] = [{"class_path": "os.system", "init_args": {"command": "touch evil"}}]
    torch.save(content, tmp_path / "evil.ckpt")
    line = refused(run, capsys, "test", "--data=gpt2_pl.datamodules.IMDB", "--ckpt_path", tmp_path / "evil.ckpt")
    assert "os.system" in line
    with pytest.raises(InputError, match=r"os\.system"):
        SentimentClassifier.load_from_checkpoint(tmp_path / "evil.ckpt", weights_only=True)
    assert not (tmp_path / "evil").exists()


# Exchange

IDS = torch.randint(400, (4, 9), generator=torch.Generator().manual_seed(2))


def trained(base, surgery, **options):
    """Return a classifier whose adapters and head have moved away from their initial values."""
    torch.manual_seed(1)
    task = SentimentClassifier(base=str(base), num_classes=3, surgery=surgery, dropout=0.0, **options)
    task.configure_model()
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "head" in name else 0.1))
    return task.eval()


def logits(task, ids):
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "row": torch.arange(len(ids))}
    with torch.no_grad():
        return task(batch)[0]


def test_peft_format_classifier_round_trip_equals_peft(base, tmp_path, subtests):
    for name, surgery in SURGERIES.items():
        with subtests.test(name):
            if name in ("prefix", "network"):
                peft_puts_virtual_tokens()
            check_classifier_round_trip(surgery, base, tmp_path / name)


def check_classifier_round_trip(surgery, base, tmp_path):
    task = trained(base, surgery)
    ours = logits(task, IDS)
    assert task.head.linear.bias.abs().max() > 0.05
    exchange.save(task.backbone, tmp_path / "peft", str(base), task.head)
    plain = GPT2ForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    for n in range(len(IDS)):  # alone: beside virtual tokens, theirs mistakes the last token of a padded row
        with torch.no_grad():
            expected = theirs(IDS[n : n + 1], attention_mask=torch.ones(1, 9, dtype=torch.long)).logits
        torch.testing.assert_close(ours[n : n + 1], expected, atol=1e-5, rtol=1e-5)

    back = SentimentClassifier(base=str(base), num_classes=3, surgery=[PeftAdapter(str(tmp_path / "peft"))])
    back.configure_model()
    torch.testing.assert_close(logits(back.eval(), IDS), ours, atol=1e-5, rtol=1e-5)
    assert {p.requires_grad for n, p in back.backbone.named_parameters() if n in back.backbone.base_names} == {False}
    assert any(p.requires_grad for p in back.backbone.parameters())


def test_peft_format_language_model_round_trip_equals_peft(base, tmp_path, subtests):
    for name, surgery in SURGERIES.items():
        with subtests.test(name):
            backbone = trained(base, surgery).backbone
            if name == "embedding":  # theirs does not adapt the head that is tied to it
                with pytest.raises(InputError, match="wte"):
                    exchange.save(backbone, tmp_path / name, str(base))
            else:
                check_language_model_round_trip(backbone, base, tmp_path / name)


def check_language_model_round_trip(backbone, base, tmp_path):
    exchange.save(backbone, tmp_path / "peft", str(base))
    theirs = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), tmp_path / "peft").eval()
    with torch.no_grad():
        ours = backbone.logits(backbone(IDS))
        torch.testing.assert_close(ours, theirs(IDS).logits[:, -9:], atol=1e-5, rtol=1e-5)
    back = PeftAdapter(str(tmp_path / "peft")).apply(GPT2.from_pretrained(base).eval())
    torch.testing.assert_close(back.logits(back(IDS)), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank_of", ["plain", "patterns"])
def test_peft_adapter_saved_by_peft_gives_equal_logits(rank_of, base, tmp_path):
    patterns = {"rank_pattern": {"c_fc": 2}, "alpha_pattern": {"c_fc": 5}} if rank_of == "patterns" else {}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_rslora=True,
                             task_type="SEQ_CLS", init_lora_weights=False, **patterns)  # fmt: skip
    torch.manual_seed(0)
    plain = GPT2ForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
    theirs = peft.get_peft_model(plain, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    task = SentimentClassifier(base=str(base), num_classes=3, surgery=[PeftAdapter(str(tmp_path / "theirs"))])
    task.configure_model()
    with torch.no_grad():
        expected = theirs(IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(logits(task.eval(), IDS), expected, atol=1e-5, rtol=1e-5)


class Evil:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_peft_adapter_unsupported_or_corrupt_is_refused(base, tmp_path, subtests):
    folder, touched = tmp_path / "adapter", tmp_path / "touched"
    file, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    exchange.save(LoRA().apply(GPT2.from_pretrained(base)), folder, str(base))
    config, content = file.read_bytes(), tensors.read_bytes()
    change = lambda **changes: json.dumps(json.loads(config) | changes).encode()  # noqa: E731
    for name, settings, stored, words in (
        ("another type", change(peft_type="VERA"), content, "'VERA'"),
        ("biases", change(bias="all"), content, "'all'"),
        ("no magnitudes", change(use_dora=True), content, "c_attn"),
        ("short tensors", config, b"short", str(folder)),
        ("pickled tensors", config, pickle.dumps({"x": Evil(touched)}), str(folder)),
        ("pickled settings", pickle.dumps(json.loads(config) | {"x": Evil(touched)}), content, str(folder)),
    ):
        with subtests.test(name):
            file.write_bytes(settings), tensors.write_bytes(stored)
            with pytest.raises(InputError, match=re.escape(words)):
                PeftAdapter(str(folder)).apply(GPT2.from_pretrained(base))
            assert not touched.exists()


def test_peft_adapter_of_another_model_shape_is_refused(base, tmp_path):
    other = GPT2(GPT2Config(vocab_size=400, n_positions=64, n_embd=48, n_layer=3, n_head=2))
    exchange.save(LoRA(layers=0).apply(other), tmp_path / "wide", None)
    with pytest.raises(InputError, match=r"transformer\.h\.0\.attn\.c_attn"):
        PeftAdapter(str(tmp_path / "wide")).apply(GPT2.from_pretrained(base))
    other = GPT2(GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=3, n_head=2))
    exchange.save(LoRA(layers=2).apply(other), tmp_path / "deep", None)
    with pytest.raises(InputError, match=r"h\.2\.attn\.c_attn"):
        PeftAdapter(str(tmp_path / "deep")).apply(GPT2.from_pretrained(base))


@pytest.mark.parametrize("strategy", ["full", "lora", "dora"])
def test_export_hf_run_loads_in_transformers_with_equal_logits(strategy, done, tmp_path):
    folder, out = done(strategy), tmp_path / "hf"
    export(folder, "--format=hf", "--out", out)
    theirs = GPT2ForSequenceClassification.from_pretrained(out).eval()
    task = SentimentClassifier.load_from_checkpoint(folder / "checkpoints/best.ckpt", weights_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = ["Review: the plot is not awful at all Sentiment:", "Review: dull Sentiment:"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids = [load_tokenizer(out).encode(text).ids for text in texts]
    with torch.no_grad():
        expected = theirs(**batch).logits
    for row, tokens in enumerate(ids):
        assert tokens == tokenizer.encode(texts[row])
        mine = logits(task, torch.tensor([tokens]))
        torch.testing.assert_close(mine, expected[row : row + 1], atol=1e-5, rtol=1e-5)
    assert theirs.config.id2label == {0: "negative", 1: "positive"}


def test_export_peft_run_loads_in_peft_with_equal_logits(done, base, tmp_path):
    folder, out = done("prompt_tuning"), tmp_path / "peft"
    export(folder, "--format=peft", "--out", out)
    plain = GPT2ForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(plain, out).eval()
    task = SentimentClassifier.load_from_checkpoint(folder / "checkpoints/best.ckpt", weights_only=True).eval()
    with torch.no_grad():
        expected = theirs(IDS[:1], attention_mask=torch.ones(1, 9, dtype=torch.long)).logits
    torch.testing.assert_close(logits(task, IDS[:1]), expected, atol=1e-5, rtol=1e-5)


def test_ulmfit_second_stage_starts_from_exported_language_model(fit, run, base, files, data_flags):
    """The language model is fitted and exported, and classification starts from it."""
    stage1 = run("fit", "--config", CONFIGS / "task/text.yaml", "--config", CONFIGS / "strategy/ulmfit_lm.yaml",
                 "--model.base", base, *data_flags[:2], "--data.column=sentence", "--data.max_length=32",
                 "--trainer.max_epochs=1", "--model.optimizer.init_args.lr=1e-3")  # fmt: skip
    out = stage1.parent / "stage1"
    export(stage1, "--format=hf", "--out", out)
    learned = {name.removeprefix("gpt2."): tensor for name, tensor in weights(stage1 / "checkpoints/best.ckpt").items()}
    start = GPT2.from_pretrained(out)
    assert all(torch.equal(tensor, learned[name]) for name, tensor in start.state_dict().items())
    assert not torch.equal(start.h[1].mlp.c_fc.weight, GPT2.from_pretrained(base).h[1].mlp.c_fc.weight)
    stage2 = fit("ulmfit", extra=["--model.base", out])
    assert metrics(stage2)["base"]["digest"] == weights_sha256(start)
    assert math.isfinite(metrics(stage2)["scores"]["val/loss"])


def test_export_unsupported_combination_is_refused_without_output(done, run, base, capsys, tmp_path, subtests):
    out = tmp_path / "out"
    runs = {strategy: done(strategy) for strategy in ("prefix_tuning", "full", "ulmfit")}
    capsys.readouterr()
    for strategy, args, words in (
        ("prefix_tuning", ["--format=hf"], ["--format peft"]),
        ("full", ["--format=peft"], ["train_base", "--format hf"]),
        ("full", ["--format=hf", "--ckpt_path=/nowhere.ckpt"], ["/nowhere.ckpt"]),
        ("full", ["--format=hf", f"--base={base}"], ["--base"]),  # the checkpoint holds all weights
    ):
        with subtests.test(strategy, args=args):
            line = refused(run, capsys, "export", runs[strategy], "--out", out, *args)
            assert all(word in line for word in words), line
            assert not out.exists()
            assert not list(tmp_path.glob(".*part"))
    export(runs["ulmfit"], "--out", out, "--format=hf", "--backbone")
    GPT2LMHeadModel.from_pretrained(out)
    capsys.readouterr()
    assert str(out) in refused(run, capsys, "export", runs["full"], "--out", out, "--format=hf")


def test_fit_record_and_logs_show_trainable_layers_and_rates(fit, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = fit("lora_plus", "llrd", extra=["--trainer.log_every_n_steps=1"])
    shown = capsys.readouterr().out
    layers = {layer["layer"]: layer for layer in metrics(folder)["parameters"]["layers"]}
    assert layers["block.1"]["peak_rates"] == pytest.approx([1e-4, 16e-4])
    assert layers["block.0"]["peak_rates"] == pytest.approx([0.95e-4, 0.95 * 16e-4])
    assert layers["embeddings"] == {"layer": "embeddings", "parameters": 400 * 32 + 64 * 32, "trainable": 0,
                                    "peak_rates": []}  # fmt: skip
    assert f"{metrics(folder)['parameters']['trainable']:,}" in shown
    assert "frozen" in shown
    assert "MB" in shown
    board = EventAccumulator(str(folder)).Reload()
    count = board.Scalars("trainable_parameters")[-1].value
    assert count == metrics(folder)["parameters"]["trainable"]
    assert "layers/text_summary" in board.Tags()["tensors"]
    assert any("lr_x16" in tag for tag in board.Tags()["scalars"])
