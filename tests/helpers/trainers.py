"""Quiet trainers, and a callback that records training."""

from lightning.pytorch import Callback, Trainer


def trainer(**settings):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(
        **{"accelerator": "cpu", "use_distributed_sampler": False, "num_sanity_val_steps": 0, **quiet, **settings}
    )


class Watch(Callback):
    """Notes before every step what can train, and every weight."""

    def __init__(self):
        self.trains, self.weights = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trains.append({name for name, p in pl_module.named_parameters() if p.requires_grad})
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
