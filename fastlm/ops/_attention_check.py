"""Argument checks of the attention functions. They read metadata only."""

from __future__ import annotations

import functools

import torch

from fastlm.ops._check import (
    autocast_dtype,
    fail,
    require_bool,
    require_choice,
    require_device,
    require_dropout,
    require_float,
    require_shape,
    require_tensor,
)
from fastlm.reference.relative_bias import RelativeBias, exact_distances

CAUSAL = (False, True, "top_left", "bottom_right")
_INTEGERS = (torch.int32, torch.int64)


def check_qkv(op: str, q, k, v, names: tuple[str, str, str] = ("q", "k", "v")) -> None:
    """q (batch, seqlen_q, nheads, headdim), k and v with their own seqlen, heads and value dim."""
    q_name, k_name, v_name = names
    for name, x in zip(names, (q, k, v), strict=True):
        require_float(op, name, x)
        require_device(op, name, x, q.device)
    _require_form(op, q_name, q, (None,) * 4, "(batch, seqlen_q, nheads, headdim)")
    batch, _, nheads, headdim = q.shape
    form = "(batch, seqlen_k, nheads_k, headdim)"
    _require_form(op, k_name, k, (batch, None, None, headdim), form)
    form = "(batch, seqlen_k, nheads_k, headdim_v)"
    _require_form(op, v_name, v, (batch, k.shape[1], k.shape[2], None), form)
    _check_heads(op, nheads, k.shape[2], headdim, v.shape[3])


def check_packed(op: str, q, k, v, cu_q, cu_k, max_seqlen_q, max_seqlen_k) -> None:
    """q (tokens_q, nheads, headdim), k and v with their own tokens; offsets (batch + 1,)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_float(op, name, x)
        require_device(op, name, x, q.device)
    _require_form(op, "q", q, (None,) * 3, "(tokens_q, nheads, headdim)")
    nheads, headdim = q.shape[1:]
    _require_form(op, "k", k, (None, None, headdim), "(tokens_k, nheads_k, headdim)")
    _require_form(op, "v", v, (*k.shape[:2], None), "(tokens_k, nheads_k, headdim_v)")
    _check_heads(op, nheads, k.shape[1], headdim, v.shape[2])
    for name, x in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        _require_integers(op, name, x, q.device)
        if x.dim() != 1 or x.shape[0] == 0:
            raise fail(op, name, "have shape (batch + 1,)", tuple(x.shape))
    require_shape(op, "cu_seqlens_k", cu_k, cu_q.shape, "(batch + 1,)")
    for name, n in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
            raise fail(op, name, "be an int", type(n).__name__, TypeError)
        if n < 0:
            raise fail(op, name, "be at least 0", n)


def check_new_keys(op: str, k_cache, v_cache, k_new, v_new) -> None:
    """k_new and v_new, both or neither, (batch, seqlen_new, nheads_k, ...) as the caches."""
    if (k_new is None) != (v_new is None):
        missing, given = ("k_new", "v_new") if k_new is None else ("v_new", "k_new")
        raise fail(op, missing, f"be given with {given}", None)
    if k_new is None:
        return
    for name, x, cache in (("k_new", k_new, k_cache), ("v_new", v_new, v_cache)):
        require_float(op, name, x)
        require_device(op, name, x, k_cache.device)
        batch, _, nheads_k, dim = cache.shape
        last = "headdim" if name == "k_new" else "headdim_v"
        form = f"(batch, seqlen_new, nheads_k, {last})"
        _require_form(op, name, x, (batch, None, nheads_k, dim), form)
    if k_new.shape[1] != v_new.shape[1]:
        raise fail(op, "v_new", f"have seqlen_new = {k_new.shape[1]}, as k_new", v_new.shape[1])


def check_options(op: str, shape: tuple[int, int, int, int], device, options: dict) -> None:
    """The options of an attention whose scores have `shape` (batch, nheads, seqlen_q, seqlen_k)."""
    batch, nheads = shape[:2]
    require_choice(op, "causal", options["causal"], CAUSAL)
    _check_window(op, options["window"])
    for name in ("softmax_scale", "softcap"):
        _check_number(op, name, options[name], positive=name == "softcap")
    mask, bias = options["mask"], options["bias"]
    if mask is not None:
        require_tensor(op, "mask", mask)
        if mask.dtype != torch.bool:
            constraint = "have dtype torch.bool, True = attend (additive masks go to bias)"
            raise fail(op, "mask", constraint, mask.dtype)
        _require_broadcastable(op, "mask", mask, shape, device)
    if isinstance(bias, RelativeBias):
        _check_relative_bias(op, bias, nheads, device)
    elif bias is not None:
        require_float(op, "bias", bias)
        _require_broadcastable(op, "bias", bias, shape, device)
    check_seqlens_k(op, options["seqlens_k"], batch, device)
    _check_per_head(op, options, batch, nheads, device)
    require_dropout(op, options["dropout_p"], options["seed"], device)
    for name in ("return_lse", "deterministic"):
        require_bool(op, name, options[name])


def check_seqlens_k(op: str, seqlens_k, batch: int, device) -> None:
    if seqlens_k is not None:
        _require_integers(op, "seqlens_k", seqlens_k, device)
        require_shape(op, "seqlens_k", seqlens_k, (batch,), "(batch,)")


def to_common_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """In one dtype: autocast's where it is on (it leaves fp64, as torch does), else promoted."""
    lower = autocast_dtype(tensors[0].device)
    if lower is not None:
        tensors = [x if x.dtype == torch.float64 else x.to(lower) for x in tensors]
    if all(x.dtype == tensors[0].dtype for x in tensors):
        return list(tensors)
    common = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return [x.to(common) for x in tensors]


