"""User-defined strategies and tasks in Python: trained parameters, checkpoint contents, and class names."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.adapters import Houlsby, OutputScale, Unfreeze
from helpers.classifiers import logits
from helpers.trainers import trainer
from lightning.pytorch import Callback
from torch import nn

from gpt2_pl.datamodules import ToySentiment
from gpt2_pl.errors import InputError
from gpt2_pl.surgery import LoRA, PrefixTuning, PromptTuning, Surgery, build
from gpt2_pl.tasks import SentimentClassifier, Task
from gpt2_pl.utils.registry import class_path


@dataclass
class Biases(Surgery):
    """BitFit on the published parameters only."""

    def apply(self, model, tokenizer=None):
        for name, parameter in model.named_parameters():
            if name in model.base_names:
                parameter.requires_grad_(name.endswith("bias"))
        return model


@dataclass
class FrozenEmbeddings(Surgery):
    """Full fine-tuning except for the embeddings."""

    def apply(self, model, tokenizer=None):
        model.wte.requires_grad_(False)
        model.wpe.requires_grad_(False)
        return model


def fitted(base, surgery, folder, callbacks=(), **settings):
    """Return a classifier after four steps, its checkpoint, and the names of the parameters in the optimizer."""
    torch.manual_seed(1)
    task = SentimentClassifier(base=str(base), surgery=surgery, dropout=0.0, **settings)
    task.make_optimizer = lambda groups: torch.optim.AdamW(groups, lr=0.1)
    fit = trainer(max_steps=3, callbacks=list(callbacks))
    fit.fit(task, ToySentiment(n_train=48, vocab_size=400, batch_size=16))
    fit.save_checkpoint(folder / "some.ckpt")
    held = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    return task, folder / "some.ckpt", {name for name, p in task.named_parameters() if id(p) in held}


HEAD = {"head.linear.weight", "head.linear.bias"}


SURGERIES = [  # with settings of the task, and whether a parameter of the GPT-2 trains
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
]


def test_task_custom_surgery_trains_and_saves_what_requires_a_gradient(base, tmp_path, subtests):
    for surgery, settings, trains in SURGERIES:
        with subtests.test("+".join(type(one).__name__ for one in surgery)):
            check_trained(surgery, settings, trains, base, tmp_path)


def check_trained(surgery, settings, trains, base, tmp_path):
    task, checkpoint, optimized = fitted(base, surgery, tmp_path, **settings)
    names = {name for name, _ in task.named_parameters()}
    if isinstance(surgery[0], Houlsby) and len(surgery) > 1:  # published biases that keep their names
        published = {f"gpt2.{name}" for name in task.backbone.base_names}
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
    for name, parameter in plain.backbone.named_parameters():
        if f"gpt2.{name}" in names - expected:
            assert torch.equal(parameter, task.backbone.get_parameter(name))
    assert task.base_is_frozen == (not {f"gpt2.{name}" for name in task.backbone.base_names} & expected)


def test_task_complete_checkpoint_loads_without_the_base(base, tmp_path):
    task, checkpoint, _ = fitted(base, [Unfreeze()], tmp_path)
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["base"] is None
    assert torch.equal(logits(SentimentClassifier.load_from_checkpoint(checkpoint)), logits(task))


def test_task_partly_frozen_random_model_saves_all_weights(tmp_path):
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
    """Freeze all but the head from the second step on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            pl_module.backbone.requires_grad_(False)


def test_task_freezing_callback_does_not_change_checkpoint_or_optimizer(base, tmp_path):
    task, checkpoint, optimized = fitted(base, None, tmp_path, [Freeze()])
    assert optimized == {name for name, _ in task.named_parameters()} == set(torch.load(checkpoint)["state_dict"])
    again = trainer(max_steps=1)
    again.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    held = {id(p) for group in again.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in task.parameters()}


def test_task_surgery_that_freezes_all_is_a_linear_probe(base, tmp_path):
    @dataclass
    class FreezeAll(Surgery):
        def apply(self, model, tokenizer=None):
            return model.requires_grad_(False)

    task = SentimentClassifier(base=str(base), surgery=[FreezeAll()], train_base=True)
    assert task.backbone_frozen
    assert task.base_is_frozen
    assert not task.trains_blocks


def test_task_surgery_that_unfreezes_an_adapted_weight_is_refused(base):
    with pytest.raises(InputError, match=r"LoRA.*h\.0\.attn\.c_attn\.weight"):
        SentimentClassifier(base=str(base), surgery=[LoRA(rank=2), Unfreeze()])


class Focal(SentimentClassifier):
    """A task that saves all of its arguments, one of which a checkpoint cannot hold."""

    def __init__(self, gamma: float = 2.0, loss: nn.Module | None = None, **kwargs):
        super().__init__(**kwargs)
        self.gamma = gamma
        self.save_hyperparameters()


def test_task_custom_hyperparameters_are_restored_without_objects(base, tmp_path):
    task = Focal(gamma=1.5, loss=nn.Flatten(), base=str(base), surgery=[LoRA(rank=2)])
    fit = trainer(max_steps=1)
    fit.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    fit.save_checkpoint(tmp_path / "some.ckpt")
    again = Focal.load_from_checkpoint(tmp_path / "some.ckpt")
    assert again.gamma == 1.5
    assert torch.equal(logits(again), logits(task))
    assert torch.load(tmp_path / "some.ckpt", weights_only=True)["task"] == f"{__name__}.Focal"
    with pytest.raises(InputError, match="Focal"):
        SentimentClassifier.load_from_checkpoint(tmp_path / "some.ckpt")


# Names of classes


def test_class_path_is_public_for_library_and_full_for_user_classes():
    assert class_path(SentimentClassifier) == "gpt2_pl.tasks.SentimentClassifier"
    assert class_path(LoRA) == "gpt2_pl.surgery.LoRA"
    assert class_path(Biases) == f"{__name__}.Biases"
    assert Task.find(class_path(Focal)) is Focal
    assert Task.find("gpt2_pl.surgery.LoRA") is Surgery.find("gpt2_pl.tasks.SentimentClassifier") is None
    assert Task.find("gpt2_pl.tasks.Task") is None


def test_build_custom_surgery_from_its_settings_restores_it():
    for surgery in (Biases(), Houlsby(7), LoRA(rank=3, targets=["q"])):
        again = build(surgery.settings())
        assert type(again) is type(surgery)
        assert again.settings() == surgery.settings()


def test_task_surgery_settings_that_are_not_plain_values_are_refused(base, tmp_path):
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

    with pytest.raises(InputError, match=r"From.*folder.*PosixPath"):
        SentimentClassifier(base=str(base), surgery=[From(tmp_path)])
    with pytest.raises(InputError, match=r"Forgets.*'size'"):
        SentimentClassifier(base=str(base), surgery=[Forgets(3)])


def test_save_checkpoint_task_defined_in_main_warns(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Focal, "__module__", "__main__")
    task = Focal(base=str(base))
    fit = trainer(max_steps=1)
    fit.fit(task, ToySentiment(n_train=64, vocab_size=400, batch_size=16))
    with pytest.warns(UserWarning, match=r"__main__\.Focal.*move it to a separate module"):
        fit.save_checkpoint(tmp_path / "some.ckpt")
