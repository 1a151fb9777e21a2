"""Turns Triton's interpreter into a checker.

Stock, `TRITON_INTERPRET=1` multiplies bf16 bit patterns in `tl.dot`, truncates casts to bf16,
accepts out-of-bounds accesses, dies of int32 offset overflow, and reads 0 where a masked load
without `other=` reads anything on a GPU. After `install()` these give the right product, round to
nearest even, raise, raise, and read NaN bits. Products and exponentials are rounded from fp64, so
that results do not hang on the CPU's BLAS.

It replaces private functions of triton.runtime.interpreter, so the tests pin triton's version.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import quicken
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

_ranges: list[tuple[int, int]] = []  # [low, high) addresses of this launch's tensors


def install() -> None:
    """Idempotent: a second call changes nothing."""
    builder = interpreter.interpreter_builder
    if getattr(builder, "fastlm_hardened", False):
        return
    builder.fastlm_hardened = True
    builder.options = dataclasses.replace(builder.options, debug=True)  # int32 overflow checks
    _check_accesses(builder)
    _widen_dot(builder)
    _round_casts(builder)
    _round_functions(builder)
    _record_ranges(interpreter.GridExecutor)
    quicken.install()


def _check_accesses(builder) -> None:
    load, store = builder.create_masked_load, builder.create_masked_store

    def masked_load(pointers, mask, other, *rest, **named):
        element = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        _require_in_bounds(pointers, mask, dtype.itemsize, "load")
        if other is None:
            poison = np.frombuffer(b"\xff" * dtype.itemsize, dtype)[0]
            other = interpreter.TensorHandle(np.full(pointers.data.shape, poison, dtype), element)
        return load(pointers, mask, other, *rest, **named)

    def masked_store(pointers, value, mask, *rest):
        _require_in_bounds(pointers, mask, value.data.itemsize, "store")
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store


def _require_in_bounds(pointers, mask, size: int, what: str) -> None:
    used = pointers.data
    if mask is not None:
        used = used[np.broadcast_to(mask.data, used.shape)]
    if not used.size:
        return
    inside = np.zeros(used.shape, dtype=bool)
    for low, high in _ranges:
        inside |= (used >= low) & (used + size <= high)
    if not inside.all():
        raise IndexError(f"{what} out of bounds: {(~inside).sum()} of {used.size} addresses")


def _widen_dot(builder) -> None:
    dot = builder.create_dot

    def widened(a, b, acc, *rest):
        a, b = _bf16_to_fp32(a), _bf16_to_fp32(b)
        if acc.dtype.scalar != tl.float32:
            return dot(a, b, acc, *rest)
        # Products of one pair of vectors have the same bits in every tile on a GPU. A BLAS in fp32
        # gives other ones at the edge of a matrix than inside of it, on some CPUs.
        with np.errstate(all="ignore"):
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
            return interpreter.TensorHandle((product + acc.data).astype(np.float32), tl.float32)

    builder.create_dot = widened


def _round_casts(builder) -> None:
    cast, fp_to_fp = builder.create_fp_trunc, builder.create_fp_to_fp

    def rounded(src, dst_type, *mode):
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source in (tl.float16, tl.float32, tl.float64):
            return interpreter.TensorHandle(_to_bf16_bits(src.data), tl.bfloat16)
        return fp_to_fp(src, dst_type, *mode) if mode else cast(src, dst_type)

    builder.create_fp_trunc = builder.create_fp_to_fp = rounded


def _round_functions(builder) -> None:
    """exp, exp2, log and log2 of fp32, rounded from fp64: numpy's own are up to 3 units in the last
    place off, more or less on one CPU than on another, and the oracle's bound should not hang on
    that."""
    for name in ("exp", "exp2", "log", "log2"):
        exact = getattr(np, name)

        def rounded(arg, exact=exact):
            with np.errstate(all="ignore"):
                result = exact(arg.data.astype(np.float64)).astype(arg.data.dtype)
            return interpreter.TensorHandle(result, arg.dtype.scalar)

        setattr(builder, f"create_{name}", rounded)
    builder.create_fma = _fma


def _fma(x, y, z):
    """Rounded once: the product of two fp32 is exact in fp64."""
    with np.errstate(all="ignore"):
        result = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
    return interpreter.TensorHandle(result.astype(z.data.dtype), z.dtype.scalar)


def _to_bf16_bits(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(x.shape)
    nearest_even = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(x), quiet_nan, nearest_even).astype(np.uint16)


def _bf16_to_fp32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _record_ranges(executor) -> None:
    original = executor._init_args_hst

    def init_args(self, args, kwargs):
        out = original(self, args, kwargs)
        _ranges.clear()
        for x in [*out[0], *out[1].values()]:
            if isinstance(x, torch.Tensor) and x.numel():
                last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
                low = x.data_ptr()
                _ranges.append((low, low + (last + 1) * x.element_size()))
        return out

    executor._init_args_hst = init_args
