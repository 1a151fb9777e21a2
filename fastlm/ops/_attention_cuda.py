"""What attention's kernels in CUDA C++ take."""

from __future__ import annotations

import torch

from fastlm.ops._transforms import TRANSFORM_REFUSAL, in_transform
from fastlm.reference.relative_bias import RelativeBias

_DTYPES = (torch.float16, torch.bfloat16)
_LEAST_HEADDIM, _MOST_HEADDIM = 32, 256
# What a block needs where headdim is above 128; csrc/attention_dkv.cuh has the largest tiles.
_WIDE_HEADDIM, _WIDE_SHARED_BYTES = 128, 164096


def refuses(q, k, v, options: dict) -> str | None:
    """Why the kernels cannot take a call, or None."""
    if q.dtype not in _DTYPES:
        return f"takes torch.float16 and torch.bfloat16, not {q.dtype}"
    if in_transform():
        return TRANSFORM_REFUSAL
    bias = options["bias"]
    without = {
        "mask": options["mask"], "RelativeBias": bias if isinstance(bias, RelativeBias) else None,
        "bias": bias, "alibi_slopes": options["alibi_slopes"], "softcap": options["softcap"],
        "sinks": options["sinks"],
    }  # fmt: skip
    for name, value in without.items():
        if value is not None:
            return f"does not take {name}"
    headdim, headdim_v = q.shape[-1], v.shape[-1]
    if headdim != headdim_v:
        return f"needs headdim = headdim_v, here {headdim} and {headdim_v}"
    if headdim % 8 or not _LEAST_HEADDIM <= headdim <= _MOST_HEADDIM:
        return f"takes headdim from 32 to 256 in steps of 8, here {headdim}"
    for name, x in zip("qkv", (q, k, v), strict=True):
        if not _is_aligned(x):
            return f"needs {name} aligned to 16 bytes in every dimension"
    if headdim > _WIDE_HEADDIM and q.is_cuda:
        available = _shared_bytes(q.device.index or 0)
        if available < _WIDE_SHARED_BYTES:
            return (
                f"needs {_WIDE_SHARED_BYTES} bytes of shared memory a block for headdim above "
                f"{_WIDE_HEADDIM}, this GPU has {available}"
            )
    return None


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x, of last stride 1, or a contiguous copy where 16-byte pieces of it are not aligned."""
    return x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _is_aligned(x: torch.Tensor) -> bool:
    # Compiled code has no addresses to look at; there the binding copies what does not fit.
    start = 0 if torch.compiler.is_compiling() else x.data_ptr()
    strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return start % 16 == 0 and all(stride % 8 == 0 for size, stride in strides if size > 1)


def _shared_bytes(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


# What torch.compiler.assume_constant_result does, without its import of the whole compiler.
_shared_bytes._dynamo_marked_constant = True
