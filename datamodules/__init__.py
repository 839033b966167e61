"""LightningDataModules of text from files, the Hugging Face hub or a generator."""

from gpt2_pl.datamodules.classification import TextClassification
from gpt2_pl.datamodules.language_modeling import TextCorpus
from gpt2_pl.datamodules.paraphrase import QuoraPairs
from gpt2_pl.datamodules.regression import STSB, TextRegression
from gpt2_pl.datamodules.sentiment import IMDB, SST5
from gpt2_pl.datamodules.sonnets import Sonnets
from gpt2_pl.datamodules.source_target import SourceTargetPairs, WebNLG
from gpt2_pl.datamodules.synthetic import ToyPairs, ToySentiment

__all__ = [
    "IMDB",
    "SST5",
    "STSB",
    "QuoraPairs",
    "Sonnets",
    "SourceTargetPairs",
    "TextClassification",
    "TextCorpus",
    "TextRegression",
    "ToyPairs",
    "ToySentiment",
    "WebNLG",
]