def _require_form(op: str, arg: str, x: torch.Tensor, shape: tuple, form: str) -> None:
    """A shape of which some sizes are free (None)."""
    fits = x.dim() == len(shape) and all(
        want is None or want == n for want, n in zip(shape, x.shape, strict=True)
    )
    if not fits:
        known = "" if set(shape) == {None} else f" = ({', '.join(_size(n) for n in shape)})"
        raise fail(op, arg, f"have shape {form}{known}", tuple(x.shape))


def _size(n: int | None) -> str:
    return "*" if n is None else str(n)


def _check_heads(op, nheads, nheads_k, headdim, headdim_v) -> None:
    if nheads_k == 0 or nheads == 0 or nheads % nheads_k:
        raise fail(op, "nheads", f"be a positive multiple of nheads_k = {nheads_k}", nheads)
    for name, n in (("headdim", headdim), ("headdim_v", headdim_v)):
        if n == 0:
            raise fail(op, name, "be at least 1", n)


def _require_integers(op: str, arg: str, x, device) -> None:
    require_tensor(op, arg, x)
    if x.dtype not in _INTEGERS:
        raise fail(op, arg, "have dtype torch.int32 or torch.int64", x.dtype)
    require_device(op, arg, x, device)


def _require_broadcastable(op: str, arg: str, x: torch.Tensor, shape: tuple, device) -> None:
    require_device(op, arg, x, device)
    trailing = shape[len(shape) - x.dim() :]
    if x.dim() > 4 or any(n != 1 and n != m for n, m in zip(x.shape, trailing, strict=True)):
        form = "(batch, nheads, seqlen_q, seqlen_k)"
        raise fail(op, arg, f"be broadcastable to {form} = {tuple(shape)}", tuple(x.shape))


def _check_window(op: str, window) -> None:
    if window is None:
        return
    constraint = "be None or a pair (left, right), each None or an int from 0"
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise fail(op, "window", constraint, repr(window), TypeError)
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise fail(op, "window", constraint, repr(window), TypeError)
        if side is not None and side < 0:
            raise fail(op, "window", constraint, repr(window))


def _check_number(op: str, arg: str, value, positive: bool) -> None:
    if value is None:
        return
    constraint = "be None or a positive number" if positive else "be None or a number"
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise fail(op, arg, constraint, type(value).__name__, TypeError)
    if positive and not value > 0:
        raise fail(op, arg, constraint, value)


def _check_relative_bias(op: str, bias: RelativeBias, nheads: int, device) -> None:
    table = bias.table
    require_float(op, "bias.table", table)
    require_device(op, "bias.table", table, device)
    _require_form(op, "bias.table", table, (None, nheads), "(num_buckets, nheads)")
    exact = exact_distances(table.shape[0], bias.bidirectional)
    if exact == 0:
        least = 4 if bias.bidirectional else 2
        raise fail(op, "bias.table", f"have at least {least} buckets", table.shape[0])
    if bias.max_distance <= exact:
        raise fail(op, "bias.max_distance", f"be more than {exact}", bias.max_distance)


def _check_per_head(op: str, options: dict, batch: int, nheads: int, device) -> None:
    slopes, sinks = options["alibi_slopes"], options["sinks"]
    if slopes is not None:
        require_float(op, "alibi_slopes", slopes)
        require_device(op, "alibi_slopes", slopes, device)
        if tuple(slopes.shape) not in ((nheads,), (batch, nheads)):
            constraint = f"have shape (nheads,) or (batch, nheads) = ({batch}, {nheads})"
            raise fail(op, "alibi_slopes", constraint, tuple(slopes.shape))
    if sinks is not None:
        require_float(op, "sinks", sinks)
        require_device(op, "sinks", sinks, device)
        require_shape(op, "sinks", sinks, (nheads,), "(nheads,)")
