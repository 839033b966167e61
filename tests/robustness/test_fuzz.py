"""Bad values at every place of every untrusted file: a command succeeds or ends with one line, within seconds.

Commands run in a forked process, so that a crash of native code fails its case only.
By default a fixed sample of the cases runs; ``pytest -m slow tests/robustness/test_fuzz.py`` runs all.
"""

import copy
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import traceback
from contextlib import chdir
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

from gpt2_pl import GPT2, GPT2Config
from gpt2_pl.commands import main
from gpt2_pl.surgery import LoRA
from gpt2_pl.surgery.peft_format import save

SECONDS = 10.0  # of the processor's, that a case may take
SAMPLE = 3  # cases of each file by default
FEW = 3  # entries of a long list or mapping of equal things, such as a vocabulary, that are changed
MISSING = object()
AS_IT_IS = "as it is"
BAD = {
    "missing": MISSING,
    "null": None,
    "true": True,
    "negative": -1,
    "fraction": 0.5,
    "large": 2**62,
    "huge": 10**400,
    "nan": math.nan,
    "infinite": math.inf,
    "empty text": "",
    "escapes": "\x1b]0;title\x07\x1b[31mred\nsecond line\u202e\u2028",
    "long text": "x" * 10**6,
    "empty list": [],
    "list": [None, "a", {}],
    "empty mapping": {},
    "mapping": {"a": {"b": [1]}},
    "deep": json.loads("[" * 60 + "]" * 60),
}
BAD_TENSORS = {  # in place of tensors alone
    "short tensor": lambda value: torch.zeros(1),
    "long tensor": lambda value: torch.zeros(999_999),
    "whole numbers": lambda value: value.long(),
    "complex": lambda value: value.to(torch.complex64),
    "sparse": lambda value: value.to_sparse(),
    "meta": lambda value: value.to("meta"),
    "strided": lambda value: torch.zeros(1).expand(7, *value.shape)[0].expand(value.shape),
    "nan tensor": lambda value: value * math.nan,
    "negative tensor": lambda value: -value - 1,
}
RAW = set("\x1b\x07\u202e\u2028")
EQUAL = ("vocab", "merges")  # of a tokenizer: long lists and mappings of which a few stand for all


def places(value, path=()):
    """Return the paths of all leaves of a document; an empty list or mapping is a leaf."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    inner = list(inner)
    if path and path[-1] in EQUAL:
        inner = inner[:FEW]
    if not inner:
        return [path]
    return [found for key, one in inner for found in places(one, (*path, key))]


def changed(value, path, new):
    """Return a document with another value at a path."""
    if not path:
        return new
    key, *rest = path
    changed_value = copy.copy(value) if not isinstance(value, tuple) else list(value)
    if not rest and new is MISSING:
        del changed_value[key]
    else:
        changed_value[key] = changed(value[key], rest, new)
    return tuple(changed_value) if isinstance(value, tuple) else changed_value


def at(value, path):
    for key in path:
        value = value[key]
    return value


class Document:
    """A file and the command that reads it."""

    def __init__(self, name, folder, file, read, write, command):
        self.name, self.folder, self.file, self.write, self.command = name, folder, file, write, command
        self.content = read(file)

    def cases(self):
        """Yield the paths and the names of bad values."""
        for path in places(self.content):
            tensor = isinstance(at(self.content, path), torch.Tensor)
            yield from ((path, name) for name in [*BAD, *(BAD_TENSORS if tensor else ())])

    def variant(self, path, name):
        if name == AS_IT_IS:
            return self.content
        value = at(self.content, path)
        return changed(self.content, path, BAD_TENSORS[name](value) if name in BAD_TENSORS else BAD[name])


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Every kind of file of a small run and of its base model."""
    folder = tmp_path_factory.mktemp("fuzz")
    base = folder / "base"
    torch.manual_seed(0)
    GPT2(GPT2Config(vocab_size=300, n_positions=32, n_embd=8, n_layer=1, n_head=2)).save_pretrained(base)
    quick = ["--config", str(ROOT / "configs/quickstart.yaml"), "--data.vocab_size=300", "--data.n_train=20",
             "--data.batch_size=10", "--data.max_length=24", "--trainer.precision=32-true", "--name=tiny",
             "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
             "--early_stopping_patience=5"]  # fmt: skip
    shape = "--model.config={vocab_size: 300, n_positions: 32, n_embd: 8, n_layer: 1, n_head: 2, dropout: 0.0}"
    with chdir(folder):
        main(["fit", *quick, shape, "--trainer.max_epochs=2"])
    run = folder / "lightning_logs/tiny/version_0"
    shutil.copytree(run, folder / "runs/good")
    shutil.copytree(run, folder / "runs/bad")
    (folder / "rows.csv").write_text("sentence\na good film\n")
    shutil.copy(run / "tokenizer.json", base / "tokenizer.json")
    adapted = GPT2.from_pretrained(base)
    LoRA(rank=2, targets=["c_attn"]).apply(adapted)
    save(adapted, folder / "adapter", str(base))
    surgery = f"[{{class_path: gpt2_pl.surgery.PeftAdapter, init_args: {{folder: {folder / 'adapter'}}}}}]"
    compare = ["compare", "runs/good", "runs/bad", "--out", "out"]
    validate = ["validate", *quick, "--model.config=null", f"--model.base={base}", "--trainer.logger=false"]
    resume = ["fit", *quick, shape, "--trainer.max_epochs=3", "--ckpt_path=bad.ckpt"]
    shutil.copy(run / "checkpoints/last.ckpt", folder / "bad.ckpt")
    classify = ["classify", "runs/bad", "--input", "rows.csv", "--out", "out.csv"]
    checkpoint = (lambda file: torch.load(file, weights_only=True), lambda file, content: torch.save(content, file))
    as_json = (lambda f: json.loads(f.read_text()), lambda f, content: f.write_text(json.dumps(content)))
    as_yaml = (lambda f: yaml.safe_load(f.read_text()), lambda f, content: f.write_text(yaml.safe_dump(content)))
    return {
        name: Document(name, folder, folder / file, *functions, command)
        for name, file, functions, command in (
            ("last.ckpt", "bad.ckpt", checkpoint, resume),
            ("best.ckpt", "runs/bad/checkpoints/best.ckpt", checkpoint, classify),
            ("metrics.json", "runs/bad/metrics.json", as_json, compare),
            ("config.yaml", "runs/bad/config.yaml", as_yaml, compare),
            ("tokenizer.json", "runs/bad/tokenizer.json", as_json, classify),
            ("adapter_config.json", "adapter/adapter_config.json", as_json, [*validate, f"--model.surgery={surgery}"]),
            ("config.json", "base/config.json", as_json, validate),
        )
    }


