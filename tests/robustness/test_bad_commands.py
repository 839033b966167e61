"""Commands on invalid flags, prompts, rows and weights: one error that names them, and no output."""

import shutil
from argparse import Namespace

import pytest
import torch
from conftest import ROOT
from helpers.changed_tokenizers import add_token, change_tokenizer
from helpers.refusals import refused

from gpt2_pl.commands import main

CONFIG = ROOT / "configs"


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


BAD_FLAGS = {
    "generate": [
        "--temperature=-1", "--temperature=nan", "--temperature=1e-300", "--temperature=inf", "--temperature=hot",
        "--top_p=0", "--top_p=1.5", "--top_p=nan", "--top_k=0", "--top_k=2.5", "--repetition_penalty=0",
        "--repetition_penalty=nan", "--repetition_penalty=1e-300", "--no_repeat_ngram_size=-1", "--max_new_tokens=0",
        "--batch_size=0", "--precision=fp64", "--temprature=1", "--temp=1", "--num_beams=0", "--num_beams=two",
        "--length_penalty=1",
    ],
    "classify": ["--batch_size=0", "--batch_size=x", "--quoting=maybe", "--on_invalid_row=drop", "--precision=8",
                 "--inptu=x"],
}  # fmt: skip


def test_commands_invalid_flags_are_refused_without_output(trained, prompts, files, run, capsys, tmp_path):
    commands = {"generate": [trained["text"], "--prompt_file", prompts, "--out", tmp_path / "out.txt"],
                "classify": [trained["imdb"], "--input", files["val"], "--out", tmp_path / "out.csv"]}  # fmt: skip
    for command, flags in BAD_FLAGS.items():
        for flag in flags:
            line = refused(run, capsys, command, *commands[command], flag)
            assert flag.partition("=")[0].removeprefix("--") in line, (command, flag)
        line = refused(run, capsys, command, *commands[command], "--ckpt_path=/nowhere.ckpt")
        assert "/nowhere.ckpt" in line, command
        line = refused(run, capsys, command, *commands[command], "--base=nowhere")
        assert "contains all weights" in line, command
    assert not list(tmp_path.glob("out*"))


CHANGED_WEIGHTS = {
    "nan": lambda tensor: tensor.fill_(torch.nan),
    "-inf": lambda tensor: tensor.index_fill(0, torch.tensor([0]), -torch.inf),
    "int8": lambda tensor: tensor.to(torch.int8),
    "complex64": lambda tensor: tensor.to(torch.complex64),
    "bool": lambda tensor: tensor.bool(),
}


@pytest.mark.parametrize("command", ["classify", "generate", "export", "test", "fit"])
def test_commands_checkpoint_weights_not_finite_or_of_other_dtype_are_refused(
    command, trained, base, prompts, files, run, capsys, tmp_path
):
    folder = shutil.copytree(trained["text" if command == "generate" else "imdb"], tmp_path / "run")
    file, name = folder / "checkpoints/best.ckpt", "gpt2.ln_f.weight"
    data = ["--data=gpt2_pl.datamodules.IMDB", "--data.max_length=32", f"--model.base={base}", "--ckpt_path", file]
    args = {"classify": [folder, "--input", files["val"], "--out", "out.csv"],
            "generate": [folder, "--prompt_file", prompts, "--out", "out.txt"],
            "export": [folder, "--format", "hf", "--out", "out"],
            "test": [*data, f"--data.test_file={files['val']}"],
            "fit": [*data, f"--data.train_file={files['train']}"]}[command]  # fmt: skip
    content = torch.load(file, weights_only=True)
    tensor = content["state_dict"][name]
    for what in CHANGED_WEIGHTS if command == "classify" else ("nan", "int8"):
        content["state_dict"][name] = CHANGED_WEIGHTS[what](tensor.clone())
        torch.save(content, file)
        line = refused(run, capsys, command, *args)
        assert name in line, what
        assert ("finite" if what in ("nan", "-inf") else what) in line, what
    assert not list(tmp_path.glob("out*"))


def test_commands_missing_options_are_refused(run, capsys):
    for command in ("classify", "generate", "export", "compare", "power"):
        assert "required" in refused(run, capsys, command), command


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
    assert "prompts.txt, prompt 2" in line
    assert "63" in line
    assert not out.exists()


PROMPT_FILES = [
    ("p.json", b'["a"]'), ("p", b"a\n"), ("p.txt", b""), ("p.txt", b"\n \n"), ("p.txt", b"\xff\xfea\0"),
    ("p.jsonl", b'{"text": "a"}\n'), ("p.jsonl", b"[1]\n"), ("p.jsonl", b'{"prompt": 3}\n'), ("p.jsonl", b"{"),
    ("p.jsonl", b"[" * 100_000), ("p.jsonl", b'{"prompt": "\\ud800"}'),
]  # fmt: skip


def test_generate_invalid_prompt_file_is_refused(trained, run, capsys, tmp_path):
    out = tmp_path / "out.txt"
    for name, content in PROMPT_FILES:
        file = tmp_path / name
        file.write_bytes(content)
        line = refused(run, capsys, "generate", trained["text"], "--prompt_file", file, "--out", out)
        assert str(file) in line, content[:30]
    assert not out.exists()


