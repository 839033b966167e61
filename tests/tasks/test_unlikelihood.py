"""Unlikelihood losses against triple loops, finite differences and cross-entropy, in one piece and in chunks."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.trainers import trainer
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2LMHeadModel

from gpt2_pl import GPT2, GPT2Config, losses
from gpt2_pl.datamodules import TextCorpus
from gpt2_pl.losses import (
    IGNORE_INDEX,
    cross_entropy,
    repeated_ngrams,
    sequence_unlikelihood_loss,
    unlikelihood_cross_entropy,
    unlikelihood_loss,
)
from gpt2_pl.surgery import LoRA, PrefixTuning, PromptTuning
from gpt2_pl.tasks import LanguageModel
from gpt2_pl.tasks.dpo import sequence_log_probs
from gpt2_pl.text.tokenizer import load_tokenizer

V = 9


def brute_force(logits, rows, predicted, alpha, ignored=(), window=None):
    """Return the mean loss of rows x_1 .. x_(T+1) (B, T + 1) over their predicted tokens x_2 .. x_(T+1) (B, T)."""
    total, n = 0.0, 0
    for scores, row, wanted in zip(logits, rows.tolist(), predicted.tolist(), strict=True):
        for t in range(1, len(row)):  # x_(t+1) is row[t]
            if not wanted[t - 1]:
                continue
            p = scores[t - 1].softmax(-1).tolist()
            total -= math.log(p[row[t]])
            past = row[:t] if window is None else row[:t][-window:]
            for c in set(past) - {row[t], *ignored}:
                total -= alpha * math.log(max(1.0 - p[c], 1e-5))
            n += 1
    return total / n


def random_rows(seed, B=3, T=11):
    """Return rows (B, T + 1) with padding at the end, and tokens at the start or within that are not predicted."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, V, (B, T + 1), generator=generator)
    predicted = torch.ones(B, T, dtype=torch.bool)
    predicted[0, -3:], predicted[1, :2], predicted[2, 5] = False, False, False
    return rows, predicted, rows[:, 1:].masked_fill(~predicted, IGNORE_INDEX), generator


def random_text(seed, B=3, T=11):
    """Return the targets of random rows and the generator."""
    return random_rows(seed, B, T)[2:]


SETTINGS = [{}, {"window": 3}, {"ignore_token_ids": (1, 4)}, {"alpha": 0.3, "window": 1}]


def test_unlikelihood_losses_equal_a_triple_loop(subtests):
    for settings, seed in itertools.product(SETTINGS, range(5)):
        with subtests.test(seed=seed, settings=settings):
            compare_with_triple_loop(seed, settings)


