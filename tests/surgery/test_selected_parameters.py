"""Selections of parameters of the base: names of what trains, what stays fixed, combinations and exports."""

import json
from typing import get_args

import pytest
import torch
from helpers.classifiers import logits
from helpers.trainers import trainer
from safetensors.torch import load_file, save_file
from torch import nn

from gpt2_pl.commands.export import export_hf, export_peft
from gpt2_pl.datamodules import ToySentiment
from gpt2_pl.errors import InputError
from gpt2_pl.model import GPT2, GPT2Config
from gpt2_pl.surgery import BitFit, LayerNormTuning, LoRA, PeftAdapter, PrefixTuning
from gpt2_pl.surgery.peft_format import save
from gpt2_pl.surgery.peft_kinds import KINDS
from gpt2_pl.tasks import LanguageModel, SentimentClassifier
from gpt2_pl.utils.hugging_face_schema import AdapterConfig


def biases(model):
    """Return the names of all parameters that are added to something: those of linear layers and norms."""
    modules = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm))
    return {f"{name}.bias" for name, _ in modules}


def norms(model):
    modules = (name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    return {f"{name}.{key}" for name in modules for key in ("weight", "bias")}


SELECTIONS = [([BitFit()], biases), ([LayerNormTuning()], norms)]


@pytest.mark.parametrize(("surgery", "expected"), SELECTIONS, ids=["BitFit", "LayerNormTuning"])
def test_selection_trains_its_parameters_and_leaves_the_others_fixed(surgery, expected, base, tmp_path):
    plain = GPT2.from_pretrained(base)
    names = expected(plain)
    task = SentimentClassifier(base=str(base), surgery=surgery, dropout=0.0)
    task.make_optimizer = lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    fit = trainer(max_steps=3)
    fit.fit(task, ToySentiment(n_train=48, vocab_size=400, batch_size=16))
    assert task.trained_names == names
    moved = {n for n, p in task.backbone.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert moved == names
    fit.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == {f"gpt2.{name}" for name in names} | {"head.linear.weight", "head.linear.bias"}
    assert torch.equal(logits(SentimentClassifier.load_from_checkpoint(tmp_path / "x.ckpt")), logits(task))
    export_hf(task, tmp_path, base, backbone=True)
    exported = GPT2.from_pretrained(tmp_path)
    assert all(torch.equal(p, exported.get_parameter(n)) for n, p in task.backbone.named_parameters())


def test_selection_parameter_count_on_gpt2_small():
    for surgery, count in ((BitFit(), 102_144), (LayerNormTuning(), 38_400)):
        with torch.device("meta"):
            model = surgery.apply(GPT2(GPT2Config()))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_selections_combine_with_each_other_and_with_adapters(base, subtests):
    both = lambda model: biases(model) | norms(model)  # noqa: E731
    for surgery, expected in (
        ([BitFit(), LayerNormTuning()], both),
        ([LayerNormTuning(), BitFit()], both),
        ([LoRA(rank=2), BitFit()], biases),
        ([BitFit(), LoRA(rank=2)], biases),
        ([LayerNormTuning(), PrefixTuning(3)], norms),
    ):
        with subtests.test([type(one).__name__ for one in surgery]):
            task = LanguageModel(base=str(base), surgery=surgery)
            task.configure_model()
            trained = task.trained_names
            assert trained & task.backbone.base_names == expected(GPT2.from_pretrained(base))
            added = {name.rpartition(".")[2] for name in trained - task.backbone.base_names}
            adapters = {LoRA: {"lora_A", "lora_B"}, PrefixTuning: {"table"}}
            assert added == set().union(*(adapters.get(type(one), set()) for one in surgery))


def test_selection_with_full_fine_tuning_is_refused(base, tmp_path):
    save(LayerNormTuning().apply(GPT2.from_pretrained(base)), tmp_path / "norms", str(base))
    for surgery in (BitFit(), LayerNormTuning(), PeftAdapter(str(tmp_path / "norms"))):
        with pytest.raises(InputError, match=rf"train_base: true .* and .*{type(surgery).__name__} both"):
            LanguageModel(base=str(base), surgery=[surgery], train_base=True)


def test_export_peft_of_a_selection_without_type_or_base_is_refused(base, tmp_path, subtests):
    shape = {"vocab_size": 400, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    for surgery, settings, words in (
        ([BitFit()], {"base": str(base)}, r"base trains.*h\.0\.attn\.c_attn\.bias.*--format hf"),
        ([BitFit(), LoRA()], {"base": str(base)}, r"base trains.*h\.0\.attn\.c_attn\.bias"),
        ([LayerNormTuning(), LoRA()], {"base": str(base)}, "got LoRA and layer norms"),
        ([LayerNormTuning()], {"config": shape}, "pretrained base"),
    ):
        with subtests.test(words):
            task = LanguageModel(surgery=surgery, **settings)
            task.configure_model()
            with pytest.raises(InputError, match=words):
                export_peft(task, tmp_path)


def test_peft_adapter_of_layer_norms_that_does_not_fit_is_refused(base, tmp_path, subtests):
    save(LayerNormTuning().apply(GPT2.from_pretrained(base)), tmp_path / "norms", str(base))
    file, folder = tmp_path / "norms/adapter_model.safetensors", str(tmp_path / "norms")
    original = load_file(file)
    name = "base_model.model.transformer.h.0.ln_1.ln_tuning_layers.weight"
    for changed, words in (
        ({name: torch.ones(5)}, r"h\.0\.ln_1 does not fit LayerNorm"),
        ({name.replace("h.0", "h.9"): torch.ones(32)}, r"h\.9\.ln_1 does not fit the model"),
        ({name.replace("ln_1", "attn.c_attn"): torch.ones(32)}, "c_attn does not fit the model"),
        ({f"{name}.more": torch.ones(32)}, "more"),
    ):
        save_file({**original, **changed}, file)
        with subtests.test(words), pytest.raises(InputError, match=words):
            PeftAdapter(folder).apply(GPT2.from_pretrained(base))
    save_file({name.replace("ln_tuning_layers.", ""): torch.ones(32)}, file)
    with pytest.raises(InputError, match="no layer norms"):
        PeftAdapter(folder).apply(GPT2.from_pretrained(base))
    save_file(original, file)
    with pytest.raises(InputError, match=r"norms: other surgery selects h\.0\.ln_1 already"):
        LanguageModel(base=str(base), surgery=[LayerNormTuning(), PeftAdapter(folder)])


def test_schema_has_every_type_of_adapter(base, tmp_path):
    types = [kind.peft_type for kind in KINDS]
    assert sorted(get_args(AdapterConfig.model_fields["peft_type"].annotation)) == sorted(types)
    save(LoRA().apply(GPT2.from_pretrained(base)), tmp_path, None)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] in types
