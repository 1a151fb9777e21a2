"""Scaled dot-product attention as a differentiable operator."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from fastlm.backends import Impl, choose, supports_all
from fastlm.ops import _attention_torch
from fastlm.ops._attention_check import check_options, check_qkv, to_common_dtype
from fastlm.ops._check import make_seed
from fastlm.ops._library import contract
from fastlm.reference.relative_bias import RelativeBias


def _attention_fwd_fake(q, k, v, causal, softmax_scale):
    batch, seqlen_q, nheads, _ = q.shape
    return (
        q.new_empty((batch, seqlen_q, nheads, v.shape[3])),
        q.new_empty((batch, nheads, seqlen_q), dtype=torch.float32),
    )


@contract(_attention_fwd_fake)
def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: str, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse); causal is "none", "top_left" or "bottom_right". Both contiguous, lse fp32."""
    from fastlm.kernels import attention_fwd as kernels

    return kernels.attention_fwd(q, k, v, causal, softmax_scale)


def _attention_bwd_fake(
    do, q, k, v, out, lse, dlse, causal, softmax_scale, need_dq, need_dkv
):  # fmt: skip
    return (
        q.new_empty(q.shape if need_dq else (0,)),
        k.new_empty(k.shape if need_dkv else (0,)),
        v.new_empty(v.shape if need_dkv else (0,)),
    )


@contract(_attention_bwd_fake)
def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    causal: str,
    softmax_scale: float,
    need_dq: bool,
    need_dkv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous; of shape (0,) where not needed. dlse is the gradient of lse."""
    from fastlm.kernels import attention_bwd as kernels

    return kernels.attention_bwd(
        do, q, k, v, out, lse, dlse, causal, softmax_scale, need_dq, need_dkv
    )


class _Attention(torch.autograd.Function):
    """(q, k, v) -> (out, lse), both differentiable."""

    @staticmethod
    def forward(ctx, q, k, v, causal, softmax_scale):
        out, lse = attention_fwd(q, k, v, causal, softmax_scale)
        ctx.set_materialize_grads(False)
        ctx.causal, ctx.softmax_scale = causal, softmax_scale
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        need_dq, need_dk, need_dv = ctx.needs_input_grad[:3]
        do = torch.zeros_like(out) if do is None else _last_stride_1(do)
        dq, dk, dv = attention_bwd(
            do, q, k, v, out, lse, dlse, ctx.causal, ctx.softmax_scale, need_dq, need_dk or need_dv
        )
        return (
            dq if need_dq else None,
            dk if need_dk else None,
            dv if need_dv else None,
            None,
            None,
        )


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
    seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    impl: Impl | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(softmax_scale * q @ k^T) @ v, with options that combine freely.

    A score is `softmax_scale * q·k`, capped by `softcap`, plus `bias`, minus ALiBi's
    `slope * |distance|`, and -inf where one of causal, window, mask and seqlens_k forbids the pair.
    Distances are key - query from the diagonal, which ends in the last query and the last key
    (bottom-right: key `i + n_k - seqlen_q` for query i, n_k being seqlens_k where given), unless
    causal is "top_left", where it starts in the first of both.

    Args:
        q: (batch, seqlen_q, nheads, headdim), fp16, bf16, fp32 (fp64 by the torch backend), any
            strides. Different dtypes of q, k and v are promoted to their common one; autocast
            lowers all three.
        k: (batch, seqlen_k, nheads_k, headdim); nheads_k divides nheads (GQA).
        v: (batch, seqlen_k, nheads_k, headdim_v).
        causal: True or "bottom_right" lets a query see keys up to its diagonal; so does "top_left".
        window: (left, right), how far before and after the diagonal a query sees; None: unlimited.
        softmax_scale: None is headdim ** -0.5.
        mask: bool, broadcastable to (batch, nheads, seqlen_q, seqlen_k), True = attend.
        bias: any floating dtype, broadcastable as mask, or a `RelativeBias`. -inf forbids.
        seqlens_k: (batch,) int32 or int64; keys at or past it are padding.
        alibi_slopes: (nheads,) or (batch, nheads).
        softcap: scores become softcap * tanh(score / softcap).
        sinks: (nheads,), a logit per head that takes its share of the softmax and has no value.
        dropout_p: probability of dropping a probability.
        seed: of the dropout mask; None draws one from torch's generator.
        return_lse: also return the logarithm of the softmax's denominator, sinks included.
        deterministic: False allows kernels whose gradients vary in their last bits.
        impl: the backend; None chooses (see `fastlm.explain`).

    Returns:
        out (batch, seqlen_q, nheads, headdim_v), contiguous, in the common dtype; with `return_lse`
        (out, lse), lse (batch, nheads, seqlen_q) in fp32 (fp64 for fp64). Differentiable in q, k,
        v, bias or its table, alibi_slopes and sinks, through out and lse; twice by the reference,
        once by fused kernels. A query that sees no key has out 0, lse -inf and gradient 0. Keys
        that no query sees may hold NaN.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Sources: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762; Dao et al.,
    "FlashAttention", arXiv:2205.14135.
    """
    return attention_as(
        "attention", q, k, v, impl, causal=causal, window=window, softmax_scale=softmax_scale,
        mask=mask, bias=bias, seqlens_k=seqlens_k, alibi_slopes=alibi_slopes, softcap=softcap,
        sinks=sinks, dropout_p=dropout_p, seed=seed, return_lse=return_lse,
        deterministic=deterministic,
    )  # fmt: skip


def attention_as(op: str, q, k, v, impl, **options):
    """`attention` under another name for its messages."""
    check_qkv(op, q, k, v)
    check_options(op, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), q.device, options)
    options["seed"] = make_seed(op, options["seed"], options["dropout_p"], q.device)
    q, k, v = (_last_stride_1(x) for x in to_common_dtype(q, k, v))
    if choose(op, impl, _BACKENDS, q.device, q, v, options) == "torch":
        return _attention_torch.attention(q, k, v, options)
    causal = {False: "none", True: "bottom_right"}.get(options["causal"], options["causal"])
    scale = options["softmax_scale"]
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse = _Attention.apply(q, k, v, causal, scale)
    return (out, lse) if options["return_lse"] else out


_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_NOT_IN_TRITON = ("window", "mask", "bias", "seqlens_k", "alibi_slopes", "softcap", "sinks")


def _triton_refuses(q, v, options) -> str | None:
    if q.dtype not in _TRITON_DTYPES:
        return f"computes in fp32 and does not take {q.dtype}"
    if q.shape[-1] > 256:
        return f"does not take headdim above 256, here {q.shape[-1]}"
    if v.shape[-1] != q.shape[-1]:
        return f"does not take headdim_v = {v.shape[-1]} with headdim = {q.shape[-1]} yet"
    for name in _NOT_IN_TRITON:
        if options[name] is not None:
            return f"does not take {name} yet"
    return "does not take dropout_p > 0 yet" if options["dropout_p"] > 0.0 else None


# Triton first: it never holds a (seqlen_q, seqlen_k) matrix. Not measured on a GPU yet.
_BACKENDS = {"triton": _triton_refuses, "torch": supports_all}


def _last_stride_1(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
