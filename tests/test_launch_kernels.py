"""kernels/launch.py: a compiled kernel is used again only where Triton itself would use it."""

import ast
import itertools
from pathlib import Path

import pytest
import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.jit import JITFunction, native_specialize_impl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlm.kernels import launch as launching
from fastlm.kernels.launch import launch

storage = torch.zeros(256)
TENSORS = [
    storage[first:].view(dtype)
    for first in (0, 4, 1, 2)
    for dtype in (torch.float32, torch.int32, torch.uint8)
]
BLOCKS = [
    TensorDescriptor(torch.zeros(64, 64, dtype=dtype), [64, 64], [64, 1], [16, block])
    for dtype in (torch.float16, torch.bfloat16)
    for block in (16, 32)
]
VALUES = [
    None, True, False, 0.0, 1.0, -1.5, 0, 1, 2, 15, 16, 32, 17, -1, -15, -16, -32, 2**31 - 1,
    2**31 - 16, 2**31, 2**31 + 1, 2**40, 2**40 + 3, -(2**31), -(2**31) - 1, -(2**40), 2**63 - 1,
    2**63, 2**64 - 16, 2**64 - 1, *TENSORS, *BLOCKS,
]  # fmt: skip


def stub(x_ptr, n, other, BLOCK: triton.language.constexpr, FLAG: triton.language.constexpr):
    pass


class Compiled:
    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *args: self.calls.append(("compiled", grid, args))


@pytest.fixture
def kernel(monkeypatch):
    """A kernel whose `calls` tell whether Triton or the compiled kernel was asked."""
    monkeypatch.setattr(launching, "_forms", {})
    monkeypatch.setattr(launching, "_compiled", {})
    kernel, calls = JITFunction(stub), []

    def run(self, *args, grid, warmup, **kwargs):
        calls.append(("triton", grid, (*args, *kwargs.values())))
        return Compiled(calls)

    monkeypatch.setattr(jit.JITFunction, "run", run)
    return kernel, calls


def test_key_is_as_fine_as_tritons():
    backend = backends["nvidia"].compiler(GPUTarget("cuda", 90, 32))
    form = launching._Form(0, *[launching._getter([])] * 3)

    def keys(value):
        ours = launching._key(form, (storage, value), {})
        return ours, native_specialize_impl(backend, value, False, True, True)

    pairs = [keys(value) for value in VALUES]
    assert all(ours is not None for ours, _ in pairs)
    for (ours, theirs), (others, their_others) in itertools.combinations(pairs, 2):
        assert ours != others or theirs == their_others, (ours, theirs, their_others)
    assert len({ours for ours, _ in pairs}) < len(pairs)


def test_key_of_unknown_arguments():
    form = launching._Form(0, *[launching._getter([])] * 3)
    assert launching._key(form, (storage, (1, 2)), {}) is None


def test_second_call_goes_to_the_compiled_kernel(kernel):
    kernel, calls = kernel
    x, y = torch.zeros(8), torch.ones(8)
    launch(kernel, 3, x, 48, other=None, FLAG=True, BLOCK=16, num_warps=4)
    launch(kernel, 5, y, 64, other=None, FLAG=True, BLOCK=16, num_warps=4)
    assert calls[0] == ("triton", (3,), (x, 48, None, True, 16, 4))
    what, grid, args = calls[1]
    assert (what, grid) == ("compiled", (5, 1, 1))
    assert args[0] is y and args[1:] == (64, None, 16, True)  # in the kernel's order


@pytest.mark.parametrize(
    "change",
    [
        {"x": storage[1:]}, {"x": storage.half()}, {"n": 47}, {"n": 1}, {"n": 2**40},
        {"other": storage}, {"other": 1.5}, {"BLOCK": 32}, {"FLAG": False}, {"num_warps": 8},
        {"num_stages": 2},
    ],
    ids=str,
)  # fmt: skip
def test_another_specialisation_goes_to_triton(change, kernel):
    kernel, calls = kernel
    call = dict(x=storage, n=48, other=None, FLAG=True, BLOCK=16, num_warps=4)
    for arguments in (call, call | change, call, call | change):
        x, n, *_ = arguments.values()
        options = {k: v for k, v in arguments.items() if k not in ("x", "n")}
        launch(kernel, 1, x, n, **options)
    assert [what for what, *_ in calls] == ["triton", "triton", "compiled", "compiled"]


def test_triton_is_asked_where_it_has_to_look(kernel, monkeypatch):
    kernel, calls = kernel
    call = lambda **changes: launch(
        kernel, 1, storage, 3, **dict(other=None, FLAG=True, BLOCK=16) | changes
    )
    call()
    call(other=(1, 2))  # a tuple: of a type that keys do not know
    call(other=(1, 2))
    kernel.pre_run_hooks.append(lambda *args, **kwargs: None)
    call()
    kernel.pre_run_hooks.clear()
    monkeypatch.setattr(launching, "_AMD", True)
    call()
    assert [what for what, *_ in calls] == ["triton"] * 5


def test_kernels_count_their_bytes():
    """In the docstring, "Bytes an element: ..." or of another unit. A kernel is a function of
    Triton's that no other one calls."""
    texts, called = {}, set()
    for file in Path(launching.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(
                ast.unparse, (getattr(d, "func", d) for d in node.decorator_list)
            ):
                texts[file.stem, node.name] = ast.get_docstring(node) or ""
                calls = (call.func for call in ast.walk(node) if isinstance(call, ast.Call))
                called |= {func.id for func in calls if isinstance(func, ast.Name)}
    kernels = {key: text for key, text in texts.items() if key[1] not in called}
    assert all(name.endswith("_kernel") for _, name in kernels), kernels.keys()
    assert len(kernels) > 40
    assert [key for key, text in kernels.items() if "Bytes a" not in text] == []
