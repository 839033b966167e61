"""Schema of files of claims.

Import this module where a file is read; see :mod:`gpt2_pl.utils.schema`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gpt2_pl.utils.schema import VISIBLE, Name, Schema


class ClaimNode(Schema):
    """Claim about the difference of an arm to the baseline.

    ``margin`` is in points for a share, in percent for a perplexity, else in the unit of the score. The claims
    ``not_worse`` and ``equivalent`` need one. With one, ``better`` and ``worse`` mean by more than it.
    """

    arm: Name
    claim: Literal["better", "worse", "not_worse", "equivalent"]
    margin: Annotated[float, Field(gt=0, lt=1e300)] | None = None
    baseline: Name | None = None
    task: Name | None = None
    metric: Name | None = None
    sentence: Annotated[str, Field(max_length=1000), VISIBLE] | None = None


class ClaimFile(Schema):
    """Content of a file of claims."""

    claims: Annotated[list[ClaimNode], Field(min_length=1, max_length=1000)]
