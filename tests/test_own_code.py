"""Strategies and tasks of users: what trains, what a checkpoint holds, and which classes it may name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Callback
from test_sentiment import trainer
from torch import nn

from datamodules import ToySentiment
from gpt2_pl.errors import InputError
from gpt2_pl.registry import class_path
from gpt2_pl.surgery import LoRA, PrefixTuning, PromptTuning, Surgery, build
from gpt2_pl.tasks import SentimentClassifier, Task

IDS = torch.randint(400, (3, 9), generator=torch.Generator().manual_seed(2))


@dataclass
class Biases(Surgery):
    """BitFit, on the published parameters alone."""

    def apply(self, model, tokenizer=None):
        for name, parameter in model.named_parameters():
            if name in model.base_names:
                parameter.requires_grad_(name.endswith("bias"))
        return model


@dataclass
class FrozenEmbeddings(Surgery):
    """Full fine-tuning but for the embeddings."""

    def apply(self, model, tokenizer=None):
        model.wte.requires_grad_(False)
        model.wpe.requires_grad_(False)
        return model


@dataclass
class Unfreeze(Surgery):
    def apply(self, model, tokenizer=None):
        return model.requires_grad_(True)


class Bottleneck(nn.Module):
    """A layer behind another (Houlsby et al. 2019), with a fixed random projection that is not trained."""

    def __init__(self, inner: nn.Module, width: int, size: int):
        super().__init__()
        self.inner, self.up = inner, nn.Linear(size, width)
        self.down = nn.Parameter(torch.randn(size, width), requires_grad=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        y = self.inner(x)
        return y + self.up(torch.relu(y @ self.down.T))


class Houlsby(Surgery):
    """Bottleneck adapters; not a dataclass."""

    def __init__(self, size: int = 4):
        self.size = size

    def apply(self, model, tokenizer=None):
        for block in model.h:
            block.mlp = Bottleneck(block.mlp, model.config.n_embd, self.size)
        return model


@dataclass
class OutputScale(Surgery):
    """A tensor of the GPT-2 itself, read by a hook."""

    def apply(self, model, tokenizer=None):
        model.scale = nn.Parameter(model.ln_f.weight.new_ones(model.config.n_embd))
        model.ln_f.register_forward_hook(lambda module, args, output: output * model.scale)
        return model


def fitted(base, surgery, folder, callbacks=(), **settings):
    """A classifier after four steps, the checkpoint of it, and what the optimizer held."""
    torch.manual_seed(1)
    task = SentimentClassifier(base=str(base), surgery=surgery, dropout=0.0, **settings)
    task.make_optimizer = lambda groups: torch.optim.AdamW(groups, lr=0.1)
    fit = trainer(max_steps=4, callbacks=list(callbacks))
    fit.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    fit.save_checkpoint(folder / "some.ckpt")
    held = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    return task, folder / "some.ckpt", {name for name, p in task.named_parameters() if id(p) in held}


def logits(task):
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "row": torch.arange(len(IDS))}
    with torch.no_grad():
        return task.eval()(batch)


HEAD = {"head.linear.weight", "head.linear.bias"}


@pytest.mark.parametrize(
    ("surgery", "settings", "trains"),
    [
        ([Biases()], {}, lambda name: name.endswith("bias")),
        ([LoRA(rank=2), Biases()], {}, lambda name: name.endswith("bias") or "lora" in name),
        ([Biases(), LoRA(rank=2)], {}, lambda name: name.endswith("bias") or "lora" in name),
        ([FrozenEmbeddings()], {"train_base": True}, lambda name: "wte" not in name and "wpe" not in name),
        ([PromptTuning(3), FrozenEmbeddings()], {"train_base": True}, lambda n: "wte" not in n and "wpe" not in n),
        ([Unfreeze()], {}, lambda name: True),
        ([Houlsby()], {}, lambda name: ".up." in name or ".down" in name),
        ([Houlsby(), Biases()], {}, lambda name: ".up." in name or ".down" in name or name.endswith("ln_f.bias")),
        ([OutputScale()], {}, lambda name: name == "gpt2.scale"),
        ([OutputScale(), PrefixTuning(3)], {}, lambda name: "scale" in name or "prefix" in name),
    ],
    ids=lambda value: "+".join(type(one).__name__ for one in value) if isinstance(value, list) else "",
)  # fmt: skip
def test_task_own_surgery_trains_saves_and_loads_what_requires_a_gradient(surgery, settings, trains, base, tmp_path):
    task, checkpoint, optimized = fitted(base, surgery, tmp_path, **settings)
    names = {name for name, _ in task.named_parameters()}
    if isinstance(surgery[0], Houlsby) and len(surgery) > 1:  # published biases that keep their names
        published = {f"gpt2.{name}" for name in task.core.base_names}
        expected = {n for n in names if ".up." in n or ".down" in n or (n in published and n.endswith("bias"))} | HEAD
    else:
        expected = {name for name in names if trains(name)} | HEAD
    assert optimized == {name for name in expected if ".down" not in name}
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert set(stored) == expected
    again = SentimentClassifier.load_from_checkpoint(checkpoint)
    assert torch.equal(logits(again), logits(task))
    plain = SentimentClassifier(base=str(base))
    plain.configure_model()
    for name, parameter in plain.core.named_parameters():
        if f"gpt2.{name}" in names - expected:
            assert torch.equal(parameter, task.core.get_parameter(name))
    assert task.base_is_frozen == (not {f"gpt2.{name}" for name in task.core.base_names} & expected)


def test_task_complete_checkpoint_loads_without_the_base(base, tmp_path):
    task, checkpoint, _ = fitted(base, [Unfreeze()], tmp_path)
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["base"] is None
    assert torch.equal(logits(SentimentClassifier.load_from_checkpoint(checkpoint)), logits(task))


def test_task_partly_frozen_random_model_is_saved_whole(tmp_path):
    shape = {"vocab_size": 400, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    task, checkpoint, optimized = fitted_from_config(shape, tmp_path)
    assert "gpt2.wte.weight" not in optimized
    assert torch.equal(logits(SentimentClassifier.load_from_checkpoint(checkpoint)), logits(task))


def fitted_from_config(shape, folder):
    torch.manual_seed(1)
    task = SentimentClassifier(config=shape, surgery=[FrozenEmbeddings()], train_base=True, dropout=0.0)
    fit = trainer(max_steps=2)
    fit.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    fit.save_checkpoint(folder / "some.ckpt")
    held = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    return task, folder / "some.ckpt", {name for name, p in task.named_parameters() if id(p) in held}


class Freeze(Callback):
    """Freezes all but the head from the second step on, and leaves it so."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            pl_module.core.requires_grad_(False)


