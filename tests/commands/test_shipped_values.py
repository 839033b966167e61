"""Values of shipped configurations and defaults, as documented in the README and the methods' papers."""

import inspect

import pytest
import yaml
from conftest import ROOT

from gpt2_pl.callbacks import DiscriminativeLR, GradualUnfreezing
from gpt2_pl.optim import SlantedTriangular
from gpt2_pl.surgery import LoRA, PrefixTuning, PromptTuning
from gpt2_pl.tasks import LanguageModel, PoemGenerator
from gpt2_pl.tasks.classification import Classifier

REVIEW = "Review: {sentence} Sentiment:"
PAIR = "Sentence1: {sentence1}, Sentence2: {sentence2} → Are they paraphrases?"
ULMFIT = {"SlantedTriangular.cut_frac": 0.1, "SlantedTriangular.ratio": 32, "DiscriminativeLR.decay": 0.8}
RANK8 = {"LoRA.rank": 8, "LoRA.alpha": 16, "LoRA.dropout": 0.1, "AdamW.lr": 4e-4}
FILES = {
    "strategy/full": {"model.train_base": True},
    "strategy/linear_probe": {"model.train_base": False, "AdamW.lr": 1e-2},
    "strategy/llrd": {"DiscriminativeLR.decay": 0.95},
    "strategy/ulmfit": {**ULMFIT, "GradualUnfreezing.blocks_per_stage": 3, "model.pooling": "concat"},
    "strategy/ulmfit_lm": ULMFIT,
    "strategy/lora": {**RANK8, "LoRA.targets": ["c_attn", "c_fc"]},
    "strategy/lora_embedding": {"LoRA.rank": 6, "LoRA.targets": ["wte"], "AdamW.lr": 4e-4},
    "strategy/lora_ffn": {**RANK8, "LoRA.targets": ["c_fc", "mlp.c_proj"]},
    "strategy/lora_attention": {**RANK8, "LoRA.targets": ["q", "v"]},
    "strategy/lora_plus": {**RANK8, "LoRA.loraplus_lr_ratio": 16, "AdamW.lr": 1e-4},
    "strategy/dora": {**RANK8, "LoRA.use_dora": True},
    "strategy/prefix_tuning": {"PrefixTuning.length": 20, "AdamW.lr": 5e-3},
    "strategy/prompt_tuning": {"PromptTuning.length": 20, "AdamW.lr": 5e-3},
    "strategy/hard_prompt": {"data.template": PAIR},
    "strategy/verbalizer": {"data.template": PAIR, "model.head": "verbalizer", "model.label_words": [" no", " yes"]},
    "strategy/unlikelihood": {"model.unlikelihood": 1.0},
    "strategy/sequence_unlikelihood": {"model.sequence_unlikelihood": 0.2},
    "strategy/multi_sample_dropout": {"model.pooling": "mean", "model.num_dropout_samples": 5},
    "strategy/mixed_pooling": {
        **{
            "model.pooling": "mix",
            "model.mean_weight": 0.7,
            "model.num_dropout_samples": 3,
            "model.label_smoothing": 0.1,
        },
        **{"DiscriminativeLR.decay": 0.95, "CosineWithWarmup.warmup": 0.06},
    },
    "task/sst5": {
        **{"SST5.template": REVIEW, "SST5.batch_size": 64, "trainer.max_epochs": 6, "AdamW.lr": 2e-5},
        **{"SentimentClassifier.dropout": 0.3, "LinearWithWarmup.warmup": 0.06},
    },
    "task/imdb": {"IMDB.template": REVIEW, "AdamW.lr": 2e-5},
    "task/quora": {"AdamW.lr": 2e-5},
    "task/sonnets": {"Sonnets.prompt_lines": 3},
}


def named(value, owner=""):
    """Yield settings by their class or section."""
    for key, inner in value.items():
        if key == "init_args":
            yield from named(inner, value.get("class_path", owner).split(".")[-1])
        elif isinstance(inner, dict):
            yield from named(inner, key if owner == "" else owner)
        elif isinstance(inner, list) and isinstance(inner[0], dict):
            for entry in inner:
                yield from named(entry, owner)
        elif key != "class_path":
            yield f"{owner}.{key}", inner


def test_strategy_configs_all_have_documented_values():
    assert {file.stem for file in (ROOT / "configs/strategy").iterdir()} == {
        name.removeprefix("strategy/") for name in FILES if name.startswith("strategy/")
    }


@pytest.mark.parametrize("file", FILES)
def test_shipped_config_values_equal_documented_values(file):
    found = dict(named(yaml.safe_load((ROOT / f"configs/{file}.yaml").read_text(encoding="utf-8"))))
    assert {key: found.get(key) for key in FILES[file]} == FILES[file]


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (SlantedTriangular, "cut_frac", 0.1),
        (SlantedTriangular, "ratio", 32),
        (DiscriminativeLR, "decay", 0.95),
        (GradualUnfreezing, "blocks_per_stage", 3),
        (LoRA, "rank", 8),
        (LoRA, "alpha", 16),
        (PrefixTuning, "length", 10),
        (PromptTuning, "length", 20),
        (Classifier, "mean_weight", 0.7),
        (LanguageModel, "sequence_prefix", 50),
        (LanguageModel, "sequence_length", 100),
    ],
)
def test_signature_defaults_equal_documented_values(owner, name, value):
    assert inspect.signature(owner).parameters[name].default == value


def test_poem_generator_default_max_new_tokens_is_at_least_160():
    assert inspect.signature(PoemGenerator).parameters["max_new_tokens"].default >= 160
