"""Cross-entropy of logits, forward and backward.

    s = logits, or softcap * tanh(logits / softcap);   lse = logsumexp(s);   p = exp(s - lse)
    loss = (1 - e) * w[y] * (lse - s[y]) + e / N * sum_c w[c] * (lse - s[c]) + z * w[y] * lse^2
    ds   = dloss * (p * (w[y] * (1 - e + 2 * z * lse) + e / N * sum(w))
                    - [c = y] * w[y] * (1 - e) - e / N * w[c])

with e the label smoothing, w the class weights and z the weight of the z-loss. The forward reads
each logit once (online softmax over blocks of columns); the backward reads it once more and writes
its gradient. lse is kept as its two parts, since rounding their sum would round p with it.

That is the least there is while logits may not be overwritten. Rows of an odd number of classes
begin anywhere; their blocks begin at multiples of 16 bytes all the same, and all but the first and
last of a row are loaded and stored 16 bytes at a time.

Rows whose target is ignore_index are not read: their loss and gradient are 0. A target outside the
vocabulary reads nothing outside, and its row's loss and gradient are NaN.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867;
Szegedy et al., arXiv:1512.00567 (label smoothing).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.configs import ceil_div, loss_config
from fastlm.kernels.primitives import exp, tanh


@triton.jit
def load_targets(target_ptr, rows, mask_m, N, ignore_index):
    """Targets of a tile of rows, which rows count, and which of these name a class. [BLOCK_M]"""
    target = tl.load(target_ptr + rows, mask=mask_m, other=0).to(tl.int64)
    active = mask_m & (target != ignore_index)
    return target, active, active & (target >= 0) & (target < N)


@triton.jit
def _row_start(rows, M, stride_lb, stride_lm):
    # Division in int32: in int64 it is a long sequence that makes some kernels spill.
    return (rows // M).to(tl.int64) * stride_lb + (rows % M).to(tl.int64) * stride_lm


@triton.jit
def _cap(s, mask, softcap, HAS_SOFTCAP: tl.constexpr):
    """(s, ds/dlogits): capped, -inf and 0 outside the mask.

    The slope is 1 - tanh^2 without its cancellation, which would cost the digits of large logits.
    """
    slope = tl.zeros_like(s) + 1.0
    if HAS_SOFTCAP:
        u = tl.where(mask, s / softcap, 0.0)
        e = tl.exp(-2.0 * tl.abs(u))
        slope = tl.where(mask, 4.0 * e / ((1.0 + e) * (1.0 + e)), 0.0)
        s = tl.where(mask, softcap * tanh(u), -float("inf"))
    return s, slope


@triton.jit
def load_scores(logits_ptr, offsets, mask, softcap, HAS_SOFTCAP: tl.constexpr):
    """(s, ds/dlogits) in fp32; s is -inf outside the mask. The slope is 1 without softcap."""
    s = tl.load(logits_ptr + offsets, mask=mask, other=-float("inf")).to(tl.float32)
    return _cap(s, mask, softcap, HAS_SOFTCAP)


@triton.jit
def _load_aligned(logits_ptr, base, start, whole, mask, softcap, HAS_SOFTCAP: tl.constexpr,
                  BLOCK_N: tl.constexpr):  # fmt: skip
    """`load_scores` of a block of one row from base + start on: at once where it is `whole`, for a
    mask whose edge may lie anywhere would load elements one by one. [1, BLOCK_N]"""
    offsets = base[:, None] + (start + tl.arange(0, BLOCK_N))[None, :]
    if whole:
        s = tl.load(logits_ptr + offsets).to(tl.float32)
    else:
        s = tl.load(logits_ptr + offsets, mask=mask, other=-float("inf")).to(tl.float32)
    return _cap(s, mask, softcap, HAS_SOFTCAP)


@triton.jit
def scan_rows(
    logits_ptr, row_start, target, active, valid, class_weight_ptr, N, readable,
    label_smoothing, z_loss, softcap,
    HAS_SMOOTHING: tl.constexpr, HAS_Z_LOSS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Reads a tile of rows once, in blocks of columns.

    Args:
        row_start: offsets of rows, int64. [BLOCK_M]
        target, active, valid: from `load_targets`. Rows that are not active are not read.
        readable: with PADDED, how many columns may be read, N of which are logits.
        UNIT: above 1, how many logits make 16 bytes, for one row that begins anywhere: blocks then
            begin at multiples of it, the first up to UNIT - 1 columns before the row.

    Returns:
        (loss, m, log_l, w_y): every row's loss, both parts of its lse, and w[y]. [BLOCK_M] each
    """
    EXACT: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    s_y, slope_y = load_scores(logits_ptr, row_start + target, valid, softcap, HAS_SOFTCAP)
    # Sums are of s - origin, so that an offset common to a row's logits costs no digits.
    origin = tl.where(s_y == -float("inf"), 0.0, s_y)
    weighted_s = tl.zeros([BLOCK_M], tl.float32)  # sum_c w[c] * (s[c] - origin)
    weight_sum = tl.zeros([BLOCK_M], tl.float32)
    # A tile of ignored rows has no columns to visit.
    before = 0
    if UNIT > 1:
        before = tl.max(row_start % UNIT, 0).to(tl.int32)
    end = N + before
    for start in range(0, tl.where(tl.max(active.to(tl.int32), 0) > 0, end, 0), BLOCK_N):
        cols = start - before + tl.arange(0, BLOCK_N)
        mask = active[:, None] & (cols < N)[None, :]
        offsets = row_start[:, None] + cols[None, :]
        if UNIT > 1:
            mask = mask & (cols >= 0)[None, :]
            whole = (start >= before) & (start + BLOCK_N <= end)
            base = row_start // UNIT * UNIT
            s, slope = _load_aligned(
                logits_ptr, base, start, whole, mask, softcap, HAS_SOFTCAP, BLOCK_N
            )
        elif PADDED:
            inside = active[:, None] & (cols < readable)[None, :]
            s, slope = load_scores(logits_ptr, offsets, inside, softcap, HAS_SOFTCAP)
            s = tl.where(mask, s, -float("inf"))
        else:
            s, slope = load_scores(logits_ptr, offsets, mask, softcap, HAS_SOFTCAP)
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)  # -inf - -inf is NaN
        l_i = l_i * exp(m_i - m_safe, EXACT) + tl.sum(exp(s - m_safe[:, None], EXACT), 1)
        m_i = m_new
        if HAS_SMOOTHING:
            s = tl.where(mask, s - origin[:, None], 0.0)
            named = (cols >= 0) & (cols < N)
            w = tl.where(named, 1.0, 0.0)
            if class_weight_ptr is not None:
                w = tl.load(class_weight_ptr + cols, mask=named, other=0.0).to(tl.float32)
            weighted_s += tl.sum(s * w[None, :], 1)
            weight_sum += tl.sum(w, 0)
    # Rows that were not read have loss 0 by numbers, not by 0 * inf.
    m_i = tl.where(active, m_i, 0.0)
    log_l = tl.log(tl.where(l_i == 0.0, 1.0, l_i))
    s_y = tl.where(valid, s_y, 0.0)
    w_y = tl.where(valid, 1.0, 0.0)
    if class_weight_ptr is not None:
        w_y = tl.load(class_weight_ptr + target, mask=valid, other=0.0).to(tl.float32)
    # m - s[y] first: it is exact where the target leads, and lse would round it away.
    loss = w_y * ((m_i - s_y) + log_l)
    if HAS_SMOOTHING:
        smooth = weight_sum * ((m_i - origin) + log_l) - weighted_s
        loss = (1.0 - label_smoothing) * loss + label_smoothing / N * smooth
    if HAS_Z_LOSS:
        loss += z_loss * w_y * (m_i + log_l) * (m_i + log_l)
    loss = tl.where(valid, loss, tl.where(active, float("nan"), 0.0))
    return loss, m_i, log_l, w_y


