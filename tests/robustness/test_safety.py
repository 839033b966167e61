"""Untrusted files: no code execution, no writes outside a run's folder, and escaped text in reports."""

import ast
import csv
import itertools
import json
import pickle
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from helpers.checkpoints import STORED, content
from helpers.refusals import refused
from helpers.runs import fake_run

from gpt2_pl import GPT2
from gpt2_pl.commands import main
from gpt2_pl.commands.lightning_cli import GPT2CLI
from gpt2_pl.errors import InputError, shorten
from gpt2_pl.surgery import PeftAdapter
from gpt2_pl.tasks import SentimentClassifier

CONFIG = ROOT / "configs"


class Evil:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


@pytest.fixture(params=[None, "1"], ids=["", "forced"])
def environment(request, monkeypatch):
    """With and without the variable that makes torch load pickles by default."""
    if request.param is not None:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", request.param)


def commands(checkpoint, base, rows, out):
    """Yield every command that reads a checkpoint."""
    model = ["--config", CONFIG / "task/imdb.yaml", f"--model.base={base}", "--data.max_length=32"]
    data = [f"--data.{split}_file={rows}" for split in ("train", "val", "test", "predict")]
    folder, prompts = checkpoint.parents[1], base.parent / "prompts.txt"
    prompts.write_text("a\n")
    for command in ("fit", "validate", "test", "predict"):
        yield [command, *model, *data, "--ckpt_path", checkpoint]
    yield ["test", "--data=gpt2_pl.datamodules.IMDB", *data, "--ckpt_path", checkpoint]
    yield ["classify", folder, "--input", rows, "--out", out / "out.csv"]
    yield ["generate", folder, "--prompt_file", prompts, "--out", out / "out.txt"]
    yield ["export", folder, "--format", "hf", "--out", out / "out"]


def evil_checkpoints(marker, path):
    """Yield functions that write checkpoints whose pickles execute code."""
    yield lambda: torch.save(content(hyper_parameters=Evil(marker)), path)
    yield lambda: torch.save(content(state_dict={"x": Evil(marker)}), path)
    yield lambda: torch.save(content(callbacks={"x": Evil(marker)}), path)
    yield lambda: torch.save(content(x=Evil(marker)), path, _use_new_zipfile_serialization=False)
    yield lambda: path.write_bytes(pickle.dumps(Evil(marker)))


@pytest.mark.usefixtures("environment")
def test_commands_pickle_in_checkpoint_is_never_executed(run, base, files, marker, capsys, tmp_path):
    checkpoint = tmp_path / "run/checkpoints/best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for n, write in enumerate(evil_checkpoints(marker, checkpoint)):
        write()
        chosen = list(commands(checkpoint, base, files["val"], tmp_path))
        for command in chosen if n == 0 else [chosen[n % 5], chosen[5 + n % 3]]:
            assert "best.ckpt" in refused(run, capsys, *command)
        with pytest.raises(InputError, match=r"best\.ckpt"):
            SentimentClassifier.load_from_checkpoint(checkpoint)
    assert not marker.exists()
    assert sorted(tmp_path.rglob("*")) == sorted([*before, checkpoint])
    pickle.loads(checkpoint.read_bytes()).close()  # it would have
    assert marker.exists()


@pytest.mark.usefixtures("environment")
def test_commands_pickled_weights_and_data_are_never_executed(base, marker, run, files, capsys, tmp_path):
    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    folder.mkdir()
    adapter.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.safetensors", "tokenizer.json"):
        torch.save({"transformer.wte.weight": Evil(marker)}, folder / name)
        with pytest.raises(InputError):
            GPT2.from_pretrained(folder)
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        torch.save({"x": Evil(marker)}, adapter / name)
        with pytest.raises(InputError, match="is not a peft adapter"):
            PeftAdapter(str(adapter)).apply(GPT2.from_pretrained(base))
    for name in ("rows.npy", "rows.pkl", "rows.pt", "rows.csv", "rows.jsonl", "rows.parquet"):
        file = tmp_path / name
        np.save(file.with_suffix(".npy"), np.array([Evil(marker)], dtype=object), allow_pickle=True)
        if name != "rows.npy":
            file.with_suffix(".npy").replace(file)
        line = refused(run, capsys, "fit", "--config", CONFIG / "task/imdb.yaml", f"--model.base={base}",
                       f"--data.train_file={file}", "--data.max_length=32")  # fmt: skip
        assert name in line
    assert not marker.exists()


