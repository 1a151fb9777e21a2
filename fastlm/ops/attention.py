"""Scaled dot-product attention as a differentiable operator."""

from __future__ import annotations

import torch

from fastlm.backends import Impl, choose, supports_all
from fastlm.ops import _attention_cuda, _attention_kernels, _attention_torch
from fastlm.ops._attention_check import check_options, check_qkv, to_common_dtype
from fastlm.ops._check import make_seed
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
        v, bias or its table, alibi_slopes and sinks, through out and lse; gradients of gradients
        are the reference's. A query that sees no key has out 0, lse -inf and gradient 0. Keys
        that no query sees may hold NaN.

    Memory: the kernels hold no (seqlen_q, seqlen_k) matrix. Beside its results the forward
    keeps lse, and a second fp32 number per query and head where a gradient is in fp32; the backward
    needs two or three, and up to 64 partial sums of the gradients of bias, table and slopes, each
    of the size of that gradient. The reference holds all scores.

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
    q, k, v = (_attention_kernels.last_stride_1(x) for x in to_common_dtype(q, k, v))
    leads = _attention_torch.leads(q, k, v, options)
    backend = choose(op, impl, _TORCH_FIRST if leads else BACKENDS, q.device, q, k, v, options)
    options["seed"] = make_seed(options["seed"], options["dropout_p"], q.device)
    if backend == "torch":
        return _attention_torch.attention(q, k, v, options)
    return _attention_kernels.attention(backend, q, k, v, options)


# Kernels first: they never hold a (seqlen_q, seqlen_k) matrix, and torch's have no options. By
# benchmarks/results/attention.csv Triton's are the faster of both where gradients are taken.
BACKENDS = {
    "triton": _attention_kernels.triton_refuses,
    "cuda": _attention_cuda.refuses,
    "torch": supports_all,
}
_TORCH_FIRST = {"torch": supports_all, **BACKENDS}
