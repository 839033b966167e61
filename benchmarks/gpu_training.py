"""Parts of gpu.py that train a classifier of short texts: speed, launches, repeatability and processes."""

from __future__ import annotations

import argparse
import atexit
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_arms import Figures, Memory, Report, Round, can_compile, synchronized
from lightning.pytorch import Callback, Trainer, seed_everything
from speed import ADAPTER
from torch import Tensor

from gpt2_pl import GPT2, GPT2Config
from gpt2_pl.callbacks import Environment, NonFiniteLossGuard, Reproducibility
from gpt2_pl.datamodules.batching import TokenDataset, TrainingLoader, training_batches
from gpt2_pl.surgery import LoRA
from gpt2_pl.tasks import SentimentClassifier

ROOT = Path(__file__).resolve().parents[1]
CLASSES, BATCH, STEPS, TINY_STEPS = 5, 64, 134, 8  # 134 steps are an epoch of SST-5
RUNTIME = {  # calls of CUDA's runtime that a profile counts
    "launches": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "graph launches": ("cudaGraphLaunch",),
    "copies and fills": ("cudaMemcpyAsync", "cudaMemsetAsync"),
    "waits": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
}


def _config(args: argparse.Namespace) -> GPT2Config:
    return GPT2Config(vocab_size=300, n_positions=128, n_embd=32, n_layer=2, n_head=2) if args.tiny else GPT2Config()


def rows(args: argparse.Namespace, steps: int | None = None) -> TokenDataset:
    """Return random rows whose numbers of tokens are distributed as those of SST-5: 23.5 on average, up to 66."""
    generator, size = np.random.default_rng(0), 8 if args.tiny else BATCH
    n = size * (steps or (TINY_STEPS if args.tiny else STEPS))
    lengths = generator.gamma(4.0, 23.5 / 4.0, n).round().clip(3, 66).astype(np.int64)
    offsets = np.concatenate([[0], lengths.cumsum()])
    values = generator.integers(1, _config(args).vocab_size, offsets[-1])
    return TokenDataset(values, offsets, generator.integers(0, CLASSES, n))


class Clock(Callback):
    """Seconds, of the wall and of this process, of the epochs after the first."""

    def __init__(self, device: str) -> None:
        self._device, self.seconds, self.host = device, 0.0, 0.0

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin an epoch."""
        self._since, self._host_since = synchronized(self._device), time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        """End an epoch; the first one warms up."""
        if trainer.current_epoch > 0:
            self.host += time.process_time() - self._host_since
            self.seconds += synchronized(self._device) - self._since


@cache
def _base(config: GPT2Config) -> str:
    """Return a folder with random weights, because adapters require a pretrained base; it is removed at the end."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    GPT2(config).save_pretrained(folder.name)
    return folder.name


def make_task(args: argparse.Namespace, method: str = "full", **options: Any) -> SentimentClassifier:
    """Create a classifier of GPT-2's shape with random weights."""
    config, adapts = _config(args), method == "lora"
    return SentimentClassifier(
        **{"base": _base(config), "surgery": [LoRA(**ADAPTER)]} if adapts else {"config": config},
        num_classes=CLASSES,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-5, weight_decay=0.01, fused=True),
        **options,
    )


def fit(
    args: argparse.Namespace, task: SentimentClassifier, data: TokenDataset, *callbacks: Callback, **settings: Any
) -> None:
    """Train for two epochs as the command line does, without a logger, checkpoints and validation."""
    on_gpu = args.device == "cuda"
    loader = TrainingLoader(data, 8 if args.tiny else BATCH, seed=0)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    defaults = {
        "max_epochs": 2,
        "accelerator": "gpu" if on_gpu else "cpu",
        "devices": 1,
        "precision": "bf16-mixed" if on_gpu else "32-true",
        "gradient_clip_val": 1.0,
        **dict.fromkeys(quiet, False),
    }
    everyone = [Reproducibility(), NonFiniteLossGuard(), Environment(), *callbacks]
    Trainer(**defaults | settings, callbacks=everyone).fit(task, loader)


# Speed


def finetuning(args: argparse.Namespace) -> None:
    """Measure steps of full fine-tuning."""
    _speed(args, "full")


def lora(args: argparse.Namespace) -> None:
    """Measure steps of LoRA."""
    _speed(args, "lora")


