"""Text without a model: tokenizers, poems and metrics of text."""
