"""Philox dropout: the definition that every backend reproduces bit for bit.

Element (batch, head, row, column) belongs to word `column % 4` of
Philox4x32-10(counter = (column // 4, row, head, batch), key = (low, high) 32 bits of the seed),
and is kept where that word, as an unsigned 32-bit number, is at least `round(p * 2**32)`.
Tensors without batch and head (norm, FFN, embedding: rows and columns) use 0 for both.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_BLOCK = 2**18  # elements


def dropout_threshold(p: float) -> int:
    """Words below this are dropped; at p = 1 one in 2**32 is not, and `dropout_scale` is 0."""
    return min(round(p * 2**32), _MASK)


def dropout_scale(p: float) -> float:
    """What survivors are multiplied by: 1 / (1 - p), and 0 at p = 1."""
    return 0.0 if p == 1.0 else 1.0 / (1.0 - p)


def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on int64 tensors of unsigned 32-bit values; returns four of them."""
    for _ in range(10):
        # The product of two 32-bit numbers wraps in int64, but both of its halves stay right.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def keep_mask(
    seed: torch.Tensor,
    p: float,
    batch: torch.Tensor | int,
    head: torch.Tensor | int,
    row: torch.Tensor | int,
    columns: int,
) -> torch.Tensor:
    """The boolean mask of kept elements, True = kept.

    Args:
        seed: int64 tensor of one element.
        p: probability of dropping.
        batch, head, row: int64 tensors (or ints) that broadcast against each other to `shape`.
        columns: number of columns.

    Returns:
        A boolean tensor of shape `(*shape, columns)`.
    """
    device = seed.device
    batch, head, row = (torch.as_tensor(i, device=device)[..., None] for i in (batch, head, row))
    group = torch.arange((columns + 3) // 4, device=device, dtype=torch.int64)
    shape = torch.broadcast_shapes(batch.shape, head.shape, row.shape, group.shape)
    counter = (i.to(torch.int64).expand(shape) for i in (group, row, head, batch))
    words = torch.stack(philox(*counter, seed & _MASK, (seed >> 32) & _MASK), -1)
    return words.flatten(-2)[..., :columns] >= dropout_threshold(p)


def dropout_rows(x: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """Dropout of a tensor seen as (rows, columns): leading dimensions are flattened to rows."""
    if p == 0.0:
        return x
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    row = torch.arange(rows, device=x.device)
    # On a CPU a block at a time: Philox takes a hundred passes, for which the caches are faster.
    whole = x.device.type != "cpu" or torch.compiler.is_compiling()
    size = max(rows if whole else _BLOCK // max(columns, 1), 1)
    keep = torch.cat([keep_mask(seed, p, 0, 0, some, columns) for some in row.split(size)])
    return torch.where(keep.view(x.shape), x * dropout_scale(p), 0.0)
