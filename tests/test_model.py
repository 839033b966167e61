"""GPT2 against transformers with the same random weights, and against single rows under padding."""

import pytest
import torch
from transformers import GPT2Config as HFConfig
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from gpt2_pl import GPT2, GPT2Config
from gpt2_pl.heads import last_token_index
from gpt2_pl.model import gather_positions

# The four published shapes scaled down (their heads and blocks), and one of odd sizes.
SHAPES = [
    {"n_embd": 24, "n_layer": 12, "n_head": 12, "vocab_size": 101},
    {"n_embd": 32, "n_layer": 24, "n_head": 16, "vocab_size": 101},
    {"n_embd": 40, "n_layer": 36, "n_head": 20, "vocab_size": 101},
    {"n_embd": 50, "n_layer": 48, "n_head": 25, "vocab_size": 101},
    {"n_embd": 39, "n_layer": 3, "n_head": 3, "vocab_size": 97, "n_positions": 23},
]


def random_hf(cls, **shape):
    torch.manual_seed(0)
    sizes = {"n_positions": 31, **shape}
    model = cls(HFConfig(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0, num_labels=5)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=97, n_positions=24, n_embd=39, n_layer=3, n_head=3, dropout=0.2)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_gpt2_hidden_states_and_logits_equal_transformers_both_ways(shape, tmp_path):
    theirs = random_hf(GPT2LMHeadModel, **shape)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT2.from_pretrained(tmp_path / "theirs").eval()
    ids = torch.randint(shape["vocab_size"], (3, 19))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs.transformer(ids).last_hidden_state, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=0)
        ours.save_pretrained(tmp_path / "ours")
        back = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
        assert torch.equal(back(ids).logits, theirs(ids).logits)


def test_gpt2_classification_logits_equal_transformers(tmp_path):
    theirs = random_hf(GPT2ForSequenceClassification, **SHAPES[-1])
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(tmp_path).eval()
    ids, mask = torch.randint(1, 97, (4, 17)), torch.ones(4, 17, dtype=torch.long)
    for row, length in enumerate((17, 5, 1, 9)):
        ids[row, length:], mask[row, length:] = 0, 0
    with torch.no_grad():
        features = ours(ids, output_positions=last_token_index(mask)).squeeze(1)
        logits = features @ theirs.score.weight.T
        torch.testing.assert_close(logits, theirs(ids, attention_mask=mask).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gpt2_padded_row_equals_the_row_alone(model, side):
    lengths, T = [1, 7, 13], 13
    ids, mask = torch.zeros(3, T, dtype=torch.long), torch.zeros(3, T, dtype=torch.long)
    places = [slice(T - n, T) if side == "left" else slice(0, n) for n in lengths]
    rows = [torch.randint(97, (n,)) for n in lengths]
    rows[1][-1] = 0  # the padding's id may end a text
    for i, (place, row) in enumerate(zip(places, rows, strict=True)):
        ids[i, place], mask[i, place] = row, 1
    with torch.no_grad():
        together = model(ids, mask)
        for i, (place, row) in enumerate(zip(places, rows, strict=True)):
            torch.testing.assert_close(together[i, place], model(row[None])[0], atol=1e-5, rtol=0)
        assert torch.isfinite(together).all()
        if side == "right":  # then the mask can be left out
            bare = model(ids)
            for i, place in enumerate(places):
                torch.testing.assert_close(bare[i, place], together[i, place], atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_gpt2_output_positions_equal_gathered_hidden_states(model, masked):
    ids = torch.randint(97, (3, 11))
    mask = torch.ones(3, 11, dtype=torch.long) if masked else None
    if mask is not None:
        mask[0, :4] = 0
    at = torch.tensor([[10, 4], [3, 3], [0, 9]])
    whole, part = model(ids, mask), model(ids, mask, output_positions=at)
    torch.testing.assert_close(part, gather_positions(whole, at), atol=1e-5, rtol=0)
    gradients = [
        torch.autograd.grad(x.square().sum(), model.h[0].attn.c_attn.weight)[0]
        for x in (gather_positions(whole, at), part)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_gpt2_dropout_is_active_only_in_training(model):
    ids = torch.randint(97, (2, 9))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_gpt2_initialisation_has_published_standard_deviations():
    model = GPT2(GPT2Config(vocab_size=500, n_embd=128, n_layer=8, n_head=4))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert not model.h[0].attn.c_attn.bias.any()


def test_gpt2_too_many_tokens_raises_value_error(model):
    with pytest.raises(ValueError, match=r"24.*25"):
        model(torch.zeros(1, 25, dtype=torch.long))


def test_gpt2_config_impossible_shape_is_refused_by_name():
    for key, value in {"n_layer": 0, "n_head": 5, "dropout": 1.0, "vocab_size": -1}.items():
        with pytest.raises(ValueError, match=f"{key}.*{value}"):
            GPT2Config(**{"n_embd": 12, "n_head": 3, key: value})
