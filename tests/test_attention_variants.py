"""attention_varlen, attention_decode and attention_weights, against attention itself."""

import pytest
import torch
from attention_cases import PAIRS, SINGLES, case, run

import fastlm
from fastlm.reference import attention as reference
from fastlm.testing import assert_close, check_against_reference, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
H, H_K, D, DV = 4, 2, 8, 6
LENGTHS_Q, LENGTHS_K = [3, 0, 5, 1], [4, 2, 5, 0]  # the last query has no key
CU_Q, CU_K = (torch.tensor([0, *x]).cumsum(0).int() for x in (LENGTHS_Q, LENGTHS_K))
BATCH, MAX_Q, MAX_K = 4, 5, 5


def packed_case(names, dtype):
    """As `case`, for the sequences above."""
    tensors, options = case(*names, dtype=dtype)
    tensors["q"] = randn(sum(LENGTHS_Q), H, D, dtype=dtype)
    tensors["k"] = randn(sum(LENGTHS_K), H_K, D, dtype=dtype, seed=1)
    tensors["v"] = randn(sum(LENGTHS_K), H_K, DV, dtype=dtype, seed=2)
    if "alibi_slopes" in tensors:
        tensors["alibi_slopes"] = randn(BATCH, H, dtype=dtype, seed=3)
    if "bias" in tensors:
        tensors["bias"] = randn(BATCH, H, 1, MAX_K, dtype=dtype, seed=3)
    if "mask" in options:
        options["mask"] = randn(BATCH, 1, MAX_Q, MAX_K, seed=8) > -0.3
    if "seqlens_k" in options:
        options["seqlens_k"] = torch.tensor([3, 9, 0, 1], dtype=torch.int32)
    return tensors, options


def one_by_one(q, k, v, *, bias=None, mask=None, alibi_slopes=None, table=None, **options):
    """`attention_varlen` as a loop over sequences; a batch index too many is cut off again."""
    outs, lses = [], []
    lens = options.pop("seqlens_k", torch.tensor(LENGTHS_K))
    for b in range(BATCH):
        rows, columns = slice(CU_Q[b], CU_Q[b + 1]), slice(CU_K[b], CU_K[b + 1])
        m, n = LENGTHS_Q[b], LENGTHS_K[b]
        # Dropout counts the batch: sequence b is the b-th of a batch of copies.
        copies = lambda x, b=b: x[None].expand(b + 1, *x.shape)
        own = {
            "bias": None if bias is None else bias[b, :, :, :n],
            "mask": None if mask is None else mask[b, :, :m, :n],
            "alibi_slopes": None if alibi_slopes is None else alibi_slopes[b],
            "table": table,
            "seqlens_k": lens[b].clamp(max=n).expand(b + 1),
        }
        out, lse = run(
            reference.attention, copies(q[rows]), copies(k[columns]), copies(v[columns]),
            **own, **options, return_lse=True,
        )  # fmt: skip
        outs.append(out[b])
        lses.append(lse[b])
    return torch.cat(outs), torch.cat(lses, dim=1)


def varlen(q, k, v, **options):
    call = lambda q, k, v, **kw: fastlm.attention_varlen(q, k, v, CU_Q, CU_K, MAX_Q, MAX_K, **kw)
    return run(call, q, k, v, return_lse=True, **options)


@pytest.mark.parametrize("names", SINGLES + PAIRS, ids="-".join)
def test_varlen_is_one_sequence_after_another(names):
    tensors, options = packed_case(names, torch.float32)
    check_against_reference(varlen, one_by_one, tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_varlen_dtypes(dtype):
    tensors, options = packed_case(("causal", "sinks"), dtype)
    check_against_reference(varlen, one_by_one, tensors, **options)


def test_varlen_dropout_mask_is_bitwise_that_of_each_sequence():
    tensors, options = packed_case(("dropout",), torch.float32)
    tensors["v"] = torch.cat([torch.eye(MAX_K)[:n] for n in LENGTHS_K])[:, None].repeat(1, H_K, 1)
    dropped = varlen(**tensors, **options)[0] == 0
    assert torch.equal(dropped, one_by_one(**tensors, **options)[0] == 0)
    assert dropped[:3, :, :4].any() and not dropped[:3, :, :4].all()


def test_varlen_gradcheck():
    tensors, options = packed_case(("causal", "relative_bias", "dropout"), torch.float64)
    fn = lambda *values: varlen(**dict(zip(tensors, values, strict=True)), **options)[0]
    leaves = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)


