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


def fit(optimizer, **settings):
    torch.manual_seed(0)
    task = SentimentClassifier(config=CONFIG, num_classes=3, optimizer=OPTIMIZERS[optimizer])
    data = ToySentiment(vocab_size=300, n_train=60, batch_size=10, max_length=32)
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trainer_fit_resumed_with_any_optimizer_equals_uninterrupted(name, saved):
    file, expected = saved(name)
    for key, value in fit(name, ckpt_path=file).state_dict().items():
        assert torch.equal(value, expected[key]), key


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
HOSTILE = {
    # state tensors
    "short": (state("exp_avg", lambda _: torch.zeros(1)), f"{OF}.state[0].exp_avg must be a floating-point tensor"),
    "empty": (state("exp_avg", lambda _: torch.zeros(0)), "exp_avg must be a floating-point tensor of shape"),
    "scalar": (state("exp_avg", lambda _: torch.tensor(0.0)), "exp_avg must be a floating-point tensor of shape"),
    "number": (state("exp_avg", lambda _: 0.0), "exp_avg must be a floating-point tensor of shape"),
    "text": (state("exp_avg", lambda _: "x"), "exp_avg must be a tensor or a number, got 'x'"),
    "none": (state("exp_avg", lambda _: None), "exp_avg must be a floating-point tensor"),
    "list": (state("exp_avg", lambda v: [v]), "exp_avg must be a tensor or a number"),
    "transposed": (state("exp_avg", lambda v: v.t()), "exp_avg must be a"),
    "strided": (state("exp_avg_sq", lambda v: torch.zeros(1).expand(v.shape)), "exp_avg_sq must be a dense tensor"),
    "overlapping": (state("exp_avg", lambda v: torch.zeros(999).as_strided(v.shape, (1, 1))), "exp_avg must be a"),
    "column-major": (state("exp_avg", lambda v: torch.zeros(v.shape[::-1]).t()), "exp_avg must be a contiguous tensor"),
    "ints": (state("exp_avg", lambda v: v.long()), "exp_avg must be a floating-point tensor"),
    "bytes": (state("exp_avg", lambda v: v.byte()), "exp_avg must be a floating-point tensor"),
    "bools": (state("exp_avg", lambda v: v.bool()), "exp_avg must be a floating-point tensor"),
    "complex": (state("exp_avg", lambda v: v.to(torch.complex64)), "exp_avg must be real"),
    "conjugate": (state("exp_avg", lambda v: v.to(torch.complex64).conj()), "exp_avg must be a dense tensor"),
    "sparse": (state("exp_avg", lambda v: v.to_sparse()), "exp_avg must be a dense tensor"),
    "csr": (state("exp_avg", lambda v: v.to_sparse_csr()), "exp_avg must be a dense tensor"),
    "meta": (state("exp_avg", lambda v: v.to("meta")), "exp_avg must be a dense tensor"),
    "quantized": (state("exp_avg", lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)), "dense tensor"),
    "huge claim": (state("exp_avg", lambda _: torch.zeros(1).expand(10**6, 10**6)), "exp_avg must be a dense tensor"),
    "nan": (state("exp_avg", lambda v: v * math.nan), "exp_avg must be finite"),
    "infinite": (state("exp_avg_sq", lambda v: v + math.inf), "exp_avg_sq must be finite"),
    "negative square": (state("exp_avg_sq", lambda v: -v - 1), "exp_avg_sq must be at least 0"),
    "negative step": (state("step", lambda v: v - 100), "step must be at least 0"),
    "nan step": (state("step", lambda v: v * math.nan), "step must be finite"),
    "steps": (state("step", lambda _: torch.ones(3)), "step must be a floating-point tensor of shape ()"),
    "text step": (state("step", lambda _: "7"), "step must be a tensor or a number, got '7'"),
    "huge step": (state("step", lambda _: 10**400), "step must be a finite number of at least 0"),
    "no exp_avg": (without("optimizer_states/0/state/0/exp_avg"), f"the keys of {OF}.state[0] must be ['exp_avg', "),
    "extra state": (state("momentum_buffer", lambda _: torch.zeros(1)), f"the keys of {OF}.state[0] must be"),
    "unknown parameter": (at("optimizer_states/0/state/999", {}), "the number of one of 30 parameters, got 999"),
    "text parameter": (at("optimizer_states/0/state/x", {}), "the number of one of 30 parameters, got 'x'"),
    "state is a list": (at("optimizer_states/0/state", []), f"{OF}.state must be a mapping, got []"),
    "state of a list": (at("optimizer_states/0/state/0", [1]), f"{OF}.state[0] must be a mapping, got [1]"),
    "cycle": (cycle, "exp_avg must be a tensor or a number"),
    "deep": (state("exp_avg", deep), "exp_avg must be a tensor or a number"),
    # groups
    "uphill": (group(maximize=True), f"{OF}.param_groups[0].maximize must be False, as the optimizer is configured"),
    "amsgrad": (group(amsgrad=True), "param_groups[0].amsgrad must be False"),
    "coupled": (group(decoupled_weight_decay=False), "decoupled_weight_decay must be True"),
    "fast": (group(lr="fast"), "param_groups[0].lr must be a number, got 'fast'"),
    "true rate": (group(lr=True), "param_groups[0].lr must be a number, got True"),
    "nan rate": (group(lr=math.nan), "param_groups[0].lr must be a finite number, got nan"),
    "huge rate": (group(lr=1e300), "param_groups[0].lr must be at most 1e+06"),
    "huge decay": (group(weight_decay=2.0**62), "param_groups[0].weight_decay must be at most 1e+06"),
    "endless rate": (group(lr=10**400), "param_groups[0].lr must be a finite number"),
    "negative rate": (group(lr=-1e-3), "param_groups[0].lr must be at least 0"),
    "tensor rate": (group(lr=torch.ones(2)), "param_groups[0].lr must be one number"),
    "betas": (group(betas=(0.9, 1.0)), "param_groups[0].betas[1] must be below 1, got 1.0"),
    "three betas": (group(betas=(0.9, 0.9, 0.9)), "betas must be a list of 2 values"),
    "no betas": (group(betas=0.9), "betas must be a list of 2 values, got 0.9"),
    "eps": (group(eps=-1.0), "param_groups[0].eps must be at least 0"),
    "weight decay": (group(weight_decay=None), "weight_decay must be a number, got None"),
    "another key": (group(evil=1), f"a key of {OF}.param_groups[0] must be"),
    "name": (group(name=3), "param_groups[0].name must be 'embeddings', as this run has, got 3"),
    "no lr": (without("optimizer_states/0/param_groups/0/lr"), "param_groups[0].lr is missing"),
    "params": (group(params=[1]), "param_groups[0].params must be [0], as this run has, got [1]"),
    "params of text": (group(params="ab"), "param_groups[0].params must be [0]"),
    "no params": (without("optimizer_states/0/param_groups/0/params"), "param_groups[0].params must be [0]"),
    "fewer groups": (without("optimizer_states/0/param_groups/0"), "param_groups must be a list of"),
    "group of text": (at("optimizer_states/0/param_groups/0", "x"), "param_groups[0] must be a mapping, got 'x'"),
    "another part": (at("optimizer_states/0/evil", 1), f"a key of {OF} must be state or param_groups, got 'evil'"),
    "two optimizers": (lambda c: c["optimizer_states"].append(c["optimizer_states"][0]), "must be a list of 1, as"),
    # schedulers
    "model alone": (without("optimizer_states"), "optimizer_states (the checkpoint holds a model alone"),
    "no scheduler": (at("lr_schedulers", []), "lr_schedulers must be a list of 1"),
    "scheduler's method": (scheduler(step=3), "a key of lr_schedulers[0] must be"),
    "scheduler's optimizer": (scheduler(optimizer=None), "a key of lr_schedulers[0] must be"),
    "last_epoch": (scheduler(last_epoch=-3), "lr_schedulers[0].last_epoch must be at least 0, got -3"),
    "last_epoch of text": (scheduler(last_epoch="3"), "lr_schedulers[0].last_epoch must be a number, got '3'"),
    "huge last_epoch": (scheduler(last_epoch=2**60), "lr_schedulers[0].last_epoch must be at most"),
    "base_lrs": (scheduler(base_lrs=[1.0]), "lr_schedulers[0].base_lrs must be a list of"),
    "nan base_lrs": (lambda c: scheduler(base_lrs=[math.nan] * len(c["lr_schedulers"][0]["base_lrs"]))(c),
                     "lr_schedulers[0].base_lrs[0] must be a finite number"),
    "lambdas": (lambda c: scheduler(lr_lambdas=[3] * len(c["lr_schedulers"][0]["base_lrs"]))(c),
                "lr_schedulers[0].lr_lambdas[0] must be None"),
    "scheduler of text": (at("lr_schedulers/0", "x"), "lr_schedulers[0] must be a mapping, got 'x'"),
    # loops
    "no loops": (at("loops", {}), "loops.fit_loop must be a mapping"),
    "epoch of text": (loop("epoch_progress/current/completed", "x"), "current.completed must be a number, got 'x'"),
    "half an epoch": (loop("epoch_progress/current/completed", 0.5), "current.completed must be a whole number"),
    "negative batch": (loop("epoch_loop.batch_progress/current/ready", -1), "loops.fit_loop.epoch_loop.batch_progress"),
    "negative validations": (
        loop("epoch_loop.val_loop.batch_progress/total", dict.fromkeys(PROGRESS, -1)), "must be at least 0",
    ),
    "more batches than began": (loop("epoch_loop.batch_progress/current/ready", 10**6), "at most 4, its total"),
    "more completed than begun": (loop("epoch_progress/current/completed", 10**6), "must be non-increasing counts"),
    "huge batches": (loop("epoch_loop.batch_progress/total/ready", 10**30), "must be at most"),
    "another loop": (loop("evil", 1), "a key of loops.fit_loop must be"),
    "is_last_batch": (loop("epoch_loop.batch_progress/is_last_batch", 3), "is_last_batch must be true or false"),
    "no progress": (without("loops/fit_loop/epoch_progress"), "loops.fit_loop.epoch_progress is missing"),
    "no total": (without("loops/fit_loop/epoch_progress/total"), "epoch_progress.total is missing"),
    "progress of text": (loop("epoch_loop.scheduler_progress", "x"), "scheduler_progress must be a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_trainer_fit_hostile_training_state_is_refused(name, saved, tmp_path):
    change, words = HOSTILE[name]
    checkpoint = torch.load(saved("fused")[0], weights_only=True)
    change(checkpoint)
    file = tmp_path / "hostile.ckpt"
    torch.save(checkpoint, file)
    with pytest.raises(InputError) as caught:
        fit("fused", ckpt_path=file)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"ckpt_path: {file}: ")
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
    from gpt2_pl.tasks.optimizer_state import state_layouts

    for make in (make for name, make in OPTIMIZERS.items() if name != "third"):
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 6), (8,), (2, 9))]
        optimizer = make([{"params": parameters[:2]}, {"params": parameters[2:]}])
        layouts = state_layouts(optimizer)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        before = copy.deepcopy([p.detach() for p in parameters])
        optimizer.step()
        assert not torch.equal(before[0], parameters[0])
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                layout, state = layouts[number, parameter.dim()], optimizer.state[parameter]
                assert layout is not None
                assert layout.keys() == state.keys()
                for key, value in state.items():
                    assert (value.shape == parameter.shape) == (layout[key].shape == (3, 5)[: parameter.dim()])
