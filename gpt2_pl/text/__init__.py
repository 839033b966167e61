"""Text processing without a model: tokenizers, poems and text metrics."""
