"""The command line in this process: shipped configurations, errors, and the files of a run."""

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from conftest import metrics, weights
from helpers.configs import CONFIGS, STRATEGIES, TRAINERS
from helpers.refusals import refused

from gpt2_pl.callbacks import RunFolder
from gpt2_pl.commands import main
from gpt2_pl.commands.support.run_dir import RunTensorBoardLogger
from gpt2_pl.datamodules.synthetic import toy_reviews
from gpt2_pl.text.tokenizer import load_tokenizer

TINY = [
    "--model.config={vocab_size: 300, n_positions: 64, n_embd: 16, n_layer: 2, n_head: 2, dropout: 0.1}",
    "--data.vocab_size=300",
    "--data.n_train=80",
    "--trainer.max_epochs=1",
]


LANGUAGE_MODELS = ("text", "sonnets", "data_to_text")
MEANINGLESS = {  # what a strategy asks for and a task does not have
    **{("text", strategy): key for strategy, key in {
        "linear_probe": "head_dropout", "ulmfit": "pooling", "multi_sample_dropout": "pooling",
        "mixed_pooling": "pooling", "hard_prompt": "template", "verbalizer": "head",
    }.items()},
    ("sst5", "unlikelihood"): "unlikelihood", ("imdb", "sequence_unlikelihood"): "unlikelihood",
    ("sst5", "dpo"): "dpo",
    ("sst5", "hard_prompt"): "sentence1", ("sst5", "verbalizer"): "5 words", ("imdb", "verbalizer"): "sentence1",
}  # fmt: skip


def tasks_of(strategy):
    """Return a classifier and a language model for which a strategy has a meaning, each task and order in turn."""
    refused = {task for task, name in MEANINGLESS if name == strategy}
    i = [path.stem for path in STRATEGIES].index(strategy)
    if refused & {"sst5", "imdb"}:
        classifiers = () if "unlikelihood" in strategy or strategy == "dpo" else ("quora",)
    else:
        classifiers = (("sst5", "imdb", "quora")[i % 3],)
    tasks = [*classifiers, *(() if "text" in refused else (LANGUAGE_MODELS[i % 3],))]
    return tasks[:: -1 if i % 2 else 1]


@pytest.fixture
def one_step(base, data_flags, pair_flags, poem_flags):
    """Return the command that trains a task with a strategy for one step."""

    def command(task, strategy):
        own = {
            "text": ["--data.column=sentence"],
            "sonnets": ["--data.prompt_lines=1"],
            "data_to_text": ["--data.template={sentiment}\n{sentence}", "--model.max_new_tokens=4"],
        }.get(task, [])
        if strategy == "sequence_unlikelihood" and task in LANGUAGE_MODELS:
            own += ["--model.sequence_prefix=8", "--model.sequence_length=8"]
        if strategy == "dpo" and task in LANGUAGE_MODELS:
            own += ["--model.dpo.prompt_tokens=8", "--model.dpo.max_new_tokens=8"]
        files = {"quora": pair_flags, "sonnets": poem_flags}.get(task, data_flags)
        configs = [
            f"--config={CONFIGS}/{name}.yaml" for name in (f"task/{task}", f"strategy/{strategy}", "trainer/debug")
        ]
        return ["fit", *configs, "--model.base", base, "--data.max_length=32", *own, *files,
                "--trainer.limit_train_batches=1", "--trainer.gradient_clip_val=1.0"]  # fmt: skip

    return command


@pytest.mark.parametrize("strategy", [path.stem for path in STRATEGIES])
def test_fit_every_strategy_trains_a_task(strategy, run, one_step):
    """Train a classifier or a language model; the next test trains the other."""
    check_one_step(tasks_of(strategy)[0], strategy, run, one_step)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [path.stem for path in STRATEGIES])
def test_fit_every_strategy_trains_the_other_task(strategy, run, one_step):
    for task in tasks_of(strategy)[1:]:
        check_one_step(task, strategy, run, one_step)


