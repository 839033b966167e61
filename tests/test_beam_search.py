"""Beam search against transformers, greedy decoding, exhaustive search and single rows."""

import itertools

import pytest
import torch
from test_generation import NEW, SURGERY, prompts, sharp_model, tiny_vocabulary
from transformers import GPT2LMHeadModel

from gpt2_pl import generate
from gpt2_pl.beams import beam_search

END = 7


@pytest.fixture
def model():
    """Return a small GPT-2 in which texts of different lengths end."""
    model = sharp_model()
    direction = torch.nn.functional.normalize(model.ln_f.bias.data + 1.0, dim=0)
    model.ln_f.bias.data += direction
    model.wte.weight.data[END] += direction
    return model


def texts(ids, end=END):
    """Return the tokens of each row up to its end, without padding."""
    return [row[: row.index(end) + 1] if end in row else row for row in ids.tolist()]


@pytest.mark.parametrize("surgery", SURGERY)
def test_beam_search_with_one_beam_equals_greedy(surgery, model):
    for change in SURGERY[surgery]:
        change.apply(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "table" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    ids, mask = prompts([3, 9, 1, 6])
    model.train()
    found = beam_search(model, ids, mask, num_beams=1, max_new_tokens=NEW)
    assert model.training
    assert torch.equal(found.ids[:, 0], generate(model, ids, mask, max_new_tokens=NEW, temperature=0.0))


@pytest.mark.parametrize(
    "settings",
    [
        {"length_penalty": 1.0},
        {"length_penalty": 0.0},
        {"length_penalty": 0.8, "no_repeat_ngram_size": 2},
        {"length_penalty": 2.0, "early_stopping": True},
        {"length_penalty": 0.9, "early_stopping": "never"},
        {"length_penalty": -1.0, "early_stopping": "never"},
        {"length_penalty": 0.6, "repetition_penalty": 1.5},
    ],
)
def test_beam_search_equals_transformers(settings, model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "base")
    reference = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    lengths = set()
    for seed, sizes in ((1, [6, 6, 6, 6]), (2, [3, 8, 5, 1])):
        ids, mask = prompts(sizes, seed)
        theirs = {"num_beams": 4, "do_sample": False, "eos_token_id": END, "pad_token_id": 0, **settings}
        given = mask if "repetition_penalty" not in settings else torch.ones_like(mask)  # theirs penalizes padding
        expected = reference.generate(
            ids,
            attention_mask=given,
            max_new_tokens=NEW,
            num_return_sequences=4,
            output_scores=True,
            return_dict_in_generate=True,
            **theirs,
        )
        for recorded in (False, True):  # on a CPU, the pass that a GPU records
            monkeypatch.setattr("gpt2_pl.beams.supports_cuda_graph", lambda *_, r=recorded: r)
            ours = {"num_beams": 4, "max_new_tokens": NEW, "eos_token_id": END, **settings}
            found = beam_search(model, ids, given, **ours)
            assert texts(found.ids.flatten(0, 1)) == texts(expected.sequences)
            torch.testing.assert_close(found.scores.flatten(), expected.sequences_scores, rtol=1e-4, atol=1e-4)
        lengths.update(len(text) - max(sizes) for text in texts(found.ids[:, 0]))
    assert len(lengths) > 2


@pytest.mark.parametrize("V", [4, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
def test_beam_search_with_enough_beams_equals_exhaustive_search(V, length_penalty):
    model, steps, end = tiny_vocabulary(V), 4, 2
    for parameter in model.parameters():
        parameter.data.mul_(4.0)
    prompt = [1, 3, 0]
    scores = {}
    for length in range(1, steps + 1):
        for new in itertools.product(range(V), repeat=length):
            if end in new[:-1] or (length < steps and new[-1] != end):
                continue
            ids = torch.tensor([[*prompt, *new]])
            with torch.no_grad():
                log_p = model.logits(model(ids)).log_softmax(-1)[0]
            total = sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(new))
            scores[new] = total / length**length_penalty
    best = sorted(scores, key=scores.__getitem__, reverse=True)
    K = V**steps
    found = beam_search(
        model,
        torch.tensor([prompt]),
        num_beams=K,
        max_new_tokens=steps,
        length_penalty=length_penalty,
        early_stopping="never",
        eos_token_id=end,
    )
    rows = [tuple(row[len(prompt) :]) for row in texts(found.ids[0], end)]
    assert int(found.scores.isfinite().sum()) == len(scores)  # each text once
    assert set(rows[: len(scores)]) == set(scores)
    assert rows[0] == best[0]
    expected = torch.tensor([scores[new] for new in best])
    torch.testing.assert_close(found.scores[0, : len(scores)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("surgery", SURGERY)
def test_beam_search_of_a_batch_equals_single_rows(surgery, model):
    for change in SURGERY[surgery]:
        change.apply(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "table" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    lengths = [3, 9, 1, 6]
    ids, mask = prompts(lengths)
    settings = {"num_beams": 3, "max_new_tokens": NEW, "eos_token_id": END}
    together = beam_search(model, ids, mask, **settings)
    for i, n in enumerate(lengths):
        alone = beam_search(model, ids[i : i + 1, -n:], **settings)
        new = [row[-len(row) + n :] for row in texts(alone.ids[0])]
        assert [row[max(lengths) :] for row in texts(together.ids[i])] == new
        torch.testing.assert_close(together.scores[i], alone.scores[0])
        totals = []
        for row in new:  # without a cache
            with torch.no_grad():
                text = torch.cat([ids[i, -n:], torch.tensor(row)])[None]
                log_p = model.eval().logits(model(text)).log_softmax(-1)[0]
            totals.append(sum(log_p[n - 1 + j, token].item() for j, token in enumerate(row)) / len(row))
        torch.testing.assert_close(alone.scores[0], torch.tensor(totals), rtol=1e-4, atol=1e-4)


def test_beam_search_banned_tokens_end_a_beam():
    tiny = tiny_vocabulary(4)
    found = beam_search(
        tiny, torch.tensor([[1]]), num_beams=8, max_new_tokens=10, no_repeat_ngram_size=1, pad_token_id=9
    )
    assert found.ids.shape == (1, 8, 4)  # the prompt and the three other tokens
    assert sorted(map(tuple, found.ids[0, :6].tolist())) == [(1, *p) for p in itertools.permutations((0, 2, 3))]
    assert found.scores[0].isfinite().tolist() == [True] * 6 + [False] * 2


def test_beam_search_stopping_criteria_end_beams(model):
    ids, mask = prompts([3, 9])
    stop = lambda ids, mask: (ids[:, -1] < 20) & (mask.sum(1) > 5)  # noqa: E731
    found = beam_search(model, ids, mask, num_beams=4, max_new_tokens=NEW, stopping_criteria=stop, pad_token_id=59)
    for i, n in enumerate([3, 9]):
        for row in found.ids[i, :, 9:].tolist():
            ends = [j for j, token in enumerate(row) if token < 20 and n + j + 1 > 5]
            assert set(row[ends[0] + 1 :] if ends else row[NEW:]) <= {59}


def test_beam_search_invalid_arguments_are_refused(model):
    ids, _ = prompts([7, 7])
    for settings, message in (
        ({"num_beams": 0}, "num_beams.*0"),
        ({"max_new_tokens": 0}, "max_new_tokens.*0"),
        ({"max_new_tokens": 90}, "n_positions.*96"),
        ({"length_penalty": float("nan")}, "length_penalty.*nan"),
        ({"early_stopping": "always"}, "early_stopping.*always"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size.*-1"),
    ):
        with pytest.raises(ValueError, match=message):
            beam_search(model, ids, **{"num_beams": 2, "max_new_tokens": 4, **settings})
