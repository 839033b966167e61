"""Compare two revisions: weights and generated texts of short runs must be equal bit for bit.

    python benchmarks/equivalence.py                      # HEAD against the commit before it
    python benchmarks/equivalence.py --old main --new .   # the working tree against a branch

Every strategy trains a random GPT-2 of two blocks for five steps, in float32 and in the machine's default precision;
further runs resume within an epoch, train in two processes, and generate text. Each revision runs in its own worktree.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TASKS = {  # strategy -> task, if it is not sentiment
    "hard_prompt": "quora",
    "prompt_words": "quora",
    "verbalizer": "quora",
    "verbaliser": "quora",
    "ulmfit_lm": "text",
    "unlikelihood": "sonnets",
    "sequence_unlikelihood": "sonnets",
}
RENAMED_FILES = {  # old name -> new name, for the comparison of renamed strategies
    "mean_masks": "multi_sample_dropout",
    "mix_masks": "mixed_pooling",
    "prompt_words": "hard_prompt",
    "prompt": "prompt_tuning",
    "prefix": "prefix_tuning",
    "verbaliser": "verbalizer",
}
SHORT = ["--model.sequence_prefix=20", "--model.sequence_length=30"]  # for a model of 96 positions
STEPS = ["--trainer.limit_train_batches=5", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def write_data(folder: Path, tree: Path) -> None:
    """Write the base and the rows, from fixed seeds and without code of this library."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    (folder / "base").mkdir()
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=300, n_positions=96, n_embd=64, n_layer=2, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(folder / "base")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = "the plot is quite modern dark slow and never really boring a film of rain light yes no good bad".split()
    generator = torch.Generator().manual_seed(1)
    texts = [" ".join(words[i] for i in torch.randint(len(words), (9,), generator=generator)) for _ in range(160)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, " yes no good bad"] * 3, trainer)
    tokenizer.save(str(folder / "base" / "tokenizer.json"))
    rows = [f"{text},{i % 2}" for i, text in enumerate(texts)]
    for split, part in (("train", rows[:96]), ("val", rows[96:128]), ("test", rows[128:])):
        (folder / f"sentiment_{split}.csv").write_text("\n".join(["sentence,label", *part]) + "\n", encoding="utf-8")
    pairs = [f"{a},{b},{i % 2}" for i, (a, b) in enumerate(itertools.pairwise(texts))]
    for split, part in (("train", pairs[:96]), ("val", pairs[96:128])):
        (folder / f"pairs_{split}.csv").write_text(
            "\n".join(["sentence1,sentence2,is_duplicate", *part]) + "\n", encoding="utf-8"
        )
    (folder / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    poems = [[" ".join(texts[14 * n + i].split()[:4]) for i in range(14)] for n in range(10)]
    lines = [line for n, poem in enumerate(poems) for line in (str(n + 1), "", *poem, "")]
    (folder / "poems.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "prompts.txt").write_text("the plot is\na film of rain\nquite dark and slow\n", encoding="utf-8")


def flags(task: str, data: Path) -> list[str]:
    """Return the flags that give a task its data."""
    given: dict[str, dict[str, Any]] = {
        "sst5": {"train_file": data / "sentiment_train.csv", "val_file": data / "sentiment_val.csv", "labels": "[a,b]"},
        "quora": {"train_file": data / "pairs_train.csv", "val_file": data / "pairs_val.csv"},
        "text": {"train_file": data / "text.txt", "val_file": data / "text.txt", "max_length": 32},
        "sonnets": {"train_file": data / "poems.txt", "val_file": data / "poems.txt"},
    }
    return [f"--data.{key}={value}" for key, value in given[task].items()] + ["--data.batch_size=8"]


def digest(file: Path) -> str:
    """Return a SHA-256 of the names, shapes and bytes of a checkpoint's weights."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(torch.load(file, weights_only=True)["state_dict"].items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class Runs:
    """Short runs of one revision, and the digests of their results.

    Args:
        tree: the revision's checkout.
        data: the folder with base and rows.
        only: make only runs whose name contains this text; None for all.
    """

    def __init__(self, tree: Path, data: Path, only: str | None) -> None:
        sys.path.insert(0, str(tree))
        self.tree, self.data, self.only = tree, data, only
        self.digests: dict[str, str] = {}

    def run(self, *args: object) -> None:
        """Run a command in this process."""
        import cli

        cli.main(list(map(str, args)))

    def fit(self, name: str, *args: object) -> Path | None:
        """Train and record the weights' digest; return the run folder, or None without a finished run."""
        if self.only is not None and self.only not in name:
            return None
        folder = Path("lightning_logs", name, "version_0")
        try:
            self.run("fit", *args, *QUIET, f"--name={name}")
        except SystemExit as error:
            self.digests[name] = f"exit {error.code}"
            return None
        self.digests[name] = digest(folder / "checkpoints" / "last.ckpt")
        return folder

    def arguments(self, task: str, strategy: str, *rest: object) -> list[object]:
        """Return the arguments of a run."""
        files = [
            self.tree / "configs" / kind / f"{name}.yaml" for kind, name in (("task", task), ("strategy", strategy))
        ]
        base = f"--model.base={self.data / 'base'}"
        return [*(f"--config={file}" for file in files), base, *flags(task, self.data), *rest]

    def train_strategies(self) -> None:
        """Train every strategy in both precisions; generate text with those of poems."""
        for file in sorted((self.tree / "configs" / "strategy").glob("*.yaml")):
            task = TASKS.get(file.stem, "sst5")
            name = RENAMED_FILES.get(file.stem, file.stem)
            for precision in ("default", "32-true"):
                extra = [] if precision == "default" else [f"--trainer.precision={precision}"]
                extra += SHORT if name == "sequence_unlikelihood" else []
                folder = self.fit(f"{name}-{precision}", *self.arguments(task, file.stem, *STEPS, *extra))
                if folder is not None and task == "sonnets":
                    self.generate(f"{name}-{precision}", folder)

    def generate(self, name: str, folder: Path) -> None:
        """Generate text with a run and record its digest."""
        texts = Path(f"{name}.txt")
        prompts = ["--prompt_file", self.data / "prompts.txt", "--out", texts]
        self.run("generate", folder, *prompts, "--max_new_tokens", 12)
        self.digests[f"{name} text"] = hashlib.sha256(texts.read_bytes()).hexdigest()

    def resume(self, strategy: str) -> None:
        """Stop a run within an epoch, and resume it."""
        options = ("--trainer.max_epochs=2", "--checkpoint_every_n_steps=1", "--early_stopping_patience=null")
        args = self.arguments("sst5", strategy, *options)
        folder = self.fit(f"stopped-{strategy}", *args, "--trainer.max_steps=7")
        if folder is not None:
            last = folder / "checkpoints" / "last.ckpt"
            self.fit(f"resumed-{strategy}", *args, f"--ckpt_path={last}", "--version=version_0")

    def train_in_two_processes(self, strategy: str) -> None:
        """Train with two processes and record the weights' digest."""
        if self.only is not None and self.only not in "processes":
            return
        args = self.arguments("sst5", strategy, *STEPS, "--trainer.devices=2", "--trainer.strategy=ddp", *QUIET)
        command = [sys.executable, str(self.tree / "cli.py"), "fit", *map(str, args), f"--name=two-{strategy}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = Path("lightning_logs", f"two-{strategy}", "version_0", "checkpoints", "last.ckpt")
        self.digests[f"two processes {strategy}"] = digest(last) if last.is_file() else done.stderr[-200:]


def run(tree: Path, data: Path, out: Path, only: str | None) -> None:
    """Make all runs of one revision and write their digests."""
    os.chdir(tempfile.mkdtemp())
    runs = Runs(tree, data, only)
    runs.train_strategies()
    for strategy in ("full", "lora"):
        runs.resume(strategy)
        runs.train_in_two_processes(strategy)
    out.write_text(json.dumps(runs.digests, indent=1), encoding="utf-8")


def main() -> None:
    """Compare the revisions; exit with status 1 if a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default="HEAD~1", help="a revision")
    parser.add_argument("--new", default="HEAD", help="a revision, or . for the working tree")
    parser.add_argument("--only", help="only runs whose name contains this")
    parser.add_argument("--run", nargs=3, type=Path, metavar=("TREE", "DATA", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(*args.run, args.only)
        return
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder, ROOT)
        for n, revision in enumerate((args.old, args.new)):
            tree = ROOT if revision == "." else folder / f"tree{n}"
            if tree != ROOT:
                subprocess.run(["git", "worktree", "add", "-q", "--detach", tree, revision], cwd=ROOT, check=True)
            out = folder / f"{n}.json"
            only = ["--only", args.only] if args.only else []
            environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            environment["HF_DATASETS_CACHE"] = str(folder / f"cache{n}")
            try:
                subprocess.run(
                    [sys.executable, __file__, "--run", tree, folder, out, *only],
                    check=True,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                )
            finally:
                if tree != ROOT:
                    subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
            results.append(json.loads(out.read_text(encoding="utf-8")))
    old, new = results
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    for name in different:
        print(f"differs: {name}: {old.get(name)} -> {new.get(name)}")
    print(f"{len(old)} results of {args.old}, {len(new)} of {args.new}, {len(different)} differ")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