def check_one_step(task, strategy, run, one_step):
    account = metrics(run(*one_step(task, strategy)))
    assert account["status"] == "finished"
    assert account["steps"] == 1
    assert account["scores"]["test/loss"] > 0
    assert 0 < account["parameters"]["trainable"] <= account["parameters"]["total"]


def test_fit_strategy_that_a_task_cannot_use_is_refused(run, one_step, capsys):
    for (task, strategy), key in MEANINGLESS.items():
        assert key in refused(run, capsys, *one_step(task, strategy)), (task, strategy)


def test_fit_trainer_file_sets_trainer_values(run, capsys):
    for file in TRAINERS:
        main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--config", str(file), "--print_config"])
        shown = yaml.safe_load(capsys.readouterr().out)["trainer"]
        stated = yaml.safe_load(file.read_text())["trainer"]
        stated.pop("strategy", None)
        assert {key: shown[key] for key in stated} == stated, file


@pytest.mark.slow
def test_fit_quickstart_reaches_documented_accuracy(run):
    account = metrics(run("fit", "--config", CONFIGS / "quickstart.yaml"))
    assert account["scores"]["test/accuracy"] >= 0.9
    assert len(account["epochs"]) == 9


def test_fit_quickstart_learns_and_writes_run_files(run, capsys, drawn_images):
    """Shorter than the quickstart is: negations, without which 0.67 can be reached, are learned in part."""
    shape = "{vocab_size: 512, n_positions: 64, n_embd: 48, n_layer: 3, n_head: 4, dropout: 0.0}"
    short = ["--data.n_train=1500", "--data.batch_size=16", "--trainer.max_epochs=5", f"--model.config={shape}"]
    folder = run("fit", "--config", CONFIGS / "quickstart.yaml", *short, "--model.optimizer.lr=2e-3")
    account = metrics(folder)
    assert account["scores"]["test/accuracy"] >= 0.7
    assert len(account["epochs"]) == 5
    assert account["parameters"]["total"] == account["parameters"]["trainable"] > 100_000
    assert account["seed"] == 1
    assert 10**7 < account["peak_memory_bytes"] < 10**11
    texts = [f"Review: {row['sentence']} Sentiment:" for row in toy_reviews(2250, 0)[:1500]]
    tokens = sum(len(encoding.ids) for encoding in load_tokenizer(folder).encode_batch(texts))
    assert account["tokens_per_second"] == pytest.approx(account["examples_per_second"] * tokens / 1500)
    assert account["seconds"] > 5 * tokens / account["tokens_per_second"] > 0.1 * account["seconds"]
    assert account["versions"].pop("python") == platform.python_version()
    assert {"torch", "lightning", "transformers", "tokenizers"} <= set(account["versions"])
    assert account["versions"] == {name: version(name) for name in account["versions"]}
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "checkpoints", "metrics.json", "predictions_val.csv", "predictions_test.csv"} <= names
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    shown = capsys.readouterr().out
    assert "tensorboard --logdir" in shown
    assert " classify " in shown.partition("Use:")[2]
    assert str(folder.relative_to(folder.parents[2])) in shown

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder)).Reload()
    assert {"val/accuracy", "val/macro_f1", "train/loss"} <= set(board.Tags()["scalars"])
    assert any(tag.startswith("lr-") and "block.2" in tag for tag in board.Tags()["scalars"])
    assert {"val/confusion", "train/confusion", "test/confusion"} <= set(board.Tags()["images"])

    again = run("test", "--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints/best.ckpt")
    assert again != folder
    assert metrics(again)["scores"]["test/accuracy"] == account["scores"]["test/accuracy"]
    bare = run(
        "validate",
        "--data=gpt2_pl.datamodules.ToySentiment",
        "--data.n_train=1500",
        "--ckpt_path",
        folder / "checkpoints/best.ckpt",
    )
    assert metrics(bare)["scores"]["val/accuracy"] == pytest.approx(account["scores"]["val/accuracy"])


