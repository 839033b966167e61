"""Invalid model folders, tokenizers, adapters and prompts: each is refused with one error that names it."""

import json
import math
import shutil
import struct
from datetime import timedelta

import pytest
import torch
from conftest import ROOT
from helpers.refusals import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gpt2_pl import GPT2, pretrained
from gpt2_pl.commands import main
from gpt2_pl.errors import InputError, shorten
from gpt2_pl.surgery import LoRA, PeftAdapter
from gpt2_pl.surgery.peft_format import save
from gpt2_pl.text.tokenizer import load_tokenizer, validate_vocab_size

CONFIG = ROOT / "configs"
fuzz = settings(
    max_examples=80,
    deadline=timedelta(seconds=5),
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


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


@pytest.mark.parametrize("key", SIZES)
def test_from_pretrained_invalid_sizes_in_config_are_refused(key, folder):
    for value in [*ODD, 7]:
        state(folder, **{key: value})
        with pytest.raises(InputError, match=key if value not in (7, 10**7, 10**18, 2**70) else "config"):
            GPT2.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "fine"),
    [
        ("n_inner", (None, 128)),
        ("activation_function", ("gelu_new", "gelu_pytorch_tanh")),
        ("layer_norm_epsilon", (1e-5,)),
        ("scale_attn_by_inverse_layer_idx", (False,)),
        ("scale_attn_weights", (True,)),
        ("tie_word_embeddings", (True,)),
        ("add_cross_attention", (False,)),
        ("model_type", ("gpt2",)),
    ],
)
def test_from_pretrained_other_architecture_settings_are_refused(key, fine, folder):
    for value in [*ODD, "relu", "gelu", "llama", 7, 1e-6, *fine]:
        state(folder, **{key: value})
        if any(type(value) is type(one) and value == one for one in fine):
            GPT2.from_pretrained(folder)
        else:
            with pytest.raises(InputError, match=key):
                GPT2.from_pretrained(folder)


@pytest.mark.parametrize("key", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_from_pretrained_invalid_dropout_rates_are_refused(key, folder):
    for value in (None, "0.1", -0.1, 1.0, [0.1], True, float("nan")):
        state(folder, **{key: value})
        with pytest.raises(InputError, match=key):
            GPT2.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b"null", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"n_embd": '])
def test_from_pretrained_malformed_config_json_is_refused(content, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        GPT2.from_pretrained(folder)


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
        assert len(str(error).splitlines()) == 1
        return
    stored = load_file(folder / "model.safetensors")  # what loads is what the file says, whatever it says
    assert torch.equal(model.wte.weight, stored["transformer.wte.weight"])
    assert torch.equal(model.h[1].mlp.c_fc.weight, stored["transformer.h.1.mlp.c_fc.weight"].t())
    assert model.state_dict().keys() == {name.removeprefix("transformer.") for name in stored}


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tail: struct.pack("<Q", 2**63) + b"{}",
        lambda header, tail: struct.pack("<Q", 100_000_001) + b"{}",
        lambda header, tail: written(b"[]", tail),
        lambda header, tail: written({**header, "x": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}}, tail),
        lambda header, tail: written(lying(header, data_offsets=[0, 128]), tail),
        lambda header, tail: written(lying(header, shape=[-1]), tail),
        lambda header, tail: written(lying(header, dtype="F99"), tail),
    ],
    ids=range(7),
)
def test_from_pretrained_false_safetensors_header_is_refused(change, folder):
    (folder / "model.safetensors").write_bytes(change(*whole(folder)))
    with pytest.raises(InputError, match=r"model\.safetensors is not a valid safetensors file"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["transformer.ln_f.bias"].fill_(float("nan")), r"ln_f\.bias must be finite"),
        (lambda t: t["transformer.wte.weight"][3].fill_(float("inf")), r"wte\.weight must be finite"),
        (lambda t: t.update({"wte.weight": t["transformer.wte.weight"] + 1}), r"contains wte\.weight twice"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(32).long()}), r"ln_f\.bias must be .*, got I64"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.tensor(0.0)}), r"ln_f\.bias must have shape .* got \(\)"),
        (lambda t: [t.pop(name) for name in list(t) if ".h.1." in name], "n_layer is 2, but there are 1 layers"),
        (lambda t: t.clear(), "lacks tensors"),
    ],
    ids=range(7),
)  # fmt: skip
def test_from_pretrained_invalid_tensors_are_refused(change, words, folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(InputError, match=words):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize(
    "index",
    [{"weight_map": {"a": name}} for name in ("../../etc/passwd", "/etc/passwd", "..", ".", "", "gone", "x" * 300)]
    + [{"weight_map": {"a": name}} for name in (1, None)]
    + [{"weight_map": {"a": 1, "b": "x"}}, {"weight_map": [1]}, {"weight_map": {}}, {}, [], {"weight_map": {"a": {}}}],
    ids=str,
)  # fmt: skip
def test_from_pretrained_shard_index_outside_the_folder_is_refused(index, folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="copy"):
        GPT2.from_pretrained(folder)


def test_from_pretrained_deeply_nested_shard_index_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"index\.json: its values are nested more than 100 deep"):
        GPT2.from_pretrained(folder)


