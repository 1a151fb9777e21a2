"""Which query may attend to which key, and how far apart they are."""

from __future__ import annotations

import functools

import torch


def key_distances(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool | str,
    seqlens_q: torch.Tensor | None,
    seqlens_k: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """key - query counted from the diagonal, int64, (batch or 1, 1, seqlen_q, seqlen_k).

    The diagonal of query i is key i + n_k - n_q, with each sequence's own numbers of keys and
    queries (bottom-right), or key i with `causal="top_left"`.
    """
    query = torch.arange(seqlen_q, device=device)[:, None]
    key = torch.arange(seqlen_k, device=device)
    distance = (key - query)[None, None]
    if causal == "top_left":
        return distance
    n_q = seqlen_q if seqlens_q is None else seqlens_q.view(-1, 1, 1, 1)
    n_k = seqlen_k if seqlens_k is None else seqlens_k.clamp(max=seqlen_k).view(-1, 1, 1, 1)
    return distance - (n_k - n_q)


def allowed_pairs(
    seqlen_q: int,
    seqlen_k: int,
    distance: torch.Tensor | None,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    seqlens_q: torch.Tensor | None,
    seqlens_k: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor | None:
    """True where a query may attend to a key; four dimensions that broadcast to the scores'.

    None where every query may attend to every key, and there is a key. A bias of -inf forbids.
    `distance` is that of `key_distances`, needed for causal and window alone.
    """
    if seqlen_k == 0:  # no query has a key, whatever the conditions
        return torch.ones(1, 1, seqlen_q, 0, dtype=torch.bool, device=device)
    conditions = [] if mask is None else [mask]
    if causal:
        conditions.append(distance <= 0)
    left, right = (None, None) if window is None else window
    if left is not None:
        conditions.append(distance >= -left)
    if right is not None:
        conditions.append(distance <= right)
    if seqlens_k is not None:
        key = torch.arange(seqlen_k, device=device)
        conditions.append(key < seqlens_k.view(-1, 1, 1, 1))
    if seqlens_q is not None:
        query = torch.arange(seqlen_q, device=device)[:, None]
        conditions.append(query < seqlens_q.view(-1, 1, 1, 1))
    if bias is not None:
        conditions.append(bias != float("-inf"))
    if not conditions:
        return None
    allowed = functools.reduce(torch.logical_and, conditions)
    return allowed[(None,) * (4 - allowed.dim())]
