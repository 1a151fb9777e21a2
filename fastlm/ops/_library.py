"""Declares an operator contract from an annotated Python function.

`define` + `impl` + `register_fake` under one `autograd.Function` cost less than `custom_op` +
`register_autograd`. A call goes through the dispatcher only where somebody listens there, see
`in_eager`: elsewhere the launcher is called itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import NoneType

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _dispatch_keys,
    _dispatch_tls_local_include_set,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

_LIBRARY = torch.library.Library("fastlm", "FRAGMENT")
_CUDA_LIBRARY = torch.library.Library("fastlm_cuda", "FRAGMENT")


def contract(fake: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Decorator: registers the function as `fastlm::<name>` with `fake` for its metadata.

    `mutates` names the arguments that it writes to.

    The first argument of the function is a tensor; the launch happens on its device. The function
    may return None for a tensor that is not wanted: the operator gives an fp32 tensor of shape (0,)
    in its place. What is returned takes positional arguments; its `op` is the operator.
    """

    def register(launch: Callable) -> Callable:
        name = launch.__name__
        guarded = _on_device_of_first(launch)
        _LIBRARY.define(torch.library.infer_schema(launch, op_name=name, mutates_args=mutates))
        _LIBRARY.impl(name, _with_all_tensors(guarded), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastlm::{name}", fake, lib=_LIBRARY)
        op = getattr(torch.ops.fastlm, name).default

        @functools.wraps(launch)
        def call(*args):
            return guarded(*args) if in_eager(args) else op(*args)

        call.op = op
        return call

    return register


def cuda_contract(contract: Callable, fake: Callable) -> torch._ops.OpOverload:
    """`fastlm_cuda::<name>`, with the schema and the metadata of `fastlm::<name>`.

    The implementation is in the CUDA C++ library, which `fastlm.cuda_library` loads.
    """
    schema = str(contract.op._schema)
    name = contract.op._schema.name.split("::")[1]
    _CUDA_LIBRARY.define(name + schema[schema.index("(") :])
    torch.library.register_fake(f"fastlm_cuda::{name}", fake, lib=_CUDA_LIBRARY)
    return getattr(torch.ops.fastlm_cuda, name).default


def _mask(*names: str) -> int:
    sets = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(int.__or__, (keys.raw_repr() for keys in sets))


_NOT_TENSORS = frozenset({NoneType, bool, int, float, str, tuple, torch.dtype})
_AUTOCAST = ("AutocastCPU", "AutocastCUDA")
# What is not in these masks of dispatch keys changes what an operator does with a tensor, or on
# this thread: a mode, a transform, a tracer, a fake, sparse, negated or zero tensor.
_ODD_TENSOR = ~_mask("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView", *_AUTOCAST)
_ODD_THREAD = ~_mask("BackendSelect", "ADInplaceOrView", *_AUTOCAST)


def in_eager(args: Iterable) -> bool:
    """Whether nothing but the kernel itself would see an operator that is called with `args`: no
    compiler, tracer, mode, transform or profiler, and ordinary tensors alone."""
    if is_compiling():
        return False
    if (
        _dispatch_tls_local_include_set().raw_repr() & _ODD_THREAD
        or _len_torch_function_stack()
        or _profiler_enabled()
    ):
        return False
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if _dispatch_keys(x).raw_repr() & _ODD_TENSOR:
                return False
        elif kind not in _NOT_TENSORS and isinstance(x, Tensor):
            return False
    return True


def apply(function: type[torch.autograd.Function], *inputs):
    """`function.apply(*inputs)`, which binds its inputs to a signature by `inspect` at each call,
    without that, and without autograd where no input wants a gradient."""
    if is_compiling():
        return function.apply(*_distinct(inputs))
    if _are_functorch_transforms_active():
        return function.apply(*inputs)
    wanted = False
    for x in inputs:
        if type(x) not in _NOT_TENSORS and isinstance(x, Tensor):
            if is_functorch_wrapped_tensor(x):  # of a transform that is over
                return function.apply(*inputs)
            wanted = wanted or x.requires_grad
    if wanted and torch.is_grad_enabled():
        return super(torch.autograd.Function, function).apply(*inputs)
    return function.forward(*inputs)


def _distinct(inputs: tuple) -> list:
    """An alias for a tensor that comes again: Dynamo traces no function that is given one twice."""
    distinct = []
    for x in inputs:
        again = isinstance(x, Tensor) and any(x is other for other in distinct)
        distinct.append(x.view_as(x) if again else x)
    return distinct


def unwanted(like: torch.Tensor) -> torch.Tensor:
    """What an operator returns, and its fake, for a result that is not wanted."""
    return like.new_empty(0, dtype=torch.float32)


def _with_all_tensors(launch: Callable) -> Callable:
    """`launch` as a schema wants it: a tensor for each result."""

    @functools.wraps(launch)
    def complete(first, *args):
        results = launch(first, *args)
        if not isinstance(results, tuple):
            return results
        return tuple(unwanted(first) if x is None else x for x in results)

    return complete


def _on_device_of_first(launch: Callable) -> Callable:
    # Triton launches on the current device, which need not be the inputs'.
    @functools.wraps(launch)
    def guarded(first, *args):
        if first.is_cuda and first.get_device() != torch._C._cuda_getDevice():
            with torch.cuda.device(first.device):
                return launch(first, *args)
        return launch(first, *args)

    return guarded
