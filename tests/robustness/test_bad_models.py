"""Invalid model folders, tokenizers and adapters: each is refused with one error that names it."""

import json
import math
import shutil
import struct

import pytest
import torch
from helpers.changed_tokenizers import add_token, change_tokenizer
from helpers.fuzzing import fuzz
from helpers.refusals import refusal
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gpt2_pl import GPT2, pretrained
from gpt2_pl.errors import InputError, shorten
from gpt2_pl.surgery import LoRA, PeftAdapter
from gpt2_pl.surgery.peft_format import save
from gpt2_pl.text.tokenizer import load_tokenizer, validate_vocab_size


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def state(folder, **changes):
    """Change values of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# config.json

SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
ODD = [None, "32", -1, 0, 3.5, 64.0, [2], {"a": 1}, True, 10**7, 10**18, 2**70, 1e30, float("nan"), float("inf")]


FIXED = {  # settings of the architecture, and their valid values
    "n_inner": (None, 128),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
    "model_type": ("gpt2",),
}


def test_from_pretrained_invalid_config_values_are_refused_by_key(folder):
    original = (folder / "config.json").read_text()
    cases = [(key, value) for key in SIZES for value in ODD if not (isinstance(value, int) and value > 1)]
    cases += [(key, value) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")
              for value in (None, "0.1", -0.1, 1.0, [0.1], True, float("nan"))]  # fmt: skip
    cases += [(key, value) for key, valid in FIXED.items() for value in [*ODD, "relu", "gelu", "llama", 7, 1e-6]
              if value not in valid]  # fmt: skip
    for key, value in cases:
        state(folder, **{key: value})
        error = refusal(GPT2.from_pretrained, folder, case=(key, value))
        assert key in str(error), (key, value)
        assert "config.json" in str(error), (key, value)
        (folder / "config.json").write_text(original)


def test_from_pretrained_sizes_other_than_those_of_the_weights_are_refused(folder):
    original = (folder / "config.json").read_text()
    for key in SIZES:
        for value in (7, 10**7, 10**18, 2**70):
            state(folder, **{key: value})
            assert "config" in str(refusal(GPT2.from_pretrained, folder, case=(key, value))), (key, value)
            (folder / "config.json").write_text(original)


def test_from_pretrained_architecture_settings_equal_to_gpt2_are_accepted(folder):
    for key, valid in FIXED.items():
        for value in valid:
            state(folder, **{key: value})
            GPT2.from_pretrained(folder)


def test_from_pretrained_malformed_config_json_is_refused(folder):
    for content in (b"", b"[]", b"1", b"null", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"n_embd": '):
        (folder / "config.json").write_bytes(content)
        assert "config.json" in str(refusal(GPT2.from_pretrained, folder, case=content)), content[:20]


# Weights


def whole(folder):
    content = (folder / "model.safetensors").read_bytes()
    n = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def written(header, tail):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + tail


def lying(header, **lie):
    return {name: {**entry, **lie} if "ln_" in name else entry for name, entry in header.items()}


@fuzz
@given(st.data())
def test_from_pretrained_damaged_weights_are_refused_or_equal_the_file(base, tmp_path, data):
    folder = tmp_path / "copy"
    if not folder.exists():
        shutil.copytree(base, folder)
    original = (base / "model.safetensors").read_bytes()
    content = bytearray(original)
    n = struct.unpack("<Q", original[:8])[0]
    how = data.draw(st.sampled_from(["cut", "header", "byte", "longer"]))
    if how == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif how == "longer":
        content += data.draw(st.binary(min_size=1, max_size=9))
    else:
        place = data.draw(st.integers(0, 8 + n - 1) if how == "header" else st.integers(8 + n, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    (folder / "model.safetensors").write_bytes(content)
    try:
        model = GPT2.from_pretrained(folder)
    except InputError as error:
        assert "copy" in str(error)
        return
    stored = load_file(folder / "model.safetensors")  # what loads is what the file says, whatever it says
    assert torch.equal(model.wte.weight, stored["transformer.wte.weight"])
    assert torch.equal(model.h[1].mlp.c_fc.weight, stored["transformer.h.1.mlp.c_fc.weight"].t())
    assert model.state_dict().keys() == {name.removeprefix("transformer.") for name in stored}


FALSE_HEADERS = [
    lambda header, tail: struct.pack("<Q", 2**63) + b"{}",
    lambda header, tail: struct.pack("<Q", 100_000_001) + b"{}",
    lambda header, tail: written(b"[]", tail),
    lambda header, tail: written({**header, "x": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}}, tail),
    lambda header, tail: written(lying(header, data_offsets=[0, 128]), tail),
    lambda header, tail: written(lying(header, shape=[-1]), tail),
    lambda header, tail: written(lying(header, dtype="F99"), tail),
]


def test_from_pretrained_false_safetensors_header_is_refused(folder):
    header, tail = whole(folder)
    for i, change in enumerate(FALSE_HEADERS):
        (folder / "model.safetensors").write_bytes(change(header, tail))
        assert "model.safetensors is not" in str(refusal(GPT2.from_pretrained, folder, case=i)), i


TENSORS = [  # changes of the tensors, and parts of the message
    (lambda t: t["transformer.ln_f.bias"].fill_(float("nan")), "ln_f.bias", "finite"),
    (lambda t: t["transformer.wte.weight"][3].fill_(float("inf")), "wte.weight", "finite"),
    (lambda t: t.update({"wte.weight": t["transformer.wte.weight"] + 1}), "wte.weight", "twice"),
    (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(32).long()}), "ln_f.bias", "I64"),
    (lambda t: t.update({"transformer.ln_f.bias": torch.tensor(0.0)}), "ln_f.bias", "got ()"),
    (lambda t: [t.pop(name) for name in list(t) if ".h.1." in name], "n_layer is 2", "1 layers"),
    (lambda t: t.clear(), "copy", "lacks"),
]


def test_from_pretrained_invalid_tensors_are_refused_by_name(folder):
    file = folder / "model.safetensors"
    for i, (change, named, words) in enumerate(TENSORS):
        tensors = load_file(file)
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        change(tensors)
        save_file(tensors, file)
        error = refusal(GPT2.from_pretrained, folder, case=i)
        assert named in str(error), i
        assert words in str(error), i
        save_file(kept, file)


def test_from_pretrained_shard_index_outside_the_folder_is_refused(folder):
    shards = ("../../etc/passwd", "/etc/passwd", "..", ".", "", "gone", "x" * 300, 1, None, {})
    indices = [{"weight_map": {"a": shard}} for shard in shards]
    indices += [{"weight_map": {"a": 1, "b": "x"}}, {"weight_map": [1]}, {"weight_map": {}}, {}, []]
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    file = folder / "model.safetensors.index.json"
    for text in [*map(json.dumps, indices), "[" * 100_000]:
        file.write_text(text)
        assert "copy" in str(refusal(GPT2.from_pretrained, folder, case=text)), text[:50]


def test_check_too_many_layers_are_refused_before_the_model_is_built(folder, monkeypatch):
    state(folder, n_layer=10**9)
    monkeypatch.setattr(pretrained, "GPT2", None)  # would be called
    with pytest.raises(InputError, match="1000000000"):
        pretrained.validate_weights(folder, pretrained.read_config(folder))


def test_check_huge_width_without_embeddings_is_refused_before_the_model_is_built(folder):
    state(folder, n_embd=2**30, n_head=1)
    file = folder / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "wte" not in name and "wpe" not in name}, file)
    with pytest.raises(InputError, match=r"lacks tensors.*wpe\.weight, wte\.weight"):
        GPT2.from_pretrained(folder)


# Tokenizers


def test_load_tokenizer_empty_vocabulary_is_refused(folder):
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["model"].update(vocab={}, merges=[])
    file.write_text(json.dumps({**settings, "added_tokens": []}))
    with pytest.raises(InputError, match="empty vocabulary"):
        load_tokenizer(folder)
    file.unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("")
    with pytest.raises(InputError, match="no token"):
        load_tokenizer(folder)


def test_load_tokenizer_huge_token_id_is_refused(folder):
    add_token(folder, 4_000_000_000)
    with pytest.raises(InputError, match="4000000000"):
        load_tokenizer(folder)


def test_validate_vocab_size_special_token_beyond_vocabulary_is_refused(folder):
    around = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}},
              {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
              {"Sequence": {"id": "B", "type_id": 0}}],
              "special_tokens": {"x": {"id": "x", "ids": [4000], "tokens": ["x"]}}}  # fmt: skip
    change_tokenizer(folder, post_processor=around)
    with pytest.raises(InputError, match=r"4000 .*vocab_size 400"):
        validate_vocab_size(load_tokenizer(folder), 400, "the base", "data.tokenizer")


# Adapters


@pytest.fixture
def adapter(base, tmp_path):
    model = GPT2.from_pretrained(base)
    LoRA(rank=2, targets=["c_attn"]).apply(model)
    save(model, tmp_path / "adapter", str(base))
    return tmp_path / "adapter"


BAD_SETTINGS = {
    "lora_alpha": ("x", [1], 10**400, math.inf, math.nan, True, None),
    "lora_dropout": ("x", 2, 1, -1, math.nan, True),
    "alpha_pattern": (3, {".*": "x"}, {"(": 1}, {".*": 10**400}, {".*": -math.inf}, {".*": math.nan}, {".*": True},
                      {"(.+)+x": 1}, {"(a|a)*b": 1}, {".*.*.*.*.*x": 1}, {"x" * 10**6: 1}),
    "rank_pattern": ({"a": 2.5},),
    "use_dora": ("x",),
    "use_rslora": (3,),
    "peft_type": (3, "VERA", None),
    "bias": ({"a": 1},),
    "kasa_config": ({"alpha": 1},),
    "of_the_future": (3,),
    "r": ("8",),
}  # fmt: skip


def test_peft_adapter_invalid_settings_are_refused_by_name(adapter, base):
    file = adapter / "adapter_config.json"
    original, gpt2 = json.loads(file.read_text()), GPT2.from_pretrained(base)
    for key, values in BAD_SETTINGS.items():
        for value in values:
            file.write_text(json.dumps({**original, key: value}))
            error = refusal(PeftAdapter(str(adapter)).apply, gpt2, case=(key, value))
            assert key in str(error).removeprefix(str(adapter)), (key, shorten(value))


def test_peft_adapter_invalid_tensors_or_config_are_refused(adapter, base):
    file, gpt2 = adapter / "adapter_model.safetensors", GPT2.from_pretrained(base)
    original = load_file(file)
    name = next(name for name in original if name.endswith("lora_A.weight"))
    for tensor in (torch.tensor(1.0), torch.zeros(0, 32), torch.full((2, 32), float("nan")), torch.zeros(2, 32).long()):
        save_file({**original, name: tensor}, file)
        assert "adapter" in str(refusal(PeftAdapter(str(adapter)).apply, gpt2, case=tensor)), tensor
    for content in ("[]", "1", "{", "[" * 100_000):
        (adapter / "adapter_config.json").write_text(content)
        assert "adapter" in str(refusal(PeftAdapter(str(adapter)).apply, gpt2, case=content)), content[:20]


def test_peft_adapter_magnitude_or_layer_norm_of_another_shape_is_refused(base, tmp_path):
    save(LoRA(use_dora=True).apply(GPT2.from_pretrained(base)), tmp_path / "adapter", str(base))
    file = tmp_path / "adapter/adapter_model.safetensors"
    original, path = load_file(file), "base_model.model.transformer"
    for changed in (
        {f"{path}.h.0.attn.c_attn.lora_magnitude_vector": torch.ones(5)},
        {f"{path}.ln_f.weight": torch.ones(32)},
        {f"{path}.ln_f.weight": torch.ones(32), f"{path}.ln_f.bias": torch.ones(7)},
    ):
        save_file({**original, **changed}, file)
        error = refusal(PeftAdapter(str(tmp_path / "adapter")).apply, GPT2.from_pretrained(base), case=list(changed))
        assert "adapter" in str(error), list(changed)


def test_peft_adapter_pickled_weights_are_refused(adapter, base):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert str(adapter) in str(refusal(PeftAdapter(str(adapter)).apply, GPT2.from_pretrained(base)))
