"""column_sums, which ends every backward pass that leaves partial sums, against fp64."""

import itertools

import pytest
import torch

from fastlm.testing import assert_close, nan_filled_empty, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Rows of one and of several tiles, columns of one and of several blocks, primes, a power of two.
SIZES = [(1, 1), (2, 7), (13, 131), (64, 128), (528, 40), (1031, 33), (70, 1000), (3, 8200)]


@pytest.fixture
def column_sums():
    from fastlm.kernels.column_sum import column_sums

    return column_sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows,cols", SIZES)
def test_column_sums_against_fp64(rows, cols, dtype, column_sums, device, launches):
    partial = randn(rows, cols, device=device)
    with nan_filled_empty():
        (out,) = column_sums([partial], [dtype])
    assert launches == ["column_sum_kernel"] and out.dtype == dtype and out.shape == (cols,)
    assert_close("column_sums", out, partial.sum(0).to(dtype), partial.double().sum(0))


@pytest.mark.parametrize("dtypes", list(itertools.product([None, *DTYPES], repeat=2)), ids=str)
@pytest.mark.parametrize("rows,cols", [(5, 36), (40, 130)])
def test_column_sums_of_two_in_one_launch(rows, cols, dtypes, column_sums, device, launches):
    partials = [
        randn(0 if dtype is None else rows, cols, device=device, seed=i)
        for i, dtype in enumerate(dtypes)
    ]
    before = [x.clone() for x in partials]
    with nan_filled_empty():
        outs = column_sums(partials, dtypes)
        again = column_sums(partials, dtypes)
    assert launches == ["column_sum_kernel"] * (0 if dtypes == (None, None) else 2)
    for x, dtype, out, same in zip(partials, dtypes, outs, again, strict=True):
        if dtype is None:
            assert out is None and same is None
        else:
            assert torch.equal(out, same) and out.dtype == dtype
            assert_close("column_sums", out, x.sum(0).to(dtype), x.double().sum(0))
    assert all(torch.equal(x, b) for x, b in zip(partials, before, strict=True))


@pytest.mark.parametrize("rows,cols", [(0, 5), (4, 0), (0, 0)])
def test_column_sums_of_nothing_are_zero(rows, cols, column_sums, device):
    partial = torch.ones(rows, cols, device=device)
    with nan_filled_empty():
        outs = column_sums([partial, partial], [torch.float32, torch.bfloat16])
    assert all(out.shape == (cols,) and not out.any() for out in outs)


def test_column_sums_past_int32_offsets(column_sums, device):
    # Three rows 2**30 elements apart: the storage is committed lazily, three pages are touched. The
    # kernel is launched for the first columns alone.
    from fastlm.kernels.column_sum import _column_sum_kernel

    rows, cols = 3, 2**30 + 2
    partial = torch.empty(rows * cols, device=device)
    view = partial.as_strided((rows, 4), (cols, 1))
    view.copy_(torch.arange(12.0).view(3, 4))
    out = torch.empty(4, device=device)
    _column_sum_kernel[(1,)](
        partial, None, out, None, rows, cols, 1, BLOCK_M=8, BLOCK_N=4,
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    assert out.tolist() == [12.0, 15.0, 18.0, 21.0]


def test_column_sum_configs(monkeypatch):
    """Loads of 16 bytes and at most 32 values a thread, on as many multiprocessors as there are."""
    from fastlm.kernels import configs

    monkeypatch.setattr(configs, "target", lambda device: "sm_90")
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 132)
    device = torch.device("cpu")
    for rows, cols in itertools.product((1, 9, 528, 5000), (1, 64, 1024, 65536)):
        # Without its cache, which knows nothing of another target, and would tell other tests.
        config = configs.column_sum_config.__wrapped__(rows, cols, 2, device)
        assert 16 <= config.block_n <= 128 and config.block_m * config.block_n <= 8192
        assert config.block_m * config.block_n // (32 * config.num_warps) in (4, 8, 16, 32)
        assert config.block_n == 16 or 2 * configs.ceil_div(cols, config.block_n) >= 132