def test_test_and_predict_deleted_base_weights_use_checkpoint(run, base, files, data_flags, tmp_path):
    gone = shutil.copytree(base, tmp_path / "gone")
    fit = ["fit", "--config", CONFIGS / "task/imdb.yaml", "--model.base", gone, "--data.max_length=64", *data_flags]
    folder = run(*fit, "--trainer.max_epochs=1", "--trainer.accelerator=cpu")
    checkpoint = folder / "checkpoints/best.ckpt"
    assert torch.load(checkpoint, weights_only=True)["base"]["digest"] == metrics(folder)["base"]["digest"]
    (gone / "model.safetensors").unlink()
    data = ["--data=gpt2_pl.datamodules.IMDB", f"--data.tokenizer={gone}", "--data.max_length=64", *data_flags]
    tested = metrics(run("test", *data, "--trainer.accelerator=cpu", "--ckpt_path", checkpoint))["scores"]
    scores = metrics(folder)["scores"]
    assert tested["test/accuracy"] == scores["test/accuracy"]
    assert tested["test/loss"] == pytest.approx(scores["test/loss"], rel=0.02)  # in bfloat16 where training was
    rows = tmp_path / "new.csv"
    rows.write_text("sentence\na fine film\nnot a fine film\n")
    predicted = run("predict", "--data=gpt2_pl.datamodules.IMDB", "--data.tokenizer", gone, "--data.predict_file", rows,
                    "--ckpt_path", checkpoint)  # fmt: skip
    lines = (predicted / "predictions_predict.csv").read_text().splitlines()
    assert lines[0] == "row,text,prediction,p(negative),p(positive)"
    assert len(lines) == 3


def test_validate_setting_prefers_flag_over_file_over_checkpoint(run, tmp_path):
    quick = ["--config", CONFIGS / "quickstart.yaml", *TINY]
    first = run("fit", *quick, "--model.label_smoothing=0.1", "--model.mean_weight=0.2")
    checkpoint = first / "checkpoints/last.ckpt"
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {init_args: {mean_weight: 0.3, label_smoothing: 0.2}}")
    second = run("validate", *quick[:-1], "--config", overlay, "--model.label_smoothing=0.3", "--ckpt_path", checkpoint)
    used = yaml.safe_load((second / "config.yaml").read_text())["model"]["init_args"]
    assert (used["label_smoothing"], used["mean_weight"]) == (0.3, 0.3)
    third = run("validate", *quick[:-1], "--ckpt_path", checkpoint)
    used = yaml.safe_load((third / "config.yaml").read_text())["model"]["init_args"]
    assert (used["label_smoothing"], used["mean_weight"]) == (0.1, 0.2)


INVALID = {  # part of the key, and of the text
    "--model.base=/nowhere": ("base", "/nowhere"),
    "--model.base=nobody/no-such-model": ("base", "nobody/no-such-model"),
    "--model.bass=x": ("bass", "bass"),
    "--trainer.max_epochs=three": ("max_epochs", "three"),
    "--data.train_file=/nowhere.csv": ("train_file", "/nowhere.csv"),
    "--data.batch_size=0": ("data.batch_size", "0"),
    "--data.label_column=mood": ("mood", "sentiment"),
    "--data.labels=[only]": ("labels", "only"),
    "--data.template=plain": ("template", "plain"),
    "--data.max_length=65": ("max_length", "64"),
    "--config=/nowhere.yaml": ("config", "/nowhere.yaml"),
    "--ckpt_path=/nowhere.ckpt": ("ckpt_path", "/nowhere.ckpt"),
    "--ckpt_path=https://example.com/x.ckpt": ("ckpt_path", "https://example.com/x.ckpt"),
    "--model.num_classes=7": ("num_classes", "7"),
    "--trainer.precision=9": ("precision", "9"),
}


