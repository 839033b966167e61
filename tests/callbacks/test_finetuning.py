"""Gradual unfreezing and discriminative rates, in one process."""

import itertools

import pytest
import torch
from helpers.refusals import refusal
from helpers.trainers import Watch, trainer
from lightning.pytorch import Callback, seed_everything

from gpt2_pl import GPT2Config
from gpt2_pl.callbacks import DiscriminativeLR, GradualUnfreezing, Reproducibility
from gpt2_pl.datamodules import ToySentiment
from gpt2_pl.errors import InputError
from gpt2_pl.model import GPT2, Block
from gpt2_pl.optim import ConstantWithWarmup, LinearWithWarmup, parameter_groups
from gpt2_pl.surgery import LoRA, PrefixTuning, PromptTuning
from gpt2_pl.tasks import SentimentClassifier
from gpt2_pl.text.tokenizer import train_tokenizer

SHAPE = GPT2Config(vocab_size=400, n_positions=64, n_embd=16, n_layer=4, n_head=2, dropout=0.1)
LAYERS = ["embeddings", *(f"block.{i}" for i in range(12)), "ln_f", "head"]


def data(**settings):
    return ToySentiment(**{"n_train": 256, "vocab_size": 400, "batch_size": 32, **settings})


@pytest.fixture(scope="module")
def toy_base(tmp_path_factory):
    """A pretrained GPT-2 whose tokenizer is the toy data's own."""
    folder = tmp_path_factory.mktemp("toy_base")
    torch.manual_seed(3)
    GPT2(SHAPE).save_pretrained(folder)
    train_tokenizer((row["sentence"] for row in data()._texts("train")), 400).save(str(folder / "tokenizer.json"))
    return str(folder)


def classifier(**options):
    seed_everything(0, verbose=False)
    options = options if "base" in options else {"config": SHAPE, **options}
    make = {
        "optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
        "schedule": ConstantWithWarmup(),
    }
    return SentimentClassifier(num_classes=3, **{**make, **options})


def test_stage_layers_default_on_gpt2_small_gives_five_stages():
    stages = GradualUnfreezing().stage_layers(LAYERS)
    assert stages == [
        ["ln_f", "head"],
        ["block.9", "block.10", "block.11"],
        ["block.6", "block.7", "block.8"],
        ["block.3", "block.4", "block.5"],
        ["embeddings", "block.0", "block.1", "block.2"],
    ]
    assert GradualUnfreezing(blocks_per_stage=12).stage_layers(LAYERS)[1] == LAYERS[:-2]
    assert GradualUnfreezing().stage_layers(["a", "b", "c"]) == [["c"], ["b"], ["a"]]


def test_stage_at_fractional_epochs_per_stage_advances_within_epoch():
    callback = GradualUnfreezing(epochs_per_stage=0.5)
    callback._params_by_stage = [[], [], [], []]  # three stages, and what never joins
    stages = [callback.stage_at(epoch, batch, 10) for epoch in range(3) for batch in range(10)]
    assert stages == [0] * 5 + [1] * 5 + [2] * 20
    callback = GradualUnfreezing(epochs_per_stage=0.1)
    callback._params_by_stage = [[]] * 12
    assert [callback.stage_at(0, batch, 10) for batch in range(10)] == list(range(10))


@pytest.mark.parametrize("surgery", [[], [LoRA(rank=2, targets=["c_attn", "c_fc"])]], ids=["full", "LoRA"])
def test_gradual_unfreezing_each_stage_trains_only_unfrozen_layers(surgery, toy_base):
    """Eight batches an epoch, a stage every half epoch: head, blocks 2-3, blocks 0-1 and embeddings."""
    task, watch = classifier(base=toy_base, surgery=surgery), Watch()
    callback = GradualUnfreezing(blocks_per_stage=2, epochs_per_stage=0.5)
    start = {}

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            start.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    trainer(max_epochs=2, callbacks=[Start(), callback, watch, Reproducibility()]).fit(task, data(tokenizer=toy_base))
    trainable = {name for name in start if not surgery or "lora" in name or name.startswith("head")}
    joins = {}
    for name in trainable:
        if name.startswith(("head", "gpt2.ln_f")):
            joins[name] = 0
        elif name.startswith(("gpt2.h.2.", "gpt2.h.3.")):
            joins[name] = 4
        else:
            joins[name] = 8
    assert len(watch.trains) == 16
    for step, (trains, weights) in enumerate(zip(watch.trains, watch.weights, strict=True)):
        assert trains == {name for name, first in joins.items() if first <= step}
        for name, weight in weights.items():
            if joins.get(name, 99) > step:
                assert torch.equal(weight, start[name]), (step, name)
    moved = {name for name in start if not torch.equal(watch.weights[-1][name], start[name])}
    unread = {"gpt2.wpe.weight", "gpt2.wte.weight"}  # of which only rows in use move
    assert moved | unread >= trainable
    assert all(p.requires_grad for name, p in task.named_parameters() if name in trainable)  # as before


