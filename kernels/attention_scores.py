"""Scores of a tile with every option, for all attention kernels.

    s = softmax_scale * q·k, then softcap * tanh(s / softcap), + bias, - slope * |distance|

and -inf where a mask or a bias of -inf forbids the pair. Not in base 2: a score of 100 would lose
more to one more rounding than its probability in fp32 may. What a row may see by its place (causal,
window, lengths) is an interval of keys, which kernels apply themselves, to the few blocks that it
cuts.
Tiles have either orientation: `rows` and `cols` are [BLOCK_M, 1] and [1, BLOCK_N], or [1, BLOCK_M]
and [BLOCK_N, 1].

`options` is what the launcher's `option_arguments` gives to every kernel, under the same names:
None where a call does not use an option, which is then compiled away. PLAIN calls use none of these
and have half precision; kernels keep their scores in base 2 and do not call `logits`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlm.kernels.attention_configs import bucket_starts
from fastlm.kernels.configs import ceil_div, dropout_args, next_power_of_2
from fastlm.kernels.launch import launch
from fastlm.kernels.primitives import LOG2_E, load_rows, relative_bucket, tanh

# Lengths, head counts and strides vary from call to call: one binary serves them all. The stride of
# a mask's and a bias's keys is 1, or 0, mostly; knowing the 1 saves registers.
OPTIONS_RUNTIME = ["extent", "left", "right", "bottom_right", "seed_ptr", "threshold"]
OPTIONS_RUNTIME += [f"stride_{x}_{y}" for x in ("mask", "bias") for y in "bhm"] + ["stride_sb"]


class Options(NamedTuple):
    """The options of a call, as `fastlm::attention_fwd` describes them; the defaults: none."""

    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    table: torch.Tensor | None = None
    seqlens_k: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    causal: str = "none"
    softmax_scale: float = 1.0
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    bidirectional: bool = False
    max_distance: int = 0
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    @property
    def burden(self) -> int:
        """What the options take of a multiprocessor beside the scores, for `attention_config`.

        By the registers that the compiler wants: most for a mask or bias of its own for each pair.
        """
        light = [x is not None for x in (self.alibi_slopes, self.sinks)]
        light += [self.window_left >= 0, self.softcap > 0.0]
        burden = sum(light) + 2 * (self.table is not None) + 3 * (self.dropout_p > 0.0)
        for x, by_key in ((self.mask, 2), (self.bias, 3)):
            if x is not None:
                burden += 4 if _stride_along_queries(x) else by_key
        return burden


@triton.jit
def sequence(batch, M, N, cu_q_ptr, cu_k_ptr, seqlens_k_ptr, bottom_right):
    """(first_q, first_k, n_q, n_k, diagonal): where a sequence's tokens start in q and k, how many
    count, and what is added to a query's index to give the key at distance 0."""
    first_q = tl.zeros([], tl.int64)
    first_k = tl.zeros([], tl.int64)
    n_q = M
    n_k = N
    if cu_q_ptr is not None:
        first_q = tl.load(cu_q_ptr + batch).to(tl.int64)
        first_k = tl.load(cu_k_ptr + batch).to(tl.int64)
        n_q = (tl.load(cu_q_ptr + batch + 1) - first_q).to(tl.int32)
        n_k = tl.minimum((tl.load(cu_k_ptr + batch + 1) - first_k).to(tl.int32), N)
    if seqlens_k_ptr is not None:
        n_k = tl.minimum(n_k, tl.load(seqlens_k_ptr + batch).to(tl.int32))
    return first_q, first_k, tl.minimum(n_q, M), n_k, (n_k - n_q) * bottom_right


