"""Validation of a checkpoint's training state against the optimizers, schedulers and loops of the run."""

import copy
import math

import pytest
import torch
from helpers.trainers import trainer
from lightning.pytorch import Callback

from gpt2_pl.datamodules import ToySentiment
from gpt2_pl.errors import InputError
from gpt2_pl.model import GPT2Config
from gpt2_pl.optim import AdamW
from gpt2_pl.tasks import SentimentClassifier

CONFIG = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, dropout=0.0)
OPTIMIZERS = {
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=1e-3, amsgrad=True),
    "own": lambda params: AdamW(params, lr=1e-3),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2),
    "momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.5, centered=True),
    "nadam": lambda params: torch.optim.NAdam(params, lr=1e-3),
    "third": lambda params: Third(params, lr=1e-3),
}


class Third(torch.optim.Optimizer):
    """A third-party optimizer: numbers that change in its groups, keys added later, lists and short tensors."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "k": 0, "train_mode": False})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["k"], group["train_mode"], group["added"] = group["k"] + 1, True, [1.5]
            for p in group["params"]:
                state = self.state[p]
                state["norms"] = [*state.get("norms", []), float(p.grad.norm())]
                state["code"] = torch.zeros(3, dtype=torch.uint8)
                p.sub_(group["lr"] * p.grad / (1 + state["norms"][0]))
        return loss


class Stop(Callback):
    """Save a checkpoint after the fourth step."""

    def __init__(self, file):
        self.file = file

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.file)


def toy_data():
    return ToySentiment(vocab_size=300, n_train=60, batch_size=10, max_length=32)


def fit(optimizer, data=None, **settings):
    torch.manual_seed(0)
    task = SentimentClassifier(config=CONFIG, num_classes=3, optimizer=OPTIMIZERS[optimizer])
    data = toy_data() if data is None else data
    ckpt_path = settings.pop("ckpt_path", None)
    made = trainer(max_epochs=2, num_sanity_val_steps=0, limit_val_batches=1, **settings)
    made.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    return task


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of the fourth of twelve steps, by optimizer, and the final weights of the uninterrupted run."""
    made = {}

    def checkpoint(name):
        if name not in made:
            file = tmp_path_factory.mktemp(name) / "last.ckpt"
            task = fit(name, callbacks=[Stop(file)])
            made[name] = file, {key: value.clone() for key, value in task.state_dict().items()}
        return made[name]

    return checkpoint


def test_trainer_fit_resumed_with_any_optimizer_equals_uninterrupted(saved, subtests):
    for name in OPTIMIZERS:
        with subtests.test(name):
            file, expected = saved(name)
            found = fit(name, ckpt_path=file).state_dict()
            assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


def group(**changes):
    return lambda c: c["optimizer_states"][0]["param_groups"][0].update(changes)


def state(key, make):
    """Change a part of the state of the first matrix."""

    def change(c):
        entry = c["optimizer_states"][0]["state"][0]
        entry[key] = make(entry.get(key))

    return change


def scheduler(**changes):
    return lambda c: c["lr_schedulers"][0].update(changes)


def loop(path, value):
    def change(c):
        inner = c["loops"]["fit_loop"]
        *parts, last = path.split("/")
        for part in parts:
            inner = inner[part]
        inner[last] = value

    return change


def at(path, value):
    def change(c):
        inner = c
        *parts, last = path.split("/")
        for part in parts:
            inner = inner[int(part) if part.isdigit() else part]
        inner[int(last) if last.isdigit() else last] = value

    return change


def without(path):
    def change(c):
        inner = c
        *parts, last = path.split("/")
        for part in parts:
            inner = inner[int(part) if part.isdigit() else part]
        del inner[int(last) if last.isdigit() else last]

    return change


def cycle(c):
    c["optimizer_states"][0]["state"][0]["exp_avg"] = c


def deep(_):
    value = []
    for _ in range(200):
        value = [value]
    return value


