"""Parts of gpu.py without a trainer: the machine's ceilings, generation, language models and single kernels."""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from gpu_arms import Figures, Memory, Report, Round, can_compile, seconds_of
from language_model import SIZES, training_flops
from peak_flops import peak_flops
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2_pl import GPT2, GPT2Config, generate
from gpt2_pl.losses import cross_entropy

TINY = GPT2Config(vocab_size=300, n_positions=128, n_embd=32, n_layer=2, n_head=2, dropout=0.0)


def _shape(args: argparse.Namespace, size: str = "small") -> GPT2Config:
    width, blocks, heads = SIZES[size]
    return TINY if args.tiny else GPT2Config(n_embd=width, n_layer=blocks, n_head=heads, dropout=0.0)


def _theirs(config: GPT2Config) -> Any:
    """Create transformers' GPT-2 with random weights, without dropout."""
    from transformers import GPT2Config as Config
    from transformers import GPT2LMHeadModel

    shape = {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    return GPT2LMHeadModel(Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0))


# The machine


def machine(args: argparse.Namespace) -> None:
    """Write the versions, the rate of copies and that of a large product."""
    report, device = Report(args), args.device
    names = ("torch", "lightning", "transformers", "torchmetrics", "numpy")
    versions = {name: version(name) for name in names} | {"python": platform.python_version()}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        versions |= {"driver": done.stdout.strip(), "cuda": str(torch.version.cuda)}
    report.write(versions=versions)
    n = 256 if args.tiny else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    large = torch.empty(2**20 if args.tiny else 2**32, dtype=torch.uint8, device=device)
    report.in_turn(
        {
            "ceilings": lambda: (
                lambda: {
                    "bf16 product, TFLOP/s": 2 * n**3 / seconds_of(device, lambda: a @ b, 10) / 1e12,
                    "copy, TB/s": 2 * large.numel() / seconds_of(device, large.clone, 5) / 1e12,
                }
            )
        }
    )


# Generation


def generation(args: argparse.Namespace) -> None:
    """Measure new tokens per second of 1 and 12 prompts, also with compiled decoding."""
    report, device, config = Report(args), args.device, _shape(args)
    length, new = (8, 20) if args.tiny else (40, 128)
    ours, theirs = (model.eval().to(device, torch.bfloat16) for model in (GPT2(config), _theirs(config)))
    sampling: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}

    def arm(batch: int, run: Callable[[Tensor], object]) -> Callable[[], Round]:
        ids = torch.randint(config.vocab_size, (batch, length), device=device)

        def build() -> Round:
            run(ids)  # records or compiles
            return lambda: {"new tokens/s": batch * new / seconds_of(device, lambda: run(ids), 1, warm_up=0)}

        return build

    def peer(ids: Tensor, **more: Any) -> None:
        theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **sampling, **more)

    def own(**more: Any) -> Callable[[Tensor], object]:
        return lambda ids: generate(ours, ids, max_new_tokens=new, top_p=0.9, seed=0, **more)

    def static(ids: Tensor) -> None:  # on a GPU, transformers then compiles the model by itself
        peer(ids, cache_implementation="static")

    plain = {"ours": own(), "transformers": peer}
    compiled = {"ours": own(), "ours, compiled": own(compiled=True), "transformers, static": static}
    for group in (plain, compiled) if can_compile(args) else (plain,):  # compilation may take the rest of the time
        for batch in (1, 12):
            torch._dynamo.reset()  # every number of prompts gets its own code
            runs = {name: run for name, run in group.items() if not (args.ours and "transformers" in name)}
            report.in_turn({f"{batch} prompts: {name}": arm(batch, run) for name, run in runs.items()})


# Language models


def language_model(args: argparse.Namespace) -> None:
    """Measure training steps of GPT-2 small on contexts of 1,024 tokens."""
    _language_model(args, "small", 64)