def test_gradual_unfreezing_layers_in_no_stage_stay_frozen():
    task, watch = classifier(), Watch()
    callback = GradualUnfreezing(stages=[["head", "ln_f"], ["block.2-3"]], epochs_per_stage=0.5)
    trainer(max_epochs=1, callbacks=[callback, watch]).fit(task, data())
    parts = {name.split(".")[0] if name.startswith("head") else ".".join(name.split(".")[1:3])
             for name in watch.trains[-1]}  # fmt: skip
    assert parts == {"head", "ln_f.weight", "ln_f.bias", "h.2", "h.3"}


def test_finetuning_callbacks_neutral_settings_equal_plain_training():
    finals = []
    for callbacks in ([], [GradualUnfreezing(stages=[["embeddings", "block.0-3", "ln_f", "head"]])],
                      [DiscriminativeLR(decay=1.0)]):  # fmt: skip
        task = classifier(schedule=LinearWithWarmup(warmup=0.1))
        trainer(max_epochs=1, callbacks=[*callbacks, Reproducibility()]).fit(task, data())
        finals.append(task.state_dict())
    for other in finals[1:]:
        assert all(torch.equal(finals[0][name], other[name]) for name in finals[0])


def rates(task, *callbacks, **settings):
    """Group name -> its rate in every step."""
    seen = {}

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *_):
            for group in trainer.optimizers[0].param_groups:
                seen.setdefault(group["name"], []).append(group["lr"])

    trainer(max_epochs=1, callbacks=[*callbacks, Rates()], **settings).fit(task, data(tokenizer=task.base))
    return seen


def test_discriminative_lr_decay_scales_rate_of_each_layer():
    seen = rates(classifier(schedule=LinearWithWarmup()), DiscriminativeLR(decay=0.5, head_scale=3.0))
    expected = {"embeddings": 1 / 16, "block.0": 1 / 8, "block.1": 1 / 4, "block.2": 1 / 2, "block.3": 1, "head": 3}
    for layer, scale in {**expected, "ln_f": 1}.items():
        for name in (f"{layer}/no_decay", layer):
            if name in seen:
                assert seen[name] == pytest.approx([1e-2 * scale * (1 - step / 8) for step in range(8)])
    assert {name.split("/")[0] for name in seen} == {*expected, "ln_f"}


def test_discriminative_lr_with_lora_plus_multiplies_layer_rate_by_ratio(toy_base):
    lora = LoRA(rank=2, targets=["c_attn"], loraplus_lr_ratio=4.0)
    seen = rates(classifier(base=toy_base, surgery=[lora]), DiscriminativeLR(decay=0.5))
    first = {name: values[0] for name, values in seen.items()}
    expected = {"head": 1e-2, "head/no_decay": 1e-2}
    for i in range(4):
        expected |= {f"block.{i}": 1e-2 / 2 ** (3 - i), f"block.{i}/lr_x4": 4e-2 / 2 ** (3 - i)}
    assert first == pytest.approx(expected)


def test_parameter_groups_any_surgery_hold_each_trainable_parameter_once(toy_base):
    for surgery in ([], [LoRA()], [PrefixTuning(3, hidden=5), LoRA(loraplus_lr_ratio=2.0)], [PromptTuning(3)]):
        task = classifier(base=toy_base, surgery=surgery)
        task.configure_model()
        layers = task.layer_groups()
        named = [id(p) for parameters in layers.values() for _, p in parameters]
        assert sorted(named) == sorted({id(p) for p in task.parameters()})
        assert list(layers) == task.layer_names
        grouped = [id(p) for group in parameter_groups(layers) for p in group["params"]]
        assert sorted(grouped) == sorted({id(p) for p in task.parameters() if p.requires_grad})


INVALID = [  # a call, and what the message names
    (lambda: GradualUnfreezing(stages=[]), "stages"),
    (lambda: GradualUnfreezing(stages=[["head"], []]), "stages"),
    (lambda: GradualUnfreezing(blocks_per_stage=0), "blocks_per_stage"),
    (lambda: GradualUnfreezing(epochs_per_stage=0), "epochs_per_stage"),
    (lambda: DiscriminativeLR(decay=0), "decay"),
    (lambda: DiscriminativeLR(decay=1.1), "1.1"),
    (lambda: DiscriminativeLR(head_scale=0), "head_scale"),
    (lambda: GradualUnfreezing(stages=[["top"]]).stage_layers(LAYERS), "'top'"),
    (lambda: GradualUnfreezing(stages=[["block.11-12"]]).stage_layers(LAYERS), "'block.12'"),
    (lambda: GradualUnfreezing(stages=[["head"], ["head"]]).stage_layers(LAYERS), "head twice"),
    (lambda: DiscriminativeLR(top=["tail"]).scales(LAYERS), "'tail'"),
]


def test_finetuning_callbacks_invalid_settings_are_refused():
    for make, named in INVALID:
        assert named in str(refusal(make, case=named)), named


