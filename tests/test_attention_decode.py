"""attention_decode's Triton kernels, against the reference."""

import functools
import subprocess
import sys

import pytest
import torch
from pairwise import pairwise

import fastlm
from fastlm.ops._attention_decode import attention_decode_append, attention_decode_fwd
from fastlm.reference import attention as reference
from fastlm.reference.relative_bias import RelativeBias
from fastlm.testing import assert_close, check_against_reference, nan_filled_empty, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
B, H, H_K, N, D, DV = 2, 4, 2, 41, 20, 12
LENGTHS = [[30, 7], [37, 0]]  # of 41; the second leaves just enough room for 4 new keys

OPTIONS = dict(
    dtype=DTYPES,
    seqlen_q=[1, 4, 9],  # 9 queries of 2 heads are more rows than the smallest tile has
    new=[0, 4],
    lengths=LENGTHS,
    causal=[True, False, "top_left"],
    window=[None, (3, 2), (5, None), (None, 0)],
    softmax_scale=[None, -0.3],
    mask=[None, (N,), (B, H, 1, N), (1, 1, 1, N)],
    bias=[None, "relative", "causal_relative", (B, 1, 1, N), (H, 1, 1), (1, 1, 1, N)],
    alibi=[None, (H,), (B, H)],
    softcap=[None, 0.9],
    sinks=[False, True],
)


def case(c, device) -> tuple[dict, dict]:
    """(tensors, options) of a call, from one value of each option."""
    dtype = c["dtype"]
    new = functools.partial(randn, device=device)
    lengths = torch.tensor(c["lengths"], device=device)
    filled = torch.arange(N, device=device) < lengths[:, None]
    poison = lambda x: torch.where(filled[..., None, None], x, float("nan"))
    tensors = {
        "q": new(B, c["seqlen_q"], H, D, dtype=dtype),
        "k_cache": poison(new(B, N, H_K, D, dtype=dtype, seed=1)),
        "v_cache": poison(new(B, N, H_K, DV, dtype=dtype, seed=2)),
    }
    if c["new"]:
        tensors["k_new"] = new(B, c["new"], H_K, D, dtype=dtype, seed=3)
        tensors["v_new"] = new(B, c["new"], H_K, DV, dtype=dtype, seed=4)
    if isinstance(c["bias"], str):
        tensors["table"] = new(6, H, dtype=dtype, seed=5)
    elif c["bias"] is not None:
        tensors["bias"] = new(*c["bias"], dtype=dtype, seed=5)
    if c["alibi"]:
        tensors["alibi_slopes"] = new(*c["alibi"], seed=6, scale=0.1)
    if c["sinks"]:
        tensors["sinks"] = new(H, dtype=dtype, seed=7)
    options = {n: c[n] for n in ("causal", "window", "softmax_scale", "softcap")}
    if c["mask"]:
        options["mask"] = new(*c["mask"], seed=8) > -0.3
    options["seqlens_k"] = lengths
    options["bidirectional"] = c["bias"] == "relative"
    return tensors, options


def decode(fn, q, k_cache, v_cache, *, table=None, bidirectional=True, **options):
    """(out, lse, caches) of `fn` on copies of the caches; NaN that was not read is 7 after it."""
    if table is not None:
        options["bias"] = RelativeBias(table, bidirectional=bidirectional, max_distance=9)
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    out = fn(q, k_cache, v_cache, return_lse=True, **options)
    return *out, k_cache.nan_to_num(7.0), v_cache.nan_to_num(7.0)


def triton(**options):
    return decode(fastlm.attention_decode, impl="triton", **options)


def by_reference(**options):
    return decode(reference.attention_decode, **options)


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("c", pairwise(**OPTIONS), ids=lambda c: str(c["seqlen_q"]))
def test_decode_every_pair_of_options(c, impl, device):
    tensors, options = case(c, device)
    with nan_filled_empty():
        check_against_reference(triton, by_reference, tensors, backward=False, **options)


