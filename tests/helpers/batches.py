"""Measures of batches."""


def padding_share(masks):
    """Return the fraction of padding in the attention masks (B, T) of several batches."""
    return 1.0 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
