"""Two and four processes compared with one, and the end of a run when one of its processes dies."""

import contextlib
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
from conftest import ROOT, flags
from helpers import forked
from helpers.configs import CONFIGS, STRATEGIES

from gpt2_pl import GPT2, GPT2Config
from gpt2_pl.text.tokenizer import train_tokenizer

TASKS = ("imdb", "quora", "sonnets", "text", "data_to_text")
# What a strategy is of, where it is not of every task.
OF = {
    "hard_prompt": ("quora",), "verbalizer": ("quora",), "unlikelihood": ("sonnets", "text"), "ulmfit_lm": ("text",),
    "sequence_unlikelihood": ("sonnets", "text"), "dpo": ("sonnets", "text"),
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


# Four stages in two epochs of six steps, which begin within the epochs.
STAGES = """
model: {init_args: {pooling: concat, schedule: {class_path: gpt2_pl.optim.SlantedTriangular}}}
trainer:
  callbacks:
    - {class_path: gpt2_pl.callbacks.GradualUnfreezing, init_args: {blocks_per_stage: 1, epochs_per_stage: 0.4}}
    - {class_path: gpt2_pl.callbacks.DiscriminativeLR, init_args: {decay: 0.7}}
early_stopping_patience: null
"""
PAIRS = ["--model.dpo.prompt_tokens=10", "--model.dpo.max_new_tokens=10"]
SEQUENCES = ["--model.sequence_unlikelihood=0.5", "--model.sequence_prefix=20", "--model.sequence_length=20"]


@pytest.fixture
def differences(tmp_path, wide, files, pair_files, poem_files):
    """Run cases in one process and in several; return the differences of the cases that differ."""
    stages = tmp_path / "stages.yaml"
    stages.write_text(STAGES)
    data = {
        # the last batch of an epoch has a row for every process: what is smaller waits for the next epoch
        "imdb": [*flags(files), "--data.max_length=80", "--data.train_fraction=0.465"],
        "sst5_regression": [*flags(files), "--data.max_length=80", "--data.train_fraction=0.465"],
        "quora": [*flags(pair_files), "--data.max_length=80", "--data.train_fraction=0.465"],
        # nine poems of everything: four processes want a row each
        "sonnets": [
            *flags(dict.fromkeys(poem_files, poem_files["train"])),
            "--data.train_fraction=0.889",
            "--model.num_val_samples=1",
            "--model.max_new_tokens=5",
        ],
        "data_to_text": [
            *flags(files),
            "--data.template={sentence}\n{sentiment}",
            "--data.train_fraction=0.465",
            "--model.max_new_tokens=3",
        ],
        "text": [f"--data.{split}_file={files[split]}" for split in ("train", "val")]
        + ["--data.column=sentence", "--data.max_length=24"],
    }
    common = ["--trainer.precision=32-true", "--trainer.max_epochs=2", "--data.eval_batch_size=5",
              "--model.optimizer.init_args.lr=1e-4", f"--model.base={wide}"]  # fmt: skip

    def differences(cases, resume=False):
        lines = []
        for case, trainer, world in cases:
            task, _, strategy = case.partition("/")
            strategies = [stages if part == "stages" else f"{CONFIGS}/strategy/{part}.yaml"
                          for part in strategy.removesuffix("+sequences").split("+")]  # fmt: skip
            configs = [f"--config={file}" for file in (f"{CONFIGS}/task/{task}.yaml", *strategies)]
            arguments = [*configs, *common, *data[task], *(SEQUENCES if "+sequences" in strategy else []),
                         *(PAIRS if "dpo" in strategy else [])]  # fmt: skip
            lines.append(json.dumps({"name": case, "arguments": arguments, "trainer": trainer, "world": world,
                                     "resume": resume}))  # fmt: skip
        command = [ROOT / "tests/helpers/torchrun_equivalence.py", tmp_path / "runs"]
        done = forked.run(command, cwd=tmp_path, input="\n".join(lines), timeout=3000)
        assert done.returncode == 0, done.stderr[-3000:]
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert [(row["name"], row["trainer"], row["world"]) for row in found] == cases
        return {f"{row['name']} {row['trainer']}": row["wrong"] for row in found if row["wrong"]}

    return differences


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([("imdb/stages", "ddp", 2)], marks=pytest.mark.slow),
        [("quora/prefix_tuning+lora_embedding", "ddp", 4), ("imdb/stages+lora", "fsdp", 2)],
        pytest.param(
            [("sonnets/dpo+prefix_tuning", "ddp", 2), ("data_to_text/prefix_tuning+lora", "fsdp", 2)],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [
                ("quora/prefix_tuning+lora_embedding", "fsdp", 2),
                ("imdb/bitfit+ia3+adapter_houlsby", "ddp", 2),
                ("sst5_regression/lora", "ddp", 2),
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [("sonnets/unlikelihood+sequences", "ddp", 2), ("sonnets/unlikelihood+sequences", "fsdp", 2)],
            marks=pytest.mark.slow,
        ),
        pytest.param([("sonnets/dpo", "fsdp", 2)], marks=pytest.mark.slow),
    ],
    ids=["stages", "four processes", "pairs", "other strategies", "poems", "sharded pairs"],
)
def test_fit_several_processes_equal_one(cases, differences):
    assert differences(cases) == {}


