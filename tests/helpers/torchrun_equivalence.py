"""A program that fits the same model in one process and in several, and says in what they differ.

    python ranks.py FOLDER N TRAINER < CASES

A case is a line of JSON: a name and arguments of ``gpt2-pl fit`` without the batch size. The processes are started as
torchrun starts them, but forked from this one, which has imported everything: that costs a second in place of ten.
There is no dropout, whose masks differ. It prints a line of JSON for each case.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import gpt2_pl.heads
import gpt2_pl.kernels.attention
import gpt2_pl.model
import gpt2_pl.surgery.lora
from gpt2_pl.commands import main
from gpt2_pl.commands.lightning_cli import GPT2CLI
from gpt2_pl.tasks import SentimentClassifier

ROOT = Path(__file__).parents[2]
GLOBAL_BATCH = 8


def rank(folder: Path, arguments: list[str], world: int, number: int, port: int, strategy: str) -> int:
    """Fork a process that fits as rank ``number`` of ``world``; gives its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.chdir(folder)
        with open(folder / f"log_{number}", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        flags = [f"--data.batch_size={GLOBAL_BATCH // world}", "--trainer.accelerator=cpu"]
        if world > 1:
            os.environ.update(
                RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
            )  # fmt: skip
            arguments = [*arguments, f"--config={ROOT}/configs/trainer/{strategy}.yaml"]
            flags += [f"--trainer.devices={world}"]
        after_fit = GPT2CLI.after_fit

        def keep(cli: GPT2CLI) -> None:
            whole = get_model_state_dict(cli.model, options=StateDictOptions(full_state_dict=True))
            torch.save(whole or cli.model.state_dict(), folder / f"rank_{number}.pt")
            after_fit(cli)

        GPT2CLI.after_fit = keep
        main(["fit", *arguments, *flags, "--trainer.enable_progress_bar=false"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def fit(folder: Path, arguments: list[str], world: int, strategy: str) -> None:
    """Fit with this many processes."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [rank(folder, arguments, world, number, port, strategy) for number in range(world)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
    if any(statuses):
        logs = "\n".join((folder / f"log_{number}").read_text()[-1500:] for number in range(world))
        raise RuntimeError(f"the processes ended with {statuses}: {logs}")


def scores(folder: Path) -> dict[str, float]:
    """The final scores of the run in a folder."""
    (file,) = folder.glob("lightning_logs/*/*/metrics.json")
    return json.loads(file.read_text())["scores"]


def differences(folder: Path, world: int) -> list[str]:
    """In what one process and several differ: the ranks' weights bit by bit, the rest to rounding."""
    one = torch.load(folder / "1/rank_0.pt", weights_only=True)
    ranks = [torch.load(folder / f"{world}/rank_{n}.pt", weights_only=True) for n in range(world)]
    found = [
        f"rank {n}: {name}"
        for n, state in enumerate(ranks)
        for name in state
        if not torch.equal(state[name], ranks[0][name])
    ]
    for name in one:
        if not torch.allclose(one[name].float(), ranks[0][name].float(), atol=2e-5, rtol=0):
            found.append(f"{name}: {(one[name] - ranks[0][name]).abs().max().item():.1e}")
    ours, theirs = scores(folder / "1"), scores(folder / str(world))
    exact = ("accuracy", "f1", "precision", "recall")
    for name in ours:
        apart = abs(ours[name] - theirs[name])
        if apart > (0.0 if name.endswith(exact) else 1e-4 * max(1.0, abs(ours[name]))):
            found.append(f"{name}: {ours[name]} / {theirs[name]}")
    return found


if __name__ == "__main__":
    place, world, strategy = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    assert SentimentClassifier  # everything is imported before the first fork
    for module in (gpt2_pl.kernels.attention, gpt2_pl.heads, gpt2_pl.model):
        module.dropout = lambda x, p=0.0, training=True: x
    gpt2_pl.surgery.lora.dropout_unscaled = lambda x, p, training: (x, 1.0)
    gpt2_pl.model.dropout_add = lambda x, residual, p, training: residual + x
    for line in sys.stdin:
        case = json.loads(line)
        folder = place / case["name"].replace("/", "_")
        try:
            for n in (1, world):
                fit(folder / str(n), case["arguments"], n, strategy)
            wrong = differences(folder, world)
        except (RuntimeError, ValueError, OSError) as error:
            wrong = [str(error)]
        print(json.dumps({"name": case["name"], "wrong": wrong}), flush=True)
