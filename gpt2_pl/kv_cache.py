"""Key/value cache: decoding computes each token once, and a prefix precedes the tokens of every block."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCacheLayer:
    """Key/value cache of one block, in buffers that the first call of ``append`` allocates.

    On a CPU the buffers are float32: in float32 the attention of one query takes a sixth to two thirds of its time in
    16 bits.

    Args:
        capacity: as in :class:`KVCache`.

    Attributes:
        prefix: keys and values (2, H, P, hd) that the first call of ``append`` prepends, or every call without a
            ``capacity``; None without a prefix.
        write_index: (1,) or None. If set, ``append`` writes one token at this position and returns the full buffers;
            the caller must mask the unused part.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.prefix: Tensor | None = None
        self.write_index: Tensor | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens and return those of all tokens.

        Args:
            k: (B, H, T, hd).
            v: (B, H, T, hd).

        Returns:
            Keys and values (B, H, N, hd) of all N tokens so far.

        Raises:
            ValueError: there are more tokens than ``capacity``.
        """
        if self.prefix is not None:
            pairs = zip(self.prefix, (k, v), strict=True)
            k, v = (torch.cat((p.to(t.dtype).expand(len(t), -1, -1, -1), t), dim=2) for p, t in pairs)
        if not self.capacity:
            return k, v
        if self.prefix is not None:
            self.prefix, self.length = None, 0
        if self._buffers is None:
            B, H, _, hd = k.shape
            dtype = torch.promote_types(k.dtype, torch.float32) if k.device.type == "cpu" else k.dtype
            keys, values = (t.new_zeros(B, H, self.capacity, hd, dtype=dtype) for t in (k, v))
            self._buffers = (keys, values)
        if self.write_index is not None:
            for buffer, new in zip(self._buffers, (k, v), strict=True):
                buffer.index_copy_(2, self.write_index, new.to(buffer.dtype))
            return self._buffers
        start, self.length = self.length, self.length + k.size(2)
        if self.length > self.capacity:
            raise ValueError(f"the cache must have at most {self.capacity} tokens, got {self.length}")
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer.narrow(2, start, new.size(2)).copy_(new)
        return self.keys_and_values()

    def repeat(self, times: int) -> None:
        """Repeat every row of a batch, so that it becomes ``times`` successive rows."""
        if self._buffers is not None and times > 1:
            keys, values = (buffer.repeat_interleave(times, dim=0) for buffer in self._buffers)
            self._buffers = (keys, values)

    def reorder(self, rows: Tensor, start: int) -> None:
        """Replace each row by another one from the token ``start`` on; see :meth:`KVCache.reorder`."""
        if self._buffers is not None:
            end = self.length if self.write_index is None else self.capacity
            for buffer in self._buffers:
                part = buffer.narrow(2, start, end - start)
                part.copy_(part[rows])

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all tokens so far, (B, H, N, hd) each."""
        if self._buffers is None:
            raise ValueError("the cache is empty; call append first")
        keys, values = self._buffers
        return keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length)


class KVCache:
    """Key/value cache of all blocks; ``model(input_ids, cache=cache)`` reads and extends it.

    Args:
        n_layer: number of blocks.
        capacity: maximum number of tokens: virtual tokens, prompt and generated tokens. With 0 the cache holds a prefix
            (Li & Liang 2021) and stores no tokens, for training and single forward passes.
    """

    def __init__(self, n_layer: int, capacity: int = 0) -> None:
        self.layers = [KVCacheLayer(capacity) for _ in range(n_layer)]

    @property
    def length(self) -> int:
        """Number of cached tokens, virtual tokens included."""
        return self.layers[0].length

    def set_prefix(self, prefix: Tensor) -> None:
        """Prepend a prefix (L, 2, H, P, hd) to the first tokens of an empty cache."""
        for layer, keys_and_values in zip(self.layers, prefix, strict=True):
            layer.prefix, layer.length = keys_and_values, prefix.size(3)

    def repeat(self, times: int) -> None:
        """Repeat every row of the batch, so that it becomes ``times`` successive rows."""
        for layer in self.layers:
            layer.repeat(times)

    def reorder(self, rows: Tensor, start: int) -> None:
        """Replace each row of the batch by another one, for beam search.

        Args:
            rows: (B,) index of the row that takes the place of each row.
            start: number of first tokens, virtual tokens included, that the rows have in common and that stay in place.
        """
        for layer in self.layers:
            layer.reorder(rows, start)
