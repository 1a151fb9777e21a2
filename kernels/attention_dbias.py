"""Gradients of what is added to the scores: biases, `RelativeBias` tables, ALiBi slopes, sinks.

    ds = p * (keep * do v^T - delta), of score = cap(scale * q·k) + bias - slope * |distance|
    dbias = ds,  dslope = -sum ds * |distance|,  dtable[b] = sum over pairs in bucket b of ds,
    each summed over what it is broadcast along;  dsink = -sum exp(sink - lse) * delta

and for the weights themselves, p after dropout, ds = p * keep * dw.

Tiles of ds are recomputed and summed in registers: a program goes, in a fixed order, over the
batches, heads, rows and columns that share its piece of the result. Where that leaves too few
programs, each takes a part of the pieces' sum, and the parts are added afterwards. A bias that is
the same for all keys needs no tile: summed over keys, ds is dlse + exp(sink - lse) * delta. For
gradients in fp32, delta is computed as a sum of such tiles too. Nothing of size
(batch, nheads, seqlen_q, seqlen_k) is allocated unless the bias has that size itself.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastlm.kernels.attention_configs import attention_config, bucket_starts
from fastlm.kernels.attention_scores import (
    OPTIONS_RUNTIME,
    Options,
    logits,
    probabilities,
    seen_keys,
    sequence,
)
from fastlm.kernels.configs import ceil_div, multiprocessors, next_power_of_2
from fastlm.kernels.launch import launch
from fastlm.kernels.primitives import dot, dropout_keep, load_pairs, load_rows, relative_bucket

# Lengths, head counts and strides vary from call to call: one binary serves them all.
RUNTIME = ["H", "GROUP", "M", "N", "T", *OPTIONS_RUNTIME]
RUNTIME += ["OH", "kept_m", "kept_n", "LH", "loops_m", "loops_n", "loops", "splits", "size"]
RUNTIME += [f"stride_{x}{y}" for x in ("q", "do") for y in "bmh"]
RUNTIME += [f"stride_{x}{y}" for x in "kv" for y in "bnh"]


@triton.jit
def _gradient_of_weights(
    do_ptr, v_ptr, stride_dob, stride_dom, stride_doh, stride_vb, stride_vn, stride_vh, batch, head,
    head_k, first_q, first_k, first_row, start, n_q, end, N, DV: tl.constexpr, UNIT: tl.constexpr,
    UNIT_W: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A tile of do v^T; without v, of do (batch, M, nheads, N), whose strides count UNIT_W."""
    if v_ptr is None:
        do_ptr += (batch * stride_dob + head * stride_doh) * UNIT_W
        return load_pairs(do_ptr, first_row, start, stride_dom, n_q, N, UNIT_W, BLOCK_M, BLOCK_N)
    else:
        do_ptr += (batch * stride_dob + first_q * stride_dom + head * stride_doh) * UNIT
        v_ptr += (batch * stride_vb + first_k * stride_vn + head_k * stride_vh) * UNIT
        do = load_rows(do_ptr, first_row, stride_dom * UNIT, n_q, BLOCK_M, DV, BLOCK_DV, True)
        v = load_rows(v_ptr, start, stride_vn * UNIT, end, BLOCK_N, DV, BLOCK_DV, True)
        return dot(do, tl.trans(v), PRECISION)