def language_model_medium(args: argparse.Namespace) -> None:
    """Measure training steps of GPT-2 medium on contexts of 1,024 tokens."""
    _language_model(args, "medium", 32)


def _language_model(args: argparse.Namespace, size: str, batch: int) -> None:
    report, device, config = Report(args), args.device, _shape(args, size)
    batch, context, steps = (2, 32, 2) if args.tiny else (batch, 1024, 6)
    ids = torch.randint(config.vocab_size, (batch, context + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    positions = torch.arange(targets.numel(), device=device)

    def ours(model: GPT2, compiled: bool) -> Tensor:
        total, n = cross_entropy(model(inputs), model.head_weight, targets, compiled=compiled, positions=positions)
        return total / n

    def arm(make: Callable[[], Any], loss: Callable[[Any], Tensor]) -> Callable[[], Round]:
        def build() -> Round:
            memory, model = Memory(device), make().to(device).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

            def step() -> None:
                with torch.autocast(device, torch.bfloat16):
                    value = loss(model)
                value.backward()
                optimizer.step()
                optimizer.zero_grad()

            seconds_of(device, step, 1)  # compiles
            return lambda: _rates(device, config, batch * context, context, step, steps, memory)

        return build

    def compiled(blocks: bool, dynamic: bool) -> Callable[[], GPT2]:
        def make() -> GPT2:
            model = GPT2(config)
            for module in model.h if blocks else [model]:
                module.compile(dynamic=dynamic)
            return model

        return make

    def peer() -> Any:
        model = _theirs(config)
        model.compile()
        return model

    blocks = arm(compiled(True, True), lambda model: ours(model, True))
    plain = {"ours": arm(lambda: GPT2(config), lambda model: ours(model, False))}
    whole = {
        "ours, blocks": blocks,
        "ours, model": arm(compiled(False, False), lambda model: ours(model, True)),
        "transformers, compiled": arm(peer, lambda model: model(inputs, labels=inputs, use_cache=False).loss),
    }
    groups = (plain | {"ours, blocks": blocks}, whole) if can_compile(args) else (plain,)
    for group in groups:  # compilation may take the rest of the time
        report.in_turn({name: build for name, build in group.items() if not (args.ours and "transformers" in name)})


def _rates(
    device: str,
    config: GPT2Config,
    tokens: int,
    context: int,
    step: Callable[[], None],
    steps: int,
    memory: Memory,
) -> Figures:
    memory.start()
    rate = tokens / seconds_of(device, step, steps, warm_up=1)
    figures = {"tokens/s": rate, **memory.figures()}
    if device == "cuda":
        flops = training_flops(config.n_layer, config.n_embd, config.vocab_size, context)
        figures["MFU"] = flops * rate / peak_flops(torch.device(device), torch.bfloat16)
    return figures


# Kernels


def kernels(args: argparse.Namespace) -> None:
    """Measure attention, the loss over the vocabulary, and the products of a block alone."""
    _attention(args)
    _loss(args)
    _products(args)


def _attention(args: argparse.Namespace) -> None:
    """Measure forward and backward passes of attention for every back end of PyTorch."""
    report, device = Report(args), args.device
    shapes = {"short, dropout": (64, 12, 24, 64, 0.1), "long": (64, 12, 1024, 64, 0.0)}
    shapes = {"tiny": (2, 2, 16, 8, 0.0)} if args.tiny else shapes
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)

    def arm(shape: tuple[int, int, int, int], p: float, backend: SDPBackend | None) -> Callable[[], Round]:
        def build() -> Round:
            B, H, T, hd = shape
            qkv = torch.randn(B, T, 3, H, hd, device=device, dtype=torch.bfloat16, requires_grad=True)

            def run() -> None:
                q, k, v = qkv.transpose(1, 3).unbind(2)  # strided views, as in the model
                F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True).sum().backward()

            def measure() -> Figures:
                if backend is None:
                    return {"ms": 1000 * seconds_of(device, run, 10)}
                with sdpa_kernel(backend):
                    return {"ms": 1000 * seconds_of(device, run, 10)}

            measure()
            return measure

        return build

    for name, (*shape, p) in shapes.items():
        given: Any = tuple(shape)
        arms = {f"attention, {name}: {backend.name}": arm(given, p, backend) for backend in backends}
        report.in_turn({f"attention, {name}: PyTorch's choice": arm(given, p, None), **arms})


