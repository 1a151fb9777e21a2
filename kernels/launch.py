"""Launches kernels, as `kernel[grid](...)` does, for less of the host's time.

Triton binds arguments to a signature, looks at each, and writes the options into a string, at every
launch. Here a call that has been made before, by what Triton specialises kernels for, goes to the
kernel that Triton compiled for it then.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

_AMD = torch.version.hip is not None

# (kernel, device, what it is specialised for) -> the compiled kernel, and the names of the keyword
# arguments that it takes after the positional ones. Kernels are never freed, so that ids stay.
_compiled: dict[tuple, tuple] = {}


def launch(kernel, programs: int, *args, **options) -> None:
    """`kernel[(programs,)](*args, **options)`.

    Args:
        args: the kernel's first arguments, none of them a constexpr; a tensor first, on the current
            device.
        options: constexprs, all that `args` leaves of the kernel's arguments; options of a launch.
    """
    key = _key(kernel, args, options)
    if key is None:
        kernel[(programs,)](*args, **options)
    elif key in _compiled:
        compiled, names = _compiled[key]
        compiled[(programs, 1, 1)](*args, *[options[name] for name in names])
    else:
        compiled = kernel[(programs,)](*args, **options)
        names = kernel.arg_names[len(args) :]
        if compiled is not None and all(name in options for name in names):
            _compiled[key] = compiled, names


def _key(kernel, args: tuple, options: dict) -> tuple | None:
    """At least as fine as Triton's own; None where Triton has to look itself: in the interpreter,
    on AMD, where it looks at sizes of storage too, and at arguments of other types."""
    if _AMD or type(kernel) is not JITFunction or kernel.pre_run_hooks:
        return None
    key = [id(kernel), args[0].get_device(), *options.values()]
    for x in args:
        kind = type(x)
        if kind is int:
            key.append(x % 16 == 0 if 1 < x < 2**31 else _rare(x))
        elif x is None or kind is bool:
            key.append(x)
        elif kind is float:
            key.append(float)
        elif isinstance(x, Tensor):
            key += x.dtype, x.data_ptr() % 16
        else:
            return None
    return tuple(key)


def _rare(x: int) -> tuple[str, bool]:
    """The class of an integer of another type, or equal to 1."""
    size = "1" if x == 1 else "i32" if -(2**31) <= x < 2**31 else "i64" if x < 2**63 else "u64"
    return size, x % 16 == 0
