"""Merging of LoRA adapters against full matrices and peft."""

import shutil

import numpy as np
import pytest
import torch
from conftest import metrics
from helpers.configs import CONFIGS
from helpers.refusals import names, refused
from peft import PeftModel
from transformers import GPT2LMHeadModel

from gpt2_pl.commands import main
from gpt2_pl.errors import InputError
from gpt2_pl.model import GPT2
from gpt2_pl.surgery import LoRA, PeftAdapter, PrefixTuning, merge, peft_format
from gpt2_pl.surgery.merging import LowRank, combine, lora_changes, merge_adapters, parse_combination

LAYERS = ("h.0.attn.c_attn", "h.1.attn.c_attn", "h.0.mlp.c_fc", "h.1.mlp.c_fc", "h.0.attn.c_proj")


def adapted(base, seed, surgery):
    """Return the base with an adapter whose trained parameters are random."""
    torch.manual_seed(seed)
    model = surgery.apply(GPT2.from_pretrained(base)) or None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in model.base_names:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Three adapters of one base in peft's format, of several ranks and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    surgeries = {
        "A": LoRA(rank=2, alpha=4, targets=["c_attn", "c_fc"]),
        "B": LoRA(rank=3, alpha=2, targets=["q", "v", "c_proj"], layers="0"),
        "C": LoRA(rank=1, alpha=8, use_rslora=True, targets=["c_attn"]),
    }
    for seed, (name, surgery) in enumerate(surgeries.items()):
        peft_format.save(adapted(base, seed, surgery), folder / name, str(base))
    return folder


def merged_weights(base, folder):
    """Return the weights of the base with an adapter merged into them."""
    return merge(PeftAdapter(str(folder)).apply(GPT2.from_pretrained(base))).state_dict()