def compare_with_triple_loop(seed, settings):
    rows, predicted, targets, generator = random_rows(seed)
    hidden = torch.randn(*targets.shape, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    alpha, ignored, window = (settings.get(key) for key in ("alpha", "ignore_token_ids", "window"))
    alpha = 1.0 if alpha is None else alpha
    logits, inputs = hidden @ weight.T, rows[:, :-1]
    expected = brute_force(logits, rows, predicted, alpha, ignored or (), window)
    plain = unlikelihood_loss(logits, targets, **settings, input_ids=inputs)
    assert plain.item() == pytest.approx(expected, rel=1e-10)
    gradients = torch.autograd.grad(plain, (hidden, weight))
    for chunk in (1, 4, 100):
        rest = {key: value for key, value in settings.items() if key != "alpha"}
        total, n, unlikelihood = unlikelihood_cross_entropy(
            hidden, weight, targets, alpha, chunk=chunk, input_ids=inputs, **rest
        )
        assert (total / n).item() == pytest.approx(expected, rel=1e-10)
        likelihood, _ = cross_entropy(hidden, weight, targets)
        assert (likelihood + alpha * unlikelihood).item() == pytest.approx(total.item(), rel=1e-10)
        torch.testing.assert_close(torch.autograd.grad(total / n, (hidden, weight)), gradients)


def test_unlikelihood_cross_entropy_with_adapters_ignores_virtual_tokens():
    rows, predicted, targets, _ = random_rows(3)
    for surgery in (PrefixTuning(length=3), PromptTuning(length=2), LoRA(rank=2)):
        model = GPT2(GPT2Config(vocab_size=V, n_positions=24, n_embd=8, n_layer=2, n_head=2, dropout=0.0))
        surgery.apply(model)
        hidden = model(rows[:, :-1])
        total, n, _ = unlikelihood_cross_entropy(hidden, model.head_weight, targets, 1.0, input_ids=rows[:, :-1])
        assert hidden.shape[:2] == targets.shape
        expected = brute_force(model.logits(hidden).double(), rows, predicted, 1.0)
        assert (total / n).item() == pytest.approx(expected, rel=1e-5), surgery


def test_unlikelihood_loss_without_input_ids_uses_earlier_targets():
    """Equal the loss of rows whose first token and unpredicted tokens cannot be candidates."""
    _, _, targets, generator = random_rows(2)
    nothing = V - 1
    targets = targets.where(targets != nothing, 0)
    logits = torch.randn(*targets.shape, V, generator=generator, dtype=torch.float64)
    rows = torch.nn.functional.pad(targets.masked_fill(targets == IGNORE_INDEX, nothing), (1, 0), value=nothing)
    for settings in SETTINGS[:3]:
        ignored = (*settings.get("ignore_token_ids", ()), nothing)
        expected = brute_force(logits, rows, targets != IGNORE_INDEX, 1.0, ignored, settings.get("window"))
        assert unlikelihood_loss(logits, targets, **settings).item() == pytest.approx(expected, rel=1e-10), settings


def test_unlikelihood_loss_first_token_of_a_row_is_a_candidate():
    rows = torch.tensor([[7, 1, 2]])
    logits = torch.randn(1, 2, V, dtype=torch.float64)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    p = logits.softmax(-1)[0]
    held = -sum(math.log(1.0 - p[t, c]) for t, c in ((0, 7), (1, 7), (1, 1))) / 2
    likelihood = F.cross_entropy(logits[0], targets[0]).item()
    assert unlikelihood_loss(logits, targets, input_ids=inputs).item() == pytest.approx(likelihood + held, rel=1e-12)


def test_unlikelihood_gradients_equal_finite_differences():
    rows, _, targets, generator = random_rows(7, T=6)
    inputs = rows[:, :-1]
    hidden = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    for row in (None, inputs):
        for loss in (
            lambda h, w, row=row: unlikelihood_loss(h @ w.T, targets, 0.7, input_ids=row),
            lambda h, w, row=row: unlikelihood_cross_entropy(h, w, targets, 0.7, chunk=5, input_ids=row)[0],
        ):
            assert torch.autograd.gradcheck(loss, (hidden, weight))
    text = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2]] * 2)
    states = torch.randn(2, 10, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, w: sequence_unlikelihood_loss(h, w, text, n=3, chunk=7), (states, weight))


