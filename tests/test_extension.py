"""Every command with tests/extension/stars, a package outside the library."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, metrics
from helpers.sweeps import sweep
from transformers import GPT2LMHeadModel, GPT2Model

import gpt2_pl
from gpt2_pl.commands import demo
from gpt2_pl.commands.support.demo_answers import Worker
from gpt2_pl.experiments.comparison import compare
from gpt2_pl.experiments.run import Run
from gpt2_pl.surgery import Surgery
from gpt2_pl.tasks import Task


def forget():
    """Unload the package, as if in a new process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "stars"]:
        del sys.modules[name]
    for root in (Task, Surgery):
        for path in [path for path in root._classes if path.startswith("stars.")]:
            del root._classes[path]


@pytest.fixture
def stars(run, base, data_flags, tmp_path, monkeypatch):
    """Run commands in a folder that contains the package, which is not imported yet."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(ROOT / "tests/extension/stars", tmp_path / "stars")
    settings = yaml.safe_load((ROOT / "tests/extension/stars.yaml").read_text())
    settings["model"]["init_args"]["base"] = str(base)
    for flag in data_flags:
        key, _, path = flag.removeprefix("--data.").partition("=")
        settings["data"]["init_args"][key] = path
    settings["trainer"]["accelerator"] = "cpu"
    (tmp_path / "stars.yaml").write_text(yaml.safe_dump(settings))

    def command(*args):
        forget()
        return run(*args)

    yield command
    forget()


def test_commands_external_task_strategies_data_and_callback_work(stars, tmp_path, files, capsys):
    surgery = ["--model.surgery+=stars.surgery.TopBlocks", "--model.surgery+=stars.surgery.SSF"]
    folder = stars("fit", "--config=stars.yaml", *surgery, "--name=both", "--seed_everything=1")
    assert (tmp_path / "steps.txt").read_text() == "7"
    record = metrics(folder)
    assert record["metrics"]["mae"] == {"higher_is_better": False, "percent": False, "shown": True}
    assert record["mode"] == "min"
    best, last = (folder / "checkpoints" / f"{kind}.ckpt" for kind in ("best", "last"))
    stored = torch.load(best, weights_only=True)["state_dict"]
    added = {f"gpt2.h.{i}.mlp.c_fc.scale" for i in range(2)}
    assert stored.keys() >= added
    assert all(key in added or key.startswith(("head.", "gpt2.h.1.")) for key in stored)
    assert record["parameters"]["trainable"] == sum(tensor.numel() for tensor in stored.values())

    stars("fit", "--config", folder / "config.yaml", "--ckpt_path", last, "--trainer.max_epochs=2")
    assert [epoch["epoch"] for epoch in metrics(folder)["epochs"]] == [1, 2]
    stored = metrics(folder)["scores"]
    tested = metrics(stars("test", "--config", folder / "config.yaml", "--ckpt_path", best))["scores"]
    assert tested["test/mae"] == pytest.approx(stored["test/mae"])
    predicted = stars(
        "predict", "--config", folder / "config.yaml", "--ckpt_path", best, f"--data.predict_file={files['test']}"
    )
    with (predicted / "predictions_predict.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 35
    plugins = ["--plugin=stars.task", "--plugin=stars.surgery"]
    stars("classify", folder, f"--input={files['test']}", f"--out={tmp_path / 'out.jsonl'}", *plugins)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 35
    (shown,) = demo.load_runs(demo._parse_arguments([str(folder), *plugins]))
    with contextlib.closing(Worker()) as worker:
        *_, answer = shown.answers(["a film"], {}, worker)
    predicted = gpt2_pl.load(folder).predict(["a film"])[0]
    assert f'<p class="verdict" role="status">{predicted}</p>' in answer
    export = ["export", folder, "--format=hf", f"--out={tmp_path / 'hf'}", *plugins]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        stars(*export)
    error = capsys.readouterr().err
    assert all(words in error for words in ("head.weight", "stars.task.StarRegressor", "--backbone"))
    stars(*export, "--backbone")

    task = Task.find("stars.task.StarRegressor").load_from_checkpoint(best).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        theirs = GPT2Model.from_pretrained(tmp_path / "hf").eval()(ids).last_hidden_state
        torch.testing.assert_close(theirs, task.backbone(ids), rtol=1e-4, atol=1e-5)


def test_generate_and_export_external_language_model_adapter_works(stars, base, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a film of rain and light\n" * 60)
    flags = ["--data.tokenizer=null", f"--model.base={base}", f"--data.train_file={text}", f"--data.val_file={text}",
             "--data.max_length=32", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]  # fmt: skip
    folder = stars("fit", "--config=task/text", *flags, "--model.surgery+=stars.surgery.SSF", "--name=text")
    (tmp_path / "prompts.txt").write_text("a film\n")
    out = tmp_path / "out.txt"
    stars("generate", folder, f"--prompt_file={tmp_path / 'prompts.txt'}", f"--out={out}", "--plugin=stars.surgery",
          "--max_new_tokens=5", "--temperature=0")  # fmt: skip
    assert out.read_text().startswith("a film")
    stars("export", folder, "--format=hf", f"--out={tmp_path / 'hf'}", "--plugin=stars.surgery")
    tokens = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False
    )
    assert tokens.shape == (1, 8)


def test_sweep_and_compare_external_task_uses_its_metric(stars, tmp_path):
    (tmp_path / "top.yaml").write_text("model:\n  surgery+:\n  - class_path: stars.surgery.TopBlocks\n")
    (tmp_path / "frozen.yaml").write_text("model:\n  train_base: false\n")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({
        "name": "own", "seeds": [1], "tasks": {"stars": {"configs": ["stars.yaml"], "strategies": {
            "top": {"configs": ["top.yaml"]}, "frozen": {"configs": ["frozen.yaml"]}}}},
    }))  # fmt: skip
    status, _, errors = sweep(tmp_path, file="sweep.yaml")
    assert status == 0, errors
    folders = sorted((tmp_path / "lightning_logs/own").glob("**/metrics.json"))
    assert len(folders) == 2
    (comparison,) = compare([Run.read(file.parent) for file in folders])
    assert comparison.primary_metric == "test/mae"
    assert not comparison.higher_is_better("test/mae")
    best = min(comparison.groups, key=lambda group: group.mean("test/mae"))
    assert comparison.best() is best
    group = comparison.groups[1]
    found = group.differences["test/mae"].contrast
    assert found.estimate == pytest.approx(comparison.groups[0].mean("test/mae") - group.mean("test/mae"), abs=1e-5)
    low, high = found.interval()
    assert low < found.estimate < high
    rows = list(csv.DictReader((folders[0].parent / "predictions_test.csv").open()))
    mean = np.mean([float(row["mae"]) for row in rows])
    assert mean == pytest.approx(json.loads(folders[0].read_text())["scores"]["test/mae"], abs=1e-5)
