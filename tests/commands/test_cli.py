"""The command line in this process: shipped configurations, errors, and the files of a run."""

import itertools
import json
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from conftest import metrics, weights
from helpers.configs import CONFIGS, STRATEGIES, TASKS, TRAINERS
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


# What a strategy asks for and a task does not have: one line says so.
WORDS = ("hard_prompt", "verbalizer")
MEANINGLESS = {
    **{(task, "linear_probe"): "head_dropout" for task in ("text", "sonnets")},
    **{
        (task, name): "pooling"
        for task in ("text", "sonnets")
        for name in ("ulmfit", "multi_sample_dropout", "mixed_pooling")
    },
    **{(task, "hard_prompt"): "template" for task in ("text", "sonnets")},
    **{(task, "verbalizer"): "head" for task in ("text", "sonnets")},
    **{
        (task, name): "unlikelihood"
        for task in ("sst5", "imdb", "quora")
        for name in ("unlikelihood", "sequence_unlikelihood")
    },
    **{(task, words): "sentence1" for task in ("sst5", "imdb") for words in WORDS},
    ("sst5", "verbalizer"): "2 words",
}


@pytest.mark.parametrize(("task", "strategy"), itertools.product(TASKS, STRATEGIES), ids=lambda path: path.stem)
def test_fit_every_strategy_on_every_task_trains_or_is_refused(
    task, strategy, run, base, data_flags, pair_flags, poem_flags, capsys
):
    column = {"text": ["--data.column=sentence"], "sonnets": ["--data.prompt_lines=1"]}.get(task.stem, [])
    if strategy.stem == "sequence_unlikelihood" and task.stem in ("text", "sonnets"):
        column += ["--model.sequence_prefix=8", "--model.sequence_length=8"]
    files = {"quora": pair_flags, "sonnets": poem_flags}.get(task.stem, data_flags)
    command = ["fit", "--config", task, "--config", strategy, "--config", CONFIGS / "trainer/debug.yaml",
               "--model.base", base, "--data.max_length=32", *column, *files,
               "--trainer.limit_train_batches=1", "--trainer.gradient_clip_val=1.0"]  # fmt: skip
    if (task.stem, strategy.stem) in MEANINGLESS:
        assert MEANINGLESS[task.stem, strategy.stem] in refused(run, capsys, *command)
        return
    folder = run(*command)
    account = metrics(folder)
    assert account["status"] == "finished"
    assert account["steps"] == 1
    assert account["scores"]["test/loss"] > 0
    assert 0 < account["parameters"]["trainable"] <= account["parameters"]["total"]


@pytest.mark.parametrize("file", TRAINERS, ids=lambda path: path.stem)
def test_fit_trainer_file_sets_trainer_values(file, run, capsys):
    main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--config", str(file), "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)["trainer"]
    stated = yaml.safe_load(file.read_text())["trainer"]
    assert {key: shown[key] for key in stated if key != "strategy"} == {
        k: v for k, v in stated.items() if k != "strategy"
    }


def test_fit_quickstart_learns_and_writes_run_files(run, capsys):
    folder = run("fit", "--config", CONFIGS / "quickstart.yaml")
    account = metrics(folder)
    assert account["scores"]["test/accuracy"] >= 0.9
    assert len(account["epochs"]) == 9
    assert account["parameters"]["total"] == account["parameters"]["trainable"] > 600_000
    assert account["seed"] == 1
    assert 10**7 < account["peak_memory_bytes"] < 10**11
    texts = [f"Review: {row['sentence']} Sentiment:" for row in toy_reviews(6000, 0)[:4000]]
    tokens = sum(len(encoding.ids) for encoding in load_tokenizer(folder).encode_batch(texts))
    assert account["tokens_per_second"] == pytest.approx(account["examples_per_second"] * tokens / 4000)
    assert account["seconds"] > 9 * tokens / account["tokens_per_second"] > 0.1 * account["seconds"]
    assert account["versions"].pop("python") == platform.python_version()
    assert {"torch", "lightning", "transformers", "tokenizers"} <= set(account["versions"])
    assert account["versions"] == {name: version(name) for name in account["versions"]}
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "checkpoints", "metrics.json", "predictions_val.csv", "predictions_test.csv"} <= names
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    shown = capsys.readouterr().out
    assert "tensorboard --logdir" in shown
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
        "--data.n_train=4000",
        "--ckpt_path",
        folder / "checkpoints/best.ckpt",
    )
    assert metrics(bare)["scores"]["val/accuracy"] == pytest.approx(account["scores"]["val/accuracy"])


