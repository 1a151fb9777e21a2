"""Rotary position embedding as a differentiable operator."""

from __future__ import annotations

import torch

from fastlm.backends import Impl, choose, supports_all
from fastlm.ops._check import (
    fail,
    require_device,
    require_float,
    require_rows,
    require_tensor,
)
from fastlm.ops._library import apply, contract
from fastlm.ops._rows import in_shape
from fastlm.ops._transforms import (
    gradients,
    in_create_graph,
    in_plain_eager,
    kernels_refuse,
    trains,
)
from fastlm.reference.rotary import read_angles
from fastlm.reference.rotary import rotary as _reference


def _rotary_fwd_fake(x, cos, sin, positions, interleaved):
    return x.new_empty(x.shape)


@contract(_rotary_fwd_fake)
def rotary_fwd(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
) -> torch.Tensor:
    from fastlm.kernels import rotary

    return rotary.rotary_fwd(x, cos, sin, positions, interleaved)


def _rotary_bwd_fake(dy, x, cos, sin, positions, interleaved, need_dx):
    return (
        dy.new_empty(dy.shape if need_dx else (0,)),
        cos.new_empty((0,) if x is None else cos.shape),
        sin.new_empty((0,) if x is None else sin.shape),
    )


@contract(_rotary_bwd_fake)
def rotary_bwd(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    need_dx: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlm.kernels import rotary

    return rotary.rotary_bwd(dy, x, cos, sin, positions, interleaved, need_dx)


class _Rotary(torch.autograd.Function):
    """(x, cos, sin, positions, interleaved) -> y.

    Saves x only where cos or sin gets a gradient: that of x does not depend on it.
    """

    @staticmethod
    def forward(x, cos, sin, positions, interleaved):
        y = rotary_fwd(_batched(x), cos, sin, positions, interleaved)
        return y if x.dim() == 4 else in_shape(y, x.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, cos, sin, positions, ctx.interleaved = inputs
        trained = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if trained else None, cos, sin, positions)

    @staticmethod
    def backward(ctx, dy):
        x, cos, sin, positions = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if x is None and in_create_graph():
            x = dy.detach()  # of x's shape and dtype; its values have no part in dx
        grads = gradients(
            _gradients, _differentiable, (dy,), (x, cos, sin), (positions,), (ctx.interleaved,),
            needs,
        )  # fmt: skip
        return *grads, None, None


@contract(lambda x, cos, sin, interleaved: torch.empty_like(x))
def rotary_turn(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """y by torch in as few passes as it can; the tables have dimensions like those of x.

    A contract, for a vmap over incoming gradients goes through operators one by one.
    """
    half = cos.shape[-1]
    part = x[..., : 2 * half].to(torch.promote_types(x.dtype, cos.dtype))
    if interleaved:
        # A view as complex numbers wants pairs that begin at even places.
        *strides, last = part.stride()
        if last != 1 or any(n % 2 for n in (*strides, part.storage_offset())):
            part = part.clone(memory_format=torch.contiguous_format)
        pairs = torch.view_as_complex(part.unflatten(-1, (half, 2)))
        # No view, which users could not write to.
        y = torch.view_as_real(pairs * torch.complex(cos, sin))
        y = torch.ops.aten._unsafe_view(y, part.shape)
    else:
        y = part * torch.cat((cos, cos), -1)
        y[..., :half].addcmul_(part[..., half:], sin, value=-1.0)
        y[..., half:].addcmul_(part[..., :half], sin)
    y = y.to(x.dtype)
    return y if 2 * half == x.shape[-1] else torch.cat((y, x[..., 2 * half :]), -1)


class _Turn(torch.autograd.Function):
    """`rotary_turn`, for tables without a gradient. The gradient of x is the inverse turn."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, cos, sin, interleaved):
        return rotary_turn(x, cos, sin, interleaved)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, cos, sin, ctx.interleaved = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return apply(_Turn, dy, cos, -sin, ctx.interleaved), None, None, None


def _torch_rotary(x, cos, sin, positions, interleaved) -> torch.Tensor:
    if trains(cos, sin) or not in_plain_eager():
        return _reference(x, cos, sin, interleaved=interleaved, positions=positions)
    acc = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    angles = (read_angles(table, positions, x.shape[-3]).to(acc) for table in (cos, sin))
    return apply(_Turn, x, *angles, interleaved)


def _gradients(incoming, inputs, kept, options, needs):
    x, cos, sin = inputs
    dx, *dtables = rotary_bwd(
        _batched(*incoming), _batched(x) if any(needs[1:]) else None, cos, sin, *kept, *options,
        needs[0],
    )  # fmt: skip
    if needs[0] and incoming[0].dim() == 3:
        dx = dx.squeeze(0)
    return tuple(g if n else None for g, n in zip((dx, *dtables), needs, strict=True))


def _batched(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 4 else x[None]


def _differentiable(inputs, kept, options):
    return (_reference(*inputs, positions=kept[0], interleaved=options[0]),)


def _kernels_refuse(x, cos, sin) -> str | None:
    return kernels_refuse(x=x, cos=cos, sin=sin)


# The kernel first: one pass over memory where torch composes several.
_BACKENDS = {"triton": _kernels_refuse, "torch": supports_all}


def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    positions: torch.Tensor | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Turns pairs of each head's first `rotary_dim` dimensions by the angles of its position.

    Args:
        x: (batch, seqlen, nheads, headdim), or (tokens, nheads, headdim) of packed sequences (give
            `positions` then, or the positions run on from one sequence into the next); any floating
            dtype and strides.
        cos, sin: (rows, rotary_dim / 2), one row for every position and one column for every pair,
            with rotary_dim <= headdim; or (batch or 1, seqlen, rotary_dim / 2) for angles that
            differ between sequences, without `positions`. Hugging Face's tables hold each column
            twice, which a table alone does not show: pass `cos[..., : cos.shape[-1] // 2]`.
        interleaved: pairs are dimensions (2 i, 2 i + 1), as RoFormer and GPT-J, instead of
            (i, i + rotary_dim / 2), as GPT-NeoX and Llama.
        positions: (seqlen,) or (batch, seqlen) (packed: (tokens,)), int64 or int32, rows of cos and
            sin; None is 0, 1, ... Outside the table it is an IndexError on a CPU; on a GPU it is
            NaN for that token by the kernel, and a failed device assertion by the torch backend.
        impl: the backend; None chooses (see `fastlm.explain`).

    Returns:
        As x, computed in fp32 (fp64 for fp64). Differentiable in x, cos and sin; x is kept for the
        backward pass only if cos or sin takes a gradient.

    Raises:
        TypeError, ValueError: types, shapes, dtypes or devices that do not fit.

    Source: Su et al., "RoFormer", arXiv:2104.09864.
    """
    _check_rotary(x, cos, sin, positions)
    if choose("rotary", impl, _BACKENDS, x.device, x, cos, sin) == "torch":
        try:
            return _torch_rotary(x, cos, sin, positions, interleaved)
        except IndexError:
            if positions is not None and in_plain_eager():
                require_rows("rotary", "positions", positions, cos.shape[0])
            raise
    return apply(_Rotary, x, cos, sin, positions, interleaved)


def _check_rotary(x, cos, sin, positions) -> None:
    op = "rotary"
    require_float(op, "x", x)
    if x.dim() not in (3, 4):
        form = "have shape (batch, seqlen, nheads, headdim) or (tokens, nheads, headdim)"
        raise fail(op, "x", form, tuple(x.shape))
    for name, table in (("cos", cos), ("sin", sin)):
        require_float(op, name, table)
        require_device(op, name, table, x.device)
    if cos.shape != sin.shape:
        raise fail(op, "sin", f"have the shape of cos, {tuple(cos.shape)}", tuple(sin.shape))
    if cos.dim() != 2 and (cos.dim() != 3 or x.dim() != 4):
        each = "(batch or 1, seqlen, rotary_dim / 2)"
        form = f"have shape (rows, rotary_dim / 2) or, for x of 4 dimensions, {each}"
        raise fail(op, "cos", form, tuple(cos.shape))
    if 2 * cos.shape[-1] > x.shape[-1]:
        constraint = f"have one column for each pair, at most headdim / 2 = {x.shape[-1] // 2}"
        raise fail(op, "cos", constraint, cos.shape[-1])
    if positions is not None:
        _check_positions(x, cos, positions)
    elif cos.dim() == 3 and (cos.shape[0] not in (1, x.shape[0]) or cos.shape[1] != x.shape[1]):
        form = f"have shape (batch or 1, seqlen, rotary_dim / 2) = {(*x.shape[:2], cos.shape[-1])}"
        raise fail(op, "cos", form, tuple(cos.shape))
    elif cos.dim() == 2 and cos.shape[0] < x.shape[-3]:
        raise fail(op, "cos", f"have at least seqlen = {x.shape[-3]} rows", cos.shape[0])


def _check_positions(x, cos, positions) -> None:
    op = "rotary"
    require_tensor(op, "positions", positions)
    if positions.dtype not in (torch.int64, torch.int32):
        raise fail(op, "positions", "have dtype torch.int64 or torch.int32", positions.dtype)
    require_device(op, "positions", positions, x.device)
    if cos.dim() == 3:
        raise fail(op, "positions", "be None for cos of 3 dimensions", tuple(positions.shape))
    if positions.shape not in (x.shape[-3:-2], x.shape[:-2]):
        forms = " or ".join(str(tuple(s)) for s in dict.fromkeys((x.shape[-3:-2], x.shape[:-2])))
        raise fail(op, "positions", f"have shape {forms}", tuple(positions.shape))
