"""SentimentClassifier: loss curves against transformers, metrics against loops, and options."""

import csv
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, metrics
from helpers.refusals import names
from helpers.trainers import trainer
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import GPT2ForSequenceClassification

from gpt2_pl import GPT2Config
from gpt2_pl.callbacks import ImageWriter, Reproducibility
from gpt2_pl.datamodules import IMDB, SST5, ToySentiment
from gpt2_pl.errors import InputError
from gpt2_pl.optim import LinearWithWarmup
from gpt2_pl.tasks import SentimentClassifier
from gpt2_pl.utils import plots

CONFIG = ROOT / "configs"
SHAPE = GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2, dropout=0.1)


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def compare_with_transformers(base, data, steps, lr):
    """Train both from the same weights on the same batches without dropout; return the largest loss difference."""
    seed_everything(4, verbose=False)
    task = SentimentClassifier(
        base=str(base),
        num_classes=data.num_classes,
        dropout=0.0,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0),
        schedule=LinearWithWarmup(),
    )
    task.configure_model()
    theirs = GPT2ForSequenceClassification.from_pretrained(
        base, num_labels=data.num_classes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, pad_token_id=0
    )
    with torch.no_grad():
        task.head.linear.weight.copy_(theirs.score.weight)
    task.head.linear.bias.requires_grad_(False)  # theirs has none
    losses = Losses()
    trainer(max_steps=steps, callbacks=[Reproducibility(), losses], limit_val_batches=0).fit(task, data)

    optimizer = torch.optim.AdamW(theirs.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    loader, expected = data.train_dataloader(), []
    while len(expected) < steps:
        for batch in loader:
            logits = theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = F.cross_entropy(logits, batch["labels"])
            loss.backward()
            optimizer.step(), schedule.step(), optimizer.zero_grad()
            expected.append(loss.item())
            if len(expected) == steps:
                break
        loader.set_epoch(loader.epoch + 1)
    assert len(losses.losses) == steps
    return max(abs(a - b) for a, b in zip(losses.losses, expected, strict=True)), expected


def test_sentiment_classifier_loss_curve_equals_transformers(base, files):
    data = IMDB(train_file=str(files["train"]), tokenizer=str(base), batch_size=16)
    difference, losses = compare_with_transformers(base, data, 30, 1e-3)
    assert difference < 1e-3
    assert losses[-1] < losses[0] - 0.05


def test_sentiment_classifier_loss_curve_on_sst5_equals_transformers(shared):
    base, file = str(shared / "base" / "gpt2-tiny"), str(shared / "data" / "ids-sst-train.csv")
    difference, _ = compare_with_transformers(base, SST5(train_file=file, tokenizer=base, batch_size=16), 50, 1e-4)
    assert difference < 1e-3


def test_fit_sentiment_scores_equal_loops_over_predictions(run, base, data_flags):
    folder = run("fit", "--config", CONFIG / "task/imdb.yaml", f"--model.base={base}", "--data.max_length=64",
                 *data_flags, "--trainer.max_epochs=2", "--trainer.accelerator=cpu")  # fmt: skip
    account = metrics(folder)
    for split in ("val", "test"):
        with (folder / f"predictions_{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["row"]) for row in rows] == list(range(1, {"val": 33, "test": 35}[split] + 1))
        right = sum(row["label"] == row["prediction"] for row in rows)
        assert account["scores"][f"{split}/accuracy"] == pytest.approx(right / len(rows), abs=1e-6)
        f1 = []
        for name in ("negative", "positive"):
            hits = sum(row["label"] == row["prediction"] == name for row in rows)
            asked = sum(row["label"] == name for row in rows) + sum(row["prediction"] == name for row in rows)
            f1.append(2 * hits / asked if asked else 0.0)
        assert account["scores"][f"{split}/macro_f1"] == pytest.approx(sum(f1) / 2, abs=1e-6)


class Scores(Callback):
    """Record the training accuracy at the end of every epoch; save and interrupt before the step ``stop_at``."""

    def __init__(self, stop_at=None, file=None):
        self.stop_at, self.file, self.accuracy = stop_at, file, []

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.stop_at:
            trainer.save_checkpoint(self.file)
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer, pl_module):
        self.accuracy.append(float(trainer.callback_metrics["train/accuracy"]))


@pytest.mark.parametrize("resumed", [False, True])
def test_epoch_scores_of_resumed_run_cover_all_steps_and_are_logged_once(resumed, monkeypatch, tmp_path):
    data, file = ToySentiment(n_train=96, vocab_size=300, batch_size=16), tmp_path / "broken_off.ckpt"
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, dropout=0.0)
    task = SentimentClassifier(config=config, num_classes=3, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    logged, log = [], task.log
    monkeypatch.setattr(task, "log", lambda name, *args, **kwargs: (logged.append(name), log(name, *args, **kwargs)))
    with pytest.raises(SystemExit):
        trainer(max_epochs=2, callbacks=[Scores(stop_at=2, file=file)]).fit(task, data)
    logged.clear()
    scores = Scores()
    trainer(max_epochs=2, callbacks=[scores]).fit(task, data, ckpt_path=file if resumed else None, weights_only=True)
    task.eval()
    with torch.no_grad():
        hits = [task(batch).mean(0).argmax(-1) == batch["labels"] for batch in data.evaluation_dataloader("train")]
    assert scores.accuracy[1] == pytest.approx(torch.cat(hits).float().mean().item())  # at a rate of 0, always the same
    if not resumed:
        assert scores.accuracy[0] == scores.accuracy[1]
    assert [logged.count(name) for name in ("train/accuracy", "val/accuracy")] == [2, 2]


def test_linear_probe_features_are_computed_once(base, files):
    data = IMDB(train_file=str(files["train"]), val_file=str(files["val"]), tokenizer=str(base), batch_size=16)
    task = SentimentClassifier(
        base=str(base), num_classes=2, train_base=False, head_dropout=0.0,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    )  # fmt: skip
    calls = []
    encode = task.encode
    task.encode = lambda batch: calls.append(len(batch["row"])) or encode(batch)
    losses = Losses()
    trainer(max_epochs=3, callbacks=[losses]).fit(task, data)
    assert sum(calls) == 97 + 33
    assert len(losses.losses) == 3 * 7
    again = SentimentClassifier(
        base=str(base), num_classes=2, train_base=False, head_dropout=0.0,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    )  # fmt: skip
    again.configure_model()
    again.eval()
    batch = next(iter(data.evaluation_dataloader("val")))
    with torch.no_grad():
        torch.testing.assert_close(again.encode(batch), task.encode(batch))  # the base has not changed


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "concat", "head_dropout": 0.3, "num_dropout_samples": 3, "average": "logits"},
        {"pooling": "mix", "mean_weight": 0.5, "label_smoothing": 0.1},
        {"head": "verbalizer", "label_words": ["b", "l", "w"]},
    ],
    ids=["concat", "mix", "verbalizer"],
)
def test_sentiment_classifier_options_lower_the_loss(options):
    losses = losses_of(8, **options)
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])


