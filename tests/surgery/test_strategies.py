"""Strategies: composition of configurations, checkpoint contents, and exchange with transformers and peft."""

import json
import math
import shutil

import peft
import pytest
import torch
import yaml
from conftest import ROOT, metrics, peft_puts_virtual_tokens, weights
from helpers.refusals import refused
from transformers import AutoTokenizer, GPT2ForSequenceClassification, GPT2LMHeadModel

from gpt2_pl.commands import main
from gpt2_pl.datamodules import IMDB
from gpt2_pl.errors import InputError
from gpt2_pl.model import GPT2
from gpt2_pl.pretrained import weights_sha256
from gpt2_pl.surgery import LoRA, PeftAdapter, PrefixTuning, PromptTuning
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


@pytest.fixture
def fit(run, base, data_flags):
    """Fit CFIMDB's format for an epoch with the given strategies."""

    def fit(*strategies, extra=()):
        files = [flag for name in strategies for flag in ("--config", CONFIGS / f"strategy/{name}.yaml")]
        return run("fit", "--config", CONFIGS / "task/imdb.yaml", *files, "--model.base", base, *data_flags,
                   "--data.max_length=32", "--trainer.max_epochs=1", "--trainer.precision=32-true", *extra)  # fmt: skip

    return fit


def used(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


# Composition


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


@pytest.mark.parametrize(
    ("strategies", "words"),
    [
        (("lora", "dora"), ["h.0.attn.c_attn", "two LoRA"]),
        (("full", "lora"), ["train_base", "full fine-tuning", "LoRA", "h.0.attn.c_attn.weight"]),
        (("lora", "full"), ["train_base", "LoRA"]),
        (("prompt_tuning", "prompt_tuning"), ["two PromptTuning"]),
        (("prefix_tuning", "prefix_tuning"), ["two PrefixTuning"]),
        (("ulmfit", "llrd"), ["two DiscriminativeLR"]),
        (("ulmfit", "linear_probe"), ["GradualUnfreezing", "train_base"]),
        (("linear_probe", "llrd"), ["DiscriminativeLR", "train_base"]),
        (("prefix_tuning", "llrd"), ["DiscriminativeLR", "frozen GPT-2"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_fit_contradictory_strategies_are_refused_before_a_run_starts(strategies, words, fit, capsys, tmp_path):
    line = refused(lambda *names: fit(*names), capsys, *strategies)
    assert all(word in line for word in words), line
    assert not list(tmp_path.glob("lightning_logs/*/*"))


def test_fit_surgery_that_does_not_fit_the_model_is_refused(fit, capsys, tmp_path):
    for extra, words in (
        (["--model.surgery+={class_path: gpt2_pl.surgery.PromptTuning, init_args: {length: 64}}"], ["64", "at most"]),
        (["--model.surgery+={class_path: gpt2_pl.surgery.LoRA, init_args: {targets: [query]}}"], ["query", "c_attn"]),
    ):
        line = refused(lambda extra: fit("full", extra=["--model.train_base=null", *extra]), capsys, extra)
        assert all(word in line for word in words), line
    quick = ["fit", "--config", CONFIGS / "quickstart.yaml", "--config", CONFIGS / "strategy/lora.yaml"]
    line = refused(lambda: main([*map(str, quick)]), capsys)
    assert "model.config is initialized at random" in line
    assert not list(tmp_path.glob("lightning_logs/*/*"))


# Checkpoints


@pytest.mark.parametrize("strategy", ["lora", "dora", "prefix_tuning", "prompt_tuning", "linear_probe"])
def test_checkpoint_frozen_base_is_left_out_and_verified_by_digest(
    strategy, fit, run, base, capsys, tmp_path, data_flags
):
    folder = fit(strategy)
    account, checkpoint = metrics(folder), folder / "checkpoints/best.ckpt"
    added = {name for name in weights(checkpoint) if name.startswith("gpt2.")}
    assert not {name.removeprefix("gpt2.") for name in added} & GPT2.from_pretrained(base).base_names
    assert (strategy == "linear_probe") == (not added)
    assert account["checkpoint_bytes"] == checkpoint.stat().st_size
    trained = sum(tensor.numel() for name, tensor in weights(checkpoint).items() if "metrics" not in name)
    assert account["parameters"]["trainable"] == trained

    again = run("test", "--config", folder / "config.yaml", "--ckpt_path", checkpoint)
    assert metrics(again)["scores"]["test/accuracy"] == account["scores"]["test/accuracy"]
    assert metrics(again)["scores"]["test/loss"] == account["scores"]["test/loss"]
    flags = ["--config", CONFIGS / "task/imdb.yaml", "--config", CONFIGS / f"strategy/{strategy}.yaml",
             "--data.max_length=32", "--trainer.precision=32-true", *data_flags]  # fmt: skip
    again = run("test", *flags, "--model.base", base, "--ckpt_path", checkpoint)
    assert metrics(again)["scores"]["test/loss"] == account["scores"]["test/loss"]

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
    assert "holds other weights" in line
    with pytest.raises(InputError, match="holds other weights"):
        SentimentClassifier.load_from_checkpoint(checkpoint, weights_only=True, base=str(other))
    with pytest.raises(InputError, match="the base of this model trains"):
        SentimentClassifier.load_from_checkpoint(checkpoint, weights_only=True, surgery=None, train_base=True)


def test_checkpoint_trained_base_contains_all_weights(fit, base):
    checkpoint = fit("full") / "checkpoints/best.ckpt"
    task = SentimentClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    assert {f"gpt2.{name}" for name in task.backbone.base_names} <= weights(checkpoint).keys()
    assert not torch.equal(task.backbone.wte.weight, GPT2.from_pretrained(base).wte.weight)


def test_checkpoint_surgery_class_outside_the_library_is_refused(fit, capsys, run, tmp_path):
    checkpoint = fit("lora") / "checkpoints/best.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["surgery"] = [{"class_path": "os.system", "init_args": {"command": "touch evil"}}]
    torch.save(content, tmp_path / "evil.ckpt")
    line = refused(run, capsys, "test", "--data=gpt2_pl.datamodules.IMDB", "--ckpt_path", tmp_path / "evil.ckpt")
    assert "os.system" in line
    with pytest.raises(InputError, match=r"there is no 'os\.system'"):
        SentimentClassifier.load_from_checkpoint(tmp_path / "evil.ckpt", weights_only=True)
    assert not (tmp_path / "evil").exists()


def test_fit_resumed_lora_run_equals_uninterrupted_run(fit, run):
    flags = ["--model.schedule=gpt2_pl.optim.ConstantWithWarmup", "--model.schedule.init_args.warmup=0"]
    whole = fit("lora", extra=[*flags, "--trainer.max_epochs=2"])
    half = fit("lora", extra=flags)
    resumed = fit("lora", extra=[*flags, "--trainer.max_epochs=2", "--ckpt_path", half / "checkpoints/last.ckpt"])
    a, b = (weights(folder / "checkpoints/last.ckpt") for folder in (whole, resumed))
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
    assert len(used(resumed)["model"]["init_args"]["surgery"]) == 1


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


@pytest.mark.parametrize("name", SURGERIES)
def test_peft_format_classifier_round_trip_equals_peft(name, base, tmp_path):
    if name in ("prefix", "network"):
        peft_puts_virtual_tokens()
    from gpt2_pl.surgery import peft_format as exchange

    task = trained(base, SURGERIES[name])
    ours = logits(task, IDS)
    assert task.head.linear.bias.abs().max() > 0.05
    exchange.save(task.backbone, tmp_path / "peft", str(base), task.head)
    plain = GPT2ForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    for n in range(
        len(IDS)
    ):  # one row at a time: beside virtual tokens, theirs mistakes the last token of a padded row
        with torch.no_grad():
            expected = theirs(IDS[n : n + 1], attention_mask=torch.ones(1, 9, dtype=torch.long)).logits
        torch.testing.assert_close(ours[n : n + 1], expected, atol=1e-5, rtol=1e-5)

    back = SentimentClassifier(base=str(base), num_classes=3, surgery=[PeftAdapter(str(tmp_path / "peft"))])
    back.configure_model()
    torch.testing.assert_close(logits(back.eval(), IDS), ours, atol=1e-5, rtol=1e-5)
    assert {p.requires_grad for n, p in back.backbone.named_parameters() if n in back.backbone.base_names} == {False}
    assert any(p.requires_grad for p in back.backbone.parameters())


@pytest.mark.parametrize("name", SURGERIES)
def test_peft_format_language_model_round_trip_equals_peft(name, base, tmp_path):
    from gpt2_pl.surgery import peft_format as exchange

    backbone = trained(base, SURGERIES[name]).backbone
    if name == "embedding":  # theirs does not adapt the head that is tied to it
        with pytest.raises(InputError, match="tied to the adapted wte"):
            exchange.save(backbone, tmp_path / "peft", str(base))
        return
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "got 'IA3'"),
        ({"bias": "all"}, "got 'all'"),
        ({"use_dora": True}, "does not fit"),
        (None, "is not a peft adapter"),
    ],
)
def test_peft_adapter_unsupported_or_corrupt_is_refused(change, message, base, tmp_path):
    from gpt2_pl.surgery import peft_format as exchange

    folder = tmp_path / "adapter"
    exchange.save(LoRA().apply(GPT2.from_pretrained(base)), folder, str(base))
    file = folder / "adapter_config.json"
    if change is None:
        (folder / "adapter_model.safetensors").write_bytes(b"short")
    else:
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        PeftAdapter(str(folder)).apply(GPT2.from_pretrained(base))


def test_peft_adapter_of_another_model_shape_is_refused(base, tmp_path):
    from gpt2_pl.model import GPT2Config
    from gpt2_pl.surgery import peft_format as exchange

    other = GPT2(GPT2Config(vocab_size=400, n_positions=64, n_embd=48, n_layer=3, n_head=2))
    exchange.save(LoRA(layers=0).apply(other), tmp_path / "wide", None)
    with pytest.raises(InputError, match=r"transformer.h.0.attn.c_attn does not fit"):
        PeftAdapter(str(tmp_path / "wide")).apply(GPT2.from_pretrained(base))
    other = GPT2(GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=3, n_head=2))
    exchange.save(LoRA(layers=2).apply(other), tmp_path / "deep", None)
    with pytest.raises(InputError, match="the model has no layer for the adapter"):
        PeftAdapter(str(tmp_path / "deep")).apply(GPT2.from_pretrained(base))


@pytest.mark.parametrize("strategy", ["full", "lora", "dora"])
def test_export_hf_run_loads_in_transformers_with_equal_logits(strategy, fit, run, base):
    folder = fit(strategy)
    out = folder.parent / "hf"
    run("export", folder, "--format=hf", "--out", out)
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


def test_export_peft_run_loads_in_peft_with_equal_logits(fit, run, base):
    folder = fit("prompt_tuning")
    out = folder.parent / "peft"
    run("export", folder, "--format=peft", "--out", out)
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
    run("export", stage1, "--format=hf", "--out", out)
    learned = {name.removeprefix("gpt2."): tensor for name, tensor in weights(stage1 / "checkpoints/best.ckpt").items()}
    start = GPT2.from_pretrained(out)
    assert all(torch.equal(tensor, learned[name]) for name, tensor in start.state_dict().items())
    assert not torch.equal(start.h[1].mlp.c_fc.weight, GPT2.from_pretrained(base).h[1].mlp.c_fc.weight)
    stage2 = fit("ulmfit", extra=["--model.base", out])
    assert metrics(stage2)["base"]["digest"] == weights_sha256(start)
    assert math.isfinite(metrics(stage2)["scores"]["val/loss"])


@pytest.mark.parametrize(
    ("strategy", "args", "words"),
    [
        ("prefix_tuning", ["--format=hf"], ["cannot be merged", "--format peft"]),
        ("full", ["--format=peft"], ["train_base", "--format hf"]),
        ("ulmfit", ["--format=hf"], ["pooling must be 'last'", "got 'concat'", "--backbone"]),
        ("full", ["--format=hf", "--ckpt_path=/nowhere.ckpt"], ["/nowhere.ckpt"]),
    ],
)
def test_export_unsupported_combination_is_refused_without_output(strategy, args, words, fit, run, capsys):
    folder = fit(strategy)
    out = folder.parent / "out"
    line = refused(run, capsys, "export", folder, "--out", out, *args)
    assert all(word in line for word in words), line
    assert not out.exists()
    assert not list(folder.parent.glob(".*part"))
    if strategy == "ulmfit":
        run("export", folder, "--out", out, *args, "--backbone")
        GPT2LMHeadModel.from_pretrained(out)
        capsys.readouterr()
        assert str(out) in refused(run, capsys, "export", folder, "--out", out, *args)


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