def test_main_removes_torch_force_no_weights_only_load(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    main(["--version"])
    assert subprocess.run(
        [sys.executable, "-c", "import os; raise SystemExit('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD' in os.environ)"],
        check=False,
    ).returncode == 0  # fmt: skip


def test_load_checkpoint_weights_only_false_is_refused(run, base, data_flags, capsys, tmp_path):
    file = tmp_path / "some.ckpt"
    torch.save(content(base={}), file)
    with pytest.raises(InputError, match="weights_only must be true"):
        SentimentClassifier.load_from_checkpoint(file, weights_only=False)
    line = refused(run, capsys, "test", "--config", CONFIG / "task/imdb.yaml", f"--model.base={base}", *data_flags,
                   "--ckpt_path", file, "--weights_only=false")  # fmt: skip
    assert "unknown option --weights_only" in line


# What a checkpoint says is data


EVIL_CALL = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "executed"]}}
LORA = {"class_path": "gpt2_pl.surgery.LoRA", "init_args": {"rank": {"class_path": "this.X"}}}
LEGACY = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}  # where Lightning once kept hyperparameters


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hyper_parameters": {**STORED, "optimizer": "os.system"}}, "optimizer"),
        ({"hyper_parameters": {**STORED, "optimizer": EVIL_CALL}}, "optimizer"),
        ({"hyper_parameters": {**STORED, "schedule": EVIL_CALL}}, "schedule"),
        ({"hyper_parameters": {**STORED, "surgery": [EVIL_CALL]}}, "subprocess.Popen"),
        ({"hyper_parameters": {**STORED, "surgery": ["os.system"]}}, "os.system"),
        ({"hyper_parameters": {**STORED, "surgery": [{"class_path": "gpt2_pl.surgery.build"}]}}, "surgery.build"),
        ({"surgery": [EVIL_CALL]}, "subprocess.Popen"),
        ({"hyper_parameters": {**STORED, "_instantiator": "os.system"}}, "_instantiator"),
        ({"hyper_parameters": {**STORED, "_class_path": "subprocess.Popen"}}, "_class_path"),
        ({"hyper_parameters": {**STORED, "class_path": "os.system"}}, "class_path"),
        ({"hyper_parameters": {**STORED, "unknown": 1}}, "unknown"),
        ({"hyper_parameters": {**STORED, "config": {"class_path": "this.X"}}}, "unknown key hyper_parameters.config"),
        ({"hyper_parameters": {**STORED, "config": {"n_embd": {"class_path": "this.X"}}}}, "this.X"),
        ({"hyper_parameters": {**STORED, "surgery": [LORA]}}, "rank"),
        ({"hparams": {**LEGACY, "optimizer": "this.s"}}, "hparams"),
        ({"hparams": {**LEGACY, "schedule": {"class_path": "this.X"}}}, "hparams"),
        ({"hparams": {"optimizer": {"class_path": "torch.optim.SGD", "dict_kwargs": EVIL_CALL}}}, "hparams"),
        ({"module_arguments": {**LEGACY, "optimizer": "this.s"}}, "module_arguments"),
        ({"hparams_type": "this.X"}, "hparams_type"),
        ({"hparams_name": "schedule"}, "hparams_name"),
        ({"hparams_name": 3}, "hparams_name"),
        ({"hyper_parameters": [1]}, "hyper_parameters"),
        ({"state_dict": 3}, "state_dict"),
        ({"base": "x"}, "base"),
        ({"task": "os.system"}, "os.system"),
        ({"task": "Task"}, "Task"),
        ({"task": ["x"]}, "best.ckpt"),
        ({"callbacks": {"ModelCheckpoint": {"best_model_path": "s3://bucket/x.ckpt"}}}, "best_model_path"),
        ({"callbacks": {"ModelCheckpoint": {"last_model_path": "/run/checkpoints/../../home"}}}, "last_model_path"),
    ],
    ids=str,
)  # fmt: skip
def test_commands_classes_named_by_a_checkpoint_are_not_called(
    changes, words, run, base, files, capsys, tmp_path, monkeypatch
):
    monkeypatch.delitem(sys.modules, "this", raising=False)  # a module of Python's that nothing else imports
    checkpoint = tmp_path / "run/checkpoints/best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save(content(**changes), checkpoint)
    chosen = list(commands(checkpoint, base, files["val"], tmp_path))
    for command in (chosen[4], chosen[5]):
        assert words in refused(run, capsys, *command)
    with pytest.raises(InputError):
        SentimentClassifier.load_from_checkpoint(checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "changes",
    [{"config": {"n_embd": "x"}}, {"config": {"n_head": 5}}, {"config": 3}, {"config": {"what": 1}}, {"dropout": "x"},
     {"surgery": [{"class_path": "gpt2_pl.surgery.LoRA", "init_args": {"rank": "x"}}]}, {"num_classes": "x"},
     {"surgery": [{"class_path": "gpt2_pl.surgery.LoRA", "init_args": {"what": 1}}]}, {"pooling": 3},
     {"label_words": 3}],
    ids=str,
)  # fmt: skip
def test_commands_checkpoint_hyperparameters_of_wrong_type_are_refused(changes, run, base, files, capsys, tmp_path):
    checkpoint = tmp_path / "run/checkpoints/best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save(content(hyper_parameters={**STORED, **changes}), checkpoint)
    chosen = list(commands(checkpoint, base, files["val"], tmp_path))
    for command in (chosen[4], chosen[5]):
        assert refused(run, capsys, *command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


LAUGHING, DEEP = ["x"] * 9, []
for _ in range(8):
    LAUGHING = [LAUGHING] * 9
for _ in range(200):
    DEEP = [DEEP]
EPOCHS = {"epochs": [{"epoch": 1, "val/accuracy": 0.5}]}
BEST = {"best_model_path": "", "kth_best_model_path": "", "last_model_path": "", "best_k_models": {},
        "best_model_score": None, "kth_value": None, "dirpath": "/x"}  # fmt: skip
OF_BEST = "ResumableModelCheckpoint{'monitor': 'val/accuracy'}"
WORDING = {"template": "{sentence}", "columns": {"sentence": ["sentence"]}, "labels": ["a", "b"], "max_length": 9}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surgery": 3}, "surgery must be a list, got 3"),
        ({"hyper_parameters": {**STORED, "surgery": 3}}, "hyper_parameters.surgery must be a list, got 3"),
        ({"callbacks": [1]}, "callbacks must be a mapping, got [1]"),
        ({"callbacks": {3: {}}}, "a key of callbacks must be text, got 3"),
        ({"callbacks": {"Own": 3}}, "callbacks.Own must be a mapping, got 3"),
        ({"state_dict": {"a": 3}}, "state_dict.a must be a tensor, got 3"),
        ({"state_dict": {3: torch.ones(1)}}, "a key of state_dict must be text, got 3"),
        ({"state_dict": {"a": torch.ones(2, 2).to_sparse()}}, "sparse_coo whose memory"),
        ({"base": {"path": 3}}, "base.path must be text, got 3"),
        ({"prompt_spec": 3}, "prompt_spec must be a mapping, got 3"),
        ({"prompt_spec": {**WORDING, "labels": ["a", 3]}}, "prompt_spec.labels[1] must be text, got 3"),
        ({"prompt_spec": {**WORDING, "labels": ["a", "\ud800"]}}, "labels[1] must be text without halves"),
        ({"prompt_spec": {**WORDING, "template": "\udfff{sentence}"}},
         "prompt_spec.template must be text without halves"),
        ({"prompt_spec": {**WORDING, "columns": {"sentence": [3]}}},
         "prompt_spec.columns.sentence[0] must be text, got 3"),
        ({"callbacks": {OF_BEST: {**BEST, "best_model_path": 3}}}, "best_model_path must be text, got 3"),
        ({"callbacks": {OF_BEST: {**BEST, "best_k_models": [1]}}}, "best_k_models must be a mapping, got [1]"),
        ({"callbacks": {OF_BEST: {**BEST, "kth_value": torch.ones(2)}}}, "kth_value must be a number, got a tensor"),
        ({"callbacks": {"RunSummary": 3}}, "callbacks.RunSummary must be a mapping, got 3"),
        ({"callbacks": {"RunSummary": {"epochs": 3}}}, "RunSummary.epochs must be a list, got 3"),
        ({"callbacks": {"RunSummary": {"epochs": [{"val/accuracy": 0.5}]}}}, "epochs[0] must be scores of an"),
        ({"callbacks": {"RunSummary": {"epochs": [{"epoch": 1, "val/a": "x"}]}}}, "epochs[0].val/a must be a number"),
        ({"callbacks": {"RunSummary": {**EPOCHS, "layers": [3]}}}, "layers[0] must be a mapping, got 3"),
        ({"callbacks": {"Throughput": {"seconds": "x"}}}, "seconds must be a number, got 'x'"),
        ({"callbacks": {"PredictionWriter": {"best": "x"}}}, "PredictionWriter.best must be a number, got 'x'"),
        ({"callbacks": {"NonFiniteLossGuard": {"skipped": "x"}}},
         "NonFiniteLossGuard.skipped must be a whole number, got 'x'"),
        ({"callbacks": {"ResumableEarlyStopping{'monitor'}": {"wait_count": 1}}}, "stopped_epoch is missing"),
        ({"loops": 3}, "loops must be a mapping, got 3"),
        ({"loops": {}}, "loops.fit_loop is missing"),
        ({"loops": {"fit_loop": 3}}, "loops.fit_loop must be a mapping, got 3"),
        ({"loops": {"fit_loop": {}}}, "loops.fit_loop.epoch_progress is missing"),
        ({"optimizer_states": 3}, "optimizer_states must be a list, got 3"),
        ({"optimizer_states": []}, "optimizer_states must be at least 1 values, got []"),
        ({"optimizer_states": [{}]}, "optimizer_states[0].state is missing"),
        ({"lr_schedulers": 3}, "lr_schedulers must be a list, got 3"),
        ({"lr_schedulers": []}, "lr_schedulers must be at least 1 values, got []"),
        ({"pytorch-lightning_version": "0.1.0"}, "must be a version of Lightning from 2.0 on, got '0.1.0'"),
        ({"pytorch-lightning_version": "1.9.5"}, "must be a version of Lightning from 2.0 on, got '1.9.5'"),
        ({"pytorch-lightning_version": "2.6 or so"}, "must be a version of Lightning from 2.0 on, got '2.6 or so'"),
        ({"base": {}, "hyper_parameters": {**STORED, "num_classes": 3}}, "num_classes must be at most 0 for the"),
        ({"hyper_parameters": {**STORED, "num_dropout_samples": 2.5}},
         "hyper_parameters.num_dropout_samples must be a whole number, got 2.5"),
        ({"hyper_parameters": {**STORED, "pooling": "up"}}, "hyper_parameters.pooling must be 'last'"),
        ({"hyper_parameters": {**STORED, "config": {"n_layer": 10**9}}}, "config.n_layer must be at most 0"),
        ({"hyper_parameters": {**STORED, "config": {"n_layer": 10**30}}}, "config.n_layer must be below 2147483648"),
        ({"base": {}, "surgery": [{"class_path": "gpt2_pl.surgery.LoRA", "init_args": {"rank": 10**9}}]},
         "surgery.rank must be at most 4096 for the stored weights, got 1000000000"),
        ({"extra": LAUGHING}, "holds more than 2,000,000 values"),
        ({"extra": DEEP}, "holds values more than 100 deep"),
        ({"extra": torch.zeros(1).expand(10**9)}, "whose memory is not that of a dense tensor"),
        ({"extra": torch.zeros(2, device="meta")}, "whose memory is not that of a dense tensor"),
        ({"epoch": -1}, "epoch must be at least 0, got -1"),
        ({"global_step": "7"}, "global_step must be a whole number, got '7'"),
        ({"task": LAUGHING}, "holds more than 2,000,000 values"),
        ({"pytorch-lightning_version": 2}, "pytorch-lightning_version must be text, got 2"),
    ],
    ids=shorten,
)  # fmt: skip
def test_commands_checkpoint_contents_of_wrong_type_are_refused(changes, words, run, base, files, capsys, tmp_path):
    checkpoint = tmp_path / "run/checkpoints/best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save(content(**changes), checkpoint)
    chosen = list(commands(checkpoint, base, files["val"], tmp_path))
    for command in (chosen[0], chosen[4], chosen[5]):
        assert words in refused(run, capsys, *command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("place", ["https://example.com/x", "http://example.com/x", "s3://bucket/x", "file:///etc/x"])
def test_commands_addresses_as_paths_are_refused_without_download(
    place, run, base, data_flags, capsys, tmp_path, monkeypatch
):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # would be called
    good = ["--config", CONFIG / "task/imdb.yaml", f"--model.base={base}", "--data.max_length=32", *data_flags]
    adapter = {"class_path": "gpt2_pl.surgery.PeftAdapter", "init_args": {"folder": place}}
    flags = [[f"--ckpt_path={place}.ckpt"], [f"--model.base={place}"], [f"--data.tokenizer={place}"],
             [f"--data.train_file={place}.csv"], [f"--data.val_file={place}.parquet"],
             [f"--model.surgery={json.dumps([adapter])}"]]  # fmt: skip
    for extra in flags:
        assert ("is not a peft adapter" if "surgery" in extra[0] else "://") in refused(
            run, capsys, "fit", *good, *extra
        )
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"ckpt_path": f"{place}.ckpt"}))
    assert "ckpt_path" in refused(run, capsys, "test", *good, "--config", file)
    out = tmp_path / "out.csv"
    for command in (
        ["classify", tmp_path, "--ckpt_path", place, "--input", "x.csv", "--out", out],
        ["generate", tmp_path, "--ckpt_path", place, "--prompt_file", f"{place}.txt", "--out", tmp_path / "o.txt"],
        ["export", place, "--format", "hf", "--out", tmp_path / "o"],
        ["compare", place, "--out", tmp_path / "o"],
    ):
        assert refused(run, capsys, *command)
    assert not out.exists()
    assert not (tmp_path / "lightning_logs").exists()