def test_check_too_many_layers_are_refused_before_the_model_is_built(folder, monkeypatch):
    state(folder, n_layer=10**9)
    monkeypatch.setattr(pretrained, "GPT2", None)  # would be called
    with pytest.raises(InputError, match="n_layer is 1000000000"):
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
    with pytest.raises(InputError, match="no token of any text"):
        load_tokenizer(folder)


def test_load_tokenizer_huge_token_id_is_refused(folder):
    larger(folder, 4_000_000_000)
    with pytest.raises(InputError, match="one with the id 4000000000"):
        load_tokenizer(folder)


def test_validate_vocab_size_special_token_beyond_vocabulary_is_refused(folder):
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    around = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}},
              {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
              {"Sequence": {"id": "B", "type_id": 0}}],
              "special_tokens": {"x": {"id": "x", "ids": [4000], "tokens": ["x"]}}}  # fmt: skip
    file.write_text(json.dumps({**settings, "post_processor": around}))
    with pytest.raises(InputError, match="gives a text the id 4000 and the base has vocab_size 400"):
        validate_vocab_size(load_tokenizer(folder), 400, "the base", "data.tokenizer")


def larger(folder, token_id=450):
    """Add a token beyond the model's vocabulary to a tokenizer."""
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["model"]["vocab"]["beyond"] = token_id
    file.write_text(json.dumps(settings))


# Adapters


@pytest.fixture
def adapter(base, tmp_path):
    model = GPT2.from_pretrained(base)
    LoRA(rank=2, targets=["c_attn"]).apply(model)
    save(model, tmp_path / "adapter", str(base))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora_alpha", "x"), ("lora_alpha", [1]), ("lora_dropout", "x"), ("alpha_pattern", 3),
     ("alpha_pattern", {".*": "x"}), ("alpha_pattern", {"(": 1}), ("use_dora", "x"), ("use_rslora", 3),
     ("peft_type", 3), ("bias", {"a": 1}), ("peft_type", "IA3"),
     *(("lora_alpha", value) for value in (10**400, math.inf, math.nan, True, None)),
     *(("alpha_pattern", {".*": value}) for value in (10**400, -math.inf, math.nan, True)),
     *(("lora_dropout", value) for value in (2, 1, -1, math.nan, True)),
     ("kasa_config", {"alpha": 1}), ("of_the_future", 3), ("r", "8"), ("rank_pattern", {"a": 2.5}), ("peft_type", None),
     ("alpha_pattern", {"(.+)+x": 1}), ("alpha_pattern", {"(a|a)*b": 1}), ("alpha_pattern", {".*.*.*.*.*x": 1}),
     ("alpha_pattern", {"x" * 10**6: 1})],
    ids=shorten,
)  # fmt: skip
def test_peft_adapter_invalid_settings_are_refused_by_name(key, value, adapter, base):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(InputError, match=key):
        PeftAdapter(str(adapter)).apply(GPT2.from_pretrained(base))


def test_peft_adapter_invalid_tensors_or_config_are_refused(adapter, base):
    file = adapter / "adapter_model.safetensors"
    original = load_file(file)
    name = next(name for name in original if name.endswith("lora_A.weight"))
    for tensor in (torch.tensor(1.0), torch.zeros(0, 32), torch.full((2, 32), float("nan")), torch.zeros(2, 32).long()):
        save_file({**original, name: tensor}, file)
        with pytest.raises(InputError, match="adapter"):
            PeftAdapter(str(adapter)).apply(GPT2.from_pretrained(base))
    for content in ("[]", "1", "{", "[" * 100_000):
        (adapter / "adapter_config.json").write_text(content)
        with pytest.raises(InputError, match="adapter"):
            PeftAdapter(str(adapter)).apply(GPT2.from_pretrained(base))


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
        with pytest.raises(InputError, match=r"does not fit|must be that of the base"):
            PeftAdapter(str(tmp_path / "adapter")).apply(GPT2.from_pretrained(base))


