"""Philox dropout: known answers, the reference's mask, and the kernels' helper bit for bit."""

import pytest
import torch
import triton
import triton.language as tl

from fastlm.kernels.primitives import dropout_keep
from fastlm.reference.dropout import (
    dropout_rows,
    dropout_scale,
    dropout_threshold,
    keep_mask,
    philox,
)

# Random123's kat_vectors for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = {
    "zeros": ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


@triton.jit
def _keep_kernel(
    seed_ptr, keep_ptr, threshold: tl.uint32, batch, head, first_row, first_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.arange(0, BLOCK_M)
    seed = tl.load(seed_ptr)
    keep = dropout_keep(seed, threshold, batch, head, first_row + offs_m, first_column, BLOCK_N)
    offsets = offs_m[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(keep_ptr + offsets, keep.to(tl.int8))


@triton.jit
def _words_kernel(counter_ptr, key_ptr, words_ptr):
    c = counter_ptr + tl.arange(0, 1)
    w0, w1, w2, w3 = tl.philox(
        tl.load(key_ptr), tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3)
    )
    out = words_ptr + tl.arange(0, 1)
    tl.store(out, w0.to(tl.int64))
    tl.store(out + 1, w1.to(tl.int64))
    tl.store(out + 2, w2.to(tl.int64))
    tl.store(out + 3, w3.to(tl.int64))


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_known_answers(name, impl, device):
    counter, key, expected = (_words(text) for text in KNOWN_ANSWERS[name])
    if impl == "torch":
        words = [w.item() for w in philox(*(torch.tensor(v) for v in (*counter, *key)))]
    else:
        key64 = key[0] | key[1] << 32
        seed = torch.tensor(key64 - 2**64 if key64 >= 2**63 else key64, device=device)
        counter32 = torch.tensor(counter, device=device).to(torch.int32)  # keeps the low 32 bits
        out = torch.empty(4, dtype=torch.int64, device=device)
        _words_kernel[(1,)](counter32, seed, out)
        words = out.tolist()
    assert words == expected


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0, 2**-32], ids="p={}".format)
@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("batch, head, row", [(0, 0, 0), (3, 5, 1000), (2, 2**31 + 7, 2**31 + 5)])
def test_dropout_keep_matches_reference(batch, head, row, seed, p, device):
    block_m, block_n, first_column = 4, 32, 96
    seed = torch.tensor(seed, device=device)
    keep = torch.empty(block_m, block_n, dtype=torch.int8, device=device)
    _keep_kernel[(1,)](
        seed, keep, dropout_threshold(p), batch, head, row, first_column, block_m, block_n
    )
    rows = torch.arange(row, row + block_m, device=device)
    expected = keep_mask(seed, p, batch, head, rows, first_column + block_n)
    assert torch.equal(keep.bool(), expected[:, first_column:])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9], ids="p={}".format)
def test_keep_mask_rate(p):
    """The kept fraction is within 5 deviations of 1 - p, overall and along every dimension."""
    batch = torch.arange(4)[:, None, None]
    head = torch.arange(4)[None, :, None]
    row = torch.arange(64)[None, None, :]
    keep = keep_mask(torch.tensor(1234), p, batch, head, row, 64).double()
    for dims in [(0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]:
        rate = keep.mean(dims)
        count = keep.numel() / rate.numel()
        assert ((rate - (1 - p)).abs() < 5 * (p * (1 - p) / count) ** 0.5).all()


def test_keep_mask_elements_are_independent():
    """Neighbours along every dimension, and another seed, agree as often as coins do."""
    batch = torch.arange(4)[:, None, None]
    head = torch.arange(4)[None, :, None]
    row = torch.arange(64)[None, None, :]
    keep = keep_mask(torch.tensor(7), 0.5, batch, head, row, 64)
    pairs = [(keep.narrow(d, 1, n - 1), keep.narrow(d, 0, n - 1)) for d, n in enumerate(keep.shape)]
    pairs.append((keep, keep_mask(torch.tensor(8), 0.5, batch, head, row, 64)))
    pairs.append((keep, keep_mask(torch.tensor(7 + 2**32), 0.5, batch, head, row, 64)))
    for a, b in pairs:
        assert abs((a == b).double().mean() - 0.5) < 5 * 0.5 / a.numel() ** 0.5


@pytest.mark.parametrize("columns", [0, 1, 3, 4, 5, 17])
def test_keep_mask_does_not_depend_on_the_width(columns):
    rows, seed = torch.arange(3), torch.tensor(5)
    mask = keep_mask(seed, 0.3, 1, 2, rows, columns)
    assert mask.shape == (3, columns)
    assert torch.equal(mask, keep_mask(seed, 0.3, 1, 2, rows, 64)[:, :columns])


def test_dropout_edges():
    x = torch.full((8, 16), 2.0)
    seed = torch.tensor(3)
    assert dropout_rows(x, 0.0, None) is x
    assert torch.equal(dropout_rows(x, 1.0, seed), torch.zeros_like(x))
    assert (dropout_threshold(0.0), dropout_threshold(0.5)) == (0, 2**31)
    assert dropout_threshold(1.0) == 2**32 - 1
    assert (dropout_scale(0.0), dropout_scale(0.75), dropout_scale(1.0)) == (1.0, 4.0, 0.0)
    y = dropout_rows(x, 0.5, seed)
    assert set(y.unique().tolist()) == {0.0, 4.0}
    # Leading dimensions are rows.
    assert torch.equal(dropout_rows(x.view(2, 4, 16), 0.5, seed), y.view(2, 4, 16))
