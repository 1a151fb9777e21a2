"""Launch configurations as data: frozen dataclasses in tables keyed by (target, head dim or width).

No `@triton.autotune`: it cannot run without a GPU, it stalls first calls, and it makes numerics
depend on timing. `benchmarks/tune.py` prints rows for these tables.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@functools.cache
def target(device: torch.device) -> str:
    """The table key of a device: "sm_80", "sm_90", "sm_100", "gfx942" or "cpu" (the interpreter)."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")


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


@dataclass(frozen=True)
class RowConfig:
    """A tile of `block_m` rows by `block_n` columns; rows wider than `block_n` are looped over."""

    block_m: int
    block_n: int
    num_warps: int


# Widest row that stays in registers: 64 fp32 values a thread at 4 warps, 16 at 16.
_WIDEST_TILE = 8192


def row_config(cols: int) -> RowConfig:
    """Row-wise kernels (norm, loss): about 4,096 elements a program, at least one row."""
    block_n = min(max(next_power_of_2(cols), 16), _WIDEST_TILE)
    block_m = max(1, min(4096 // block_n, 32))
    return RowConfig(block_m, block_n, 4 if block_n <= 2048 else 8)
