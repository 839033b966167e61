"""Dropout in a frozen base: none by default, as in peft with ``frozen_base_dropout``; trained parts keep theirs."""

from dataclasses import dataclass

import peft
import pytest
import torch
import yaml
from conftest import ROOT, weights
from helpers.refusals import names, refused
from lightning.pytorch import Callback
from transformers import GPT2LMHeadModel

from gpt2_pl.errors import InputError
from gpt2_pl.model import GPT2Config
from gpt2_pl.surgery import LoRA, LoRALinear, PrefixTuning, PromptTuning, Surgery
from gpt2_pl.tasks import LanguageModel, SentimentClassifier

CONFIGS = ROOT / "configs"
P = 0.3
IDS = torch.randint(400, (3, 11), generator=torch.Generator().manual_seed(5))


def built(task, **options):
    task = task(dropout=P, **options)
    task.configure_model()
    return task.train()


def copied(ours, theirs):
    """Return pairs of trained parameters, ours and peft's, after copying the values of ours."""
    adapters = {name: module for name, module in ours.named_modules() if isinstance(module, LoRALinear)}
    pairs = []
    for name, module in theirs.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            mine = adapters[name.removeprefix("base_model.model.transformer.")]
            pairs += [(mine.lora_A, module.lora_A["default"].weight), (mine.lora_B, module.lora_B["default"].weight)]
    if ours.prefix is not None:
        pairs.append((ours.prefix.table, theirs.prompt_encoder["default"].embedding.weight))
    if ours.prompt is not None:
        pairs.append((ours.prompt.embedding, theirs.prompt_encoder["default"].embedding.weight))
    with torch.no_grad():
        for mine, other in pairs:
            if not mine.any():
                mine.normal_(std=0.2)  # LoRA's B
            other.copy_(mine)
    return pairs


