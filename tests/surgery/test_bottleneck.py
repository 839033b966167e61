"""Bottleneck adapters against a computation by hand, cached generation, and settings that do not fit."""

import pytest
import torch
from helpers.classifiers import logits
from helpers.trainers import trainer
from torch import nn
from transformers import GPT2LMHeadModel

from gpt2_pl import generate
from gpt2_pl.commands.export import export_hf, export_peft
from gpt2_pl.datamodules import ToySentiment
from gpt2_pl.errors import InputError
from gpt2_pl.kernels import prepacked_linear
from gpt2_pl.model import GPT2, GPT2Config
from gpt2_pl.surgery import IA3, BitFit, BottleneckAdapter, LoRA, PrefixTuning, merge
from gpt2_pl.tasks import LanguageModel, SentimentClassifier

IDS = torch.randint(400, (3, 11), generator=torch.Generator().manual_seed(5))


def stirred(model):
    """Give the adapters of a GPT-2 values as after some training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def adapted(base, *surgery):
    model = GPT2.from_pretrained(base, dropout=0.0).eval()
    for one in surgery:
        one.apply(model)
    return stirred(model)


FUNCTIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(approximate="tanh"), "silu": nn.SiLU(), "tanh": nn.Tanh()}
OPTIONS = [
    {"placement": "houlsby", "size": 5, "activation": "gelu"},
    {"placement": "pfeiffer", "reduction": 4, "activation": "tanh"},
    {"placement": "houlsby", "activation": "silu", "layers": [1]},
    {"layers": "0"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bottleneck_hidden_states_equal_transformers_with_hooks(options, base):
    """Hooks of transformers' model add W_up f(W_down x) to the outputs of attention and MLP, one row at a time."""
    model = adapted(base, BottleneckAdapter(**options))
    theirs = GPT2LMHeadModel.from_pretrained(base).eval()
    f, count = FUNCTIONS[options.get("activation", "relu")], 0
    for i, block in enumerate(model.h):
        for ours, module in (
            (block.mlp, theirs.transformer.h[i].mlp),
            (block.attn, theirs.transformer.h[i].attn.c_proj),
        ):
            if not hasattr(ours, "adapter"):
                continue
            count += 1
            down, up = ours.adapter.down, ours.adapter.up

            def add(module, args, output, down=down, up=up):
                rows = [
                    x + torch.mv(up.weight, f(torch.mv(down.weight, x) + down.bias)) + up.bias
                    for x in output.reshape(-1, 32)
                ]
                return torch.stack(rows).view_as(output)

            module.register_forward_hook(add)
            assert down.weight.shape == (options.get("size", 32 // options.get("reduction", 16)), 32)
    blocks = len(options.get("layers", [0, 1]))
    assert count == blocks * (2 if options.get("placement") == "houlsby" else 1)
    with torch.no_grad():
        ours, expected = model.logits(model(IDS)), theirs(IDS).logits
        plain = GPT2.from_pretrained(base).eval()
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        assert (ours - plain.logits(plain(IDS))).abs().max() > 1e-2


def test_bottleneck_untrained_does_not_change_hidden_states_and_up_has_a_gradient(base):
    plain = GPT2.from_pretrained(base).eval()
    model = BottleneckAdapter("houlsby", activation="gelu").apply(GPT2.from_pretrained(base).eval())
    assert torch.equal(model(IDS), plain(IDS))
    assert not model.training
    model.logits(model(IDS)).logsumexp(-1).mean().backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    places = [f"h.{i}.{part}.adapter.up" for i in range(2) for part in ("attn", "mlp")]
    assert found == {f"{place}.{key}" for place in places for key in ("weight", "bias")}
    stds = [model.h[0].mlp.adapter.down.weight.std(), model.h[1].attn.adapter.down.weight.std()]
    assert all(0.01 < std < 0.03 for std in stds)


def test_bottleneck_parameter_count_on_gpt2_small():
    for surgery, count in (
        (BottleneckAdapter("houlsby"), 24 * (2 * 768 * 48 + 48 + 768)),
        (BottleneckAdapter("pfeiffer"), 12 * (2 * 768 * 48 + 48 + 768)),
        (BottleneckAdapter(size=8, layers="9-11"), 3 * (2 * 768 * 8 + 8 + 768)),
    ):
        with torch.device("meta"):
            model = surgery.apply(GPT2(GPT2Config()))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("prepacks", [False, True])
def test_bottleneck_cached_generation_equals_full_passes(prepacks, base, monkeypatch):
    """With a cache, and with prepacked weights, the most likely tokens are those of passes over the whole text."""
    monkeypatch.setattr(prepacked_linear, "MIN_CALLS", 1 if prepacks else 10**6)
    model = adapted(base, BottleneckAdapter("houlsby", size=4), PrefixTuning(3))
    merged = adapted(base, LoRA(targets=["c_fc"]), BottleneckAdapter("houlsby", size=4))
    with torch.no_grad():
        merged.h[0].mlp.c_fc.lora_B.normal_()
    for one in (model, merged):
        text = IDS[:, :5]
        with torch.no_grad():
            for _ in range(8):
                text = torch.cat((text, one.logits(one(text)[:, -1:]).argmax(-1)), 1)
        assert torch.equal(generate(one, IDS[:, :5], max_new_tokens=8, temperature=0.0), text)


def test_bottleneck_training_moves_only_adapters_and_checkpoint_restores_them(base, tmp_path):
    plain = GPT2.from_pretrained(base)
    task = SentimentClassifier(base=str(base), surgery=[BottleneckAdapter("houlsby", activation="tanh")], dropout=0.0)
    task.make_optimizer = lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    fit = trainer(max_steps=3)
    fit.fit(task, ToySentiment(n_train=48, vocab_size=400, batch_size=16))
    state = task.backbone.state_dict()
    assert all(torch.equal(state[name], p) for name, p in plain.named_parameters())
    assert all(p.any() for name, p in task.backbone.named_parameters() if ".adapter." in name)
    fit.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert {name for name in stored if "head" not in name} == {f"gpt2.{n}" for n in state.keys() - plain.base_names}
    assert torch.equal(logits(SentimentClassifier.load_from_checkpoint(tmp_path / "x.ckpt")), logits(task))


def test_bottleneck_export_is_refused(base, tmp_path):
    task = LanguageModel(base=str(base), surgery=[BottleneckAdapter(), LoRA(targets=["c_fc"])])
    task.configure_model()
    with pytest.raises(
        InputError, match=r"peft's format cannot store h\.0\.mlp\.adapter\.down\.bias.*only a checkpoint"
    ):
        export_peft(task, tmp_path)
    with pytest.raises(InputError, match=r"cannot contain h\.0\.mlp\.adapter\.down\.bias"):
        export_hf(task, tmp_path, base)


COMBINED = [
    ([LoRA(targets=["c_attn", "c_fc"])], "lora_"),
    ([IA3()], "ia3_l"),
    ([BitFit()], ".bias"),
]


@pytest.mark.parametrize("first", [True, False])
def test_bottleneck_combines_with_adapters_of_layers_in_any_order(first, base, subtests):
    for others, key in COMBINED:
        with subtests.test(key):
            surgery = [BottleneckAdapter("houlsby"), *others] if first else [*others, BottleneckAdapter("houlsby")]
            task = LanguageModel(base=str(base), surgery=surgery, dropout=0.0)
            task.configure_model()
            names = {name for name in task.trained_names if ".adapter." not in name}
            assert len(names) + 16 == len(task.trained_names)
            assert names
            assert all(key in name for name in names)
            model = stirred(task.backbone).eval()
            with torch.no_grad():
                for name in names:
                    model.get_parameter(name).add_(torch.randn_like(model.get_parameter(name)), alpha=0.1)
                expected = model(IDS)
                torch.testing.assert_close(merge(model)(IDS), expected, atol=1e-5, rtol=1e-5)


UNFIT = [
    ({"size": 0}, "size.*got 0"),
    ({"size": 2.5}, r"size.*got 2\.5"),
    ({"reduction": True}, "reduction.*got True"),
    ({"size": 4, "reduction": 8}, "reduction must be null with size"),
    ({"reduction": 33}, "reduction must be at most n_embd = 32, got 33"),
    ({"placement": "both"}, "placement.*'both'"),
    ({"activation": "sin"}, "activation.*'sin'"),
    ({"layers": 2}, "layers.* 0 to 1"),
]


def test_bottleneck_that_does_not_fit_is_refused(base, subtests):
    for options, words in UNFIT:
        with subtests.test(options), pytest.raises(InputError, match=words):
            BottleneckAdapter(**options).apply(GPT2.from_pretrained(base))
    with pytest.raises(InputError, match=r"h\.1\.mlp has an adapter of BottleneckAdapter"):
        LanguageModel(base=str(base), surgery=[BottleneckAdapter(layers=1), BottleneckAdapter("houlsby")])
    LanguageModel(base=str(base), surgery=[BottleneckAdapter(layers=1), BottleneckAdapter("houlsby", layers=0)])