def run_cases(document, cases, report):
    """Run the command on every case in this process, and write each outcome as a line of JSON."""
    os.chdir(document.folder)
    original = document.file.read_bytes()
    output = open("output", "w+b")  # noqa: SIM115
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", encoding="utf-8") for number in (1, 2))
    with report.open("a") as lines:
        for path, name in cases:
            print(json.dumps({"begun": [list(map(str, path)), name]}), file=lines, flush=True)
            try:
                document.write(document.file, document.variant(path, name))
            except (RecursionError, yaml.YAMLError, TypeError, ValueError, RuntimeError):  # no such file can be written
                print(json.dumps({"skipped": True}), file=lines, flush=True)
                document.file.write_bytes(original)
                continue
            output.truncate(0)
            output.seek(0)
            signal.alarm(300)  # which nobody handles: it ends this process
            since = time.process_time()
            try:
                main(list(document.command))
                status = 0
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
                status = 1
            seconds = time.process_time() - since
            signal.alarm(0)
            sys.stdout.flush()
            sys.stderr.flush()
            text = Path("output").read_text(encoding="utf-8", errors="surrogateescape")
            outcome = {"status": status, "seconds": seconds, "output": text[-3000:], "raw": bool(RAW & set(text))}
            print(json.dumps(outcome), file=lines, flush=True)
            for left in ("out", "lightning_logs/tiny/version_1"):
                shutil.rmtree(left, ignore_errors=True)
            Path("out.csv").unlink(missing_ok=True)
            document.file.write_bytes(original)


def outcomes(document, cases, report):
    """Return the outcome of every case; after a crash, which is an outcome too, continue with the next case."""
    found = []
    while len(found) < len(cases):
        report.write_text("")
        child = os.fork()
        if child == 0:
            try:
                run_cases(document, cases[len(found) :], report)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        ended = [line for line in lines if "begun" not in line]
        found += ended
        if len(ended) < len([line for line in lines if "begun" in line]) or not lines:
            found.append({"status": f"killed {status}", "seconds": 0.0, "output": "", "raw": False})
    return found


def is_good(outcome):
    """Return whether a command succeeded or ended with status 2 and one clean line of error, within the time limit."""
    if outcome.get("skipped"):
        return True
    lines = [line for line in outcome["output"].splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    refused = outcome["status"] == 2 and len(errors) == 1 and lines[-1] == errors[0]
    silent = "Traceback" not in outcome["output"] and not outcome["raw"] and outcome["seconds"] < SECONDS
    return silent and (refused or outcome["status"] == 0)


NAMES = (
    "last.ckpt",
    "best.ckpt",
    "metrics.json",
    "config.yaml",
    "tokenizer.json",
    "adapter_config.json",
    "config.json",
)


def check(document, cases, tmp_path):
    cases = [((), AS_IT_IS), *cases]
    found = outcomes(document, cases, tmp_path / "report")
    bad = {f"{'/'.join(map(str, path))} = {name}": outcome for (path, name), outcome in zip(cases, found, strict=True)
           if not is_good(outcome)}  # fmt: skip
    counts = {status: sum(str(one.get("status", "skipped")) == status for one in found)
              for status in sorted({str(one.get("status", "skipped")) for one in found})}  # fmt: skip
    slowest = max(one.get("seconds", 0.0) for one in found)
    print(f"{document.name}: {len(cases)} cases, by status {counts}, the slowest {slowest:.1f} s, {len(bad)} bad")
    if out := os.environ.get("FUZZ_REPORT"):
        report = {"counts": counts, "slowest": slowest, "bad": bad}
        Path(out, f"{document.name}.json").write_text(json.dumps(report, indent=1))
    assert not bad, json.dumps(dict(list(bad.items())[:5]), indent=1)[:6000]
    assert found[0]["status"] == 0, found[0]["output"]


@pytest.mark.parametrize("name", NAMES)
def test_command_sampled_bad_values_are_refused_in_one_line_or_accepted(name, documents, tmp_path):
    cases = list(documents[name].cases())
    check(documents[name], random.Random(name).sample(cases, SAMPLE), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_command_all_bad_values_are_refused_in_one_line_or_accepted(name, documents, tmp_path):
    cases = list(documents[name].cases())
    share = int(os.environ.get("FUZZ_SHARE", "1"))  # every n-th case
    check(documents[name], cases[::share], tmp_path)