def test_fit_sharded_run_resumes_in_two_processes_and_in_one(differences):
    assert differences([("quora/llrd", "fsdp", 2)], resume=True) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "trainer"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")])
def test_fit_every_strategy_on_every_task_distributed_equals_one_process(differences, world, trainer):
    assert differences([(case, trainer, world) for case in CASES]) == {}


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
    command = [ROOT / "cli.py", "fit", f"--config={CONFIGS}/quickstart.yaml", *ddp]
    first = forked.Forked(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    launcher, deadline = psutil.Process(first.pid), time.monotonic() + 120
    while not (ranks := launcher.children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)  # it has begun, and imports
    launcher.kill()
    _, alive = psutil.wait_procs(ranks, timeout=50)
    for rank in alive:
        rank.kill()
    assert not alive
    assert "gpt2-pl: error: the process that launched this one has ended" in first.communicate(10)[1]


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


def test_watch_launcher_ends_a_rank_with_its_launcher_and_no_other_process(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    launchers = {
        name: subprocess.Popen([sys.executable, tmp_path / "rank.py", "launcher", name], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env={**environment, "PYTHONPATH": str(ROOT)})
        for name in ("torchrun", "lightning", "none")
    }  # fmt: skip
    ranks = {name: psutil.Process(int(launcher.stdout.readline())) for name, launcher in launchers.items()}
    time.sleep(2.0)
    try:
        assert all(rank.is_running() for rank in ranks.values())
        for launcher in launchers.values():
            launcher.kill()
            launcher.wait()
        _, alive = psutil.wait_procs([ranks["torchrun"], ranks["lightning"]], timeout=20)
        assert not alive
        _, alive = psutil.wait_procs([ranks["none"]], timeout=2)
        assert alive
    finally:
        for rank in ranks.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()


def test_fit_rank_without_peers_times_out_with_one_line_error(tmp_path):
    """Use the timeout of the strategy, without a launcher that watches."""
    (tmp_path / "ddp.yaml").write_text(
        "trainer: {accelerator: cpu, devices: 2, enable_progress_bar: false, strategy: {class_path: "
        "lightning.pytorch.strategies.DDPStrategy, init_args: {timeout: '0:00:02'}}}"
    )
    command = [ROOT / "cli.py", "fit", f"--config={CONFIGS}/quickstart.yaml", "--config=ddp.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        forked.Forked(command, tmp_path, {**environment, "LOCAL_RANK": str(rank), "MASTER_PORT": str(free_port())})
        for rank in range(2)
    ]
    for process in processes:
        _, error = process.communicate(120)
        assert process.returncode == 1
        assert "Traceback" not in error
        assert error.splitlines()[-1].startswith("gpt2-pl: error: the other processes of this run did not connect: ")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
