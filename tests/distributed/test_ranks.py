"""Two and four processes compared with one, and the end of a run when one of its processes dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, flags, process
from helpers import forked
from helpers.configs import CONFIGS, STRATEGIES

from gpt2_pl import GPT2, GPT2Config
from gpt2_pl.text.tokenizer import train_tokenizer

TASKS = ("imdb", "quora", "sonnets", "text")
# What a strategy is of, where it is not of every task.
OF = {
    "hard_prompt": ("quora",), "verbalizer": ("quora",), "unlikelihood": ("sonnets", "text"), "ulmfit_lm": ("text",),
    "sequence_unlikelihood": ("sonnets", "text"),
    **dict.fromkeys(("multi_sample_dropout", "mixed_pooling", "ulmfit", "linear_probe"), ("imdb", "quora")),
}  # fmt: skip
NAMES = [path.stem for path in STRATEGIES]
HYBRIDS = ["lora+llrd", "prefix_tuning+lora", "ulmfit+lora", "hard_prompt+lora_ffn", "prefix_tuning+unlikelihood"]
CASES = [
    f"{task}/{name}"
    for name in (*NAMES, *HYBRIDS)
    for task in TASKS
    if all(task in OF.get(part, TASKS) for part in name.split("+"))
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A small GPT-2 with room for poems."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    GPT2(GPT2Config(vocab_size=300, n_positions=512, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    texts = [
        "Sentence1: the plot is wonderful, Sentence2: not at all boring → Are they paraphrases? yes no yes no\n"
    ] * 50
    train_tokenizer(texts, 300).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def differences(tmp_path, wide, files, pair_files, poem_files):
    """Run cases in one and in ``world`` processes; return the differences of the cases that differ."""
    data = {
        # the last batch of an epoch has a row for every process: what is smaller waits for the next epoch
        "imdb": [*flags(files), "--data.max_length=80", "--data.train_fraction=0.9"],
        "quora": [*flags(pair_files), "--data.max_length=80", "--data.train_fraction=0.9"],
        # nine poems of everything: four processes want a row each
        "sonnets": [
            *flags(dict.fromkeys(poem_files, poem_files["train"])),
            "--data.train_fraction=0.889",
            "--model.num_val_samples=1",
            "--model.max_new_tokens=5",
        ],
        "text": [f"--data.{split}_file={files[split]}" for split in ("train", "val")]
        + ["--data.column=sentence", "--data.max_length=24"],
    }
    common = ["--trainer.precision=32-true", "--trainer.max_epochs=2", "--data.eval_batch_size=5",
              "--model.optimizer.init_args.lr=1e-4", f"--model.base={wide}"]  # fmt: skip

    def differences(cases, world, trainer="ddp"):
        lines = []
        for case in cases:
            task, _, strategy = case.partition("/")
            names = [f"task/{task}", *(f"strategy/{part}" for part in strategy.split("+"))]
            arguments = [*(f"--config={CONFIGS}/{name}.yaml" for name in names), *common, *data[task]]
            lines.append(json.dumps({"name": case, "arguments": arguments}))
        command = [ROOT / "tests/helpers/torchrun_equivalence.py", tmp_path / "runs", world, trainer]
        done = forked.run(command, cwd=tmp_path, input="\n".join(lines), timeout=3000)
        assert done.returncode == 0, done.stderr[-3000:]
        found = {row["name"]: row["wrong"] for row in map(json.loads, done.stdout.splitlines())}
        assert list(found) == list(cases)
        return {name: wrong for name, wrong in found.items() if wrong}

    return differences


def test_fit_ddp_two_processes_equals_one(differences):
    cases = ["imdb/ulmfit", "imdb/lora_embedding", "imdb/prefix_tuning", "sonnets/unlikelihood", "quora/linear_probe"]
    assert differences(cases, 2) == {}


def test_fit_ddp_four_processes_equals_one(differences):
    assert differences(["quora/lora_ffn"], 4) == {}


def test_fit_fsdp_two_processes_equals_one(differences):
    cases = ["imdb/ulmfit+lora", "quora/lora_embedding", "imdb/prefix_tuning", "sonnets/unlikelihood"]
    assert differences(cases, 2, "fsdp") == {}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "trainer"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")])
def test_fit_every_strategy_on_every_task_distributed_equals_one_process(differences, world, trainer):
    assert differences(CASES, world, trainer) == {}


def test_fit_killed_rank_ends_other_processes(tmp_path):
    ddp = [f"--config={CONFIGS}/trainer/ddp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    settings = ["--trainer.max_epochs=500", "--trainer.enable_progress_bar=false"]
    command = [ROOT / "cli.py", "fit", f"--config={CONFIGS}/quickstart.yaml", *ddp, *settings]
    process = forked.Forked(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    account = tmp_path / "lightning_logs/quickstart/version_0/metrics.json"
    deadline = time.monotonic() + 120
    while not account.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    listed = subprocess.run(["ps", "-o", "pid,ppid,args", "-A"], capture_output=True, text=True, check=True).stdout
    (other,) = re.findall(rf"^ *(\d+) +{process.pid} .*cli.py fit", listed, flags=re.M)
    os.kill(int(other), signal.SIGKILL)
    since = time.monotonic()
    _, error = process.communicate(timeout=90)
    assert time.monotonic() - since < 60
    assert process.returncode != 0
    assert error.splitlines()[-1].startswith("gpt2-pl: error: another process of this run has ended")
    assert "Traceback" not in error


def test_fit_rank_with_launcher_killed_before_rendezvous_ends(tmp_path):
    """Kill the first process, for which the second would otherwise wait half an hour."""
    ddp = [f"--config={CONFIGS}/trainer/ddp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    command = [sys.executable, str(ROOT / "cli.py"), "fit", f"--config={CONFIGS}/quickstart.yaml", *ddp]
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log,
                                 env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
        deadline = time.monotonic() + 120
        while not (ranks := psutil.Process(first.pid).children()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.0)  # it has begun, and imports
        first.kill()
        first.wait()
    _, alive = psutil.wait_procs(ranks, timeout=50)
    for rank in alive:
        rank.kill()
    assert not alive
    assert "gpt2-pl: error: the process that launched this one has ended" in (tmp_path / "log").read_text()


RANK = """
import os, subprocess, sys, time
from gpt2_pl.commands.support.process import LAUNCHER, watch_launcher
if sys.argv[1] == "launcher":
    names = {"torchrun": {"TORCHELASTIC_RUN_ID": "x"}, "lightning": {LAUNCHER: str(os.getpid())}, "none": {}}
    environment = {**os.environ, "LOCAL_RANK": "1", **names[sys.argv[2]]}
    rank = subprocess.Popen([sys.executable, __file__, "rank"], env=environment)
    print(rank.pid, flush=True)
