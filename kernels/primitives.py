"""Device helpers that several kernels share: dropout and activations.

Importing this module imports triton; it holds no kernel and no launcher.
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


LOG2_E_LOW = tl.constexpr(math.log2(math.e) - 1.4426950216293335)  # what fp32's LOG2_E lacks


@triton.jit
def exp(x, EXACT: tl.constexpr):
    """exp(x) in fp32. EXACT: to two units in the last place, for any x. `tl.exp` rounds x log2(e)
    to fp32 and is off by as many units as that is large: too much where a loss is in fp32."""
    if EXACT:
        t = x * LOG2_E
        low = tl.fma(x, LOG2_E, -t) + x * LOG2_E_LOW
        low = tl.where(tl.abs(t) < 1e30, low, 0.0)  # of infinities it is NaN
        return tl.exp2(t) * (1.0 + low * LN_2)
    else:
        return tl.exp(x)


@triton.jit
def dropout_keep(seed, threshold, batch, head, rows, first_column, BLOCK_N: tl.constexpr):
    """The keep mask of a tile, bit for bit that of `fastlm.reference.dropout.keep_mask`.

    One Philox call gives the four 32-bit words of four neighbouring columns.

    Args:
        seed: int64 scalar, loaded from a device tensor so that CUDA graphs can advance it.
        threshold: `dropout_threshold(p)`; annotate the kernel's parameter `tl.uint32`, so that one
            binary serves every p.
        batch, head: integer scalars, 0 for tensors that have rows and columns alone.
        rows: integers, [BLOCK_M].
        first_column: integer scalar, a multiple of 4.
        BLOCK_N: number of columns, a power of two of at least 4.

    Returns:
        Booleans, True = kept, [BLOCK_M, BLOCK_N]. `tl.trans` of it costs nothing.
    """
    BLOCK_M: tl.constexpr = rows.shape[0]
    GROUPS: tl.constexpr = BLOCK_N // 4
    zeros = tl.zeros([BLOCK_M, GROUPS], dtype=tl.uint32)
    group = (first_column // 4 + tl.arange(0, GROUPS)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        zeros + group[None, :],
        zeros + rows.to(tl.uint32)[:, None],
        zeros + tl.cast(head, tl.uint32),
        zeros + tl.cast(batch, tl.uint32),
    )
    # The words of one call lie side by side in the last dimension: 0, 1, 2, 3.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_M, GROUPS, 2, 2]
    words = tl.reshape(words, [BLOCK_M, BLOCK_N])
    return words >= tl.cast(threshold, tl.uint32)


@triton.jit
def tile_and_head(pid, tiles, longest_last, section):
    """The (tile, head) of a program: within sections of heads, the longest tiles first.

    Programs that run together then share keys that fit in the L2 cache, and the last are short.

    Args:
        pid: position on a grid of `tiles * heads` programs.
        longest_last: constexpr or integer, nonzero where the last tile has the most work.
        section: heads in a section, from 1 to the number of heads.
    """
    heads = tl.num_programs(0) // tiles
    first = pid // (tiles * section) * section
    width = tl.minimum(section, heads - first)
    rest = pid - first * tiles
    tile = rest // width
    if longest_last:
        tile = tiles - 1 - tile
    return tile, first + rest % width


@triton.jit
def load_rows(ptr, first, stride, M, BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
              MASKED: tl.constexpr, low=0, HAS_LOW: tl.constexpr = False, keep=None):  # fmt: skip
    """Rows [first, first + BLOCK_M) of an M x D matrix, with 0 outside it.

    The offsets within a tile do not depend on `first`, so a loop computes them once and keeps them
    in few registers.

    Args:
        stride: elements between rows, int64.
        MASKED: False promises that all rows are below M.
        low: with MASKED and HAS_LOW, rows below it are 0 too.
        keep: with MASKED, booleans [BLOCK_M]; rows where it is False are 0 too.

    Returns:
        [BLOCK_M, BLOCK_D] in the dtype of `ptr`.
    """
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    offsets = (rows.to(tl.int64) * stride)[:, None] + cols[None, :]
    ptrs = ptr + tl.cast(first, tl.int64) * stride + offsets
    if MASKED:
        mask = (rows < M - first)[:, None]
        if HAS_LOW:
            mask = mask & (rows >= low - first)[:, None]
        if keep is not None:
            mask = mask & keep[:, None]
        if D != BLOCK_D:
            mask = mask & (cols < D)[None, :]
        return tl.load(ptrs, mask=mask, other=0.0)
    elif D != BLOCK_D:
        return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_rows(ptr, first, stride, M, x, BLOCK_M: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """Stores where `load_rows` loads, rounded to the dtype of `ptr`."""
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    offsets = (rows.to(tl.int64) * stride)[:, None] + cols[None, :]
    ptrs = ptr + tl.cast(first, tl.int64) * stride + offsets
    mask = (rows < M - first)[:, None]
    if D != BLOCK_D:
        mask = mask & (cols < D)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rounded_to_tf32(x):
    """fp32 rounded to TF32, half away from zero as cuBLAS does. Tensor cores drop the low bits of
    what they get, which shrinks every product alike: sums of them are then off by several times the
    error of rounding."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _operands(a, b, PRECISION: tl.constexpr):
    if PRECISION == "tf32" and a.dtype == tl.float32:
        return _rounded_to_tf32(a), _rounded_to_tf32(b)
    else:
        return a, b


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b in fp32; products of fp32 in `dot_precision`, "ieee" or "tf32"."""
    a, b = _operands(a, b, PRECISION)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_dot(acc, a, b, PRECISION: tl.constexpr, BY_TILE: tl.constexpr = True):
    """acc + `dot(a, b)`, for sums over a whole sequence.

    BY_TILE: in exact fp32 each tile is summed by itself. One chain of additions as long as the
    sequence loses digits that a matrix product keeps, where the sum grows with its length.
    """
    a, b = _operands(a, b, PRECISION)
    if PRECISION == "ieee" and BY_TILE:
        # The last argument, which says nothing of fp32, stops the compiler from adding into acc.
        return acc + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _pairs(first_row, first_col, stride, M, N, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr):  # fmt: skip
    """(offsets, mask) of a tile of an M x N matrix whose rows are `stride * UNIT` apart.

    UNIT divides N, and says so to the compiler: it then moves UNIT elements at once.
    """
    rows = tl.cast(first_row, tl.int64) + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    offsets = (rows * (stride * UNIT))[:, None] + cols[None, :]
    return offsets, (rows < M)[:, None] & (cols < N // UNIT * UNIT)[None, :]


@triton.jit
def load_pairs(ptr, first_row, first_col, stride, M, N, UNIT: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """A tile of an M x N matrix, with 0 outside it; see `_pairs`. fp32 [BLOCK_M, BLOCK_N]."""
    offsets, mask = _pairs(first_row, first_col, stride, M, N, UNIT, BLOCK_M, BLOCK_N)
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_pairs(ptr, first_row, first_col, stride, M, N, x, UNIT: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Stores where `load_pairs` loads, rounded to the dtype of `ptr`."""
    offsets, mask = _pairs(first_row, first_col, stride, M, N, UNIT, BLOCK_M, BLOCK_N)
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def tanh(z):
    """tanh in fp32, to a few units in the last place for small z too."""
    e = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - e) / (1.0 + e)
    # Near 0 that would cancel; the series to z^11 leaves 2e-8 of the value at 0.25.
    z2 = z * z
    near = -1382 / 155925 * z2 + 62 / 2835
    near = near * z2 - 17 / 315
    near = near * z2 + 2 / 15
    near = near * z2 - 1 / 3
    near = z + z * z2 * near
    return tl.where(z2 < 0.0625, near, tl.where(z < 0.0, -far, far))


