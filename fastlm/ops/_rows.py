"""The layout that row-wise kernels take: (rows, cols) with last stride 1."""

from __future__ import annotations

import math

import torch


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with its leading dimensions flattened; a view wherever one exists."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def in_shape(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What an autograd function has just made, in another shape, and not a view: autograd forbids
    users to write to views that come out of such a function."""
    return torch.ops.aten._unsafe_view(rows, shape)
