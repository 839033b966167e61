"""Forward pass, gradients, 20 steps of training, saving and loading against peft, for types whose values are equal."""

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from gpt2_pl.model import GPT2
from gpt2_pl.surgery import IA3, LayerNormTuning, PeftAdapter
from gpt2_pl.surgery import peft_format as exchange
from gpt2_pl.tasks import SentimentClassifier

IDS = torch.randint(400, (4, 9), generator=torch.Generator().manual_seed(2))


def ia3(task):
    return peft.IA3Config(task_type=task, fan_in_fan_out=True)


CASES = {  # with the configuration of peft, and whether only keys and values are scaled, for which peft has no option
    "layer norms": (LayerNormTuning(), lambda task: peft.LNTuningConfig(task_type=task), False),
    "IA3": (IA3(), ia3, True),
    "IA3 of all outputs": (IA3(targets=["c_attn", "mlp.c_proj"]), ia3, False),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def our_tensors(model, folder, head=None):
    """Return our trained tensors by the names of peft."""
    from safetensors.torch import load_file

    exchange.save(model, folder, None, head)
    return load_file(folder / "adapter_model.safetensors")


def their_tensors(model):
    return peft.get_peft_model_state_dict(model)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def stirred(model):
    """Move what trains away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def test_surgery_forward_gradients_and_20_steps_equal_peft(case, base, tmp_path):
    surgery, config, keeps_q = case
    ours = surgery.apply(GPT2.from_pretrained(base, dropout=0.0))
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config("CAUSAL_LM")).eval()
    assert our_tensors(ours, tmp_path / "a").keys() == their_tensors(theirs).keys()
    n_queries = 2 * 32 * keeps_q
    assert sum(p.numel() for p in trained(ours)) == sum(p.numel() for p in trained(theirs)) - n_queries > 0
    for name, parameter in theirs.named_parameters():
        if keeps_q and "c_attn.ia3_l" in name:
            parameter.register_hook(lambda gradient: gradient * (torch.arange(96) >= 32).unsqueeze(1))
    frozen = {name: p.clone() for name, p in ours.named_parameters() if not p.requires_grad}
    optimizers = [torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.0) for model in (ours, theirs)]
    for step in range(20):
        logits = ours.logits(ours(IDS)), theirs(IDS).logits
        torch.testing.assert_close(*logits, atol=1e-5 if step == 0 else 1e-3, rtol=1e-5)
        for output, optimizer in zip(logits, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        if step == 0:
            gradients = [sorted(p.grad.norm().item() for p in trained(model)) for model in (ours, theirs)]
            assert gradients[0] == pytest.approx(gradients[1], rel=1e-3, abs=1e-7)
            assert min(gradients[0]) > 0
        for optimizer in optimizers:
            optimizer.step()
    mine, other = our_tensors(ours, tmp_path / "b"), their_tensors(theirs)
    for name, tensor in other.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-3, rtol=1e-3)
    start = our_tensors(surgery.apply(GPT2.from_pretrained(base)), tmp_path / "c")
    assert all((mine[name] - tensor).abs().max() > 0.02 for name, tensor in start.items())
    assert all(torch.equal(p, frozen[name]) for name, p in ours.named_parameters() if name in frozen)


def test_classifier_saved_by_us_has_equal_logits_in_peft_and_read_again(case, base, tmp_path):
    surgery, _, _ = case
    task = SentimentClassifier(base=str(base), num_classes=3, surgery=[surgery], dropout=0.0)
    task.configure_model()
    stirred(task.eval())
    exchange.save(task.backbone, tmp_path / "ours", str(base), task.head)
    plain = GPT2ForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    again = SentimentClassifier(base=str(base), num_classes=3, surgery=[PeftAdapter(str(tmp_path / "ours"))])
    again.configure_model()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "row": torch.arange(4)}
    with torch.no_grad():
        ours = task(batch)[0]
        close(theirs(IDS, attention_mask=torch.ones_like(IDS)).logits, ours)
        close(again.eval()(batch)[0], ours)
    assert again.trained_names == task.trained_names
    assert again.base_is_frozen == task.base_is_frozen


def test_adapter_saved_by_peft_has_equal_logits_here(case, base, tmp_path):
    _, config, _ = case
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config("CAUSAL_LM"))
    stirred(theirs.eval()).save_pretrained(tmp_path / "theirs")
    ours = PeftAdapter(str(tmp_path / "theirs")).apply(GPT2.from_pretrained(base)).eval()
    with torch.no_grad():
        close(ours.logits(ours(IDS)), theirs(IDS).logits)
    assert sum(p.numel() for p in trained(ours)) == sum(p.numel() for p in trained(theirs))
    mine, other = our_tensors(ours, tmp_path / "ours"), their_tensors(theirs)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in other.items())