def losses_of(epochs, n_train=256, shape=SHAPE, **options):
    """Return the losses of training on texts that are easy to classify."""
    torch.manual_seed(1)
    optimizer = lambda groups: torch.optim.AdamW(groups, lr=5e-3)  # noqa: E731
    task, losses = SentimentClassifier(config=shape, num_classes=3, optimizer=optimizer, **options), Losses()
    data = ToySentiment(n_train=n_train, vocab_size=400, batch_size=32)
    trainer(max_epochs=epochs, callbacks=[losses, Reproducibility()], limit_val_batches=0).fit(task, data)
    return losses.losses


def test_sentiment_classifier_checkpointed_and_compiled_losses_equal_plain(monkeypatch):
    """The compiled blocks run without code generation, which would take most of the time."""
    compiled_blocks, compile_block = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **settings: (
        compiled_blocks.append(block), compile_block(block, backend="aot_eager", **settings)))  # fmt: skip
    shape = replace(SHAPE, n_layer=1, dropout=0.0)
    plain, checkpointed, compiled = (
        losses_of(1, 96, shape, **options) for options in ({}, {"activation_checkpointing": True}, {"compile": True})
    )
    assert checkpointed == plain
    assert compiled == pytest.approx(plain, abs=1e-4)
    assert len(set(plain)) == 3
    assert len(compiled_blocks) == 1


