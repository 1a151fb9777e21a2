"""`torch.nn.functional.scaled_dot_product_attention`, by fastlm's attention."""

from __future__ import annotations

import torch

from fastlm.backends import choose, supports_all
from fastlm.ops._attention_torch import torch_sdpa
from fastlm.ops._check import FLOATS, autocast_dtype, fail, require_tensor
from fastlm.ops.attention import attention_as

_OP = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Torch's function, with its signature, layout and semantics, on fastlm's kernels.

    Inputs become views in fastlm's layout and are not copied. What has no such view (nested
    tensors, more than four dimensions), what the kernels have no case for (headdim 0, value with
    other heads than key) and what torch refuses goes to torch's own function, whose result or
    error it then is.

    Args:
        query: (batch, nheads, seqlen_q, headdim), or without nheads, or without both.
        key, value: as query with their own seqlen, and headdim of value; leading dimensions
            broadcast. With `enable_gqa`, a number of heads that divides query's.
        attn_mask: broadcastable to (batch, nheads, seqlen_q, seqlen_k); bool, True = attend, or
            floating, added to the scores. Differentiable.
        dropout_p: probability of dropping a probability; the seed is drawn from torch's generator.
        is_causal: a query sees the keys up to its own index (top-left), whatever the lengths.
        scale: of the scores; None is headdim ** -0.5.

    Returns:
        As query, with value's last size. A query that sees no key has 0. Unlike torch's, keys and
        values that no query sees may hold NaN.

    Raises:
        TypeError: arguments of the wrong Python type.
        ValueError: dropout_p outside of [0, 1].
        RuntimeError: attn_mask together with is_causal; value of another seqlen than key.
        RuntimeError, IndexError: dtypes and shapes that do not fit, from torch.
    """
    return sdpa_by(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def sdpa_by(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
    enable_gqa=False, impl=None,
):  # fmt: skip
    """`scaled_dot_product_attention` with an `impl`, which torch's signature has not, for
    `fastlm.explain`."""
    _check(query, key, value, attn_mask, is_causal)
    tensors = None
    if _has_kernels(query, key, value, is_causal, enable_gqa):
        tensors = _four_dims(query, key, value, enable_gqa)
    if tensors is None or not _mask_fits(attn_mask, query, *tensors[:2]):
        choose(_OP, impl, _BY_TORCH_ALONE, query.device)
        if all(_lacks_heads(x) for x in (query, key, value)):  # would end some versions of torch
            return query @ key.mT @ value
        return torch_sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    dims = query.dim()
    query, key, value = tensors
    if attn_mask is not None and attn_mask.dim() == 3 and dims == 3:
        attn_mask = attn_mask[:, None]
    additive = attn_mask is not None and attn_mask.dtype != torch.bool
    out = attention_as(
        _OP, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), impl,
        causal="top_left" if is_causal else False, window=None, softmax_scale=scale,
        mask=None if additive else attn_mask, bias=attn_mask if additive else None,
        seqlens_k=None, alibi_slopes=None, softcap=None, sinks=None, dropout_p=dropout_p,
        seed=None, return_lse=False, deterministic=True,
    )  # fmt: skip
    out = out.transpose(1, 2)
    return out if dims == 4 else out.squeeze(1) if dims == 3 else out[0, 0]


_by_torch_alone = lambda: "has no case for these inputs, which go to torch's own function"
_BY_TORCH_ALONE = {"torch": supports_all, "triton": _by_torch_alone, "cuda": _by_torch_alone}


def _check(query, key, value, attn_mask, is_causal) -> None:
    """What torch leaves unsaid, on a CPU at least."""
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if x is not None or name != "attn_mask":
            require_tensor(_OP, name, x)
    if is_causal and attn_mask is not None:  # torch's fused CPU kernel takes both, the others not
        constraint = "be None with is_causal=True"
        raise fail(_OP, "attn_mask", constraint, tuple(attn_mask.shape), RuntimeError)
    dense = not (key.is_nested or value.is_nested) and key.dim() == value.dim() > 1
    if dense and key.shape[-2] != value.shape[-2]:
        # Torch's fused CPU kernel would read past value's end.
        constraint = f"have key's seqlen {key.shape[-2]}"
        raise fail(_OP, "value", constraint, tuple(value.shape), RuntimeError)


def _lacks_heads(x) -> bool:
    return not x.is_nested and x.dim() == 4 and x.shape[1] == 0


def _has_kernels(query, key, value, is_causal, enable_gqa) -> bool:
    """Whether torch takes a call and fastlm too; the leading dimensions and the mask's apart."""
    tensors = query, key, value
    dims = query.dim()
    if not 2 <= dims <= 4 or any(x.is_nested or x.dim() != dims for x in tensors):
        return False
    lowered = {_autocast(x) for x in tensors}
    return (
        isinstance(is_causal, bool)
        and isinstance(enable_gqa, bool)
        and len(lowered) == 1
        and lowered <= set(FLOATS)
        and len({x.device for x in tensors}) == 1
        and query.shape[-1] == key.shape[-1] > 0
        and value.shape[-1] > 0
        and (dims < 4 or query.shape[1] > 0)
        and (not enable_gqa or (dims == 4 and _groups_fit(query, key, value)))
    )


def _groups_fit(query, key, value) -> bool:
    heads = key.shape[1]
    return heads == value.shape[1] and heads > 0 and query.shape[1] % heads == 0


def _mask_fits(mask, query, query4, key4) -> bool:
    """Whether the mask broadcasts to the scores, without adding dimensions, and has a dtype that
    torch takes."""
    if mask is None:
        return True
    shape = (*query4.shape[:3], key4.shape[2])
    if query.dim() == 3:
        shape = shape[:1] + shape[2:]
    shape = shape[-query.dim() :]
    trailing = shape[len(shape) - mask.dim() :] if mask.dim() <= len(shape) else None
    return (
        trailing is not None
        and all(n in (1, m) for n, m in zip(mask.shape, trailing, strict=True))
        and (mask.dtype in (torch.bool, torch.float32) or _autocast(mask) == _autocast(query))
        and mask.device == query.device
    )


def _autocast(x: torch.Tensor) -> torch.dtype:
    """The dtype in which torch's function would see a tensor."""
    lower = autocast_dtype(x.device)
    return x.dtype if lower is None or x.dtype not in FLOATS or x.dtype == torch.float64 else lower


def _four_dims(query, key, value, enable_gqa: bool) -> list[torch.Tensor] | None:
    """As views (batch, nheads, seqlen, headdim) with the same batch, and without GQA nheads."""
    tensors = [query, key, value]
    if query.dim() == 2:
        tensors = [x[None, None] for x in tensors]
    elif query.dim() == 3:
        tensors = [x[:, None] for x in tensors]
    shared = 1 if enable_gqa else 2
    sizes = [max(x.shape[i] for x in tensors) for i in range(shared)]
    if any(x.shape[i] not in (1, sizes[i]) for x in tensors for i in range(shared)):
        return None
    return [x.expand(*sizes, *x.shape[shared:]) for x in tensors]