def _speed(args: argparse.Namespace, method: str) -> None:
    data = rows(args)
    plan = [part for part in training_batches(data.lengths, 8 if args.tiny else BATCH, 0, 1) if len(part)]
    tokens = int(data.lengths.sum())

    def figures(seconds: float, host: float | None, memory: Memory) -> Figures:
        found = {"ms a step": 1000 * seconds / len(plan), "examples/s": len(data) / seconds}
        found |= {"tokens of text/s": tokens / seconds, **memory.figures()}
        return found if host is None else {**found, "host ms a step": 1000 * host / len(plan)}

    def ours(**options: Any) -> Callable[[], Round]:
        def build() -> Round:
            seed_everything(0, verbose=False)
            memory, task = Memory(args.device), make_task(args, method, **options)
            task.configure_model()
            task.to(args.device)

            def measure() -> Figures:
                task.to(args.device)  # Lightning has moved it to the CPU
                memory.start()
                clock = Clock(args.device)
                fit(args, task, data, clock)
                return figures(clock.seconds, clock.host, memory)

            return measure

        return build

    def theirs(compiled: bool) -> Callable[[], Round]:
        def build() -> Round:
            memory, model = Memory(args.device), _peer(args, method).to(args.device)
            if compiled:
                model.compile()  # once, as torch_compile does in every Trainer

            def measure() -> Figures:
                memory.start()
                return figures(_train_peer(args, model, data, plan), None, memory)

            return measure

        return build

    arms = {"ours": ours(), "ours, no CUDA graphs": ours(cuda_graphs=False), "Trainer": theirs(False)}
    compiled = {"ours": ours(), "ours, compiled blocks": ours(compile="blocks"), "Trainer, compiled": theirs(True)}
    report = Report(args)
    for group in (arms, compiled) if can_compile(args) else (arms,):  # compilation may take the rest of the time
        report.in_turn({name: build for name, build in group.items() if not (args.ours and "Trainer" in name)})


