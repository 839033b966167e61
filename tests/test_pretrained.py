"""Loading of Hugging Face folders, and refusal of those that do not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from gpt2_pl import GPT2, GPT2Config, pretrained
from gpt2_pl.errors import InputError
from gpt2_pl.filesystem import hub_id


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_from_pretrained_sharded_folder_equals_single_file_and_digest(base, tmp_path):
    theirs = GPT2LMHeadModel.from_pretrained(base)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    one, many = GPT2.from_pretrained(base), GPT2.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))
    assert pretrained.weights_sha256(one) == pretrained.weights_sha256(many)
    with torch.no_grad():
        many.ln_f.bias[0] += 1e-3
    assert pretrained.weights_sha256(one) != pretrained.weights_sha256(many)


def test_hub_id_is_none_for_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("models/mine") == "models/mine"
    (tmp_path / "models/mine").mkdir(parents=True)
    for path in ("models/mine", tmp_path / "mine", "a/b/c", "a" * 5000, "~nobody-here/model"):
        assert hub_id(path) is None, path


def test_from_pretrained_parameters_do_not_share_larger_storages(base):
    for name, parameter in GPT2.from_pretrained(base).named_parameters():
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel(), name


def test_from_pretrained_old_mask_buffers_and_tied_head_are_accepted(folder):
    def change(tensors):
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    edit(folder, change)
    GPT2.from_pretrained(folder)


def test_from_pretrained_names_without_prefix_are_accepted(folder):
    edit(
        folder,
        lambda tensors: [tensors.__setitem__(k.removeprefix("transformer."), tensors.pop(k)) for k in list(tensors)],
    )
    GPT2.from_pretrained(folder)


def test_from_pretrained_tensors_that_do_not_fit_are_refused_by_name(folder):
    original = (folder / "model.safetensors").read_bytes()
    for change, message in (
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.weight"), r"h\.1\.mlp\.c_fc\.weight"),
        (lambda t: t.update({"transformer.h.2.ln_1.bias": torch.zeros(32)}), r"h\.2\.ln_1\.bias"),
        (lambda t: t.update({"transformer.wpe.weight": torch.zeros(63, 32)}), r"wpe\.weight.*\(64, 32\).*\(63, 32\)"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(400, 32)}), r"lm_head\.weight"),
    ):
        (folder / "model.safetensors").write_bytes(original)
        edit(folder, change)
        with pytest.raises(InputError, match=message):
            GPT2.from_pretrained(folder)


def test_from_pretrained_truncated_weights_are_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        GPT2.from_pretrained(folder)


def test_from_pretrained_other_architecture_is_refused(folder):
    file = folder / "config.json"
    stored = json.loads(file.read_text())
    for key, value in {"model_type": "llama", "activation_function": "relu", "n_inner": 7, "n_head": 5}.items():
        file.write_text(json.dumps({**stored, key: value}))
        with pytest.raises(InputError, match=f"{key}.*{value}"):
            GPT2.from_pretrained(folder)


def test_from_pretrained_missing_folder_model_or_config_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        GPT2.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="nobody/no-such-gpt2"):
        GPT2.from_pretrained("nobody/no-such-gpt2")
    with pytest.raises(InputError, match=r"config\.json"):
        GPT2.from_pretrained(tmp_path)


def test_from_pretrained_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        GPT2.from_pretrained(folder)


def test_gpt2_random_initialisation_differs_from_pretrained_weights(base):
    config = GPT2.from_pretrained(base).config
    assert config == GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    assert pretrained.weights_sha256(GPT2(config)) != pretrained.weights_sha256(GPT2.from_pretrained(base))


def test_from_pretrained_real_base_logits_equal_transformers(shared):
    folder = shared / "base" / "gpt2-tiny"
    ours, theirs = GPT2.from_pretrained(folder).eval(), GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = torch.randint(ours.config.vocab_size, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=0)
