"""The gradient of every optimizer step of a fit, beside that of one batch of all its rows on one process.

    python accumulated.py FOLDER < CASES

fits in two processes, forked from this one. A case is a line of JSON: the arguments of :func:`fit`. For each a line of
JSON says by how much the gradients of the steps differ, as :func:`differences` does.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from gpt2_pl import GPT2Config
from gpt2_pl.callbacks import NonFiniteLossGuard
from gpt2_pl.datamodules import IMDB, Sonnets, TextCorpus, TextRegression
from gpt2_pl.losses import IGNORE_INDEX
from gpt2_pl.tasks import LanguageModel, PoemGenerator, SentimentClassifier, Task, TextRegressor
from gpt2_pl.tasks.fsdp import FSDP2Strategy

V = 400
SHAPE = GPT2Config(vocab_size=V, n_positions=512, n_embd=24, n_layer=2, n_head=2, dropout=0.0)
Batch = dict[str, Any]


class Recorder(torch.optim.SGD):
    """Changes nothing, and shows every step's gradient, as it is after clipping, to a :class:`Steps`."""

    steps: Steps

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=0.0)

    def step(self, closure: Any = None) -> Any:  # a gradient scaler gives none
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.steps.end()
        return loss


class Steps(Callback):
    """The gradient of every step and the batches that it is of.

    Args:
        poisoned: numbers, from 0, of the batches whose loss becomes NaN, on the last process alone.
    """

    def __init__(self, poisoned: list[int]) -> None:
        self.poisoned, self.seen = poisoned, 0
        self.batches: list[Batch] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.of: list[list[Batch]] = []
        self.left_out: list[bool] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.manual_seed(0)  # the model is built next

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.optimizers[0].steps = self  # type: ignore[attr-defined]
        self.module = pl_module

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.left_out.append(self.seen in self.poisoned)
        if self.left_out[-1]:
            if trainer.global_rank == trainer.world_size - 1:
                pl_module.poison = True  # type: ignore[assignment]
        else:
            self.batches.append(dict(batch))
        self.seen += 1

    def end(self) -> None:
        def whole(grad: Any) -> Tensor:
            return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()

        named = self.module.named_parameters()
        self.gradients.append({name: whole(p.grad) for name, p in named if p.grad is not None})
        self.of.append(self.batches)
        self.batches = []


def poisonable(kind: type[Task]) -> type[Task]:
    """A task whose next loss is NaN once it is told so."""

    class Poisonable(kind):  # type: ignore[valid-type,misc]
        poison = False

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.poison:
                self.poison = False
                return loss * torch.nan
            return loss

    return Poisonable


def make(task: str, **options: Any) -> Task:
    """A task of one of the kinds ``classifier``, ``regressor``, ``text``, ``poems``."""
    kinds: dict[str, type[Task]] = {"classifier": SentimentClassifier, "regressor": TextRegressor,
                                    "text": LanguageModel, "poems": PoemGenerator}  # fmt: skip
    if task == "classifier":
        options["num_classes"] = 2
    return poisonable(kinds[task])(config=SHAPE, optimizer=Recorder, **options)  # type: ignore[arg-type]