def test_fit_environment_variables_set_no_arguments(run, capsys, tmp_path, monkeypatch):
    for name, value in {"CKPT_PATH": "https://example.com/x.ckpt", "NAME": "by_environment", "CONFIG": "x"}.items():
        monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
        monkeypatch.setenv(f"PL_FIT__{name}", value)
        monkeypatch.setenv(f"PL_{name}", value)
        tiny = ["--data.n_train=32", "--trainer.max_epochs=1", f"--version=version_{name}"]
        folder = run("fit", "--config", CONFIG / "quickstart.yaml", *tiny)
        assert folder == tmp_path / f"lightning_logs/quickstart/version_{name}"


def test_cli_checkpoint_address_found_in_parsing_is_refused(tmp_path, monkeypatch):
    """The check after parsing works without the earlier one: Lightning would load from any address."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpt2_pl.commands.lightning_cli.CommandLine.checkpoint", lambda self: None)
    with pytest.raises(InputError, match=r"ckpt_path: .*https://example\.com/x\.ckpt.*--ckpt_path FILE"):
        GPT2CLI(["fit", f"--config={CONFIG}/quickstart.yaml", "--ckpt_path=https://example.com/x.ckpt"])
    assert not list(tmp_path.iterdir())


# Where things are written


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "..", ".", "", "a/../../x", "~/x", "a\\..\\x", "a\0b", "a\nb", "x" * 300]
)
def test_fit_name_outside_the_runs_folder_is_refused(name, run, capsys, tmp_path):
    file = tmp_path / "name.yaml"
    file.write_text(yaml.safe_dump({"name": name}))
    inside = sorted(tmp_path.iterdir())
    line = refused(run, capsys, "fit", "--config", CONFIG / "quickstart.yaml", "--config", file)
    assert "name must" in line
    assert sorted(tmp_path.iterdir()) == inside


LONG = ["x" * 300, "x" * 236, "/".join(["y" * 190] * 25), "file/inside", "/proc/o"]


@pytest.mark.parametrize("place", LONG, ids=["300", "236", "path", "file", "proc"])
def test_commands_unwritable_output_is_refused_before_any_work(place, run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2_pl.commands.support.trained_model.load", None)  # would be called
    (tmp_path / "file").touch()
    source = fake_run(tmp_path / "runs/full/version_0", "full", 1, [True, False])
    rows = tmp_path / "rows.txt"
    rows.write_text("a\n")
    before = sorted(tmp_path.rglob("*"))
    for command in (
        ["classify", "x", "--input", rows, "--out", f"{place}.csv"],
        ["generate", "x", "--prompt_file", rows, "--out", f"{place}.txt"],
        ["export", "x", "--format", "hf", "--out", place],
        ["compare", source, "--out", place],
    ):
        line = refused(run, capsys, *command)
        assert "out: " in line
    assert sorted(tmp_path.rglob("*")) == before


def test_commands_overlong_run_path_is_refused(run, capsys, tmp_path):
    for place in LONG[:3]:
        for command in (["export", place, "--format", "hf", "--out", "o"], ["compare", place, "--out", "o"],
                        ["classify", place, "--input", "x.csv", "--out", "o.csv"]):  # fmt: skip
            refused(run, capsys, *command)
    assert not list(tmp_path.iterdir())


def test_fit_overlong_name_or_blocked_log_folder_is_refused(run, capsys, tmp_path):
    fit = ["fit", "--config", CONFIG / "quickstart.yaml"]
    assert "too long" in refused(run, capsys, *fit, f"--name={LONG[2]}")
    (tmp_path / "lightning_logs").touch()
    assert "lightning_logs is not a folder" in refused(run, capsys, *fit)
    assert [path.name for path in tmp_path.iterdir()] == ["lightning_logs"]


EVIL_TEXT = [
    "../../x",
    "/tmp/x",
    '<script>alert("x")</script>',
    "a|b",
    "[x](javascript:alert(1))",
    "$\\frac{$",
    "x\n# y",
    "",
]


@pytest.fixture
def hostile(tmp_path):
    """Runs with hostile texts in their records."""
    generator = np.random.default_rng(0)
    for n, text in enumerate(EVIL_TEXT):
        for strategy, seed in itertools.product((text, f"{text} more"), (1, 2)):
            right = generator.random(30) < 0.6
            folder = fake_run(tmp_path / f"runs/{n}/{len(strategy)}/version_{seed}", "x", seed, right)
            account = json.loads((folder / "metrics.json").read_text())
            account |= {"task": text, "configs": [f"configs/strategy/{strategy.replace('/', '_')}.yaml"]}
            account["data"]["files"] = {"val": f"/data/{text.replace('/', '_')}.csv"}
            account["scores"][f"val/{text}"] = 0.5
            (folder / "metrics.json").write_text(json.dumps(account))
    unfinished = fake_run(tmp_path / "runs/<img src=x>/version_1", "x", 1, [True], status="<b>running</b>")
    assert unfinished.is_dir()
    return tmp_path / "runs"


def test_compare_hostile_run_texts_are_escaped_in_reports(hostile, tmp_path, monkeypatch):
    out = tmp_path / "place/report"
    main(["compare", str(hostile), "--out", str(out)])
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "place"}
    assert [path.name for path in out.parent.iterdir()] == ["report"]
    assert all(path.is_file() and path.suffix in (".md", ".html", ".json", ".csv", ".png") for path in out.iterdir())
    assert sum(path.suffix == ".png" for path in out.iterdir()) == 2 * len(EVIL_TEXT)
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "<script" not in page + text
    assert "&lt;script&gt;" in page
    assert not re.search(r"<(img src=x|b>)", page + text)
    links = re.findall(r"\]\((.*?)\)", text)  # the report's own pictures
    assert len(links) == text.count("](") == 2 * len(EVIL_TEXT)
    assert all((out / link).is_file() and "/" not in link for link in links)
    assert "\n# y" not in text
    assert set(re.findall(r"<([a-z0-9]+)", page.partition("<body>")[2])) <= {
        "h2", "p", "div", "table", "tr", "th", "td", "ul", "li", "img"
    }  # fmt: skip
    with (out / "report.csv").open(newline="") as file:
        assert {row["task"] for row in csv.DictReader(file)} == {" ".join(text.split()) for text in EVIL_TEXT}


@pytest.mark.parametrize(
    ("key", "value"),
    [("scores", 3), ("scores", {"val/accuracy": "x"}), ("scores", None), ("epochs", {"a": 1}), ("epochs", [3]),
     ("epochs", [{"val/accuracy": 0.5}]), ("parameters", {}), ("parameters", None), ("parameters", {"trainable": "x"}),
     ("seconds", "x"), ("seconds", None), ("task", {}), ("monitor", [1]), ("seed", "x"), ("configs", "x"), ("data", 3),
     ("data", {"rows": 3}), ("data", {"files": "x"}), ("base", "x"), ("peak_memory_bytes", "x"), ("configs", [3]),
     ("configs", [None]), ("configs", [{}]), ("base", {"seconds": "x"}), ("cpu_seconds", "x"),
     ("base", {"cpu_seconds": [1]}), ("data", {"rows": {"val": "many"}}), ("scores", {"val/accuracy": 10**400}),
     ("parameters", {"trainable": 10**400, "total": 1}), ("checkpoint_bytes", 10**400), ("status", 3),
     ("seconds", 1e308), ("seconds", float("nan")), ("epochs", [{"epoch": 1e300}]), ("mode", "up"), ("unknown", 1),
     ("seed", True), ("data", {"labels": "ab"}), ("base", {"paht": "x"}), ("versions", {"torch": 2})],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_compare_metrics_of_wrong_type_are_refused(key, value, tmp_path, run, capsys):
    folder = fake_run(tmp_path / "run", "full", 1, [True, False])
    file = folder / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    line = refused(run, capsys, "compare", folder, "--out", tmp_path / "report")
    assert "metrics.json: " in line
    assert key in line
    assert not (tmp_path / "report").exists()


def changed(folder, **changes):
    file = folder / "metrics.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


HUGE = "x" * 2 * 10**6
LAUGHS = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.yaml", LAUGHS, "aliases expanded"),
        ("config.yaml", f"name: {HUGE}\n", "is larger than"),
        ("config.yaml", f"model: {{? {'k' * 10**5} : {list(range(10**5))}}}", "must have at most 1000"),
        ("config.yaml", f"name: {'-1' * 10**5}x\n", None),
        ("config.yaml", f"model: {{x: {'data.' * 10**5}}}\n", None),
        ("config.yaml", f"data: {{{'data.' * 190}y: 1}}\n", None),
        ("config.yaml", "[" * 10**5, "nested more than"),
        ("config.yaml", "- 1", "must be a mapping"),
        ("metrics.json", json.dumps({"task": HUGE}), "task must be text of at most 300 characters"),
        ("metrics.json", json.dumps({"scores": {HUGE: 1.0}}), "must be text of at most 300 characters"),
        ("metrics.json", json.dumps({"scores": {f"val/{i}": 1.0 for i in range(10**5)}}), "at most 1000 values"),
        ("metrics.json", json.dumps({"epochs": ["x"] * 10**5}), "epochs[0] must be a mapping"),
        ("metrics.json", json.dumps({"configs": [f"configs/strategy/{HUGE}.yaml"]}), "configs[0] must be text of at"),
        ("metrics.json", "[" * 10**6, "nested more than"),
        ("metrics.json", " " * 2**25, "is larger than"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_compare_hostile_file_sizes_are_handled_within_ten_seconds(name, text, words, tmp_path, run, capsys):
    right = [True, False] * 20
    folders = [fake_run(tmp_path / f"runs/{seed}", "full", seed, right) for seed in (1, 2)]
    (folders[1] / name).write_text(text)
    if name == "config.yaml":  # only a run without configuration files is called by its name
        changed(folders[1], configs=[])
    since = time.process_time()
    command = ["compare", tmp_path / "runs", "--out", tmp_path / "report"]
    if words is None:
        main([str(part) for part in command])
    else:
        assert words in refused(run, capsys, *command)
    assert time.process_time() - since < 10.0


@pytest.mark.parametrize("what", ["task", "config", "alias", "keys", "yaml"])
def test_compare_run_with_unencodable_text_is_refused(what, tmp_path, run, capsys):
    folder = fake_run(tmp_path / "run", "full", 1, [True, False])
    if what == "task":
        changed(folder, task="\ud800")
    elif what == "config":
        changed(folder, configs=["configs/strategy/\ud800.yaml"])
    elif what == "alias":
        (folder / "config.yaml").write_text("model: &a {init_args: *a}\n")
    elif what == "keys":
        (folder / "config.yaml").write_text("model: {a: [[{1: 2, b: 3}]]}\n")
    elif what == "yaml":
        (folder / "config.yaml").write_text('name: "\\ud800"\n')
    words = {"task": "task must be", "config": "configs[0] must be", "alias": "is recursive"}.get(what, "config.yaml")
    assert words in refused(run, capsys, "compare", folder, "--out", tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "header",
    ["row,text,label,prediction," + ",".join(f"p({i})" for i in range(3000)), "row,text,label,prediction,p(a),p(a)",
     "row,text,text,label,prediction,p(a),p(b)", "row,text,label,prediction,p(a)", "row,text,label,prediction"],
    ids=["many", "twice", "text", "one", "none"],
)  # fmt: skip
def test_compare_predictions_with_wrong_classes_are_refused(header, tmp_path, run, capsys):
    folder = fake_run(tmp_path / "run", "full", 1, [True, False])
    (folder / "predictions_val.csv").write_text(f"{header}\n1,x,a,a,1.0,0.0\n")
    line = refused(run, capsys, "compare", folder, "--out", tmp_path / "report")
    assert "predictions_val.csv is broken" in line
    assert not (tmp_path / "report").exists()


def test_compare_non_finite_scores_are_shown(tmp_path):
    for seed, value in enumerate((float("nan"), float("inf"), -1e299, 1e299)):
        folder = fake_run(tmp_path / f"runs/{seed}", "full", seed, [True, False])
        costs = dict.fromkeys(("seconds", "cpu_seconds"), value if abs(value) < 1e300 else 1.0)
        changed(folder, scores={"val/accuracy": value}, **costs, base={"seconds": None},
                seed=seed or None, epochs=[{"epoch": value, "val/accuracy": value}])  # fmt: skip
    main(["compare", str(tmp_path / "runs"), "--out", str(tmp_path / "report")])
    assert "nan" in (tmp_path / "report/report.md").read_text()


# The source


FORBIDDEN = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "eval", "exec", "trust_remote_code",
    "unsafe_load", "full_load", "UnsafeLoader", "FullLoader", "load_all", "os.system", "popen",
}  # fmt: skip


def test_sources_call_no_function_that_executes_data():
    sources = [ROOT / "cli.py"]
    for package in ("gpt2_pl", "datamodules", "callbacks", "configs"):
        sources += (ROOT / package).rglob("*.py")
    loads = 0
    for file in sources:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", None)}
                assert not names & FORBIDDEN, where
            if not isinstance(node, ast.Call):
                continue
            called, given = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
            assert called not in FORBIDDEN, where
            assert called.rpartition(".")[2] not in FORBIDDEN - {"eval"}, where  # model.eval() is another
            assert given.get("allow_pickle", "False") == "False", where
            assert "trust_remote_code" not in given, where
            assert given.get("weights_only", "True") == "True", where
            if called in ("torch.load", "torch.jit.load") or called.endswith("load_from_checkpoint"):
                loads += 1
                assert called != "torch.jit.load", where
                assert given.get("weights_only") == "True" or "load_from_checkpoint" in called, where
            if called in ("np.load", "numpy.load"):
                assert given.get("allow_pickle") == "False", where
            if called == "yaml.load":
                assert given.get("Loader") == "loader", where
                assert "SafeLoader" in file.read_text(encoding="utf-8"), where
            assert not called.startswith("subprocess.") or given.get("shell", "False") == "False", where
    assert loads