def test_predict_deleted_base_weights_uses_checkpoint(run, base, files, data_flags, tmp_path):
    import shutil

    gone = shutil.copytree(base, tmp_path / "gone")
    fit = ["fit", "--config", CONFIGS / "task/imdb.yaml", "--model.base", gone, "--data.max_length=64", *data_flags]
    folder = run(*fit, "--trainer.max_epochs=1", "--trainer.accelerator=cpu")
    checkpoint = folder / "checkpoints/best.ckpt"
    assert torch.load(checkpoint, weights_only=True)["base"]["digest"] == metrics(folder)["base"]["digest"]
    (gone / "model.safetensors").unlink()
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


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.base=/nowhere"], ["model.base", "/nowhere"]),
        (["--model.base=nobody/no-such-model"], ["model.base", "nobody/no-such-model", "folder"]),
        (["--model.bass=x"], ["bass"]),
        (["--trainer.max_epochs=three"], ["max_epochs", "three"]),
        (["--data.train_file=/nowhere.csv"], ["data.train_file", "/nowhere.csv"]),
        (["--data.batch_size=0"], ["data.batch_size", "0"]),
        (["--data.label_column=mood"], ["mood", "sentiment"]),
        (["--data.labels=[only]"], ["labels", "only"]),
        (["--data.template=plain"], ["template", "plain"]),
        (["--data.max_length=65"], ["65", "64"]),
        (["--config=/nowhere.yaml"], ["/nowhere.yaml"]),
        (["--ckpt_path=/nowhere.ckpt"], ["ckpt_path", "/nowhere.ckpt"]),
        (["--ckpt_path=https://example.com/x.ckpt"], ["ckpt_path", "https://example.com/x.ckpt"]),
        (["--model.num_classes=7"], ["num_classes", "7", "2"]),
        (["--trainer.precision=9"], ["precision"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_fit_invalid_argument_is_refused_in_one_line_without_files(
    args, words, run, capsys, base, data_flags, tmp_path
):
    good = ["fit", "--config", CONFIGS / "task/imdb.yaml", "--model.base", base, "--data.max_length=64", *data_flags]
    line = refused(run, capsys, *good, *args)
    assert all(word in line for word in words), line
    assert not list(tmp_path.glob("lightning_logs/*/*"))


def test_main_missing_config_or_unknown_command_is_refused(run, capsys):
    assert "--config task/sst5" in refused(run, capsys, "fit")
    assert "unknown command 'train'" in refused(run, capsys, "train")


def test_fit_and_test_incompatible_or_unsafe_checkpoint_is_refused(run, capsys, tmp_path):
    quick = ["--config", CONFIGS / "quickstart.yaml", *TINY]
    checkpoint = run("fit", *quick) / "checkpoints/last.ckpt"
    before = checkpoint.read_bytes()
    other = "--model.config={vocab_size: 300, n_positions: 64, n_embd: 24, n_layer: 2, n_head: 2, dropout: 0.1}"
    line = refused(run, capsys, "fit", *quick, other, "--ckpt_path", checkpoint)
    assert "does not fit" in line
    assert "(48,) in the checkpoint and (72,) in the model" in line
    assert checkpoint.read_bytes() == before

    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(before[: len(before) // 2])
    assert "broken.ckpt is not a checkpoint" in refused(run, capsys, "test", *quick, "--ckpt_path", broken)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    torch.save({"state_dict": weights(checkpoint), "hyper_parameters": Evil()}, broken)
    assert "broken.ckpt is not a checkpoint" in refused(run, capsys, "test", *quick, "--ckpt_path", broken)
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
    two = run("fit", "--config", CONFIGS / "quickstart_pairs.yaml", *small, "--seed_everything=5")
    events = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "lightning_logs"))
    events.Reload()
    board = Context(TBContext(data_provider=data_provider.MultiplexerDataProvider(events, str(tmp_path))))
    contents = board.hparams_metadata(RequestContext(), "")
    page = board.experiment_from_metadata(RequestContext(), "", True, contents, [])
    scores = {metric.name.tag for metric in page.metric_infos}
    assert {"hp/test_accuracy", "hp/val_macro_f1", "hp/test_f1"} <= scores
    assert not {"val/accuracy", "train/loss"} & scores
    differing = {info.name for info in page.hparam_infos if info.differs}
    assert {"model", "data", "seed_everything"} <= differing
    assert len(contents) == 2
    for folder in (one, two):
        final = EventAccumulator(str(folder / "final")).Reload()
        for name, value in metrics(folder)["scores"].items():
            if "/" in name:
                assert final.Scalars(f"hp/{name.replace('/', '_')}")[-1].value == pytest.approx(value)


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


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config={task}/sst5.yaml", "--trainer.limit_val_batches=0"], "give --early_stopping_patience null"),
        (["--config={task}/sst5.yaml", "--data.template=Review: {{sentence}}"], "--data.template '\"Review:"),
        (["--config={task}/sst5.yaml", "--data.labels=[yes, no, maybe, so, much]"], "--data.labels '[\"no"),
        (["--config={strategy}/full.yaml", "--data.train_file=f"], "the task comes first"),
    ],
)
def test_fit_common_mistake_error_suggests_fix(args, words, run, capsys, base, data_flags):
    folders = {name: CONFIGS / name for name in ("task", "strategy")}
    files = data_flags if "sst5" in args[0] else []
    assert words in refused(
        run, capsys, "fit", *(arg.format(**folders) for arg in args), f"--model.base={base}", *files
    )


def test_validate_untrained_model_warns_unless_verbalizer(run, base, data_flags, capsys):
    settings = [f"--config={CONFIGS}/task/imdb.yaml", f"--model.base={base}", *data_flags, "--data.max_length=64"]
    run("validate", *settings)
    assert "no ckpt_path is given: the model that is evaluated has not been trained" in capsys.readouterr().err
    words = ["--model.head=verbalizer", "--model.label_words=[' bad', ' good']", "--model.label_token_ids=[5, 6]"]
    run("validate", *settings, *words)
    assert "ckpt_path" not in capsys.readouterr().err
