"""A program that fits the same model in one process and in several, and says in what they differ.

    python torchrun_equivalence.py FOLDER < CASES

A case is a line of JSON: a name, arguments of ``gpt2-pl fit`` without the batch size, a trainer configuration and the
number of processes. With ``resume`` the run of several processes is stopped after its first epoch and resumed by as
many processes and by one. The processes are started as torchrun starts them, but forked from this one, which has
imported everything: that costs a second in place of ten. There is no dropout, whose masks differ. It prints a line of
JSON for each case.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

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


def account(folder: Path) -> dict[str, Any]:
    """The metrics.json of the run in a folder."""
    (file,) = folder.glob("lightning_logs/*/*/metrics.json")
    return json.loads(file.read_text())


def differences(alone: Path, shared: Path, world: int) -> list[str]:
    """In what one process and several differ: the ranks' weights bit by bit, the rest to rounding."""
    one = torch.load(alone / "rank_0.pt", weights_only=True)
    ranks = [torch.load(shared / f"rank_{n}.pt", weights_only=True) for n in range(world)]
    found = [
        f"rank {n}: {name}"
        for n, state in enumerate(ranks)
        for name in state
        if not torch.equal(state[name], ranks[0][name])
    ]
    found += sorted(one.keys() ^ ranks[0].keys())
    for name in one.keys() & ranks[0].keys():
        if not torch.allclose(one[name].float(), ranks[0][name].float(), atol=2e-5, rtol=0):
            found.append(f"{name}: {(one[name] - ranks[0][name]).abs().max().item():.1e}")
    ours, theirs = account(alone), account(shared)
    exact = ("accuracy", "f1", "precision", "recall")
    for place, a, b in (
        ("scores", ours["scores"], theirs["scores"]),
        ("last epoch", ours["epochs"][-1], theirs["epochs"][-1]),
    ):
        found += [f"{place}: {name} is missing" for name in a.keys() ^ b.keys()]
        for name in a.keys() & b.keys():
            if abs(a[name] - b[name]) > (0.0 if name.endswith(exact) else 1e-4 * max(1.0, abs(a[name]))):
                found.append(f"{place}: {name}: {a[name]} / {b[name]}")
    if ours["parameters"] != theirs["parameters"]:
        found.append(f"parameters: {ours['parameters']} / {theirs['parameters']}")
    rows = [
        {
            path.name: [line.split(",")[0] for line in path.read_text().splitlines()]
            for path in folder.glob("lightning_logs/*/*/predictions_*.csv")
        }
        for folder in (alone, shared)
    ]
    return found + ([] if rows[0] == rows[1] else ["rows of predictions"])


if __name__ == "__main__":
    place = Path(sys.argv[1])
    torch.set_num_threads(1)
    assert SentimentClassifier  # everything is imported before the first fork
    for module in (gpt2_pl.kernels.attention, gpt2_pl.heads, gpt2_pl.model):
        module.dropout = lambda x, p=0.0, training=True: x
    gpt2_pl.surgery.lora.dropout_unscaled = lambda x, p, training: (x, 1.0)
    gpt2_pl.model.dropout_add = lambda x, residual, p, training: residual + x
    for line in sys.stdin:
        case = json.loads(line)
        folder = place / case["name"].replace("/", "_")
        arguments, strategy, world = case["arguments"], case["trainer"], case["world"]
        try:
            if not (folder / "1").exists():
                fit(folder / "1", arguments, 1, strategy)
            several = folder / f"{strategy}_{world}"
            first = ["--trainer.max_time=00:00:00:00", "--trainer.min_epochs=1"] if case["resume"] else []
            fit(several, [*arguments, *first], world, strategy)
            if case["resume"]:
                (checkpoint,) = several.glob("lightning_logs/*/*/checkpoints/last.ckpt")
                wrong = []
                for name, n in (("resumed", world), ("resumed alone", 1)):
                    fit(folder / name, [*arguments, f"--ckpt_path={checkpoint}"], n, strategy)
                    wrong += [f"{name}: {part}" for part in differences(folder / "1", folder / name, n)]
            else:
                wrong = differences(folder / "1", several, world)
        except (RuntimeError, ValueError, OSError) as error:
            wrong = [str(error)]
        print(json.dumps({**case, "wrong": wrong}), flush=True)