def plain(device, dtype=torch.float32, headdim=D, nheads=H, nheads_k=H_K, seqlen_q=1):
    """(q, k_cache, v_cache) without new keys."""
    return (
        randn(B, seqlen_q, nheads, headdim, dtype=dtype, device=device),
        randn(B, N, nheads_k, headdim, dtype=dtype, device=device, seed=1),
        randn(B, N, nheads_k, headdim, dtype=dtype, device=device, seed=2),
    )


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize(
    "headdim,nheads,nheads_k", [(1, 2, 2), (256, 6, 2), (300, 1, 1), (8, 5, 1)]
)
def test_decode_shapes(headdim, nheads, nheads_k, impl, device):
    caches = plain(device, torch.float32, headdim, nheads, nheads_k)
    tensors = dict(zip(("q", "k_cache", "v_cache"), caches, strict=True))
    lengths = torch.tensor([41, 17], device=device)
    check_against_reference(triton, by_reference, tensors, backward=False, seqlens_k=lengths)


@pytest.mark.parametrize("impl", ["triton"])
def test_decode_dead_queries_and_keys_may_hold_nan(impl, device):
    q, k_cache, v_cache = plain(device)
    mask = torch.ones(B, 1, 1, N, dtype=torch.bool, device=device)
    mask[0, ..., 5] = False
    mask[1] = False
    k_cache[0, 5], v_cache[0, 5] = float("nan"), float("nan")
    k_cache[1], v_cache[1], q[1] = float("nan"), float("nan"), float("nan")
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    lens = torch.tensor([N, 20], device=device)
    options = {"seqlens_k": lens, "mask": mask, "sinks": randn(H, device=device)}
    check_against_reference(triton, by_reference, tensors, backward=False, **options)
    assert not triton(**tensors, **options)[0][1].any()


@pytest.mark.parametrize("impl", ["triton"])
def test_decode_appends_into_any_layout_and_dtype(impl, device):
    # Keys and values in one buffer.
    whole = torch.zeros(B, 3, H_K, N, D, dtype=torch.bfloat16, device=device)
    k_cache, v_cache = whole[:, 0].transpose(1, 2), whole[:, 2].transpose(1, 2)
    new = (
        randn(H_K, B, 2, D, device=device).movedim(0, 2),
        randn(B, 2, 1, D, device=device, seed=1).expand(B, 2, H_K, D),
    )
    lens = torch.tensor([39, 0], dtype=torch.int32, device=device)
    expected = whole.clone()
    for b, n in enumerate(lens.tolist()):
        for i, x in ((0, new[0]), (2, new[1])):
            expected[b, i, :, n : n + 2] = x[b].transpose(0, 1)
    q = randn(B, 2, H, D, device=device)
    before = q.clone(), lens.clone()
    out = fastlm.attention_decode(q, k_cache, v_cache, lens, k_new=new[0], v_new=new[1], impl=impl)
    assert out.dtype == torch.float32 and torch.equal(whole, expected)
    assert torch.equal(q, before[0]) and torch.equal(lens, before[1])
    gold = reference.attention(
        *(x.double() for x in (q, k_cache, v_cache)), causal=True, seqlens_k=lens + 2
    )
    same = reference.attention(q, k_cache, v_cache, causal=True, seqlens_k=lens + 2)
    assert_close("out", out, same, gold)


FULL = """
import torch, fastlm
q, cache = torch.ones(2, 1, 4, 16, device="cuda"), torch.ones(2, 41, 2, 16, device="cuda")
lens, new = torch.tensor([40, 0], device="cuda"), torch.ones(2, 2, 2, 16, device="cuda")
fastlm.attention_decode(q, cache, cache.clone(), lens, k_new=new, v_new=new, impl={impl!r})
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("impl", ["triton"])
def test_decode_does_not_write_past_the_cache(impl, device):
    """A GPU's assertion says so later, and ends what the process can do there: hence another."""
    if device == "cuda":
        call = [sys.executable, "-P", "-c", FULL.format(impl=impl)]
        result = subprocess.run(call, capture_output=True, text=True)
        assert result.returncode != 0 and "the cache is full" in result.stderr, result.stderr
        return
    q, k_cache, v_cache = plain(device)
    new = randn(B, 2, H_K, D)
    before = k_cache.clone()
    with pytest.raises(Exception, match="the cache is full"):
        lens = torch.tensor([40, 0])
        fastlm.attention_decode(q, k_cache, v_cache, lens, k_new=new, v_new=new, impl=impl)
    assert torch.equal(k_cache[1], before[1]) and torch.equal(k_cache[0, :40], before[0, :40])


