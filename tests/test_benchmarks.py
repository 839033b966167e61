"""The benchmark of a GPU: its driver, and the parts in a short trial on the CPU."""

import argparse
import json
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

FAKE_PART = """
import json, subprocess, sys, time
part, folder = sys.argv[sys.argv.index("--part") + 1], sys.argv[sys.argv.index("--out") + 1]
with open(f"{folder}/figures.jsonl", "a") as lines:
    for value in (3.0, 1.0, 2.0):
        lines.write(json.dumps({"part": part, "arm": "ours", "figures": {"ms": value}}) + "\\n")
if part == "tests":
    raise SystemExit(3)
if part == "lora":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(f"{folder}/child", "w").write(str(child.pid))
    child.wait()
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def read(folder):
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]


def ends(pid, seconds):
    """Return whether a process that was killed ends within some seconds; one that nobody waits for is a zombie."""
    end = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_driver_keeps_figures_of_parts_that_fail_or_take_too_long(gpu, tmp_path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    script.write_text(FAKE_PART)
    monkeypatch.setattr(gpu, "__file__", str(script))
    parts = ["machine", "tests", "lora"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", f"--out={tmp_path}", "--limit=4", "--parts", *parts])
    gpu.main()
    status = {line["part"]: line["status"] for line in read(tmp_path) if "status" in line}
    assert status == {"machine": "done", "tests": "failed, see tests.log", "lora": "stopped after 4 s"}
    child = int((tmp_path / "child").read_text())
    assert ends(child, seconds=20)
    table = capsys.readouterr().out
    assert all(f"| {part} | ours | ms | 2 | 3 |" in table for part in parts)  # medians
    monkeypatch.setattr(sys, "argv", ["gpu.py", f"--out={tmp_path}", "--total=0", "--parts", "machine"])
    gpu.main()
    assert [line["status"] for line in read(tmp_path)] == ["skipped: no time is left"]


def test_finetuning_part_measures_arms_in_turn_on_the_cpu(gpu, tmp_path):
    import gpu_training

    settings = {"device": "cpu", "tiny": True, "ours": True, "rounds": 2, "out": tmp_path, "part": "finetuning"}
    gpu_training.finetuning(argparse.Namespace(**settings))
    lines = read(tmp_path)
    assert not any("error" in line for line in lines)
    rounds = [(line["arm"], line["round"]) for line in lines if "round" in line]
    assert rounds == [(arm, i) for i in (0, 1) for arm in ("ours", "ours, no CUDA graphs")]
    figures = [line["figures"] for line in lines if "round" in line]
    assert all(f["ms a step"] > 0 and f["examples/s"] == pytest.approx(8000 / f["ms a step"]) for f in figures)


def test_arm_that_fails_is_left_out_and_the_others_go_on(gpu, tmp_path):
    from gpu_arms import Report

    def broken():
        raise ValueError("no such kernel")

    report = Report(argparse.Namespace(device="cpu", rounds=2, out=tmp_path, part="kernels"))
    report.in_turn({"bad": lambda: broken, "good": lambda: lambda: {"ms": 1.0}})
    lines = [line for line in read(tmp_path) if "start, s" not in line.get("figures", {})]
    assert [line["arm"] for line in lines] == ["bad", "good", "good"]
    assert lines[0]["error"] == "ValueError: no such kernel"


@pytest.mark.slow
def test_all_parts_run_on_the_cpu(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device=cpu", "--tiny", "--rounds=1", "--limit=300"]
    parts = ["machine", "finetuning", "profile", "generation", "language_model", "lora", "processes", "kernels"]
    subprocess.run([*command, f"--out={tmp_path}", "--total=3000", "--parts", *parts], check=True)
    lines = read(tmp_path)
    assert [line["part"] for line in lines if line.get("status") == "done"] == parts
    errors = [line for line in lines if "error" in line]
    assert all("attention" in line["arm"] for line in errors), errors  # back ends of GPUs
    assert [line["figures"]["bitwise equal"] for line in lines if "bitwise equal" in line.get("figures", {})] == [
        1.0
    ] * 4