@pytest.mark.parametrize("is_full", [True, False])
def test_losses_with_positions_of_targets_are_bitwise_equal(is_full):
    hidden, weight = torch.randn(2, 9, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets = torch.randint(20, (2, 9))
    if not is_full:
        targets[0, :3] = targets[1, 6:] = IGNORE_INDEX
    positions = torch.tensor([i for i, target in enumerate(targets.flatten().tolist()) if target != IGNORE_INDEX])
    for loss in (
        lambda **given: cross_entropy(hidden, weight, targets, chunk=4, **given)[0],
        lambda **given: unlikelihood_cross_entropy(hidden, weight, targets, 0.7, chunk=4, **given)[0],
        lambda **given: sequence_unlikelihood_loss(hidden, weight, targets, n=2, chunk=4, **given),
        lambda **given: sequence_log_probs(hidden, weight, targets, chunk=4, **given).sum(),
    ):
        found, expected = loss(positions=positions), loss()
        assert torch.equal(found, expected)
        gradients = (torch.autograd.grad(one, (hidden, weight)) for one in (found, expected))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_unlikelihood_compiled_gradients_equal_eager(monkeypatch):
    """Traced without code generation; the compiled cross-entropy of test_language_modeling.py is generated."""
    traced = torch.compile(losses._chunk_loss_and_grad, backend="aot_eager")
    monkeypatch.setattr(losses, "_compiled", lambda: traced)
    targets, generator = random_text(5)
    hidden = torch.randn(*targets.shape, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    for loss in (
        lambda compiled: unlikelihood_cross_entropy(hidden, weight, targets, 0.7, chunk=4, compiled=compiled)[0],
        lambda compiled: sequence_unlikelihood_loss(hidden, weight, targets, n=2, chunk=4, compiled=compiled),
    ):
        eager, compiled = (torch.autograd.grad(loss(given), (hidden, weight)) for given in (False, True))
        torch.testing.assert_close(compiled, eager)


def test_unlikelihood_loss_with_zero_alpha_equals_cross_entropy():
    targets, generator = random_text(1)
    logits = torch.randn(*targets.shape, V, generator=generator)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(unlikelihood_loss(logits, targets, alpha=0.0), expected)
    torch.testing.assert_close(
        unlikelihood_loss(logits, targets.masked_fill(targets == IGNORE_INDEX, -1), alpha=0.0, ignore_index=-1),
        expected,
    )


def test_unlikelihood_loss_certain_repetition_is_clamped_and_finite():
    logits = torch.full((1, 2, V), -50.0, dtype=torch.float64, requires_grad=True)
    certain = logits.clone()
    certain[0, :, 3] = 50.0
    targets = torch.tensor([[3, 2]])
    loss = unlikelihood_loss(certain, targets)
    assert loss.item() == pytest.approx((100.0 - math.log(1e-5)) / 2, rel=1e-6)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    hidden = certain.detach().requires_grad_()
    total, n, _ = unlikelihood_cross_entropy(hidden, torch.eye(V, dtype=torch.float64), targets, 1.0)
    assert (total / n).item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.autograd.grad(total, hidden)[0].isfinite().all()


def test_repeated_ngrams_marks_tokens_of_later_occurrences():
    text = [1, 2, 3, 4, 9, 1, 2, 3, 4, 1, 2, 3, 4]
    marked = repeated_ngrams(torch.tensor([text, [IGNORE_INDEX] * 13, list(range(13))]), 4).tolist()
    seen, expected = set(), [False] * len(text)
    for i in range(len(text) - 3):
        gram = tuple(text[i : i + 4])
        if gram in seen:
            expected[i : i + 4] = [True] * 4
        seen.add(gram)
    assert marked[0] == expected == [False] * 5 + [True] * 8
    assert not any(marked[1] + marked[2])
    assert not repeated_ngrams(torch.tensor([[1, 1]]), 4).any()


def test_sequence_unlikelihood_loss_is_divided_by_all_tokens():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 8, 4), torch.randn(V, 4)
    targets = torch.tensor([[5, 6, 5, 6, 5, 6, 1, 2], [IGNORE_INDEX, IGNORE_INDEX, 1, 1, 1, 1, 1, 3]])
    marks, p = repeated_ngrams(targets, 2), (hidden @ weight.T).softmax(-1)
    expected = sum(
        -math.log(1 - p[b, t, targets[b, t]].item()) for b in range(2) for t in range(8) if marks[b, t]
    ) / int((targets != IGNORE_INDEX).sum())
    assert marks.sum() > 4
    assert sequence_unlikelihood_loss(hidden, weight, targets, n=2, chunk=3).item() == pytest.approx(expected, rel=1e-5)


def test_unlikelihood_loss_of_bfloat16_logits_is_close_to_float32():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 300, (4, 64), generator=generator)
    logits = torch.randn(4, 64, 300, generator=generator).bfloat16()
    part = lambda z: unlikelihood_loss(z, targets) - unlikelihood_loss(z, targets, alpha=0.0)  # noqa: E731
    expected = part(logits.float())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.testing.assert_close(part(logits), expected, rtol=1e-3, atol=1e-4)
    assert expected > 0.05
    assert unlikelihood_loss(logits, torch.full((4, 64), IGNORE_INDEX)) == 0.0


