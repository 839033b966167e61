"""Results on a GPU against the CPU and transformers; skipped without a GPU."""

import copy
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, metrics
from helpers.trainers import trainer
from lightning.pytorch import Callback
from transformers import GPT2LMHeadModel

from gpt2_pl import GPT2, GPT2Config, beam_search, generate
from gpt2_pl.callbacks import NonFiniteLossGuard, Reproducibility
from gpt2_pl.datamodules import TextCorpus, ToySentiment
from gpt2_pl.heads import last_token_index
from gpt2_pl.losses import cross_entropy, unlikelihood_cross_entropy
from gpt2_pl.surgery import LoRA, PrefixTuning
from gpt2_pl.tasks import DPO, LanguageModel, SentimentClassifier

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=1003, n_positions=128, n_embd=128, n_layer=3, n_head=2, dropout=0.0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def padded(side):
    ids, mask = torch.randint(1, 1003, (4, 70)), torch.ones(4, 70, dtype=torch.long)
    for row, n in enumerate((0, 1, 30, 69)):
        mask[row, slice(70 - n, 70) if side == "right" else slice(0, n)] = 0
    return ids, mask


def adapt(model, surgery):
    if surgery:
        surgery.apply(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("surgery", [None, LoRA(rank=4), PrefixTuning(length=5)])
def test_gpt2_hidden_states_on_gpu_equal_cpu(model, side, surgery):
    adapt(model, surgery)
    ids, mask = padded(side)
    on_gpu, at = copy.deepcopy(model).cuda(), last_token_index(mask)
    with torch.no_grad():
        here, there = model(ids, mask), on_gpu(ids.cuda(), mask.cuda()).cpu()
        torch.testing.assert_close(there[mask.bool()], here[mask.bool()], atol=1e-4, rtol=1e-4)
        there = on_gpu(ids.cuda(), mask.cuda(), output_positions=at.cuda()).cpu()
        torch.testing.assert_close(there, model(ids, mask, output_positions=at), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gpt2_gradients_on_gpu_equal_transformers(model, tmp_path, precision, compiled):
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).cuda().eval()
    ours = model.cuda()
    if compiled:
        for block in ours.h:
            block.compile(dynamic=True)
    ids = torch.randint(1003, (4, 65), device="cuda")
    expected = gradients(theirs, theirs(ids, labels=ids).loss)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
        total, n = cross_entropy(ours(ids[:, :-1]), ours.head_weight, ids[:, 1:], compiled=compiled)
    found = gradients(ours, total / n)
    tolerance = 1e-4 if precision == "float32" else 2e-2
    for name, gradient in found.items():
        reference = expected[f"transformer.{name}"]
        if name.endswith("weight") and ("c_" in name):  # theirs are transposed
            reference = reference.T
        assert (gradient - reference).norm() < tolerance * reference.norm() + 1e-7, name


def test_unlikelihood_cross_entropy_on_gpu_equals_cpu():
    hidden, weight = torch.randn(3, 40, 64, requires_grad=True), torch.randn(1003, 64, requires_grad=True)
    targets = torch.randint(1003, (3, 40))
    targets[1, 30:] = -100
    here = unlikelihood_cross_entropy(hidden, weight, targets, 0.5)
    expected = torch.autograd.grad(here[0], (hidden, weight))
    for chunk in (None, 7):
        there = unlikelihood_cross_entropy(hidden.cuda(), weight.cuda(), targets.cuda(), 0.5, chunk=chunk)
        for a, b in zip(here, there, strict=True):
            torch.testing.assert_close(b.cpu(), a, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(torch.autograd.grad(there[0], (hidden, weight)), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("surgery", [None, LoRA(rank=4), PrefixTuning(length=5)])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 20}, {"no_repeat_ngram_size": 2}])
def test_generate_on_gpu_equals_cpu(model, settings, surgery):
    adapt(model, surgery)
    model.eval()
    ids, mask = (t[:, :40] for t in padded("left"))
    ids, mask = ids[:3], mask[:3]
    given = {"max_new_tokens": 50, "seed": [1, 2, 3], **settings}
    here = generate(model, ids, mask, **given)
    assert torch.equal(generate(model.cuda(), ids.cuda(), mask.cuda(), **given).cpu(), here)


@pytest.mark.parametrize("surgery", [None, LoRA(rank=4), PrefixTuning(length=5)])
def test_beam_search_on_gpu_equals_cpu(model, surgery):
    adapt(model, surgery)
    model.eval()
    ids, mask = (t[:3, :40] for t in padded("left"))
    given = {"num_beams": 4, "max_new_tokens": 30, "eos_token_id": 7}
    here = beam_search(model, ids, mask, **given)
    there = beam_search(model.cuda(), ids.cuda(), mask.cuda(), **given)
    torch.testing.assert_close(there.scores.cpu(), here.scores, atol=1e-3, rtol=1e-3)


def test_generate_compiled_on_gpu_equals_plain(model):
    ids, mask = (t[:3, :40].cuda() for t in padded("left"))
    model.cuda().eval()
    plain, compiled = (
        generate(model, ids, mask, max_new_tokens=40, temperature=0.0, compiled=given) for given in (False, True)
    )
    assert torch.equal(plain, compiled)


