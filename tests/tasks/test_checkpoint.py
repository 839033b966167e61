"""Consistency of a checkpoint with the settings that it is loaded with, peft adapters and compositions."""

import json
import re

import peft
import pytest
import torch
from conftest import ROOT, metrics
from helpers.refusals import refused
from helpers.trainers import trainer
from torch import nn
from transformers import GPT2LMHeadModel

from gpt2_pl import GPT2
from gpt2_pl.datamodules import IMDB
from gpt2_pl.errors import InputError
from gpt2_pl.surgery import LoRA, PeftAdapter, PrefixTuning
from gpt2_pl.tasks import LanguageModel, SentimentClassifier
from gpt2_pl.text.tokenizer import load_tokenizer

CONFIG = ROOT / "configs"
IDS = torch.randint(400, (4, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def fit(run, base, data_flags):
    """Fit IMDB with strategies for one epoch."""

    def fit(*strategies, extra=()):
        files = [part for name in strategies for part in ("--config", CONFIG / f"strategy/{name}.yaml")]
        settings = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.accelerator=cpu",
                    "--data.max_length=40"]  # fmt: skip
        return run("fit", "--config", CONFIG / "task/imdb.yaml", *files, f"--model.base={base}", *data_flags, *settings,
                   *extra)  # fmt: skip

    return fit


OTHERS = [
    {"targets": ["k", "v"]},
    {"alpha": 64},
    {"use_rslora": True},
    {"layers": "1"},
    {"use_dora": True},
    {"rank": 4},
]


def test_load_checkpoint_with_other_surgery_is_refused(fit, run, capsys, data_flags, subtests):
    surgery = "--model.surgery=[{class_path: gpt2_pl.surgery.LoRA, init_args: {targets: [q, v]}}]"
    checkpoint = fit(extra=[surgery]) / "checkpoints/best.ckpt"
    for other in OTHERS:
        settings = {"targets": ["q", "v"], **other}
        with subtests.test(other), pytest.raises(InputError, match=r"model\.surgery|c_attn"):
            SentimentClassifier.load_from_checkpoint(checkpoint, weights_only=True, surgery=[LoRA(**settings)])
    stated = "--model.surgery=" + json.dumps([{"class_path": "gpt2_pl.surgery.LoRA", "init_args": settings}])
    capsys.readouterr()
    line = refused(
        run, capsys, "test", "--data=gpt2_pl.datamodules.IMDB", *data_flags, stated, "--ckpt_path", checkpoint
    )
    assert "model.surgery" in line or "c_attn" in line
    same = SentimentClassifier.load_from_checkpoint(
        checkpoint, weights_only=True, surgery=[LoRA(targets=["q", "v"], dropout=0.3, loraplus_lr_ratio=4)]
    )
    assert same.backbone.h[0].attn.c_attn.dropout == 0.3


def test_checkpoint_prompt_init_text_with_trained_base_loads_and_classifies(fit, run, tmp_path):
    surgery = "--model.surgery=[{class_path: gpt2_pl.surgery.PromptTuning, init_args: {length: 3, init_text: a film}}]"
    folder = fit("full", extra=[surgery])
    checkpoint = folder / "checkpoints/best.ckpt"
    assert SentimentClassifier.load_from_checkpoint(checkpoint, weights_only=True).backbone.n_virtual == 3
    rows = tmp_path / "new.csv"
    rows.write_text("sentence\na fine film\n")
    run("classify", folder, "--input", rows, "--out", tmp_path / "predictions.csv")
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 2


def test_fit_settings_that_cannot_train_are_refused_before_a_run_starts(fit, capsys, tmp_path):
    for strategy, key, extra in (
        ("linear_probe", "model.head", ["--model.head=verbalizer", "--model.label_words=[' a', ' b']"]),
        ("ulmfit", "cut_frac", ["--model.schedule.init_args.cut_frac=2"]),
    ):
        assert key in refused(lambda strategy=strategy, extra=extra: fit(strategy, extra=extra), capsys)
    assert not list(tmp_path.glob("lightning_logs/*/*"))


def test_fit_trainable_parameters_are_counted_at_the_end_of_training(fit):
    account = metrics(fit("ulmfit"))["parameters"]
    assert account["trainable"] == sum(layer["trainable"] for layer in account["layers"]) < account["total"]


# peft's adapters


def peft_adapter(base, folder, **settings):
    torch.manual_seed(4)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "fan_in_fan_out": True, "task_type": "CAUSAL_LM", "init_lora_weights": False,
           "target_modules": ["c_attn", "c_fc"], **settings}
    )  # fmt: skip
    model = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base).eval(), config).eval()
    model.save_pretrained(folder)
    return model


PATTERNS = [
    r"h\.[01]\..*c_attn", "^transformer.h.0.attn.c_attn", "attn.c_attn", r"h.\d.mlp.c_fc", "c_f", "c_attn|c_fc",
]  # fmt: skip


