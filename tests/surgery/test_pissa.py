"""PiSSA against peft and singular value decompositions, its conversion to LoRA, and exact resumption."""

import peft
import pytest
import torch
from conftest import ROOT, weights
from helpers.trainers import trainer
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2LMHeadModel

from gpt2_pl.commands.export import export_hf, export_peft
from gpt2_pl.datamodules import ToySentiment
from gpt2_pl.errors import InputError
from gpt2_pl.model import GPT2, GPT2Config
from gpt2_pl.surgery import DoRALinear, LoRA, LoRALinear, PeftAdapter, PiSSALinear, unmerge
from gpt2_pl.surgery.lora import principal_factors
from gpt2_pl.surgery.merging import lora_changes
from gpt2_pl.surgery.peft_format import save
from gpt2_pl.tasks import LanguageModel, SentimentClassifier

IDS = torch.randint(400, (4, 9), generator=torch.Generator().manual_seed(2))
TARGETS = ["c_attn", "c_fc", "mlp.c_proj"]
PISSA = LoRA(rank=3, alpha=5, targets=TARGETS, init="pissa")


def adapters(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PiSSALinear)}


def stirred(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)], ids=str)
def test_principal_factors_are_the_best_approximation_of_rank_r(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
    for rank in (1, 3, 5):
        A, B = principal_factors(W, rank)
        assert (A.shape, B.shape) == ((rank, shape[1]), (shape[0], rank))
        expected = (U[:, :rank] * S[:rank]) @ V[:rank]
        torch.testing.assert_close((B @ A).double(), expected, atol=1e-6, rtol=0)
        sizes = [A.norm(dim=1).double(), B.norm(dim=0).double()]
        for size in sizes:
            torch.testing.assert_close(size, S[:rank].sqrt(), atol=1e-6, rtol=0)


def test_principal_factors_of_a_deficient_matrix_are_finite():
    W = torch.outer(torch.arange(6.0), torch.ones(4))
    A, B = principal_factors(W, 3)
    assert A.isfinite().all()
    assert B.isfinite().all()
    torch.testing.assert_close(B @ A, W, atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [TARGETS, ["q", "v"], ["c_proj"]], ids="+".join)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_start_keeps_weights_and_hidden_states(targets, use_rslora, base):
    plain = GPT2.from_pretrained(base).eval()
    surgery = LoRA(rank=4, alpha=6, targets=targets, use_rslora=use_rslora, init="pissa")
    model = surgery.apply(GPT2.from_pretrained(base).eval())
    torch.testing.assert_close(model(IDS), plain(IDS), atol=1e-6, rtol=0)
    for name, module in adapters(model).items():
        weight = plain.get_parameter(f"{name}.weight")
        assert torch.equal(module.weight, weight)
        torch.testing.assert_close(module.merged()[0], weight, atol=1e-6, rtol=0)
        assert module.lora_B.norm() > 0.1
        assert not module.initial_A.requires_grad
    assert len(adapters(model)) == 2 * (1 if targets[0] == "q" else len(targets))


def test_pissa_slices_start_at_their_own_principal_parts(base):
    module = LoRA(rank=2, targets=["v", "q"], init="pissa").apply(GPT2.from_pretrained(base)).h[0].attn.c_attn
    W = module.weight.detach().chunk(3)
    for part, A, B in zip((W[0], W[2]), module.lora_A.chunk(2), module.lora_B.chunk(2), strict=True):
        U, S, V = torch.linalg.svd(part, full_matrices=False)
        torch.testing.assert_close(module.scaling * B @ A, (U[:, :2] * S[:2]) @ V[:2], atol=1e-6, rtol=0)


def with_equal_signs(ours, theirs):
    """Give our singular vectors the signs of peft's, which are arbitrary, and return pairs of layers."""
    pairs = []
    for name, module in theirs.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            mine = adapters(ours)[name.removeprefix("base_model.model.transformer.")]
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            signs = (mine.lora_A * A).sum(1).sign()
            with torch.no_grad():
                for own in (mine.lora_A, mine.initial_A):
                    own.mul_(signs.unsqueeze(1))
                for own in (mine.lora_B, mine.initial_B):
                    own.mul_(signs)
            pairs += [(mine.lora_A, A), (mine.lora_B, B)]
    return pairs


def test_pissa_forward_gradients_and_20_steps_equal_peft(base):
    ours = PISSA.apply(GPT2.from_pretrained(base, dropout=0.0))
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=TARGETS, fan_in_fan_out=True, init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config).eval()
    pairs = with_equal_signs(ours, theirs)
    assert len(pairs) == 2 * 2 * len(TARGETS)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
        for model in (ours, theirs)
    ]
    start = [mine.detach().clone() for mine, _ in pairs]
    for step in range(20):
        logits = ours.logits(ours(IDS)), theirs(IDS).logits
        torch.testing.assert_close(*logits, atol=1e-5 if step == 0 else 1e-3, rtol=1e-5)
        for output, optimizer in zip(logits, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        if step == 0:
            for mine, other in pairs:
                torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-3)
        for optimizer in optimizers:
            optimizer.step()
    for (mine, other), before in zip(pairs, start, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)
        assert (mine - before).abs().max() > 5e-3