def test_peft_adapter_pickled_weights_are_refused(adapter, base):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="is not a peft adapter"):
        PeftAdapter(str(adapter)).apply(GPT2.from_pretrained(base))


# Commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, files):
    """The run folders of a classifier and a language model."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        shared = [f"--model.base={base}", f"--data.train_file={files['train']}", "--trainer.max_epochs=1",
                  "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.max_length=32",
                  "--trainer.limit_train_batches=1"]  # fmt: skip
        main(["fit", "--config", str(CONFIG / "task/imdb.yaml"), *shared])
        main(["fit", "--config", str(CONFIG / "task/text.yaml"), "--data.column=sentence", *shared])
    return {name: place / f"lightning_logs/{name}/version_0" for name in ("imdb", "text")}


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a film\nthe plot\n")
    return file


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature=-1"], "temperature"),
        (["--temperature=nan"], "temperature"),
        (["--temperature=1e-300"], "temperature must be 0 or in [1e-09, 1e+09], got 1e-300"),
        (["--temperature=inf"], "temperature"),
        (["--temperature=hot"], "temperature"),
        (["--top_p=0"], "top_p"),
        (["--top_p=1.5"], "top_p"),
        (["--top_p=nan"], "top_p"),
        (["--top_k=0"], "top_k"),
        (["--top_k=2.5"], "top_k"),
        (["--repetition_penalty=0"], "repetition_penalty"),
        (["--repetition_penalty=nan"], "repetition_penalty"),
        (["--repetition_penalty=1e-300"], "repetition_penalty"),
        (["--no_repeat_ngram_size=-1"], "no_repeat_ngram_size"),
        (["--max_new_tokens=0"], "max_new_tokens"),
        (["--batch_size=0"], "batch_size"),
        (["--precision=fp64"], "precision"),
        (["--temprature=1"], "temprature"),
        (["--temp=1"], "--temp"),
        (["--base=nowhere"], "contains all weights"),
        (["--ckpt_path=/nowhere.ckpt"], "/nowhere.ckpt"),
    ],
    ids=str,
)
def test_generate_invalid_flags_are_refused_without_output(flags, words, trained, prompts, run, capsys, tmp_path):
    out = tmp_path / "out.txt"
    assert words in refused(run, capsys, "generate", trained["text"], "--prompt_file", prompts, "--out", out, *flags)
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch_size=0"], "batch_size"),
        (["--batch_size=x"], "batch_size"),
        (["--quoting=maybe"], "quoting"),
        (["--on_invalid_row=drop"], "on_invalid_row"),
        (["--precision=8"], "precision"),
        (["--inptu=x"], "inptu"),
        (["--base=nowhere"], "contains all weights"),
        (["--ckpt_path=s3://bucket/best.ckpt"], "s3:"),
    ],
    ids=str,
)
def test_classify_invalid_flags_are_refused_without_output(flags, words, trained, files, run, capsys, tmp_path):
    out = tmp_path / "out.csv"
    assert words in refused(run, capsys, "classify", trained["imdb"], "--input", files["val"], "--out", out, *flags)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: tensor.fill_(torch.nan), "gpt2.ln_f.weight must be finite"),
        (lambda tensor: tensor[:1].fill_(-torch.inf), "gpt2.ln_f.weight must be finite"),
        (lambda tensor: tensor.to(torch.int8), "gpt2.ln_f.weight must be of torch.float32, got torch.int8"),
        (lambda tensor: tensor.to(torch.complex64), "gpt2.ln_f.weight must be of torch.float32, got torch.complex64"),
        (lambda tensor: tensor.bool(), "gpt2.ln_f.weight must be of torch.float32, got torch.bool"),
    ],
    ids=["nan", "inf", "int8", "complex", "bool"],
)
@pytest.mark.parametrize("command", ["classify", "generate", "export", "test", "fit"])
def test_commands_checkpoint_weights_not_finite_or_of_other_dtype_are_refused(
    change, words, command, trained, base, prompts, files, run, capsys, tmp_path
):
    folder = shutil.copytree(trained["text" if command == "generate" else "imdb"], tmp_path / "run")
    file = folder / "checkpoints/best.ckpt"
    content = torch.load(file, weights_only=True)
    tensor = content["state_dict"]["gpt2.ln_f.weight"]
    changed = change(tensor)
    content["state_dict"]["gpt2.ln_f.weight"] = tensor if changed.shape != tensor.shape else changed
    torch.save(content, file)
    data = ["--data=gpt2_pl.datamodules.IMDB", "--data.max_length=32", f"--model.base={base}", "--ckpt_path", file]
    args = {"classify": [folder, "--input", files["val"], "--out", "out.csv"],
            "generate": [folder, "--prompt_file", prompts, "--out", "out.txt"],
            "export": [folder, "--format", "hf", "--out", "out"],
            "test": [*data, f"--data.test_file={files['val']}"],
            "fit": [*data, f"--data.train_file={files['train']}"]}[command]  # fmt: skip
    assert words in refused(run, capsys, command, *args)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("command", ["classify", "generate", "export", "compare"])
def test_commands_missing_options_are_refused(command, run, capsys):
    assert "required" in refused(run, capsys, command)


@pytest.mark.parametrize("poems", [False, True])
def test_generate_prompt_beyond_the_context_is_named_before_generation(
    poems, trained, run, capsys, tmp_path, monkeypatch
):
    from gpt2_pl.tasks import LanguageModel

    monkeypatch.setattr(LanguageModel, "continue_prompts", pytest.fail)
    file, out = tmp_path / "prompts.txt", tmp_path / "out.txt"
    file.write_text(
        "1\n\na film\n\n2\n\n" + "a long film " * 200 + "\n" if poems else "a film\n" + "a long film " * 200
    )
    flags = ["--poems"] if poems else []
    line = refused(run, capsys, "generate", trained["text"], "--prompt_file", file, "--out", out, *flags)
    assert "prompts.txt, prompt 2 must have" in line
    assert "at most 63" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.json", b'["a"]'), ("p", b"a\n"),
     ("p.txt", b""), ("p.txt", b"\n \n"), ("p.txt", b"\xff\xfea\0"), ("p.jsonl", b'{"text": "a"}\n'),
     ("p.jsonl", b"[1]\n"), ("p.jsonl", b'{"prompt": 3}\n'), ("p.jsonl", b"{"), ("p.jsonl", b"[" * 100_000),
     ("p.jsonl", b'{"prompt": "\\ud800"}')],
    ids=range(11),
)  # fmt: skip
def test_generate_invalid_prompt_file_is_refused(name, content, trained, run, capsys, tmp_path):
    file, out = tmp_path / name, tmp_path / "out.txt"
    file.write_bytes(content)
    assert name in refused(run, capsys, "generate", trained["text"], "--prompt_file", file, "--out", out)
    assert not out.exists()


def test_classify_text_beyond_the_context_is_truncated(trained, tmp_path):
    file, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    file.write_text("sentence\n" + "a long film " * 500 + "\n")
    main(["classify", str(trained["imdb"]), "--input", str(file), "--out", str(out)])
    assert len(out.read_text().splitlines()) == 2


def test_fit_template_beyond_the_context_is_refused(base, data_flags, run, capsys, tmp_path):
    line = refused(run, capsys, "fit", "--config", CONFIG / "task/imdb.yaml", f"--model.base={base}", *data_flags,
                   "--data.max_length=32", f"--data.template={'so long ' * 50}{{sentence}}")  # fmt: skip
    assert "max_length must leave room for text, got 32; the template" in line
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize(("command", "name"), [("classify", "imdb"), ("generate", "text"), ("export", "imdb")])
def test_commands_tokenizer_larger_than_the_model_is_refused(
    command, name, trained, prompts, files, run, capsys, tmp_path
):
    folder = shutil.copytree(trained[name], tmp_path / "run")
    larger(folder)
    out = tmp_path / ("out" if command == "export" else "out.csv" if command == "classify" else "out.txt")
    flags = {"classify": ["--input", files["val"]], "generate": ["--prompt_file", prompts],
             "export": ["--format", "hf", "--backbone"]}[command]  # fmt: skip
    line = refused(run, capsys, command, folder, "--out", out, *flags)
    assert "451 tokens" in line
    assert "vocab_size 400" in line
    assert not out.exists()


def changed_tokenizer(folder, **changes):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


DELETES_Z = {"type": "Replace", "pattern": {"String": "z"}, "content": ""}


def test_generate_prompt_without_tokens_is_named(trained, run, capsys, tmp_path):
    folder = shutil.copytree(trained["text"], tmp_path / "run")
    changed_tokenizer(folder, normalizer=DELETES_Z)
    (tmp_path / "prompts.txt").write_text("a film\nzzz\n")
    line = refused(
        run, capsys, "generate", folder, "--prompt_file", tmp_path / "prompts.txt", "--out", tmp_path / "o.txt"
    )
    assert "prompts.txt, prompt 2: the tokenizer of the run gives no token for 'zzz'" in line
    assert not (tmp_path / "o.txt").exists()


def test_generate_special_tokens_of_the_tokenizer_are_not_added(trained, prompts, run, tmp_path):
    """As in training: an end-of-text token after a prompt would start another text."""
    folder = shutil.copytree(trained["text"], tmp_path / "run")
    written = []
    for name in ("without", "with"):
        if name == "with":
            x, a, b = (
                {"SpecialToken": {"id": "x", "type_id": 0}},
                *({"Sequence": {"id": name, "type_id": 0}} for name in "AB"),
            )
            changed_tokenizer(folder, post_processor={
                "type": "TemplateProcessing", "single": [x, a, x], "pair": [a, b],
                "special_tokens": {"x": {"id": "x", "ids": [0], "tokens": ["<|endoftext|>"]}}})  # fmt: skip
        main(["generate", str(folder), "--prompt_file", str(prompts), "--out", str(tmp_path / f"{name}.txt")])
        written.append((tmp_path / f"{name}.txt").read_text())
    assert written[0] == written[1]


def test_fit_tokenizer_larger_than_the_base_is_refused(folder, data_flags, run, capsys, tmp_path):
    larger(folder)
    for task, flags in (("imdb", data_flags), ("text", [data_flags[0], "--data.column=sentence"])):
        line = refused(run, capsys, "fit", "--config", CONFIG / f"task/{task}.yaml", f"--model.base={folder}", *flags,
                       "--data.max_length=32")  # fmt: skip
        assert "451 tokens" in line
    assert not (tmp_path / "lightning_logs").exists()


def test_classify_bad_row_1001_leaves_no_output_file(trained, run, capsys, tmp_path):
    file = tmp_path / "rows.csv"
    for bad in ("a\tb\n", '"  "\n', '""\n', '"open\n'):
        file.write_text("sentence\n" + "fine\n" * 1000 + bad + "fine\n" * 3)
        line = refused(run, capsys, "classify", trained["imdb"], "--input", file, "--out", tmp_path / "out.csv")
        assert "rows.csv, row 1001" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv"]


@pytest.mark.parametrize("command", ["classify", "generate", "export"])
def test_commands_failure_in_the_middle_leaves_no_output_file(command, trained, prompts, run, tmp_path, monkeypatch):
    import gpt2_pl.commands.classify
    import gpt2_pl.pretrained
    from gpt2_pl.tasks import LanguageModel

    def breaks(*args, **kwargs):
        raise RuntimeError("in the middle")

    rows = tmp_path / "rows.csv"
    rows.write_text("sentence\n" + "fine\n" * 200)
    calls = iter([gpt2_pl.commands.classify.classify])
    later = lambda *args: next(calls, breaks)(*args)  # noqa: E731
    monkeypatch.setattr(gpt2_pl.commands.classify, "classify", later)
    monkeypatch.setattr(LanguageModel, "continue_prompts", breaks)
    monkeypatch.setattr(gpt2_pl.pretrained, "save", breaks)
    place = tmp_path / "place"
    place.mkdir()
    args = {"classify": [trained["imdb"], "--input", rows, "--batch_size", 1, "--out", place / "o.csv"],
            "generate": [trained["text"], "--prompt_file", prompts, "--out", place / "o.txt"],
            "export": [trained["text"], "--format", "hf", "--out", place / "o"]}[command]  # fmt: skip
    with pytest.raises(RuntimeError, match="in the middle"):
        run(command, *args)
    assert not list(place.iterdir())
