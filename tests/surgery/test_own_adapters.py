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


NOT_FOR_PEFT = [  # with what peft's format does not hold, and whether the other format does
    ([LoRA(rank=2), IA3()], r"h\.0\.mlp\.c_fc\.layer\.bias, .*c_fc\.scale", True),
    ([LoRA(rank=2), IA3(keeps=False)], r"h\.0\.mlp\.c_fc\.scale, h\.1\.mlp\.c_fc\.scale.*only a checkpoint", False),
    ([LoRA(rank=2), OutputScale()], r"\bscale.*only a checkpoint", False),
    ([PrefixTuning(3), IA3(keeps=False)], r"c_fc\.scale", False),
    ([OutputScale()], r"\bscale", False),
    ([LoRA(rank=2), Doubled()], "weights of the base", True),
]


def test_export_peft_unsupported_parameters_are_refused(base, tmp_path, subtests):
    for surgery, words, offers in NOT_FOR_PEFT:
        with subtests.test("+".join(type(one).__name__ for one in surgery)):
            with pytest.raises(InputError, match=words) as caught:
                export_peft(built(base, surgery), tmp_path)
            assert ("--format hf" in str(caught.value)) == offers


def test_export_trained_base_with_virtual_tokens_is_refused_by_both_formats(base, tmp_path):
    task = built(base, [PromptTuning(3), Unfreeze()])
    with pytest.raises(InputError) as caught:
        export_peft(task, tmp_path)
    assert "--format hf" not in str(caught.value)
    with pytest.raises(InputError, match="--format peft"):
        export_hf(task, tmp_path, base)


@pytest.mark.parametrize(
    ("cls", "names"),
    [(OwnHead, r"head\.0\.bias, head\.0\.weight, head\.2\.bias, head\.2\.weight"), (SecondHead, r"extra\.bias, extra")],
)
def test_export_custom_head_is_refused_unless_backbone_only(cls, names, base, tmp_path):
    task = built(base, [LoRA(rank=2)], cls)
    words = rf"{names}.*test_own_adapters\.{cls.__name__}.*--backbone"
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


UNMERGEABLE = [
    ([Houlsby()], r"h\.0\.mlp\.down.*merged\(\)"),
    ([IA3(keeps=False)], r"h\.0\.mlp\.c_fc\.scale.*merged\(\)"),
    ([OutputScale()], r"\bscale"),
    ([Shallow()], r"h\.1\.attn\.c_attn\.bias"),
]


def test_export_hf_unmergeable_modules_are_refused_by_name(base, tmp_path, subtests):
    for surgery, words in UNMERGEABLE:
        with subtests.test(words):
            with pytest.raises(InputError, match=words):
                export_hf(built(base, surgery), tmp_path, base)
            assert not (tmp_path / "model.safetensors").exists()


WRONG_ORDER = [
    ([IA3(), LoRA(targets=["c_fc"])], r"LoRA.*h\.0\.mlp\.c_fc.*\.ScaledLayer"),
    ([IA3(keeps=False), LoRA(targets=["c_fc"])], r"LoRA.*h\.0\.mlp\.c_fc.*\.ScaledLinear"),
    ([Houlsby(), LoRA(targets=["c_fc"])], r"LoRA.*h\.0\.mlp\.c_fc.*Bottleneck"),
    ([LoRA(targets=["c_fc"]), IA3(keeps=False)], r"IA3.*h\.0\.mlp\.c_fc\.lora_A"),
]


def test_surgery_order_that_loses_parameters_is_refused(base, subtests):
    for surgery, words in WRONG_ORDER:
        with subtests.test(words), pytest.raises(InputError, match=words):
            LanguageModel(base=str(base), surgery=surgery)


def test_peft_adapter_on_custom_layer_is_refused(base, tmp_path):
    export_peft(built(base, [LoRA(rank=2, targets=["c_fc"])]), tmp_path)
    with pytest.raises(InputError, match=r"PeftAdapter.*h\.0\.mlp\.c_fc.*\.ScaledLinear"):
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


FROZEN = [  # with settings, the parts of the message
    ([LoRA(rank=2)], {}, ["gpt2_pl.surgery.LoRA"]),
    ([LoRA(rank=2), IA3(target="mlp.c_proj")], {}, ["LoRA", "IA3"]),
    ([PrefixTuning(3)], {}, ["PrefixTuning"]),
    ([IA3()], {}, ["test_own_adapters.IA3"]),
    ([], {"train_base": False}, ["train_base: false"]),
    ([FreezeAll()], {"train_base": True}, ["FreezeAll"]),
    ([FreezeAll()], {}, ["FreezeAll"]),
]


def test_task_frozen_random_base_is_refused(subtests):
    for surgery, settings, words in FROZEN:
        with subtests.test(words, settings=settings):
            with pytest.raises(InputError) as caught:
                SentimentClassifier(config=SHAPE, surgery=surgery, **settings)
            assert all(word in str(caught.value) for word in [*words, "model.config", "--model.config null"])


def test_task_train_base_without_effect_warns(base):
    with pytest.warns(UserWarning, match=r"train_base.*test_own_adapters\.FreezeAll.*freezes_base"):
        SentimentClassifier(base=str(base), surgery=[FreezeAll()], train_base=True)


def test_fit_lora_on_random_quickstart_model_is_refused_with_advice(run, capsys, base):
    args = ["fit", "--config", ROOT / "configs/quickstart.yaml", "--config", ROOT / "configs/strategy/lora.yaml"]
    assert "--model.config null" in refused(run, capsys, *args)
    assert "--model.config null" in refused(run, capsys, *args, f"--model.base={base}")  # both are given


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
    assert "plain_task.Plain gives no row_table" in out
    (tmp_path / "in.txt").write_text("x\n")
    for command, what in (
        (["classify", folder, "--input", tmp_path / "in.csv"],
         ["plain_task.Plain", "predict_class", "predict_proba", "TextClassifier"]),
        (["generate", folder, "--prompt_file", tmp_path / "in.txt"],
         ["plain_task.Plain", "continue_prompts"]),
        (["export", folder, "--format=hf"], ["plain_task.Plain", "scores.bias", "scores.weight"]),
    ):  # fmt: skip
        ending = {"classify": ".csv", "generate": ".txt", "export": ""}[command[0]]
        line = refused(run, capsys, *command, "--out", tmp_path / f"out{ending}", "--plugin=plain_task")
        assert all(word in line for word in what), line
        assert not (tmp_path / f"out{ending}").exists()


def test_guide_example_surgeries_train_merge_and_combine(base, tmp_path, monkeypatch):
    guide = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(# mine\.py\b.*?)```", guide, re.S)
    assert len(blocks) == 2
    (tmp_path / "guide_mine.py").write_text("\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("guide_mine")
    top = built(base, [mine.TopBlocks(1)])
    assert top.trained_names == {name for name in top.backbone.base_names if name.startswith("h.1.")}
    task = built(base, [LoRA(rank=2), mine.SSF()])
    assert {name.rpartition(".")[2] for name in task.trained_names} == {"lora_A", "lora_B", "scale", "shift"}
    assert task.base_is_frozen
    with torch.no_grad():
        expected = task.backbone(IDS)
        torch.testing.assert_close(merge(task.backbone)(IDS), expected)
