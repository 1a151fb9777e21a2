"""Launch configurations as data: frozen dataclasses in tables keyed by (target, head dim or width).

No `@triton.autotune`: it cannot run without a GPU, it stalls first calls, and it makes numerics
depend on timing. `benchmarks/tune.py` finds rows for these tables, and puts them there. Every
launch asks for fused multiply-adds by name, since Triton's default changes in 3.10.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch


@functools.cache
def target(device: torch.device) -> str:
    """A device's table key: "sm_80", "sm_90", "sm_100", "gfx942" or "cpu" (the interpreter)."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 2 in the interpreter, so that loops over tiles really loop."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(64)
def dropout_args(p: float) -> tuple[int, float]:
    """(threshold, scale) of Philox dropout, as `fastlm.reference.dropout` defines them."""
    return min(round(p * 2**32), 0xFFFFFFFF), 0.0 if p == 1.0 else 1.0 / (1.0 - p)


@dataclass(frozen=True)
class RowConfig:
    """A tile of `block_m` rows by `block_n` columns; rows wider than `block_n` are looped over."""

    block_m: int
    block_n: int
    num_warps: int


# Widest row that stays in registers: 32 fp32 values a thread at 8 warps.
WIDEST_ROW = 8192
# Widest row that a norm reads once.
WIDEST_NORM = 16384


