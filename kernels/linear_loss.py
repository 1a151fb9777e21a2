"""Cross-entropy of a linear head without its logits: chunks of tokens, kept rows alone.

    logits = x @ weight.T + bias;  loss, ds: as in kernels/loss.py
    dx = ds @ weight;  dweight = ds.T @ x;  dbias = sum_rows(ds)

Kept rows are gathered in order, on the device (kernels/compact.py). For each chunk of them:
  1. a product writes the logits of the chunk, rounded to the products' dtype as eager rounds them;
  2. one program a row reads it, gives the loss, reads it once more (from the L2 cache: few rows are
     in work at a time) and overwrites it with ds;
  3. products give dx, whose parts are added and put back into their rows, and add to dweight.
So the head is multiplied three times, as eager multiplies it, and logits cross the memory bus
5 times, as logits written and read, as ds written and read for each of two products (and once more
for dbias): 10 bytes an element of halves, 10.5 GB at 8,192 tokens by 128,256 classes.

Why these products are not cuBLAS's. How many rows are kept only the device knows, and the shapes
that cuBLAS gets come from the host: to leave ignored rows out it would have to wait. The tiles of
our own product return where the count ends, so 15 % of the rows cost 15 % of the time, and no
synchronisation. Calling cuBLAS for some chunks and this for others would need to know which.

Why chunks are as large as 512 MB allow. dweight is (vocab, dim), and each chunk reads and writes
it. A bf16 gradient is added to in fp32 and rounded once a chunk, at most 8 times; a second one in
fp32 would take twice the gradient's memory. For fp16, which would overflow, it is in fp32.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009 (the
idea of leaving ignored rows out); Hsu et al., "Liger Kernel", arXiv:2410.10989 (chunks, gradients
in the forward pass).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlm.kernels.compact import (
    ALIGNMENT,
    column_sum,
    compact,
    gather,
    is_aligned,
    new_partial,
    new_rows,
    padded_rows,
    rows_left,
    rows_outer,
    rows_times_matrix,
    rows_times_weight,
    scatter,
    with_unit_stride,
)
from fastlm.kernels.configs import (
    ceil_div,
    chunk_rows,
    matmul_config,
    matmul_splits,
    row_padding,
    wide_loss_config,
)
from fastlm.kernels.loss import load_scores, load_targets, scan_rows, score_gradients


@triton.jit
def _chunk_loss_kernel(
    logits_ptr, target_ptr, class_weight_ptr, weight_sum_ptr, dloss_ptr, total_ptr, index_ptr,
    count_ptr, loss_ptr,
    stride_lm, stride_t, stride_d, N, first, ROWS, ignore_index, label_smoothing, z_loss, softcap,
    HAS_SMOOTHING: tl.constexpr, HAS_Z_LOSS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    GRADIENTS: tl.constexpr, PADDING: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A row of a chunk: its loss, and with GRADIENTS ds in place of its logits. Behind the last
    kept row come rows of zeros, up to the next multiple of PADDING.

    Bytes an element of e: reads the logit, with GRADIENTS once more from the L2 cache, and writes
    ds: e, with GRADIENTS 2 e, 4 for halves, beside the cache's e.
    """
    row = tl.program_id(0)
    left = rows_left(count_ptr, first, ROWS)
    rows = row.to(tl.int64) + tl.arange(0, 1)
    row_start = rows * stride_lm
    if row < left:
        source = tl.load(index_ptr + first + rows).to(tl.int64)
        target, active, valid = load_targets(
            target_ptr, source * stride_t, source >= 0, N, ignore_index
        )
        loss, m, log_l, w_y = scan_rows(
            logits_ptr, row_start, target, active, valid, class_weight_ptr, N, stride_lm,
            label_smoothing, z_loss, softcap, HAS_SMOOTHING, HAS_Z_LOSS, HAS_SOFTCAP, True,
            1, 1, BLOCK_N,
        )  # fmt: skip
        tl.store(loss_ptr + source, loss)
        if GRADIENTS:
            dloss = tl.full([1], 1.0, tl.float32)
            if dloss_ptr is not None:
                dloss = tl.load(dloss_ptr + source * stride_d)
            if total_ptr is not None:  # the mean; of nothing, it is 0
                total = tl.load(total_ptr)
                dloss = tl.where(total == 0.0, 0.0, dloss / tl.where(total == 0.0, 1.0, total))
            for start in range(0, N, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                offsets = row_start[:, None] + cols[None, :]
                mask = (cols < stride_lm)[None, :]
                s, slope = load_scores(logits_ptr, offsets, mask, softcap, HAS_SOFTCAP)
                ds = score_gradients(
                    s, slope, m, log_l, dloss, w_y, target, active, valid, cols, class_weight_ptr,
                    weight_sum_ptr, N, label_smoothing, z_loss, HAS_SMOOTHING, HAS_Z_LOSS,
                    HAS_SOFTCAP, logits_ptr.dtype.element_ty == tl.float32, BLOCK_N,
                )  # fmt: skip
                tl.store(logits_ptr + offsets, ds, mask=mask)
    elif GRADIENTS and row < padded_rows(left, PADDING):
        for start in range(0, N, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            zeros = tl.zeros([1, BLOCK_N], tl.float32)
            tl.store(logits_ptr + row_start[:, None] + cols[None, :], zeros,
                     mask=(cols < stride_lm)[None, :])  # fmt: skip


@triton.jit
def _scale_kernel(x_ptr, scale_ptr, out_ptr, N, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """out = x * scale; in place there is nothing to do for a scale of 1.

    Bytes an element of e: reads x, writes out: 2 e, 4 for halves; where nothing is to do, 0.
    """
    scale = tl.load(scale_ptr).to(tl.float32)
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    works = True
    if IN_PLACE:
        works = scale != 1.0
    if works:
        x = tl.load(x_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + cols, x * scale, mask=cols < N)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a gradient is summed: its own, but for fp16, which may not hold it unscaled."""
    return torch.float32 if dtype == torch.float16 else dtype


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    dloss: torch.Tensor | None,
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    mean: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, total, dx, dweight, dbias): losses of rows, fp32; the sum (1,) of their weights w[y];
    gradients, each in `gradient_dtype` of its input's, dbias in fp32, empty where not needed.

    Allocates `workspace_bytes` beyond what it returns.

    Args:
        x, weight, bias, target: (tokens, dim), (vocab, dim), (vocab,), (tokens,), any strides.
        dloss: (tokens,) fp32, the incoming gradient of each loss; None: 1 each.
        dtype: of the products; a weight of another is copied.
        mean: gradients are those of the mean, and dloss of it.
    """
    (tokens, dim), vocab, device = x.shape, weight.shape[0], x.device
    gradients = need_dx or need_dweight or need_dbias
    new = lambda make, needed, shape, dtype: make(
        shape if needed else (0,), dtype=dtype, device=device
    )
    loss = torch.zeros(tokens, dtype=torch.float32, device=device)
    dx = new(torch.zeros, need_dx, (tokens, dim), gradient_dtype(x.dtype))
    first_touch = torch.zeros if tokens == 0 else torch.empty
    dweight = new(first_touch, need_dweight, (vocab, dim), gradient_dtype(weight.dtype))
    dbias = new(first_touch, need_dbias, (vocab,), torch.float32)
    if class_weight is not None:
        class_weight = class_weight.contiguous()
    index, count, total = compact(target, class_weight, ignore_index, vocab)
    weight = with_unit_stride(weight, dtype)
    rows = chunk_rows(tokens, vocab, dtype, device)
    x_c = new_rows(rows, dim, dtype, device)
    s = new_rows(rows, vocab, dtype, device)
    logits, aligned = s[:, :vocab], is_aligned(weight)
    head = {which: matmul_config(which, device, dtype, aligned) for which in ("logits", "dx")}
    partial = new_partial(rows, dim, vocab, head["dx"], device) if need_dx else None
    weight_sum = None
    if class_weight is not None and label_smoothing > 0.0:
        weight_sum = class_weight.sum(dtype=torch.float32)
    config = wide_loss_config(vocab, softcap is not None, device)
    for first in range(0, tokens, rows):
        gather(x, index, count, first, x_c)
        rows_times_weight(x_c[:, :dim], weight, bias, count, first, s, head["logits"])
        _chunk_loss_kernel[(rows,)](
            s, target, class_weight, weight_sum, dloss, total if mean else None, index, count, loss,
            s.stride(0), target.stride(0), 0 if dloss is None else dloss.stride(0), vocab, first,
            rows, ignore_index, label_smoothing, z_loss, 1.0 if softcap is None else softcap,
            HAS_SMOOTHING=label_smoothing > 0.0, HAS_Z_LOSS=z_loss > 0.0,
            HAS_SOFTCAP=softcap is not None, GRADIENTS=gradients,
            PADDING=row_padding(device), BLOCK_N=config.block_n, num_warps=config.num_warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        if need_dx:
            rows_times_matrix(logits, weight, count, first, partial, head["dx"])
            scatter(partial, index, count, first, dx)
        if need_dweight:
            rows_outer(logits, x_c[:, :dim], count, first, dweight, first > 0,
                       matmul_config("dweight", device, dtype))  # fmt: skip
        if need_dbias:
            column_sum(s, count, first, dbias, first > 0)
    return loss, total, dx, dweight, dbias


def workspace_bytes(
    tokens: int, dim: int, vocab: int, dtype: torch.dtype, device: torch.device, dx: bool = True,
    aligned: bool = True,
) -> int:  # fmt: skip
    """What `linear_cross_entropy` holds at a time beyond inputs, gradients and 8 bytes a token,
    where x and weight have the products' dtype: a chunk's rows, their logits, and dx in parts.

    aligned: `is_aligned(weight)`.
    """
    rows = chunk_rows(tokens, vocab, dtype, device)
    halves = sum(ceil_div(n, ALIGNMENT) * ALIGNMENT for n in (dim, vocab)) * dtype.itemsize
    splits = 0
    if dx:
        splits = matmul_splits(
            rows, dim, vocab, matmul_config("dx", device, dtype, aligned), device
        )
    return rows * (halves + 4 * splits * dim)


def scaled(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """out = x * scale, both contiguous; scale has one element. `out` may be x."""
    if x.numel():
        _scale_kernel[(ceil_div(x.numel(), 4096),)](
            x, scale, out, x.numel(), IN_PLACE=out.data_ptr() == x.data_ptr(), BLOCK=4096,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
