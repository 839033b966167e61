"""Gradual unfreezing and discriminative rates on modules that are not this library's."""

import pytest
import torch
from helpers.trainers import Watch, trainer
from lightning.pytorch import Callback, LightningModule
from torch import nn

from gpt2_pl.callbacks import DiscriminativeLR, GradualUnfreezing
from gpt2_pl.errors import InputError
from gpt2_pl.optim import parameter_groups


class Foreign(LightningModule):
    """A foreign module with ``layer_groups``."""

    def __init__(self, grouped=True):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.grouped = grouped

    def layer_groups(self):
        return {name: list(getattr(self, name).named_parameters(name)) for name in ("body", "head")}

    def training_step(self, batch, batch_idx):
        return self.head(self.body(batch[0])).square().mean()

    def configure_optimizers(self):
        groups = parameter_groups(self.layer_groups()) if self.grouped else self.parameters()
        return torch.optim.SGD(groups, lr=0.1)


def fit_foreign(module, *callbacks):
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 4)), batch_size=2)
    trainer(max_epochs=2, callbacks=list(callbacks)).fit(module, rows)


def test_finetuning_callbacks_foreign_module_with_layer_groups_apply_to_layers():
    module, watch = Foreign(), Watch()
    fit_foreign(module, GradualUnfreezing(), DiscriminativeLR(decay=0.5), watch)
    assert watch.trains == [{"head.weight", "head.bias"}] * 4 + [set(dict(module.named_parameters()))] * 4
    rates = {group["layer"]: group["lr"] for group in module.optimizers().param_groups}
    assert rates == {"body": 0.1, "head": 0.1}  # body is the layer right below the head


def test_discriminative_lr_param_group_of_two_layers_is_refused():
    with pytest.raises(InputError, match=r"body.*head"):
        fit_foreign(Foreign(grouped=False), DiscriminativeLR())


class Nameless(LightningModule):
    """A foreign module without ``layer_groups``."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.head(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("make", [GradualUnfreezing, DiscriminativeLR])
def test_finetuning_callbacks_module_without_layer_groups_is_refused(make):
    with pytest.raises(InputError, match=r"Nameless .*layer_groups"):
        fit_foreign(Nameless(), make())


class TwoLayers(LightningModule):
    """A module that is not a Task, with a scheduler of torch."""

    def __init__(self, make):
        super().__init__()
        self.make, self.body, self.head = make, nn.Linear(4, 4), nn.Linear(4, 2)
        self.seen = []

    def layer_groups(self):
        return {"body": list(self.body.named_parameters()), "head": list(self.head.named_parameters())}

    def training_step(self, batch, batch_idx):
        self.seen.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        return self.head(self.body(batch)).square().sum()

    def train_dataloader(self):
        return torch.ones(12, 1, 4)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([{"params": self.body.parameters()}, {"params": self.head.parameters()}], lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), "interval": "step"}}


SCHEDULES = torch.optim.lr_scheduler
MAKE = {
    "lambda": lambda o: SCHEDULES.LambdaLR(o, lambda step: 1 / (step + 1)),
    "one cycle": lambda o: SCHEDULES.OneCycleLR(o, max_lr=0.3, total_steps=20),
    "cyclic": lambda o: SCHEDULES.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "two in sequence": lambda o: SCHEDULES.SequentialLR(
        o, [SCHEDULES.LinearLR(o, 0.5, total_iters=3), SCHEDULES.CosineAnnealingLR(o, 9)], milestones=[3]
    ),
    "chained": lambda o: SCHEDULES.ChainedScheduler([SCHEDULES.LambdaLR(o, lambda step: 1 / (step + 1))]),
    "steps": lambda o: SCHEDULES.StepLR(o, 3),
}


def test_discriminative_lr_any_torch_scheduler_keeps_ratio_of_rates():
    for name, make in MAKE.items():
        module = TwoLayers(make)
        trainer(max_epochs=1, callbacks=[DiscriminativeLR(decay=0.5, head_scale=2.0)]).fit(module)
        assert len({round(head, 6) for _, head in module.seen}) > 2, name
        for body, head in module.seen:
            assert head == pytest.approx(2 * body), name


class Stop(Callback):
    def on_train_batch_end(self, *_):
        raise RuntimeError("stop here")


def test_gradual_unfreezing_failed_fit_restores_requires_grad():
    module = TwoLayers(MAKE["lambda"])
    freezing = {"stages": [["head"], ["body"]], "epochs_per_stage": 1.0}
    with pytest.raises(RuntimeError, match="stop here"):
        trainer(max_epochs=2, callbacks=[GradualUnfreezing(**freezing), Stop()]).fit(module)
    assert all(p.requires_grad for p in module.parameters())
    before = module.body.weight.detach().clone()
    trainer(max_epochs=2, callbacks=[GradualUnfreezing(**freezing)]).fit(module)
    assert not torch.equal(module.body.weight, before)
