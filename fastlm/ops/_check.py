"""Argument checks of the public functions: they read metadata only and raise one clear error.

Messages: `"{op}: {arg} must {be|have|match} {constraint}, got {value}"`.
"""

from __future__ import annotations

import contextlib

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fail(op: str, arg: str, constraint: str, got, error: type[Exception] = ValueError) -> Exception:
    """The exception to raise; `constraint` starts with be, have or match."""
    return error(f"{op}: {arg} must {constraint}, got {got}")


def require_tensor(op: str, arg: str, x) -> None:
    if not isinstance(x, torch.Tensor):
        raise fail(op, arg, "be a tensor", type(x).__name__, TypeError)


def require_float(op: str, arg: str, x) -> None:
    """A dense floating-point tensor. fp64 is accepted: the reference takes it."""
    require_tensor(op, arg, x)
    if x.dtype not in FLOATS:
        raise fail(op, arg, "have a floating-point dtype", x.dtype)
    if x.layout is not torch.strided:
        raise fail(op, arg, "have layout torch.strided", x.layout)


def require_device(op: str, arg: str, x: torch.Tensor, device: torch.device) -> None:
    if x.device != device:
        raise fail(op, arg, f"be on the device of the first input, {device}", x.device)


def require_shape(op: str, arg: str, x: torch.Tensor, shape: tuple, form: str) -> None:
    """`form` names the dimensions, e.g. "(dim,)"."""
    if x.shape != shape:
        raise fail(op, arg, f"have shape {form} = {tuple(shape)}", tuple(x.shape))


def require_probability(op: str, arg: str, p) -> None:
    if type(p) is not float and (not isinstance(p, (int, float)) or isinstance(p, bool)):
        raise fail(op, arg, "be a number from 0 to 1", type(p).__name__, TypeError)
    if not 0.0 <= p <= 1.0:
        raise fail(op, arg, "be a number from 0 to 1", p)


def require_eps(op: str, eps) -> None:
    if type(eps) is not float and (not isinstance(eps, (int, float)) or isinstance(eps, bool)):
        raise fail(op, "eps", "be a number of at least 0", type(eps).__name__, TypeError)
    if not eps >= 0.0:  # nor NaN
        raise fail(op, "eps", "be a number of at least 0", eps)


def require_bool(op: str, arg: str, value) -> None:
    if not isinstance(value, bool):
        raise fail(op, arg, "be a bool", type(value).__name__, TypeError)


def require_choice(op: str, arg: str, value, allowed: tuple) -> None:
    if value not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        raise fail(op, arg, f"be one of {names}", repr(value))


def require_classes(op: str, arg: str, target: torch.Tensor, ignore_index: int, vocab: int) -> None:
    """On a CPU alone: it reads them."""
    kept = target[target != ignore_index]
    _require_inside(op, arg, kept, vocab, "be ignore_index or")


def require_rows(op: str, arg: str, index: torch.Tensor, rows: int) -> None:
    """On a CPU alone: it reads them. Called where torch has raised, whose message names nothing."""
    _require_inside(op, arg, index, rows, "be")


def _require_inside(op, arg, index, size, constraint) -> None:
    outside = index[(index < 0) | (index >= size)]
    if outside.numel():
        constraint += f" from 0 to {size - 1}"
        raise fail(op, arg, constraint, outside[0].item(), IndexError)


def require_dropout(op: str, dropout_p, seed, device: torch.device) -> None:
    """What `make_seed` takes, whether or not anything is dropped."""
    require_probability(op, "dropout_p", dropout_p)
    if seed is None:
        return
    constraint = "be an int or an int64 tensor of one element"
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise fail(op, "seed", constraint, f"{seed.dtype} of shape {tuple(seed.shape)}")
        require_device(op, "seed", seed, device)
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise fail(op, "seed", constraint, type(seed).__name__, TypeError)
    elif not -(2**63) <= seed < 2**64:
        raise fail(op, "seed", "be a 64-bit integer", seed)


def make_seed(
    seed: int | torch.Tensor | None, dropout_p: float, device: torch.device
) -> torch.Tensor | None:
    """The dropout seed as an int64 tensor of shape () on `device`; None where nothing is dropped.

    None draws one from torch's generator of that device, so `torch.manual_seed` governs it, CUDA
    graphs advance it, and no value travels to the host. So it comes after `choose`, by which
    `fastlm.explain` ends.
    """
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        return seed.reshape(())
    # Wrap unsigned values: only the 64 bits matter.
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast lowers matrix products on this device, or None outside it."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None
    # Autocast knows no meta device, and raises.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def product_dtypes(
    x: torch.Tensor, *others: torch.Tensor | None
) -> tuple[torch.dtype, torch.dtype]:
    """Of a loss's matrix products, the widest of these tensors' or autocast's, and of the loss."""
    dtype = x.dtype
    for t in others:
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    lower = autocast_dtype(x.device)
    if lower is None or dtype == torch.float64:
        return dtype, dtype
    return lower, torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """For what chooses its own dtypes: autocast would lower its fp32 products."""
    if autocast_dtype(device) is not None:
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
