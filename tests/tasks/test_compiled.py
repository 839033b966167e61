"""Tasks whose whole GPT-2 is compiled: one graph without breaks, and the results of ordinary steps.

The graphs run without code generation (``aot_eager``), which would take most of the time.
"""

import pytest
import torch
from helpers.trainers import trainer
from lightning.pytorch import Callback
from torch._dynamo.utils import counters

from gpt2_pl import GPT2, GPT2Config, generate, losses
from gpt2_pl.datamodules import TextCorpus, ToySentiment
from gpt2_pl.losses import cross_entropy, target_positions
from gpt2_pl.surgery import LoRA
from gpt2_pl.tasks import DPO, LanguageModel, SentimentClassifier

CONFIG = GPT2Config(vocab_size=400, n_positions=64, n_embd=16, n_layer=1, n_head=2, dropout=0.0)


@pytest.fixture
def compiled(monkeypatch):
    """Compile without breaks and without code generation; return the modules and the settings of their compilation."""
    found, compile_module = [], torch.nn.Module.compile

    def compile_whole(module, **settings):
        found.append((type(module).__name__, settings))
        compile_module(module, backend="aot_eager", fullgraph=True, **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_whole)
    loss = torch.compile(losses._chunk_loss_and_grad, backend="aot_eager")
    monkeypatch.setattr(losses, "_compiled", lambda: loss)
    torch._dynamo.reset()
    counters.clear()
    return found


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.losses.append(outputs["loss"].item())


def fit(kind, base, files, **options):
    torch.manual_seed(0)
    optimizer = lambda groups: torch.optim.AdamW(groups, lr=1e-2)  # noqa: E731
    if kind == "sentiment":
        task = SentimentClassifier(config=CONFIG, num_classes=3, optimizer=optimizer, **options)
        data = ToySentiment(n_train=64, vocab_size=400, batch_size=16)
    else:
        task = LanguageModel(config=CONFIG, optimizer=optimizer, **options)
        settings = {"column": "sentence", "tokenizer": str(base), "max_length": 16, "batch_size": 4}
        data = TextCorpus(train_file=str(files["train"]), **settings)
    record = Losses()
    trainer(max_steps=4, limit_val_batches=0, callbacks=[record]).fit(task, data)
    return record.losses, task


@pytest.mark.parametrize("kind", [pytest.param("sentiment", marks=pytest.mark.slow), "language model"])
def test_task_compiled_as_one_graph_losses_equal_eager(kind, compiled, base, files):
    expected, _ = fit(kind, base, files)
    found, task = fit(kind, base, files, compile="model")
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(found)) == 4
    assert compiled == [("GPT2", {"dynamic": kind == "sentiment"})]
    assert not counters["graph_break"]
    # generation, whose number of tokens grows, compiles nothing
    graphs, ids = counters["stats"]["unique_graphs"], torch.randint(400, (2, 5))
    text = generate(task.backbone, ids, max_new_tokens=4, temperature=0.0)
    assert counters["stats"]["unique_graphs"] == graphs
    plain = GPT2(CONFIG)
    plain.load_state_dict(task.backbone.state_dict())
    assert torch.equal(text, generate(plain, ids, max_new_tokens=4, temperature=0.0))


@pytest.mark.parametrize(("options", "expected"), [
    ({"compile": True}, [("Block", {"dynamic": True})]),
    ({"compile": "blocks"}, [("Block", {"dynamic": True})]),
    ({"compile": "model", "dpo": DPO()}, [("GPT2", {"dynamic": True})]),
    ({"compile": "model", "sequence_unlikelihood": 0.5, "sequence_length": 10}, [("GPT2", {"dynamic": True})]),
    ({"compile": False}, []),
])  # fmt: skip
def test_compile_option_selects_what_is_compiled(options, expected, compiled):
    LanguageModel(config=CONFIG, **options).configure_model()
    assert compiled == expected


def test_model_and_loss_of_a_language_model_are_one_graph():
    torch._dynamo.reset()
    model = GPT2(CONFIG)
    LoRA(rank=2).apply(model)
    ids, targets = torch.randint(400, (3, 12)), torch.randint(400, (3, 12))
    targets[0, :5] = -100
    positions = target_positions(targets)

    def loss():
        total, n_targets = cross_entropy(model(ids), model.head_weight, targets, chunk=16, positions=positions)
        return total / n_targets

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")):
        value = function()
        results.append((value, torch.autograd.grad(value, trained)))
    torch.testing.assert_close(results[1], results[0])
