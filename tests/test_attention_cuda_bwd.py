"""The CUDA C++ backward of attention: what is special to dq and to dk and dv."""

import functools

import pytest
import simt_build
import torch

import fastlm
from fastlm.ops import _attention_contract
from fastlm.reference import attention as reference
from fastlm.testing import assert_close, check_against_reference, nan_filled_empty, randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in the host build
randn = functools.partial(randn, device=DEVICE)
host_build = pytest.mark.interpreter  # of whose modes a GPU has none

# One for each compiled head dim, and between them, where the rest of a tile is 0.
HEADDIMS = [32, 40, 64, 96, 104, 128, 256]
HALVES = [torch.float16, torch.bfloat16]
# (batch, seqlen_q, seqlen_k, nheads, nheads_k): several tiles of both sides, none of them whole.
SHAPE = (1, 150, 170, 3, 1)


@pytest.fixture(autouse=True)
def _host_build():
    if DEVICE == "cpu":
        simt_build.configure("late", "random", 1)


def qkv(headdim, dtype=torch.bfloat16, shape=SHAPE):
    batch, seqlen_q, seqlen_k, nheads, nheads_k = shape
    return {
        "q": randn(batch, seqlen_q, nheads, headdim, dtype=dtype),
        "k": randn(batch, seqlen_k, nheads_k, headdim, dtype=dtype, seed=1),
        "v": randn(batch, seqlen_k, nheads_k, headdim, dtype=dtype, seed=2),
    }


def run(fn, q, k, v, **options):
    return fn(q, k, v, return_lse=True, **options)


def check(tensors, *, frozen=(), **options):
    """Both outputs have gradients, so that delta has its part of lse."""
    with nan_filled_empty():
        check_against_reference(
            lambda **kw: run(fastlm.attention, impl="cuda", **kw),
            lambda **kw: run(reference.attention, **kw),
            tensors, frozen=frozen, **options,
        )  # fmt: skip


def gradients(tensors, **options):
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = fastlm.attention(**leaves, impl="cuda", **options)
    with nan_filled_empty():
        return out, torch.autograd.grad(out, list(leaves.values()), randn_like(out))


def randn_like(x):
    return randn(*x.shape, dtype=x.dtype, seed=9)


DROPOUT = {"dropout_p": 0.3, "seed": torch.tensor(0x1234_5678_9ABC_DEF0, device=DEVICE)}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "top_left": {"causal": "top_left"},
    "window": {"window": (40, 20)},
    "left": {"window": (33, None), "causal": True},
    "right": {"window": (None, 70)},
    "dropout": {**DROPOUT, "causal": True},
    "negative": {"softmax_scale": -0.2},
}


@host_build
@pytest.mark.parametrize("mode", simt_build.MODES, ids="-".join)
@pytest.mark.parametrize("headdim", [32, 64, 96, 128, 256])
def test_gradients_in_every_mode(headdim, mode):
    simt_build.configure(*mode)
    check(qkv(headdim), causal=True)
    check(qkv(headdim, torch.float16, (1, 40, 70, 1, 1)), **DROPOUT)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("headdim", HEADDIMS)
def test_gradients(headdim, name, dtype):
    check(qkv(headdim, dtype), **OPTIONS[name])


# More queries than keys, and the other way round: tiles without a pair, and queries without a key.
# Not one query with "top_left": it sees one key, and a bound of 0 for gradients of 0 is no test.
UNEVEN = [
    (lengths, causal)
    for lengths in ((300, 130), (130, 300), (1, 300), (129, 2))
    for causal in (False, True, "top_left")
    if (lengths[0], causal) != (1, "top_left")
]


@pytest.mark.parametrize(("lengths", "causal"), UNEVEN)
def test_gradients_of_uneven_lengths(lengths, causal):
    seqlen_q, seqlen_k = lengths
    check(qkv(64, shape=(1, seqlen_q, seqlen_k, 2, 1)), causal=causal)


@pytest.mark.parametrize("window", [(0, 5), (5, 5), (100, 3), (3, 100)])
def test_gradients_of_narrow_windows(window):
    check(qkv(64, shape=(1, 300, 280, 2, 2)), window=window)


@pytest.mark.parametrize("heads", [(3, 1), (4, 2), (6, 2)])
def test_gradients_of_shared_keys(heads):
    check(qkv(64, shape=(2, 70, 200, *heads)), causal=True)


@pytest.mark.parametrize("headdim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_past_seqlens_k_may_hold_nan_and_get_zeros(headdim, causal):
    seqlens_k = torch.tensor([0, 290, 131], dtype=torch.int32, device=DEVICE)
    tensors = qkv(headdim, shape=(3, 100, 290, 2, 1))
    check(tensors, seqlens_k=seqlens_k, causal=causal)
    _, expected = gradients(tensors, seqlens_k=seqlens_k, causal=causal)
    for b, length in enumerate(seqlens_k):
        tensors["k"][b, length:] = tensors["v"][b, length:] = float("nan")
    _, actual = gradients(tensors, seqlens_k=seqlens_k, causal=causal)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    for b, length in enumerate(seqlens_k):
        assert not actual[1][b, length:].any() and not actual[2][b, length:].any()


def test_what_nobody_sees_may_hold_nan():
    """Keys before the window of the first query, and after the last query's; queries before the
    first key."""
    for shape, options, keys, queries in (
        ((1, 40, 300, 2, 1), {"window": (20, 0)}, slice(0, 240), slice(0, 0)),
        ((1, 40, 300, 2, 1), {"causal": "top_left"}, slice(40, 300), slice(0, 0)),
        ((1, 300, 40, 2, 1), {"causal": True}, slice(0, 0), slice(0, 260)),
    ):
        tensors = qkv(64, shape=shape)
        _, expected = gradients(tensors, **options)
        tensors["k"][:, keys] = tensors["v"][:, keys] = float("nan")
        tensors["q"][:, queries] = float("nan")
        _, (dq, dk, dv) = gradients(tensors, **options)
        for actual, wanted in zip((dq, dk, dv), expected, strict=True):
            assert torch.equal(actual, wanted)
        assert not dq[:, queries].any() and not dk[:, keys].any() and not dv[:, keys].any()


def test_incoming_gradients_of_queries_without_keys_may_hold_nan():
    leaves = [x.requires_grad_() for x in qkv(64, shape=(1, 100, 30, 1, 1)).values()]
    out = fastlm.attention(*leaves, causal=True, impl="cuda")
    incoming = randn_like(out)
    expected = torch.autograd.grad(out, leaves, incoming, retain_graph=True)
    incoming[:, :70] = float("nan")
    actual = torch.autograd.grad(out, leaves, incoming)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 10, 10, 2, 1), (1, 0, 10, 2, 1), (1, 10, 0, 2, 1)])
