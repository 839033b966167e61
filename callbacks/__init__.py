"""Lightning callbacks: how training goes, and the account it leaves."""

from callbacks.end_of_training import EndOfTraining
from callbacks.finite import FiniteLoss
from callbacks.layers import DiscriminativeLR, GradualUnfreezing
from callbacks.pictures import PictureWriter
from callbacks.poems import PoemWriter
from callbacks.predictions import PredictionWriter
from callbacks.progress import EpochLines, RunModelSummary, RunProgressBar
from callbacks.reproducibility import Reproducibility
from callbacks.resuming import Patience, RunCheckpoint, WholeCheckpoints
from callbacks.run_folder import RunFolder, run_folder
from callbacks.run_summary import RunSummary

__all__ = [
    "DiscriminativeLR",
    "EndOfTraining",
    "EpochLines",
    "FiniteLoss",
    "GradualUnfreezing",
    "Patience",
    "PictureWriter",
    "PoemWriter",
    "PredictionWriter",
    "Reproducibility",
    "RunCheckpoint",
    "RunFolder",
    "RunModelSummary",
    "RunProgressBar",
    "RunSummary",
    "WholeCheckpoints",
    "run_folder",
]
