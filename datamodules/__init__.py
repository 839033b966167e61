"""LightningDataModules: text from files, a hub id or a generator, in batches."""

from datamodules.classification import TextClassification
from datamodules.corpus import TextCorpus
from datamodules.paraphrase import QuoraPairs
from datamodules.sentiment import IMDB, SST5
from datamodules.sonnets import Sonnets
from datamodules.toy import ToyPairs, ToySentiment

__all__ = ["IMDB", "SST5", "QuoraPairs", "Sonnets", "TextClassification", "TextCorpus", "ToyPairs", "ToySentiment"]
