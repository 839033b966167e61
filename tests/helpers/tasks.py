"""Tasks whose weights differ from those of their base."""

import torch


def perturb(task):
    """Make every weight that trains matter, as after training."""
    task.configure_model()
    torch.manual_seed(3)
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return task
