"""Distribution functions of Student's t, chi-square, normal and binomial variables.

They are those of ``scipy.special``: importing ``scipy.stats`` takes over half a second.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import special

T = TypeVar("T", float, NDArray[np.float64])


def t_quantile(p: float, df: float) -> float:
    """Return the quantile of Student's t at fractional degrees of freedom."""
    return float(special.stdtrit(df, p))


def t_cdf(t: float, df: float) -> float:
    """Return the probability that Student's t is at most ``t``."""
    return float(special.stdtr(df, t))


def chi2_quantile(p: T, df: float) -> T:
    """Return quantiles of chi-square."""
    quantiles: T = 2 * special.gammaincinv(df / 2, p)
    return quantiles


def normal_cdf(z: T) -> T:
    """Return the probability that a standard normal is at most ``z``."""
    p: T = special.ndtr(z)
    return p


def normal_quantile(p: float) -> float:
    """Return the quantile of a standard normal."""
    return float(special.ndtri(p))


def binomial_cdf(k: NDArray[np.int_], n: int, p: float) -> NDArray[np.float64]:
    """Return the probability of at most ``k`` hits in ``n`` trials."""
    cdf: NDArray[np.float64] = special.bdtr(k, n, p)
    return cdf


def beta_quantile(p: float, a: float, b: float) -> float:
    """Return the quantile of a beta variable."""
    return float(special.betaincinv(a, b, p))