def test_pissa_exports_equal_the_trained_model(base, tmp_path):
    """The adapter for peft is a plain LoRA of rank 2 r on the unchanged base."""
    task = LanguageModel(base=str(base), surgery=[PISSA], dropout=0.0)
    task.configure_model()
    stirred(task.backbone.eval())
    with torch.no_grad():
        ours = task.backbone.logits(task.backbone(IDS))
        plain = GPT2.from_pretrained(base).eval()
        assert (ours - plain.logits(plain(IDS))).abs().max() > 0.05
        export_peft(task, tmp_path / "peft")
        loaded = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), tmp_path / "peft").eval()
        torch.testing.assert_close(loaded(IDS).logits, ours, atol=1e-5, rtol=1e-5)
        again = PeftAdapter(str(tmp_path / "peft")).apply(GPT2.from_pretrained(base)).eval()
        torch.testing.assert_close(again.logits(again(IDS)), ours, atol=1e-5, rtol=1e-5)
        kinds = {type(module) for module in again.modules() if isinstance(module, LoRALinear)}
        assert kinds == {LoRALinear}
        assert {module.rank for module in again.modules() if isinstance(module, LoRALinear)} == {6}
        state = {name: tensor.clone() for name, tensor in task.backbone.state_dict().items()}
        export_hf(task, tmp_path / "hf", base)
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()(IDS).logits
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
        unmerge(task.backbone)
        assert all(torch.equal(tensor, state[name]) for name, tensor in task.backbone.state_dict().items())


def test_pissa_converted_by_peft_has_equal_logits_here(base, tmp_path):
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=TARGETS, fan_in_fan_out=True, init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config).eval()
    theirs.peft_config["default"].init_lora_weights = True  # as peft's guide does before it saves the initial values
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    stirred(theirs)
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    ours = PeftAdapter(str(tmp_path / "converted")).apply(GPT2.from_pretrained(base)).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(IDS)), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    # The same conversion by this library has the same products.
    model = PISSA.apply(GPT2.from_pretrained(base))
    save(model, tmp_path / "ours", str(base))
    shapes = [{n: t.shape for n, t in load_file(tmp_path / folder / "adapter_model.safetensors").items()}
              for folder in ("ours", "converted")]  # fmt: skip
    assert {n: s for n, s in shapes[0].items() if "c_attn" in n} == {
        n: s for n, s in shapes[1].items() if "c_attn" in n
    }


def test_pissa_dropout_affects_only_the_trained_part(base):
    layer = LoRA(rank=3, targets=["c_fc"], dropout=0.5, init="pissa").apply(GPT2.from_pretrained(base)).h[0].mlp.c_fc
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        residual = layer.weight - layer.scaling * layer.initial_B @ layer.initial_A
        fixed = x @ residual.T + layer.bias
        drawn = layer.train()(x.expand(20_000, -1)) - fixed
        kept = layer.eval()(x) - fixed
    assert drawn.std(0).max() > 0.01
    assert (drawn.mean(0) - kept).norm() < 0.05 * kept.norm()


def test_pissa_merging_in_bfloat16_keeps_outputs_of_the_start(base):
    plain = GPT2.from_pretrained(base).eval()
    model = PISSA.apply(GPT2.from_pretrained(base).eval())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(IDS), plain(IDS), atol=0.05, rtol=0.05)