@pytest.mark.parametrize("make", [GradualUnfreezing, DiscriminativeLR])
def test_finetuning_callbacks_duplicate_or_frozen_blocks_are_refused(make, toy_base):
    with pytest.raises(InputError, match=f"two {make.__name__}"):
        trainer(max_epochs=1, callbacks=[make(), make()]).fit(classifier(), data())
    for options in ({"train_base": False}, {"surgery": [PrefixTuning(3)]}):
        with pytest.raises(InputError, match="no block"):
            trainer(max_epochs=1, callbacks=[make()]).fit(
                classifier(base=toy_base, **options), data(tokenizer=toy_base)
            )


@pytest.mark.slow
def test_gradual_unfreezing_compiled_blocks_graph_count_is_bounded(monkeypatch):
    """Compile block by block: a block is frozen, the lowest trainable one, or above it: three graphs for any number of
    stages, and three more for the last block, which reads one position."""
    import torch._dynamo

    def compile_graphs_alone(block, **settings):
        torch.nn.Module.compile(block, backend="eager", **settings)

    monkeypatch.setattr(Block, "compile", compile_graphs_alone)

    def graphs(*callbacks):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        task = classifier(compile=True)
        settings = {"limit_val_batches": 0, "num_sanity_val_steps": 0, "callbacks": list(callbacks)}
        trainer(max_epochs=3, **settings).fit(task, data(n_train=64, batch_size=16))
        assert not torch._dynamo.utils.counters["graph_break"]
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    assert graphs() == 2
    assert graphs(GradualUnfreezing(blocks_per_stage=1, epochs_per_stage=0.5)) <= 6  # five stages


def test_gradual_unfreezing_frozen_layers_skip_backward_products():
    """Count matrix products: the backward pass ends at the lowest trainable layer."""
    products = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.profile = torch.profiler.profile()
            self.profile.__enter__()

        def on_train_batch_end(self, *_):
            self.profile.__exit__(None, None, None)
            events = self.profile.key_averages()
            products.append(sum(e.count for e in events if e.key in ("aten::mm", "aten::addmm")))

    callback = GradualUnfreezing(blocks_per_stage=1, epochs_per_stage=0.125)
    task = classifier(optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-3))
    trainer(max_epochs=1, callbacks=[callback, Count()]).fit(task, data())
    steps = [b - a for a, b in itertools.pairwise(products[:5])]
    assert steps[:3] == [steps[0]] * 3  # one block more each time
    assert steps[0] >= 8
    assert products[5:] == [products[4]] * 3


def test_gradual_unfreezing_stage_without_trainable_parameters_is_skipped_or_refused(toy_base):
    surgery = [LoRA(rank=2, targets=["c_attn"])]
    watch = Watch()
    task = classifier(base=toy_base, surgery=surgery, head="verbalizer", label_words=["a", "b", "c"])
    trainer(max_epochs=2, callbacks=[GradualUnfreezing(blocks_per_stage=2), watch]).fit(task, data())
    assert {int(name.split(".")[2]) for name in watch.trains[0]} == {2, 3}  # the first stage had neither head nor ln_f
    assert {int(name.split(".")[2]) for name in watch.trains[-1]} == {0, 1, 2, 3}
    task = classifier(base=toy_base, surgery=surgery)
    with pytest.raises(InputError, match=r"\[embeddings\]"):
        trainer(max_epochs=2, callbacks=[GradualUnfreezing(stages=[["head"], ["embeddings"]])]).fit(task, data())


def test_gradual_unfreezing_unreached_stages_warn():
    with pytest.warns(match=r"2 epochs, .*embeddings, block.0, block.1 .*3 stages"):
        trainer(max_epochs=2, callbacks=[GradualUnfreezing(blocks_per_stage=2)]).fit(classifier(), data())


def test_check_unknown_layer_is_refused_before_model_is_built():
    task = classifier()
    for callback, layer in (GradualUnfreezing(stages=[["top"]]), "'top'"), (DiscriminativeLR(top=["tail"]), "'tail'"):
        assert layer in str(refusal(callback.check, [callback], task))
    assert task.gpt2 is None


def test_discriminative_lr_with_unfreezing_keeps_rates_at_every_stage():
    task, watch = classifier(), Watch()
    callbacks = [DiscriminativeLR(decay=0.5), GradualUnfreezing(blocks_per_stage=2), watch]
    fit = trainer(max_epochs=3, callbacks=callbacks)
    fit.fit(task, data())
    rates = {id(p): group["lr"] for group in fit.optimizers[0].param_groups for p in group["params"]}
    for name, parameter in task.named_parameters():
        block = int(name.split(".")[2]) if ".h." in name else -1 if ".wte." in name or ".wpe." in name else 3
        assert rates[id(parameter)] == pytest.approx(1e-2 * 0.5 ** (3 - block)), name
    stages = [watch.trains[i] for i in (0, 8, 16)]
    assert stages[0] < stages[1] < stages[2] == {name for name, _ in task.named_parameters()}
