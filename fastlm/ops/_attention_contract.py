"""The contracts of fused attention: `attention_fwd` and `attention_bwd`, of `fastlm::` (Triton) and
of `fastlm_cuda::`.

Both take every option; None, -1 (windows) and 0.0 (softcap, dropout_p) stand for "not used".
Dense calls have q (batch, seqlen_q, nheads, headdim) and lse (batch, nheads, seqlen_q); packed
ones, with cu_seqlens, q (tokens_q, nheads, headdim) and lse (nheads, tokens_q).

    mask, bias        four dimensions, of size 1 where they broadcast; any strides
    table             (num_buckets, nheads), of `RelativeBias`, with bidirectional and max_distance
    seqlens_k, cu_*   int32
    alibi_slopes      (nheads,) or (batch, nheads)
    sinks             (nheads,)
    seed              int64 scalar, where dropout_p > 0
    causal            "none", "top_left" or "bottom_right"

Tables, slopes and sinks are fp32 and contiguous.
"""

from __future__ import annotations

import torch

from fastlm.ops._library import contract, cuda_contract, unwanted


def _attention_fwd_fake(
    q, k, v, mask, bias, table, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed,
    causal, softmax_scale, window_left, window_right, softcap, dropout_p, bidirectional,
    max_distance, max_seqlen_q, max_seqlen_k, exact,
):  # fmt: skip
    stats = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    fp32 = lambda shape: q.new_empty(shape, dtype=torch.float32)
    return out, fp32(stats), fp32(stats) if exact else unwanted(q)


@contract(_attention_fwd_fake)
def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    seqlens_k: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    causal: str,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    bidirectional: bool,
    max_distance: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    exact: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, lse_low), contiguous, the last two in fp32.

    lse_low is what lse lost to rounding, for gradients in fp32; not wanted unless `exact`.
    """
    from fastlm.kernels.attention_fwd import attention_fwd as launch
    from fastlm.kernels.attention_scores import Options

    options = Options(
        mask, bias, table, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, causal,
        softmax_scale, window_left, window_right, softcap, dropout_p, bidirectional, max_distance,
        max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    return launch(q, k, v, options, exact)


def _attention_bwd_fake(
    do, q, k, v, out, lse, lse_low, dlse, mask, bias, table, seqlens_k, cu_seqlens_q, cu_seqlens_k,
    alibi_slopes, sinks, seed, causal, softmax_scale, window_left, window_right, softcap, dropout_p,
    bidirectional, max_distance, max_seqlen_q, max_seqlen_k, need_dq, need_dkv, need_dbias,
    need_dtable, need_dalibi, need_dsinks,
):  # fmt: skip
    like = lambda x, needed: x.new_empty(x.shape) if needed else unwanted(q)
    return (
        like(q, need_dq),
        like(k, need_dkv),
        like(v, need_dkv),
        like(bias, need_dbias),
        like(table, need_dtable),
        like(alibi_slopes, need_dalibi),
        like(sinks, need_dsinks),
    )


@contract(_attention_bwd_fake)
def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lse_low: torch.Tensor | None,
    dlse: torch.Tensor | None,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    seqlens_k: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    causal: str,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    bidirectional: bool,
    max_distance: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    need_dq: bool,
    need_dkv: bool,
    need_dbias: bool,
    need_dtable: bool,
    need_dalibi: bool,
    need_dsinks: bool,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """(dq, dk, dv, dbias, dtable, dalibi, dsinks), contiguous, each in its input's shape and dtype.

    lse_low is None where no gradient is in fp32; dlse is the gradient of lse.
    """
    from fastlm.kernels.attention_bwd import attention_bwd as launch
    from fastlm.kernels.attention_scores import Options

    options = Options(
        mask, bias, table, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, causal,
        softmax_scale, window_left, window_right, softcap, dropout_p, bidirectional, max_distance,
        max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    return launch(
        do, q, k, v, out, lse, lse_low, dlse, options, need_dq, need_dkv, need_dbias, need_dtable,
        need_dalibi, need_dsinks,
    )  # fmt: skip


# Forward and backward, by backend.
CONTRACTS = {
    "triton": (attention_fwd, attention_bwd),
    "cuda": (
        cuda_contract(attention_fwd, _attention_fwd_fake),
        cuda_contract(attention_bwd, _attention_bwd_fake),
    ),
}