ARMS = {
    "lora": (
        LoRA(rank=3, targets=["c_attn", "c_fc"], dropout=0.2),
        peft.LoraConfig(
            r=3, lora_alpha=16, lora_dropout=0.2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        ),
    ),
    "prefix": (PrefixTuning(4), peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
    "prompt": (PromptTuning(5), peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")),
}  # fmt: skip


@pytest.mark.parametrize("base_drops", [False, True])
@pytest.mark.parametrize("arm", ARMS)
def test_frozen_base_training_pass_equals_peft_with_equal_masks(arm, base_drops, base, monkeypatch):
    """The base of peft's model has a dropout of 0 or that of the task; LoRA has its own dropout in both."""
    monkeypatch.setattr("gpt2_pl.kernels.dropout._use_cpu_kernel", lambda x: False)  # PyTorch's masks, as peft's are
    surgery, config = ARMS[arm]
    task = built(LanguageModel, base=str(base), surgery=[surgery], frozen_base_dropout=base_drops)
    ours, p = task.backbone, P if base_drops else 0.0
    their_base = GPT2LMHeadModel.from_pretrained(
        base, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p, attn_implementation="eager"
    )
    theirs = peft.get_peft_model(their_base, config).train()
    pairs = copied(ours, theirs)
    assert pairs
    torch.manual_seed(3)
    a = ours.logits(ours(IDS))
    torch.manual_seed(3)
    b = theirs(IDS).logits[:, -IDS.size(1) :]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for logits in (a, b):
        logits.logsumexp(-1).mean().backward()
    for mine, other in pairs:
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-4)
    torch.manual_seed(4)
    again = ours.logits(ours(IDS))
    assert torch.equal(again, a) == (not base_drops and arm != "lora")  # whether any mask is drawn


@pytest.mark.parametrize("base_drops", [False, True])
def test_frozen_base_dropout_leaves_adapter_and_head_dropout_unchanged(base_drops, base):
    options = {"base": str(base), "num_classes": 2, "surgery": [LoRA(dropout=0.2)], "frozen_base_dropout": base_drops}
    task = built(SentimentClassifier, **options)
    backbone = task.backbone
    found = {backbone.dropout, *(block.dropout for block in backbone.h), *(block.attn.dropout for block in backbone.h)}
    assert found == {P if base_drops else 0.0}
    assert backbone.config.dropout == task.config.dropout == task.head.dropout == P
    assert {module.dropout for module in backbone.modules() if isinstance(module, LoRALinear)} == {0.2}
    assert built(SentimentClassifier, head_dropout=0.1, **options).head.dropout == 0.1


def test_base_dropout_trained_with_prefix_is_kept(base):
    task = built(LanguageModel, base=str(base), surgery=[PrefixTuning(3)], train_base=True)
    assert {task.backbone.dropout, *(block.attn.dropout for block in task.backbone.h)} == {P}


@dataclass
class Biases(Surgery):
    """Train the biases only."""

    def apply(self, model, tokenizer=None):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        return model


def test_base_dropout_partly_trained_is_kept(base):
    task = built(LanguageModel, base=str(base), surgery=[Biases()])
    assert {task.backbone.dropout, *(block.attn.dropout for block in task.backbone.h)} == {P}


@pytest.fixture
def fit(run, base, data_flags):
    """Fit CFIMDB's format for an epoch under a strategy."""

    def fit(strategy, *extra):
        return run("fit", f"--config={CONFIGS}/task/imdb.yaml", f"--config={CONFIGS}/strategy/{strategy}.yaml",
                   f"--model.base={base}", *data_flags, "--data.max_length=32", "--trainer.precision=32-true",
                   "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1",
                   *extra)  # fmt: skip

    return fit


def test_frozen_base_dropout_in_full_fine_tuning_has_no_effect(base):
    for value in (False, True):
        task = built(LanguageModel, base=str(base), frozen_base_dropout=value)
        assert {task.backbone.dropout, *(block.attn.dropout for block in task.backbone.h)} == {P}, value


def test_frozen_base_dropout_is_kept_by_config_checkpoint_and_resumed_run(fit, capsys):
    settings = ["--trainer.max_epochs=2", "--model.frozen_base_dropout=true"]
    whole = fit("lora", *settings, "--name=whole")
    without = fit("lora", "--trainer.max_epochs=2", "--name=without")
    half = fit("lora", *settings, "--name=half", "--trainer.max_time=00:00:00:00", "--trainer.min_epochs=1")
    used = {name: yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["frozen_base_dropout"]
            for name, folder in (("whole", whole), ("without", without), ("half", half))}  # fmt: skip
    assert used == {"whole": True, "without": False, "half": True}
    checkpoint = half / "checkpoints/last.ckpt"
    task = SentimentClassifier.load_from_checkpoint(checkpoint)
    task.configure_model()
    assert (task.frozen_base_dropout, task.backbone.dropout) == (True, P)
    resume = ["--trainer.max_epochs=2", f"--ckpt_path={checkpoint}"]
    line = refused(lambda: fit("lora", *resume, "--model.frozen_base_dropout=false"), capsys)
    assert names(line.error or line, "frozen_base_dropout")
    resumed = fit("lora", *resume)  # the checkpoint says what the command line leaves out
    surgery = yaml.safe_load((resumed / "config.yaml").read_text())["model"]["init_args"]["surgery"]
    assert len(surgery) == 1  # the configuration of LoRA does not add it again
    states = [weights(folder / "checkpoints/last.ckpt") for folder in (whole, resumed, without)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


class DropoutOf(Callback):
    """Record at each step whether the base trains, its dropout, and whether it is in training mode."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        backbone = pl_module.backbone
        trains = any(p.requires_grad for name, p in backbone.named_parameters() if name in backbone.base_names)
        seen.append((trains, backbone.dropout, backbone.h[0].attn.dropout, backbone.training))


seen = []


def test_base_dropout_frozen_for_one_stage_is_kept(fit):
    seen.clear()
    stages = "[[head], [ln_f, block.0-1, embeddings]]"
    stages = f"{{class_path: gpt2_pl.callbacks.GradualUnfreezing, init_args: {{stages: {stages}}}}}"
    fit("full", "--trainer.max_epochs=2", f"--trainer.callbacks=[{stages}, {__name__}.DropoutOf]")
    assert {trains for trains, *_ in seen} == {False, True}
    assert {(p, of_attention, training) for _, p, of_attention, training in seen} == {(P, P, True)}


def test_linear_probe_frozen_base_dropout_runs_the_base_in_training_mode(fit):
    for value, expected in ((False, (False, 0.0, 0.0, False)), (True, (False, P, P, True))):
        seen.clear()
        fit("linear_probe", "--trainer.max_epochs=1", f"--model.frozen_base_dropout={str(value).lower()}",
            f"--trainer.callbacks=[{__name__}.DropoutOf]")  # fmt: skip
        assert set(seen) == {expected}


def test_freezes_base_of_surgery_that_selects_parameters_is_refused():
    """Restoring what trained before would freeze the selected biases again, without a word."""

    class Biases(Surgery):
        freezes_base = True

        def apply(self, model, tokenizer=None):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.endswith("bias"))

    with pytest.raises(InputError) as error:
        SentimentClassifier(
            config=GPT2Config(vocab_size=400, n_positions=32, n_embd=8, n_layer=1, n_head=2), surgery=[Biases()]
        )
    assert error.value.key == "model.surgery"
    assert "Biases has freezes_base = True" in str(error.value)
