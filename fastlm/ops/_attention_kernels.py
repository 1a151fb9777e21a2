"""The backends of attention that have kernels, Triton and CUDA: one differentiable function over
the two contracts of each.

First derivatives are fused. Second and higher ones recompute the call in the reference.
"""

from __future__ import annotations

from functools import partial

import torch

from fastlm.backends import Impl
from fastlm.ops import _attention_cuda
from fastlm.ops._attention_contract import CONTRACTS
from fastlm.ops._library import apply
from fastlm.ops._transforms import TRANSFORM_REFUSAL, gradients, in_transform
from fastlm.reference import attention as reference
from fastlm.reference.relative_bias import RelativeBias

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def triton_refuses(q, k, v, options: dict) -> str | None:
    """Why Triton's kernels cannot take a call, or None."""
    if q.dtype not in _TRITON_DTYPES:
        return f"computes in fp32 and does not take {q.dtype}"
    if in_transform():
        return TRANSFORM_REFUSAL
    headdim = max(q.shape[-1], v.shape[-1])
    if headdim > 512:
        return f"does not take headdim above 512, here {headdim}"
    return None


def attention(impl: Impl, q, k, v, options: dict, packing: tuple | None = None):
    """Runs the kernels of `impl` on checked options.

    Args:
        q, k, v: of one dtype, last stride 1.
        packing: (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) of packed sequences.
    """
    tensors, scalars = kernel_options(options, q, k, packing)
    bias = options["bias"]
    bias = bias.table if isinstance(bias, RelativeBias) else bias
    learned = (q, k, v, bias, options["alibi_slopes"], options["sinks"])
    learned = [x for x in learned if x is not None and x.requires_grad]
    if torch.is_grad_enabled() and learned:
        exact = any(x.dtype.itemsize >= 4 for x in learned)
        out, lse, _ = apply(_Attention, q, k, v, *tensors, scalars, exact, impl)
    else:
        forward, _ = CONTRACTS[impl]
        out, lse, _ = forward(q, k, v, *tensors, *scalars, False)
    return (out, lse) if options["return_lse"] else out


def kernel_options(options: dict, q, k, packing: tuple | None = None) -> tuple[tuple, tuple]:
    """(the nine optional tensors, scalars): `attention_fwd`'s arguments from the mask on."""
    bias, table = options["bias"], None
    bidirectional, max_distance = False, 0
    if isinstance(bias, RelativeBias):
        bidirectional, max_distance = bias.bidirectional, bias.max_distance
        bias, table = None, bias.table
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.float()
    cu_seqlens_q, cu_seqlens_k, *lengths = packing or (None, None, q.shape[1], k.shape[1])
    tensors = (
        _four_dims(options["mask"]), _four_dims(bias), _fp32(table), _int32(options["seqlens_k"]),
        _int32(cu_seqlens_q), _int32(cu_seqlens_k), _fp32(options["alibi_slopes"]),
        _fp32(options["sinks"]), options["seed"],
    )  # fmt: skip
    causal = {False: "none", True: "bottom_right"}.get(options["causal"], options["causal"])
    scale, softcap = options["softmax_scale"], options["softcap"]
    window = [-1 if side is None else side for side in options["window"] or (None, None)]
    scalars = (
        causal, q.shape[-1] ** -0.5 if scale is None else float(scale), *window,
        0.0 if softcap is None else float(softcap), float(options["dropout_p"]), bidirectional,
        max_distance, *lengths,
    )  # fmt: skip
    return tensors, scalars


class _Attention(torch.autograd.Function):
    """(q, k, v, the nine optional tensors, scalars, exact, impl) -> what `attention_fwd` returns.

    Differentiable are out and lse. exact: a gradient is in fp32, and wants what lse lost to
    rounding.
    """

    @staticmethod
    def forward(*inputs):
        *tensors, scalars, exact, impl = inputs
        forward, _ = CONTRACTS[impl]
        return forward(*tensors, *scalars, exact)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scalars, exact, ctx.impl = inputs
        out, lse, lse_low = output
        ctx.set_materialize_grads(False)
        if lse_low is not None:
            ctx.mark_non_differentiable(lse_low)
        ctx.save_for_backward(*tensors, out, lse, lse_low if exact else None)

    @staticmethod
    def backward(ctx, do, dlse, _):
        q, k, v, mask, bias, table, seqlens_k, cu_q, cu_k, alibi, sinks, seed, *results = (
            ctx.saved_tensors
        )
        need_q, need_k, need_v, _, need_bias, need_table, *_ = ctx.needs_input_grad
        need_alibi, need_sinks = ctx.needs_input_grad[9:11]
        dq, dk, dv, dbias, dtable, dalibi, dsinks = gradients(
            partial(_fused_gradients, ctx.impl), _by_reference, (do, dlse),
            (q, k, v, bias, table, alibi, sinks), (mask, seqlens_k, cu_q, cu_k, seed, *results),
            ctx.scalars,
            (need_q, need_k, need_v, need_bias, need_table, need_alibi, need_sinks),
        )  # fmt: skip
        return (
            dq, dk, dv, None, dbias, dtable, None, None, None, dalibi, dsinks, *[None] * 4
        )  # fmt: skip


def _fused_gradients(impl, incoming, inputs, kept, scalars, needs):
    (do, dlse), (q, k, v, *_) = incoming, inputs
    out, lse, lse_low = kept[5:]
    need_q, need_k, need_v, *need_rest = needs
    do = torch.zeros_like(out) if do is None else last_stride_1(do)
    if impl == "cuda":
        do, dlse = _attention_cuda.aligned(do), None if dlse is None else dlse.contiguous()
    _, backward = CONTRACTS[impl]
    grads = backward(
        do, q, k, v, out, lse, lse_low, dlse, *_optional(inputs, kept), *scalars,
        need_q, need_k or need_v, *need_rest,
    )  # fmt: skip
    return tuple(g if n else None for g, n in zip(grads, needs, strict=True))


def _optional(inputs, kept) -> tuple[torch.Tensor | None, ...]:
    """The nine optional tensors, in the contracts' order."""
    _, _, _, bias, table, alibi_slopes, sinks = inputs
    mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, seed = kept[:5]
    return mask, bias, table, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed


def _by_reference(inputs, kept, scalars) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the forward pass."""
    (q, k, v, *_), optional = inputs, _optional(inputs, kept)
    options = reference_options(optional, scalars)
    cu_q, cu_k, sinks = optional[4], optional[5], optional[7]
    if cu_q is not None:
        return reference.attention_varlen(
            q, k, v, cu_q, cu_k, *scalars[-2:], sinks=sinks, return_lse=True, **options
        )
    return reference.attention(q, k, v, sinks=sinks, return_lse=True, **options)


def reference_options(tensors, scalars) -> dict:
    """The reference's options, from what `kernel_options` gives; without sinks and packing."""
    mask, bias, table, seqlens_k, _, _, alibi_slopes, _, seed = tensors
    causal, scale, left, right, softcap, dropout_p, bidirectional, max_distance, *_ = scalars
    if table is not None:
        bias = RelativeBias(table, bidirectional=bidirectional, max_distance=max_distance)
    return dict(
        causal=False if causal == "none" else causal, softmax_scale=scale, mask=mask, bias=bias,
        window=tuple(None if side < 0 else side for side in (left, right)), seqlens_k=seqlens_k,
        alibi_slopes=alibi_slopes, softcap=softcap or None, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip


def last_stride_1(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _four_dims(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x[(None,) * (4 - x.dim())]


def _fp32(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.float().contiguous()


def _int32(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()