else:
    watch_launcher()
time.sleep(60)
"""


@pytest.mark.parametrize("launcher", ["torchrun", "lightning", "none"])
def test_watch_launcher_ends_a_rank_with_its_launcher_and_no_other_process(launcher, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    process = subprocess.Popen([sys.executable, tmp_path / "rank.py", "launcher", launcher], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env={**environment, "PYTHONPATH": str(ROOT)})  # fmt: skip
    rank = psutil.Process(int(process.stdout.readline()))
    time.sleep(2.0)
    assert rank.is_running()
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs([rank], timeout=3 if launcher == "none" else 20)
    for left in alive:
        left.kill()
    assert bool(alive) == (launcher == "none")


@pytest.mark.parametrize("rank", [0, 1])
def test_fit_rank_without_peers_times_out_with_one_line_error(rank, tmp_path, free_port):
    """Use the timeout of the strategy, without a launcher that watches."""
    (tmp_path / "ddp.yaml").write_text(
        "trainer: {accelerator: cpu, devices: 2, enable_progress_bar: false, strategy: {class_path: "
        "lightning.pytorch.strategies.DDPStrategy, init_args: {timeout: '0:00:04'}}}"
    )
    environment = {
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port),
    }
    done = process(tmp_path, "fit", f"--config={CONFIGS}/quickstart.yaml", "--config=ddp.yaml", **environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("gpt2-pl: error: the other processes of this run did not connect: ")


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
