"""Warnings: one line each, without irrelevant ones of libraries."""

import warnings

from conftest import ROOT

from gpt2_pl.commands.support.process import shorten_warnings

QUICK = ["fit", "--config", ROOT / "configs/quickstart.yaml", "--data.n_train", "40", "--trainer.limit_train_batches=1"]


def test_shorten_warnings_shows_one_line_without_path_and_source(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shorten_warnings()
        warnings.warn("the cache\n\x1b[31m cannot   be written", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "gpt2-pl: warning: the cache \\x1b[31m cannot be written\n"


def test_fit_and_test_irrelevant_library_warnings_are_not_shown(run, recwarn, caplog):
    for callback in ("WeightAveraging", "[{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.1}}]"):
        folder = run(
            *QUICK, "--trainer.max_epochs=2", f"--trainer.callbacks+={callback}", "--trainer.log_every_n_steps=9"
        )
    run("test", "--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints/best.ckpt")
    shown = [str(one.message) for one in recwarn] + [record.getMessage() for record in caplog.records]
    words = ("callbacks used to create", "logging interval", "WeightAveraging callback", "only supported every epoch")
    assert not [text for text in shown if any(word in text for word in words)]