def test_empty(shape):
    out, grads = gradients(qkv(64, shape=shape))
    assert not out.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("headdim", [32, 64, 96, 128, 256])
def test_packed(headdim, dropout):
    """As each sequence alone, and 0 for tokens of none, which may hold NaN."""
    lengths_q, lengths_k = [70, 0, 33, 140], [130, 20, 0, 61]
    starts = lambda lengths: torch.tensor([3, *lengths], device=DEVICE).cumsum(0).int()
    cu_q, cu_k = starts(lengths_q), starts(lengths_k)
    tensors = {}
    for i, (name, cu, heads) in enumerate((("q", cu_q, 3), ("k", cu_k, 1), ("v", cu_k, 1))):
        x = randn(int(cu[-1]) + 2, heads, headdim, dtype=torch.bfloat16, seed=i)
        x[: cu[0]] = x[cu[-1] :] = float("nan")
        tensors[name] = x
    leaves = [x.requires_grad_() for x in tensors.values()]
    lengths = (cu_q, cu_k, max(lengths_q), max(lengths_k))
    out = fastlm.attention_varlen(*leaves, *lengths, causal=True, impl="cuda", **dropout)
    incoming = randn_like(out)
    with nan_filled_empty():
        grads = torch.autograd.grad(out, leaves, incoming)
    for grad, cu in zip(grads, (cu_q, cu_k, cu_k), strict=True):
        assert not grad[: cu[0]].any() and not grad[cu[-1] :].any() and grad.isfinite().all()
    inside = {n: x.detach()[cu[0] : cu[-1]] for (n, x), cu in
              zip(tensors.items(), (cu_q, cu_k, cu_k), strict=True)}  # fmt: skip
    start = (cu_q - cu_q[0], cu_k - cu_k[0], *lengths[2:])
    check_against_reference(
        lambda q, k, v, **kw: fastlm.attention_varlen(
            q, k, v, *start, impl="cuda", return_lse=True, **kw
        ),
        lambda q, k, v, **kw: reference.attention_varlen(q, k, v, *start, return_lse=True, **kw),
        inside, causal=True, **dropout,
    )  # fmt: skip


@host_build
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("headdim", [64, 256])
def test_the_same_bits_every_time_and_in_every_mode(headdim, options):
    leaves = [x.requires_grad_() for x in qkv(headdim).values()]
    out = fastlm.attention(*leaves, causal=True, impl="cuda", **options)
    results = []
    for mode in simt_build.MODES:
        simt_build.configure(*mode)
        results.append(torch.autograd.grad(out, leaves, randn_like(out), retain_graph=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_inputs_are_not_written():
    tensors = qkv(64)
    before = {name: x.clone() for name, x in tensors.items()}
    gradients(tensors, causal=True)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


@pytest.mark.parametrize("frozen", [("q",), ("k", "v"), ("k",), ("q", "v")], ids="-".join)
def test_frozen_inputs(frozen, monkeypatch):
    calls = []
    forward, backward = _attention_contract.CONTRACTS["cuda"]

    def recorded(*args):
        calls.append(args[-6:-4])
        grads = backward(*args)
        assert [bool(g.numel()) for g in grads[:3]] == [args[-6], args[-5], args[-5]]
        return grads

    monkeypatch.setitem(_attention_contract.CONTRACTS, "cuda", (forward, recorded))
    check(qkv(64), frozen=frozen, causal=True)
    assert calls == [("q" not in frozen, not {"k", "v"} <= set(frozen))]


def test_gradient_of_lse_alone():
    tensors = qkv(64, torch.float16).values()

    def gradients_of_lse(attention, dtype):
        q, k, v = (x.to(dtype).requires_grad_() for x in tensors)
        _, lse = attention(q, k, v, return_lse=True)
        return torch.autograd.grad(lse, (q, k), randn(*lse.shape).to(lse.dtype))

    actual = gradients_of_lse(functools.partial(fastlm.attention, impl="cuda"), torch.float16)
    same_dtype = gradients_of_lse(reference.attention, torch.float16)
    gold = gradients_of_lse(reference.attention, torch.float64)
    for name, *grads in zip(("dq", "dk"), actual, same_dtype, gold, strict=True):
        assert_close(name, *grads)


def test_strided_incoming_gradient():
    leaves = [x.requires_grad_() for x in qkv(64).values()]
    out = fastlm.attention(*leaves, impl="cuda")
    incoming = randn_like(out)
    transposed = incoming.transpose(1, 2).contiguous().transpose(1, 2)
    expected = torch.autograd.grad(out, leaves, incoming, retain_graph=True)
    actual = torch.autograd.grad(out, leaves, transposed, retain_graph=True)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    expanded = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(expanded, ones, strict=True))
