"""Gradient accumulation: each optimizer step has the gradient of one batch of all its rows."""

import json

import pytest
import torch
from conftest import ROOT
from helpers import forked
from helpers.accumulated_steps import Steps, differences, fit, flat, joined, make
from helpers.trainers import trainer
from lightning.pytorch import Callback

from gpt2_pl.callbacks import GradualUnfreezing
from gpt2_pl.tasks.accumulation import StepMean

CLOSE = 1e-5
ROWS = [[9, 7, 8], [5], [11, 3], [2, 2, 2, 4]]  # foreign batches: tokens of their rows


@pytest.fixture
def own(files, base, poem_files, tmp_path):
    """Arguments of the library's datamodules by task; batches differ in their numbers of rows and tokens."""
    text = tmp_path / "text.txt"
    text.write_text("the plot is wonderful and not at all boring\n" * 9 + "dull\n")
    shared = {"tokenizer": str(base), "batch_size": 7}
    return {
        "classifier": {"train_file": str(files["train"]), "val_file": str(files["val"]), **shared},
        "regressor": {
            "train_file": str(files["train"]),
            "val_file": str(files["val"]),
            "label_column": "sentiment",
            **shared,
        },
        "text": {"train_file": str(text), "val_file": str(text), "max_length": 9, **shared, "batch_size": 4},
        "poems": {"train_file": str(poem_files["train"]), **shared, "batch_size": 3},
    }


def assert_equal_to_one_batch(task, steps, options=None, n=None, clip=None, close=CLOSE):
    found = differences(task, [steps], options, clip)
    assert len(found) == n if n is not None else found
    assert max(found) < close, found


@pytest.mark.parametrize(
    ("task", "options"),
    [("classifier", None), ("regressor", None), ("text", None), ("text", {"unlikelihood": 0.7})],
    ids=["classifier", "regressor", "text", "unlikelihood"],
)
def test_optimizer_step_of_batches_without_counts_equals_one_batch(task, options):
    for accumulate, n in ((1, 4), (3, 2), (8, 1)):
        assert_equal_to_one_batch(task, fit(task, ROWS, accumulate, options=options), options, n)


