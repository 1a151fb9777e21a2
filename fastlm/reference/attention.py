"""Scaled dot-product attention with every option: the specification.

    s = softmax_scale * q @ k^T, then softcap * tanh(s / softcap), + bias,
        - slope * |distance|, and -inf where the query may not attend to the key
    lse = log(sum_j exp(s_j) + exp(sink));  p = exp(s - lse);  out = dropout(p) @ v

Layout (batch, seqlen, nheads, headdim). A query that may attend to no key has out 0, lse -inf and
gradients of exactly 0. Keys and values to which no query of their sequence may attend, and queries
that may attend to no key, may hold anything, NaN included, without a trace in outputs or gradients.

Sources: Vaswani et al., arXiv:1706.03762; ALiBi: Press et al., arXiv:2108.12409; softcap: Gemma 2,
arXiv:2408.00118; sinks: gpt-oss, arXiv:2508.10925.
"""

from __future__ import annotations

import functools

import torch

from fastlm.reference.attention_mask import allowed_pairs, key_distances
from fastlm.reference.dropout import dropout_scale, keep_mask
from fastlm.reference.relative_bias import RelativeBias


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | RelativeBias | None = None,
    seqlens_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    seqlens_q: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention; the options are those of `fastlm.attention`.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k: (batch, seqlen_k, nheads_k, headdim); query head h reads head h // (nheads // nheads_k).
        v: (batch, seqlen_k, nheads_k, headdim_v).
        seqlens_q: (batch,) integers: queries at or past it are padding (for `attention_varlen`).

    Returns:
        out (batch, seqlen_q, nheads, headdim_v) in the common dtype of q, k and v; with
        `return_lse` also lse (batch, nheads, seqlen_q) in fp32, or fp64 where that dtype is fp64.
    """
    dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    acc = torch.promote_types(dtype, torch.float32)
    scores, allowed = masked_scores(
        q.to(acc), k.to(acc), causal=causal, window=window, softmax_scale=softmax_scale, mask=mask,
        bias=bias, seqlens_q=seqlens_q, seqlens_k=seqlens_k, alibi_slopes=alibi_slopes,
        softcap=softcap,
    )  # fmt: skip
    p, lse = _softmax(scores, allowed, sinks)
    p = _dropout(p, dropout_p, seed)
    v = _heads_first(v.to(acc), q.shape[2])
    if allowed is not None:
        v = torch.where(allowed.any(-2)[..., None], v, 0.0)
    out = (p @ v).to(dtype).transpose(1, 2)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqlens_k: torch.Tensor | None = None,
    return_lse: bool = False,
    **options,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention within each of the sequences packed in q (tokens_q, nheads, headdim), k and v.

    Sequence b has the queries from cu_seqlens_q[b] to cu_seqlens_q[b + 1], and so for keys; of
    these, `seqlens_k` leaves the first seqlens_k[b]. Rows, columns, masks, biases, distances and
    the dropout mask count within the sequence, and its index is the batch index.

    Returns:
        out (tokens_q, nheads, headdim_v); with `return_lse` also lse (nheads, tokens_q). Tokens
        past the last sequence, or past `max_seqlen_q` of theirs, have out 0 and lse -inf.
    """
    n_k = cu_seqlens_k.diff()
    if seqlens_k is not None:
        n_k = torch.minimum(n_k, seqlens_k)
    slots_q = _padded_slots(cu_seqlens_q, max_seqlen_q, q.shape[0])
    slots_k = _padded_slots(cu_seqlens_k, max_seqlen_k, k.shape[0])
    batch = cu_seqlens_q.shape[0] - 1
    out, lse = attention(
        _pad(q, slots_q, batch, max_seqlen_q),
        _pad(k, slots_k, batch, max_seqlen_k),
        _pad(v, slots_k, batch, max_seqlen_k),
        seqlens_q=cu_seqlens_q.diff(), seqlens_k=n_k, return_lse=True, **options,
    )  # fmt: skip
    out = _unpad(out, slots_q, 0.0)
    return (out, _unpad(lse.transpose(1, 2), slots_q, float("-inf")).t()) if return_lse else out


def attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    *,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    causal: bool | str = True,
    **options,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few new queries to a cache, of which the first seqlens_k[b] keys are filled.

    With `k_new` and `v_new` (batch, seqlen_new, nheads_k, ...), first writes them into the caches,
    in place, at seqlens_k; the queries then see seqlens_k + seqlen_new keys.
    """
    if k_new is not None:
        append(k_cache, k_new, seqlens_k)
        append(v_cache, v_new, seqlens_k)
        seqlens_k = seqlens_k + k_new.shape[1]
    return attention(q, k_cache, v_cache, causal=causal, seqlens_k=seqlens_k, **options)


def attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    deterministic: bool = True,
    **options,
) -> torch.Tensor:
    """The probabilities exp(s - lse), (batch, nheads, seqlen_q, seqlen_k), after dropout.

    `lse` is what `attention` returned for the same options; it holds the sinks already.
    """
    dtype = torch.promote_types(q.dtype, k.dtype)
    acc = torch.promote_types(dtype, torch.float32)
    scores, allowed = masked_scores(q.to(acc), k.to(acc), **options)
    shifted = scores - lse.to(acc)[..., None]
    if allowed is not None:
        # -inf - -inf is NaN in rows without a key.
        shifted = torch.where(allowed.any(-1, keepdim=True), shifted, float("-inf"))
    return _dropout(torch.exp(shifted), dropout_p, seed).to(dtype)


def append(cache: torch.Tensor, new: torch.Tensor, seqlens_k: torch.Tensor) -> None:
    """Writes new (batch, seqlen_new, ...) into cache (batch, seqlen, ...) from seqlens_k on."""
    batch = torch.arange(new.shape[0], device=new.device)[:, None]
    position = seqlens_k[:, None] + torch.arange(new.shape[1], device=new.device)
    cache[batch, position] = new.to(cache.dtype)


def masked_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | RelativeBias | None = None,
    seqlens_q: torch.Tensor | None = None,
    seqlens_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores (batch, nheads, seqlen_q, seqlen_k) in the dtype of q, and where they are allowed."""
    lengths, nheads, distance = (q.shape[1], k.shape[1]), q.shape[2], None
    relative = isinstance(bias, RelativeBias)
    if causal or window is not None or relative or alibi_slopes is not None:
        distance = key_distances(*lengths, causal, seqlens_q, seqlens_k, q.device)
    if relative:
        bias = bias.values(distance)
    allowed = allowed_pairs(
        *lengths, distance, causal, window, mask, bias, seqlens_q, seqlens_k, q.device
    )
    q, k = _heads_first(q, nheads), _heads_first(k, nheads)
    if allowed is not None:
        # 0 * NaN is NaN: what no pair uses must be gone before the products, here and in backward.
        q = torch.where(allowed.any(-1)[..., None], q, 0.0)
        k = torch.where(allowed.any(-2)[..., None], k, 0.0)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = (q * scale) @ k.transpose(-2, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * distance.abs()
    if allowed is not None:
        scores = torch.where(allowed, scores, float("-inf"))
    return scores, allowed


def _softmax(scores, allowed, sinks) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and lse; 0 and -inf in rows without an allowed key."""
    if allowed is not None:
        # Finite scores in dead rows, so that no gradient is NaN before `where` discards it.
        alive = allowed.any(-1, keepdim=True)
        scores = torch.where(alive, scores, 0.0)
    seqlen_k = scores.shape[-1]
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    p = torch.softmax(scores, dim=-1)[..., :seqlen_k]
    lse = torch.logsumexp(scores, dim=-1)
    if allowed is not None:
        p = torch.where(alive, p, 0.0)
        lse = torch.where(alive.squeeze(-1), lse, float("-inf"))
    return p, lse


def _dropout(p: torch.Tensor, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """Drops probabilities by (batch, head, row, column)."""
    if dropout_p == 0.0:
        return p
    batch, head, row = (torch.arange(n, device=p.device) for n in p.shape[:3])
    keep = keep_mask(seed, dropout_p, batch[:, None, None], head[:, None], row, p.shape[3])
    return torch.where(keep, p * dropout_scale(dropout_p), 0.0)


def _heads_first(x: torch.Tensor, nheads: int) -> torch.Tensor:
    """(batch, nheads, seqlen, headdim), key heads repeated for their group of query heads."""
    x = x.transpose(1, 2)
    return x if x.shape[1] == nheads else x.repeat_interleave(nheads // x.shape[1], dim=1)


def _padded_slots(cu_seqlens: torch.Tensor, max_seqlen: int, tokens: int) -> torch.Tensor:
    """Where each token is in (batch * max_seqlen + 1); the last slot takes those of no sequence."""
    cu_seqlens = cu_seqlens.long()
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    local = token - cu_seqlens[sequence]
    batch = cu_seqlens.shape[0] - 1
    inside = (sequence < batch) & (local < max_seqlen)
    return torch.where(inside, sequence * max_seqlen + local, batch * max_seqlen)


def _pad(x: torch.Tensor, slots: torch.Tensor, batch: int, max_seqlen: int) -> torch.Tensor:
    """(tokens, ...) to (batch, max_seqlen, ...), 0 where there is no token."""
    padded = x.new_zeros(batch * max_seqlen + 1, *x.shape[1:]).index_copy(0, slots, x)
    return padded[:-1].reshape(batch, max_seqlen, *x.shape[1:])


def _unpad(x: torch.Tensor, slots: torch.Tensor, stray: float) -> torch.Tensor:
    """The inverse of `_pad`; tokens of no sequence get `stray`."""
    flat = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    return torch.cat([flat, flat.new_full((1, *flat.shape[1:]), stray)]).index_select(0, slots)
