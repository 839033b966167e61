"""Generation against transformers, peft, full passes without a cache, single rows."""

import copy

import pytest
import torch
from conftest import peft_puts_virtual_tokens
from torch._dynamo.utils import counters
from transformers import GPT2LMHeadModel

from gpt2_pl import GPT2, GPT2Config, beam_search, decoding, generate, generation
from gpt2_pl.surgery import LoRA, PrefixTuning, PromptTuning
from gpt2_pl.text.poems import LineLengthProcessor, MaxLinesCriteria, split_lines
from gpt2_pl.text.tokenizer import load_tokenizer

SHAPE = GPT2Config(vocab_size=60, n_positions=96, n_embd=32, n_layer=3, n_head=4, dropout=0.1)
NEW = 36  # long enough for weights to be packed


def sharp_model():
    """Return a small GPT-2 with random weights whose probabilities are far from uniform."""
    torch.manual_seed(0)
    model = GPT2(SHAPE)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return model


@pytest.fixture
def model():
    return sharp_model()


def prompts(lengths, seed=1):
    """Return the ids and the mask of random prompts padded on the left."""
    generator, T = torch.Generator().manual_seed(seed), max(lengths)
    ids, mask = torch.zeros(len(lengths), T, dtype=torch.long), torch.zeros(len(lengths), T, dtype=torch.long)
    for i, n in enumerate(lengths):
        ids[i, T - n :] = torch.randint(1, 60, (n,), generator=generator)
        mask[i, T - n :] = 1
    return ids, mask


def without_cache(model, ids, mask):
    model.eval()
    for _ in range(NEW):
        with torch.no_grad():
            logits = model.logits(model(ids, mask)[:, -1])
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
    return ids


SURGERY = {
    "plain": [],
    "prefix": [PrefixTuning(length=5)],
    "prompt": [PromptTuning(length=4)],
    "lora": [LoRA(rank=4, targets=["c_attn", "mlp.c_proj"])],
    "all": [LoRA(rank=2, targets=["q", "v"]), PrefixTuning(length=3), PromptTuning(length=2)],
}


