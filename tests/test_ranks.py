"""Two and four processes against one: strategies on tasks; and what happens when one of them dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, flags
from test_cli import STRATEGIES

from gpt2_pl import GPT2, GPT2Config
from gpt2_pl.tokenizer import train_tokenizer

CONFIGS = ROOT / "configs"
TASKS = ("imdb", "quora", "sonnets", "text")
# What a strategy is of, where it is not of every task.
OF = {
    "prompt_words": ("quora",), "verbaliser": ("quora",), "unlikelihood": ("sonnets", "text"), "ulmfit_lm": ("text",),
    "sequence_unlikelihood": ("sonnets", "text"),
    **dict.fromkeys(("mean_masks", "mix_masks", "ulmfit", "linear_probe"), ("imdb", "quora")),
}  # fmt: skip
NAMES = [path.stem for path in STRATEGIES]
HYBRIDS = ["lora+llrd", "prefix+lora", "ulmfit+lora", "prompt_words+lora_ffn", "prefix+unlikelihood"]
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
    """In what one process and ``world`` differ, of the cases that do."""
    data = {
        # the last batch of an epoch has a row for every process: what is smaller waits for the next epoch
        "imdb": [*flags(files), "--data.max_length=80", "--data.train_fraction=0.9"],
        "quora": [*flags(pair_files), "--data.max_length=80", "--data.train_fraction=0.9"],
        # nine poems of everything: four processes want a row each
        "sonnets": [
            *flags(dict.fromkeys(poem_files, poem_files["train"])),
            "--data.train_fraction=0.889",
            "--model.n_shown=1",
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
        command = [sys.executable, str(ROOT / "tests/ranks.py"), str(tmp_path / "runs"), str(world), trainer]
        done = subprocess.run(command, input="\n".join(lines), env={**os.environ, "PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True, timeout=3000, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found = {row["name"]: row["wrong"] for row in map(json.loads, done.stdout.splitlines())}
        assert list(found) == list(cases)
        return {name: wrong for name, wrong in found.items() if wrong}

    return differences


def test_two_processes_equal_one(differences):
    cases = ["imdb/full", "imdb/ulmfit", "imdb/lora_embedding", "imdb/prefix", "sonnets/unlikelihood", "text/ulmfit_lm",
             "quora/prompt_words", "quora/linear_probe"]  # fmt: skip
    assert differences(cases, 2) == {}


def test_four_processes_equal_one(differences):
    assert differences(["quora/lora_ffn", "imdb/full"], 4) == {}


def test_two_processes_that_share_the_weights_equal_one(differences):
    cases = [
        "imdb/full",
        "imdb/ulmfit+lora",
        "quora/lora_embedding",
        "imdb/prefix",
        "sonnets/unlikelihood",
        "text/ulmfit_lm",
    ]
    assert differences(cases, 2, "fsdp") == {}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "trainer"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")])
def test_every_strategy_on_every_task_equals_one_process(differences, world, trainer):
    assert differences(CASES, world, trainer) == {}


def test_a_rank_that_dies_ends_the_others(tmp_path):
    ddp = [f"--config={CONFIGS}/trainer/ddp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    settings = ["--trainer.max_epochs=500", "--trainer.enable_progress_bar=false"]
    command = [sys.executable, str(ROOT / "cli.py"), "fit", f"--config={CONFIGS}/quickstart.yaml", *ddp, *settings]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)  # fmt: skip
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
