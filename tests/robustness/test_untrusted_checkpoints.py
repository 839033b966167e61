"""Untrusted checkpoints and weights: no pickle is executed, no class that they name is called, types are checked."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers.checkpoints import STORED, content
from helpers.refusals import refusal, refused

from gpt2_pl import GPT2
from gpt2_pl.commands import main
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


@pytest.fixture
def checkpoint(tmp_path):
    file = tmp_path / "run/checkpoints/best.ckpt"
    file.parent.mkdir(parents=True)
    return file


def commands(checkpoint, base, rows, out):
    """Return every command that reads a checkpoint."""
    model = ["--config", CONFIG / "task/imdb.yaml", f"--model.base={base}", "--data.max_length=32"]
    data = [f"--data.{split}_file={rows}" for split in ("train", "val", "test", "predict")]
    folder, prompts = checkpoint.parents[1], base.parent / "prompts.txt"
    prompts.write_text("a\n")
    return {
        **{name: [name, *model, *data, "--ckpt_path", checkpoint] for name in ("fit", "validate", "test", "predict")},
        "test without a task": ["test", "--data=gpt2_pl.datamodules.IMDB", *data, "--ckpt_path", checkpoint],
        "classify": ["classify", folder, "--input", rows, "--out", out / "out.csv"],
        "generate": ["generate", folder, "--prompt_file", prompts, "--out", out / "out.txt"],
        "export": ["export", folder, "--format", "hf", "--out", out / "out"],
    }


def evil_checkpoints(marker, path):
    """Yield functions that write checkpoints whose pickles execute code, and commands to read them by."""
    everything = ("fit", "validate", "test", "predict", "test without a task", "classify", "generate", "export")
    yield lambda: torch.save(content(hyper_parameters=Evil(marker)), path), everything
    yield lambda: torch.save(content(state_dict={"x": Evil(marker)}), path), ("test without a task",)
    yield lambda: torch.save(content(callbacks={"x": Evil(marker)}), path), ("fit",)
    yield lambda: torch.save(content(x=Evil(marker)), path, _use_new_zipfile_serialization=False), ("classify",)
    yield lambda: path.write_bytes(pickle.dumps(Evil(marker))), ("export",)


@pytest.mark.parametrize("forced", [False, True])
def test_commands_pickle_in_checkpoint_is_never_executed(
    forced, run, base, files, marker, checkpoint, capsys, tmp_path, monkeypatch
):
    if forced:  # torch would load pickles by default
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before = sorted(tmp_path.rglob("*"))
    for write, readers in evil_checkpoints(marker, checkpoint):
        write()
        for name in readers:
            line = refused(run, capsys, *commands(checkpoint, base, files["val"], tmp_path)[name])
            assert "best.ckpt" in line, name
        assert "best.ckpt" in str(refusal(SentimentClassifier.load_from_checkpoint, checkpoint))
    assert not marker.exists()
    assert sorted(tmp_path.rglob("*")) == sorted([*before, checkpoint])
    pickle.loads(checkpoint.read_bytes()).close()  # it would have
    assert marker.exists()


def test_commands_pickled_weights_and_data_are_never_executed(base, marker, run, files, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    folder.mkdir()
    adapter.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.safetensors", "tokenizer.json"):
        torch.save({"transformer.wte.weight": Evil(marker)}, folder / name)
        refusal(GPT2.from_pretrained, folder, case=name)
    gpt2 = GPT2.from_pretrained(base)
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        torch.save({"x": Evil(marker)}, adapter / name)
        assert str(adapter) in str(refusal(PeftAdapter(str(adapter)).apply, gpt2, case=name)), name
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
    with pytest.raises(InputError, match="weights_only"):
        SentimentClassifier.load_from_checkpoint(file, weights_only=False)
    line = refused(run, capsys, "test", "--config", CONFIG / "task/imdb.yaml", f"--model.base={base}", *data_flags,
                   "--ckpt_path", file, "--weights_only=false")  # fmt: skip
    assert "--weights_only" in line


# What a checkpoint says is data


def hyperparameters(**changes):
    return {"hyper_parameters": {**STORED, **changes}}


EVIL_CALL = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "executed"]}}
LORA = {"class_path": "gpt2_pl.surgery.LoRA", "init_args": {"rank": {"class_path": "this.X"}}}
LEGACY = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}  # where Lightning once kept hyperparameters
NAMED_CLASSES = [
    (hyperparameters(optimizer="os.system"), "hyper_parameters.optimizer"),
    (hyperparameters(optimizer=EVIL_CALL), "hyper_parameters.optimizer"),
    (hyperparameters(schedule=EVIL_CALL), "hyper_parameters.schedule"),
    (hyperparameters(surgery=[EVIL_CALL]), "subprocess.Popen"),
    (hyperparameters(surgery=["os.system"]), "hyper_parameters.surgery[0]"),
    (hyperparameters(surgery=[{"class_path": "gpt2_pl.surgery.build"}]), "surgery.build"),
    ({"surgery": [EVIL_CALL]}, "subprocess.Popen"),
    (hyperparameters(_instantiator="os.system"), "hyper_parameters._instantiator"),
    (hyperparameters(_class_path="subprocess.Popen"), "hyper_parameters._class_path"),
    (hyperparameters(class_path="os.system"), "hyper_parameters.class_path"),
    (hyperparameters(unknown=1), "hyper_parameters.unknown"),
    (hyperparameters(config={"class_path": "this.X"}), "hyper_parameters.config.class_path"),
    (hyperparameters(config={"n_embd": {"class_path": "this.X"}}), "hyper_parameters.config.n_embd"),
    (hyperparameters(surgery=[LORA]), "rank"),
    ({"hparams": {**LEGACY, "optimizer": "this.s"}}, "hparams"),
    ({"hparams": {"optimizer": {"class_path": "torch.optim.SGD", "dict_kwargs": EVIL_CALL}}}, "hparams"),
    ({"module_arguments": {**LEGACY, "optimizer": "this.s"}}, "module_arguments"),
    ({"hparams_type": "this.X"}, "hparams_type"),
    ({"hparams_name": "schedule"}, "hparams_name"),
    ({"task": "os.system"}, "os.system"),
    ({"task": "Task"}, "'Task'"),
    ({"task": ["x"]}, "task"),
    ({"callbacks": {"ModelCheckpoint": {"best_model_path": "s3://bucket/x.ckpt"}}}, "best_model_path"),
    ({"callbacks": {"ModelCheckpoint": {"last_model_path": "/run/checkpoints/../../home"}}}, "last_model_path"),
]
BY_COMMANDS = (1, 3, 13, 14, 19)  # the cases that are also read by commands: one of each place where a class is named


def test_load_from_checkpoint_classes_named_by_a_checkpoint_are_not_called(
    run, base, files, checkpoint, capsys, tmp_path, monkeypatch
):
    monkeypatch.delitem(sys.modules, "this", raising=False)  # a module of Python's that nothing else imports
    readers = commands(checkpoint, base, files["val"], tmp_path)
    for i, (changes, named) in enumerate(NAMED_CLASSES):
        torch.save(content(**changes), checkpoint)
        error = refusal(SentimentClassifier.load_from_checkpoint, checkpoint, case=changes)
        assert named in str(error), changes
        if i in BY_COMMANDS:
            for name in ("test without a task", "classify"):
                assert named in refused(run, capsys, *readers[name]), changes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert "this" not in sys.modules


LAUGHING, DEEP = ["x"] * 9, []
for _ in range(8):
    LAUGHING = [LAUGHING] * 9
for _ in range(200):
    DEEP = [DEEP]
EPOCHS = {"epochs": [{"epoch": 1, "val/accuracy": 0.5}]}
BEST = {"best_model_path": "", "kth_best_model_path": "", "last_model_path": "", "best_k_models": {},
        "best_model_score": None, "kth_value": None, "dirpath": "/x"}  # fmt: skip
OF_BEST = "ResumableModelCheckpoint{'monitor': 'val/accuracy'}"
OF_STOPPING = "ResumableEarlyStopping{'monitor'}"
WORDING = {"template": "{sentence}", "columns": {"sentence": ["sentence"]}, "labels": ["a", "b"], "max_length": 9}


def lora(**settings):
    return [{"class_path": "gpt2_pl.surgery.LoRA", "init_args": settings}]


WRONG_TYPES = [  # changes of a checkpoint, and the key of the error
    ({"surgery": 3}, "surgery"),
    (hyperparameters(surgery=3), "hyper_parameters.surgery"),
    ({"callbacks": [1]}, "callbacks"),
    ({"callbacks": {3: {}}}, "a key of callbacks"),
    ({"callbacks": {"Own": 3}}, "callbacks.Own"),
    ({"state_dict": 3}, "state_dict"),
    ({"state_dict": {"a": 3}}, "state_dict.a"),
    ({"state_dict": {3: torch.ones(1)}}, "a key of state_dict"),
    ({"base": "x"}, "base"),
    ({"base": {"path": 3}}, "base.path"),
    ({"prompt_spec": 3}, "prompt_spec"),
    ({"prompt_spec": {**WORDING, "labels": ["a", 3]}}, "prompt_spec.labels[1]"),
    ({"prompt_spec": {**WORDING, "labels": ["a", "\ud800"]}}, "prompt_spec.labels[1]"),
    ({"prompt_spec": {**WORDING, "template": "\udfff{sentence}"}}, "prompt_spec.template"),
    ({"prompt_spec": {**WORDING, "columns": {"sentence": [3]}}}, "prompt_spec.columns.sentence[0]"),
    ({"callbacks": {OF_BEST: {**BEST, "best_model_path": 3}}}, f"callbacks.{OF_BEST}.best_model_path"),
    ({"callbacks": {OF_BEST: {**BEST, "best_k_models": [1]}}}, f"callbacks.{OF_BEST}.best_k_models"),
    ({"callbacks": {OF_BEST: {**BEST, "kth_value": torch.ones(2)}}}, f"callbacks.{OF_BEST}.kth_value"),
    ({"callbacks": {"RunSummary": 3}}, "callbacks.RunSummary"),
    ({"callbacks": {"RunSummary": {"epochs": 3}}}, "callbacks.RunSummary.epochs"),
    ({"callbacks": {"RunSummary": {"epochs": [{"val/accuracy": 0.5}]}}}, "callbacks.RunSummary.epochs[0]"),
    ({"callbacks": {"RunSummary": {"epochs": [{"epoch": 1, "val/a": "x"}]}}}, "callbacks.RunSummary.epochs[0].val/a"),
    ({"callbacks": {"RunSummary": {**EPOCHS, "layers": [3]}}}, "callbacks.RunSummary.layers[0]"),
    ({"callbacks": {"Throughput": {"seconds": "x"}}}, "callbacks.Throughput.seconds"),
    ({"callbacks": {"PredictionWriter": {"best": "x"}}}, "callbacks.PredictionWriter.best"),
    ({"callbacks": {"NonFiniteLossGuard": {"skipped": "x"}}}, "callbacks.NonFiniteLossGuard.skipped"),
    ({"callbacks": {OF_STOPPING: {"wait_count": "1"}}}, f"callbacks.{OF_STOPPING}.wait_count"),
    ({"loops": 3}, "loops"),
    ({"loops": {}}, "loops.fit_loop"),
    ({"loops": {"fit_loop": 3}}, "loops.fit_loop"),
    ({"loops": {"fit_loop": {}}}, "loops.fit_loop.epoch_progress"),
    ({"optimizer_states": 3}, "optimizer_states"),
    ({"optimizer_states": []}, "optimizer_states"),
    ({"optimizer_states": [{}]}, "optimizer_states[0].state"),
    ({"lr_schedulers": []}, "lr_schedulers"),
    ({"pytorch-lightning_version": "1.9.5"}, "pytorch-lightning_version"),
    ({"pytorch-lightning_version": "2.6 or so"}, "pytorch-lightning_version"),
    ({"pytorch-lightning_version": 2}, "pytorch-lightning_version"),
    ({"epoch": -1}, "epoch"),
    ({"global_step": "7"}, "global_step"),
    ({"hyper_parameters": [1]}, "hyper_parameters"),
    (hyperparameters(config=3), "hyper_parameters.config"),
    (hyperparameters(config={"what": 1}), "hyper_parameters.config.what"),
    (hyperparameters(config={**STORED["config"], "n_embd": "x"}), "hyper_parameters.config.n_embd"),
    (hyperparameters(config={"n_layer": 10**30}), "hyper_parameters.config.n_layer"),
    (hyperparameters(dropout="x"), "hyper_parameters.dropout"),
    (hyperparameters(num_classes="x"), "hyper_parameters.num_classes"),
    (hyperparameters(num_dropout_samples=2.5), "hyper_parameters.num_dropout_samples"),
    (hyperparameters(pooling="up"), "hyper_parameters.pooling"),
    (hyperparameters(label_words=3), "hyper_parameters.label_words"),
]
WRONG_CONTENTS = [  # changes of a checkpoint, and a part of the message of an error without a key
    (hyperparameters(surgery=lora(rank="x")), "rank"),
    (hyperparameters(surgery=lora(what=1)), "what"),
    ({"base": {}, "hyper_parameters": {**STORED, "num_classes": 3}}, "num_classes"),
    (hyperparameters(config={**STORED["config"], "n_layer": 10**9}), "config.n_layer"),
    ({"base": {}, "surgery": lora(rank=10**9)}, "surgery.rank"),
    ({"task": LAUGHING}, "2,000,000"),
    ({"extra": DEEP}, "100 deep"),
    ({"state_dict": {"a": torch.ones(2, 2).to_sparse()}}, "sparse_coo"),
    ({"extra": torch.zeros(1).expand(10**9)}, "(1000000000,)"),
    ({"extra": torch.zeros(2, device="meta")}, "(2,)"),
]


def test_load_from_checkpoint_contents_of_wrong_type_are_refused_by_key(checkpoint):
    for changes, key in WRONG_TYPES:
        torch.save(content(**changes), checkpoint)
        error = refusal(SentimentClassifier.load_from_checkpoint, checkpoint, case=changes)
        assert error.key == key, shorten(changes)
        assert str(checkpoint) in error.source
    for changes, named in WRONG_CONTENTS:
        torch.save(content(**changes), checkpoint)
        error = refusal(SentimentClassifier.load_from_checkpoint, checkpoint, case=changes)
        assert named in str(error), shorten(changes)


def test_commands_checkpoint_contents_of_wrong_type_are_refused(run, base, files, checkpoint, capsys, tmp_path):
    readers = commands(checkpoint, base, files["val"], tmp_path)
    wrong_label = {"prompt_spec": {**WORDING, "labels": ["\ud800", "b"]}}
    for reader in ("fit", "test without a task", "classify"):
        for changes, key in (({"surgery": 3}, "surgery"), (wrong_label, "prompt_spec.labels[0]")):
            torch.save(content(**changes), checkpoint)
            assert refused(run, capsys, *readers[reader]).key == key, reader
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
