"""What a GPT-2 keeps of the tokens it has read, so that the next one costs one token's work."""

from __future__ import annotations

from torch import Tensor


class LayerCache:
    """Keys and values of one block, in buffers allocated once, at the first tokens.

    Args:
        capacity: tokens there is room for, virtual ones included.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, H, T, hd) of new tokens; returns those of all tokens so far, (B, H, N, hd).

        Raises:
            ValueError: more tokens than there is room for.
        """
        if self._buffers is None:
            B, H, _, hd = k.shape
            self._buffers = (k.new_empty(B, H, self.capacity, hd), v.new_empty(B, H, self.capacity, hd))
        start, self.length = self.length, self.length + k.size(2)
        if self.length > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens; these make {self.length}")
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer[:, :, start : self.length] = new
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Those of all tokens so far, (B, H, N, hd) each."""
        if self._buffers is None:
            raise ValueError("the cache is empty")
        keys, values = self._buffers
        return keys[:, :, : self.length], values[:, :, : self.length]


class KeyValueCache:
    """Keys and values of all blocks; ``model(input_ids, cache=cache)`` reads and fills it.

    Args:
        n_layer: number of blocks.
        capacity: tokens there is room for: virtual ones, prompt and what will be generated.
    """

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(n_layer)]

    @property
    def length(self) -> int:
        """Tokens read so far, virtual ones included."""
        return self.layers[0].length