@pytest.mark.parametrize("impl", ["triton"])
def test_decode_repeats_bit_for_bit_and_by_batch(impl, device):
    q, k_cache, v_cache = plain(device, torch.float16, seqlen_q=3)
    lens = torch.tensor([35, 18], device=device)
    first = fastlm.attention_decode(q, k_cache, v_cache, lens, impl=impl)
    again = fastlm.attention_decode(q, k_cache, v_cache, lens, impl=impl)
    flipped = fastlm.attention_decode(
        q.flip(0), k_cache.flip(0), v_cache.flip(0), lens.flip(0), impl=impl
    )
    assert torch.equal(first, again) and torch.equal(first, flipped.flip(0))


@pytest.mark.parametrize("impl", ["triton"])
def test_decode_autocast(impl, device):
    q, k_cache, v_cache = plain(device)
    lens = torch.tensor([35, 18], device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = fastlm.attention_decode(q, k_cache, v_cache, lens, impl=impl)
    lowered = [x.bfloat16() for x in (q, k_cache, v_cache)]
    assert torch.equal(out, fastlm.attention_decode(*lowered, lens, impl=impl))


@pytest.mark.parametrize("impl", ["triton"])
def test_decode_triton_compiles_fullgraph(impl, device):
    def step(q, k_cache, v_cache, lens, k_new, v_new):
        return fastlm.attention_decode(
            q, k_cache, v_cache, lens, k_new=k_new, v_new=v_new, impl=impl
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (step, compiled):
        q, k_cache, v_cache = plain(device)
        new, lens = randn(B, 1, H_K, D, device=device), torch.tensor([0, 9], device=device)
        args = q, k_cache, v_cache, lens, new, new.clone()
        results.append((fn(*args), k_cache, v_cache))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_decode_contracts(device):
    q, k_cache, v_cache = plain(device, seqlen_q=2)
    lens = torch.tensor([7, 0], device=device)
    new = randn(B, 1, H_K, D, device=device)
    torch.library.opcheck(attention_decode_append.op, (k_cache, v_cache, new, new, lens))
    table, slopes, bias = (randn(*s, device=device) for s in ((6, H), (B, H), (1, H, 1, N)))
    mask, sinks = torch.ones(1, 1, 1, N, dtype=torch.bool, device=device), randn(H, device=device)
    options = "bottom_right", 0.3, -1, 3, 1.5, True, 9
    for biases in ((None, table), (bias, None)):
        args = q, k_cache, v_cache, lens, 1, mask, *biases, slopes, sinks, *options
        torch.library.opcheck(attention_decode_fwd.op, args)


@pytest.mark.parametrize("change,reason", [
    ({"q": torch.ones(2, 1, 4, 8, dtype=torch.float64)},
     "computes in fp32 and does not take torch.float64"),
    ({"k_cache": torch.ones(2, 8, 2, 5).transpose(1, 3)},
     "takes caches with last stride 1, k_cache has 10"),
    ({"sinks": torch.ones(4, requires_grad=True)},
     "gives no gradients of bias, alibi_slopes and sinks (use torch.no_grad)"),
    ({"v_cache": torch.ones(2, 5, 2, 513)}, "does not take headdim_v above 512, here 513"),
])  # fmt: skip
def test_decode_triton_refuses(change, reason, device):
    good = {
        "q": torch.ones(2, 1, 4, 8), "k_cache": torch.ones(2, 5, 2, 8),
        "v_cache": torch.ones(2, 5, 2, 6), "seqlens_k": torch.ones(2, dtype=torch.int32),
    }  # fmt: skip
    # `detach` keeps strides, and makes leaves that require what they did.
    call = {
        n: x.to(device).detach().requires_grad_(x.requires_grad)
        for n, x in {**good, **change}.items()
    }
    with pytest.raises(NotImplementedError) as error:
        fastlm.attention_decode(**call, impl="triton")
    assert str(error.value) == f"attention_decode: impl='triton' {reason}; use impl='torch'"
    fastlm.attention_decode(**call)
