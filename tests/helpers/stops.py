"""Short runs that are stopped."""

import torch
from conftest import ROOT
from lightning.pytorch import Callback

TINY = [
    "fit", f"--config={ROOT}/configs/quickstart.yaml", "--data.n_train=96", "--data.batch_size=16",
    "--model.config={vocab_size: 512, n_positions: 64, n_embd: 16, n_layer: 1, n_head: 2, dropout: 0.1}",
    "--model.schedule={class_path: gpt2_pl.optim.ConstantWithWarmup, init_args: {warmup: 0}}", "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
]  # fmt: skip  # six steps an epoch


def state(folder, name="last"):
    return torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)


def same(one, two):
    """Whether nested values are equal, tensors bitwise."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


class Stop(Callback):
    """Asks for the end of training in a batch, as ``max_time`` does."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or batch_idx == self.batch


STOP = "--trainer.callbacks+={class_path: helpers.stops.Stop, init_args: {batch: 1}}"
