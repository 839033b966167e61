"""Lightning callbacks: checkpointing, fine-tuning schedules, progress, and the files of a run."""

from gpt2_pl.callbacks.checkpointing import AtomicCheckpointIO, ResumableEarlyStopping, ResumableModelCheckpoint
from gpt2_pl.callbacks.end_of_training import EndOfTraining
from gpt2_pl.callbacks.environment import Environment
from gpt2_pl.callbacks.finetuning import DiscriminativeLR, GradualUnfreezing
from gpt2_pl.callbacks.forgetting import Forgetting
from gpt2_pl.callbacks.non_finite_loss import NonFiniteLossGuard
from gpt2_pl.callbacks.progress import EpochLines, RunModelSummary, RunProgressBar
from gpt2_pl.callbacks.reproducibility import Reproducibility
from gpt2_pl.callbacks.run_folder import RunFolder, run_folder
from gpt2_pl.callbacks.run_summary import RunSummary
from gpt2_pl.callbacks.throughput import Throughput
from gpt2_pl.callbacks.weight_digests import WeightDigests
from gpt2_pl.callbacks.writers import ImageWriter, PredictionWriter, SampleWriter

__all__ = [
    "AtomicCheckpointIO",
    "DiscriminativeLR",
    "EndOfTraining",
    "Environment",
    "EpochLines",
    "Forgetting",
    "GradualUnfreezing",
    "ImageWriter",
    "NonFiniteLossGuard",
    "PredictionWriter",
    "Reproducibility",
    "ResumableEarlyStopping",
    "ResumableModelCheckpoint",
    "RunFolder",
    "RunModelSummary",
    "RunProgressBar",
    "RunSummary",
    "SampleWriter",
    "Throughput",
    "WeightDigests",
    "run_folder",
]
