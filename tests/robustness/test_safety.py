"""Where files are read from and written to: no addresses, nothing outside a run's folder; no data is executed."""

import ast
import json

import pytest
import yaml
from conftest import ROOT
from helpers.refusals import refusal, refused
from helpers.runs import fake_run

from gpt2_pl.commands.lightning_cli import GPT2CLI
from gpt2_pl.commands.support.settings import check_name
from gpt2_pl.errors import InputError

CONFIG = ROOT / "configs"


def test_commands_addresses_as_paths_are_refused_without_download(run, base, data_flags, capsys, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # would be called
    good = ["--config", CONFIG / "task/imdb.yaml", f"--model.base={base}", "--data.max_length=32", *data_flags]
    file = tmp_path / "run.yaml"
    prompts = tmp_path / "prompts.txt"
    for written in (file, prompts):
        written.write_text("a\n")
    before = sorted(tmp_path.iterdir())
    place, named = "https://example.com/x", "example.com/x"
    adapter = {"class_path": "gpt2_pl.surgery.PeftAdapter", "init_args": {"folder": place}}
    file.write_text(yaml.safe_dump({"ckpt_path": f"{place}.ckpt"}))
    for command in (
        ["fit", *good, "--ckpt_path=s3://example.com/x.ckpt"],
        ["fit", *good, "--model.base=file:///example.com/x"],
        ["fit", *good, f"--data.tokenizer={place}"],
        ["fit", *good, f"--data.train_file={place}.csv"],
        ["fit", *good, f"--data.val_file={place}.parquet"],
        ["fit", *good, f"--model.surgery={json.dumps([adapter])}"],
        ["test", *good, "--config", file],
        ["classify", tmp_path, "--ckpt_path", place, "--input", "x.csv", "--out", "o.csv"],
        ["generate", tmp_path, "--ckpt_path", place, "--prompt_file", prompts, "--out", "o.txt"],
        ["generate", tmp_path, "--prompt_file", f"{place}.txt", "--out", "o.txt"],
        ["export", place, "--format", "hf", "--out", "o"],
        ["compare", place, "--out", "o"],
    ):
        assert named in refused(run, capsys, *command), command
    assert sorted(tmp_path.iterdir()) == before


def test_fit_environment_variables_set_no_arguments(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for name, value in {"CKPT_PATH": "https://example.com/x.ckpt", "NAME": "by_environment", "CONFIG": "x"}.items():
        monkeypatch.setenv(f"PL_FIT__{name}", value)
        monkeypatch.setenv(f"PL_{name}", value)
    folder = run("fit", "--config", CONFIG / "quickstart.yaml", "--data.n_train=32", "--trainer.max_epochs=1")
    assert folder == tmp_path / "lightning_logs/quickstart/version_0"


def test_cli_checkpoint_address_found_in_parsing_is_refused(tmp_path, monkeypatch):
    """The check after parsing works without the earlier one: Lightning would load from any address."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpt2_pl.commands.lightning_cli.CommandLine.checkpoint", lambda self: None)
    with pytest.raises(InputError, match=r"ckpt_path: .*https://example\.com/x\.ckpt"):
        GPT2CLI(["fit", f"--config={CONFIG}/quickstart.yaml", "--ckpt_path=https://example.com/x.ckpt"])
    assert not list(tmp_path.iterdir())


# Where things are written


NAMES = ["../../x", "/tmp/x", "..", ".", "", "a/../../x", "~/x", "a\\..\\x", "a\0b", "a\nb", "-1", "x" * 300]


def test_check_name_outside_the_runs_folder_is_refused():
    for name in NAMES:
        assert str(refusal(check_name, name)).startswith("name must "), name


def test_fit_name_outside_the_runs_folder_is_refused_before_any_file_is_written(run, capsys, tmp_path):
    file = tmp_path / "name.yaml"
    for name in ("../../x", "/tmp/x"):
        file.write_text(yaml.safe_dump({"name": name}))
        assert name in refused(run, capsys, "fit", "--config", CONFIG / "quickstart.yaml", "--config", file)
    assert list(tmp_path.iterdir()) == [file]


LONG = ["x" * 300, "x" * 256, "/".join(["y" * 190] * 25), "file/inside", "/proc/o"]


def test_commands_unwritable_output_is_refused_before_any_work(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2_pl.commands.support.trained_model.load", None)  # would be called
    (tmp_path / "file").touch()
    source = fake_run(tmp_path / "runs/full/version_0", "full", 1, [True, False])
    rows = tmp_path / "rows.txt"
    rows.write_text("a\n")
    before = sorted(tmp_path.rglob("*"))
    for place in LONG:
        for command in (
            ["classify", "x", "--input", rows, "--out", f"{place}.csv"],
            ["generate", "x", "--prompt_file", rows, "--out", f"{place}.txt"],
            ["export", "x", "--format", "hf", "--out", place],
            ["compare", source, "--out", place],
        ):
            assert "error: --out: " in refused(run, capsys, *command), (command[0], place[:20])
    assert sorted(tmp_path.rglob("*")) == before


def test_commands_overlong_run_path_is_refused(run, capsys, tmp_path):
    for place in LONG[:3]:
        for command in (["export", place, "--format", "hf", "--out", "o"], ["compare", place, "--out", "o"],
                        ["classify", place, "--input", "x.csv", "--out", "o.csv"]):  # fmt: skip
            assert place[:150] in refused(run, capsys, *command), (command[0], place[:20])
    assert not list(tmp_path.iterdir())


def test_fit_overlong_name_or_blocked_log_folder_is_refused(run, capsys, tmp_path):
    fit = ["fit", "--config", CONFIG / "quickstart.yaml"]
    assert "too long" in refused(run, capsys, *fit, f"--name={LONG[2]}")
    (tmp_path / "lightning_logs").touch()
    assert "lightning_logs: Not a directory" in refused(run, capsys, *fit)
    assert [path.name for path in tmp_path.iterdir()] == ["lightning_logs"]


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
