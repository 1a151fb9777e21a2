"""Launch configurations of the attention kernels: see `configs.py`, whose target holds here too."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from fastlm.kernels import configs
from fastlm.kernels.configs import TMA, arithmetic, ceil_div, next_power_of_2


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of `block_m` queries and `block_n` keys.

    tma: blocks that need no mask are loaded by the copy engine, through tensor descriptors, if the
    tensors' alignment allows it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


# target -> (arithmetic, pass) -> (block_m, block_n, num_warps, num_stages) of head dims up to 32,
# 64, 128, 256 and 512. Arithmetic is "half", "narrow" where halves cannot be loaded two at a time,
# or for fp32 the precision of its products. Chosen by compiling: no spills on NVIDIA up to head
# dim 128, and on sm_80 at most 99 KB of shared memory, which is what sm_86, sm_89 and sm_120 have.
# Not timed yet.
_NVIDIA = {
    ("narrow", "fwd"): (
        (128, 64, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1), (32, 16, 8, 1),
    ),
    ("narrow", "dq"): (
        (64, 32, 4, 1), (64, 32, 8, 1), (64, 16, 8, 1), (64, 16, 8, 1), (16, 16, 8, 1),
    ),
    ("narrow", "dkv"): (
        (32, 64, 4, 1), (32, 64, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1), (16, 16, 8, 1),
    ),
    ("ieee", "fwd"): (
        (64, 32, 4, 2), (64, 32, 8, 2), (16, 64, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1),
    ),
    ("ieee", "dq"): (
        (64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 1), (16, 16, 8, 1),
    ),
    ("ieee", "dkv"): (
        (16, 32, 4, 2), (32, 32, 8, 1), (16, 32, 8, 2), (16, 16, 8, 1), (16, 16, 8, 1),
    ),
}  # fmt: skip
_ATTENTION = {
    "sm_80": {
        **_NVIDIA,
        ("half", "fwd"): (
            (128, 64, 4, 3), (128, 64, 4, 3), (128, 32, 8, 3), (64, 32, 8, 2), (32, 32, 8, 1),
        ),
        ("half", "dq"): (
            (64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2), (16, 32, 8, 1),
        ),
        ("half", "dkv"): (
            (64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2), (16, 16, 8, 1),
        ),
        ("tf32", "fwd"): (
            (128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1),
        ),
        ("tf32", "dq"): (
            (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1),
        ),
        ("tf32", "dkv"): (
            (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (16, 16, 4, 1), (16, 16, 8, 1),
        ),
    },
    "sm_90": {
        **_NVIDIA,
        ("half", "fwd"): (
            (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2),
        ),
        ("half", "dq"): (
            (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1),
        ),
        ("half", "dkv"): (
            (64, 128, 8, 3), (64, 128, 8, 3), (32, 128, 8, 3), (32, 64, 8, 2), (32, 32, 8, 1),
        ),
        ("tf32", "fwd"): (
            (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1),
        ),
        ("tf32", "dq"): (
            (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1),
        ),
        ("tf32", "dkv"): (
            (32, 64, 8, 1), (32, 32, 8, 2), (16, 32, 8, 2), (16, 16, 4, 1), (16, 16, 8, 1),
        ),
    },
    "sm_100": {
        **_NVIDIA,
        ("half", "fwd"): (
            (128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2),
        ),
        ("half", "dq"): (
            (128, 64, 8, 3), (128, 32, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1),
        ),
        ("half", "dkv"): (
            (64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1),
        ),
        ("tf32", "fwd"): (
            (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1),
        ),
        ("tf32", "dq"): (
            (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1),
        ),
        ("tf32", "dkv"): (
            (32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2), (16, 16, 4, 1), (16, 16, 8, 1),
        ),
    },
    "gfx942": {
        ("half", "fwd"): (
            (128, 64, 4, 2), (128, 64, 4, 2), (128, 64, 4, 2), (64, 32, 4, 2), (32, 16, 4, 1),
        ),
        ("half", "dq"): (
            (128, 64, 4, 2), (128, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 1), (16, 16, 4, 1),
        ),
        ("half", "dkv"): (
            (32, 64, 4, 1), (32, 64, 4, 1), (16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1),
        ),
        ("ieee", "fwd"): (
            (64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1),
        ),
        ("ieee", "dq"): (
            (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1),
        ),
        ("ieee", "dkv"): (
            (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1),
        ),
    },
}  # fmt: skip
# (target, pass) -> least burden of the options -> the same of head dims up to 64 and up to 128, for
# halves: no spills of any one option, of BERT's (mask, dropout) and of T5's (table, mask).
_BURDENED = {
    ("sm_80", "fwd"): {2: ((128, 64, 8, 2), (128, 32, 8, 3)), 4: ((64, 32, 8, 2), (64, 32, 8, 2))},
    ("sm_80", "dq"): {
        2: ((128, 32, 8, 2), (64, 64, 8, 2)),
        4: ((128, 32, 8, 2), (64, 32, 8, 2)),
        6: ((64, 32, 8, 2), (64, 32, 8, 2)),
    },
    ("sm_80", "dkv"): {
        2: ((32, 32, 4, 2), (32, 64, 8, 2)),
        6: ((32, 32, 4, 2), (16, 64, 8, 2)),
    },
    ("sm_90", "fwd"): {
        1: ((128, 64, 8, 3), (128, 64, 8, 3)),
        4: ((128, 64, 8, 2), (128, 32, 8, 3)),
        7: ((128, 32, 8, 2), (128, 16, 8, 2)),
    },
    ("sm_90", "dq"): {4: ((128, 64, 8, 2), (128, 32, 8, 3)), 7: ((128, 32, 8, 2), (128, 16, 8, 2))},
    ("sm_90", "dkv"): {
        1: ((64, 128, 8, 3), (32, 128, 8, 2)),
        3: ((64, 128, 8, 3), (16, 128, 8, 2)),
        4: ((32, 128, 8, 2), (16, 64, 4, 2)),
        7: ((16, 128, 8, 2), (16, 128, 8, 2)),
    },
}  # fmt: skip
# The interpreter: small, and wider than high and higher than wide.
_ATTENTION_CPU = {
    "fwd": (32, 16, 4, 1),
    "dq": (16, 32, 4, 1),
    "dkv": (16, 32, 4, 1),
    "dbias": (16, 32, 4, 1),
}


def attention_config(
    which: str, device: torch.device, headdim: int, dtype: torch.dtype, unit: int, burden: int
) -> AttentionConfig:
    """The configuration of a pass, "fwd", "dq", "dkv", "dbias", or "dk" (of attention_weights).

    Args:
        headdim: the wider of both.
        unit: from `aligned_strides`.
        burden: `Options.burden`, what options take beside the scores.
    """
    name = configs.target(device)
    half = arithmetic(name, dtype, unit) == "half"
    _, (m, n, warps, stages) = attention_row(which, device, headdim, dtype, unit, burden)
    if which == "dbias" and name != "cpu":  # all four tensors come anew with each tile
        pipelined = half and headdim <= {"sm_80": 64, "sm_90": 128}.get(name, 0)
        return AttentionConfig(m, max(n // 2, 16), warps, 2 if pipelined else 1)
    if which == "dk" and name == "sm_90" and dtype != torch.float32 and m < 64:
        m, n, warps = 64, 64, 8  # its scores are not transposed, and wgmma wants 64 rows
    return AttentionConfig(m, n, warps, stages, half and name in TMA)


def attention_row(
    which: str, device: torch.device, headdim: int, dtype: torch.dtype, unit: int, burden: int
) -> tuple[str, tuple[int, int, int, int]]:
    """Where in this file `attention_config` looks, and what it finds."""
    name, which = configs.target(device), "dkv" if which == "dk" else which
    if name == "cpu":
        return f"_ATTENTION_CPU[{which!r}]", _ATTENTION_CPU[which]
    return _attention_row(name, which, arithmetic(name, dtype, unit), headdim, burden)


@functools.cache
def _attention_row(name: str, which: str, arithmetic: str, headdim: int, burden: int):
    key = arithmetic, "dq" if which == "dbias" else which
    by_headdim, column = _ATTENTION[name][key], max((headdim - 1).bit_length() - 5, 0)
    place, row = f"_ATTENTION[{name!r}][{key}][{column}]", by_headdim[column]
    if arithmetic == "half" and headdim <= 128 and (name, which) in _BURDENED:
        table, column = _BURDENED[name, which], int(headdim > 64)
        if which == "fwd" and headdim & (headdim - 1):
            burden += 2  # columns that are not there
        fitting = [least for least in table if least <= burden]
        if fitting:
            place = f"_BURDENED[{(name, which)}][{fitting[-1]}][{column}]"
            row = table[fitting[-1]][column]
    elif burden > 1 and which != "dbias":
        m, n, warps, stages = row
        m, n = (max(m // 2, 16), n) if which == "dkv" else (m, max(n // 2, 16))
        place, row = f"{place}, halved", (m, n, warps, min(stages, 2))
    return place, row


# Half of the L2 cache (on gfx942 of one die's); small in the interpreter, so that sections differ.
_SECTION_BYTES = {
    "cpu": 2**14,
    "sm_80": 20 * 2**20,
    "sm_90": 25 * 2**20,
    "sm_100": 63 * 2**20,
    "gfx942": 2 * 2**20,
}


def attention_section(device: torch.device, causal: str, head_bytes: int, heads: int) -> int:
    """How many heads are in work at a time, for `tile_and_head` in primitives.py.

    Causal tiles differ in length, and the shortest of all heads should come last; but what the
    heads of a section read, `head_bytes` each, should stay in the L2 cache.
    """
    if causal == "none":
        return 1
    return max(1, min(heads, _SECTION_BYTES[configs.target(device)] // max(head_bytes, 1)))


def decode_config(
    device: torch.device,
    rows: int,
    heads: int,
    seqlen_k: int,
    widest: int,
    dtype: torch.dtype,
    plain: bool,
) -> tuple[AttentionConfig, int]:
    """(tiles, splits of the keys) of `attention_decode`: two programs a multiprocessor.

    Args:
        rows: queries times the heads that share a key head.
        heads: batch times key heads.
        seqlen_k: keys that the cache has room for; how many are filled only the device knows.
        widest: the wider of the head dims, a power of two.
        plain: no option reads a value for each pair, so that wider tiles fit into registers.
    """
    most = min(64, 8192 // widest) if plain else min(32, 2048 // widest)
    block_m = min(max(next_power_of_2(rows), 16), max(16, most))
    if configs.target(device) == "cpu":  # splits, some of them empty, in every call
        return AttentionConfig(block_m, 16, 4, 1), min(ceil_div(seqlen_k, 16) + 1, 3)
    words = 4 if dtype == torch.float32 else 2
    block_n = max(16, min(128, 16384 // (widest * words)) // (1 if plain else 2))
    tiles = ceil_div(rows, block_m) * heads
    # At least 4 blocks in a split, or the combination costs more than it saves.
    splits = min(
        ceil_div(2 * configs.multiprocessors(device), tiles), ceil_div(seqlen_k, 4 * block_n), 128
    )
    stages = 2 if configs.target(device) == "gfx942" else 3
    warps = 4 if plain or words == 2 else 8
    return AttentionConfig(block_m, block_n, warps, stages), max(splits, 1)


@functools.cache
def bucket_starts(num_buckets: int, bidirectional: bool, max_distance: int) -> tuple[int, ...]:
    """The least |key - query| of each `RelativeBias` bucket of one side, but the first.

    Half of a side's buckets hold one distance each; the rest grow with the logarithm of the
    distance, in the reference's fp32. A bucket that the logarithm jumps over starts as the next.
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    distance = torch.arange(exact, max_distance + 1, device="cpu")
    fraction = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    bucket = (exact + (fraction * (side - exact)).long()).clamp(max=side - 1)
    bucket = torch.cummax(bucket, 0).values
    grown = torch.searchsorted(bucket, torch.arange(exact + 1, side, device="cpu")) + exact
    return *range(1, exact + 1), *grown.tolist()
