"""The layout that row-wise kernels take: (rows, cols) with last stride 1, contiguous vectors."""

from __future__ import annotations

import math

import torch

from fastlm.ops._library import in_eager


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with its leading dimensions flattened; a view wherever one exists."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(vector: torch.Tensor | None) -> torch.Tensor | None:
    """An optional vector of one element a column, as kernels read it."""
    return None if vector is None else vector.contiguous()


def in_shape(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What an autograd function has just made, in another shape, and not a view: autograd forbids
    users to write to views that come out of such a function."""
    if rows.shape == shape:
        return rows
    if in_eager((rows,)) and rows.is_contiguous():
        return rows.resize_(shape)  # of as many elements; a third of the other's cost
    return torch.ops.aten._unsafe_view(rows, shape)


def viewed_as(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """rows, a gradient say, in the shape of x."""
    return rows if rows.shape == x.shape else rows.view(x.shape)


class Widened:
    """Makes chunks of rows fp32 (fp64 stays): of halves in one buffer, for fresh pages cost as much
    as a pass."""

    def __init__(self, rows: torch.Tensor, step: int):
        """step: the most rows of a chunk."""
        self.buffer = None
        dtype = torch.promote_types(rows.dtype, torch.float32)
        if dtype != rows.dtype:
            self.buffer = rows.new_empty(min(max(step, 1), len(rows)), rows.shape[1], dtype=dtype)

    def __call__(self, chunk: torch.Tensor) -> torch.Tensor:
        return chunk if self.buffer is None else self.buffer[: len(chunk)].copy_(chunk)