@triton.jit
def logits(s, rows, first_col, cols, M, N, diagonal, scale, batch, head, options):
    """(logits, slope): what `q·k` becomes, and its derivative over `scale`.

    Args:
        s: q·k of the tile, fp32. May be NaN where a mask or a bias forbids the pair.
        rows: indices of the tile's queries in their sequence.
        first_col, cols: an index of a key, and those of the tile's keys from there.
        M, N: masks and biases are read for rows below M and columns below N; others get anything.
        batch, head: int64.
        options: a tuple of the first 15 of `option_arguments`.

    Returns:
        logits: the score, -inf where forbidden by mask, bias or table.
        slope: 1, or with a softcap the derivative of the cap.
    """
    (mask_ptr, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
     bias_ptr, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n,
     values_ptr, extent, slopes_ptr, stride_sb, softcap) = options  # fmt: skip
    slope = 1.0
    if softcap is not None:
        t = tanh(s * (scale / softcap))
        s = t * softcap
        slope = 1.0 - t * t
    else:
        # By itself: fused with what is subtracted from it, it would be rounded otherwise in one
        # kernel than in another, and logits of thousands turn that into wrong probabilities.
        s = tl.fma(s, scale, 0.0)
    if values_ptr is not None or slopes_ptr is not None:
        distance = cols - rows + (first_col - diagonal)
        if slopes_ptr is not None:
            alibi = tl.load(slopes_ptr + batch * stride_sb + head).to(tl.float32)
            s -= alibi * tl.abs(distance).to(tl.float32)
        if values_ptr is not None:
            values_ptr += head * (2 * extent + 1) + extent
            bias = tl.load(values_ptr + tl.minimum(tl.maximum(distance, -extent), extent))
            s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    if bias_ptr is not None:
        bias_ptr += batch * stride_bias_b + head * stride_bias_h + first_col * stride_bias_n
        bias = _load_pairs(
            bias_ptr, stride_bias_m, stride_bias_n, rows, cols, M, N - first_col, float("-inf")
        ).to(tl.float32)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    if mask_ptr is not None:
        mask_ptr += batch * stride_mask_b + head * stride_mask_h + first_col * stride_mask_n
        keep = _load_pairs(mask_ptr, stride_mask_m, stride_mask_n, rows, cols, M, N - first_col, 0)
        s = tl.where(keep != 0, s, float("-inf"))
    return s, slope


@triton.jit
def _load_pairs(ptr, stride_m, stride_n, rows, cols, M, N, other):
    """What is stored for the pairs of rows and cols, or for cols alone if stride_m is None."""
    if stride_m is None:
        return tl.load(ptr + cols * stride_n, mask=cols < N, other=other)
    else:
        offsets = rows.to(tl.int64) * stride_m + cols * stride_n
        return tl.load(ptr + offsets, mask=(rows < M) & (cols < N), other=other)


@triton.jit
def probabilities(s, lse, lse_low):
    """exp(s - lse) of scores with options; lse_low is what lse lost to rounding, or None."""
    if lse_low is not None:
        return tl.exp2((s - lse - lse_low) * LOG2_E)
    else:
        return tl.exp2((s - lse) * LOG2_E)


@triton.jit
def has_nan(x):
    """Whether a tile holds a NaN. What masks and biases forbid is multiplied by 0, and where that
    gives NaN a tile is computed again, with 0 for it: hardly ever, where zeros first would cost
    every tile."""
    return tl.max(tl.max((x != x).to(tl.int32), 1), 0) > 0


@triton.jit
def zero_rows(x, keep):
    """x [ROWS, D], and 0, were it NaN, in the rows where int32 keep [ROWS] is 0 rather than 1.

    By bits: Triton's AMD backend cannot move a condition between the layouts of two tiles.
    """
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) & (0 - keep)[:, None]
    else:
        bits = x.to(tl.int16, bitcast=True) & (0 - keep).to(tl.int16)[:, None]
    return bits.to(x.dtype, bitcast=True)


@triton.jit
def place_in_blocks(batch, first, head, cu_ptr):
    """(batch, row, head) where a sequence of a head begins, for `load_block`."""
    if cu_ptr is not None:
        batch = batch * 0
    return batch.to(tl.int32), first.to(tl.int32), head.to(tl.int32)


