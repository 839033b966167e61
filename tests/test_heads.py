"""Pooling, heads and their losses against loops over single rows."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from gpt2_pl import GPT2
from gpt2_pl.heads import ClassificationHead, Verbalizer, classification_loss, last_token_index, pool


def padded(rows, T, side):
    hidden, mask = torch.full((len(rows), T, rows[0].size(1)), 1e6), torch.zeros(len(rows), T, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        hidden[i, place], mask[i, place] = row, 1
    return hidden, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("T", [9, 14])
def test_pool_left_or_right_padding_equals_loop_over_rows(side, T):
    rows = [torch.randn(n, 6) for n in (9, 1, 4)]
    hidden, mask = padded(rows, T, side)
    expected = {
        "last": [row[-1] for row in rows],
        "mean": [row.mean(0) for row in rows],
        "max": [row.max(0).values for row in rows],
        "mix": [0.7 * row.mean(0) + 0.3 * row[-1] for row in rows],
        "concat": [torch.cat([row[-1], row.max(0).values, row.mean(0)]) for row in rows],
    }
    for pooling, vectors in expected.items():
        torch.testing.assert_close(pool(hidden, mask, pooling), torch.stack(vectors))
    with pytest.raises(ValueError, match="'first'"):
        pool(hidden, mask, "first")


def test_pool_single_token_last_mean_and_max_are_equal():
    hidden, mask = padded([torch.randn(1, 5)], 4, "right")
    assert len({tuple(pool(hidden, mask, p)[0].tolist()) for p in ("last", "mean", "max")}) == 1


@pytest.mark.parametrize("average", ["loss", "logits"])
def test_classification_head_multi_sample_dropout_loss_equals_formula(average):
    head = ClassificationHead(8, 3, dropout=0.5, num_dropout_samples=4)
    features, labels = torch.randn(6, 8), torch.randint(3, (6,))
    logits = head(features)
    assert logits.shape == (4, 6, 3)
    assert not torch.equal(logits[0], logits[1])
    losses = classification_loss(logits, labels, 0.1, average)
    if average == "loss":
        expected = sum(F.cross_entropy(z, labels, label_smoothing=0.1, reduction="none") for z in logits) / 4
    else:
        expected = F.cross_entropy(logits.mean(0), labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(losses, expected)
    head.eval()
    torch.testing.assert_close(head(features), head.linear(features).unsqueeze(0))


def test_verbalizer_logits_equal_the_language_model(base):
    ours, theirs = GPT2.from_pretrained(base).eval(), GPT2LMHeadModel.from_pretrained(base).eval()
    ids, mask = torch.randint(400, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:], mask[2, 1:] = 0, 0
    head = Verbalizer([7, 300])
    with torch.no_grad():
        logits = head(ours(ids, output_positions=last_token_index(mask)).squeeze(1), ours.wte.weight)
        for i in range(3):
            expected = theirs(ids[i : i + 1, : mask[i].sum()]).logits[0, -1, [7, 300]]
            torch.testing.assert_close(logits[0, i], expected, atol=1e-5, rtol=0)