@pytest.mark.parametrize("surgery", SURGERY)
def test_generate_greedy_with_cache_equals_full_passes(surgery, model, monkeypatch):
    for change in SURGERY[surgery]:
        change.apply(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "table" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    for lengths in ([7, 7], [3, 9, 1, 6]):
        ids, mask = prompts(lengths)
        given = mask if len(set(lengths)) > 1 else None
        expected = without_cache(model, ids, mask)
        for recorded in (False, True):  # on a CPU, the pass that a GPU records
            monkeypatch.setattr("gpt2_pl.generation.supports_cuda_graph", lambda *_, recorded=recorded: recorded)
            model.train()
            found = generate(model, ids, given, max_new_tokens=NEW, temperature=0.0)
            assert model.training
            assert torch.equal(found, expected), (lengths, recorded)
        assert len(set(found[:, -NEW:].flatten().tolist())) > 5
    if surgery == "lora":
        LoRA.merge(model)
        assert torch.equal(generate(model, ids, given, max_new_tokens=NEW, temperature=0.0), found)


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_generate_greedy_with_adapters_equals_peft(kind, model, tmp_path):
    if kind != "lora":
        peft_puts_virtual_tokens()
    import peft

    from gpt2_pl.surgery.peft_format import save

    model.save_pretrained(tmp_path / "base")
    for change in SURGERY[kind]:
        change.apply(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "table" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save(model, tmp_path / "adapter", str(tmp_path / "base"))
    reference = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    ids, mask = prompts([6, 6])
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = reference.eval().generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(generate(model, ids, max_new_tokens=NEW, temperature=0.0), expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
        ({"eos_token_id": 7, "pad_token_id": 0}, {"eos_token_id": 7}),
    ],
)
def test_generate_greedy_equals_transformers(ours, theirs, model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    reference = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    ids, mask = prompts([8, 8, 8] if ours else [3, 8, 5])
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **theirs}
    expected = reference.generate(ids, attention_mask=mask, **settings)
    found = generate(model, ids, mask, max_new_tokens=NEW, temperature=0.0, **ours)
    assert torch.equal(found, expected)


def test_generate_right_padded_prompts_equal_left_padded(model):
    ids, mask = prompts([3, 9, 1, 6])
    right = torch.zeros_like(ids)
    for i, n in enumerate(mask.sum(1).tolist()):
        right[i, :n] = ids[i, -n:]
    expected = generate(model, ids, mask, max_new_tokens=NEW, temperature=0.0)
    assert torch.equal(generate(model, right, mask.flip(1), max_new_tokens=NEW, temperature=0.0), expected)


def test_generate_samples_follow_the_softmax_probabilities(model):
    ids, _ = prompts([5])
    n = 4000
    found = generate(model, ids.expand(n, -1), max_new_tokens=1, temperature=1.3, seed=range(n))[:, -1]
    with torch.no_grad():
        expected = (model.logits(model.eval()(ids)[0, -1]) / 1.3).softmax(-1)
    share = torch.bincount(found, minlength=60) / n
    assert (share - expected).abs().max() < 4 * (0.25 / n) ** 0.5
    assert (expected > 0.02).sum() > 2


def test_generate_same_seed_gives_same_text_in_any_batch(model):
    lengths = [3, 9, 1, 6]
    ids, mask = prompts(lengths)
    seeds = [5, 6, 7, 8]
    settings = {"max_new_tokens": NEW, "top_p": 0.9}
    together = generate(model, ids, mask, seed=seeds, **settings)
    for i, n in enumerate(lengths):
        alone = generate(model, ids[i : i + 1, -n:], seed=seeds[i], **settings)
        assert torch.equal(alone[0, -NEW:], together[i, -NEW:])
    assert torch.equal(generate(model, ids, mask, seed=seeds, **settings), together)
    assert not torch.equal(generate(model, ids, mask, seed=4, **settings), together)


def test_generate_rows_stop_independently_at_end_of_text(model):
    ids, _ = prompts([4, 4, 4, 4])
    free = generate(model, ids, max_new_tokens=NEW, temperature=0.0)
    end = int(free[0, 4 + 6])
    found = generate(model, ids, max_new_tokens=NEW, temperature=0.0, eos_token_id=end, pad_token_id=59)
    for whole, row in zip(free.tolist(), found.tolist(), strict=True):
        new = whole[4:]
        expected = new[: new.index(end) + 1] if end in new else new
        assert row[4 : 4 + len(expected)] == expected
        assert set(row[4 + len(expected) :]) <= {59}


@pytest.mark.parametrize("settings", [
    {"temperature": 0.0}, {"seed": 3}, {"seed": [3, 4, 5], "top_p": 0.9}, {"seed": 5, "top_k": 7, "top_p": 0.8},
    {"seed": 3, "repetition_penalty": 1.3}, {"seed": 3, "no_repeat_ngram_size": 1},
], ids=str)  # fmt: skip
def test_generate_on_a_gpu_chooses_from_a_graph_and_asks_rarely_whether_rows_ended(settings, model, monkeypatch):
    """The tensors that a GPU uses, without capturing them, and steps after the end of all rows, give the same texts."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [1, 2, 3]])
    plain = generate(model, ids, max_new_tokens=30, **settings)
    ends = plain[:, [9, 4, 11]].diagonal().tolist()
    for end in ends:
        expected = generate(model, ids, max_new_tokens=30, eos_token_id=end, **settings)
        with monkeypatch.context() as patch:
            patch.setitem(generation.CHECK_INTERVAL, "cpu", 8)
            patch.setattr(generation, "supports_cuda_graph", lambda *_: True)
            assert torch.equal(generate(model, ids, max_new_tokens=30, eos_token_id=end, **settings), expected)

    def stop(ids, mask):
        return mask.sum(1) > torch.tensor([8, 9, 10])  # all rows end early

    expected = generate(model, ids, max_new_tokens=30, stopping_criteria=stop, **settings)
    assert expected.size(1) == 11
    monkeypatch.setitem(generation.CHECK_INTERVAL, "cpu", 8)
    assert torch.equal(generate(model, ids, max_new_tokens=30, stopping_criteria=stop, **settings), expected)


def test_generate_invalid_arguments_are_refused(model):
    ids, _ = prompts([7, 7])
    for settings, message in (
        ({"temperature": -1.0}, "temperature.*-1.0"),
        ({"top_p": 0.0}, r"top_p.*0\.0"),
        ({"top_k": 0}, "top_k.*0"),
        ({"max_new_tokens": 0}, "max_new_tokens.*0"),
        ({"max_new_tokens": 90}, "n_positions.*96"),
        ({"seed": [1, 2, 3]}, "seed.*3"),
        ({"attention_mask": torch.tensor([[0] * 7, [1] * 7])}, "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, ids, **{"max_new_tokens": 4, **settings})


# Verse


def test_generate_with_line_length_processor_ends_lines_and_poem(base):
    tokenizer = load_tokenizer(base)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=400, n_positions=700, n_embd=16, n_layer=1, n_head=2))
    prompt = tokenizer.encode("a fine film\nnot so fine a film\nthe camera is cold\n").ids
    settings = {"max_new_tokens": 650, "temperature": 0.7, "seed": 3, "stopping_criteria": MaxLinesCriteria(tokenizer)}
    guide = LineLengthProcessor(tokenizer, 400, line_length=30, strength=20.0)
    guided = generate(model, torch.tensor([prompt]), logits_processors=[guide], **settings)[0].tolist()
    text = tokenizer.decode(guided, skip_special_tokens=False)
    assert text.count("\n") == 14
    assert len(text.split("\n")) == 15
    assert all(12 <= len(line) <= 60 for line in text.split("\n")[3:-1])
    free = tokenizer.decode(generate(model, torch.tensor([prompt]), **settings)[0].tolist(), skip_special_tokens=False)
    assert max(map(len, free.split("\n")[3:])) > 60 or free.count("\n") < 14


def test_line_length_processor_bonus_depends_on_characters_since_newline(base):
    tokenizer = load_tokenizer(base)
    guide = LineLengthProcessor(tokenizer, line_length=10, strength=1.0, shortest=5)
    end = tokenizer.encode("\n").ids[0]
    rows = [tokenizer.encode(text).ids for text in ("ab\nabc", "ab\n0123456789" + "x" * 20, "0123456\n01234567")]
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
    bonus = guide(torch.zeros(3, 400), ids, mask)
    assert bonus[0, end] == -torch.inf  # three characters
    assert bonus[1, end] == pytest.approx(2.0)  # thirty
    assert bonus[2, end] == 0.0  # eight
    comma, letter = tokenizer.encode(",").ids[0], tokenizer.encode("a").ids[0]
    assert bonus[1, comma] == pytest.approx(1.0)
    assert bonus[1, letter] == 0.0


def test_split_lines_blank_lines_and_end_of_text_are_dropped():
    assert split_lines("one\n\n  two \r\nthree<|endoftext|>four\n") == ["one", "two", "three"]
    assert len(split_lines("a\n" * 20)) == 14
    assert split_lines("one\rtwo\x0cthree\u2028four") == ["one", "two", "three", "four"]  # as they are read from a file


def test_continue_prompts_context_limit_of_a_row_does_not_change_others(base):
    from gpt2_pl.tasks import LanguageModel

    task = LanguageModel(base=str(base))
    task.configure_model()
    tokenizer = load_tokenizer(base)
    prompts = [tokenizer.encode("a film").ids, tokenizer.encode("the plot is boring and " * 9).ids[:58], [5, 6, 7]]
    write = lambda p, s: task.continue_prompts(tokenizer, p, s, 40, top_p=0.9)  # noqa: E731
    together = write(prompts, [1, 2, 3])
    assert together == [write([prompt], [seed])[0] for seed, prompt in enumerate(prompts, start=1)]
    assert len(together[1]) <= 6 < len(together[0])


def test_generate_vocabulary_larger_than_tokenizer_works(base):
    tokenizer = load_tokenizer(base)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=450, n_positions=200, n_embd=16, n_layer=1, n_head=2))
    prompt = torch.tensor([tokenizer.encode("a fine film\n").ids])
    settings = {
        "logits_processors": [LineLengthProcessor(tokenizer, 450)],
        "stopping_criteria": MaxLinesCriteria(tokenizer, 450),
    }
    found = generate(model, prompt, max_new_tokens=120, seed=1, **settings)
    assert found.size(1) > prompt.size(1)


def test_max_lines_criteria_blank_lines_are_not_counted(base):
    tokenizer = load_tokenizer(base)
    limit = MaxLinesCriteria(tokenizer, n_lines=3)
    for text, ended in (
        ("a\nb\n\n\n", False),
        ("a\n \nb\n", False),
        ("a\nb\nc", False),
        ("a\nb\nc\n", True),
        ("\n\n\n\n", False),
        ("\na\n\nb\n\nc\n", True),
    ):
        ids = torch.tensor([tokenizer.encode(text).ids])
        padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1)
        mask = torch.tensor([[0, 0] + [1] * ids.size(1)])
        assert bool(limit(padded, mask)) == ended == (len(split_lines(text)) == 3 and text.endswith("\n")), text


def test_generate_in_bfloat16_completes(model):
    ids, mask = prompts([3, 9, 1, 6])
    low = generate(copy.deepcopy(model).bfloat16(), ids, mask, max_new_tokens=NEW, top_p=0.9, seed=1)
    assert low.shape == (4, 9 + NEW)


def test_generate_and_beam_search_compiled_texts_equal_plain(model, monkeypatch):
    """Without code generation, which would take most of the time; both decode four rows with the same graph."""
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(decoding._decode_logits, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(decoding, "_compiled_logits", lambda: step)
    settings = {"max_new_tokens": NEW, "eos_token_id": 7}
    plain, compiled = (
        [
            generate(model, *prompts([3, 9, 1, 6]), **settings, top_p=0.9, seed=1, compiled=given),
            beam_search(model, *prompts([3, 9]), **settings, num_beams=2, compiled=given).ids,
        ]
        for given in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
    assert counters["stats"]["unique_graphs"] == 1


def test_generate_output_can_be_trained_on(model):
    ids, mask = prompts([3, 9])
    text = generate(model, ids, mask, max_new_tokens=NEW, seed=0)
    assert not text.is_inference()
    model.logits(model(text)).mean().backward()
    assert model.wte.weight.grad is not None


WAYS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"seed": 1},
    "top-k": {"seed": 1, "top_k": 2},
    "top-p": {"seed": 1, "top_p": 0.9},
    "both": {"seed": 1, "top_k": 3, "top_p": 0.5, "temperature": 1e-9},
    "penalty": {"seed": 1, "repetition_penalty": 1e9, "temperature": 1e-9},
    "greedy penalty": {"temperature": 0.0, "repetition_penalty": 3.0},
}


def tiny_vocabulary(V):
    torch.manual_seed(0)
    return GPT2(GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()


@pytest.mark.parametrize("way", WAYS)
def test_generate_every_token_repeats_an_ngram_ends_the_row(way):
    V, pad = 3, 3
    model, prompts = tiny_vocabulary(V + 1), [[1], [0, 2], [2, 2, 1, 0]]
    ban_pad = lambda logits, sofar, text: logits.index_fill(1, torch.tensor([pad]), -torch.inf)  # noqa: E731
    for n in (1, 2, 3):
        settings = {
            "max_new_tokens": 50,
            "no_repeat_ngram_size": n,
            "pad_token_id": pad,
            "logits_processors": [ban_pad],
            **WAYS[way],
        }
        alone = [generate(model, torch.tensor([prompt]), **settings)[0].tolist() for prompt in prompts]
        for prompt, text in zip(prompts, alone, strict=True):
            grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
            assert text[: len(prompt)] == prompt
            assert pad not in text
            assert len(text) < len(prompt) + 50
            repeated = len(text) - n + 1 - len(grams)
            assert repeated == (n == 1 and prompt == [2, 2, 1, 0])  # the prompt's own
            assert all((*text[len(text) - n + 1 :], token) in grams for token in range(V))  # whatever came next
        T = max(map(len, prompts))
        ids = torch.tensor([[pad] * (T - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        together = generate(model, ids, mask, **settings)[:, T:].tolist()
        for prompt, text, row in zip(prompts, alone, together, strict=True):
            new = text[len(prompt) :]
            assert row == new + [pad] * (len(row) - len(new)), (n, prompt)


def test_generate_all_tokens_banned_after_prompt_adds_no_token():
    prompt = torch.tensor([[0, 1, 2], [2, 1, 0]])
    assert torch.equal(generate(tiny_vocabulary(3), prompt, max_new_tokens=5, no_repeat_ngram_size=1), prompt)


@pytest.mark.parametrize("way", WAYS)
def test_generate_processor_bans_all_tokens_of_a_row_ends_that_row(way, model):
    ids, _ = prompts([5, 5])
    eos, pad = 7, 8

    def ban(logits, sofar, text):  # the end of text always, and everything once the first row has eight tokens
        logits = logits.clone()
        logits[:, eos] = -torch.inf
        logits[:1] = logits[:1] if sofar.size(1) < 8 else -torch.inf
        return logits

    settings = {"max_new_tokens": 12, "eos_token_id": eos, "pad_token_id": pad, **WAYS[way]}
    found = generate(model, ids, logits_processors=[ban], **settings)
    assert found.size(1) == 5 + 12
    assert found[0, 8:].tolist() == [pad] * 9
    assert eos not in found[:, 5:]
    assert torch.equal(generate(model, ids[:1], logits_processors=[ban], **settings), found[:1, :8])
    one = lambda logits, sofar, text: torch.full_like(logits, -torch.inf).index_fill(1, torch.tensor([eos]), -1e30)  # noqa: E731
    assert generate(model, ids, logits_processors=[one], **settings)[:, 5:].tolist() == [[eos]] * 2
