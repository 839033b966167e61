"""User-defined adapters and heads: combinations, and exports that contain or refuse them."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT
from helpers.adapters import Houlsby, OutputScale, Unfreeze
from helpers.refusals import refused
from torch import nn
from transformers import GPT2LMHeadModel, GPT2Model

from gpt2_pl.commands.export import export_hf, export_peft
from gpt2_pl.errors import InputError
from gpt2_pl.surgery import LoRA, MergeableLayer, PeftAdapter, PrefixTuning, PromptTuning, Surgery, merge, unmerge
from gpt2_pl.tasks import LanguageModel, SentimentClassifier

IDS = torch.randint(400, (3, 9), generator=torch.Generator().manual_seed(2))
SHAPE = {"vocab_size": 400, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}


class ScaledLayer(nn.Module):
    """A linear layer, or an adapter of one, whose outputs are multiplied by a vector."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.ones(layer.out_features))

    def forward(self, x):
        return self.layer(x) * self.scale

    def merged(self):
        layer = self.layer
        weight, bias = layer.merged() if isinstance(layer, MergeableLayer) else (layer.weight, layer.bias)
        return weight * self.scale.unsqueeze(1), bias * self.scale


class ScaledLinear(nn.Linear):
    """The same as a linear layer of another class, which takes over the parameters only."""

    def __init__(self, layer):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = nn.Parameter(torch.ones(layer.out_features))

    def forward(self, x):
        return super().forward(x) * self.scale


@dataclass
class IA3(Surgery):
    keeps: bool = True
    target: str = "mlp.c_fc"

    def apply(self, model, tokenizer=None):
        for block in model.h:
            new = ScaledLayer if self.keeps else ScaledLinear
            block.set_submodule(self.target, new(block.get_submodule(self.target)))
        return model


@dataclass
class Doubled(Surgery):
    """Change a published weight, which then does not train."""

    def apply(self, model, tokenizer=None):
        model.ln_f.weight.data.mul_(2.0)
        return model


@dataclass
class FreezeAll(Surgery):
    def apply(self, model, tokenizer=None):
        return model.requires_grad_(False)


@dataclass
class Shallow(Surgery):
    """Remove a block without changing the configuration."""

    def apply(self, model, tokenizer=None):
        del model.h[1]
        return model


class OwnHead(SentimentClassifier):
    """A classifier with a hidden layer in its head."""

    def configure_model(self):
        super().configure_model()
        self.head = nn.Sequential(nn.Linear(self.config.n_embd, 8), nn.Tanh(), nn.Linear(8, self.num_classes))


