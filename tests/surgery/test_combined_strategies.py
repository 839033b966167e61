"""Strategies of several kinds in one run: averaging, exact resumption, unfreezing by stages, and the commands."""

import csv
import itertools

import pytest
import torch
from conftest import ROOT, metrics, weights
from helpers.refusals import refused

from gpt2_pl.tasks import LanguageModel

CONFIGS = ROOT / "configs"
EMA = "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}"
CONSTANT = "--model.schedule={class_path: gpt2_pl.optim.ConstantWithWarmup, init_args: {warmup: 0}}"
ADDED = ("ia3_l", ".adapter.", ".bias", "head.")


@pytest.fixture
def fit(run, base, data_flags):
    """Fit CFIMDB's format with BitFit, (IA)3 and bottleneck adapters."""

    def fit(*extra):
        names = ("task/imdb", "strategy/bitfit", "strategy/ia3", "strategy/adapter_houlsby")
        return run("fit", *(f"--config={CONFIGS}/{name}.yaml" for name in names), f"--model.base={base}", *data_flags,
                   "--data.max_length=24", "--trainer.accelerator=cpu", "--trainer.max_epochs=2",
                   "--trainer.precision=32-true", "--data.batch_size=32", CONSTANT, *extra)  # fmt: skip

    return fit


def test_run_of_combined_strategies_averages_resumes_bitwise_and_classifies(fit, run, files, tmp_path):
    whole = fit(EMA, "--name=whole")
    half = fit(EMA, "--name=half", "--trainer.max_steps=3")
    resumed = fit(EMA, "--name=resumed", f"--ckpt_path={half}/checkpoints/last.ckpt")
    states = [weights(folder / "checkpoints/last.ckpt") for folder in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    names = [name for name in states[0] if "metrics" not in name]
    assert all(any(part in name for part in ADDED) for name in names)
    assert all(any(part in name for name in names) for part in ADDED)
    run("classify", whole, f"--input={files['test']}", f"--out={tmp_path / 'out.csv'}", "--ckpt_path",
        whole / "checkpoints/best.ckpt")  # fmt: skip
    tables = [list(csv.DictReader(path.open())) for path in (tmp_path / "out.csv", whole / "predictions_test.csv")]
    assert len(tables[0]) == len(tables[1]) == 35
    for classified, tested in zip(*tables, strict=True):
        assert float(classified["p(positive)"]) == pytest.approx(float(tested["p(positive)"]), abs=2e-3)


def test_gradual_unfreezing_of_combined_strategies_ends_with_all_of_them(fit):
    stages = "[[head, ln_f], [block.0], [embeddings, block.1]]"
    unfreezing = f"{{class_path: gpt2_pl.callbacks.GradualUnfreezing, init_args: {{stages: {stages}}}}}"
    rates = "{class_path: gpt2_pl.callbacks.DiscriminativeLR, init_args: {decay: 0.5}}"
    folder = fit(f"--trainer.callbacks=[{unfreezing}, {rates}]", "--model.optimizer.init_args.lr=8e-4")
    layers = {layer["layer"]: layer for layer in metrics(folder)["parameters"]["layers"]}
    # Two epochs reach the second of three stages.
    added = 2 * 32 + 4 * 32 + 2 * (2 * 32 * 2 + 2 + 32)  # (IA)3: k, v and 4 C; two adapters of 2 units
    biases = 3 * 32 + 32 + 4 * 32 + 32 + 2 * 32
    assert layers["block.0"]["trainable"] == added + biases
    assert layers["block.1"]["trainable"] == layers["embeddings"]["trainable"] == 0
    assert layers["ln_f"]["trainable"] == 32
    assert layers["head"]["peak_rates"] == pytest.approx([8e-4])
    assert layers["block.0"]["peak_rates"] == pytest.approx([4e-4])


def test_contradictory_strategies_are_refused_with_both_names(run, base, data_flags, capsys, tmp_path, subtests):
    for strategies, words in (
        (("lora", "ia3"), ["IA3", "LoRA", "h.0.attn.c_attn"]),
        (("pissa", "lora"), ["LoRA", "h.0.attn.c_attn"]),
        (("adapter_houlsby", "adapter_pfeiffer"), ["BottleneckAdapter", "h.0.mlp"]),
        (("full", "bitfit"), ["train_base", "BitFit"]),
        (("layernorm", "full"), ["train_base", "LayerNormTuning"]),
        (("full", "ia3"), ["train_base", "IA3", "h.0.attn.c_attn.weight"]),
        (("full", "pissa"), ["train_base", "LoRA"]),
        (("bitfit", "linear_probe"), ["bitfit.yaml", "linear_probe.yaml"]),
        (("linear_probe", "ia3"), ["ia3.yaml", "linear_probe.yaml"]),
    ):
        files = [f"--config={CONFIGS}/strategy/{name}.yaml" for name in strategies]
        with subtests.test("+".join(strategies)):
            line = refused(run, capsys, "fit", f"--config={CONFIGS}/task/imdb.yaml", *files, f"--model.base={base}",
                           *data_flags)  # fmt: skip
            assert all(word in line for word in words), line
            assert not list(tmp_path.glob("lightning_logs/*/*"))


def test_generate_from_a_run_with_adapters_continues_like_the_model(run, base, files, tmp_path):
    names = ("task/text", "strategy/adapter_pfeiffer", "strategy/layernorm")
    folder = run("fit", *(f"--config={CONFIGS}/{name}.yaml" for name in names), f"--model.base={base}",
                 *(f"--data.{split}_file={files[split]}" for split in ("train", "val")), "--data.column=sentence",
                 "--data.max_length=24", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
                 "--model.optimizer.init_args.lr=1e-2")  # fmt: skip
    (tmp_path / "prompts.txt").write_text("a film\n")
    out = tmp_path / "out.txt"
    run("generate", folder, f"--prompt_file={tmp_path / 'prompts.txt'}", f"--out={out}", "--max_new_tokens=6",
        "--temperature=0")  # fmt: skip
    from gpt2_pl.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    task = LanguageModel.load_from_checkpoint(folder / "checkpoints/best.ckpt").eval()
    ids = tokenizer.encode("a film").ids
    for _ in itertools.repeat(None, 6):
        with torch.no_grad():
            ids.append(int(task.backbone.logits(task.backbone(torch.tensor([ids])))[0, -1].argmax()))
    assert out.read_text().strip().startswith(tokenizer.decode(ids).strip()[:20])
