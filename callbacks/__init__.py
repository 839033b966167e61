"""Lightning callbacks: how training goes, and the account it leaves."""

from callbacks.layers import DiscriminativeLR, GradualUnfreezing
from callbacks.predictions import PredictionWriter
from callbacks.reproducibility import Reproducibility
from callbacks.run_summary import RunSummary

__all__ = ["DiscriminativeLR", "GradualUnfreezing", "PredictionWriter", "Reproducibility", "RunSummary"]
