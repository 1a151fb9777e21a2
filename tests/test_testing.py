"""fastlm.testing: input factories and the oracle's arithmetic. What it catches: test_harness.py."""

import pytest
import torch

from fastlm.testing import (
    LAYOUTS,
    check_against_reference,
    check_over_draws,
    measure,
    nan_filled_empty,
    randn,
    with_layout,
)

STRIDES = {  # of a (4, 3, 5) tensor
    "contiguous": (15, 5, 1),
    "transposed": (1, 4, 12),
    "last_stride_2": (30, 10, 2),
    "packed": (45, 15, 1),
    "expanded": (0, 5, 1),
    "offset_1": (15, 5, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_layout_keeps_values_and_changes_strides(layout, dtype):
    x = (randn(4, 3, 5) * 100).to(dtype)
    y = with_layout(x, layout)
    assert y.stride() == STRIDES[layout] and y.dtype == dtype
    assert torch.equal(y, x[:1].expand(4, 3, 5) if layout == "expanded" else x)
    assert y.storage_offset() == {"offset_1": 1, "packed": 5}.get(layout, 0)


@pytest.mark.parametrize("layout", ["last_stride_2", "packed", "offset_1"])
def test_with_layout_surrounds_values_by_nan(layout):
    y = with_layout(randn(4, 3, 5), layout)
    memory = torch.empty(0).set_(y.untyped_storage())
    assert memory.isnan().sum() == memory.numel() - y.numel() > 0


def test_with_layout_of_another_name():
    with pytest.raises(ValueError, match="^with_layout: layout must be one of .*, got 'fortran'$"):
        with_layout(randn(2), "fortran")


def test_randn_is_the_same_in_every_dtype():
    x = randn(3, 4, seed=5, scale=2.0)
    assert torch.equal(x, randn(3, 4, seed=5, scale=2.0))
    assert not torch.equal(x, randn(3, 4, seed=6, scale=2.0))
    assert torch.equal(x.half(), randn(3, 4, seed=5, scale=2.0, dtype=torch.float16))


def test_measure_is_the_formula():
    gold = torch.tensor([4.0, -8.0], dtype=torch.float64)
    same, actual = torch.tensor([4.5, -8.0]), torch.tensor([4.0, -9.5])
    error = measure("x", actual, same, gold)
    bound = 2 * (0.5 + torch.finfo(torch.float32).eps * 8)
    assert (error.error, error.reference_error, error.bound) == (1.5, 0.5, bound)
    assert error.ratio == 1.5 / bound


def test_measure_of_an_empty_tensor():
    error = measure("x", torch.empty(0), torch.empty(0), torch.empty(0))
    assert (error.error, error.bound, error.ratio) == (0.0, 0.0, 0.0)


def test_check_gives_gradients_to_floating_inputs_alone():
    tensors = {
        "x": randn(3),
        "index": torch.tensor([2, 0]),
        "frozen": randn(3, seed=1),
        "absent": None,
    }

    def fn(x, index, frozen, absent, factor):
        assert absent is None and not frozen.requires_grad
        return (x * frozen * factor)[index], x.detach().sum()

    errors = check_against_reference(fn, fn, tensors, frozen=("frozen",), factor=3)
    assert [error.name for error in errors] == ["output 0", "output 1", "dx"]
    errors = check_against_reference(fn, fn, tensors, frozen=("frozen",), backward=False, factor=3)
    assert [error.name for error in errors] == ["output 0", "output 1"]


def test_check_over_draws_judges_the_largest_error():
    """A reference that is exact on one draw bounds nothing there, and no error may pass for it."""
    eps = torch.finfo(torch.float32).eps
    draws = [{"x": torch.tensor([1.0 + i % 2])} for i in range(4)]
    rounded = lambda x: x if x.dtype == torch.float64 else x * (1 + 8 * eps * (x.detach() > 1))
    bad = lambda factor: lambda x: x * (1 + factor * eps)
    with pytest.raises(AssertionError, match="output 0: error .* exceeds"):
        check_against_reference(bad(10), rounded, draws[0])
    errors = check_over_draws(bad(10), rounded, draws)
    assert [error.name for error in errors] == ["output 0", "dx"]
    with pytest.raises(AssertionError, match="output 0: error .* exceeds .*; worst at"):
        check_over_draws(bad(40), rounded, draws)


def test_check_keeps_the_layout_under_test():
    seen = []

    def fn(x):
        seen.append(x.stride())
        return x * 2

    check_against_reference(fn, fn, {"x": with_layout(randn(4, 6), "last_stride_2")})
    assert seen[0] == (12, 2)


def test_nan_filled_empty_restores_what_was_set():
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        with pytest.raises(KeyError), nan_filled_empty():
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
