"""Prefix and prompt tuning against real tokens and peft, under padding and with the cache."""

import peft
import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2_pl.errors import InputError
from gpt2_pl.heads import last_token_index, pool
from gpt2_pl.kv_cache import KVCache
from gpt2_pl.model import GPT2, GPT2Config, gather_positions
from gpt2_pl.surgery import LoRA, PrefixTuning, PromptTuning
from gpt2_pl.text.tokenizer import load_tokenizer

SHAPE = GPT2Config(vocab_size=50, n_positions=24, n_embd=24, n_layer=3, n_head=3, dropout=0.0)
IDS = torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[0, 7:] = 0  # padding on the right
MASK[1, :4] = 0  # and on the left
CASES = {
    "none": (),
    "prefix": (PrefixTuning(4),),
    "network": (PrefixTuning(4, hidden=7),),
    "prompt": (PromptTuning(5),),
    "both": (PrefixTuning(3), PromptTuning(2)),
    "prompt and LoRA": (PromptTuning(5), LoRA(targets=["c_attn", "c_fc"])),
}


def gpt2(*surgery):
    torch.manual_seed(0)
    model = GPT2(SHAPE).eval()
    for operation in surgery:
        operation.apply(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture
def every_model(subtests):
    """Call a function with each model, its name being that of a subtest."""

    def call(check, *args):
        for name, surgery in CASES.items():
            with subtests.test(name, args=args), torch.no_grad():
                check(gpt2(*surgery), *args)

    return call


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_virtual_tokens_padded_row_equals_the_row_alone(every_model):
    def check(model):
        hidden = model(IDS, MASK)
        assert hidden.shape == (3, 11, 24)
        close(hidden[0, :7], model(IDS[:1, :7])[0])
        close(hidden[1, 4:], model(IDS[1:2, 4:])[0])
        close(hidden[2], model(IDS[2:])[0])

    every_model(check)


def test_virtual_tokens_right_padding_without_mask_equals_masked(every_model):
    every_model(lambda model: close(model(IDS)[0, :7], model(IDS, MASK)[0, :7]))


def test_pool_with_virtual_tokens_ignores_them(every_model):
    def check(model, pooling):
        whole = pool(model(IDS, MASK), MASK, pooling)
        for n, text in ((0, slice(0, 7)), (1, slice(4, 11)), (2, slice(0, 11))):
            close(whole[n : n + 1], pool(model(IDS[n : n + 1, text]), MASK[n : n + 1, text], pooling))

    for pooling in ("last", "mean", "max", "concat"):
        every_model(check, pooling)


def test_virtual_tokens_output_positions_equal_gathered_hidden_states(every_model):
    at, last = torch.tensor([[6, 0], [10, 4], [3, 3]]), last_token_index(MASK)

    def check(model):
        close(model(IDS, MASK, output_positions=at), gather_positions(model(IDS, MASK), at))
        close(model(IDS, output_positions=last)[::2], gather_positions(model(IDS), last)[::2])

    every_model(check)


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_kv_cache_text_read_in_pieces_equals_one_pass(every_model, mask):
    def check(model):
        cache = KVCache(3, 24)
        pieces, start = [], 0
        for end in (5, 6, 7, 11):
            pieces.append(model(IDS[:, start:end], None if mask is None else mask[:, :end], cache=cache))
            start = end
        text = torch.ones_like(IDS) if mask is None else mask
        difference = (torch.cat(pieces, 1) - model(IDS, mask)) * text.unsqueeze(-1)
        assert difference.abs().max() < 1e-5
        assert cache.length == 11 + model.n_virtual

    every_model(check)


def test_kv_cache_overflow_with_virtual_tokens_is_refused(every_model):
    def check(model):
        cache = KVCache(3, 8 + model.n_virtual)
        model(IDS[:, :8], cache=cache)
        with pytest.raises(ValueError, match="cache"):
            model(IDS[:, 8:9], cache=cache)

    every_model(check)


def test_virtual_tokens_count_against_n_positions(every_model):
    def check(model):
        room = 24 - model.n_virtual
        assert model(torch.zeros(1, room, dtype=torch.long)).shape == (1, room, 24)
        with pytest.raises(ValueError, match=r"n_positions.* got 25"):
            model(torch.zeros(1, room + 1, dtype=torch.long))

    every_model(check)


TEXT = "not a funny story"


@pytest.mark.parametrize("cls", [PromptTuning, PrefixTuning])
def test_virtual_tokens_init_text_equals_prepended_tokens(cls, base):
    tokens = torch.tensor([load_tokenizer(base).encode(TEXT).ids])
    n = tokens.size(1)
    words, soft = GPT2.from_pretrained(base).eval(), GPT2.from_pretrained(base).eval()
    cls(length=n, init_text=TEXT).apply(soft)
    close(soft(IDS), words(torch.cat((tokens.expand(3, -1), IDS), 1))[:, n:])


def test_prefix_tuning_zero_table_still_changes_hidden_states():
    model = gpt2(PrefixTuning(4))
    with torch.no_grad():
        model.prefix.table.zero_()
    assert (model(IDS) - gpt2()(IDS)).abs().max() > 1e-3


def adapted_by_peft(folder, config):
    return peft.get_peft_model(GPT2LMHeadModel.from_pretrained(folder), config).eval()


@pytest.mark.parametrize("hidden", [None, 7])
def test_prefix_tuning_forward_and_gradients_equal_peft(hidden, tmp_path):
    gpt2().save_pretrained(tmp_path)
    ours = PrefixTuning(4, hidden=hidden).apply(GPT2.from_pretrained(tmp_path, dropout=0.0).eval())
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=4, task_type="CAUSAL_LM", prefix_projection=hidden is not None, encoder_hidden_size=hidden
    )
    theirs = adapted_by_peft(tmp_path, config)
    encoder = theirs.prompt_encoder["default"]
    if hidden is None:
        pairs = [(ours.prefix.table, encoder.embedding.weight)]
    else:
        pairs = [(ours.prefix.embedding, encoder.embedding.weight)]
        pairs += list(zip(ours.prefix.network.parameters(), encoder.transform.parameters(), strict=True))
    compare_with_peft(ours, theirs, pairs)


