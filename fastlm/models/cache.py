"""The keys and values of the tokens that a decoder has read."""

from __future__ import annotations

import torch

from fastlm.models.config import TransformerConfig
from fastlm.ops._check import fail, require_shape


class KVCache:
    """Keys and values of every layer, filled in place as a model reads tokens.

    Rows may hold different numbers of tokens, so prompts of different lengths share a batch: a row
    is right-padded while it is read, then `truncate` forgets the padding.

    Attributes:
        k, v: (num_layers, batch, capacity, num_heads, headdim).
        lengths: int32 (batch,), how many tokens each row holds.
        used: the largest number of tokens that a row may hold; known without asking the device.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        capacity: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Allocates room for `capacity` tokens in each row; None is `config.max_seqlen`."""
        capacity = config.max_seqlen if capacity is None else capacity
        if not 1 <= capacity <= config.max_seqlen:
            want = f"be from 1 to max_seqlen = {config.max_seqlen}"
            raise fail("KVCache", "capacity", want, capacity)
        headdim = config.embed_dim // config.num_heads
        shape = (config.num_layers, batch, capacity, config.num_heads, headdim)
        # Zeros, not empty: a NaN in a slot not yet filled must not reach a masked product.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int32)
        self.used = 0

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    def require_room(self, batch: int, seqlen: int) -> None:
        """Raises unless `seqlen` more tokens fit into each of `batch` rows."""
        if batch != self.lengths.shape[0]:
            raise fail("KVCache", "ids", f"have {self.lengths.shape[0]} rows", batch)
        if self.used + seqlen > self.capacity:
            room = self.capacity - self.used
            want = f"have at most {room} new tokens ({self.used} of {self.capacity} are held)"
            raise fail("KVCache", "ids", want, seqlen)

    def slot(
        self, layer: int, seqlen: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """One layer's keys and values, cut behind the next `seqlen` tokens, and the lengths.

        None for the lengths says that no row holds a token, without asking the device.
        """
        end = self.used + seqlen
        return self.k[layer, :, :end], self.v[layer, :, :end], self.lengths if self.used else None

    def advance(self, seqlen: int) -> None:
        """Counts `seqlen` more tokens in every row, after all layers have written them."""
        self.lengths = self.lengths + seqlen
        self.used += seqlen

    def truncate(self, lengths: torch.Tensor) -> None:
        """Keeps the first `lengths[b]` tokens of row b; `lengths` is (batch,) integers."""
        require_shape("KVCache", "lengths", lengths, tuple(self.lengths.shape), "(batch,)")
        self.lengths = torch.minimum(self.lengths, lengths.to(self.lengths))