def test_peft_adapter_alpha_pattern_equals_peft(base, tmp_path, subtests):
    for pattern in PATTERNS:
        with subtests.test(pattern), torch.no_grad():
            theirs = peft_adapter(base, tmp_path / "adapter", alpha_pattern={pattern: 40})
            ours = PeftAdapter(str(tmp_path / "adapter")).apply(GPT2.from_pretrained(base)).eval()
            torch.testing.assert_close(ours.logits(ours(IDS)), theirs(IDS).logits, atol=1e-5, rtol=0)


def test_peft_adapter_initialisation_that_changes_the_base_is_refused(base, tmp_path):
    peft_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    for how in ("pissa", "olora", "pissa_niter_4"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": how}))
        with pytest.raises(InputError, match=f"init_lora_weights.*'{how}'"):
            PeftAdapter(str(tmp_path / "adapter")).apply(GPT2.from_pretrained(base))


def test_load_checkpoint_with_changed_peft_adapter_is_refused(fit, base, tmp_path):
    folder = tmp_path / "adapter"
    peft_adapter(base, folder)
    surgery = f"--model.surgery=[{{class_path: gpt2_pl.surgery.PeftAdapter, init_args: {{folder: {folder}}}}}]"
    checkpoint = fit(extra=[surgery]) / "checkpoints/best.ckpt"
    SentimentClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 48}))
    with pytest.raises(InputError, match=re.escape(f"{folder}: the adapter has changed")):
        SentimentClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    with pytest.raises(InputError, match=r"model\.surgery"):
        SentimentClassifier.load_from_checkpoint(checkpoint, weights_only=True, surgery=[PeftAdapter(str(folder))])


def test_save_peft_dora_with_adapted_embedding_is_refused(base, tmp_path):
    from gpt2_pl.heads import ClassificationHead
    from gpt2_pl.surgery.peft_format import save

    model = GPT2.from_pretrained(base)
    LoRA(targets=["c_fc"], use_dora=True).apply(model)
    LoRA(targets=["wte"]).apply(model)
    with pytest.raises(InputError, match="LoRA and DoRA"):
        save(model, tmp_path / "out", str(base), ClassificationHead(32, 2))


# Compositions


def test_prefix_tuning_and_lora_training_moves_both_and_not_the_base(base):
    torch.manual_seed(0)
    model = GPT2.from_pretrained(base)
    for surgery in (LoRA(targets=["q", "v"]), PrefixTuning(length=3)):
        surgery.apply(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # A has a gradient once B has moved
        nn.functional.cross_entropy(model.logits(model(IDS)).flatten(0, 1), IDS.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora" in name or name.startswith("prefix")}


def test_train_base_with_prefix_tuning_determines_whether_base_moves(base, files):
    for train_base in (True, False):
        task = SentimentClassifier(base=str(base), num_classes=2, surgery=[PrefixTuning(3)], train_base=train_base)
        data = IMDB(train_file=str(files["train"]), tokenizer=str(base), batch_size=16)
        task.configure_model()
        before = {name: p.detach().clone() for name, p in task.backbone.named_parameters()}
        trainer(max_steps=2, limit_val_batches=0).fit(task, data)
        moved = {name for name, p in task.backbone.named_parameters() if not torch.equal(p, before[name])}
        assert moved == (set(before) if train_base else {"prefix.table"})


def test_exported_language_model_as_base_gives_the_same_first_loss(run, base, files, tmp_path):
    """The first loss is that of the language model's own weights with the same head."""
    stage = run("fit", "--config", CONFIG / "task/text.yaml", "--config", CONFIG / "strategy/ulmfit_lm.yaml",
                f"--model.base={base}", f"--data.train_file={files['train']}", "--data.column=sentence",
                "--data.max_length=32", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
                "--model.optimizer.init_args.lr=1e-2")  # fmt: skip
    run("export", stage, "--format", "hf", "--out", tmp_path / "stage1")
    first = LanguageModel.load_from_checkpoint(stage / "checkpoints/best.ckpt", weights_only=True).backbone.eval()
    batch, labels = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, torch.tensor([0, 1, 1, 0])
    for surgery in ([], [LoRA(rank=2)]):
        second = SentimentClassifier(base=str(tmp_path / "stage1"), num_classes=2, surgery=surgery)
        second.configure_model()
        second.eval()
        with torch.no_grad():
            expected = nn.functional.cross_entropy(second.head(first(IDS)[:, -1])[0], labels)
            loss = nn.functional.cross_entropy(second(batch)[0], labels)
            unlike = nn.functional.cross_entropy(second.head(GPT2.from_pretrained(base).eval()(IDS)[:, -1])[0], labels)
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
        assert (unlike - loss).abs() > 1e-4
    assert load_tokenizer(tmp_path / "stage1").get_vocab_size() == load_tokenizer(base).get_vocab_size()