def test_task_callback_that_freezes_changes_neither_checkpoint_nor_optimizer(base, tmp_path):
    task, checkpoint, optimized = fitted(base, None, tmp_path, [Freeze()])
    assert optimized == {name for name, _ in task.named_parameters()} == set(torch.load(checkpoint)["state_dict"])
    again = trainer(max_steps=1)
    again.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    held = {id(p) for group in again.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in task.parameters()}


def test_task_surgery_that_freezes_all_is_a_probe(base, tmp_path):
    @dataclass
    class FreezeAll(Surgery):
        def apply(self, model, tokenizer=None):
            return model.requires_grad_(False)

    task = SentimentClassifier(base=str(base), surgery=[FreezeAll()], train_base=True)
    assert task.is_probe
    assert task.base_is_frozen
    assert not task.trains_blocks


def test_task_surgery_that_unfreezes_an_adapted_weight_is_refused(base):
    with pytest.raises(InputError, match=r"unfreezes it and LoRA both write h\.0\.attn\.c_attn\.weight"):
        SentimentClassifier(base=str(base), surgery=[LoRA(rank=2), Unfreeze()])


class Focal(SentimentClassifier):
    """A task that saves all of its arguments, one of which a checkpoint cannot hold."""

    def __init__(self, gamma: float = 2.0, loss: nn.Module | None = None, **kwargs):
        super().__init__(**kwargs)
        self.gamma = gamma
        self.save_hyperparameters()


def test_task_own_hyperparameters_are_restored_and_objects_left_out(base, tmp_path):
    task = Focal(gamma=1.5, loss=nn.Flatten(), base=str(base), surgery=[LoRA(rank=2)])
    fit = trainer(max_steps=1)
    fit.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    fit.save_checkpoint(tmp_path / "some.ckpt")
    again = Focal.load_from_checkpoint(tmp_path / "some.ckpt")
    assert again.gamma == 1.5
    assert torch.equal(logits(again), logits(task))
    assert torch.load(tmp_path / "some.ckpt", weights_only=True)["task"] == f"{__name__}.Focal"
    with pytest.raises(InputError, match=r"written by .*Focal"):
        SentimentClassifier.load_from_checkpoint(tmp_path / "some.ckpt")


# Names of classes


def test_class_path_is_public_for_our_classes_and_whole_for_others():
    assert class_path(SentimentClassifier) == "gpt2_pl.tasks.SentimentClassifier"
    assert class_path(LoRA) == "gpt2_pl.surgery.LoRA"
    assert class_path(Biases) == f"{__name__}.Biases"
    assert Task.find(class_path(Focal)) is Focal
    assert Task.find("gpt2_pl.surgery.LoRA") is Surgery.find("gpt2_pl.tasks.SentimentClassifier") is None
    assert Task.find("gpt2_pl.tasks.Task") is None


@pytest.mark.parametrize(
    "surgery", [Biases(), Houlsby(7), LoRA(rank=3, targets=["q"])], ids=lambda value: type(value).__name__
)
def test_build_own_surgery_from_its_settings(surgery):
    again = build(surgery.settings())
    assert type(again) is type(surgery)
    assert again.settings() == surgery.settings()


def test_surgery_settings_that_are_not_plain_are_refused(base, tmp_path):
    @dataclass
    class From(Surgery):
        folder: object

        def apply(self, model, tokenizer=None):
            return model

    class Forgets(Surgery):
        def __init__(self, size: int):
            pass

        def apply(self, model, tokenizer=None):
            return model

    with pytest.raises(InputError, match=r"From: folder must be text.*PosixPath"):
        SentimentClassifier(base=str(base), surgery=[From(tmp_path)])
    with pytest.raises(InputError, match=r"Forgets does not keep its argument 'size'"):
        SentimentClassifier(base=str(base), surgery=[Forgets(3)])


def test_save_class_of_main_warns(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Focal, "__module__", "__main__")
    task = Focal(base=str(base))
    fit = trainer(max_steps=1)
    fit.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    with pytest.warns(UserWarning, match=r"__main__\.Focal.*move it into a module"):
        fit.save_checkpoint(tmp_path / "some.ckpt")
