"""The Triton backend of attention_weights: its two contracts and the differentiable function.

The contracts' options are those of `fastlm::attention_fwd`, without what packing and lse replace.
"""

from __future__ import annotations

import torch

from fastlm.ops import _attention_kernels
from fastlm.ops._library import apply, contract
from fastlm.ops._transforms import gradients, trains
from fastlm.reference import attention as reference


def _attention_weights_fwd_fake(
    q, k, lse, mask, bias, table, seqlens_k, alibi_slopes, seed, causal, softmax_scale, window_left,
    window_right, softcap, dropout_p, bidirectional, max_distance,
):  # fmt: skip
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], k.shape[1]))


@contract(_attention_weights_fwd_fake)
def attention_weights_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    seqlens_k: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    seed: torch.Tensor | None,
    causal: str,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    bidirectional: bool,
    max_distance: int,
) -> torch.Tensor:
    """The weights (batch, nheads, seqlen_q, seqlen_k), contiguous; lse is fp32 and contiguous."""
    from fastlm.kernels.attention_scores import Options
    from fastlm.kernels.attention_weights import attention_weights_fwd as launch

    options = Options(
        mask=mask, bias=bias, table=table, seqlens_k=seqlens_k, alibi_slopes=alibi_slopes,
        seed=seed, causal=causal, softmax_scale=softmax_scale, window_left=window_left,
        window_right=window_right, softcap=softcap, dropout_p=dropout_p,
        bidirectional=bidirectional, max_distance=max_distance,
    )  # fmt: skip
    return launch(q, k, lse, options)


def _attention_weights_bwd_fake(
    dw, q, k, lse, mask, bias, table, seqlens_k, alibi_slopes, seed, causal, softmax_scale,
    window_left, window_right, softcap, dropout_p, bidirectional, max_distance, need_dq, need_dk,
    need_dbias, need_dtable, need_dalibi,
):  # fmt: skip
    like = lambda x, needed: (
        x.new_empty(x.shape) if needed else q.new_empty((0,), dtype=torch.float32)
    )
    return (
        q.new_empty(q.shape if need_dq else (0,)),
        k.new_empty(k.shape if need_dk else (0,)),
        lse.new_empty(lse.shape if need_dq else (0,)),
        like(bias, need_dbias),
        like(table, need_dtable),
        like(alibi_slopes, need_dalibi),
    )


@contract(_attention_weights_bwd_fake)
def attention_weights_bwd(
    dw: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    seqlens_k: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    seed: torch.Tensor | None,
    causal: str,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    bidirectional: bool,
    max_distance: int,
    need_dq: bool,
    need_dk: bool,
    need_dbias: bool,
    need_dtable: bool,
    need_dalibi: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dlse, dbias, dtable, dalibi), contiguous, each in its input's shape and dtype.

    What is not needed has shape (0,); of the last three, also dtype fp32. need_dq stands for dq
    and dlse.
    """
    from fastlm.kernels.attention_scores import Options
    from fastlm.kernels.attention_weights import attention_weights_bwd as launch

    options = Options(
        mask=mask, bias=bias, table=table, seqlens_k=seqlens_k, alibi_slopes=alibi_slopes,
        seed=seed, causal=causal, softmax_scale=softmax_scale, window_left=window_left,
        window_right=window_right, softcap=softcap, dropout_p=dropout_p,
        bidirectional=bidirectional, max_distance=max_distance,
    )  # fmt: skip
    needs = need_dq, need_dk, need_dbias, need_dtable, need_dalibi
    return launch(dw, q, k, lse, options, *needs)


def attention_weights(q, k, lse, options: dict) -> torch.Tensor:
    """Runs the kernels on checked options; q and k have one dtype and last stride 1."""
    tensors, scalars = _attention_kernels.kernel_options(options, q, k)
    mask, bias, table, seqlens_k, _, _, alibi_slopes, _, seed = tensors
    inputs = q, k, lse.float().contiguous(), mask, bias, table, seqlens_k, alibi_slopes, seed
    if trains(*inputs):
        return apply(_Weights, *inputs, scalars[:-2])
    return attention_weights_fwd(*inputs, *scalars[:-2])


class _Weights(torch.autograd.Function):
    """(q, k, lse, the six optional tensors, scalars) -> the weights."""

    @staticmethod
    def forward(*inputs):
        *tensors, scalars = inputs
        return attention_weights_fwd(*tensors, *scalars)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scalars = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dw):
        q, k, lse, mask, bias, table, seqlens_k, alibi, seed = ctx.saved_tensors
        need_q, need_k, need_lse, _, need_bias, need_table, _, need_alibi, *_ = ctx.needs_input_grad
        dq, dk, dlse, dbias, dtable, dalibi = gradients(
            _fused_gradients, _by_reference, (dw,), (q, k, lse, bias, table, alibi),
            (mask, seqlens_k, seed), ctx.scalars,
            (need_q, need_k, need_lse, need_bias, need_table, need_alibi),
        )  # fmt: skip
        return dq, dk, dlse, None, dbias, dtable, None, dalibi, None, None


def _fused_gradients(incoming, inputs, kept, scalars, needs):
    (q, k, lse, bias, table, alibi), (mask, seqlens_k, seed) = inputs, kept
    need_q, need_k, need_lse, *need_rest = needs
    grads = attention_weights_bwd(
        *incoming, q, k, lse, mask, bias, table, seqlens_k, alibi, seed, *scalars,
        need_q or need_lse, need_k, *need_rest,
    )  # fmt: skip
    return tuple(g if n else None for g, n in zip(grads, needs, strict=True))


def _by_reference(inputs, kept, scalars) -> tuple[torch.Tensor]:
    """The weights of the forward pass."""
    (q, k, lse, bias, table, alibi_slopes), (mask, seqlens_k, seed) = inputs, kept
    options = _attention_kernels.reference_options(
        (mask, bias, table, seqlens_k, None, None, alibi_slopes, None, seed), scalars
    )
    return (reference.attention_weights(q, k, lse, **options),)
