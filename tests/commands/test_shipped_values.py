"""Values of shipped configurations and defaults, as documented in the README and the methods' papers."""

import inspect

import yaml
from conftest import ROOT

from gpt2_pl.callbacks import DiscriminativeLR
from gpt2_pl.optim import SlantedTriangular
from gpt2_pl.surgery import BottleneckAdapter, LoRA
from gpt2_pl.tasks import LanguageModel, PoemGenerator
from gpt2_pl.tasks.pooled import PooledTask

REVIEW = "Review: {sentence} Sentiment:"
PAIR = "Sentence1: {sentence1}, Sentence2: {sentence2} → Are they paraphrases?"
ULMFIT = {"SlantedTriangular.cut_frac": 0.1, "SlantedTriangular.ratio": 32, "DiscriminativeLR.decay": 0.8}
RANK8 = {"LoRA.rank": 8, "LoRA.alpha": 16, "LoRA.dropout": 0.1}
FILES = {
    "strategy/llrd": {"DiscriminativeLR.decay": 0.95},
    "strategy/ulmfit": {**ULMFIT, "model.pooling": "concat"},
    "strategy/ulmfit_lm": ULMFIT,
    "strategy/lora": RANK8,
    "strategy/lora_attention": {**RANK8, "LoRA.targets": ["q", "v"]},
    "strategy/lora_plus": {**RANK8, "LoRA.loraplus_lr_ratio": 16},
    "strategy/dora": {**RANK8, "LoRA.use_dora": True},
    "strategy/pissa": {"LoRA.rank": 8, "LoRA.init": "pissa"},
    "strategy/adapter_houlsby": {"BottleneckAdapter.placement": "houlsby", "BottleneckAdapter.reduction": 16},
    "strategy/adapter_pfeiffer": {"BottleneckAdapter.placement": "pfeiffer", "BottleneckAdapter.reduction": 16},
    "strategy/hard_prompt": {"data.template": PAIR},
    "strategy/verbalizer": {"data.template": PAIR, "model.label_words": [" no", " yes"]},
    "strategy/unlikelihood": {"model.unlikelihood": 1.0},
    "strategy/dpo": {"model.beta": 0.1},
    "strategy/multi_sample_dropout": {"model.num_dropout_samples": 5},
    "task/sst5": {"SST5.template": REVIEW},
    "task/imdb": {"IMDB.template": REVIEW},
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


def test_shipped_config_values_equal_documented_values():
    for file, values in FILES.items():
        found = dict(named(yaml.safe_load((ROOT / f"configs/{file}.yaml").read_text(encoding="utf-8"))))
        assert {key: found.get(key) for key in values} == values, file


def test_signature_defaults_equal_documented_values():
    for owner, name, value in (
        (SlantedTriangular, "cut_frac", 0.1),
        (SlantedTriangular, "ratio", 32),
        (DiscriminativeLR, "decay", 0.95),
        (LoRA, "rank", 8),
        (LoRA, "alpha", 16),
        (PooledTask, "mean_weight", 0.7),
        (LoRA, "init", "kaiming"),
        (BottleneckAdapter, "placement", "pfeiffer"),
        (LanguageModel, "sequence_prefix", 50),
        (LanguageModel, "sequence_length", 100),
    ):
        assert inspect.signature(owner).parameters[name].default == value, (owner, name)


def test_poem_generator_default_max_new_tokens_is_at_least_160():
    assert inspect.signature(PoemGenerator).parameters["max_new_tokens"].default >= 160
