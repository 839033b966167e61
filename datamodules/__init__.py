"""LightningDataModules: rows from files, a hub id or a generator, batched by length."""

from datamodules.base import TextClassification
from datamodules.sentiment import IMDB, SST5
from datamodules.toy import ToySentiment

__all__ = ["IMDB", "SST5", "TextClassification", "ToySentiment"]
