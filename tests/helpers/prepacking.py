"""Models and marks for tests of prepacked weights."""

import pytest
import torch

from gpt2_pl import GPT2, GPT2Config
from gpt2_pl.surgery import LoRA

SHAPE = GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4, dropout=0.1)
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
bfloat16 = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bfloat16 on this machine",
)


def small_gpt2():
    """Return a GPT-2 in evaluation mode whose weights are larger than initial ones."""
    torch.manual_seed(0)
    model = GPT2(SHAPE)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return model.eval()


def adapted(model, **settings):
    """Give a GPT-2 LoRA adapters with values that are not zero; with settings, on other targets."""
    targets = ["q", "v", "mlp.c_proj"] if settings else ["c_attn", "c_fc", "wte"]
    LoRA(rank=3, targets=targets, **settings).apply(model)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model