def test_pissa_resumed_run_is_bitwise_equal_and_starts_where_it_stopped(run, base, data_flags):
    """The checkpoint holds the initial factors, and a run resumes from them instead of another factorization."""
    settings = [
        "fit", f"--config={ROOT}/configs/task/imdb.yaml", f"--config={ROOT}/configs/strategy/pissa.yaml",
        f"--model.base={base}", "--data.max_length=24", *data_flags, "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2", "--trainer.precision=32-true", "--data.batch_size=32",
        "--model.schedule={class_path: gpt2_pl.optim.ConstantWithWarmup, init_args: {warmup: 0}}",
    ]  # fmt: skip
    whole = run(*settings, "--name=whole")
    half = run(*settings, "--name=half", "--trainer.max_steps=3")
    checkpoint = half / "checkpoints/last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    name = "gpt2.h.1.mlp.c_fc"
    assert {f"{name}.{key}" for key in ("lora_A", "lora_B", "initial_A", "initial_B")} <= content["state_dict"].keys()
    assert f"{name}.weight" not in content["state_dict"]
    resumed = run(*settings, f"--ckpt_path={checkpoint}")
    states = [weights(folder / "checkpoints/last.ckpt") for folder in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    # Other initial factors, as of another computer, are those of the model that is loaded.
    for key in ("initial_A", "initial_B"):
        content["state_dict"][f"{name}.{key}"].neg_()
    torch.save(content, half / "other.ckpt")
    task = SentimentClassifier.load_from_checkpoint(half / "other.ckpt")
    assert torch.equal(task.backbone.h[1].mlp.c_fc.initial_A, content["state_dict"][f"{name}.initial_A"])


def test_lora_changes_of_pissa_are_relative_to_the_base(base):
    model = stirred(PISSA.apply(GPT2.from_pretrained(base)))
    for name, (B, A) in lora_changes(model, "pissa").items():
        module = model.get_submodule(name)
        change = module.merged()[0] - module.weight
        assert change.abs().max() > 0.01
        torch.testing.assert_close((B @ A).float(), change, atol=1e-6, rtol=0)


UNFIT = [
    ({"init": "svd"}, "init must be 'kaiming' or 'pissa', got 'svd'"),
    ({"init": "pissa", "use_dora": True}, "init must be 'kaiming' with use_dora"),
    ({"init": "pissa", "targets": ["wte"]}, "init must be 'kaiming' with use_dora and with the target wte"),
    ({"init": "pissa", "rank": 33}, "rank must be at most n_embd = 32 with init 'pissa', got 33"),
]


def test_pissa_that_does_not_fit_is_refused(base, subtests):
    for options, words in UNFIT:
        with subtests.test(options), pytest.raises(InputError, match=words):
            LanguageModel(base=str(base), surgery=[LoRA(**options)])
    with pytest.raises(InputError, match=r"train_base.* and LoRA both train h\.0\.attn\.c_attn\.weight"):
        LanguageModel(base=str(base), surgery=[LoRA(init="pissa")], train_base=True)


def test_checkpoint_of_lora_without_init_can_be_loaded(base, tmp_path):
    """Settings of a checkpoint that was written before an argument existed have its default."""
    task = SentimentClassifier(base=str(base), surgery=[LoRA(rank=2)])
    fit = trainer(max_steps=1)
    fit.fit(task, ToySentiment(n_train=16, vocab_size=400, batch_size=16))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    for settings in (*content["surgery"], *content["hyper_parameters"]["surgery"]):
        settings["init_args"].pop("init", None)
    torch.save(content, tmp_path / "old.ckpt")
    again = SentimentClassifier.load_from_checkpoint(tmp_path / "old.ckpt")
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in task.named_parameters())


def test_pissa_on_the_meta_device_has_the_shapes_of_lora():
    with torch.device("meta"):
        model = LoRA(rank=8, targets=["q", "v", "c_fc"], init="pissa").apply(GPT2(GPT2Config()))
        plain = LoRA(rank=8, targets=["q", "v", "c_fc"]).apply(GPT2(GPT2Config()))
    counts = [sum(p.numel() for p in one.parameters() if p.requires_grad) for one in (model, plain)]
    assert counts[0] == counts[1]
    assert not any(isinstance(module, DoRALinear) for module in model.modules())
