"""The Triton backend of attention_decode: one contract that appends, one that attends."""

from __future__ import annotations

import torch

from fastlm.ops._check import autocast_dtype
from fastlm.ops._library import contract
from fastlm.ops._transforms import trains
from fastlm.reference.relative_bias import RelativeBias

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _attention_decode_append_fake(k_cache, v_cache, k_new, v_new, seqlens_k):
    return None


@contract(_attention_decode_append_fake, mutates=("k_cache", "v_cache"))
def attention_decode_append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    seqlens_k: torch.Tensor,
) -> None:
    """Writes k_new and v_new, last strides 1, into the caches at seqlens_k and after."""
    from fastlm.kernels import attention_decode as kernels

    kernels.attention_decode_append(k_cache, v_cache, k_new, v_new, seqlens_k)


def _attention_decode_fwd_fake(
    q, k_cache, v_cache, seqlens_k, seqlen_new, mask, bias, table, alibi_slopes, sinks, causal,
    softmax_scale, window_left, window_right, softcap, bidirectional, max_distance,
):  # fmt: skip
    batch, seqlen_q, nheads, _ = q.shape
    return (
        q.new_empty((batch, seqlen_q, nheads, v_cache.shape[3])),
        q.new_empty((batch, nheads, seqlen_q), dtype=torch.float32),
    )


@contract(_attention_decode_fwd_fake)
def attention_decode_fwd(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    seqlen_new: int,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    causal: str,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    bidirectional: bool,
    max_distance: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), contiguous, over seqlens_k + seqlen_new keys; options as in `attention_fwd`."""
    from fastlm.kernels import attention_decode as kernels

    return kernels.attention_decode_fwd(
        q, k_cache, v_cache, seqlens_k, seqlen_new, mask, bias, table, alibi_slopes, sinks, causal,
        softmax_scale, window_left, window_right, softcap, bidirectional, max_distance,
    )  # fmt: skip


def refuses(q, k_cache, v_cache, options: dict) -> str | None:
    """Why the kernels cannot take a call, or None."""
    bias = options["bias"]
    table = bias.table if isinstance(bias, RelativeBias) else None
    for x in (q, k_cache, v_cache):
        if x.dtype not in _DTYPES:
            return f"computes in fp32 and does not take {x.dtype}"
    for name, x in (("headdim", q), ("headdim_v", v_cache)):
        if x.shape[-1] > 512:
            return f"does not take {name} above 512, here {x.shape[-1]}"
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:  # a copy could not be appended to
            return f"takes caches with last stride 1, {name} has {x.stride(-1)}"
    learned = (table if table is not None else bias, options["alibi_slopes"], options["sinks"])
    if trains(*learned):
        return "gives no gradients of bias, alibi_slopes and sinks (use torch.no_grad)"
    return None


def attention_decode(q, k_cache, v_cache, k_new, v_new, options: dict):
    """Runs the kernels on checked arguments; the caches are read in their own dtypes."""
    q = _last_stride_1(q.to(_common_dtype(q, k_cache, v_cache)))
    seqlens_k, seqlen_new = options["seqlens_k"].contiguous(), 0
    if k_new is not None:
        seqlen_new = k_new.shape[1]
        new = _last_stride_1(k_new), _last_stride_1(v_new)
        attention_decode_append(k_cache, v_cache, *new, seqlens_k)
    bias, table, bidirectional, max_distance = options["bias"], None, False, 0
    if isinstance(bias, RelativeBias):
        bidirectional, max_distance = bias.bidirectional, bias.max_distance
        bias, table = None, bias.table
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.float()
    scale, causal = options["softmax_scale"], options["causal"]
    out, lse = attention_decode_fwd(
        q, k_cache, v_cache, seqlens_k, seqlen_new, _four_dims(options["mask"]), _four_dims(bias),
        _fp32(table), _fp32(options["alibi_slopes"]), _fp32(options["sinks"]),
        {False: "none", True: "bottom_right"}.get(causal, causal),
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        *(-1 if side is None else side for side in options["window"] or (None, None)),
        float(options["softcap"] or 0.0), bidirectional, max_distance,
    )  # fmt: skip
    return (out, lse) if options["return_lse"] else out


def _common_dtype(q, k_cache, v_cache) -> torch.dtype:
    lower = autocast_dtype(q.device)
    if lower is not None:
        return lower
    return torch.promote_types(torch.promote_types(q.dtype, k_cache.dtype), v_cache.dtype)


def _last_stride_1(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _four_dims(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x[(None,) * (4 - x.dim())]


def _fp32(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.float().contiguous()
