"""What the tests share: no network, a tiny pretrained GPT-2, small files, and the command line in this process."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import blank_images, forked

from gpt2_pl.commands import main
from gpt2_pl.datamodules.synthetic import toy_pairs, toy_reviews
from gpt2_pl.model import GPT2, GPT2Config
from gpt2_pl.tasks import classification
from gpt2_pl.text.tokenizer import train_tokenizer
from gpt2_pl.utils import plots
from gpt2_pl.utils.run_schema import check_metrics

ROOT = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
WORDS = "Sentence1: {sentence1}, Sentence2: {sentence2} → Are they paraphrases?"
LAUNCH_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
torch.set_num_threads(1)
blank_images.install()
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background makes its children ignore it


_FIRST = ("test_cli", "test_ranks", "test_faults", "test_sweep", "test_packaging", "test_own_code_commands", "test_dpo",
          "test_strategies", "test_checkpointing", "test_end_of_training", "test_training_state",
          "test_weight_averaging", "test_poetry", "test_paraphrase", "test_configurations", "test_demo",
          "test_generation", "test_own_code", "test_processes", "test_portability", "test_compiled")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that processes end together; give slow tests an hour."""
    items.sort(key=lambda item: _FIRST.index(item.path.stem) if item.path.stem in _FIRST else len(_FIRST))
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.timeout(3600))


def peft_puts_virtual_tokens() -> None:
    """Skip where the peer itself fails: peft 0.21.2 with the GPT-2 of transformers 5.24."""
    versions = [tuple(map(int, version(name).split(".")[:3])) for name in ("peft", "transformers")]
    if versions[0] <= (0, 21, 2) and versions[1] >= (5, 24):
        pytest.skip("this peft puts no virtual tokens before the GPT-2 of this transformers")


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test draws the same numbers, prints with a new console and launches its own ranks, in whatever order."""
    torch.manual_seed(1)
    for name in LAUNCH_VARIABLES:  # left by a DDP run in this process; Lightning would expect its launcher in the next
        os.environ.pop(name, None)
    monkeypatch.setattr("rich._console", None)


@pytest.fixture
def drawn_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the images of runs in this process, which are blank in other tests."""
    monkeypatch.setattr(classification, "confusion_image", plots.confusion_image)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional folder of real data."""
    folder = Path(os.environ.get("GPT2_PL_SHARED", "."))
    if not (folder / "base" / "gpt2-tiny").is_dir():
        pytest.skip("GPT2_PL_SHARED names no folder with real data: data/ and base/gpt2-tiny")
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained GPT-2 in Hugging Face's format, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    GPT2(GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(folder)
    pairs = (f"{WORDS.format(**row)}{('' if row['is_duplicate'] else ' no')} yes no" for row in toy_pairs(200, 1))
    texts = chain((row["sentence"] for row in toy_reviews(400, 1)), pairs)
    train_tokenizer(texts, 400).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tab-separated reviews in two classes; the sizes do not divide by 2."""
    reviews = lambda n, seed: [{**row, "sentiment": row["sentiment"] % 2} for row in toy_reviews(n, seed)]  # noqa: E731
    return write_splits(tmp_path_factory.mktemp("rows"), reviews)


def write_splits(folder: Path, rows: Callable[[int, int], list[dict[str, Any]]]) -> dict[str, Path]:
    """Tab-separated files of train, val and test rows."""
    paths = {}
    for seed, (split, n) in enumerate({"train": 97, "val": 33, "test": 35}.items()):
        written = rows(n, seed)
        lines = ["\t".join(map(str, row)) for row in [written[0], *(row.values() for row in written)]]
        paths[split] = folder / f"{split}.csv"
        paths[split].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


@pytest.fixture(scope="session")
def pair_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tab-separated pairs of questions."""
    return write_splits(tmp_path_factory.mktemp("pairs"), toy_pairs)


@pytest.fixture(scope="session")
def poem_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Numbered poems of 14 lines with a notice before them, and CRLF line ends in one of the files."""
    folder = tmp_path_factory.mktemp("poems")
    paths, number = {}, 0
    for seed, (split, n) in enumerate({"train": 9, "val": 3, "test": 3}.items()):
        lines = ["Poems", "by nobody, 1999", ""]
        rows = iter(toy_reviews(14 * n, seed))
        for _ in range(n):
            number += 1
            lines += [str(number), "", *(next(rows)["sentence"][:24].strip() for _ in range(14)), ""]
        paths[split] = folder / f"{split}.txt"
        paths[split].write_text("\n".join(lines), encoding="utf-8", newline="\r\n" if split == "train" else "\n")
    return paths


@pytest.fixture
def poem_flags(poem_files: dict[str, Path]) -> list[str]:
    return flags(poem_files)


@pytest.fixture
def data_flags(files: dict[str, Path]) -> list[str]:
    return flags(files)


@pytest.fixture
def pair_flags(pair_files: dict[str, Path]) -> list[str]:
    return flags(pair_files)


def flags(files: dict[str, Path]) -> list[str]:
    return [f"--data.{split}_file={path}" for split, path in files.items()]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run ``gpt2-pl`` in this process in a folder of its own; gives the latest run's folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Path:
        quiet = [] if args[0] not in ("fit", "test", "validate", "predict") else ["--trainer.enable_progress_bar=false"]
        main([*map(str, args), *quiet])
        return latest(tmp_path)

    return run


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run ``gpt2-pl`` in this process as ``run`` does, for what the tests of a module share."""

    def fitted(*args: object) -> Path:
        folder = tmp_path_factory.mktemp("fitted")
        with contextlib.chdir(folder):
            main([*map(str, args), "--trainer.enable_progress_bar=false"])
        return latest(folder)

    return fitted


def latest(folder: Path) -> Path:
    return max((folder / "lightning_logs").glob("*/version_*"), key=lambda path: path.stat().st_mtime_ns)


def process(folder: Path, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``gpt2-pl`` in a process of its own, which is forked."""
    return forked.run([ROOT / "cli.py", *args], cwd=folder, env={**os.environ, "PYTHONPATH": PATH, **environment})


def started(folder: Path, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``gpt2-pl`` in a process of its own, from the start of Python and with the imports of this very folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, args)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": PATH, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def metrics(folder: Path) -> dict[str, Any]:
    file = folder / "metrics.json"
    return check_metrics(json.loads(file.read_text()), str(file))


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]