OF = "optimizer_states[0]"
PROGRESS = ("ready", "started", "processed", "completed")
HOSTILE = {  # a change of the checkpoint; its key and, if the message quotes one, its value
    # state tensors
    "short": (state("exp_avg", lambda _: torch.zeros(1)), f"{OF}.state[0].exp_avg"),
    "empty": (state("exp_avg", lambda _: torch.zeros(0)), "exp_avg"),
    "scalar": (state("exp_avg", lambda _: torch.tensor(0.0)), "exp_avg"),
    "number": (state("exp_avg", lambda _: 0.0), "exp_avg"),
    "text": (state("exp_avg", lambda _: "x"), "exp_avg|'x'"),
    "none": (state("exp_avg", lambda _: None), "exp_avg"),
    "list": (state("exp_avg", lambda v: [v]), "exp_avg"),
    "transposed": (state("exp_avg", lambda v: v.t()), "exp_avg"),
    "strided": (state("exp_avg_sq", lambda v: torch.zeros(1).expand(v.shape)), "exp_avg_sq"),
    "overlapping": (state("exp_avg", lambda v: torch.zeros(999).as_strided(v.shape, (1, 1))), "exp_avg"),
    "column-major": (state("exp_avg", lambda v: torch.zeros(v.shape[::-1]).t()), "exp_avg"),
    "ints": (state("exp_avg", lambda v: v.long()), "exp_avg"),
    "bytes": (state("exp_avg", lambda v: v.byte()), "exp_avg"),
    "bools": (state("exp_avg", lambda v: v.bool()), "exp_avg"),
    "complex": (state("exp_avg", lambda v: v.to(torch.complex64)), "exp_avg"),
    "conjugate": (state("exp_avg", lambda v: v.to(torch.complex64).conj()), "exp_avg"),
    "sparse": (state("exp_avg", lambda v: v.to_sparse()), "exp_avg"),
    "csr": (state("exp_avg", lambda v: v.to_sparse_csr()), "exp_avg"),
    "meta": (state("exp_avg", lambda v: v.to("meta")), "exp_avg"),
    "quantized": (state("exp_avg", lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)), "exp_avg"),
    "huge claim": (state("exp_avg", lambda _: torch.zeros(1).expand(10**6, 10**6)), "exp_avg"),
    "nan": (state("exp_avg", lambda v: v * math.nan), "exp_avg"),
    "infinite": (state("exp_avg_sq", lambda v: v + math.inf), "exp_avg_sq"),
    "negative square": (state("exp_avg_sq", lambda v: -v - 1), "exp_avg_sq"),
    "negative step": (state("step", lambda v: v - 100), "step"),
    "nan step": (state("step", lambda v: v * math.nan), "step"),
    "steps": (state("step", lambda _: torch.ones(3)), "step"),
    "text step": (state("step", lambda _: "7"), "step|'7'"),
    "huge step": (state("step", lambda _: 10**400), "step"),
    "no exp_avg": (without("optimizer_states/0/state/0/exp_avg"), f"{OF}.state[0].exp_avg"),
    "extra state": (state("momentum_buffer", lambda _: torch.zeros(1)), f"{OF}.state[0]"),
    "unknown parameter": (at("optimizer_states/0/state/999", {}), "999"),
    "text parameter": (at("optimizer_states/0/state/x", {}), "got 'x'"),
    "state is a list": (at("optimizer_states/0/state", []), f"{OF}.state|[]"),
    "state of a list": (at("optimizer_states/0/state/0", [1]), f"{OF}.state[0]|[1]"),
    "cycle": (cycle, "exp_avg"),
    "deep": (state("exp_avg", deep), "exp_avg"),
    # groups
    "uphill": (group(maximize=True), f"{OF}.param_groups[0].maximize|False"),
    "amsgrad": (group(amsgrad=True), "param_groups[0].amsgrad|False"),
    "coupled": (group(decoupled_weight_decay=False), "decoupled_weight_decay|True"),
    "fast": (group(lr="fast"), "param_groups[0].lr|'fast'"),
    "true rate": (group(lr=True), "param_groups[0].lr|True"),
    "nan rate": (group(lr=math.nan), "param_groups[0].lr|nan"),
    "huge rate": (group(lr=1e300), "param_groups[0].lr"),
    "huge decay": (group(weight_decay=2.0**62), "param_groups[0].weight_decay"),
    "endless rate": (group(lr=10**400), "param_groups[0].lr"),
    "negative rate": (group(lr=-1e-3), "param_groups[0].lr"),
    "tensor rate": (group(lr=torch.ones(2)), "param_groups[0].lr"),
    "betas": (group(betas=(0.9, 1.0)), "param_groups[0].betas[1]|1.0"),
    "three betas": (group(betas=(0.9, 0.9, 0.9)), "betas"),
    "no betas": (group(betas=0.9), "betas|0.9"),
    "eps": (group(eps=-1.0), "param_groups[0].eps"),
    "weight decay": (group(weight_decay=None), "weight_decay|None"),
    "another key": (group(evil=1), f"{OF}.param_groups[0]"),
    "name": (group(name=3), "param_groups[0].name|3"),
    "no lr": (without("optimizer_states/0/param_groups/0/lr"), "param_groups[0].lr"),
    "params": (group(params=[1]), "param_groups[0].params|[1]"),
    "params of text": (group(params="ab"), "param_groups[0].params"),
    "no params": (without("optimizer_states/0/param_groups/0/params"), "param_groups[0].params"),
    "fewer groups": (without("optimizer_states/0/param_groups/0"), "param_groups"),
    "group of text": (at("optimizer_states/0/param_groups/0", "x"), "param_groups[0]|'x'"),
    "another part": (at("optimizer_states/0/evil", 1), f"{OF}|'evil'"),
    "two optimizers": (lambda c: c["optimizer_states"].append(c["optimizer_states"][0]), "optimizer_states"),
    # schedulers
    "model alone": (without("optimizer_states"), "optimizer_states"),
    "no scheduler": (at("lr_schedulers", []), "lr_schedulers"),
    "scheduler's method": (scheduler(step=3), "lr_schedulers[0]"),
    "scheduler's optimizer": (scheduler(optimizer=None), "lr_schedulers[0]"),
    "last_epoch": (scheduler(last_epoch=-3), "lr_schedulers[0].last_epoch|-3"),
    "last_epoch of text": (scheduler(last_epoch="3"), "lr_schedulers[0].last_epoch|'3'"),
    "huge last_epoch": (scheduler(last_epoch=2**60), "lr_schedulers[0].last_epoch"),
    "base_lrs": (scheduler(base_lrs=[1.0]), "lr_schedulers[0].base_lrs"),
    "nan base_lrs": (lambda c: scheduler(base_lrs=[math.nan] * len(c["lr_schedulers"][0]["base_lrs"]))(c),
                     "lr_schedulers[0].base_lrs[0]"),
    "lambdas": (lambda c: scheduler(lr_lambdas=[3] * len(c["lr_schedulers"][0]["base_lrs"]))(c),
                "lr_schedulers[0].lr_lambdas[0]"),
    "scheduler of text": (at("lr_schedulers/0", "x"), "lr_schedulers[0]|'x'"),
    # loops
    "no loops": (at("loops", {}), "loops.fit_loop"),
    "epoch of text": (loop("epoch_progress/current/completed", "x"), "current.completed|'x'"),
    "half an epoch": (loop("epoch_progress/current/completed", 0.5), "current.completed"),
    "negative batch": (loop("epoch_loop.batch_progress/current/ready", -1), "loops.fit_loop.epoch_loop.batch_progress"),
    "negative validations": (
        loop("epoch_loop.val_loop.batch_progress/total", dict.fromkeys(PROGRESS, -1)), "val_loop.batch_progress",
    ),
    "more completed than begun": (loop("epoch_progress/current/completed", 10**6), "epoch_progress.current"),
    "huge batches": (loop("epoch_loop.batch_progress/total/ready", 10**30), "batch_progress.total"),
    "another loop": (loop("evil", 1), "loops.fit_loop"),
    "is_last_batch": (loop("epoch_loop.batch_progress/is_last_batch", 3), "is_last_batch"),
    "no progress": (without("loops/fit_loop/epoch_progress"), "loops.fit_loop.epoch_progress"),
    "no total": (without("loops/fit_loop/epoch_progress/total"), "epoch_progress.total"),
    "progress of text": (loop("epoch_loop.scheduler_progress", "x"), "scheduler_progress"),
}  # fmt: skip