def test_varlen_tokens_of_no_sequence():
    tensors, _ = packed_case((), torch.float32)
    stray = {n: torch.cat([x, torch.full_like(x[:2], float("nan"))]) for n, x in tensors.items()}
    leaves = [x.requires_grad_() for x in stray.values()]
    out, lse = varlen(*leaves)
    expected, expected_lse = varlen(**tensors)
    assert torch.equal(out[:-2], expected) and not out[-2:].any()
    assert torch.equal(lse[:, :-2], expected_lse) and (lse[:, -2:] == float("-inf")).all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all() and not grad[-2:].any()


def test_varlen_empty():
    zero = torch.zeros(1, dtype=torch.int32)
    x = torch.ones(0, 2, 8, requires_grad=True)
    out, lse = fastlm.attention_varlen(x, x, x, zero, zero, 0, 0, return_lse=True)
    assert out.shape == (0, 2, 8) and lse.shape == (2, 0)
    out.sum().backward()
    q = torch.ones(3, 2, 8)  # three queries and no key
    out = fastlm.attention_varlen(q, x, x, torch.tensor([0, 3]), torch.tensor([0, 0]), 3, 0)
    assert not out.any()


def test_varlen_compiles_fullgraph():
    tensors, options = packed_case(("causal", "relative_bias"), torch.float32)
    leaves = [x.requires_grad_() for x in tensors.values()]
    fn = lambda *values: varlen(**dict(zip(tensors, values, strict=True)), **options)[0]
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(fn(*leaves).square().sum(), leaves)
    actual = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_varlen_autocast():
    tensors, _ = packed_case((), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = varlen(**tensors)
    expected, _ = varlen(**{n: x.bfloat16() for n, x in tensors.items()})
    assert torch.equal(out, expected) and lse.dtype == torch.float32


I32 = torch.int32


@pytest.mark.parametrize("change,message", [
    ({"q": torch.ones(2, 3, 4, 8)},
     "attention_varlen: q must have shape (tokens_q, nheads, headdim), got (2, 3, 4, 8)"),
    ({"k": torch.ones(5, 2, 7)},
     "attention_varlen: k must have shape (tokens_k, nheads_k, headdim) = (*, *, 8), "
     "got (5, 2, 7)"),
    ({"v": torch.ones(4, 2, 8)},
     "attention_varlen: v must have shape (tokens_k, nheads_k, headdim_v) = (5, 2, *), "
     "got (4, 2, 8)"),
    ({"cu_seqlens_q": torch.ones(2)},
     "attention_varlen: cu_seqlens_q must have dtype torch.int32 or torch.int64, "
     "got torch.float32"),
    ({"cu_seqlens_q": torch.zeros(0, dtype=I32)},
     "attention_varlen: cu_seqlens_q must have shape (batch + 1,), got (0,)"),
    ({"cu_seqlens_k": torch.zeros(3, dtype=I32)},
     "attention_varlen: cu_seqlens_k must have shape (batch + 1,) = (2,), got (3,)"),
    ({"max_seqlen_q": torch.tensor(3)},
     "attention_varlen: max_seqlen_q must be an int, got Tensor"),
    ({"max_seqlen_k": -1}, "attention_varlen: max_seqlen_k must be at least 0, got -1"),
    ({"sinks": torch.ones(3)},
     "attention_varlen: sinks must have shape (nheads,) = (4,), got (3,)"),
    ({"impl": "numpy"},
     "attention_varlen: impl must be None, 'cuda', 'triton' or 'torch', got 'numpy'"),
])  # fmt: skip
def test_varlen_errors(change, message):
    good = {
        "q": torch.ones(3, 4, 8), "k": torch.ones(5, 2, 8), "v": torch.ones(5, 2, 8),
        "cu_seqlens_q": torch.tensor([0, 3]), "cu_seqlens_k": torch.tensor([0, 5]),
        "max_seqlen_q": 3, "max_seqlen_k": 5,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
        fastlm.attention_varlen(**{**good, **change})
    assert str(error.value) == message


def caches(batch=2, seqlen=12, dtype=torch.float32):
    """Caches whose unfilled part is NaN."""
    fill = float("nan")
    return (
        torch.full((batch, seqlen, H_K, D), fill, dtype=dtype),
        torch.full((batch, seqlen, H_K, DV), fill, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "names", [s for s in SINGLES if s[0] not in ("dropout", "seqlens_k", "top_left", "mask")],
    ids="-".join,
)  # fmt: skip
def test_decode_in_steps_is_one_causal_attention(names, dtype):
    tensors, options = case(*names, dtype=dtype)
    q = randn(2, 9, H, D, dtype=dtype)
    k, v = randn(2, 9, H_K, D, dtype=dtype, seed=1), randn(2, 9, H_K, DV, dtype=dtype, seed=2)
    extra = {n: x for n, x in tensors.items() if n not in "qkv"}
    if "bias" in extra:
        extra["bias"] = randn(H, 1, 12, dtype=dtype, seed=3)
    options["causal"] = True

    def in_one(q, k, v, bias=None, **kw):
        bias = None if bias is None else bias[..., :9]
        return run(reference.attention, q, k, v, bias=bias, **options, return_lse=True, **kw)

    def in_steps(q, k, v, **kw):
        k_cache, v_cache = caches(dtype=dtype)
        lens, outs = torch.zeros(2, dtype=torch.int32), []
        decode = lambda q, k, v, **rest: fastlm.attention_decode(
            q, k_cache, v_cache, lens, k_new=k, v_new=v, return_lse=True, **rest
        )
        for begin, end in ((0, 4), (4, 5), (5, 8), (8, 9)):
            part = slice(begin, end)
            outs.append(run(decode, q[:, part], k[:, part], v[:, part], **options, **kw))
            lens += end - begin
        assert torch.equal(k_cache[:, :9], k) and torch.equal(v_cache[:, :9], v)
        assert k_cache[:, 9:].isnan().all() and v_cache[:, 9:].isnan().all()
        return torch.cat([o for o, _ in outs], 1), torch.cat([x for _, x in outs], 2)

    check_against_reference(
        in_steps, in_one, {"q": q, "k": k, "v": v, **extra}, backward=False
    )  # fmt: skip


def test_decode_appends_at_each_sequences_own_length():
    k_cache, v_cache = caches()
    lens = torch.tensor([3, 7])
    for b, n in enumerate(lens):
        k_cache[b, :n] = randn(n, H_K, D, seed=b)
        v_cache[b, :n] = randn(n, H_K, DV, seed=b + 2)
    q, k_new, v_new = randn(2, 2, H, D), randn(2, 2, H_K, D, seed=4), randn(2, 2, H_K, DV, seed=5)
    before = k_cache.clone(), v_cache.clone()
    out = fastlm.attention_decode(q, k_cache, v_cache, lens, k_new=k_new, v_new=v_new)
    assert lens.tolist() == [3, 7]
    for b, n in enumerate((3, 7)):
        k = torch.cat([before[0][b, :n], k_new[b]])[None]
        v = torch.cat([before[1][b, :n], v_new[b]])[None]
        gold = reference.attention(*(x.double() for x in (q[b : b + 1], k, v)), causal=True)
        same = reference.attention(q[b : b + 1], k, v, causal=True)
        assert_close("out", out[b : b + 1], same, gold)
        assert torch.equal(k_cache[b, n : n + 2], k_new[b])
        assert torch.equal(k_cache[b, :n], before[0][b, :n])
    # The same caches, without new keys, as a cross-attention sees them.
    same = fastlm.attention_decode(q, k_cache, v_cache, lens + 2, causal=False)
    expected = fastlm.attention(
        q, k_cache.nan_to_num(7.0), v_cache.nan_to_num(7.0), seqlens_k=lens + 2
    )
    assert torch.equal(same, expected)


def test_decode_of_an_empty_cache_and_of_another_dtype():
    k_cache, v_cache = caches(dtype=torch.bfloat16)
    q = randn(2, 1, H, D)
    lens = torch.zeros(2, dtype=torch.int64)
    out, lse = fastlm.attention_decode(q, k_cache, v_cache, lens, return_lse=True)
    assert not out.any() and (lse == float("-inf")).all() and out.dtype == torch.float32
    k_new, v_new = randn(2, 1, H_K, D), randn(2, 1, H_K, DV)
    fastlm.attention_decode(q, k_cache, v_cache, lens, k_new=k_new, v_new=v_new)
    assert torch.equal(k_cache[:, 0], k_new[:, 0].bfloat16())


def test_decode_writes_into_views_of_a_cache():
    whole = torch.zeros(2, H_K, 12, D)
    view = whole.transpose(1, 2)
    new = randn(2, 1, H_K, D)
    lens = torch.tensor([2, 5])
    fastlm.attention_decode(randn(2, 1, H, D), view, view.clone(), lens, k_new=new, v_new=new)
    assert torch.equal(whole[0, :, 2], new[0, 0]) and torch.equal(whole[1, :, 5], new[1, 0])


def test_decode_past_the_end_of_the_cache():
    k_cache, v_cache = caches()
    new = randn(2, 2, H_K, D), randn(2, 2, H_K, DV)
    with pytest.raises(IndexError):
        fastlm.attention_decode(
            randn(2, 2, H, D), k_cache, v_cache, torch.tensor([0, 11]), k_new=new[0], v_new=new[1]
        )


def test_decode_compiles_fullgraph():
    def step(q, k_cache, v_cache, lens, k_new, v_new):
        return fastlm.attention_decode(q, k_cache, v_cache, lens, k_new=k_new, v_new=v_new)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (step, compiled):
        k_cache, v_cache = caches()
        lens = torch.tensor([0, 0])
        args = randn(2, 3, H, D), k_cache, v_cache, lens, randn(2, 3, H_K, D), randn(2, 3, H_K, DV)
        results.append((fn(*args), k_cache.nan_to_num(7.0)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("change,message", [
    ({"k_cache": torch.ones(2, 5, 2, 7)},
     "attention_decode: k_cache must have shape (batch, seqlen_k, nheads_k, headdim) = "
     "(2, *, *, 8), got (2, 5, 2, 7)"),
    ({"seqlens_k": torch.ones(3, dtype=I32)},
     "attention_decode: seqlens_k must have shape (batch,) = (2,), got (3,)"),
    ({"seqlens_k": 3}, "attention_decode: seqlens_k must be a tensor, got int"),
    ({"v_new": None}, "attention_decode: v_new must be given with k_new, got None"),
    ({"k_new": None}, "attention_decode: k_new must be given with v_new, got None"),
    ({"k_new": torch.ones(2, 1, 4, 8)},
     "attention_decode: k_new must have shape (batch, seqlen_new, nheads_k, headdim) = "
     "(2, *, 2, 8), got (2, 1, 4, 8)"),
    ({"v_new": torch.ones(2, 2, 2, 6)},
     "attention_decode: v_new must have seqlen_new = 1, as k_new, got 2"),
    ({"q": torch.ones(2, 1, 4, 8, requires_grad=True)},
     "attention_decode: q must be without gradient, since the caches change in place "
     "(use torch.no_grad), got requires_grad=True"),
])  # fmt: skip
def test_decode_errors(change, message):
    good = {
        "q": torch.ones(2, 1, 4, 8), "k_cache": torch.ones(2, 5, 2, 8),
        "v_cache": torch.ones(2, 5, 2, 6), "seqlens_k": torch.ones(2, dtype=I32),
        "k_new": torch.ones(2, 1, 2, 8), "v_new": torch.ones(2, 1, 2, 6),
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError)) as error:
        fastlm.attention_decode(**{**good, **change})
    assert str(error.value) == message


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", SINGLES, ids="-".join)
def test_weights_times_values_is_attention(names, dtype):
    tensors, options = case(*names, dtype=dtype)
    out, lse = run(fastlm.attention, **tensors, **options, return_lse=True)
    v = tensors.pop("v")
    values = {**tensors, "v": lse}
    weights = run(fastlm.attention_weights, **values, **options)
    assert weights.dtype == dtype and weights.shape == (2, 4, 4, 5)
    heads = v.transpose(1, 2).repeat_interleave(2, dim=1)
    product = lambda to: (weights.to(to) @ heads.to(to)).transpose(1, 2)
    gold_tensors = {n: x.double() for n, x in tensors.items()}
    gold = run(reference.attention, v=v.double(), **gold_tensors, **options)
    assert_close("weights @ v", product(torch.float32).to(dtype), out, gold)
    forbidden = reference.masked_scores(
        tensors["q"], tensors["k"],
        **{n: x for n, x in options.items() if n not in ("dropout_p", "seed")},
    )[1]  # fmt: skip
    if forbidden is not None:
        assert not weights[~forbidden.expand_as(weights)].any()


@pytest.mark.parametrize("names", [("plain",), ("causal", "relative_bias"), ("mask", "softcap")])
def test_weights_gradients_reach_through_lse(names):
    def through(fn, weights_fn):
        def both(q, k, v, **kw):
            lse = run(fn, q, k, v, return_lse=True, **kw)[1]
            return run(weights_fn, q, k, lse, **kw)

        return both

    tensors, options = case(*names, dtype=torch.float32)
    check_against_reference(
        through(fastlm.attention, fastlm.attention_weights),
        through(reference.attention, reference.attention_weights),
        tensors,
        frozen=("v",),
        **options,
    )


def test_weights_of_multihead_attention():
    torch_mha = torch.nn.MultiheadAttention(32, H, batch_first=True)
    x = randn(2, 7, 32)
    with torch.no_grad():
        _, expected = torch_mha(x, x, x, average_attn_weights=False)
        projected = torch.nn.functional.linear(x, torch_mha.in_proj_weight, torch_mha.in_proj_bias)
        q, k, v = (y.unflatten(-1, (H, D)) for y in projected.chunk(3, dim=-1))
        _, lse = fastlm.attention(q, k, v, return_lse=True)
        weights = fastlm.attention_weights(q, k, lse)
        gold_lse = reference.attention(*(y.double() for y in (q, k, v)), return_lse=True)[1]
        gold = reference.attention_weights(q.double(), k.double(), gold_lse)
    assert_close("weights", weights, expected, gold)


@pytest.mark.parametrize("change,message", [
    ({"lse": torch.ones(2, 3, 4)},
     "attention_weights: lse must have shape (batch, nheads, seqlen_q) = (2, 4, 3), "
     "got (2, 3, 4)"),
    ({"k": torch.ones(2, 3, 3, 8)},
     "attention_weights: nheads must be a positive multiple of nheads_k = 3, got 4"),
    ({"window": 1},
     "attention_weights: window must be None or a pair (left, right), each None or an int from "
     "0, got 1"),
    ({"impl": "cuda"},
     "attention_weights: fastlm has no cuda kernel for attention_weights; use impl='torch'"),
    ({"impl": "triton", "lse": torch.ones(2, 4, 3), "q": torch.ones(2, 3, 4, 8).double()},
     "attention_weights: impl='triton' computes in fp32 and does not take torch.float64; "
     "use impl='torch'"),
])  # fmt: skip
def test_weights_errors(change, message):
    x = torch.ones(2, 3, 4, 8)
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
        fastlm.attention_weights(**{"q": x, "k": x, "lse": torch.ones(2, 4, 3), **change})
    assert str(error.value) == message
