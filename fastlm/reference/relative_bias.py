"""T5's relative position bias: one learned number per head and bucket of key - query distance.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", arXiv:1910.10683, section 2.1.
"""

from __future__ import annotations

import math

import torch


class RelativeBias:
    """An attention bias that is read from a table by distance; pass it as `bias=`.

    Args:
        table: (num_buckets, nheads), any floating dtype; differentiable.
        bidirectional: half of the buckets are for keys after the query. False, as in a causal
            decoder, gives all of them to keys before it; keys after it share bucket 0.
        max_distance: all distances from here on share the last bucket.

    Distances are key - query, counted from the diagonal of the attention they are used in: aligned
    bottom-right, unless it is causal "top_left".
    """

    def __init__(self, table: torch.Tensor, *, bidirectional: bool, max_distance: int):
        self.table = table
        self.bidirectional = bidirectional
        self.max_distance = max_distance

    def __repr__(self) -> str:
        return (
            f"RelativeBias(table={tuple(self.table.shape)}, bidirectional={self.bidirectional}, "
            f"max_distance={self.max_distance})"
        )

    def values(self, distance: torch.Tensor) -> torch.Tensor:
        """The bias of integer distances (batch, 1, M, N), as (batch, nheads, M, N)."""
        bucket = relative_bucket(
            distance.squeeze(1), self.table.shape[0], self.bidirectional, self.max_distance
        )
        return self.table[bucket].permute(0, 3, 1, 2)


def exact_distances(num_buckets: int, bidirectional: bool) -> int:
    """How many distances, 0 among them, have a bucket of their own on each side."""
    return (num_buckets // 2 if bidirectional else num_buckets) // 2


def relative_bucket(
    distance: torch.Tensor, num_buckets: int, bidirectional: bool, max_distance: int
) -> torch.Tensor:
    """The bucket of each distance key - query, int64.

    Half of a side's buckets hold one distance each; the rest grow with the logarithm of the
    distance, computed in fp32 and truncated, up to `max_distance`.
    """
    exact = exact_distances(num_buckets, bidirectional)
    side = num_buckets // 2 if bidirectional else num_buckets
    if bidirectional:
        first, distance = (distance > 0) * side, distance.abs()
    else:
        first, distance = 0, (-distance).clamp(min=0)
    # clamp: the logarithm of 0 is not used below, but must be a number to become an integer.
    fraction = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    grown = (exact + (fraction * (side - exact)).long()).clamp(max=side - 1)
    return first + torch.where(distance < exact, distance, grown)
