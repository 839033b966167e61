"""LoRA, rsLoRA, DoRA and LoRA+ against peft, and invariants of the adapted model."""

import copy
import itertools

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from gpt2_pl.errors import InputError
from gpt2_pl.model import GPT2, GPT2Config
from gpt2_pl.surgery import DoRALinear, LoRA, LoRAEmbedding, LoRALinear, PrefixTuning
from gpt2_pl.surgery.lora import TARGETS

SHAPE = GPT2Config(vocab_size=50, n_positions=24, n_embd=24, n_layer=3, n_head=3, dropout=0.0)
IDS = torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(5))


def gpt2(shape=SHAPE, seed=0):
    torch.manual_seed(seed)
    return GPT2(shape).eval()


def stirred(model, seed=1):
    """Give all adapters non-zero values, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRAEmbedding):
                module.lora_A.normal_(std=0.1, generator=generator)
            if isinstance(module, LoRALinear):
                module.lora_B.normal_(std=0.2, generator=generator)
                if isinstance(module, DoRALinear):
                    module.lora_magnitude.mul_(1 + 0.2 * torch.rand(len(module.lora_magnitude), generator=generator))
    return model


def test_lora_untrained_adapter_does_not_change_hidden_states(subtests):
    for target, dora in (*itertools.product(TARGETS, [False, True]), ("wte", False)):
        with subtests.test(target, dora=dora):
            model = gpt2()
            before = model(IDS)
            LoRA(targets=[target], use_dora=dora).apply(model)
            torch.testing.assert_close(model(IDS), before, atol=1e-6 if dora else 0, rtol=0)


def test_lora_initial_a_is_uniform_and_b_is_zero():
    """``kaiming_uniform_`` with a = sqrt(5) draws A from -1 / sqrt(in) to 1 / sqrt(in)."""
    model = LoRA(rank=8, targets=["q", "v", "c_fc", "mlp.c_proj"]).apply(gpt2())
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    drawn = torch.cat([(m.lora_A * m.in_features**0.5).flatten() for m in adapters]).sort().values
    assert len(drawn) > 3000
    assert drawn.abs().max() <= 1
    torch.testing.assert_close(drawn, torch.linspace(-1, 1, len(drawn)), atol=0.08, rtol=0)
    assert not any(m.lora_B.any() for m in adapters)


OPTIONS = [
    {"targets": ["c_attn"]},
    {"targets": ["c_attn", "c_fc"], "use_rslora": True, "rank": 4},
    {"targets": ["c_proj", "mlp.c_proj", "c_fc"], "alpha": 3, "layers": "1-2"},
    {"targets": ["c_attn", "mlp.c_proj"], "use_dora": True},
    {"targets": ["c_fc"], "use_dora": True, "use_rslora": True, "layers": [0, 2]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lora_forward_and_gradients_equal_peft(options, tmp_path):
    """With equal bases and adapters, the logits and the gradients of A, B and the magnitude are equal."""
    gpt2().save_pretrained(tmp_path)
    ours = stirred(LoRA(**options).apply(GPT2.from_pretrained(tmp_path, dropout=0.0)))
    names = {"c_proj": "attn.c_proj"}
    layers = {"1-2": [1, 2]}.get(str(options.get("layers")), options.get("layers"))
    config = peft.LoraConfig(
        r=options.get("rank", 8),
        lora_alpha=options.get("alpha", 16),
        target_modules=[names.get(target, target) for target in options["targets"]],
        layers_to_transform=layers,
        layers_pattern="h" if layers else None,
        fan_in_fan_out=True,
        use_rslora=options.get("use_rslora", False),
        use_dora=options.get("use_dora", False),
    )
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path), config).eval()
    adapters = {name: module for name, module in ours.named_modules() if isinstance(module, LoRALinear)}
    pairs = []
    for name, module in theirs.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            mine = adapters.pop(name.removeprefix("base_model.model.transformer."))
            pairs += [(mine.lora_A, module.lora_A["default"].weight), (mine.lora_B, module.lora_B["default"].weight)]
            if isinstance(mine, DoRALinear):
                pairs.append((mine.lora_magnitude, module.lora_magnitude_vector["default"].weight))
    assert pairs
    assert not adapters
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    a, b = ours.logits(ours(IDS)), theirs(IDS).logits
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for logits in (a, b):
        logits.logsumexp(-1).mean().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-4)
    assert all(parameter.grad is None for name, parameter in ours.named_parameters() if name in ours.base_names)


def test_lora_query_and_value_targets_have_separate_adapters():
    model = stirred(LoRA(rank=2, targets=["v", "q"]).apply(gpt2()))
    module = model.h[1].attn.c_attn
    (A_q, A_v), (B_q, B_v) = module.lora_A.chunk(2), module.lora_B.chunk(2)
    expected = 8 * torch.cat((B_q @ A_q, torch.zeros(24, 24), B_v @ A_v))
    torch.testing.assert_close(module.delta_weight(), expected)
    x = torch.randn(5, 24)
    plain = torch.nn.functional.linear(x, module.weight + expected, module.bias)
    torch.testing.assert_close(module(x), plain, atol=1e-5, rtol=1e-5)


def test_lora_trainable_parameter_count_on_gpt2_small():
    for targets, count in ((["q", "v"], 294_912), (["c_fc", "mlp.c_proj"], 737_280), (["c_attn"], 294_912)):
        with torch.device("meta"):
            model = LoRA(rank=8, targets=targets).apply(GPT2(GPT2Config()))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count, targets


def test_lora_training_moves_b_then_a_and_never_the_base():
    """B has a gradient from the first step on, A from the second; the base never changes."""
    model = LoRA(rank=4, targets=list(set(TARGETS) - {"q", "k", "v"})).apply(gpt2()).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in model.base_names}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model.logits(model(IDS)).logsumexp(-1).mean().backward()
        for module in model.modules():
            if isinstance(module, LoRALinear):
                assert module.lora_B.grad.abs().max() > 0
                assert (module.lora_A.grad.abs().max() > 0) == (step > 0)
        optimizer.step()
    assert before.keys() == model.base_names
    assert all(torch.equal(before[name], dict(model.named_parameters())[name]) for name in before)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_merge_unmerge_and_reload_preserve_outputs(dora, tmp_path):
    targets = ["q", "v", "c_fc", *([] if dora else ["wte"])]
    model = stirred(LoRA(targets=targets, use_dora=dora).apply(gpt2()))
    unmerged, logits = model(IDS), model.logits(model(IDS))
    assert (unmerged - gpt2()(IDS)).abs().max() > 0.1
    adapted = copy.deepcopy(model.state_dict())
    LoRA.merge(model)
    merged = model(IDS)
    torch.testing.assert_close(merged, unmerged, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.logits(merged), logits, atol=1e-5, rtol=1e-5)  # the head is tied
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(GPT2.from_pretrained(tmp_path).eval()(IDS), merged, atol=0, rtol=0)
    LoRA.unmerge(model)
    assert torch.equal(model(IDS), unmerged)
    assert all(torch.equal(value, adapted[name]) for name, value in model.state_dict().items())
    other = LoRA(targets=targets, use_dora=dora).apply(gpt2(seed=9))
    other.load_state_dict(adapted)
    assert torch.equal(other(IDS), unmerged)


def test_lora_merge_leaves_no_adapter_parameters_or_operations():
    model = LoRA.merge(stirred(LoRA(dropout=0.5).apply(gpt2())))
    assert model.state_dict().keys() == model.base_names
    untouched = gpt2()
    assert [type(module) for module in model.modules()] == [type(module) for module in untouched.modules()]
    with torch.profiler.profile() as merged:
        model(IDS)
    with torch.profiler.profile() as plain:
        untouched(IDS)
    calls = [{e.key: e.count for e in p.key_averages() if e.key.startswith("aten::")} for p in (merged, plain)]
    assert calls[0] == calls[1]


def test_lora_merge_with_prefix_keeps_hidden_states():
    model = gpt2()
    PrefixTuning(3).apply(model)
    stirred(LoRA(targets=["c_attn"]).apply(model))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"prefix.table"} | {f"h.{i}.attn.c_attn.lora_{x}" for i in range(3) for x in "AB"}
    before = model(IDS)
    LoRA.merge(model)
    torch.testing.assert_close(model(IDS), before, atol=1e-5, rtol=1e-5)


def test_lora_dropout_preserves_the_mean_of_the_adapter():
    layer = stirred(LoRA(targets=["c_fc"], dropout=0.7).apply(gpt2())).h[0].mlp.c_fc
    x = torch.randn(1, 24)
    with torch.no_grad():
        kept = layer.eval()(x) - layer.affine(x, layer.bias)
        drawn = layer.train()(x.expand(20_000, -1)) - layer.affine(x, layer.bias)
    assert (drawn.mean(0) - kept).norm() < 0.05 * kept.norm()


def test_lora_dropout_affects_only_the_adapter_in_training():
    model = stirred(LoRA(dropout=0.5).apply(gpt2()))
    torch.testing.assert_close(model(IDS), model(IDS), atol=0, rtol=0)
    model.train()
    assert (model(IDS) - model(IDS)).abs().max() > 1e-3
    unadapted = LoRA(dropout=0.5).apply(gpt2()).train()
    torch.testing.assert_close(unadapted(IDS), gpt2()(IDS), atol=0, rtol=0)


UNFIT = [  # options, and the key and the value in the message
    ({"targets": ["query"]}, "target.*'query'"),
    ({"targets": []}, "targets"),
    ({"targets": "c_attn"}, "targets.*'c_attn'"),
    ({"targets": ["q", "c_attn"]}, r"attn\.c_attn twice"),
    ({"targets": ["q", "q"]}, r"attn\.c_attn twice"),
    ({"targets": ["wte"], "use_dora": True}, "use_dora.*wte"),
    ({"layers": "1-3"}, "layers.* 0 to 2"),
    ({"layers": "0-999999999"}, "layers.* 0 to 2"),
    ({"layers": "top"}, "layers.*'top'"),
    ({"layers": []}, "layers"),
    ({"rank": 0}, "rank.*got 0"),
    ({"rank": 8.5}, r"rank.*got 8\.5"),
    ({"dropout": 1.0}, r"dropout.*got 1\.0"),
    ({"alpha": 0}, "alpha.*got 0"),
    ({"loraplus_lr_ratio": -1}, "loraplus_lr_ratio.*got -1"),
]


def test_lora_options_that_do_not_fit_the_model_are_refused(subtests):
    for options, words in UNFIT:
        with subtests.test(options), pytest.raises(InputError, match=words):
            LoRA(**options).apply(gpt2())


def test_lora_second_adapter_on_one_matrix_is_refused():
    model = LoRA(targets=["q"], layers=2).apply(gpt2())
    LoRA(targets=["v"], layers="0-1").apply(model)  # other blocks
    with pytest.raises(InputError, match=r"h\.0\.attn\.c_attn has an adapter"):
        LoRA(targets=["v"]).apply(model)
    LoRA(targets=["wte"]).apply(model)
    with pytest.raises(InputError, match="wte has an adapter"):
        LoRA(targets=["wte"]).apply(model)


def test_save_pretrained_with_unmerged_lora_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"lora_A.* merge"):
        LoRA().apply(gpt2()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("qkv_slices", [["k"], ["v", "q"]])
def test_dora_on_some_qkv_slices_leaves_the_others_unchanged(qkv_slices):
    model = gpt2()
    LoRA(targets=qkv_slices, use_dora=True).apply(model)
    before = {i: block.attn.c_attn.merged()[0].detach().clone() for i, block in enumerate(model.h)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        model.logits(model(IDS)).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for i, block in enumerate(model.h):
        after = block.attn.c_attn.merged()[0].detach().chunk(3)
        for name, was, now in zip("qkv", before[i].chunk(3), after, strict=True):
            assert torch.equal(was, now) == (name not in qkv_slices), (i, name)
        assert block.attn.c_attn.lora_magnitude.numel() == len(qkv_slices) * SHAPE.n_embd
    merged = model(IDS)
    torch.testing.assert_close(LoRA.merge(model)(IDS), merged, atol=1e-5, rtol=0)


def test_lora_refused_apply_leaves_the_model_unchanged():
    model = LoRA(layers=[2]).apply(gpt2())
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(InputError, match=r"h\.2\.attn\.c_attn has an adapter of LoRA already"):
        LoRA(targets=["c_fc", "c_attn", "wte"]).apply(model)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("dora", [False, True])
def test_lora_linear_accepts_any_input_shape_device_and_dtype(dora):
    layer = (DoRALinear if dora else LoRALinear)(nn.Linear(8, 12), rank=2, scaling=2.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, 8)
    y = layer(x)
    torch.testing.assert_close(layer(x[0, 0]), y[0, 0])
    assert layer(x[:0]).shape == (0, 3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), y, rtol=0.05, atol=0.1)
        assert layer.double()(x.double()).dtype == torch.float64  # which autocast leaves alone
    assert layer.to("meta")(x.to("meta")).shape == y.shape