def test_fit_invalid_argument_is_refused_in_one_line_without_files(run, capsys, base, data_flags, tmp_path):
    good = ["fit", "--config", CONFIGS / "task/imdb.yaml", "--model.base", base, "--data.max_length=64", *data_flags]
    for flag, (key, value) in INVALID.items():
        line = refused(run, capsys, *good, flag)
        assert key in line, flag
        assert value in line, flag
        assert not list(tmp_path.glob("lightning_logs/*/*")), flag


def test_main_missing_config_or_unknown_command_is_refused(run, capsys):
    assert "--config task/sst5" in refused(run, capsys, "fit")
    assert "unknown command 'train'" in refused(run, capsys, "train")


def test_fit_and_test_incompatible_or_unsafe_checkpoint_is_refused(run, capsys, tmp_path):
    quick = ["--config", CONFIGS / "quickstart.yaml", *TINY]
    checkpoint = run("fit", *quick) / "checkpoints/last.ckpt"
    before = checkpoint.read_bytes()
    other = "--model.config={vocab_size: 300, n_positions: 64, n_embd: 24, n_layer: 2, n_head: 2, dropout: 0.1}"
    line = refused(run, capsys, "fit", *quick, other, "--ckpt_path", checkpoint)
    assert "checkpoint" in line
    assert "(48,)" in line
    assert "(72,)" in line
    assert checkpoint.read_bytes() == before

    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(before[: len(before) // 2])
    assert "broken.ckpt" in refused(run, capsys, "test", *quick, "--ckpt_path", broken)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    torch.save({"state_dict": weights(checkpoint), "hyper_parameters": Evil()}, broken)
    assert "broken.ckpt" in refused(run, capsys, "test", *quick, "--ckpt_path", broken)
    assert not (tmp_path / "evil").exists()


def test_fit_repeated_writes_another_run_folder(run):
    first = run("fit", "--config", CONFIGS / "quickstart.yaml", *TINY)
    before = json.dumps(metrics(first))
    assert run("fit", "--config", CONFIGS / "quickstart.yaml", *TINY) != first
    assert json.dumps(metrics(first)) == before


def test_fit_finished_run_extended_by_an_epoch_equals_longer_run(run):
    quick = ["--config", CONFIGS / "quickstart.yaml", *TINY, "--model.schedule=gpt2_pl.optim.ConstantWithWarmup"]
    whole = run("fit", *quick, "--trainer.max_epochs=2")
    half = run("fit", *quick)
    resumed = run("fit", *quick, "--trainer.max_epochs=2", "--ckpt_path", half / "checkpoints/last.ckpt")
    assert metrics(whole)["epochs"] == metrics(resumed)["epochs"]
    a, b = (weights(folder / "checkpoints/last.ckpt") for folder in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_fit_two_tasks_hparams_page_shows_final_scores(run, tmp_path):
    """Read the runs of two tasks with TensorBoard's HPARAMS plugin."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.backend_context import Context

    small = ["--data.n_train=64", "--trainer.max_epochs=1"]
    one = run("fit", "--config", CONFIGS / "quickstart.yaml", *small)
    two = run("fit", "--config", CONFIGS / "quickstart_pairs.yaml", *small, "--seed_everything=5", "--name=문장 쌍")
    events = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "lightning_logs"))
    events.Reload()
    board = Context(TBContext(data_provider=data_provider.MultiplexerDataProvider(events, str(tmp_path))))
    contents = board.hparams_metadata(RequestContext(), "")
    page = board.experiment_from_metadata(RequestContext(), "", True, contents, [])
    scores = {metric.name.tag for metric in page.metric_infos}
    assert {"Final/test_accuracy", "Final/val_macro_f1", "Final/test_f1"} <= scores
    first = [metric.name.tag for metric in page.metric_infos[:5]]  # those that the page shows
    assert first[:3] == ["Epoch/accuracy_val", "Epoch/loss_train", "Epoch/loss_val"]
    assert first[3:] == ["Final/test_accuracy", "Final/test_f1"]
    differing = {info.name for info in page.hparam_infos if info.differs}
    assert {"model", "data", "seed_everything"} <= differing
    assert len(contents) == 2
    for folder in (one, two):
        assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "checkpoints"]
        board = EventAccumulator(str(folder)).Reload()
        for name, value in metrics(folder)["scores"].items():
            if "/" in name:
                assert board.Scalars(f"Final/{name.replace('/', '_')}")[-1].value == pytest.approx(value)
        assert board.Scalars("Epoch/loss_val")[-1].value == pytest.approx(metrics(folder)["epochs"][-1]["val/loss"])
        assert "epoch" not in board.Tags()["scalars"]
        settings = yaml.safe_load((folder / "hparams.yaml").read_text(encoding="utf-8"))
        assert settings["seed_everything"] == yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"]
        assert settings["model"].startswith("gpt2_pl.tasks.")
        assert all(isinstance(value, str | int | float) for value in settings.values())
    assert settings["name"] == "문장 쌍"
    assert "문장 쌍" in (two / "hparams.yaml").read_text(encoding="utf-8")


def test_run_folder_simultaneous_runs_take_different_versions(tmp_path):
    loggers = [RunTensorBoardLogger(RunFolder(tmp_path, "run"), "run", tmp_path) for _ in range(2)]
    assert [logger.version for logger in loggers] == ["version_0"] * 2
    assert not list(tmp_path.iterdir())
    folders = [logger.experiment.log_dir for logger in loggers]
    assert [Path(folder).name for folder in folders] == ["version_0", "version_1"]
    (tmp_path / "run/version_2").write_text("no folder, so that it does not count as a version")
    third = RunFolder(tmp_path, "run")
    third.take()
    assert third.path == tmp_path / "run/version_3"
    assert [logger.log_dir for logger in loggers] == folders


def test_fit_logger_false_overwrites_no_existing_files(run, base, data_flags, tmp_path):
    for name in ("config.yaml", "predictions_val.csv", "metrics.json"):
        (tmp_path / name).write_text("mine")
    main(["fit", f"--config={CONFIGS}/task/imdb.yaml", f"--model.base={base}", *data_flags, "--data.max_length=64",
              "--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.max_epochs=1",
              "--trainer.enable_progress_bar=false", "--early_stopping_patience=null"])  # fmt: skip
    for name in ("config.yaml", "predictions_val.csv", "metrics.json"):
        assert (tmp_path / name).read_text() == "mine"


def test_fit_common_mistake_error_suggests_fix(run, capsys, base, data_flags):
    sst5, files = [f"--config={CONFIGS}/task/sst5.yaml", f"--model.base={base}"], data_flags
    for args, fix in (
        ([*sst5, *files, "--trainer.limit_val_batches=0"], "early_stopping_patience must be null"),
        ([*sst5, *files, "--data.labels=[yes, no, maybe, so, much]"], "quote text that YAML reads as another type"),
        ([f"--config={CONFIGS}/strategy/full.yaml", "--data.train_file=f", sst5[1]], "the task comes first"),
    ):
        assert fix in refused(run, capsys, "fit", *args), args


def test_validate_untrained_model_warns_unless_verbalizer(run, base, data_flags, capsys):
    settings = [f"--config={CONFIGS}/task/imdb.yaml", f"--model.base={base}", *data_flags, "--data.max_length=64"]
    run("validate", *settings)
    assert "no ckpt_path is given: the model that is evaluated has not been trained" in capsys.readouterr().err
    words = ["--model.head=verbalizer", "--model.label_words=[' bad', ' good']", "--model.label_token_ids=[5, 6]"]
    run("validate", *settings, *words)
    assert "ckpt_path" not in capsys.readouterr().err
