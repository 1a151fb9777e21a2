"""Attention's probabilities, recomputed from lse, and their backward.

    w = keep * exp(score(q k^T) - lse), 0 where forbidden;  keep: 1 / (1 - dropout_p) or 0
    ds = w * dw;  dlse = -sum_keys ds
    dq = scale * (ds * score') k;  dk = scale * (ds * score')^T q

One program computes one tile of w; tiles that no row may see by its place are only filled. The
backward reads dw twice, for dq with dlse and for dk, and recomputes w: nothing else has its size.
Deterministic, without atomics: dk goes over the queries of every head that shares the key head, in
fp32. Gradients of biases, tables and slopes: attention_dbias.py. Scores: attention_scores.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.attention_configs import attention_config
from fastlm.kernels.attention_dbias import attention_dalibi, attention_dbias, attention_dtable
from fastlm.kernels.attention_scores import (
    OPTIONS_RUNTIME,
    Options,
    key_ranges,
    logits,
    option_arguments,
    probabilities,
    seen_keys,
    sequence,
    zero_rows,
)
from fastlm.kernels.configs import aligned_strides, ceil_div, dot_precision, next_power_of_2
from fastlm.kernels.launch import launch
from fastlm.kernels.primitives import (
    add_dot,
    dot,
    dropout_keep,
    load_pairs,
    load_rows,
    store_pairs,
    store_rows,
    tile_and_head,
)

# Lengths, head counts and strides vary from call to call: one binary serves them all.
RUNTIME = ["H", "GROUP", "M", "N", *OPTIONS_RUNTIME]
RUNTIME += [f"stride_{x}" for x in ("qb", "qm", "qh", "kb", "kn", "kh", "wb", "wm", "wh")]


@triton.jit
def _weights(
    q, k, lse, rows, start, M, n_k, diagonal, first_key, last_key, scale, batch, head, options,
    seed_ptr, threshold, dropout_scale, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(w, score', allowed) of a tile, [BLOCK_M, BLOCK_N]; where not allowed, w is 0.

    score' may be NaN there, and is a number if it is 1 everywhere.
    """
    local = tl.arange(0, BLOCK_N)
    s = dot(q, tl.trans(k), PRECISION)
    s, slope = logits(
        s, rows[:, None], start, local[None, :], M, n_k, diagonal, scale, batch, head, options
    )
    w = probabilities(s, lse[:, None], None)
    if seed_ptr is not None:
        keep = dropout_keep(tl.load(seed_ptr), threshold, batch, head, rows, start, BLOCK_N)
        w = tl.where(keep, w * dropout_scale, 0.0)
    cols = (start + local)[None, :]
    allowed = (cols >= first_key[:, None]) & (cols <= last_key[:, None]) & (s != float("-inf"))
    return tl.where(allowed, w, 0.0), slope, allowed


