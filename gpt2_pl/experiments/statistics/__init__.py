"""Statistical inference for the comparison of fine-tuning strategies."""