def test_merge_equals_combination_of_full_matrices_and_peft_reads_it(
    run, base, adapters, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(adapters)
    main([str(arg) for arg in ("merge", "A + 0.5*B - C", "--out", tmp_path / "merged", "--rank=12")])
    assert "3 adapters; the rank keeps 100.00%" in capsys.readouterr().out
    plain = GPT2.from_pretrained(base).state_dict()
    each = {name: merged_weights(base, adapters / name) for name in "ABC"}
    found = merged_weights(base, tmp_path / "merged")
    for name, weight in plain.items():
        changes = {one: each[one][name] - weight for one in "ABC"}
        expected = weight + changes["A"] + 0.5 * changes["B"] - changes["C"]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-6)
        assert (name.removesuffix(".weight") in LAYERS) == (not torch.equal(found[name], weight)), name
    theirs = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), tmp_path / "merged").eval()
    ours = GPT2.from_pretrained(base)
    ours.load_state_dict(found)
    ids = torch.randint(400, (2, 11))
    torch.testing.assert_close(ours.eval().logits(ours(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_combine_equals_truncated_decomposition_of_the_full_matrix():
    generator = torch.Generator().manual_seed(0)
    parts = [
        (c, LowRank(*(torch.randn(shape, generator=generator, dtype=torch.double) for shape in ((9, r), (r, 14)))))
        for c, r in ((1.0, 3), (-0.5, 2), (2.0, 1))
    ]
    whole = sum(c * B @ A for c, (B, A) in parts)
    for rank in (1, 4, 6, 20):
        (B, A), kept, total = combine(parts, rank)
        U, S, V = np.linalg.svd(whole.numpy(), full_matrices=False)
        np.testing.assert_allclose(B @ A, (U[:, :rank] * S[:rank]) @ V[:rank], atol=1e-10)
        assert kept == pytest.approx(np.square(S[:rank]).sum())
        assert total == pytest.approx(np.square(whole.numpy()).sum())


def test_merge_of_an_adapter_minus_its_copy_is_the_base_bitwise(base, adapters, tmp_path):
    copy = shutil.copytree(adapters / "A", tmp_path / "copy of A")
    for i, expression in enumerate((f"{adapters}/A - {adapters}/A", f"{adapters}/A - '{copy}'")):
        main([str(arg) for arg in ("merge", expression, "--out", tmp_path / str(i))])
        found, plain = merged_weights(base, tmp_path / str(i)), GPT2.from_pretrained(base).state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in plain.items())


def test_merge_adapters_of_the_embedding_changes_lookup_and_head(base):
    model = adapted(base, 0, LoRA(rank=3, alpha=6, targets=["wte", "c_fc"]))
    plain = GPT2.from_pretrained(base)
    assert merge_adapters(plain, [(0.5, lora_changes(model, "A")), (0.5, lora_changes(model, "A"))]) == pytest.approx(1)
    torch.testing.assert_close(plain.wte.merged()[0], model.wte.merged()[0], rtol=0, atol=1e-6)
    assert not any(parameter.requires_grad for name, parameter in plain.named_parameters() if name in plain.base_names)


def test_merge_of_a_run_with_its_head_scores_as_the_run(run, base, data_flags, tmp_path):
    args = ["fit", f"--config={CONFIGS}/task/imdb.yaml", f"--model.base={base}", *data_flags, "--data.max_length=48"]
    lora = ["--config=strategy/lora", "--trainer.max_epochs=1", "--model.optimizer.init_args.lr=0.01"]
    folder = run(*args, *lora, "--trainer.precision=32-true")
    main([str(arg) for arg in ("merge", str(folder), "--head", folder, "--out", tmp_path / "merged")])
    surgery = f"[{{class_path: gpt2_pl.surgery.PeftAdapter, init_args: {{folder: {tmp_path / 'merged'}}}}}]"
    scored = run("fit", "--config", folder / "config.yaml", f"--model.surgery={surgery}", "--trainer.max_epochs=0",
                 "--name=merged", "--version=null")  # fmt: skip
    ours, theirs = metrics(scored)["scores"], metrics(folder)["scores"]
    assert ours["test/accuracy"] == theirs["test/accuracy"]
    assert ours["test/loss"] == pytest.approx(theirs["test/loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("A", [(1, "A")]),
        ("- A + 2 * b-c/v_1", [(-1, "A"), (2, "b-c/v_1")]),
        ("1e-1*A - .5*B + 2.*A", [(2.1, "A"), (-0.5, "B")]),
        ("'a b' - \"c + d\"", [(1, "a b"), (-1, "c + d")]),
    ],
)
def test_parse_combination_gives_coefficients_and_names(text, terms):
    parsed = parse_combination(text)
    assert [term.adapter for term in parsed] == [name for _, name in terms]
    assert [term.coefficient for term in parsed] == pytest.approx([coefficient for coefficient, _ in terms])


@pytest.mark.parametrize(
    "text", ["", "+", "A +", "A B", "A + + B", "0.5*", "x*A", "nan*A", "1e9*A", "A + 'b", "__import__('os')*A", "2*3*A"]
)
def test_parse_combination_refuses_other_texts_in_one_line(text):
    with pytest.raises(InputError, match="EXPRESSION") as error:
        parse_combination(text)
    assert "\n" not in str(error.value)


def test_merge_refuses_other_bases_kinds_and_heads(run, base, adapters, capsys, tmp_path):
    torch.manual_seed(5)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    GPT2(GPT2.from_pretrained(base).config).save_pretrained(other)
    peft_format.save(adapted(other, 0, LoRA(rank=2)), tmp_path / "D", str(other))
    peft_format.save(adapted(base, 0, PrefixTuning(length=3)), tmp_path / "P", str(base))
    peft_format.save(adapted(base, 0, LoRA(rank=2, use_dora=True)), tmp_path / "DoRA", str(base))
    A, out = adapters / "A", f"--out={tmp_path / 'out'}"
    assert "different bases" in refused(run, capsys, "merge", f"{A} + {tmp_path}/D", out)
    for name, part in (("P", "prefix"), ("DoRA", "lora_magnitude")):
        error = refused(run, capsys, "merge", f"{A} + {tmp_path / name}", out)
        assert part in error
        assert "only LoRA" in error
    assert names(refused(run, capsys, "merge", f"{A}", out, "--rank=0"), "rank")
    assert names(refused(run, capsys, "merge", f"{A}", out, f"--head={A}"), "head")
    assert names(refused(run, capsys, "merge", f"{A}", out, "--head=B"), "head")
    assert names(refused(run, capsys, "merge", f"{tmp_path}/missing", out), "RUN")
    assert names(refused(run, capsys, "merge", f"{A}", f"--out={A}"), "out")
    assert not (tmp_path / "out").exists()