@pytest.mark.parametrize(
    ("task", "options", "accumulate"),
    [
        ("classifier", None, 3),
        ("regressor", None, 3),
        ("text", None, 4),
        ("text", {"unlikelihood": 1.0}, 4),
        ("poems", {"unlikelihood": 1.0}, 2),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_optimizer_step_of_library_batches_equals_one_batch_uncorrected(task, options, accumulate, own, monkeypatch):
    corrections = []
    correction = StepMean.correction
    monkeypatch.setattr(StepMean, "correction", lambda *args: corrections.append(correction(*args)) or corrections[-1])
    steps = fit(task, own[task], accumulate, options=options)
    sizes = [[int((batch.get("targets", batch["input_ids"]) != -100).sum()) for batch in of] for of in steps.of]
    assert any(len(set(of)) > 1 for of in sizes), sizes  # there are steps of unequal batches
    assert len(sizes[-1]) < accumulate, sizes  # and a short last one
    assert_equal_to_one_batch(task, steps, options)
    assert set(corrections) == {1.0}
    for of in steps.of:
        assert {batch["step_rows"] for batch in of} == {sum(batch["global_rows"] for batch in of)}


def test_accumulation_scheduler_steps_equal_one_batch_and_are_all_counted(own):
    class Total(Callback):
        def on_train_start(self, trainer, pl_module):
            self.factors = [pl_module.schedule.factor(step, 100) for step in range(3)]
            scheduler = trainer.lr_scheduler_configs[0].scheduler
            self.last = [scheduler.lr_lambdas[0](step) for step in (14 + 7 + 5 - 1, 14 + 7 + 5)]

    total = Total()
    steps = fit("classifier", own["classifier"], {"0": 1, "1": 2, "2": 3}, max_epochs=3, callbacks=[total])
    assert_equal_to_one_batch("classifier", steps, n=14 + 7 + 5)  # of 14 batches an epoch
    assert total.last[0] > total.last[1] == 0.0  # the schedule ends with the last of them


def test_optimizer_step_at_a_trainer_limit_equals_one_batch(own):
    for limits, n in (({"limit_train_batches": 5}, 2), ({"max_steps": 1}, 1), ({"limit_train_batches": 0.3}, None)):
        assert_equal_to_one_batch("classifier", fit("classifier", own["classifier"], 3, **limits), n=n)


def test_optimizer_step_interrupted_by_validation_has_the_same_gradients(own):
    one = fit("classifier", own["classifier"], 4)
    two = fit("classifier", own["classifier"], 4, limit_val_batches=2, val_check_interval=3)
    assert len(one.of) == 4
    for a, b in zip(one.gradients, two.gradients, strict=True):
        assert torch.equal(flat(a), flat(b))


@pytest.mark.parametrize(
    ("accumulate", "every"), [(3, 2), ({"0": 1, "1": 3}, 3)], ids=["within a step", "scheduler, between steps"]
)
def test_optimizer_steps_of_resumed_run_equal_one_batch(accumulate, every, own, tmp_path):
    """A step that the resumed run sees only in part has the gradient of the rows that it sees."""
    epochs = {"max_epochs": 2 if isinstance(accumulate, dict) else 1}

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == epochs["max_epochs"] - 1 and batch_idx == 3 + every - 1:
                trainer.save_checkpoint(tmp_path / "some.ckpt", weights_only=False)

    whole = fit("classifier", own["classifier"], accumulate, callbacks=[Save()], **epochs)
    resumed = fit("classifier", own["classifier"], accumulate, ckpt_path=str(tmp_path / "some.ckpt"), **epochs)
    assert_equal_to_one_batch("classifier", resumed, n=3 if every == 3 else 4)
    for i in range(-3, 0):  # those after the first are the same steps
        assert torch.equal(flat(whole.gradients[i]), flat(resumed.gradients[i]))


@pytest.mark.parametrize("data", ["own", "foreign"])
def test_gradient_clipping_with_accumulation_equals_one_batch(data, own):
    for algorithm, value in (("norm", 0.1), ("norm", 1e3)):
        steps = fit("text", own["text"] if data == "own" else ROWS, 3, gradient_clip_val=value,
                    gradient_clip_algorithm=algorithm)  # fmt: skip
        assert_equal_to_one_batch("text", steps, clip=value)
        norms = [float(flat(gradient).norm()) for gradient in steps.gradients]
        assert value > 1 or max(norms) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(("task", "data"), [("classifier", "foreign"), ("text", "foreign"), ("classifier", "own")])
def test_non_finite_batches_are_excluded_from_the_mean_of_a_step(task, data, own):
    for poisoned in ([0], [2], [0, 1], [0, 1, 2], [1, 3]):
        steps = fit(task, ROWS if data == "foreign" else own[task], 3, poisoned=poisoned,
                    limit_train_batches=7)  # fmt: skip
        first, second = 3 - len({0, 1, 2} & {*poisoned}), (3 if data == "own" else 1) - (3 in poisoned)
        assert [len(of) for of in steps.of][:2] == [first, second], poisoned
        assert_equal_to_one_batch(task, steps)


def test_optimizer_step_in_mixed_precision_is_close_to_one_batch(own):
    for precision, poisoned in (("bf16-mixed", []), ("16-mixed", [1]), ("16-mixed", [0, 1, 2])):
        steps = fit("text", own["text"], 3, precision=precision, poisoned=poisoned)
        assert_equal_to_one_batch("text", steps, close=0.03)


def test_sequence_unlikelihood_accumulated_step_equals_one_batch():
    """Texts shorter than the prefix are continued from their ends, independent of the other rows of the batch."""
    options = {"sequence_unlikelihood": 1.0, "sequence_prefix": 6, "sequence_length": 12}
    steps = fit("text", ROWS, 4, options=options)
    (batches,) = steps.of
    whole = joined(batches)
    lengths = whole["attention_mask"].sum(1).tolist()
    assert min(lengths) < 6 < max(lengths)
    one, task = Steps([]), make("text", **options)
    loader = torch.utils.data.DataLoader([whole], batch_size=None)
    trainer(max_steps=1, callbacks=[one], limit_val_batches=0).fit(task, loader)
    expected, found = flat(one.gradients[0]), flat(steps.gradients[0])
    assert expected.norm() > 1e-3
    assert (found - expected).norm() < CLOSE * expected.norm()


def test_gradual_unfreezing_with_accumulation_starts_at_an_optimizer_step(own):
    """Half an epoch has seven batches; the stage starts at the ninth, the first batch of the third of four steps."""
    unfreezing = GradualUnfreezing(stages=[["head"], ["ln_f", "block.0-1"]], epochs_per_stage=0.5)
    steps = fit("classifier", own["classifier"], 4, callbacks=[unfreezing])
    trained = [sorted({name.split(".")[0] for name in gradient}) for gradient in steps.gradients]
    assert trained == [["head"], ["head"], ["gpt2", "head"], ["gpt2", "head"]]


def test_last_loss_with_accumulation_is_each_batch_mean(own):
    class Logged(Callback):
        values = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.values.append(float(pl_module.last_loss))

    for data in (own["classifier"], ROWS):
        one, two = Logged(), Logged()
        one.values, two.values = [], []
        fit("classifier", data, 1, callbacks=[one])
        fit("classifier", data, 3, callbacks=[two])
        assert one.values == two.values


CASES = {
    "classifier": {"task": "classifier", "data": "own", "accumulate": 3, "strategy": "ddp", "limit_train_batches": 5},
    "unlikelihood": {"task": "text", "data": "own", "accumulate": 2, "strategy": "ddp",
                     "options": {"unlikelihood": 0.7}},
    "foreign rows": {"task": "classifier", "data": ROWS * 2, "accumulate": 3, "strategy": "ddp"},
    "foreign rows, not accumulated": {"task": "classifier", "data": ROWS, "accumulate": 1, "strategy": "ddp"},
    "foreign tokens, clipped": {"task": "text", "data": ROWS * 2, "accumulate": 2, "strategy": "ddp",
                                "gradient_clip_val": 0.1},
    "a step's last batch left out": {"task": "classifier", "data": "own", "accumulate": 3, "strategy": "ddp",
                                     "limit_train_batches": 5, "poisoned": [2]},
    "other batches left out": {"task": "text", "data": ROWS * 2, "accumulate": 2, "strategy": "ddp",
                               "poisoned": [0, 2, 3]},
    "sharded": {"task": "classifier", "data": "own", "accumulate": 3, "strategy": "fsdp", "poisoned": [2, 3],
                "limit_train_batches": 5},
    "sharded, foreign": {"task": "text", "data": ROWS * 2, "accumulate": 2, "strategy": "fsdp"},
}  # fmt: skip


def test_optimizer_steps_of_two_processes_equal_one_batch(own, tmp_path):
    cases = [{**case, "data": own[case["task"]] if case["data"] == "own" else case["data"]} for case in CASES.values()]
    lines = "\n".join(map(json.dumps, cases))
    done = forked.run([ROOT / "tests/helpers/accumulated_steps.py", tmp_path], cwd=tmp_path, input=lines, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))
    wrong = {name: apart for name, apart in found.items() if any(isinstance(a, str) or a > CLOSE for a in apart)}
    assert not wrong, f"{wrong}\n{done.stderr[-3000:]}"
    assert all(len(apart) >= 2 for apart in found.values())