class SecondHead(SentimentClassifier):
    """A classifier with one more layer in addition to its head."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.extra = nn.Linear(self.config.n_embd, 1)


def built(base, surgery, cls=LanguageModel, **settings):
    """Return a task on a base, its trained parameters moved away from their initial values."""
    task = cls(base=str(base), surgery=surgery, dropout=0.0, **settings)
    task.configure_model()
    for name, parameter in task.named_parameters():
        if parameter.requires_grad and name.removeprefix("gpt2.") not in task.backbone.base_names:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return task.eval()


@pytest.mark.parametrize(
    ("surgery", "words"),
    [
        ([LoRA(rank=2), IA3()], r"cannot store h\.0\.mlp\.c_fc\.layer\.bias, .*c_fc\.scale.*; use --format hf$"),
        ([LoRA(rank=2), IA3(keeps=False)], r"cannot store h\.0\.mlp\.c_fc\.scale, h\.1\.mlp\.c_fc\.scale; use --f"),
        ([LoRA(rank=2), OutputScale()], r"cannot store scale; use --format hf$"),
        ([PrefixTuning(3), IA3(keeps=False)], r"c_fc\.scale; no format stores them together with virtual tokens$"),
        ([OutputScale()], r"cannot store scale"),
        ([LoRA(rank=2), Doubled()], r"surgery changed weights of the base; .*; use --format hf$"),
    ],
    ids=["wrapper", "layer", "tensor", "prefix", "alone", "weight"],
)
def test_export_peft_unsupported_parameters_are_refused(surgery, words, base, tmp_path):
    with pytest.raises(InputError, match=words):
        export_peft(built(base, surgery), tmp_path)


def test_export_trained_base_with_virtual_tokens_is_refused_by_both_formats(base, tmp_path):
    task = built(base, [PromptTuning(3), Unfreeze()])
    with pytest.raises(InputError, match=r"the base was trained.*no format stores them together with virtual tokens$"):
        export_peft(task, tmp_path)
    with pytest.raises(InputError, match=r"use --format peft, which supports it if nothing else was trained or added"):
        export_hf(task, tmp_path, base)


@pytest.mark.parametrize(
    ("cls", "names"),
    [(OwnHead, r"head\.0\.bias, head\.0\.weight, head\.2\.bias, head\.2\.weight"), (SecondHead, r"extra\.bias, extra")],
)
def test_export_custom_head_is_refused_unless_backbone_only(cls, names, base, tmp_path):
    task = built(base, [LoRA(rank=2)], cls)
    words = rf"does not support {names}.*the head of test_own_adapters\.{cls.__name__}; omit it with --backbone"
    with pytest.raises(InputError, match=words):
        export_hf(task, tmp_path / "hf", base)
    with pytest.raises(InputError, match=words):
        export_peft(task, tmp_path / "peft")
    with torch.no_grad():
        expected = task.backbone(IDS)
    export_peft(task, tmp_path / "peft", backbone=True)
    again = built(base, [])
    PeftAdapter(str(tmp_path / "peft")).apply(again.backbone)
    export_hf(task, tmp_path / "hf", base, backbone=True)
    with torch.no_grad():
        torch.testing.assert_close(again.backbone(IDS), expected)
        theirs = GPT2Model.from_pretrained(tmp_path / "hf").eval()(IDS).last_hidden_state
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("surgery", "words"),
    [
        (
            [Houlsby()],
            r"h\.0\.mlp is a helpers\.adapters\.Bottleneck, which has no method merged\(\) -> \(weight, bias\)",
        ),
        ([IA3(keeps=False)], r"h\.0\.mlp\.c_fc is a test_own_adapters\.ScaledLinear, which has no method merged\(\)"),
        ([OutputScale()], r"cannot contain scale: surgery added scale to the GPT-2 itself"),
        ([Shallow()], r"h\.1\.attn\.c_attn\.bias must have shape \(96,\), .*got no such tensor"),
    ],
)
def test_export_hf_unmergeable_modules_are_refused_by_name(surgery, words, base, tmp_path):
    with pytest.raises(InputError, match=words):
        export_hf(built(base, surgery), tmp_path, base)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("surgery", "words"),
    [
        ([IA3(), LoRA(targets=["c_fc"])], r"LoRA: h\.0\.mlp\.c_fc is a \S+\.ScaledLayer, which LoRA cannot adapt; put"),
        ([IA3(keeps=False), LoRA(targets=["c_fc"])], r"LoRA: h\.0\.mlp\.c_fc is a \S+\.ScaledLinear, which LoRA"),
        (
            [Houlsby(), LoRA(targets=["c_fc"])],
            r"LoRA: h\.0\.mlp is a \S+\.Bottleneck, which has no c_fc; put",
        ),
        ([LoRA(targets=["c_fc"]), IA3(keeps=False)], r"IA3 removes h\.0\.mlp\.c_fc\.lora_A, .*must keep the layers"),
    ],
)
def test_surgery_order_that_loses_parameters_is_refused(surgery, words, base):
    with pytest.raises(InputError, match=words):
        LanguageModel(base=str(base), surgery=surgery)


def test_peft_adapter_on_custom_layer_is_refused(base, tmp_path):
    export_peft(built(base, [LoRA(rank=2, targets=["c_fc"])]), tmp_path)
    with pytest.raises(InputError, match=r"PeftAdapter: h\.0\.mlp\.c_fc is a \S+\.ScaledLinear, which PeftAdapter"):
        LanguageModel(base=str(base), surgery=[IA3(keeps=False), PeftAdapter(str(tmp_path))])


def test_merge_adapter_wrapping_lora_is_applied_once_and_exported(base, tmp_path):
    task = built(base, [LoRA(rank=2, targets=["c_fc", "c_attn"]), IA3()])
    with torch.no_grad():
        expected = task.backbone.logits(task.backbone(IDS))
        state = {name: tensor.clone() for name, tensor in task.backbone.state_dict().items()}
        torch.testing.assert_close(task.backbone.logits(merge(task.backbone)(IDS)), expected)
        assert all(torch.equal(tensor, state[name]) for name, tensor in unmerge(task.backbone).state_dict().items())
        assert torch.equal(task.backbone.logits(task.backbone(IDS)), expected)
        export_hf(task, tmp_path, base)
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()(IDS).logits
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("surgery", "settings", "words", "offers"),
    [
        ([LoRA(rank=2)], {}, r"with surgery \(gpt2_pl\.surgery\.LoRA\) it would not train", ""),
        ([LoRA(rank=2), IA3(target="mlp.c_proj")], {}, r"it would not train", ""),
        ([PrefixTuning(3)], {}, r"it would not train", "; or train_base: true"),
        ([IA3()], {}, r"with surgery \(test_own_adapters\.IA3\)", "; or train_base: true"),
        ([], {"train_base": False}, r"with train_base: false", "; or train_base: true"),
        ([FreezeAll()], {"train_base": True}, r"FreezeAll, which freezes all of it despite train_base: true",
         "; or set freezes_base = True in test_own_adapters.FreezeAll, and train_base: true"),
        ([FreezeAll()], {}, r"with surgery",
         "; or set freezes_base = True in test_own_adapters.FreezeAll, and train_base: true"),
    ],
)  # fmt: skip
def test_task_frozen_random_base_is_refused_with_valid_advice(surgery, settings, words, offers):
    with pytest.raises(InputError, match=words) as caught:
        SentimentClassifier(config=SHAPE, surgery=surgery, **settings)
    assert str(caught.value).endswith(f"--model.base FOLDER_OR_ID --model.config null{offers}")
    if offers == "; or train_base: true":
        SentimentClassifier(config=SHAPE, surgery=surgery, train_base=True)


def test_task_train_base_without_effect_warns(base):
    with pytest.warns(UserWarning, match=r"train_base: true has no effect: test_own_adapters\.FreezeAll.*freezes_base"):
        SentimentClassifier(base=str(base), surgery=[FreezeAll()], train_base=True)


def test_fit_lora_on_random_quickstart_model_is_refused_with_advice(run, capsys, base):
    args = ["fit", "--config", ROOT / "configs/quickstart.yaml", "--config", ROOT / "configs/strategy/lora.yaml"]
    assert "--model.config null" in refused(run, capsys, *args)
    assert "got both: --model.config null leaves config out" in refused(run, capsys, *args, f"--model.base={base}")


PLAIN = """
import torch
from torch import nn
from gpt2_pl.tasks import Task