@functools.cache
def row_config(cols: int) -> RowConfig:
    """Row-wise kernels (norm): about 4,096 elements a program, at least one row."""
    block_n = min(max(next_power_of_2(cols), 16), WIDEST_ROW)
    block_m = max(1, min(4096 // block_n, 32))
    return RowConfig(block_m, block_n, 4 if block_n <= 4096 else 8)


@dataclass(frozen=True)
class NormConfig(RowConfig):
    """A pass of a norm.

    programs: on a multiprocessor, over which tiles are strided; 0: every tile has its own. stages:
    of the loop over tiles, which loads as many but one ahead, into shared memory. ahead: a tile is
    loaded ahead into registers. registers: at most so many a thread, or 0.
    """

    programs: int = 0
    stages: int = 1
    ahead: bool = False
    registers: int = 0

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch."""
        most = {"maxnreg": self.registers} if self.registers else {}
        return dict(
            BLOCK_N=self.block_n, STAGES=self.stages, num_warps=self.num_warps,
            enable_fp_fusion=True, **most,
        )  # fmt: skip


# (target, pass, itemsize, columns rounded up to a power of two, at most 32,768) -> the fields of a
# `NormConfig` that a GPU found faster than the rules below. Empty until one has.
_NORM: dict[tuple[str, str, int, int], tuple[int | bool, ...]] = {}


@functools.cache
def norm_config(
    which: str, cols: int, itemsize: int, bias: bool, dropout: bool, device: torch.device
) -> NormConfig:
    """A pass of norms, "fwd" or "bwd".

    Args:
        itemsize: bytes of the widest element that the pass reads.
        bias: bias takes part; backward, its gradient does.
    """
    name = target(device)
    # Of rows past `WIDEST_ROW`, those that leave room for addresses, and nothing else, in
    # registers: 48 values a thread beside sums for both vectors, 64 beside one or, forward, none.
    widest = 12288 if which == "bwd" and bias else WIDEST_NORM
    roomy = cols <= widest and itemsize <= 2 and cols % 16 == 0 and not dropout
    row = _NORM.get((name, which, itemsize, min(next_power_of_2(cols), 2 * WIDEST_NORM)))
    if row is not None and (roomy or not WIDEST_ROW < cols <= WIDEST_NORM):
        return NormConfig(*row)
    return (_norm_fwd if which == "fwd" else _norm_bwd)(cols, itemsize, roomy, name)


def _norm_fwd(cols: int, itemsize: int, roomy: bool, name: str) -> NormConfig:
    """A program a tile. Past `WIDEST_ROW` columns one tile, 32 values a thread, takes most of a
    multiprocessor's registers: the next two are on their way to shared memory. Where there is no
    room for that a row is read twice, in blocks."""
    if roomy and cols > WIDEST_ROW:
        strided = {"gfx942": (), "sm_80": (1, 2)}.get(name, (1, 3))
        return NormConfig(1, WIDEST_NORM, 16, *strided)
    config = row_config(cols)
    return NormConfig(config.block_m, config.block_n, config.num_warps)


def _norm_bwd(cols: int, itemsize: int, roomy: bool, name: str) -> NormConfig:
    """Up to `WIDEST_ROW` columns 16 warps run on a multiprocessor, with up to 16 values a thread,
    and as many programs as that are; as halves they have 32 KB (narrow rows 16 KB) on their way
    while they work.

    Wider rows, where there is room, have one program a multiprocessor. Else they have a program
    each, and dweight has a kernel of its own; those past `WIDEST_NORM` are read twice, one at a
    time on a multiprocessor, so that the L2 cache has the second.
    """
    amd = name == "gfx942"
    if cols > WIDEST_ROW:
        if roomy and not amd:
            return NormConfig(1, 2048, 8, 1, 1 if name == "sm_80" else 2)
        warps = 16 if amd or (cols <= WIDEST_NORM and itemsize <= 2) else 32
        return NormConfig(1, WIDEST_NORM, warps)
    block_n = row_config(cols).block_n
    block_m = 1 if block_n > 4096 else min(max((2048 if amd else 1024) // block_n, 2), 16)
    warps = max(block_m * block_n // (1024 if amd else 512), 4)
    programs = 1 if name == "cpu" else 16 // warps  # in the interpreter, loops really loop
    # What is ahead takes registers: no room beside addresses of single elements, or fp32.
    ahead = itemsize <= 2 and cols % 16 == 0 and not amd
    return NormConfig(block_m, block_n, warps, programs, 1, ahead, 0 if amd else 128)


@functools.cache
def column_sum_config(rows: int, cols: int, vectors: int, device: torch.device) -> RowConfig:
    """`column_sums`: blocks of so few columns that all multiprocessors have one, but at least 64
    bytes of a row; 32 values a thread where there are as many rows. 16 rows in the interpreter,
    which adds those of a tile one after the other, and no tree of them."""
    block_n = 128
    while block_n > 16 and vectors * ceil_div(cols, block_n) < multiprocessors(device):
        block_n //= 2
    block_m = min(max(next_power_of_2(rows), 8), 8192 // block_n)
    if target(device) == "cpu":
        block_m = min(block_m, 16)
    return RowConfig(block_m, block_n, max(1, min(block_m * block_n // 512, 8)))


@functools.cache
def loss_config(cols: int, capped: bool) -> RowConfig:
    """Cross-entropy: at most 16 logits a thread, or 8 with a softcap, so that no options spill."""
    block_n = min(max(next_power_of_2(cols), 16), 2048 if capped else 4096)
    block_m = max(1, min(1024 // block_n, 16))
    return RowConfig(block_m, block_n, 4 if block_n <= 1024 else 8)


@functools.cache
def tile_config(cols: int, elements: int) -> RowConfig:
    """Elementwise kernels: tiles of about `elements`, of the width that pads rows least."""
    block_n = min((1024, 512, 256, 128), key=lambda n: ceil_div(cols, n) * n)  # widest of equals
    if cols < 128:
        block_n = max(next_power_of_2(cols), 16)
    return RowConfig(max(1, elements // block_n), block_n, 4)


@dataclass(frozen=True)
class RotaryConfig:
    """A tile of `block_t` tokens by `block_h` heads; more heads are looped over."""

    block_t: int
    block_h: int
    num_warps: int


def rotary_config(seqlen: int, nheads: int, pairs: int) -> RotaryConfig:
    """About 2,048 pairs a program, at least one token."""
    block_p = next_power_of_2(pairs)
    block_h = min(next_power_of_2(nheads), max(2048 // block_p, 1))
    block_t = min(max(2048 // (block_p * block_h), 1), next_power_of_2(seqlen))
    return RotaryConfig(block_t, block_h, 4)


def segment_chunk(rows: int, device: torch.device) -> int:
    """Rows of a chunk of `segment_sum`: a third of the root of all, so that neither the rows of a
    chunk nor the chunks of the longest segment are many. 4 in the interpreter: segments cross."""
    if target(device) == "cpu":
        return 4
    return min(max(next_power_of_2(math.isqrt(rows) // 3), 32), 1024)


def segment_config(units: int, cols: int, device: torch.device) -> RowConfig:
    """`segment_sum`, for `units` segments or chunks: 4 rows at a time, since most ids come once or
    twice; where units are few, more rows of fewer columns, so that many programs share them. With
    more elements than this some targets spill."""
    block_n = min(max(next_power_of_2(cols), 16), 1024)
    while block_n > 64 and units * ceil_div(cols, block_n) < 2 * multiprocessors(device):
        block_n //= 2
    return RowConfig(min(max(2048 // block_n, 4), 32), block_n, 4)


def wide_loss_config(cols: int, capped: bool, device: torch.device) -> RowConfig:
    """Rows of logits that are read twice: few in work at a time, so that they stay in the L2 cache
    between (one of 128k halves takes 256 KB), with as many loads on their way as registers allow.
    """
    name = target(device)
    widest, warps = {"sm_80": (8192, 32), "gfx942": (8192, 16)}.get(name, (16384, 32))
    if capped:
        widest = 8192
    block_n = min(max(next_power_of_2(cols), 16), widest)
    return RowConfig(1, block_n, max(4, min(block_n * warps // widest, warps)))


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: for fp32, what `torch.get_float32_matmul_precision()` asks."""
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def aligned_strides(*tensors: torch.Tensor) -> tuple[int, list[int]]:
    """(unit, strides): strides of all dimensions but the last, in units of `unit` elements.

    A kernel that multiplies them by the constexpr `unit`, at most 16 bytes, may load whole units at
    once, without a variant for every combination of divisible and other strides. Strides of
    dimensions of size 1 are 0: they mean nothing.
    """
    strides = [
        stride if size > 1 else 0
        for x in tensors
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    ]
    unit = math.gcd(16 // tensors[0].element_size(), *strides)
    return unit, [stride // unit for stride in strides]


# Targets whose halves are loaded with `tma`, which takes no registers for addresses.
TMA = {"sm_90"}


def arithmetic(name: str, dtype: torch.dtype, unit: int) -> str:
    if dtype == torch.float32:
        precision = dot_precision(dtype)
        return "ieee" if name == "gfx942" else precision  # there tf32 has the same matrix cores
    return "narrow" if unit == 1 and name != "gfx942" else "half"


@dataclass(frozen=True)
class MatmulConfig:
    """Tiles of `block_m` by `block_n`, `block_k` deep; tma: see `AttentionConfig`. programs and
    flatten: see `EpilogueConfig`; 0 programs, every tile has its own."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int = 0
    flatten: bool = False
    tma: bool = False

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "STRIDED": self.programs > 0,
            "FLATTEN": self.flatten,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


# (target, arithmetic) -> the products of a linear loss: "logits" (x by the head), "dx" (gradients
# by the head) and "dweight" (along rows; it adds to what is in memory). The last has tiles of which
# two fit on a multiprocessor, so that one's sums travel while the other multiplies. Chosen by
# compiling; not timed yet.
_MATMUL = {
    ("sm_80", "half"): {
        "logits": (128, 128, 32, 4, 4),
        "dx": (128, 128, 32, 4, 4),
        "dweight": (128, 128, 32, 8, 4),
    },
    ("sm_90", "half"): {
        "logits": (128, 256, 64, 8, 4),
        "dx": (128, 256, 64, 8, 4),
        "dweight": (128, 128, 64, 4, 3),
    },
    ("sm_100", "half"): {
        "logits": (128, 256, 64, 8, 3),
        "dx": (128, 256, 64, 8, 3),
        "dweight": (128, 128, 64, 8, 3),
    },
    ("gfx942", "half"): {
        "logits": (128, 128, 32, 8, 2),
        "dx": (128, 128, 32, 8, 2),
        "dweight": (128, 128, 32, 8, 2),
    },
}
_MATMUL_FP32 = {"tf32": (128, 64, 32, 4, 3), "ieee": (64, 64, 16, 4, 2)}
_MATMUL_NARROW = (64, 64, 32, 4, 2)  # halves that cannot be loaded 16 bytes at a time
_MATMUL_CPU = (32, 16, 16, 4, 1)  # the interpreter: an odd number of tiles, several in each product


def matmul_config(
    which: str, device: torch.device, dtype: torch.dtype, aligned: bool = True
) -> MatmulConfig:
    """The tiles of a product of a linear loss: "logits", "dx" or "dweight".

    aligned: rows of the weight begin at multiples of 16 bytes.
    """
    name = target(device)
    if name == "cpu":
        return MatmulConfig(*_MATMUL_CPU)
    if dtype == torch.float32:
        return MatmulConfig(*_MATMUL_FP32[arithmetic(name, dtype, 4)])
    if not aligned and name != "gfx942":
        return MatmulConfig(*_MATMUL_NARROW)
    return MatmulConfig(*_MATMUL[name, "half"][which], tma=name in TMA)


def matmul_splits(
    rows: int, dim: int, depth: int, config: MatmulConfig, device: torch.device
) -> int:
    """Parts of a product that is `depth` deep and has few tiles: four tiles a multiprocessor, so
    that the last ones do not leave most of the device idle, also where few rows are kept."""
    tiles = ceil_div(rows, config.block_m) * ceil_div(dim, config.block_n)
    wanted = ceil_div(4 * multiprocessors(device), tiles)
    return max(1, min(wanted, 8, ceil_div(depth, 8 * config.block_k)))


# Logits of one chunk of tokens, in bytes. Every chunk adds to dweight, which is read and written
# each time: the larger the better, and with the rest it must stay below 512 MB.
_LOGITS_BYTES = 384 * 10**6
_MOST_CHUNKS = 8  # a bf16 dweight is rounded once a chunk
_CHUNK_ROWS_CPU = 32  # the interpreter


def row_padding(device: torch.device) -> int:
    """A multiple of every tile's side along gathered rows, `block_k` of "dweight" included."""
    return 32 if target(device) == "cpu" else 128


def chunk_rows(tokens: int, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a chunk of `linear_cross_entropy`: a multiple of 128, chunks of equal size."""
    if target(device) == "cpu":
        return _CHUNK_ROWS_CPU
    tokens = max(tokens, 1)
    most = max(_LOGITS_BYTES // (vocab * dtype.itemsize), ceil_div(tokens, _MOST_CHUNKS), 128)
    chunks = ceil_div(tokens, max(most // 128 * 128, 128))
    return ceil_div(ceil_div(tokens, min(chunks, _MOST_CHUNKS)), 128) * 128


@dataclass(frozen=True)
class EpilogueConfig:
    """Tiles of `block_m` rows by `block_n` columns, summed `block_k` products at a time.

    group: rows of tiles that are in work together. slices: the epilogue's pieces of a tile.
    programs: on a multiprocessor. flatten: the loop over tiles and the one over products are one
    pipeline, which loads the next tile during an epilogue. tma: as in `AttentionConfig`.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    slices: int = 1
    programs: int = 1
    group: int = 8
    flatten: bool = False
    tma: bool = False

    @property
    def part(self) -> int:
        """Columns of a slice."""
        return self.block_n // self.slices

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP": self.group,
            "SLICES": self.slices,
            "FLATTEN": self.flatten,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


# target -> product -> the first fields of its `EpilogueConfig`: block_m, block_n, block_k,
# num_warps, num_stages, slices, programs; group and flatten where they are not the default. Chosen
# by compiling: no spills, also with dropout, and two programs on a multiprocessor of sm_90, so that
# one multiplies during the other's epilogue. Not timed yet.
_EPILOGUE = {
    "sm_80": {
        "up": (128, 128, 32, 8, 3, 4, 1),
        "gated_up": (128, 64, 32, 4, 3, 4, 2),
        "down": (128, 128, 32, 8, 3, 4, 1),
        "gated_down": (128, 128, 32, 8, 3, 4, 1),
    },
    "sm_90": {
        "up": (128, 128, 64, 4, 3, 4, 2),
        "gated_up": (128, 64, 64, 4, 3, 2, 2),
        "down": (128, 128, 64, 4, 3, 8, 2),
        "gated_down": (128, 128, 64, 4, 3, 8, 2),
    },
    "sm_100": {
        "up": (128, 128, 64, 4, 3, 4, 2),
        "gated_up": (128, 64, 64, 4, 3, 4, 2),
        "down": (128, 64, 64, 4, 3, 8, 2),
        "gated_down": (128, 64, 64, 4, 3, 8, 2),
    },
    "gfx942": dict.fromkeys(("up", "gated_up", "down", "gated_down"), (128, 64, 32, 4, 2, 4, 2)),
    # The interpreter: several tiles in both directions, and programs that take more than one.
    "cpu": dict.fromkeys(("up", "gated_up", "down", "gated_down"), (16, 32, 16, 4, 1, 2, 1)),
}


# Where rows are not aligned to 16 bytes: loads of single elements take registers for addresses.
_EPILOGUE_NARROW = (64, 64, 32, 4, 2, 2, 2)


def epilogue_config(which: str, device: torch.device, aligned: bool) -> EpilogueConfig:
    """The configuration of a product with an epilogue.

    Args:
        which: "up", "gated_up", "down" or "gated_down", the last two in the backward pass.
        aligned: rows of all its matrices are, to 16 bytes.
    """
    name = target(device)
    row = _EPILOGUE[name][which] if aligned or name == "cpu" else _EPILOGUE_NARROW
    return EpilogueConfig(*row, tma=aligned and name in ("sm_90", "sm_100", "cpu"))


# (target, operator, whether the hidden layer is kept for a backward pass) -> rows of (least rows,
# least hidden_dim, most dim, way), see fastlm/ops/_ffn_matmul.py: the first row that a call fits
# into holds. Empty until a GPU has timed them (`benchmarks/tune.py ffn`): every call goes by
# "cublas".
_FFN_WAYS: dict[tuple[str, str, bool], tuple[tuple[int, int, int, str], ...]] = {}


def ffn_way(name: str, op: str, keep: bool, rows: int, dim: int, hidden_dim: int) -> str:
    """The way that the products of a feed-forward layer go, on the target `name`."""
    for least_rows, least_hidden, most_dim, way in _FFN_WAYS.get((name, op, keep), ()):
        if rows >= least_rows and hidden_dim >= least_hidden and dim <= most_dim:
            return way
    return "cublas"