@triton.jit(do_not_specialize=RUNTIME)
def _attention_weights_fwd_kernel(
    q_ptr, k_ptr, lse_ptr, w_ptr,
    stride_qb: tl.int64, stride_qm: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int64, stride_kh: tl.int64,
    stride_wb: tl.int64, stride_wm: tl.int64, stride_wh: tl.int64,
    H, GROUP, M, N, scale,
    mask_ptr, stride_mask_b: tl.int64, stride_mask_h: tl.int64, stride_mask_m,
    stride_mask_n: tl.int64, bias_ptr, stride_bias_b: tl.int64, stride_bias_h: tl.int64,
    stride_bias_m, stride_bias_n: tl.int64, values_ptr, extent, slopes_ptr,
    stride_sb: tl.int64, softcap, cu_q_ptr, cu_k_ptr, seqlens_k_ptr, seed_ptr,
    threshold: tl.uint32, dropout_scale, left, right, bottom_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PLAIN: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, UNIT_W: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of w. Strides count UNIT elements, those of w UNIT_W.

    Bytes a pair of elements of e: w is written, e, and D e / BLOCK_N of q and D e / BLOCK_M of k
    are read, which tiles in work at a time share in the L2 cache; 4 / BLOCK_N of lse.
    """
    tiles_n, tiles_m = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    start = tl.program_id(0) % tiles_n * BLOCK_N
    first_row = tl.program_id(0) // tiles_n % tiles_m * BLOCK_M
    batch_head = tl.program_id(0) // (tiles_n * tiles_m)
    batch = (batch_head // H).to(tl.int64)
    head = (batch_head % H).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    first_q, first_k, n_q, n_k, diagonal = sequence(
        batch, M, N, cu_q_ptr, cu_k_ptr, seqlens_k_ptr, bottom_right
    )
    options = (
        mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
        bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
        values_ptr, extent, slopes_ptr, stride_sb, softcap,
    )  # fmt: skip
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    k_ptr += (batch * stride_kb + head // GROUP * stride_kh) * UNIT
    w_ptr += (batch * stride_wb + head * stride_wh) * UNIT_W
    lse_ptr += (batch * H + head) * M
    begin, full, full_end, low, end = key_ranges(
        first_row, BLOCK_M, M, n_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    first_key, last_key = seen_keys(rows, n_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT)

    w = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if (start < end) & (start + BLOCK_N > low):
        q = load_rows(q_ptr, first_row, stride_qm * UNIT, M, BLOCK_M, D, BLOCK_D, True)
        k = load_rows(k_ptr, start, stride_kn * UNIT, end, BLOCK_N, D, BLOCK_D, True, low, HAS_LEFT)
        lse = tl.load(lse_ptr + rows, mask=rows < M, other=float("inf"))
        w, slope, allowed = _weights(
            q, k, lse, rows, start, M, n_k, diagonal, first_key, last_key, scale, batch, head,
            options, seed_ptr, threshold, dropout_scale, PRECISION, BLOCK_N,
        )  # fmt: skip
    store_pairs(w_ptr, first_row, start, stride_wm, M, N, w, UNIT_W, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=RUNTIME)
def _attention_weights_bwd_dq_kernel(
    q_ptr, k_ptr, lse_ptr, dw_ptr, dq_ptr, dlse_ptr,
    stride_qb: tl.int64, stride_qm: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int64, stride_kh: tl.int64,
    stride_wb: tl.int64, stride_wm: tl.int64, stride_wh: tl.int64,
    H, GROUP, M, N, scale,
    mask_ptr, stride_mask_b: tl.int64, stride_mask_h: tl.int64, stride_mask_m,
    stride_mask_n: tl.int64, bias_ptr, stride_bias_b: tl.int64, stride_bias_h: tl.int64,
    stride_bias_m, stride_bias_n: tl.int64, values_ptr, extent, slopes_ptr,
    stride_sb: tl.int64, softcap, cu_q_ptr, cu_k_ptr, seqlens_k_ptr, seed_ptr,
    threshold: tl.uint32, dropout_scale, left, right, bottom_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PLAIN: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, UNIT_W: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq and dlse of one tile of queries of one head. Strides as in the forward.

    Bytes a pair of elements of e: dw is read, e, and D e / BLOCK_M of k, from the L2 cache. A row:
    q and dq, 2 D e, and 8 of lse and dlse.
    """
    tile, batch_head = tile_and_head(tl.program_id(0), tl.cdiv(M, BLOCK_M), True, 1)
    batch = (batch_head // H).to(tl.int64)
    head = (batch_head % H).to(tl.int64)
    first_row = tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    first_q, first_k, n_q, n_k, diagonal = sequence(
        batch, M, N, cu_q_ptr, cu_k_ptr, seqlens_k_ptr, bottom_right
    )
    options = (
        mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
        bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
        values_ptr, extent, slopes_ptr, stride_sb, softcap,
    )  # fmt: skip
    q_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    k_ptr += (batch * stride_kb + head // GROUP * stride_kh) * UNIT
    dw_ptr += (batch * stride_wb + head * stride_wh) * UNIT_W
    dq_ptr += (batch * M * H + head) * D
    stats = (batch * H + head) * M + rows
    begin, full, full_end, low, end = key_ranges(
        first_row, BLOCK_M, M, n_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    first_key, last_key = seen_keys(rows, n_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT)

    q = load_rows(q_ptr, first_row, stride_qm * UNIT, M, BLOCK_M, D, BLOCK_D, True)
    lse = tl.load(lse_ptr + stats, mask=rows < M, other=float("inf"))
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dlse = tl.zeros([BLOCK_M], tl.float32)
    if begin < end:  # see `_attend`
        for start in range(begin, end, BLOCK_N):
            k = load_rows(
                k_ptr, start, stride_kn * UNIT, end, BLOCK_N, D, BLOCK_D, True, low, HAS_LEFT
            )
            w, slope, allowed = _weights(
                q, k, lse, rows, start, M, n_k, diagonal, first_key, last_key, scale, batch, head,
                options, seed_ptr, threshold, dropout_scale, PRECISION, BLOCK_N,
            )  # fmt: skip
            dw = load_pairs(dw_ptr, first_row, start, stride_wm, M, N, UNIT_W, BLOCK_M, BLOCK_N)
            ds = tl.where(allowed, w * dw, 0.0)
            dlse -= tl.sum(ds, 1)
            ds = tl.where(allowed, ds * slope, 0.0)
            if mask_ptr is not None or bias_ptr is not None:
                # Keys that no row of the tile sees may hold NaN, and 0 * NaN is NaN.
                k = zero_rows(k, tl.max(allowed.to(tl.int32), 0))
            dq = add_dot(dq, ds.to(k.dtype), k, PRECISION, False)
    dq *= scale
    store_rows(dq_ptr, first_row, H.to(tl.int64) * D, M, dq, BLOCK_M, D, BLOCK_D)
    tl.store(dlse_ptr + stats, dlse, mask=rows < M)


@triton.jit(do_not_specialize=RUNTIME)
def _attention_weights_bwd_dk_kernel(
    q_ptr, k_ptr, lse_ptr, dw_ptr, dk_ptr,
    stride_qb: tl.int64, stride_qm: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int64, stride_kh: tl.int64,
    stride_wb: tl.int64, stride_wm: tl.int64, stride_wh: tl.int64,
    H, GROUP, M, N, scale,
    mask_ptr, stride_mask_b: tl.int64, stride_mask_h: tl.int64, stride_mask_m,
    stride_mask_n: tl.int64, bias_ptr, stride_bias_b: tl.int64, stride_bias_h: tl.int64,
    stride_bias_m, stride_bias_n: tl.int64, values_ptr, extent, slopes_ptr,
    stride_sb: tl.int64, softcap, cu_q_ptr, cu_k_ptr, seqlens_k_ptr, seed_ptr,
    threshold: tl.uint32, dropout_scale, left, right, bottom_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PLAIN: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, UNIT_W: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk of one block of keys of one key head, over all query heads of its group.

    Bytes a pair of elements of e: dw is read, e, and (D e + 4) / BLOCK_N of q and lse, from the L2
    cache. A key: k and dk, 2 D e.
    """
    tile, batch_head = tile_and_head(tl.program_id(0), tl.cdiv(N, BLOCK_N), False, 1)
    H_K = H // GROUP
    batch = (batch_head // H_K).to(tl.int64)
    head_k = (batch_head % H_K).to(tl.int64)
    start = tile * BLOCK_N
    first_q, first_k, n_q, n_k, diagonal = sequence(
        batch, M, N, cu_q_ptr, cu_k_ptr, seqlens_k_ptr, bottom_right
    )
    options = (
        mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
        bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
        values_ptr, extent, slopes_ptr, stride_sb, softcap,
    )  # fmt: skip
    q_ptr += batch * stride_qb * UNIT
    k_ptr += (batch * stride_kb + head_k * stride_kh) * UNIT
    dw_ptr += batch * stride_wb * UNIT_W
    lse_ptr += batch * H * M

    # Keys below `low` and from `seen` on are seen by no row, rows below `begin` and from `end` on
    # see none of these keys; they may hold NaN.
    seen, low, begin, end = n_k, 0, 0, M
    if HAS_RIGHT:
        seen = tl.minimum(n_k, M + diagonal + right)
        begin = tl.maximum(start - diagonal - right, 0)
    if HAS_LEFT:
        low = diagonal - left
        end = tl.minimum(M, tl.minimum(start + BLOCK_N, n_k) - diagonal + left)
    end = tl.where(start < seen, end, 0)
    first_tile = begin // BLOCK_M
    count = tl.maximum(tl.cdiv(end, BLOCK_M) - first_tile, 0)
    k = load_rows(k_ptr, start, stride_kn * UNIT, seen, BLOCK_N, D, BLOCK_D, True, low, HAS_LEFT)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    head = head_k * GROUP
    tile = first_tile
    if count > 0:  # see `_attend`
        for _ in range(0, GROUP * count):
            first_row = tile * BLOCK_M
            rows = first_row + tl.arange(0, BLOCK_M)
            first_key, last_key = seen_keys(rows, n_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT)
            q_at = q_ptr + head * stride_qh * UNIT
            q = load_rows(
                q_at, first_row, stride_qm * UNIT, end, BLOCK_M, D, BLOCK_D, True, begin, HAS_RIGHT
            )
            lse = tl.load(lse_ptr + head * M + rows, mask=rows < M, other=float("inf"))
            w, slope, allowed = _weights(
                q, k, lse, rows, start, M, n_k, diagonal, first_key, last_key, scale, batch, head,
                options, seed_ptr, threshold, dropout_scale, PRECISION, BLOCK_N,
            )  # fmt: skip
            dw_at = dw_ptr + head * stride_wh * UNIT_W
            dw = load_pairs(dw_at, first_row, start, stride_wm, M, N, UNIT_W, BLOCK_M, BLOCK_N)
            ds = tl.where(allowed, w * dw * slope, 0.0)
            if mask_ptr is not None or bias_ptr is not None:
                q = zero_rows(q, tl.max(allowed.to(tl.int32), 1))
            dk = add_dot(dk, tl.trans(ds.to(q.dtype)), q, PRECISION)
            tile += 1
            head += tl.where(tile == first_tile + count, 1, 0)
            tile = tl.where(tile == first_tile + count, first_tile, tile)
    dk *= scale
    dk_ptr += (batch * N * H_K + head_k) * D
    store_rows(dk_ptr, start, H_K.to(tl.int64) * D, N, dk, BLOCK_N, D, BLOCK_D)


def attention_weights_fwd(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, options: Options
) -> torch.Tensor:
    """Launches the forward.

    Args:
        q: (batch, seqlen_q, nheads, headdim), last stride 1, as is
        k: (batch, seqlen_k, nheads_k, headdim); nheads is a multiple of nheads_k.
        lse: fp32 (batch, nheads, seqlen_q), contiguous.

    Returns:
        w (batch, nheads, seqlen_q, seqlen_k), contiguous, in the dtype of q.
    """
    batch, seqlen_q, nheads, _ = q.shape
    w = q.new_empty((batch, nheads, seqlen_q, k.shape[1]))
    if w.numel():
        _launch("fwd", (q, k, lse, w), *_arguments(q, k, w, options), options.burden)
    return w


def attention_weights_bwd(
    dw: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    need_dq: bool,
    need_dk: bool,
    need_dbias: bool,
    need_dtable: bool,
    need_dalibi: bool,
) -> tuple[torch.Tensor, ...]:
    """Launches the backward.

    Args:
        dw: gradient of w, any strides; q, k, lse, options: as in the forward.
        need_...: what is not needed is returned with 0 elements; need_dq stands for dlse too.

    Returns:
        dq, dk, dlse, dbias, dtable, dalibi, contiguous, each in its input's dtype and shape.
    """
    if dw.stride(-1) != 1:  # such as the expanded gradient of a sum
        dw = dw.contiguous()
    dq, dlse = (x.new_empty(x.shape if need_dq else (0,)) for x in (q, lse))
    dk = k.new_empty(k.shape if need_dk else (0,))
    strides, call = _arguments(q, k, dw, options)
    if dq.numel():
        _launch("dq", (q, k, lse, dw, dq, dlse), strides, call, options.burden + 2)
    if dk.numel():
        _launch("dk", (q, k, lse, dw, dk), strides, call, options.burden + 2)
    # What attention_dbias.py takes: dw in the place of do v^T, from which no delta is subtracted.
    pairs = (
        (q, k, None, dw, lse, None, None),
        [*strides[:6], 0, 0, 0, *strides[6:]],
        q.shape[0],
        call | {"T": call["M"], "DV": call["D"], "BLOCK_DV": call["BLOCK_D"]},
    )
    none = q.new_empty((0,), dtype=torch.float32)
    return (
        dq,
        dk,
        dlse,
        attention_dbias(options, None, *pairs) if need_dbias else none,
        attention_dtable(options, *pairs) if need_dtable else none.clone(),
        attention_dalibi(options.alibi_slopes, *pairs) if need_dalibi else none.clone(),
    )


def _arguments(q, k, w, options: Options) -> tuple[list[int], dict]:
    """Strides (batch, seqlen, heads) of q, k and w, and the keyword arguments of all kernels.

    Args:
        w: the weights or their gradient. Its strides count 16 bytes or one element: two variants,
            where every unit between would be one more for some lengths.
    """
    headdim = q.shape[-1]
    unit, strides = aligned_strides(q, k)
    unit_w, strides_w = aligned_strides(w.transpose(1, 2))
    if unit_w * w.element_size() != 16 or w.shape[-1] % unit_w:
        unit_w, strides_w = 1, [unit_w * stride for stride in strides_w]
    return strides + strides_w, dict(
        H=q.shape[2],
        GROUP=q.shape[2] // k.shape[2],
        M=q.shape[1],
        N=k.shape[1],
        scale=options.softmax_scale,
        **option_arguments((q.shape[1], k.shape[1]), q.dtype, options),
        D=headdim,
        UNIT=unit,
        UNIT_W=unit_w,
        PRECISION=dot_precision(q.dtype),
        BLOCK_D=max(16, next_power_of_2(headdim)),
    )


def _launch(which: str, tensors, strides, call: dict, burden: int) -> None:
    q, k = tensors[:2]
    config = attention_config(which, q.device, call["D"], q.dtype, call["UNIT"], burden)
    tiles_m, tiles_n = ceil_div(call["M"], config.block_m), ceil_div(call["N"], config.block_n)
    kernel, programs = {
        "fwd": (_attention_weights_fwd_kernel, tiles_m * tiles_n * call["H"]),
        "dq": (_attention_weights_bwd_dq_kernel, tiles_m * call["H"]),
        "dk": (_attention_weights_bwd_dk_kernel, tiles_n * k.shape[2]),
    }[which]
    launch(kernel, programs * q.shape[0], *tensors, *strides, **call, **config.options())
