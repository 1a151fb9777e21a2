"""Rotary position embedding as a differentiable operator."""

from __future__ import annotations

import torch

from fastlm.backends import Impl, choose, supports_all
from fastlm.ops._check import fail, require_device, require_float, require_tensor
from fastlm.reference.rotary import rotary as _reference

_BACKENDS = {"torch": supports_all}


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
            sin; None is 0, 1, ... Outside the table it is an error on a CPU and a failed device
            assertion on a GPU.
        impl: the backend; None chooses (see `fastlm.explain`).

    Returns:
        As x, computed in fp32 (fp64 for fp64). Differentiable in x, cos and sin.

    Raises:
        TypeError, ValueError: types, shapes, dtypes or devices that do not fit.

    Source: Su et al., "RoFormer", arXiv:2104.09864.
    """
    _check_rotary(x, cos, sin, positions)
    choose("rotary", impl, _BACKENDS, x.device)
    return _reference(x, cos, sin, interleaved=interleaved, positions=positions)


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