def foreign(task: str, sizes: list[list[int]], rank: int, world: int) -> DataLoader[Any]:
    """Batches that state no counts, on process ``rank``: of each, the numbers of tokens of its rows."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for lengths in sizes:
        T = max(lengths)
        ids = torch.randint(V, (len(lengths), T + 1), generator=generator)
        mask = (torch.arange(T) < torch.tensor(lengths).unsqueeze(1)).long()
        batch = {"input_ids": ids[:, :-1] * mask, "attention_mask": mask}
        if task in ("classifier", "regressor"):
            batch["labels"] = torch.randint(2, (len(lengths),), generator=generator)
        else:
            batch["targets"] = ids[:, 1:].masked_fill(mask == 0, IGNORE_INDEX)
        batches.append(batch)
    return DataLoader(batches[rank::world], batch_size=None)  # type: ignore[arg-type]


def fit(
    task: str,
    data: dict[str, Any] | list[list[int]],
    accumulate: int | dict[str, int],
    *,
    options: dict[str, Any] | None = None,
    poisoned: list[int] | None = None,
    strategy: str = "auto",
    world: int = 1,
    rank: int = 0,
    ckpt_path: str | None = None,
    callbacks: list[Callback] | None = None,
    **settings: Any,
) -> Steps:
    """Fit, and record the gradients of all steps.

    Args:
        task: as in :func:`make`.
        data: arguments of the task's datamodule, or batches as in :func:`foreign`.
        accumulate: batches of a step, or a number for every epoch.
        options: of the task.
        poisoned: as in :class:`Steps`.
        strategy: ``fsdp``, or a name of Lightning's.
        world: processes.
        rank: which of them this is.
        ckpt_path: a checkpoint to go on from.
        callbacks: others.
        **settings: of the trainer.
    """
    warnings.filterwarnings("ignore")
    steps = Steps(poisoned or [])
    others: list[Callback] = [steps, NonFiniteLossGuard("skip"), *(callbacks or [])]
    if isinstance(accumulate, dict):
        others.append(GradientAccumulationScheduler({int(epoch): n for epoch, n in accumulate.items()}))
    else:
        settings["accumulate_grad_batches"] = accumulate
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "use_distributed_sampler"), False)
    if settings.get("precision") == "16-mixed":  # Lightning would take bfloat16 on a CPU
        del settings["precision"]
        settings.update(precision=None, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    trainer = Trainer(**{
        "accelerator": "cpu", "devices": world, "strategy": FSDP2Strategy() if strategy == "fsdp" else strategy,
        "max_epochs": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_checkpointing": False,
        "precision": "32-true", "callbacks": others, **quiet, **settings,
    })  # fmt: skip
    module = make(task, **(options or {}))
    if isinstance(data, list):
        trainer.fit(module, foreign(task, data, rank, world), ckpt_path=ckpt_path)
    else:
        kinds: dict[str, Any] = {"classifier": IMDB, "regressor": TextRegression, "text": TextCorpus, "poems": Sonnets}
        trainer.fit(module, datamodule=kinds[task](**data), ckpt_path=ckpt_path, weights_only=True)
    return steps


def joined(batches: list[Batch]) -> Batch:
    """One batch of the rows of all, padded on the right."""
    T = max(batch["input_ids"].size(1) for batch in batches)
    filler = {"targets": IGNORE_INDEX}
    return {
        key: torch.cat([
            F.pad(batch[key], (0, T - batch[key].size(1)), value=filler.get(key, 0)) if batch[key].dim() > 1
            else batch[key] for batch in batches
        ])
        for key in ("input_ids", "attention_mask", "targets", "labels") if key in batches[0]
    }  # fmt: skip


def token_unlikelihood(logits: Tensor, batch: Batch) -> Tensor:
    """The sum over all targets of -log(1 - p) of each earlier token of the row that is not the target."""
    p, total = logits.softmax(-1), logits.new_zeros(())
    for i, (ids, targets) in enumerate(zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True)):
        for t, target in enumerate(targets):
            if target != IGNORE_INDEX:
                candidates = sorted(set(ids[: t + 1]) - {target})
                total = total - (1.0 - p[i, t, candidates]).log().sum()
    return total


def one_batch(task: str, batches: list[Batch], options: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """The gradient of the mean loss over the rows of all batches, by PyTorch's own losses."""
    module, batch = make(task, **(options or {})), joined(batches)
    torch.manual_seed(0)
    module.configure_model()
    module.train()
    if task == "classifier":
        F.cross_entropy(module(batch)[0], batch["labels"]).backward()
    elif task == "regressor":
        F.mse_loss(module(batch)[0], batch["labels"].float()).backward()
    else:
        logits = module.backbone.logits(module.backbone(batch["input_ids"]))
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE_INDEX)
        if alpha := (options or {}).get("unlikelihood"):
            loss = loss + alpha * token_unlikelihood(logits, batch) / (batch["targets"] != IGNORE_INDEX).sum()
        loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].flatten().double() for name in sorted(gradient)])


def differences(
    task: str, ranks: list[Steps], options: dict[str, Any] | None, clip: float | None = None
) -> list[float]:
    """By how much the gradient of every step differs from that of one batch, relative to it; 0 where both are none."""
    found = []
    for i in range(len(ranks[0].gradients)):
        batches = [batch for steps in ranks for batch in steps.of[i]]
        if not batches:
            found.append(float(any(steps.gradients[i] for steps in ranks)))
            continue
        expected = flat(one_batch(task, batches, options))
        if clip is not None:
            expected *= min(1.0, clip / float(expected.norm()))
        apart = [float((flat(steps.gradients[i]) - expected).norm() / expected.norm()) for steps in ranks]
        found.append(max(apart))
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for number, line in enumerate(sys.stdin):
        case = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(2):
            if not (child := os.fork()):
                status = 1
                try:
                    os.environ.update(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
                    )  # fmt: skip
                    steps = fit(**case, world=2, rank=rank)
                    torch.save((steps.gradients, steps.of), folder / f"{number}_{rank}.pt")
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(statuses):
            print(json.dumps([f"the processes ended with {statuses}"]), flush=True)
            continue
        ranks = []
        for rank in range(2):
            steps = Steps([])
            steps.gradients, steps.of = torch.load(folder / f"{number}_{rank}.pt", weights_only=True)
            ranks.append(steps)
        clip = case.get("gradient_clip_val")
        print(json.dumps(differences(case["task"], ranks, case.get("options"), clip)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
