"""Runs for ``gpt2-pl demo``, one of each kind, without training."""

import json

from gpt2_pl.datamodules import IMDB, QuoraPairs, Sonnets, SourceTargetPairs, TextCorpus, TextRegression
from gpt2_pl.surgery import LoRA, PrefixTuning
from gpt2_pl.tasks import (
    DataToText,
    LanguageModel,
    ParaphraseDetector,
    PoemGenerator,
    SentimentClassifier,
    TextRegressor,
)
from helpers.perturbed import perturb
from helpers.saved_runs import saved_run

GIVEN = {"max_new_tokens": None, "temperature": None, "top_k": None, "top_p": None, "seed": 0}  # the command's defaults


def demo_runs(folder, base, files, pair_files, poem_files):
    """Return the folder of a run of each kind."""
    val, settings = str(files["val"]), {"tokenizer": str(base), "max_length": 60}
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"source": "a film", "target": "the film"}) + "\n")
    base, reviews = str(base), IMDB(val_file=val, **settings)
    adapted = SentimentClassifier(base=base, num_classes=2, surgery=[LoRA(rank=2)])
    tasks = {
        "reviews": (adapted, reviews),
        "prefix": (SentimentClassifier(base=base, num_classes=2, surgery=[PrefixTuning(length=3)]), reviews),
        "pairs": (
            ParaphraseDetector(base=base, threshold=0.37),
            QuoraPairs(val_file=str(pair_files["val"]), **settings),
        ),
        "numbers": (TextRegressor(base=base), TextRegression(val_file=val, label_column="sentiment", **settings)),
        "poems": (
            PoemGenerator(base=base, temperature=1.2, top_p=None, line_length_bias=False, max_new_tokens=30),
            Sonnets(val_file=str(poem_files["val"]), **settings),
        ),
        "language": (LanguageModel(base=base), TextCorpus(val_file=val, column="sentence", **settings)),
        "targets": (
            DataToText(base=base, num_beams=2, max_new_tokens=8),
            SourceTargetPairs(val_file=str(rows), **settings),
        ),
    }
    return {name: saved_run(folder / name, perturb(task), data) for name, (task, data) in tasks.items()}
