"""LightningModules: one for each task."""

from gpt2_pl.tasks.base import Task
from gpt2_pl.tasks.sentiment import SentimentClassifier

__all__ = ["SentimentClassifier", "Task"]
