"""Negative controls: bugs that were put in on purpose, and that the harness must catch."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.runtime.errors import InterpreterError

import fastlm
from fastlm.testing import assert_close, check_against_reference, nan_filled_empty, randn

interpreter = pytest.mark.interpreter


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, LOADS: tl.constexpr, STORES: tl.constexpr, BLOCK: tl.constexpr):
    """Loads LOADS and stores STORES of BLOCK elements; N of them are there."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < LOADS, other=0.0)
    tl.store(y_ptr + i, x, mask=i < STORES)


@interpreter
def test_interpreter_runs_a_right_kernel():
    x, y = randn(13), torch.empty(13)
    _copy_kernel[(1,)](x, y, 13, LOADS=13, STORES=13, BLOCK=16)
    assert torch.equal(x, y)


@interpreter
def test_interpreter_catches_a_store_out_of_bounds():
    with pytest.raises(InterpreterError, match="store out of bounds: 1 of 14 addresses"):
        _copy_kernel[(1,)](randn(13), torch.empty(13), 13, LOADS=13, STORES=14, BLOCK=16)


@interpreter
def test_interpreter_catches_a_load_out_of_bounds():
    with pytest.raises(InterpreterError, match="load out of bounds: 3 of 16 addresses"):
        _copy_kernel[(1,)](randn(13), torch.empty(13), 13, LOADS=16, STORES=13, BLOCK=16)


@interpreter
def test_interpreter_catches_an_access_between_two_tensors():
    """Memory that exists but was not passed to the launch is out of bounds too."""
    base = randn(40)
    with pytest.raises(InterpreterError, match="store out of bounds: 2 of 15 addresses"):
        _copy_kernel[(1,)](base[20:36], base[:13], 13, LOADS=16, STORES=15, BLOCK=16)


@triton.jit
def _sum_kernel(x_ptr, y_ptr, N, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if OTHER:
        x = tl.load(x_ptr + i, mask=i < N, other=0.0)
    else:
        x = tl.load(x_ptr + i, mask=i < N)
    tl.store(y_ptr, tl.sum(x.to(tl.float32), 0))


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_interpreter_poisons_a_masked_load_without_other(dtype):
    x, y = torch.ones(13, dtype=dtype), torch.empty(1)
    _sum_kernel[(1,)](x, y, 13, OTHER=True, BLOCK=16)
    assert y.item() == 13
    _sum_kernel[(1,)](x, y, 13, OTHER=False, BLOCK=16)
    assert math.isnan(y.item())


@triton.jit
def _row_kernel(x_ptr, y_ptr, stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(y_ptr + row, tl.load(x_ptr + row * stride))


@interpreter
def test_interpreter_catches_int32_overflow_of_an_offset():
    buffer = torch.empty(2**31 + 8, dtype=torch.int8)  # never touched, so never committed
    x, y = buffer.as_strided((3,), (2**30,)), torch.empty(3, dtype=torch.int8)
    x.copy_(torch.tensor([1, 2, 3], dtype=torch.int8))
    _row_kernel[(3,)](x, y, x.stride(0), WIDE=True)
    assert y.tolist() == [1, 2, 3]
    with pytest.raises(InterpreterError, match="int32 overflow detected"):
        _row_kernel[(3,)](x, y, x.stride(0), WIDE=False)


@triton.jit
def _integers_kernel(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr):
    i = tl.arange(0, 4)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "sub":
        out = x - y
    else:
        out = x * y
    tl.store(out_ptr + i, out)


@interpreter
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("operation", "x", "y"),
    [
        ("add", 2**31 - 2, 1),
        ("add", -(2**31) + 1, -1),
        ("sub", -(2**31) + 1, 1),
        ("sub", 2**31 - 2, -1),
        ("mul", 2**30, -2),
    ],
)
def test_interpreter_catches_int32_overflow_by_one(operation, x, y, dtype):
    """The last number that an int32 holds is right; the next one raises, in one lane of four."""
    inputs = [torch.tensor([3, 5, n, 7], dtype=dtype) for n in (x, y)]
    out = torch.empty(4, dtype=dtype)
    run = lambda: _integers_kernel[(1,)](*inputs, out, OPERATION=operation)
    run()
    assert torch.equal(out, getattr(torch, operation)(*inputs))
    inputs[0][2] += 1 if x > 0 else -1
    if dtype == torch.int64:
        run()
        assert torch.equal(out, getattr(torch, operation)(*inputs))
    else:
        with pytest.raises(InterpreterError, match=f"int32 overflow detected for .* {operation}"):
            run()


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j)
    tl.store(c_ptr + i * N + j, tl.dot(a, b))


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_interpreter_dot_is_right(dtype):
    a, b, c = randn(16, 16, dtype=dtype), randn(16, 16, dtype=dtype, seed=1), torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, c, N=16)
    gold = a.double() @ b.double()
    assert_close("c", c, gold.float(), gold)