def _products(args: argparse.Namespace) -> None:
    """Measure the products of a block, with PyTorch's and with cuBLASLt's kernels."""
    report, device = Report(args), args.device
    rows, C = (64, 32) if args.tiny else (65536, 768)
    shapes = {"c_attn": (C, 3 * C), "c_proj": (C, C), "c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}

    def arm(size: tuple[int, int], library: str) -> Callable[[], Round]:
        def build() -> Round:
            inner, outer = size
            x, w, g = (
                torch.randn(shape, device=device, dtype=torch.bfloat16)
                for shape in ((rows, inner), (outer, inner), (rows, outer))
            )
            flops = 2 * rows * inner * outer

            def measure() -> Figures:
                if device == "cuda":
                    torch.backends.cuda.preferred_blas_library(library)
                found = {"forward": lambda: x @ w.T, "input": lambda: g @ w, "weight": lambda: g.T @ x}
                return {f"{name}, TFLOP/s": flops / seconds_of(device, run, 10) / 1e12 for name, run in found.items()}

            return measure

        return build

    libraries = ("default", "cublaslt") if device == "cuda" else ("default",)
    report.in_turn({f"product, {name}: {lib}": arm(size, lib) for name, size in shapes.items() for lib in libraries})


def _loss(args: argparse.Namespace) -> None:
    """Measure the loss over the vocabulary alone, for sizes of its chunks, and the sum of the weight's gradients."""
    report, device, config = Report(args), args.device, _shape(args)
    rows = 64 if args.tiny else 65536
    hidden = torch.randn(1, rows, config.n_embd, device=device, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.n_embd, device=device, requires_grad=True)
    targets = torch.randint(config.vocab_size, (1, rows), device=device)
    positions = torch.arange(rows, device=device)

    def arm(chunk: int, compiled: bool) -> Callable[[], Round]:
        def run() -> None:
            with torch.autocast(device, torch.bfloat16):
                total, _ = cross_entropy(hidden, weight, targets, chunk, compiled, positions)
            torch.autograd.grad(total, (hidden, weight))

        def build() -> Round:
            memory = Memory(device)
            seconds_of(device, run, 1)

            def measure() -> Figures:
                memory.start()
                return {"ms": 1000 * seconds_of(device, run, 5, warm_up=1), **memory.figures()}

            return measure

        return build

    chunks, on_gpu = (16,) if args.tiny else (4096, 8192, 16384), device == "cuda"
    report.in_turn(
        {
            f"loss, chunks of {n}{', compiled' * c}": arm(n, bool(c))
            for n in chunks
            for c in ((0, 1) if on_gpu else (0,))
        }
        | dict(_sums(device, config.vocab_size, config.n_embd, chunks[0]))
    )


def _sums(device: str, V: int, C: int, n: int) -> Iterator[tuple[str, Callable[[], Round]]]:
    """Yield the ways to add a chunk's gradient of the weight to float32: the one in use, and one in a single call."""
    gradient, states = (torch.randn(n, width, device=device, dtype=torch.bfloat16) for width in (V, C))
    total = torch.zeros(V, C, device=device)
    yield (
        "sum of weight gradients",
        lambda: lambda: {"ms": 1000 * seconds_of(device, lambda: total.add_(gradient.T @ states), 5)},
    )
    if device == "cuda":
        yield (
            "sum of weight gradients, in the product",
            lambda: (
                lambda: {
                    "ms": 1000
                    * seconds_of(device, lambda: torch.addmm(total, gradient.T, states, out_dtype=torch.float32), 5)
                }
            ),
        )
