"""Makes Triton's interpreter cheaper, with the same results and the same errors.

Nearly all of its time is Python's: what a tensor's type is, for each operation anew. Here shapes,
types and the modules that a function sees are worked out once, and the check that an int32 does
not overflow is numpy's instead of five operations of the interpreter.

As in harden.py, private functions of triton are replaced: the tests pin its version.
"""

from __future__ import annotations

import functools
import inspect

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language import core
from triton.language.semantic import TritonSemantic


def install() -> None:
    _remember_types()
    _remember_shapes()
    _check_overflow(interpreter.interpreter_semantic)
    _patch_once(interpreter.GridExecutor)


def _remember_types() -> None:
    """Of numpy for Triton's, and of results for operands'; both are tables that are built anew with
    each call. A type is compared by its name, without a look at whether it is a constexpr."""
    np_dtype, equal = interpreter._get_np_dtype, core.dtype.__eq__
    computation_type = TritonSemantic.computation_type_impl
    known, results = {}, {}

    def remembered(type):
        name = type.scalar.name
        if name not in known:
            known[name] = np_dtype(type)
        return known[name]

    def computed(self, a, a_is_scalar, b, b_is_scalar, div_or_mod):
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in results:
            results[key] = computation_type(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return results[key]

    def same(self, other):
        return self.name == other.name if isinstance(other, core.dtype) else equal(self, other)

    interpreter._get_np_dtype = remembered
    TritonSemantic.computation_type_impl = computed
    core.dtype.__eq__ = same


def _remember_shapes() -> None:
    """One tuple of a tensor's sizes, for all tensors of them, and one for all types. Tensors that
    share theirs need no broadcast."""
    new_block, broadcast = core.block_type.__init__, TritonSemantic.broadcast_impl_value
    blocks, tensors = {}, {}

    def init_block(self, element_ty, shape):
        sizes = (x.value if type(x) is core.constexpr else x for x in shape)
        key = element_ty.name, *sizes
        if key not in blocks:
            new_block(self, element_ty, shape)  # checks the sizes
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def init_tensor(self, handle, type):
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in tensors:
            shape = core.tuple([core.constexpr(n) for n in sizes])
            tensors[sizes] = shape, core.constexpr(int(np.prod(sizes)))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[sizes]

    def broadcast_others(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor
    TritonSemantic.broadcast_impl_value = broadcast_others


def _check_overflow(semantic) -> None:
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(lhs, rhs, binary_op):
        kind, options = lhs.type.scalar, semantic.builder.options
        if kind.int_bitwidth >= 64 or not (options.sanitize_overflow and options.debug):
            return
        name = binary_op.__name__
        wide = (x.handle.data.astype(np.int64) for x in (lhs, rhs))
        result = operations[name](*wide)
        inside = result.max() <= kind.get_int_max_value() and (
            result.min() >= kind.get_int_min_value()
        )
        assert inside, f"int{kind.int_bitwidth} overflow detected for operation {name}"

    semantic.binary_op_sanitize_overflow_impl = check


def _patch_once(executor) -> None:
    """Makes launches and calls of device functions cheap: stock, each one looks through all of
    triton.language, and patches it again, which is half of a launch's time."""
    patch, launch = interpreter._patch_lang, executor.__call__
    patched: set[str] = set()  # names of modules, in this launch

    @functools.cache
    def modules_of(fn) -> frozenset[str]:
        return frozenset(x.__name__ for x in fn.__globals__.values() if x is tl or x is tl.core)

    @functools.cache
    def names_of(package) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]

    def patch_builtin(package, builder, scope):
        for name in names_of(package):
            member = getattr(package, name)
            if core.is_builtin(member):  # another module's patch may have come first
                interpreter._patch_attr(package, name, member, builder, scope)

    def patch_new(fn):
        modules = modules_of(fn)
        if modules and modules <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules)
        return patch(fn)

    def call(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_builtin = patch_builtin
    interpreter._patch_lang, executor.__call__ = patch_new, call
