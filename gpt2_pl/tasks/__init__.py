"""Tasks: one LightningModule for each."""

from gpt2_pl.tasks.base import Task
from gpt2_pl.tasks.data_to_text import DataToText
from gpt2_pl.tasks.dpo import DPO
from gpt2_pl.tasks.language_modeling import LanguageModel
from gpt2_pl.tasks.paraphrase import ParaphraseDetector
from gpt2_pl.tasks.poetry import PoemGenerator
from gpt2_pl.tasks.regression import TextRegressor
from gpt2_pl.tasks.sentiment import SentimentClassifier

__all__ = [
    "DPO",
    "DataToText",
    "LanguageModel",
    "ParaphraseDetector",
    "PoemGenerator",
    "SentimentClassifier",
    "Task",
    "TextRegressor",
]
