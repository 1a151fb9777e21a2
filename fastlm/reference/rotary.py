"""Rotary position embedding: the specification.

Pair i of a head's first `rotary_dim` dimensions turns by the angle of its position:

    y[a] = x[a] * cos[i] - x[b] * sin[i];   y[b] = x[b] * cos[i] + x[a] * sin[i]

with (a, b) = (i, i + rotary_dim / 2), as GPT-NeoX and Llama, or, interleaved, (2 i, 2 i + 1), as
RoFormer and GPT-J. The other dimensions pass through.

Source: Su et al., "RoFormer", arXiv:2104.09864.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates x (..., seqlen, nheads, headdim), in fp32 (fp64 for fp64); returns x's dtype.

    cos and sin are (rows, rotary_dim / 2), read at `positions` (integers that broadcast to
    (..., seqlen), default 0, 1, ...), or, without positions, (..., seqlen, rotary_dim / 2).
    """
    seqlen, half = x.shape[-3], cos.shape[-1]
    acc = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    c, s = (read_angles(table, positions, seqlen).to(acc) for table in (cos, sin))
    turned = x[..., : 2 * half].to(acc)
    if interleaved:
        a, b = turned.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = turned.unflatten(-1, (2, half)).unbind(-2)
        turned = torch.cat((a * c - b * s, b * c + a * s), -1)
    turned = turned.to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), -1)


def read_angles(table: torch.Tensor, positions: torch.Tensor | None, seqlen: int) -> torch.Tensor:
    """The row of a table of cosines or sines for each token, (..., seqlen, 1, rotary_dim / 2)."""
    if positions is not None:
        table = F.embedding(positions, table)  # unlike indexing, takes no negative ones
    elif table.dim() == 2:
        table = table[:seqlen]
    return table.unsqueeze(-2)  # every head turns alike