@triton.jit
def _store_reduced(ptr, head, rows, cols, M, N, x, REDUCE_M: tl.constexpr, REDUCE_N: tl.constexpr):
    """Stores the sum of a tile of M x N over what is reduced, of one of the heads at `ptr`."""
    if REDUCE_M and REDUCE_N:
        tl.store(ptr + head, tl.sum(x).to(ptr.dtype.element_ty))
    elif REDUCE_M:
        out = tl.sum(x, 0).to(ptr.dtype.element_ty)
        tl.store(ptr + head * N + cols, out, mask=cols < N)
    elif REDUCE_N:
        out = tl.sum(x, 1).to(ptr.dtype.element_ty)
        tl.store(ptr + head * M + rows, out, mask=rows < M)
    else:
        offsets = (head * M + rows)[:, None] * N + cols[None, :]
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def _attention_dbias_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, lse_low_ptr, delta_ptr, out_ptr,
    stride_qb: tl.int64, stride_qm: tl.int64, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int64, stride_vh: tl.int64,
    stride_dob: tl.int64, stride_dom: tl.int64, stride_doh: tl.int64,
    H, GROUP, M, N, T, OH, kept_m, kept_n, LH, loops_m, loops_n, loops, splits, size: tl.int64,
    scale, mask_ptr, stride_mask_b: tl.int64, stride_mask_h: tl.int64, stride_mask_m,
    stride_mask_n: tl.int64, bias_ptr, stride_bias_b: tl.int64, stride_bias_h: tl.int64,
    stride_bias_m, stride_bias_n: tl.int64, values_ptr, extent, slopes_ptr, stride_sb: tl.int64,
    softcap, cu_q_ptr, cu_k_ptr, seqlens_k_ptr, seed_ptr, threshold: tl.uint32, dropout_scale, left,
    right, bottom_right, KIND: tl.constexpr, NUM_BUCKETS: tl.constexpr, STARTS: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr, REDUCE_M: tl.constexpr, REDUCE_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PLAIN: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
    UNIT_W: tl.constexpr = 1,
):  # fmt: skip
    """A piece of the gradient, or of `splits` parts of its sum one: `size` numbers each.

    The result has OH heads and kept_m by kept_n tiles; summed are LH heads of each, loops_m by
    loops_n tiles and the rest of `loops` batches. KIND: "bias", "table" (out is (buckets, OH)),
    "alibi" (out (batch, OH)), or "delta" (out (batch, OH, M) or packed). Bytes a tile of elements
    of e: reads (BLOCK_M + BLOCK_N) (D + DV) e, mostly from L2; without v, e a pair for do v^T."""
    split = tl.program_id(0) % splits
    piece = tl.program_id(0) // splits
    tile_n = piece % kept_n
    tile_m = piece // kept_n % kept_m
    out_head = (piece // (kept_n * kept_m) % OH).to(tl.int64)
    out_batch = (piece // (kept_n * kept_m * OH)).to(tl.int64)
    part = tl.cdiv(loops, splits)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    by_bucket = tl.zeros([BLOCK_T], tl.float32)
    buckets = tl.arange(0, BLOCK_T)
    for i in range(split * part, tl.minimum(split * part + part, loops)):
        start = (tile_n + i % loops_n) * BLOCK_N
        first_row = (tile_m + i // loops_n % loops_m) * BLOCK_M
        batch_head = i // (loops_n * loops_m)
        head = out_head + batch_head % LH
        batch = out_batch + batch_head // LH
        first_q, first_k, n_q, n_k, diagonal = sequence(
            batch, M, N, cu_q_ptr, cu_k_ptr, seqlens_k_ptr, bottom_right
        )
        end = n_k
        seen = True  # a branch would keep the loads out of the pipeline
        if HAS_LEFT or HAS_RIGHT or cu_q_ptr is not None or seqlens_k_ptr is not None:
            seen = (first_row < n_q) & (start < n_k)
        if HAS_RIGHT:
            last_row = tl.minimum(first_row + BLOCK_M, n_q) - 1
            end = tl.minimum(last_row + diagonal + right + 1, n_k)
            seen = seen & (start < end)
        if HAS_LEFT:
            seen = seen & (start + BLOCK_N > first_row + diagonal - left)
        if seen:
            rows = first_row + tl.arange(0, BLOCK_M)
            cols = start + tl.arange(0, BLOCK_N)
            head_k = head // GROUP
            q_at = q_ptr + (batch * stride_qb + first_q * stride_qm + head * stride_qh) * UNIT
            k_at = k_ptr + (batch * stride_kb + first_k * stride_kn + head_k * stride_kh) * UNIT
            stats = (batch * H + head) * T + rows
            if cu_q_ptr is not None:
                stats += first_q - batch * H * T
            q = load_rows(q_at, first_row, stride_qm * UNIT, n_q, BLOCK_M, D, BLOCK_D, True)
            k = load_rows(k_at, start, stride_kn * UNIT, end, BLOCK_N, D, BLOCK_D, True)
            s = dot(q, tl.trans(k), PRECISION)  # [BLOCK_M, BLOCK_N]
            options = (
                mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
                bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
                values_ptr, extent, slopes_ptr, stride_sb, softcap,
            )  # fmt: skip
            s, _ = logits(
                s, rows[:, None], start, tl.arange(0, BLOCK_N)[None, :], n_q, n_k, diagonal,
                scale, batch, head, options,
            )  # fmt: skip
            lse = tl.load(lse_ptr + stats, mask=rows < n_q, other=float("inf"))
            dp = _gradient_of_weights(
                do_ptr, v_ptr, stride_dob, stride_dom, stride_doh, stride_vb, stride_vn, stride_vh,
                batch, head, head_k, first_q, first_k, first_row, start, n_q, end, N, DV, UNIT,
                UNIT_W, PRECISION, BLOCK_M, BLOCK_N, BLOCK_DV,
            )  # fmt: skip
            if seed_ptr is not None:
                keep = dropout_keep(tl.load(seed_ptr), threshold, batch, head, rows, start, BLOCK_N)
                dp = tl.where(keep, dp * dropout_scale, 0.0)
            low = None
            if lse_low_ptr is not None:
                low = tl.load(lse_low_ptr + stats, mask=rows < n_q, other=0.0)[:, None]
            p = probabilities(s, lse[:, None], low)
            if delta_ptr is not None and KIND != "delta":
                dp -= tl.load(delta_ptr + stats, mask=rows < n_q, other=0.0)[:, None]
            ds = p * dp
            first_key, last_key = seen_keys(rows, n_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT)
            allowed = (cols[None, :] >= first_key[:, None]) & (cols[None, :] <= last_key[:, None])
            # Pairs that are not allowed, and rows without a key, may hold NaN.
            allowed = allowed & (s != float("-inf")) & (lse < float("inf"))[:, None]
            ds = tl.where(allowed, ds, 0.0)
            distance = cols[None, :] - rows[:, None] - diagonal
            if KIND == "bias" or KIND == "delta":
                acc += ds
            elif KIND == "alibi":
                acc -= ds * tl.abs(distance).to(tl.float32)
            else:
                bucket = relative_bucket(distance, STARTS, BIDIRECTIONAL)
                for b in range(tl.min(bucket), tl.max(bucket) + 1):
                    total = tl.sum(tl.where(bucket == b, ds, 0.0))
                    by_bucket += tl.where(buckets == b, total, 0.0)

    out_ptr += split * size
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    out_head += out_batch * OH
    if KIND == "table":
        tl.store(out_ptr + buckets * OH + out_head, by_bucket, mask=buckets < NUM_BUCKETS)
    elif KIND == "delta":
        stats = out_head * T + rows
        if cu_q_ptr is not None:
            stats += tl.load(cu_q_ptr + out_batch) - out_batch * OH * T
            M = tl.load(cu_q_ptr + out_batch + 1) - tl.load(cu_q_ptr + out_batch)
        tl.store(out_ptr + stats, tl.sum(acc, 1), mask=rows < M)
    else:
        _store_reduced(out_ptr, out_head, rows, cols, M, N, acc, REDUCE_M, REDUCE_N)


def _launch(kind, shape, dtype, tensors, strides, batch, call, extra=None, tile=None):
    """The gradient of something of `shape` (batch, nheads, seqlen_q, seqlen_k), each 1 or full.

    Args:
        tensors, strides, call: inputs and keyword arguments of `_attention_bwd_dq_kernel`.
        extra: constexprs of a table.
        tile: what a program stores, where not its share of `shape`; then that is (nheads, tile).
    """
    q = tensors[0]
    nheads, seqlen_q, seqlen_k = call["H"], call["M"], call["N"]
    out_b, out_h, out_m, out_n = shape
    result = tuple(shape) if tile is None else tile
    size = math.prod(result)
    if size * batch * seqlen_q * seqlen_k == 0:
        return torch.zeros(result, dtype=dtype, device=q.device)
    widest = max(call["D"], call["DV"])
    config = attention_config("dbias", q.device, widest, q.dtype, call["UNIT"], 0)
    tiles_m, tiles_n = ceil_div(seqlen_q, config.block_m), ceil_div(seqlen_k, config.block_n)
    kept_m, kept_n = (tiles_m if out_m > 1 else 1), (tiles_n if out_n > 1 else 1)
    loops_m, loops_n = tiles_m // kept_m, tiles_n // kept_n
    loops_h, loops_b = nheads // out_h, batch // out_b
    loops = loops_m * loops_n * loops_h * loops_b
    pieces = out_b * out_h * kept_m * kept_n
    splits = max(1, min(ceil_div(2 * multiprocessors(q.device), pieces), loops, 64))
    new = q.new_zeros if call["cu_q_ptr"] is not None else q.new_empty  # tokens of no sequence
    # One query has binaries of its own (no stride of masks along queries): in one dtype.
    stored = torch.float32 if splits > 1 or seqlen_q == 1 else dtype
    out = new((splits, *result), dtype=stored)
    if kind != "table":
        extra = {"NUM_BUCKETS": 1, "STARTS": (), "BIDIRECTIONAL": False, "BLOCK_T": 1}
    launch(
        _attention_dbias_kernel, pieces * splits,
        *tensors, out, *strides,
        OH=out_h,
        kept_m=kept_m,
        kept_n=kept_n,
        LH=loops_h,
        loops_m=loops_m,
        loops_n=loops_n,
        loops=loops,
        splits=splits,
        size=size,
        KIND=kind,
        REDUCE_M=out_m == 1 and (seqlen_q > 1 or kind != "bias"),
        REDUCE_N=out_n == 1 and (seqlen_k > 1 or kind != "bias"),
        **extra,
        **call,
        **config.options(),
    )  # fmt: skip
    return (out.sum(0) if splits > 1 else out[0]).to(dtype)


def attention_delta(tensors, strides, batch: int, call: dict) -> torch.Tensor:
    """sum over keys of p * (keep * do v^T), in the shape of lse.

    The same number as rowsum(do * out), from the very p and products that it is subtracted from
    again: their errors cancel in sums over keys, and `out` is not rounded first.
    """
    lse = tensors[4]
    shape = (batch, call["H"], call["M"], 1)
    return _launch("delta", shape, torch.float32, tensors, strides, batch, call, tile=lse.shape)


def attention_dbias(options: Options, dlse, tensors, strides, batch: int, call) -> torch.Tensor:
    """The gradient of a bias with four dimensions, of size 1 where broadcast, in its own shape."""
    bias = options.bias
    lse, lse_low, delta = tensors[4:7]
    if bias.shape[3] > 1 or options.cu_seqlens_q is not None or delta is None:
        return _launch("bias", bias.shape, bias.dtype, tensors, strides, batch, call)
    # What all keys of a row share moves lse alone, and the share of the sink.
    rows = torch.zeros_like(lse) if dlse is None else torch.where(lse == math.inf, 0.0, dlse)
    if options.sinks is not None:
        rows = rows + _sink_shares(options.sinks, lse, lse_low) * delta
    return rows[..., None].sum_to_size(bias.shape).to(bias.dtype)


def attention_dalibi(slopes: torch.Tensor, tensors, strides, batch: int, call: dict):
    """The gradient of slopes (nheads,) or (batch, nheads), in that shape."""
    shape = (batch if slopes.dim() == 2 else 1, slopes.shape[-1], 1, 1)
    out = _launch("alibi", shape, slopes.dtype, tensors, strides, batch, call)
    return out.reshape(slopes.shape)


def attention_dtable(options: Options, tensors, strides, batch: int, call: dict) -> torch.Tensor:
    """The gradient of a `RelativeBias` table (num_buckets, nheads)."""
    table, bidirectional = options.table, options.bidirectional
    buckets, nheads = table.shape
    extra = {
        "NUM_BUCKETS": buckets,
        "STARTS": bucket_starts(buckets, bidirectional, options.max_distance),
        "BIDIRECTIONAL": bidirectional,
        "BLOCK_T": next_power_of_2(buckets),
    }
    shape = (1, nheads, 1, 1)
    tile = (buckets, nheads)
    return _launch("table", shape, table.dtype, tensors, strides, batch, call, extra, tile)


def attention_dsinks(sinks: torch.Tensor, lse, lse_low, delta) -> torch.Tensor:
    """The gradient of sinks (nheads,).

    Args:
        lse, lse_low, delta: fp32 (batch, nheads, seqlen_q) or (nheads, tokens); for rows without
            keys lse is +inf and delta 0. lse_low may be None.
    """
    dims = tuple(i for i in range(lse.dim()) if i != lse.dim() - 2)
    return -(_sink_shares(sinks, lse, lse_low) * delta).sum(dims).to(sinks.dtype)


def _sink_shares(sinks, lse, lse_low):
    exponent = sinks.float()[:, None] - lse
    return torch.exp(exponent if lse_low is None else exponent - lse_low)