def test_nan_filled_empty_shows_what_is_not_written():
    x = randn(13)
    with nan_filled_empty():
        y, count = torch.empty(13), torch.empty(2, dtype=torch.int32)
        assert y.isnan().all() and (count == torch.iinfo(torch.int32).max).all()
        y[:12] = x[:12]
        with pytest.raises(AssertionError, match="y: error nan"):
            assert_close("y", y, x, x.double())
    assert not torch.are_deterministic_algorithms_enabled()


class _Cube(torch.autograd.Function):
    """x ** 3 with the gradient `factor * x ** 2`: 3 is right."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return ctx.factor * x**2 * dy, None


def check_cube(fn, dtype=torch.float32, **options):
    return check_against_reference(fn, lambda x: x**3, {"x": randn(5, 7, dtype=dtype)}, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_oracle_catches_a_wrong_gradient(dtype):
    errors = check_cube(lambda x: _Cube.apply(x, 3), dtype)
    assert [error.name for error in errors] == ["output 0", "dx"]
    with pytest.raises(AssertionError, match=r"dx: error .* exceeds .*; worst at \(\d, \d\): "):
        check_cube(lambda x: _Cube.apply(x, 3.2), dtype)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x**3 + 1e-4, "output 0: error 1.*e-04 exceeds"),
        (lambda x: torch.where(x > 1, float("nan"), x**3), "output 0: error nan"),
        (lambda x: torch.where(x > 1, float("inf"), x**3), "output 0: error inf"),
        (lambda x: (x**3).double(), "output 0: torch.float64, want torch.float32"),
        (lambda x: (x**3)[None], r"output 0: \(1, 5, 7\), want \(5, 7\)"),
        (lambda x: (x**3, x), "2 outputs, want 1"),
        (
            lambda x: x.detach() ** 3 + 0 * x.new_zeros(1, requires_grad=True),
            "dx: None, want a gradient",
        ),
    ],
    ids=["value", "nan", "inf", "dtype", "shape", "count", "no_gradient"],
)
def test_oracle_catches(wrong, message):
    with pytest.raises(AssertionError, match=message):
        check_cube(wrong)


def test_oracle_catches_a_reference_that_bounds_nothing():
    """Where the reference overflows, or is NaN in fp64, every answer would be within the bound."""
    big = torch.full((2,), 300.0, dtype=torch.float16)
    with pytest.raises(AssertionError, match="output 0: no bound"):
        check_against_reference(lambda x: x, lambda x: x * x, {"x": big})
    with pytest.raises(AssertionError, match="output 0: no bound"):
        check_against_reference(lambda x: x, lambda x: x / 0 * 0, {"x": randn(2)})


def test_oracle_accepts_an_equal_infinity_alone():
    lse = torch.tensor([1.0, -math.inf])
    assert assert_close("lse", lse, lse, lse.double()).error == 0
    for wrong in (torch.tensor([1.0, math.inf]), torch.tensor([1.0, -1e38])):
        with pytest.raises(AssertionError, match="lse: error inf"):
            assert_close("lse", wrong, lse, lse.double())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_oracle_catches_a_wrong_argument_of_a_real_operator(impl, device):
    """eps of 1e-3 for 1e-5 changes LayerNorm by half a thousandth: enough in fp32."""
    tensors = {"x": randn(5, 33, device=device), "weight": randn(33, device=device, seed=1)}

    def reference(x, weight):
        return torch.nn.functional.layer_norm(x, (33,), weight, eps=1e-5)

    def check(eps):
        check_against_reference(
            lambda x, weight: fastlm.layer_norm(x, weight, eps=eps, impl=impl), reference, tensors
        )

    check(1e-5)
    with pytest.raises(AssertionError, match="output 0: error .* exceeds"):
        check(1e-3)