def test_classify_text_beyond_the_context_is_truncated(trained, tmp_path):
    file, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    file.write_text("sentence\n" + "a long film " * 500 + "\n")
    main(["classify", str(trained["imdb"]), "--input", str(file), "--out", str(out)])
    assert len(out.read_text().splitlines()) == 2


def test_fit_template_beyond_the_context_is_refused(base, data_flags, run, capsys, tmp_path):
    line = refused(run, capsys, "fit", "--config", CONFIG / "task/imdb.yaml", f"--model.base={base}", *data_flags,
                   "--data.max_length=32", f"--data.template={'so long ' * 50}{{sentence}}")  # fmt: skip
    assert "max_length" in line
    assert "32" in line
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize(("command", "name"), [("classify", "imdb"), ("generate", "text"), ("export", "imdb")])
def test_commands_tokenizer_larger_than_the_model_is_refused(
    command, name, trained, prompts, files, run, capsys, tmp_path
):
    folder = shutil.copytree(trained[name], tmp_path / "run")
    add_token(folder)
    out = tmp_path / ("out" if command == "export" else "out.csv" if command == "classify" else "out.txt")
    flags = {"classify": ["--input", files["val"]], "generate": ["--prompt_file", prompts],
             "export": ["--format", "hf", "--backbone"]}[command]  # fmt: skip
    line = refused(run, capsys, command, folder, "--out", out, *flags)
    assert "451 tokens" in line
    assert "vocab_size 400" in line
    assert not out.exists()


DELETES_Z = {"type": "Replace", "pattern": {"String": "z"}, "content": ""}


def test_generate_prompt_without_tokens_is_named(trained, run, capsys, tmp_path):
    folder = shutil.copytree(trained["text"], tmp_path / "run")
    change_tokenizer(folder, normalizer=DELETES_Z)
    (tmp_path / "prompts.txt").write_text("a film\nzzz\n")
    line = refused(
        run, capsys, "generate", folder, "--prompt_file", tmp_path / "prompts.txt", "--out", tmp_path / "o.txt"
    )
    assert "prompts.txt, prompt 2" in line
    assert "'zzz'" in line
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
            change_tokenizer(folder, post_processor={
                "type": "TemplateProcessing", "single": [x, a, x], "pair": [a, b],
                "special_tokens": {"x": {"id": "x", "ids": [0], "tokens": ["<|endoftext|>"]}}})  # fmt: skip
        main(["generate", str(folder), "--prompt_file", str(prompts), "--out", str(tmp_path / f"{name}.txt")])
        written.append((tmp_path / f"{name}.txt").read_text())
    assert written[0] == written[1]


def test_generate_beams_with_sampling_flags_are_refused(trained, prompts, run, capsys, tmp_path):
    command = ["generate", trained["text"], "--prompt_file", prompts, "--out", tmp_path / "out.txt", "--num_beams=2"]
    for flag in ("--temperature=0", "--top_k=5", "--top_p=0.9", "--seed=1"):
        line = refused(run, capsys, *command, flag)
        assert f"does not sample; leave out {flag.partition('=')[0]}" in line
    assert "[-10, 10], got 11.0" in refused(run, capsys, *command, "--length_penalty=11")
    assert not (tmp_path / "out.txt").exists()


def test_generate_beams_write_the_best_beam_of_every_prompt(trained, prompts, tmp_path):
    from gpt2_pl.commands.support.trained_model import load_task
    from gpt2_pl.inference.loading import load_run_tokenizer

    command = ["generate", str(trained["text"]), "--prompt_file", str(prompts), "--max_new_tokens=8"]
    flags = {"greedy": ["--temperature=0"], "one": ["--num_beams=1"], "three": ["--num_beams=3", "--length_penalty=0"]}
    for name, settings in flags.items():
        main([*command, "--out", str(tmp_path / f"{name}.txt"), *settings])
    greedy, one, three = ((tmp_path / f"{name}.txt").read_text() for name in flags)
    assert one == greedy
    task, _ = load_task(Namespace(run=trained["text"], ckpt_path=None, base=None, plugin=None), object)
    tokenizer = load_run_tokenizer(trained["text"], task.config.vocab_size)
    rows = [tokenizer.encode(prompt).ids for prompt in prompts.read_text().splitlines()]
    new = task.eval().continue_prompts(tokenizer, rows, [0, 0], 8, num_beams=3, length_penalty=0.0)
    expected = [tokenizer.decode([*row, *tokens]) for row, tokens in zip(rows, new, strict=True)]
    assert three == "".join(f"{text}\n\n" for text in expected)


def test_fit_tokenizer_larger_than_the_base_is_refused(base, data_flags, run, capsys, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    add_token(folder)
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
    import gpt2_pl.pretrained
    from gpt2_pl.inference.predictor import Predictor
    from gpt2_pl.tasks import LanguageModel

    def breaks(*args, **kwargs):
        raise RuntimeError("in the middle")

    rows = tmp_path / "rows.csv"
    rows.write_text("sentence\n" + "fine\n" * 200)
    calls = iter([Predictor.predict_ids])
    later = lambda *args: next(calls, breaks)(*args)  # noqa: E731
    monkeypatch.setattr(Predictor, "predict_ids", later)
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
