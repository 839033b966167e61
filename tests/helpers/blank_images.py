"""Blank images in place of drawn ones, which take a quarter of the time of a short run."""

import numpy as np

from gpt2_pl.tasks import classification

_BLANK = np.full((600, 700, 3), 255, np.uint8)  # as large as a drawn one


def install() -> None:
    """Replace the images of classification runs in this process."""
    classification.confusion_image = lambda counts, names, title: _BLANK