@triton.jit
def score_gradients(
    s, slope, m, log_l, dloss, w_y, target, active, valid, cols, class_weight_ptr, weight_sum_ptr,
    N, label_smoothing, z_loss,
    HAS_SMOOTHING: tl.constexpr, HAS_Z_LOSS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of logits; 0 in ignored rows, NaN where the target is no class.

    EXACT: of `exp`, for logits in fp32.
    """
    p = exp((s - m[:, None]) - log_l[:, None], EXACT)
    on_target = w_y
    if HAS_SMOOTHING:
        on_target = w_y * (1.0 - label_smoothing)
    on_p = on_target
    if HAS_Z_LOSS:
        on_p += w_y * (2.0 * z_loss) * (m + log_l)
    if HAS_SMOOTHING:
        if class_weight_ptr is not None:
            on_p += label_smoothing / N * tl.load(weight_sum_ptr)
        else:
            on_p += label_smoothing
    ds = p * on_p[:, None]
    target = tl.where(valid, target, -1).to(tl.int32)
    ds -= tl.where(cols[None, :] == target[:, None], on_target[:, None], 0.0)
    if HAS_SMOOTHING:
        w = tl.full([BLOCK_N], 1.0, tl.float32)
        if class_weight_ptr is not None:
            named = (cols >= 0) & (cols < N)
            w = tl.load(class_weight_ptr + cols, mask=named, other=0.0).to(tl.float32)
        ds -= (label_smoothing / N * w)[None, :]
    ds = ds * dloss[:, None]
    if HAS_SOFTCAP:
        ds *= slope
    bad = tl.where(active, float("nan"), 0.0)
    return tl.where(valid[:, None], ds, bad[:, None])


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr, target_ptr, class_weight_ptr, loss_ptr, row_max_ptr, log_sum_ptr, row_weight_ptr,
    stride_lb, stride_lm, M, N, rows_total, ignore_index, label_smoothing, z_loss, softcap,
    HAS_SMOOTHING: tl.constexpr, HAS_Z_LOSS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of rows in blocks of columns: every row's loss, both parts of its lse, and w[y].

    Bytes an element of e: the logit is read, e: 2 for halves. A row: its target, 4 or 8, the
    target's logit once more, and 16 for what is written.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < rows_total
    target, active, valid = load_targets(target_ptr, rows, mask_m, N, ignore_index)
    row_start = _row_start(rows, M, stride_lb, stride_lm)
    loss, m, log_l, w_y = scan_rows(
        logits_ptr, row_start, target, active, valid, class_weight_ptr, N, N,
        label_smoothing, z_loss, softcap, HAS_SMOOTHING, HAS_Z_LOSS, HAS_SOFTCAP, False,
        UNIT, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    tl.store(loss_ptr + rows, loss, mask=mask_m)
    tl.store(row_max_ptr + rows, m, mask=mask_m)
    tl.store(log_sum_ptr + rows, log_l, mask=mask_m)
    tl.store(row_weight_ptr + rows, w_y, mask=mask_m)


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr, target_ptr, class_weight_ptr, weight_sum_ptr, row_max_ptr, log_sum_ptr, dloss_ptr,
    dlogits_ptr,
    stride_lb, stride_lm, M, N, rows_total, ignore_index, label_smoothing, z_loss, softcap,
    HAS_SMOOTHING: tl.constexpr, HAS_Z_LOSS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of dlogits. With UNIT above 1 logits are contiguous, and a row's blocks begin where
    `scan_rows` has them, in both tensors.

    Bytes an element of e: reads the logit, writes its gradient: 2 e, 4 for halves; of an ignored
    row e. A row for each block of columns: its target, 4 or 8, and 12 for lse and dloss.
    """
    blocks_n = tl.cdiv(N + UNIT - 1, BLOCK_N)
    rows = (tl.program_id(0) // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = (tl.program_id(0) % blocks_n) * BLOCK_N
    out_start = rows.to(tl.int64) * N
    before = 0
    if UNIT > 1:
        before = tl.max(out_start % UNIT, 0).to(tl.int32)
    cols = start - before + tl.arange(0, BLOCK_N)
    mask_m, mask_n = rows < rows_total, (cols >= 0) & (cols < N)
    target, active, valid = load_targets(target_ptr, rows, mask_m, N, ignore_index)
    m = tl.load(row_max_ptr + rows, mask=valid, other=0.0)
    log_l = tl.load(log_sum_ptr + rows, mask=valid, other=0.0)
    dloss = tl.load(dloss_ptr + rows, mask=valid, other=0.0)
    w_y = tl.full([BLOCK_M], 1.0, tl.float32)
    if class_weight_ptr is not None:
        w_y = tl.load(class_weight_ptr + target, mask=valid, other=0.0).to(tl.float32)
    row_start = _row_start(rows, M, stride_lb, stride_lm)
    mask = valid[:, None] & mask_n[None, :]
    whole = (start >= before) & (start + BLOCK_N <= N + before)
    if UNIT > 1:
        read = whole & (tl.max(valid.to(tl.int32), 0) > 0)
        s, slope = _load_aligned(logits_ptr, out_start // UNIT * UNIT, start, read, mask, softcap,
                                 HAS_SOFTCAP, BLOCK_N)  # fmt: skip
    else:
        offsets = row_start[:, None] + cols[None, :]
        s, slope = load_scores(logits_ptr, offsets, mask, softcap, HAS_SOFTCAP)
    ds = score_gradients(
        s, slope, m, log_l, dloss, w_y, target, active, valid, cols, class_weight_ptr,
        weight_sum_ptr, N, label_smoothing, z_loss, HAS_SMOOTHING, HAS_Z_LOSS, HAS_SOFTCAP,
        logits_ptr.dtype.element_ty == tl.float32, BLOCK_N,
    )  # fmt: skip
    ds = ds.to(dlogits_ptr.dtype.element_ty)
    mask = mask_m[:, None] & mask_n[None, :]
    if UNIT > 1:
        base = (out_start // UNIT * UNIT)[:, None] + (start + tl.arange(0, BLOCK_N))[None, :]
        if whole:
            tl.store(dlogits_ptr + base, ds)
        else:
            tl.store(dlogits_ptr + base, ds, mask=mask)
    else:
        tl.store(dlogits_ptr + out_start[:, None] + cols[None, :], ds, mask=mask)


def cross_entropy_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, row_max, log_sum, row_weight), fp32 and shaped as target; row_max + log_sum is lse.

    Args:
        logits: (outer, inner, vocab), last stride 1, the other two any.
        target: (outer, inner), contiguous integers.
        class_weight: (vocab,), contiguous, or None.
    """
    shape, rows = target.shape, target.numel()
    loss, row_max, log_sum, row_weight = (
        torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(4)
    )
    if rows == 0:
        return loss, row_max, log_sum, row_weight
    N = logits.shape[2]
    config = loss_config(N, softcap is not None)
    unit = _unit(logits, config.block_m)
    _cross_entropy_fwd_kernel[(ceil_div(rows, config.block_m),)](
        logits, target, class_weight, loss, row_max, log_sum, row_weight,
        logits.stride(0), logits.stride(1), shape[1], N, rows, ignore_index,
        label_smoothing, z_loss, 1.0 if softcap is None else softcap,
        HAS_SMOOTHING=label_smoothing > 0.0, HAS_Z_LOSS=z_loss > 0.0,
        HAS_SOFTCAP=softcap is not None, enable_fp_fusion=True, UNIT=unit,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip
    return loss, row_max, log_sum, row_weight


def cross_entropy_bwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    dloss: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> torch.Tensor:
    """dlogits, contiguous, in the logits' dtype; `dloss` is fp32, shaped as target, any strides."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows, N = target.numel(), logits.shape[2]
    if rows == 0:
        return dlogits
    weight_sum = None
    if class_weight is not None and label_smoothing > 0.0:
        weight_sum = class_weight.sum(dtype=torch.float32)
    config = loss_config(N, softcap is not None)
    unit = _unit(logits, config.block_m) if logits.is_contiguous() else 1
    grid = (ceil_div(rows, config.block_m) * ceil_div(N + unit - 1, config.block_n),)
    _cross_entropy_bwd_kernel[grid](
        logits, target, class_weight, weight_sum, row_max, log_sum, dloss.contiguous(), dlogits,
        logits.stride(0), logits.stride(1), target.shape[1], N, rows, ignore_index,
        label_smoothing, z_loss, 1.0 if softcap is None else softcap,
        HAS_SMOOTHING=label_smoothing > 0.0, HAS_Z_LOSS=z_loss > 0.0,
        HAS_SOFTCAP=softcap is not None, enable_fp_fusion=True, UNIT=unit,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
    )  # fmt: skip
    return dlogits


def _unit(logits: torch.Tensor, rows: int) -> int:
    """`UNIT` of `scan_rows`: 1 for rows that begin at multiples of 16 bytes, and for tiles."""
    unit = 16 // logits.element_size()
    aligned = all(n % unit == 0 for n in (logits.shape[2], *logits.stride()[:2]))
    return 1 if aligned or rows > 1 else unit
