"""Norms on a CPU where torch's own are inexact or slow, from its loops over chunks of rows.

torch adds up the weight gradient of halves in half, row after row, and composes RMSNorm of passes
over the whole memory. Here a chunk of rows is made fp32 and normalised while the caches have it,
and the sums of chunks are added in fp32. RMSNorm's backward is LayerNorm's of mean 0, which then
lacks one term.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastlm.ops._rows import Widened, as_rows, in_shape, viewed_as
from fastlm.ops._transforms import gradients, in_plain_eager
from fastlm.reference import norm as reference

# Elements of a chunk: where its few passes are calls of their own, it stays in the nearest cache;
# where torch makes most of them in one call, fewer calls count for more.
_CHUNK, _CHUNK_BACKWARD = 2**17, 2**18
# Rows that torch may add up one after the other, and by whether the sum is rounded to a half.
ROWS_OF_TORCH = 2**7
_ROWS = {False: ROWS_OF_TORCH, True: 2**10}
_backward = torch.ops.aten.native_layer_norm_backward.default


def is_for(z: torch.Tensor) -> bool:
    """Whether `CpuNorm` takes z here. torch's loops form xhat as x * rstd - mean * rstd, which
    leaves noise in a row of one column; compilers and transforms want what they can see through."""
    if z.device.type != "cpu" or z.dtype == torch.float64 or z.shape[-1] == 1:
        return False
    return in_plain_eager()


class CpuNorm(torch.autograd.Function):
    """(z, weight, bias, kind, eps, x_dtype, out_dtype) -> (y, mean, rstd); z as half or fp32.

    `kind` as in `reference.normalize`; RMSNorm has mean 0 and no bias.
    """

    @staticmethod
    def forward(z, weight, bias, kind, eps, x_dtype, out_dtype):
        rows = as_rows(z)
        scale = _scale(weight, z, kind)
        if kind == "layer":
            shift = None if bias is None else bias.float()
            rows = rows.to(out_dtype) if out_dtype == torch.float32 else rows
            y, mean, rstd = torch.native_layer_norm(rows, rows.shape[1:], scale, shift, eps)
        else:
            y, rstd = _rms(rows, scale, eps, kind, x_dtype, out_dtype)
            mean = torch.zeros_like(rstd)
        return in_shape(y.to(out_dtype), z.shape), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, weight, bias, *ctx.options = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(z, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx, dy, *_):
        z, weight, bias, *kept = ctx.saved_tensors
        grads = gradients(
            _gradients, _reference, (dy,), (z, weight, bias), kept, ctx.options,
            ctx.needs_input_grad[:3],
        )  # fmt: skip
        return *grads, *[None] * 4


def _scale(weight: torch.Tensor | None, z: torch.Tensor, kind: str) -> torch.Tensor | None:
    """What xhat is multiplied by, in fp32; in LayerNorm it says that statistics be fp32 as well."""
    if weight is None:
        return z.new_ones(z.shape[-1], dtype=torch.float32) if kind == "layer" else None
    return weight.float() + 1.0 if kind == "rms_gemma" else weight.float()


def _blocks(step: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Chunks of rows of all tensors."""
    return zip(*(t.split(max(step, 1)) for t in tensors), strict=True)


def _rms(z, scale, eps: float, kind: str, x_dtype: torch.dtype, out_dtype: torch.dtype):
    """y and rstd."""
    rounded = x_dtype if kind == "rms_llama" else None  # to which z * rstd is, before the scale
    y = z.new_empty(z.shape, dtype=out_dtype)
    rstd = z.new_empty((z.shape[0], 1), dtype=torch.float32)
    step = _CHUNK // z.shape[1]
    wide, half = Widened(z, step), z.dtype != torch.float32
    squares = None if kind == "rms" else y.new_empty(min(max(step, 1), len(z)), z.shape[1],
                                                     dtype=torch.float32)  # fmt: skip
    whole = out_dtype == torch.float32 and rounded in (None, torch.float32)
    for z_c, y_c, r in _blocks(step, z, y, rstd):
        part = wide(z_c)
        if squares is None:
            torch.linalg.vector_norm(part, dim=1, keepdim=True, out=r)
            r.square_().div_(z.shape[1])
        else:  # the very operations of Hugging Face's norms, whose bits these are
            torch.mean(torch.square(part, out=squares[: len(part)]), 1, keepdim=True, out=r)
        r.add_(eps).rsqrt_()
        # A buffer may be written to, z may not.
        out = torch.mul(part, r, out=y_c if whole else part if half else None)
        if rounded is not None and not whole:
            out = out.to(rounded).float()
        if scale is not None:
            out.mul_(scale)
        if not whole:
            y_c.copy_(out)
    return y, rstd


def _gradients(incoming, inputs, kept, options, needs):
    (dy,), (z, weight, bias), (mean, rstd) = incoming, inputs, kept
    kind = options[0]
    dy, rows, (need_z, need_weight, need_bias) = as_rows(dy), as_rows(z), needs
    whole = in_plain_eager()  # else a vmap over dy, which takes no out= and no half beside fp32
    if dy.dtype != rows.dtype or not whole:
        dy, rows = dy.float(), rows.float()
    scale = _scale(weight, z, kind)
    call = lambda dy, rows, mean, rstd, *wanted: _backward(
        dy, rows, rows.shape[1:], mean, rstd, scale, scale, wanted
    )
    dz, sums = None, []
    if need_z and kind == "layer":  # row by row, in fp32: exact in halves too
        dz = call(dy, rows, mean, rstd, True, False, False)[0]
    by_chunk = need_z and kind != "layer"
    if by_chunk:
        dz = torch.empty_like(rows, dtype=z.dtype) if whole else []
    halves = all(t is None or t.dtype.itemsize == 2 for t in (weight, bias))
    step = min(_CHUNK_BACKWARD // rows.shape[1], _ROWS[halves])
    wide_dy, wide_z = Widened(dy, step), Widened(rows, step)
    into = [dz] if by_chunk and whole else []
    any_sum = by_chunk or need_weight or need_bias
    for dy_c, z_c, *of_rows in _blocks(step, dy, rows, mean, rstd, *into) if any_sum else ():
        part = wide_dy(dy_c), wide_z(z_c), *of_rows[:2]
        dpart, *vectors = call(*part, by_chunk, need_weight, need_bias)
        sums.append(vectors)
        if by_chunk:  # what its mean took away
            dmean = part[0].mean(1) if scale is None else (part[0] @ scale).div_(rows.shape[1])
            if whole:
                torch.add(dpart, dmean[:, None] * part[3], out=of_rows[2])
            else:
                dz.append(dpart + dmean[:, None] * part[3])
    if isinstance(dz, list):
        dz = torch.cat(dz)
    total = lambda i, like: (
        torch.stack([s[i] for s in sums]).sum(0).to(like.dtype) if sums else torch.zeros_like(like)
    )
    return (
        viewed_as(dz.to(z.dtype), z) if need_z else None,
        total(0, weight) if need_weight else None,
        total(1, bias) if need_bias else None,
    )


def _reference(inputs, kept, options):
    return (reference.normalize(*inputs, *options),)
