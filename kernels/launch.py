"""Launches kernels, as `kernel[grid](...)` does, for less of the host's time.

Triton binds arguments to a signature, looks at each, and writes the options into a string, at every
launch. Here a call like one that was made before, in all that Triton specialises kernels for, goes
to the kernel that Triton compiled for that one. Launching a norm's forward so takes 0.6 of the
host's time (Triton 3.6 and 3.9, without the driver's part).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_AMD = torch.version.hip is not None


@dataclass(frozen=True)
class _Form:
    """How calls of one kernel with the same names of keyword arguments are read."""

    number: int  # of forms before this one: what stands for it in a key
    # Of the keyword arguments:
    of_kernel: Callable[[dict], tuple]  # the kernel's, in its order
    varying: Callable[[dict], tuple]  # those of them that are not constexprs
    fixed: Callable[[dict], tuple]  # constexprs, and options of the launch


# (id of a kernel, number of positional arguments, names of others) -> how to read them; kernels are
# never freed, so that ids stay theirs.
_forms: dict[tuple, _Form] = {}
# (form, device, what Triton specialises for) -> the compiled kernel.
_compiled: dict[tuple, object] = {}
_integers: dict[int, str] = {}  # what `_integer` said of some


def launch(kernel, programs: int, *args, **options) -> None:
    """`kernel[(programs,)](*args, **options)`, on the current device.

    Args:
        args: the kernel's first arguments, no constexprs; the first is a tensor on that device.
        options: its other arguments, all of them, and options of the launch.
    """
    # In the interpreter, and on AMD, where sizes of storage count too, Triton looks itself.
    if _AMD or type(kernel) is not JITFunction or kernel.pre_run_hooks:
        kernel[(programs,)](*args, **options)
        return
    names = (id(kernel), len(args), *options)
    form = _forms.get(names) or _new_form(names, kernel, args, options)
    key = _key(form, args, options)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*args, *form.of_kernel(options))
        return
    compiled = kernel[(programs,)](*args, **options)
    if key is not None and compiled is not None:
        _compiled[key] = compiled


def _new_form(names: tuple, kernel: JITFunction, args: tuple, options: dict) -> _Form:
    parameters = kernel.params[len(args) :]
    varying = [p.name for p in parameters if not p.is_constexpr]
    fixed = [name for name in options if name not in varying]
    parts = ([p.name for p in parameters], varying, fixed)
    form = _forms[names] = _Form(len(_forms), *map(_getter, parts))
    return form


def _getter(names: list[str]) -> Callable[[dict], tuple]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda options: tuple(options[name] for name in names)


def _key(form: _Form, args: tuple, options: dict) -> tuple | None:
    """At least as fine as what Triton specialises for; None with arguments of other types."""
    key = [form.number, args[0].get_device(), *form.fixed(options)]
    for x in (*args, *form.varying(options)):
        kind = type(x)
        if kind is int:
            key.append(_integers.get(x) or _integer(x))
        elif x is None or kind is float or kind is bool:
            key.append(kind)
        elif isinstance(x, Tensor):
            key += x.dtype, x.data_ptr() % 16
        elif kind is TensorDescriptor:
            named = vars(x).copy()
            base, _, _ = named.pop("base"), named.pop("shape"), named.pop("strides")
            key += base.dtype, tuple(named.pop("block_shape")), *named.values()
        else:
            return None
    return tuple(key)


def _integer(x: int) -> str:
    """The type that Triton gives an integer, and whether it knows more of it."""
    size = "1" if x == 1 else "i32" if -(2**31) <= x < 2**31 else "i64" if x < 2**63 else "u64"
    if len(_integers) > 10_000:
        _integers.clear()
    _integers[x] = size if x % 16 else f"{size}x16"
    return _integers[x]
