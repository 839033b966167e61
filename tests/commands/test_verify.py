"""Repeating the first steps of a run."""

import json
import shutil

import pytest
import torch
from conftest import latest, metrics, process
from helpers.configs import CONFIGS
from helpers.refusals import refused
from helpers.stops import STOP, TINY

from gpt2_pl.callbacks.weight_digests import read_digests
from gpt2_pl.commands import main
from gpt2_pl.utils.digests import first_difference, tensor_digests


@pytest.fixture(scope="module")
def trained(fitted, base, files):
    """Run folder of LoRA on 97 reviews in 12 steps, two of which are in one gradient accumulation window."""
    flags = [f"--data.{split}_file={path}" for split, path in files.items()]
    return fitted(
        "fit", f"--config={CONFIGS}/task/imdb.yaml", f"--config={CONFIGS}/strategy/lora.yaml", f"--model.base={base}",
        *flags, "--data.batch_size=8", "--data.max_length=48", "--trainer.max_epochs=2",
        "--trainer.accumulate_grad_batches=2", "--early_stopping_patience=null",
    )  # fmt: skip


@pytest.fixture
def copied(trained, tmp_path, monkeypatch):
    """Copy of the run folder, which a test may change."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, tmp_path / "run")


def failed(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *map(str, args)])
    assert stopped.value.code == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_verify_unchanged_run_is_bitwise_equal(copied, capsys):
    main(["verify", str(copied), "--steps", "all"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "best.ckpt, last.ckpt: all weights equal their digests"
    assert lines[-1].endswith("bitwise equal after steps 1, 2, 5, 10 (10 weights)")
    assert len(lines) == 2, "nothing else has changed"


def test_weight_digests_after_all_steps_are_those_of_last_checkpoint(copied):
    """One epoch of 97 rows in batches of 8 has 13 batches, and 7 steps; the last of the run is step 14."""
    last = torch.load(copied / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["digests"] == tensor_digests(last["state_dict"])
    recorded = read_digests(copied)[0]
    assert list(recorded) == [1, 2, 5, 10]
    assert last["global_step"] == 14
    assert recorded[1].keys() == last["state_dict"].keys()
    assert recorded[10] != last["digests"]


@pytest.mark.parametrize("name", ["best", "last"])
def test_verify_checkpoint_with_one_changed_digit_names_the_weight(copied, capsys, name):
    file = copied / "checkpoints" / f"{name}.ckpt"
    content = torch.load(file, weights_only=True)
    weight = content["state_dict"]["gpt2.h.1.mlp.c_fc.lora_A"]
    weight.view(-1)[3] = torch.nextafter(weight.view(-1)[3], torch.tensor(9.0))
    torch.save(content, file)
    line = failed(capsys, copied)
    assert f"{name}.ckpt" in line
    assert "gpt2.h.1.mlp.c_fc.lora_A is the first of 1 weights" in line


def test_verify_changed_row_and_base_are_named_with_first_step(copied, capsys, files, base, tmp_path):
    from safetensors.torch import load_file, save_file

    rows = files["train"].read_text().splitlines()
    rows[1:] = [row.replace("a", "e", 1) for row in rows[1:]]
    changed_rows = tmp_path / "train.csv"
    changed_rows.write_text("\n".join(rows) + "\n")
    changed_base = shutil.copytree(base, tmp_path / "base")
    state = load_file(changed_base / "model.safetensors")
    next(weight for name, weight in state.items() if name.endswith("h.0.mlp.c_fc.weight"))[0, 0] += 0.5
    save_file(state, changed_base / "model.safetensors", {"format": "pt"})
    config = copied / "config.yaml"
    original = config.read_text()
    for old, new, key in (
        (str(files["train"]), str(changed_rows), "data.digests.train"),
        (f"base: {base}", f"base: {changed_base}", "base.digest"),
    ):
        assert old in original
        config.write_text(original.replace(old, new))
        with pytest.raises(SystemExit):
            main(["verify", str(copied)])
        streams = capsys.readouterr()
        assert f"changed: {key}: " in streams.out
        assert "step 1: gpt2.h.0.attn.c_attn.lora_" in streams.err.splitlines()[-1], "the earliest step and tensor"


def test_verify_changed_record_names_step(copied, capsys):
    file = copied / "weight_digests.json"
    content = json.loads(file.read_text())
    content["steps"]["5"]["gpt2.h.0.mlp.c_fc.lora_B"] = "0" * 16
    file.write_text(json.dumps(content))
    assert "step 5: gpt2.h.0.mlp.c_fc.lora_B is the first of 1 weights (of 10)" in failed(capsys, copied)
    main(["verify", str(copied), "--steps", "2"])


def test_verify_invalid_steps_or_record_is_refused(copied, capsys, run):
    for steps in ("0", "-1", "some", "1.5", ""):
        assert refused(run, capsys, "verify", copied, f"--steps={steps}").key == "steps"
    file = copied / "weight_digests.json"
    for content, key in (("[]", "steps"), ('{"steps": {"01": {}}}', "steps"), ('{"steps": {"1": 2}}', "steps")):
        file.write_text(content)
        assert "weight_digests.json" in refused(run, capsys, "verify", copied), (content, key)
    file.unlink()
    assert "no weight_digests.json" in refused(run, capsys, "verify", copied)


@pytest.mark.slow
def test_verify_two_processes_is_bitwise_equal(tmp_path, base, data_flags):
    flags = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=3"]
    task = [f"--config={CONFIGS}/task/imdb.yaml", f"--model.base={base}", "--early_stopping_patience=null"]
    flags += ["--data.max_length=48", "--data.batch_size=4"]
    assert process(tmp_path, "fit", *task, *data_flags, *flags).returncode == 0
    folder = latest(tmp_path)
    assert metrics(folder)["processes"] == 2
    done = process(tmp_path, "verify", folder)
    assert done.returncode == 0, done.stderr
    assert "bitwise equal after steps 1, 2" in done.stdout


def test_weight_digests_resumed_run_continues_the_record(run):
    whole, _ = read_digests(run(*TINY))
    folder = run(*TINY, STOP)
    assert list(read_digests(folder)[0]) == [1, 2]
    last = folder / "checkpoints" / "last.ckpt"
    run("fit", f"--config={folder}/config.yaml", f"--ckpt_path={last}", "--trainer.callbacks=null")
    assert list(whole) == [1, 2, 5, 10]
    assert read_digests(folder)[0] == whole
    main(["verify", str(folder)])


def test_weight_digests_extended_run_has_no_record(run, capsys, base, data_flags):
    """The schedule of the longer run differs from that of the first steps, so that repeating them proves nothing."""
    settings = [f"--config={CONFIGS}/task/imdb.yaml", f"--model.base={base}", *data_flags, "--data.batch_size=16"]
    fit = ["fit", *settings, "--data.max_length=48", "--early_stopping_patience=null"]
    folder = run(*fit, "--trainer.max_epochs=1")
    last = folder / "checkpoints" / "last.ckpt"
    run("fit", f"--config={folder}/config.yaml", f"--ckpt_path={last}", "--trainer.max_epochs=2")
    assert not (folder / "weight_digests.json").exists()
    assert "extended" in refused(run, capsys, "verify", folder)


def test_first_difference_missing_names_differ():
    assert first_difference({"a": "1", "b": "2"}, {"b": "2", "a": "1"}) is None
    assert first_difference({"a": "1", "b": "2"}, {"a": "1"}) == ("b", 1)
    assert first_difference({"a": "1"}, {"c": "0", "a": "2"}) == ("a", 2)


def test_tensor_digests_depend_on_type_shape_and_every_bit():
    one = torch.tensor([[0.0, 1.0]])
    digest = tensor_digests({"x": one})["x"]
    assert tensor_digests({"x": one.clone()})["x"] == digest
    assert tensor_digests({"x": one.t().contiguous().t()})["x"] == digest, "values, not memory"
    for other in (one.view(2), one.double(), torch.tensor([[-0.0, 1.0]])):
        assert tensor_digests({"x": other})["x"] != digest
