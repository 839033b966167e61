"""LightningDataModules: text from files, a hub id or a generator, in batches."""

from datamodules.classification import TextClassification
from datamodules.corpus import TextCorpus
from datamodules.sentiment import IMDB, SST5
from datamodules.toy import ToySentiment

__all__ = ["IMDB", "SST5", "TextClassification", "TextCorpus", "ToySentiment"]