def _peer(args: argparse.Namespace, method: str) -> Any:
    from transformers import GPT2Config as Config
    from transformers import GPT2ForSequenceClassification

    config = _config(args)
    shape = {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    model = GPT2ForSequenceClassification(Config(**shape, num_labels=CLASSES, pad_token_id=0, bos_token_id=0))
    if method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    settings = {"r": ADAPTER["rank"], "lora_alpha": ADAPTER["alpha"], "lora_dropout": ADAPTER["dropout"]}
    return get_peft_model(
        model, LoraConfig(**settings, target_modules=ADAPTER["targets"], fan_in_fan_out=True, task_type="SEQ_CLS")
    )


def _train_peer(args: argparse.Namespace, model: Any, data: TokenDataset, plan: list[Any]) -> float:
    """Train transformers' Trainer on the same batches, padded to multiples of 8; return the seconds of an epoch."""
    import transformers

    class Epochs(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.ends = [0.0]

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(synchronized(args.device))

    def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = -(-max(len(item["input_ids"]) for item in items) // 8) * 8
        ids = torch.zeros(len(items), longest, dtype=torch.long)
        for row, item in zip(ids, items, strict=True):
            row[: len(item["input_ids"])] = torch.from_numpy(item["input_ids"])
        labels = torch.tensor([item["labels"] for item in items])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}

    epochs = Epochs()
    assert data.labels is not None
    items = [{"input_ids": data.row(n), "labels": int(data.labels[n])} for part in plan for n in part]
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            folder,
            learning_rate=2e-5,
            weight_decay=0.01,
            per_device_train_batch_size=8 if args.tiny else BATCH,
            num_train_epochs=2,
            bf16=args.device == "cuda",
            train_sampling_strategy="sequential",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=args.device == "cpu",
        )
        transformers.Trainer(model, settings, train_dataset=items, data_collator=collate, callbacks=[epochs]).train()
    return epochs.ends[2] - epochs.ends[1]


# Launches


def profile(args: argparse.Namespace) -> None:
    """Count launches, waits and kernels of steps with and without CUDA graphs, and train twice with the same seed.

    The longest kernels are in the log.
    """

    def arm(**options: Any) -> Callable[[], Round]:
        def build() -> Round:
            return lambda: _profiled(args, make_task(args, **options))

        return build

    arms = {"no CUDA graphs": arm(cuda_graphs=False), "CUDA graphs": arm()}
    Report(args).in_turn(arms, rounds=1)
    _repeatability(args)


def _profiled(args: argparse.Namespace, task: SentimentClassifier) -> Figures:
    first, steps = (2, 3) if args.tiny else (40, 10)  # of the second epoch, when all shapes are recorded
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if args.device == "cuda" else []
    profiler = torch.profiler.profile(activities=activities)

    class Window(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == first:
                synchronized(args.device)
                profiler.start()
            if trainer.current_epoch == 1 and batch_idx == first + steps:
                profiler.stop()

    fit(args, task, rows(args), Window())
    events = profiler.key_averages()
    print(events.table(sort_by=f"self_{args.device}_time_total", row_limit=40, max_name_column_width=80))
    counts = {name: sum(e.count for e in events if e.key in calls) / steps for name, calls in RUNTIME.items()}
    counts["operations"] = sum(e.count for e in events if e.key.startswith("aten::")) / steps
    counts["host ms"] = sum(e.self_cpu_time_total for e in events) / steps / 1000
    if args.device == "cuda":
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        counts["kernels"] = sum(e.count for e in kernels) / steps
        counts["kernels, ms"] = sum(e.self_device_time_total for e in kernels) / steps / 1000
    return {f"{name} a step": value for name, value in counts.items()}


# Repeatability and correctness


def _repeatability(args: argparse.Namespace) -> None:
    """Train twice with the same seed, with and without CUDA graphs; 1 means that all weights are bitwise equal."""

    def weights(method: str, graphs: bool) -> list[Tensor]:
        task = make_task(args, method, cuda_graphs=graphs)
        seed_everything(0, verbose=False)  # before the weights are drawn, and after those of the base
        fit(args, task, rows(args, None if args.tiny else 40))
        return [p.detach().float().cpu() for p in task.parameters()]

    def arm(method: str, graphs: bool) -> Callable[[], Round]:
        def measure() -> Figures:
            first, second = weights(method, graphs), weights(method, graphs)
            pairs = list(zip(first, second, strict=True))
            return {
                "bitwise equal": float(all(torch.equal(a, b) for a, b in pairs)),
                "largest difference": max(float((a - b).abs().max()) for a, b in pairs),
            }

        return lambda: measure

    arms = {
        f"{method}, {'CUDA graphs' if on else 'plain'}": arm(method, on)
        for method in ("full", "lora")
        for on in (True, False)
    }
    Report(args).in_turn(arms, rounds=1)


def tests(args: argparse.Namespace) -> None:
    """Run tests/gpu in four processes; write a line for each that does not pass, and their number at the end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-v", "-n", "4", "-p", "no:cacheprovider", "--dist", "load", "tests/gpu"]
    report, passed = Report(args), 0
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            passed += " PASSED " in line
            if " FAILED " in line or " ERROR " in line:
                report.write(test=line.strip())
    report.write(arm="tests/gpu", figures={"passed": passed, "exit code": process.returncode})


# Processes


@contextmanager
def _address() -> Iterator[None]:
    """Let a process group of one process listen on this machine."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20000 + os.getpid() % 20000))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Losses(Callback):
    """Losses of all steps, and the name of the process group's back end."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.backend = "none"

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        """Keep the loss of a step."""
        self.losses.append(outputs["loss"].detach())
        if torch.distributed.is_initialized():
            self.backend = torch.distributed.get_backend()


def processes(args: argparse.Namespace) -> None:
    """Compare DDP and FSDP2 of one process, on a GPU with NCCL, with steps without a strategy."""
    from gpt2_pl.tasks.fsdp import FSDP2Strategy

    _processes(args, {"ddp": lambda: "ddp", "fsdp": FSDP2Strategy})


def _processes(args: argparse.Namespace, strategies: dict[str, Callable[[], Any]]) -> None:
    report, data = Report(args), rows(args, None if args.tiny else 40)
    found: dict[str, list[float]] = {}

    def arm(name: str, strategy: Callable[[], Any]) -> Callable[[], Round]:
        def measure() -> Figures:
            seed_everything(0, verbose=False)
            clock, losses = Clock(args.device), Losses()
            task = make_task(args, cuda_graphs=False)
            with _address():
                fit(args, task, data, clock, losses, strategy=strategy())
            found[name] = torch.stack(losses.losses).tolist()
            pairs = list(zip(found[name], found["plain"], strict=True))
            assert all(a != b for a, b in pairwise(found[name])), "the weights do not change"
            if name != "plain":
                report.write(arm=name, backend=losses.backend)
            return {
                "ms a step": 1000 * clock.seconds / (len(pairs) / 2),
                "largest difference of losses": max(abs(a - b) for a, b in pairs),
            }

        return lambda: measure

    report.in_turn({"plain": arm("plain", lambda: "auto"), **{n: arm(n, s) for n, s in strategies.items()}}, rounds=1)