def test_generate_in_evaluation_mode_replays_a_cuda_graph(model):
    ids = torch.randint(1003, (2, 10), device="cuda")
    with patch.object(torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=torch.cuda.CUDAGraph.replay) as replay:
        generate(model.cuda().train(), ids, max_new_tokens=40)
        assert replay.call_count == 0
        generate(model.eval(), ids, max_new_tokens=40)
        assert replay.call_count == 39


def test_fit_on_gpu_lowers_validation_loss(run):
    flags = ["--trainer.accelerator=gpu", "--trainer.precision=bf16-mixed", "--trainer.max_epochs=3"]
    folder = run("fit", "--config", ROOT / "configs/quickstart.yaml", *flags)
    losses = [epoch["val/loss"] for epoch in metrics(folder)["epochs"]]
    assert losses[-1] < losses[0]
    assert metrics(folder)["scores"]["test/accuracy"] > 0.5


class Steps(Callback):
    """Keep the losses of a run, and reject waits for the GPU in the steps after the first ones."""

    def __init__(self, records=None, forbids_waits=False):
        self.losses, self.records, self.forbids_waits = [], records, forbids_waits

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.records is not None:
            pl_module.recorded_step._records = self.records
        if self.forbids_waits and batch_idx == 20:  # every shape is recorded
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"])

    def on_train_epoch_end(self, trainer, pl_module):
        torch.cuda.set_sync_debug_mode("default")


def fit_recorded(records, surgery=(), cuda_graphs=True, dropout=0.1, forbids_waits=False, **settings):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=2, dropout=dropout)
    task = SentimentClassifier(
        config=config, num_classes=3, surgery=list(surgery), train_base=True, cuda_graphs=cuda_graphs,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
    )  # fmt: skip
    steps = Steps(records if cuda_graphs else None, forbids_waits)
    run = trainer(
        accelerator="gpu", devices=1, max_epochs=2, limit_val_batches=0, gradient_clip_val=1.0,
        callbacks=[Reproducibility(), NonFiniteLossGuard(), steps], **settings,
    )  # fmt: skip
    run.fit(task, ToySentiment(n_train=700, vocab_size=300, batch_size=16))
    return torch.stack(steps.losses).tolist(), [p.detach().cpu() for p in task.parameters()]


@pytest.mark.parametrize("settings", [
    {}, {"precision": "bf16-mixed"}, {"surgery": [PrefixTuning(length=3)]},
], ids=["float32", "bf16", "prefix"])  # fmt: skip
def test_recorded_steps_on_gpu_are_bitwise_equal_to_called_ones(settings):
    (losses, weights), (expected, others) = (fit_recorded(records, **settings) for records in (True, False))
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    again, _ = fit_recorded(True, **settings)
    assert again == losses


def test_recorded_steps_on_gpu_equal_ordinary_steps_without_dropout():
    recorded, _ = fit_recorded(True, dropout=0.0)
    ordinary, _ = fit_recorded(True, dropout=0.0, cuda_graphs=False)
    assert recorded == pytest.approx(ordinary, rel=1e-3)


def test_recorded_steps_on_gpu_wait_for_nothing():
    fit_recorded(True, forbids_waits=True)


@pytest.mark.parametrize("options", [
    {}, {"unlikelihood": 0.5}, {"dpo": DPO(rejected="shuffled", prompt_tokens=4)}, {"compile": "model"},
], ids=["plain", "unlikelihood", "dpo", "compiled"])  # fmt: skip
def test_language_model_steps_on_gpu_wait_for_nothing(options, base, files):
    """Without the guard, which reads the loss of every step."""
    settings = {"column": "sentence", "tokenizer": str(base), "max_length": 16, "batch_size": 1, "stride": 8}
    data = TextCorpus(train_file=str(files["train"]), val_file=str(files["val"]), **settings)
    steps = Steps(forbids_waits=True)
    task = LanguageModel(base=str(base), **options)
    trainer(
        accelerator="gpu", devices=1, max_steps=40, limit_val_batches=0, callbacks=[Reproducibility(), steps]
    ).fit(task, data)  # fmt: skip
    assert len(steps.losses) == 40


@pytest.mark.parametrize("task", ["classifier", "language model"])
def test_model_compiled_as_a_whole_on_gpu_losses_equal_eager(task, base, files):
    losses = []
    for compiled in (False, "model"):
        torch.manual_seed(0)
        if task == "classifier":
            data = ToySentiment(n_train=96, vocab_size=400, batch_size=16)
            made = SentimentClassifier(base=str(base), num_classes=3, dropout=0.0, compile=compiled, cuda_graphs=False)
        else:
            settings = {"column": "sentence", "tokenizer": str(base), "max_length": 16, "batch_size": 4}
            data = TextCorpus(train_file=str(files["train"]), **settings)
            made = LanguageModel(base=str(base), dropout=0.0, compile=compiled)
        steps = Steps()
        trainer(accelerator="gpu", devices=1, max_steps=5, limit_val_batches=0, callbacks=[steps]).fit(made, data)
        losses.append(torch.stack(steps.losses).tolist())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