class Largest(TorchDispatchMode):
    """Record the bytes of the largest tensor that is created."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        self.nbytes = max(self.nbytes, *sizes, 0)
        return made


def test_unlikelihood_losses_allocate_no_tensor_larger_than_a_chunk():
    B, T, entries, chunk = 2, 64, 1000, 16
    hidden, weight = torch.randn(B, T, 8, requires_grad=True), torch.randn(entries, 8, requires_grad=True)
    targets = torch.randint(entries, (B, T))
    logits = torch.randn(B, T, entries, requires_grad=True)
    for loss, most in (
        (
            lambda: unlikelihood_cross_entropy(hidden, weight, targets, 1.0, (3,), 9, chunk=chunk)[0],
            2 * chunk * entries,
        ),
        (lambda: sequence_unlikelihood_loss(hidden, weight, targets, chunk=chunk), 2 * chunk * entries),
        (lambda: unlikelihood_loss(logits, targets, 1.0, (3,), 9), B * T * entries),
    ):
        with Largest() as largest:
            loss().backward()
        assert chunk * entries <= largest.nbytes / 4 <= most


# What the task makes of it


class Step(Callback):
    """Record the loss and the batch of the last step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.loss, self.batch = float(outputs["loss"]), batch


def decoded(core, prompt, n):
    """Return a prompt continued greedily by full passes."""
    ids = prompt
    for _ in range(n):
        ids = torch.cat([ids, core.logits(core(ids))[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("asked", [5, 9])  # more than the shortest text has, which is continued from its end
def test_sequence_unlikelihood_step_equals_loop_over_greedy_continuation(asked):
    config = GPT2Config(vocab_size=V, n_positions=64, n_embd=16, n_layer=2, n_head=2, dropout=0.0)
    task = LanguageModel(config=config, sequence_unlikelihood=1.0, sequence_prefix=asked, sequence_length=25)
    task.configure_model()
    ids, mask = torch.randint(V, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    mask[1, 7:] = 0
    marked, total = 0, 0.0
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.mul_(4.0)
        for prompt, n in zip(ids, mask.sum(1).tolist(), strict=True):
            length = min(asked, n)
            text = decoded(task.backbone.eval(), prompt[None, :length], 25)
            row, p = text[0].tolist(), task.backbone.logits(task.backbone(text))[0].softmax(-1).tolist()
            seen, repeated = set(), set()
            for i in range(length, len(row) - 3):
                gram = tuple(row[i : i + 4])
                repeated |= set(range(i, i + 4)) if gram in seen else set()
                seen.add(gram)
            marked += len(repeated)
            total -= sum(math.log(max(1.0 - p[i - 1][row[i]], 1e-5)) for i in repeated)
    assert 0 < marked < 3 * 20
    step, batch = Step(), {"input_ids": ids, "attention_mask": mask, "targets": ids}
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    trainer(max_steps=1, callbacks=[step], limit_val_batches=0).fit(task, loader)
    assert step.loss == pytest.approx(total / (3 * 25), rel=1e-4)


@pytest.mark.parametrize("settings", [{"unlikelihood_window": 5}, {"unlikelihood_ignores": ["the", " is", "t"]}])
def test_token_unlikelihood_step_equals_a_triple_loop(settings, base, files):
    data = TextCorpus(train_file=str(files["train"]), column="sentence", tokenizer=str(base), max_length=32)
    task, step = LanguageModel(base=str(base), dropout=0.0, unlikelihood=2.5, **settings), Step()
    trainer(max_steps=1, callbacks=[step], limit_val_batches=0).fit(task, data)
    theirs, tokenizer = GPT2LMHeadModel.from_pretrained(base).eval(), load_tokenizer(base)
    with torch.no_grad():
        logits = theirs(step.batch["input_ids"], attention_mask=step.batch["attention_mask"]).logits.double()
    words = [word.strip() for word in settings.get("unlikelihood_ignores", [])]
    ignored = [i for i in range(tokenizer.get_vocab_size()) if tokenizer.decode([i]).strip(" ") in words]
    assert len(ignored) >= len(words)
    inputs, targets = step.batch["input_ids"], step.batch["targets"]
    predicted = targets != IGNORE_INDEX
    rows = torch.cat([inputs[:, :1], targets.where(predicted, 0)], dim=1)
    expected = brute_force(logits, rows, predicted, 2.5, ignored, settings.get("unlikelihood_window"))
    assert expected < brute_force(logits, rows, predicted, 2.5) - 0.01
    assert step.loss == pytest.approx(expected, abs=1e-4)