@pytest.mark.parametrize("average", ["loss", "logits"])
def test_sentiment_classifier_step_loss_equals_the_options_formula(average):
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, dropout=0.0)
    task = SentimentClassifier(config=config, num_classes=3, pooling="mix", mean_weight=0.2,
                               head_dropout=0.5, num_dropout_samples=4,
                               average=average, label_smoothing=0.3)  # fmt: skip
    task.configure_model()
    task.head.linear.weight.data.mul_(20.0)
    lengths, labels = [9, 1, 4], torch.tensor([2, 0, 1])
    ids, mask = torch.randint(50, (3, 9)), (torch.arange(9) < torch.tensor(lengths).unsqueeze(1)).long()
    with torch.no_grad():
        rows = [task.backbone(ids[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
    features, logits, losses = [], [], Losses()
    task.head.register_forward_pre_hook(lambda _, args: features.append(args[0].detach()))
    task.head.register_forward_hook(lambda _, args, out: logits.append(out.detach()))
    loader = torch.utils.data.DataLoader(
        [{"input_ids": ids, "attention_mask": mask, "labels": labels}], batch_size=None
    )
    trainer(max_steps=1, callbacks=[losses], limit_val_batches=0).fit(task, loader)
    torch.testing.assert_close(features[0], torch.stack([0.2 * row.mean(0) + 0.8 * row[-1] for row in rows]))
    assert logits[0].shape == (4, 3, 3)
    drawn = logits[0] if average == "loss" else logits[0].mean(0, keepdim=True)
    of_masks = [F.cross_entropy(z, labels, label_smoothing=0.3).item() for z in drawn]
    assert losses.losses == pytest.approx([sum(of_masks) / len(of_masks)])


def test_image_writer_confusion_figure_has_labels_in_rows(tmp_path, monkeypatch, drawn_images):
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    data, logger = ToySentiment(n_train=160, vocab_size=300), TensorBoardLogger(tmp_path)
    task = SentimentClassifier(config=config, num_classes=3)
    task.configure_model()
    task.head.linear.weight.data.mul_(50.0)
    figures = {}
    draw = plots.confusion_figure
    monkeypatch.setattr(plots, "confusion_figure", lambda *args: figures.setdefault(args[2], draw(*args)))
    trainer(logger=logger, callbacks=[ImageWriter()]).test(task, data)
    counts = {(i, j): 0 for i in range(3) for j in range(3)}
    with torch.no_grad():
        for batch in data.test_dataloader():
            for label, prediction in zip(batch["labels"], task.eval().predict_proba(batch).argmax(-1), strict=True):
                counts[int(label), int(prediction)] += 1
    assert counts != {(j, i): n for (i, j), n in counts.items()}
    (axes, *_) = figures["test"].axes
    shown = {(int(y), int(x)): int(text.get_text()) for text in axes.texts for x, y in [text.get_position()]}
    assert shown == counts
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["negative", "neutral", "positive"]


def test_sentiment_classifier_options_out_of_range_are_refused(subtests):
    for options, key in (
        ({"head_dropout": 1.0}, "model.head_dropout"),
        ({"num_classes": 1}, "model.num_classes"),
        ({"head": "verbalizer"}, "model.label_words"),
        ({"head": "verbalizer", "label_words": ["a"]}, "model.label_words"),
        ({"base": "x"}, "model"),  # a shape is given too
        ({"config": None}, "model"),  # and here neither
        ({"dropout": 1.5}, "model.dropout"),
    ):
        with subtests.test(options):
            with pytest.raises(InputError) as caught:
                SentimentClassifier(**{"config": SHAPE, "num_classes": 3, **options})
            assert names(caught.value, key)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradient_clipping_fused_optimizer_works_at_any_precision(precision):
    # Lightning itself refuses to clip for a fused optimizer under any mixed precision.
    norms = []

    class Noting(torch.optim.AdamW):
        def step(self, closure):
            def noting():
                loss = closure()  # the passes, and the clipping
                norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.param_groups[0]["params"]]).item())
                return loss

            return super().step(noting)

    for clip in (None, 1e-3):
        seed_everything(0, verbose=False)
        task = SentimentClassifier(config=SHAPE, num_classes=3, optimizer=lambda groups: Noting(groups, fused=True))
        data = ToySentiment(n_train=192, vocab_size=400)
        settings = {"precision": precision, "gradient_clip_val": clip, "limit_val_batches": 0}
        trainer(max_steps=3, **settings).fit(task, data)
    assert max(norms[:3]) > 0.01
    assert 0 < max(norms[3:]) < 1.1e-3


class Gradients(Callback):
    """Record after every batch whether there are gradients."""

    def __init__(self):
        self.there = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        there = {p.grad is not None for p in pl_module.parameters()}
        assert len(there) == 1
        self.there += there


@pytest.mark.parametrize(("accumulate", "there"), [(1, [False] * 4), (2, [True, False] * 2)])
def test_gradients_are_freed_after_each_optimizer_step(accumulate, there):
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    task, watch = SentimentClassifier(config=config, num_classes=3), Gradients()
    fitting = trainer(max_steps=4 // accumulate, callbacks=[watch], accumulate_grad_batches=accumulate)
    fitting.fit(task, ToySentiment(n_train=96, vocab_size=300, batch_size=16))
    assert watch.there == there


def test_verbalizer_label_words_of_several_tokens_are_refused():
    task = SentimentClassifier(config=SHAPE, num_classes=3, head="verbalizer", label_words=["a", "b", "quixotic"])
    with pytest.raises(InputError, match="got 'quixotic'"):
        trainer(max_epochs=1).fit(task, ToySentiment(n_train=64, vocab_size=400))


def test_trainer_fit_tokenizer_larger_than_the_base_is_refused(base):
    task = SentimentClassifier(base=str(base), num_classes=3)
    with pytest.raises(InputError, match="vocab_size 400"):
        trainer(max_epochs=1).fit(task, ToySentiment(n_train=400, vocab_size=450))
