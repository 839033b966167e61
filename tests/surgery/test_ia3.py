"""(IA)3 against scaled activations of transformers, merging, and settings that do not fit."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2_pl.commands.export import export_hf
from gpt2_pl.errors import InputError
from gpt2_pl.model import GPT2, GPT2Config
from gpt2_pl.surgery import IA3, BitFit, LoRA, PrefixTuning, merge, unmerge
from gpt2_pl.tasks import LanguageModel

IDS = torch.randint(400, (3, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """A base whose attention depends on the queries and whose biases are not zero, unlike new weights."""
    folder = tmp_path_factory.mktemp("sharp")
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    with torch.no_grad():
        for block in model.h:
            block.attn.c_attn.weight.mul_(10)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def adapted(base, *surgery):
    """Return a GPT-2 whose vectors are not 1."""
    model = GPT2.from_pretrained(base, dropout=0.0).eval()
    for one in surgery:
        one.apply(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("ia3_l"):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


TARGETS = (["k", "v", "mlp.c_proj"], ["q"], ["v", "q"], ["c_attn"], ["mlp.c_proj"])


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_ia3_hidden_states_equal_transformers_with_scaled_activations(targets, sharp):
    """Hooks of transformers' model multiply queries, keys and values, and what follows the GELU."""
    model = adapted(sharp, IA3(targets=targets, layers=[1]))
    theirs = GPT2LMHeadModel.from_pretrained(sharp).eval()
    block, vectors = theirs.transformer.h[1], model.h[1]
    if "c_attn" in targets:
        scales = dict(zip("qkv", vectors.attn.c_attn.ia3_l.chunk(3), strict=True))
    else:
        sliced = [target for target in "qkv" if target in targets]
        scales = dict(zip(sliced, vectors.attn.c_attn.ia3_l.chunk(len(sliced)), strict=True)) if sliced else {}

    def scale_qkv(module, args, output):
        parts = dict(zip("qkv", output.chunk(3, -1), strict=True))
        return torch.cat([part * scales.get(name, 1.0) for name, part in parts.items()], -1)

    block.attn.c_attn.register_forward_hook(scale_qkv)
    if "mlp.c_proj" in targets:
        block.mlp.act.register_forward_hook(lambda module, args, output: output * vectors.mlp.c_proj.ia3_l)
    with torch.no_grad():
        ours = model.logits(model(IDS))
        torch.testing.assert_close(ours, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    plain = GPT2.from_pretrained(sharp).eval()
    assert (ours - plain.logits(plain(IDS))).abs().max() > 1e-2
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"h.1.{'mlp.c_proj' if target == 'mlp.c_proj' else 'attn.c_attn'}.ia3_l" for target in targets
    }


def test_ia3_untrained_does_not_change_hidden_states(base):
    plain = GPT2.from_pretrained(base).eval()
    for targets in TARGETS:
        model = IA3(targets=targets).apply(GPT2.from_pretrained(base).eval())
        assert torch.equal(model(IDS), plain(IDS))


def test_ia3_merge_unmerge_and_export_preserve_outputs(sharp, base, tmp_path):
    task = LanguageModel(base=str(sharp), surgery=[IA3(), LoRA(targets=["c_fc"]), PrefixTuning(3)], dropout=0.0)
    task.configure_model()
    with torch.no_grad():
        for name, parameter in task.backbone.named_parameters():
            if parameter.requires_grad and not name.startswith("prefix"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        before, state = task.backbone(IDS), {n: t.clone() for n, t in task.backbone.state_dict().items()}
        torch.testing.assert_close(merge(task.backbone)(IDS), before, atol=1e-5, rtol=1e-5)
        assert torch.equal(unmerge(task.backbone)(IDS), before)
        assert all(torch.equal(t, state[n]) for n, t in task.backbone.state_dict().items())
        task.backbone.prefix = None
        expected = task.eval().backbone(IDS)
        export_hf(task, tmp_path, base)
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval().transformer(IDS).last_hidden_state
        torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)


def test_ia3_scale_near_1_is_not_rounded_in_bfloat16(base):
    """The nearest bfloat16 number to 1.003 is 1, so that products with a rounded vector would not change."""
    model = GPT2.from_pretrained(base).eval()
    layers = [model.h[0].mlp.c_proj, IA3(targets=["mlp.c_proj"]).apply(model).h[0].mlp.c_proj]
    with torch.no_grad():
        layers[1].ia3_l.mul_(1.003)
        x = torch.linspace(0.5, 2.0, 128).bfloat16().unsqueeze(0)
        with torch.autocast("cpu", torch.bfloat16):
            plain, scaled = (layer(x) - layer.bias for layer in layers)
    assert not torch.equal(plain, scaled)


def test_ia3_parameter_count_on_gpt2_small():
    for surgery, count in ((IA3(), 55_296), (IA3(targets=["c_attn", "mlp.c_proj"]), 64_512), (IA3(layers="0-1"), 9216)):
        with torch.device("meta"):
            model = surgery.apply(GPT2(GPT2Config()))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


UNFIT = [
    ([IA3(), LoRA()], {}, r"LoRA: h\.0\.attn\.c_attn has an adapter of IA3"),
    ([LoRA(targets=["v"]), IA3()], {}, r"IA3: h\.0\.attn\.c_attn has an adapter of LoRA"),
    ([IA3(layers=0), IA3(layers="0-1")], {}, r"IA3: h\.0\.attn\.c_attn has an adapter of IA3"),
    ([IA3(layers=2)], {}, "IA3: layers.* 0 to 1"),
    ([IA3()], {"train_base": True}, r"train_base.* and IA3 both train h\.0\.attn\.c_attn\.weight"),
]


def test_ia3_that_does_not_fit_is_refused(base, subtests):
    for surgery, settings, words in UNFIT:
        with subtests.test(words), pytest.raises(InputError, match=words):
            LanguageModel(base=str(base), surgery=surgery, **settings)
    for targets in ([], "k", ["c_fc"], ["k", "k"], ["q", "c_attn"]):
        with subtests.test(targets=targets), pytest.raises(InputError, match="IA3: targets"):
            IA3(targets=targets)


def test_ia3_with_bitfit_trains_vectors_and_biases(base):
    task = LanguageModel(base=str(base), surgery=[IA3(), BitFit()])
    assert {name.rpartition(".")[2] for name in task.trained_names} == {"ia3_l", "bias"}