@triton.jit
def load_block(desc, place, start, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [start, start + ROWS) of a sequence of a head, by the copy engine.

    Args:
        desc: from `block_descriptors`. Rows outside of its tensor are 0, those of other sequences
            are not.
        place: from `place_in_blocks`.
    """
    batch, first, head = place
    return desc.load([batch, first + start, head, 0]).reshape(ROWS, BLOCK_D)


@triton.jit
def load_tile(
    desc, place, ptr, start, stride, M, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, low, HAS_LOW: tl.constexpr, keep=None,
):  # fmt: skip
    """`load_block` where there is a descriptor and no row to leave out, else `load_rows`."""
    if desc is not None and not MASKED:
        return load_block(desc, place, start, ROWS, BLOCK_D)
    else:
        return load_rows(ptr, start, stride, M, ROWS, D, BLOCK_D, MASKED, low, HAS_LOW, keep)


@triton.jit
def seen_keys(rows, n_k, diagonal, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """(first, last) key that each row may see by its place; nothing where first > last."""
    last = tl.zeros_like(rows) + (n_k - 1)
    if HAS_RIGHT:
        last = tl.minimum(rows + diagonal + right, last)
    first = tl.zeros_like(rows)
    if HAS_LEFT:
        first = tl.maximum(rows + diagonal - left, first)
    return first, last


@triton.jit
def key_ranges(first_row, BLOCK_M: tl.constexpr, n_q, n_k, diagonal, left, right,
               HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """(begin, full, full_end, low, end): what a tile of rows may see of n_k keys by its place.

    Blocks of keys from `begin` to `full` and from `full_end` to `end` are seen by some rows, those
    between by all; the first three are multiples of BLOCK_N. Keys below `low`, and from `end` on,
    are seen by no row of the tile.
    """
    n_k = tl.where(first_row < n_q, n_k, 0)
    last_row = tl.minimum(first_row + BLOCK_M, n_q) - 1
    end = n_k
    full_end = n_k
    if HAS_RIGHT:
        end = tl.minimum(tl.maximum(last_row + diagonal + right + 1, 0), n_k)
        full_end = tl.minimum(tl.maximum(first_row + diagonal + right + 1, 0), n_k)
    begin = 0
    full = 0
    low = 0
    full_end = full_end // BLOCK_N * BLOCK_N
    if HAS_LEFT:
        low = tl.maximum(first_row + diagonal - left, 0)
        begin = low // BLOCK_N * BLOCK_N
        full = tl.cdiv(tl.maximum(last_row + diagonal - left, 0), BLOCK_N) * BLOCK_N
        full_end = tl.maximum(full, full_end)
    return begin, full, full_end, low, end


@triton.jit(do_not_specialize=["stride_bucket", "stride_h", "extent"])
def _relative_values_kernel(
    table_ptr, values_ptr, stride_bucket: tl.int64, stride_h: tl.int64, extent,
    STARTS: tl.constexpr, BIDIRECTIONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bias of every distance from -extent to extent, of one head.

    Bytes a distance of a head: it is written, 4; the table stays in the cache.
    """
    blocks = tl.cdiv(2 * extent + 1, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    bucket = relative_bucket(index - extent, STARTS, BIDIRECTIONAL)
    mask = index <= 2 * extent
    x = tl.load(table_ptr + bucket * stride_bucket + head * stride_h, mask=mask, other=0.0)
    tl.store(values_ptr + head * (2 * extent + 1) + index, x.to(tl.float32), mask=mask)


def relative_values(
    table: torch.Tensor, bidirectional: bool, max_distance: int, extent: int
) -> torch.Tensor:
    """The bias of each distance from -extent to extent, fp32 (nheads, 2 extent + 1).

    Args:
        table: (num_buckets, nheads).
    """
    buckets, nheads = table.shape
    width = 2 * extent + 1
    values = torch.empty((nheads, width), dtype=torch.float32, device=table.device)
    launch(
        _relative_values_kernel, ceil_div(width, 128) * nheads,
        table, values, *table.stride(), extent,
        STARTS=bucket_starts(buckets, bidirectional, max_distance),
        BIDIRECTIONAL=bidirectional,
        BLOCK=128,
        enable_fp_fusion=True,
    )  # fmt: skip
    return values


def option_arguments(lengths: tuple[int, int], dtype: torch.dtype, options: Options) -> dict:
    """The arguments that every attention kernel takes for its options; None for what is not used.

    Args:
        lengths: (seqlen_q, seqlen_k), of packed sequences the maxima.
        dtype: of q, k and v.
    """
    mask, bias, table, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed = options[
        :9
    ]
    causal, softcap, dropout_p = options.causal, options.softcap, options.dropout_p
    window_left, window_right = options.window_left, options.window_right
    farthest = sum(lengths)
    extent = min(options.max_distance, farthest)
    values = None
    if table is not None:
        values = relative_values(table, options.bidirectional, options.max_distance, extent)
    right = farthest if window_right < 0 else min(window_right, farthest)
    threshold, dropout_scale = dropout_args(dropout_p)
    scored = (mask, bias, table, alibi_slopes, sinks)
    return dict(
        mask_ptr=None if mask is None else mask.view(torch.uint8),
        **_strides("mask", mask, lengths[1]),
        bias_ptr=bias,
        **_strides("bias", bias, lengths[1]),
        values_ptr=values,
        extent=extent,
        slopes_ptr=alibi_slopes,
        stride_sb=alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.dim() == 2
        else 0,
        softcap=softcap if softcap > 0.0 else None,
        cu_q_ptr=cu_seqlens_q,
        cu_k_ptr=cu_seqlens_k,
        seqlens_k_ptr=seqlens_k,
        seed_ptr=seed if dropout_p > 0.0 else None,
        threshold=threshold,
        dropout_scale=dropout_scale,
        left=farthest if window_left < 0 else min(window_left, farthest),
        right=min(right, 0) if causal != "none" else right,
        bottom_right=int(causal != "top_left"),
        HAS_LEFT=window_left >= 0,
        HAS_RIGHT=window_right >= 0 or causal != "none",
        PLAIN=dtype != torch.float32 and softcap == 0.0 and all(x is None for x in scored),
    )  # fmt: skip


def block_descriptors(
    rows: int, *tensors: torch.Tensor
) -> tuple[TensorDescriptor, ...] | tuple[None, ...]:
    """Descriptors for `load_block` of (batch, seqlen, nheads, headdim), or None for each if one
    tensor is empty, is not aligned to 16 bytes in each of its dimensions, or repeats one."""
    descriptors = []
    for x in tensors:
        unit = 16 // x.element_size()
        # Strides of dimensions of size 1 mean nothing, but have to be aligned.
        strides = [s if n > 1 else unit for n, s in zip(x.shape[:-1], x.stride(), strict=False)]
        if not x.numel() or x.data_ptr() % 16 or any(s % unit or s == 0 for s in strides):
            return (None,) * len(tensors)
        block = [1, rows, 1, max(16, next_power_of_2(x.shape[-1]))]
        descriptors.append(TensorDescriptor(x, list(x.shape), [*strides, 1], block))
    return tuple(descriptors)


def _stride_along_queries(x: torch.Tensor) -> int | None:
    """Of a mask or bias; None if it is the same for all of them."""
    return x.stride(2) if x.shape[2] > 1 and x.stride(2) else None


_NO_STRIDES = {
    name: {f"stride_{name}_b": 0, f"stride_{name}_h": 0, f"stride_{name}_m": None,
           f"stride_{name}_n": 0}
    for name in ("mask", "bias")
}  # fmt: skip


def _strides(name: str, x: torch.Tensor | None, seqlen_k: int) -> dict[str, int | None]:
    if x is None:
        return _NO_STRIDES[name]
    strides = [stride if n > 1 else 0 for n, stride in zip(x.shape, x.stride(), strict=True)]
    strides[2] = _stride_along_queries(x)
    if seqlen_k == 1:  # as of the other lengths, for which one binary is compiled
        strides[3] = 1
    return dict(zip((f"stride_{name}_{axis}" for axis in "bhmn"), strides, strict=True))
