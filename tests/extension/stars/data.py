"""A dataset."""

from __future__ import annotations

from gpt2_pl.datamodules import IMDB


class Stars(IMDB):
    """Reviews with a rating."""

    def __init__(self, template: str = "{sentence} Stars:", **kwargs) -> None:
        super().__init__(template=template, **kwargs)