def test_trainer_fit_hostile_training_state_is_refused(saved, tmp_path, subtests):
    file, data = tmp_path / "hostile.ckpt", toy_data()
    original = torch.load(saved("fused")[0], weights_only=True)
    for name, (change, words) in HOSTILE.items():
        with subtests.test(name):
            checkpoint = copy.deepcopy(original)
            change(checkpoint)
            torch.save(checkpoint, file)
            with pytest.raises(InputError) as caught:
                fit("fused", data, ckpt_path=file)
            assert all(word in str(caught.value) for word in words.split("|"))
            assert str(file) in str(caught.value)
            assert len(str(caught.value)) < 600


def test_trainer_fit_resumed_optimizer_switches_are_the_configured_ones(saved, tmp_path):
    """The switches of the step (fused, capturable, foreach) are those of the configuration, not of the file."""
    checkpoint = torch.load(saved("fused")[0], weights_only=True)
    for one in checkpoint["optimizer_states"][0]["param_groups"]:
        one |= {"foreach": "x", "capturable": True, "differentiable": 3, "fused": [1]}
        del one["foreach"]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    task = fit("fused", ckpt_path=tmp_path / "other.ckpt")
    kept = [(one["fused"], one["capturable"], one["foreach"]) for one in task.optimizers().param_groups]
    assert set(kept) == {(True, False, None)}
    for key, value in task.state_dict().items():
        assert torch.equal(value, saved("fused")[1][key])


def test_state_layouts_of_torch_optimizers_equal_state_after_first_step():
    """Compare each layout with the state after a step on the parameters."""
    from gpt2_pl.tasks.training_state import state_layouts

    for make in (make for name, make in OPTIMIZERS.items() if name != "third"):
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 6), (8,), (2, 9))]
        optimizer = make([{"params": parameters[:2]}, {"params": parameters[2:]}])
        layouts = state_layouts(optimizer)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        before = copy.deepcopy([p.detach() for p in parameters])
        optimizer.step()
        assert not torch.equal(before[0], parameters[0])
        states = optimizer.state_dict()["state"]
        shapes = [{n: {key: value.shape for key, value in state.items()} for n, state in found.items()}
                  for found in (layouts, states)]  # fmt: skip
        assert shapes[0] == shapes[1]