@triton.jit
def relative_bucket(distance, STARTS: tl.constexpr, BIDIRECTIONAL: tl.constexpr):
    """The bucket of int32 distances key - query: that of `fastlm.reference.relative_bias`.

    Args:
        STARTS: `bucket_starts` of configs.py: how near each bucket of a side after the first
            begins. Comparing with these integers leaves no rounding to a logarithm of the device.
    """
    if BIDIRECTIONAL:
        bucket = tl.where(distance > 0, len(STARTS) + 1, 0)
        near = tl.abs(distance)
    else:
        bucket = tl.zeros_like(distance)
        near = -distance
    for i in tl.static_range(len(STARTS)):
        bucket += (near >= STARTS[i]).to(tl.int32)
    return bucket


@triton.jit
def _sigmoid(z):
    """(s, 1 - s) for s = sigmoid(z), without cancellation or overflow."""
    e = tl.exp(-tl.abs(z))
    r = 1.0 / (1.0 + e)
    return tl.where(z < 0.0, e * r, r), tl.where(z < 0.0, r, e * r)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """activation(z) and its derivative, in fp32. The compiler drops whichever is not used.

    tanh is written with the sigmoid: 0.5 * (1 + tanh(u)) = sigmoid(2u).
    """
    if ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        y = z * cdf
        dy = cdf + z * (0.3989422804014327 * tl.exp(-0.5 * (z * z)))
    elif ACTIVATION == "gelu_tanh":
        z2 = z * z
        s, t = _sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * z2))
        y = z * s
        slope = s * t
        more = z * slope * (1.5957691216057308 + 0.21406444881780076 * z2)
        # slope is 0 long before z2 overflows, but 0 * inf is NaN.
        dy = s + tl.where(slope == 0.0, 0.0, more)
    elif ACTIVATION == "relu":
        dy = tl.where(z <= 0.0, 0.0, 1.0)
        y = tl.where(z <= 0.0, 0.0, z)  # keeps NaN, as torch does
    elif ACTIVATION == "relu2":
        r = tl.where(z <= 0.0, 0.0, z)
        y = r * r
        dy = 2.0 * r
    elif ACTIVATION == "silu":
        s, t = _sigmoid(z)
        y = z * s
        dy = s + s * (z * t)
    else:
        tl.static_assert(ACTIVATION == "quick_gelu", "unknown activation")
        s, t = _sigmoid(1.702 * z)
        y = z * s
        dy = s + 1.702 * (s * (z * t))
    return y, dy