def test_prompt_tuning_forward_and_gradients_equal_peft(tmp_path):
    gpt2().save_pretrained(tmp_path)
    ours = PromptTuning(5).apply(GPT2.from_pretrained(tmp_path, dropout=0.0).eval())
    theirs = adapted_by_peft(tmp_path, peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    compare_with_peft(ours, theirs, [(ours.prompt.embedding, theirs.prompt_encoder["default"].embedding.weight)])


def compare_with_peft(ours, theirs, pairs):
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    a, b = ours.logits(ours(IDS)), theirs(IDS).logits[:, -IDS.size(1) :]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for logits in (a, b):
        logits.logsumexp(-1).mean().backward()
    for mine, other in pairs:
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for name, p in ours.named_parameters() if name in ours.base_names)


def test_prompt_tuning_with_zero_lora_equals_prompt_alone():
    """With B = 0, LoRA and a prompt give the hidden states of the prompt alone."""
    alone = gpt2(PromptTuning(5))
    both = gpt2(PromptTuning(5), LoRA(targets=["c_fc"]))
    with torch.no_grad():
        for module in both.modules():
            if hasattr(module, "lora_B"):
                module.lora_B.zero_()
    torch.testing.assert_close(both(IDS), alone(IDS), atol=0, rtol=0)


def test_prefix_tuning_trainable_parameter_count_on_gpt2_small():
    with torch.device("meta"):
        model = PrefixTuning(10).apply(GPT2(GPT2Config()))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 184_320


UNFIT = [
    ([PrefixTuning(24)], "length.* 23 .*got 24"),
    ([PromptTuning(0)], "length.*got 0"),
    ([PromptTuning(20), PrefixTuning(4)], "length.* 3 .*got 4"),
    ([PromptTuning(2), PromptTuning(2)], "PromptTuning"),
    ([PrefixTuning(2), PrefixTuning(2)], "PrefixTuning"),
    ([PromptTuning(2, init_text="words")], "init_text"),
]


def test_virtual_tokens_that_do_not_fit_the_model_are_refused(subtests):
    for surgery, words in UNFIT:
        with subtests.test(surgery), pytest.raises(InputError, match=words):
            gpt2(*surgery)
    for hidden, text in ((8, "words"), (0, None)):
        with subtests.test(hidden=hidden), pytest.raises(InputError, match="hidden"):
            PrefixTuning(hidden=hidden, init_text=text)