class Plain(Task):
    def __init__(self, num_classes: int = 3, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters("num_classes")
        self.num_classes = num_classes
        self.scores = nn.Linear(self.config.n_embd, num_classes)

    def forward(self, batch):
        last = batch["attention_mask"].sum(1, keepdim=True) - 1
        return self.scores(self.backbone(batch["input_ids"], output_positions=last).squeeze(1))

    def training_step(self, batch, batch_idx):
        losses = nn.functional.cross_entropy(self(batch), batch["labels"], reduction="none")
        return self.mean_loss(losses.sum(), len(losses), batch, batch_idx)[0]

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch), batch["labels"]))

    def predict_step(self, batch, batch_idx):
        return self(batch)
"""


def test_commands_task_without_protocols_names_missing_methods(run, capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plain_task.py").write_text(PLAIN)
    small = ["--data.n_train=32", "--trainer.max_epochs=1", "--model.config.n_layer=1", "--model.config.n_embd=16"]
    folder = run("fit", "--config", ROOT / "configs/quickstart.yaml", "--model=plain_task.Plain", *small)
    checkpoint = folder / "checkpoints/best.ckpt"
    assert "no predictions were written" not in capsys.readouterr().out
    run("predict", "--config", folder / "config.yaml", "--ckpt_path", checkpoint)
    out = capsys.readouterr().out
    assert "predict finished" in out
    assert "; no predictions were written: plain_task.Plain gives no row_table" in out
    (tmp_path / "in.txt").write_text("x\n")
    for command, what in (
        (["classify", folder, "--input", tmp_path / "in.csv"],
         "classifies text, got Plain: plain_task.Plain lacks predict_class, predict_proba "
         "(see gpt2_pl.tasks.protocols.TextClassifier)"),
        (["generate", folder, "--prompt_file", tmp_path / "in.txt"],
         "generates text, got Plain: plain_task.Plain lacks continue_prompts (see gpt2_pl.tasks.protocols"),
        (["export", folder, "--format=hf"], "does not support scores.bias, scores.weight, the head of plain_task"),
    ):  # fmt: skip
        ending = {"classify": ".csv", "generate": ".txt", "export": ""}[command[0]]
        assert what in refused(run, capsys, *command, "--out", tmp_path / f"out{ending}", "--plugin=plain_task")
        assert not (tmp_path / f"out{ending}").exists()


def test_guide_example_surgeries_train_merge_and_combine(base, tmp_path, monkeypatch):
    guide = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(# mine\.py.*?)```", guide, re.S)
    assert len(blocks) == 2
    (tmp_path / "guide_mine.py").write_text("\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("guide_mine")
    biases = built(base, [mine.BitFit()])
    assert biases.trained_names == {name for name in biases.backbone.base_names if name.endswith("bias")}
    task = built(base, [LoRA(rank=2), mine.IA3()])
    assert {name.rpartition(".")[2] for name in task.trained_names} == {"lora_A", "lora_B", "scale"}
    assert task.base_is_frozen
    with torch.no_grad():
        expected = task.backbone(IDS)
        torch.testing.assert_close(merge(task.backbone)(IDS), expected)
