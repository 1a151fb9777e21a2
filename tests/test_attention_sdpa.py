"""scaled_dot_product_attention against torch's function of that name."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.ops import sdpa
from fastlm.testing import check_against_reference, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool_mask": {"attn_mask": randn(2, 1, 9, 13, seed=3) > 0},
    "row_mask": {"attn_mask": randn(1, 13, seed=3) > 0},
    "dead_rows": {"attn_mask": (randn(2, 4, 9, 13, seed=3) > 0) & (torch.arange(9) != 4)[:, None]},
}


def compare(tensors, **options):
    return check_against_reference(
        fastlm.scaled_dot_product_attention, F.scaled_dot_product_attention, tensors, **options
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nheads_k", [4, 2, 1])
@pytest.mark.parametrize("name", CALLS)
def test_sdpa_is_torch(name, nheads_k, dtype):
    tensors = {
        "query": randn(2, 4, 9, 16, dtype=dtype),
        "key": randn(2, nheads_k, 13, 16, dtype=dtype, seed=1),
        "value": randn(2, nheads_k, 13, 16, dtype=dtype, seed=2),
    }
    compare(tensors, **CALLS[name], enable_gqa=nheads_k < 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 13), (4, 1, 13), (2, 4, 9, 13)])
@pytest.mark.parametrize("frozen", [(), ("attn_mask",)])
def test_sdpa_additive_mask_and_its_gradient(frozen, shape, dtype):
    compare(
        {
            "query": randn(2, 4, 9, 16, dtype=dtype),
            "key": randn(2, 4, 13, 16, dtype=dtype, seed=1),
            "value": randn(2, 4, 13, 8, dtype=dtype, seed=2),
            "attn_mask": randn(*shape, dtype=dtype, seed=3),
        },
        frozen=frozen,
    )


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min])
def test_sdpa_additive_mask_that_forbids(fill):
    mask = torch.zeros(2, 1, 9, 13).masked_fill(randn(2, 1, 9, 13, seed=3) > 0, fill)
    mask[0, 0, 4] = fill  # a whole row: nothing for -inf, everything alike for the least number
    tensors = {n: randn(2, 4, m, 16, seed=m) for n, m in (("query", 9), ("key", 13))}
    tensors["value"] = randn(2, 4, 13, 16, seed=2)
    # The mask is an option, not a tensor of the oracle: its fp64 copy would hold other extremes.
    compare_with = lambda fn: (
        lambda **kw: fn(**{n: x.float() for n, x in kw.items()}, attn_mask=mask).to(
            kw["query"].dtype
        )
    )
    check_against_reference(
        compare_with(fastlm.scaled_dot_product_attention),
        compare_with(F.scaled_dot_product_attention),
        tensors,
    )


@pytest.mark.parametrize("leading", [(), (3,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_leading_dimensions(leading, is_causal):
    tensors = {
        n: randn(*leading, m, 8, seed=m) for n, m in (("query", 5), ("key", 7), ("value", 7))
    }
    compare(tensors, is_causal=is_causal)


def test_sdpa_mask_of_three_dimensions():
    tensors = {n: randn(3, m, 8, seed=m) for n, m in (("query", 5), ("key", 7), ("value", 7))}
    compare(tensors, attn_mask=randn(3, 5, 7, seed=9) > 0)


@pytest.mark.parametrize(
    "key,value", [((1, 4), (2, 1)), ((2, 1), (2, 1)), ((1, 1), (1, 4))], ids=str
)
def test_sdpa_broadcasts_leading_dimensions(key, value):
    compare({
        "query": randn(2, 4, 5, 8),
        "key": randn(*key, 7, 8, seed=1),
        "value": randn(*value, 7, 8, seed=2),
    })  # fmt: skip


def test_sdpa_makes_views(monkeypatch):
    seen = []
    original = sdpa.attention_as
    spy = lambda op, *args, **kw: seen.extend(args[:3]) or original(op, *args, **kw)
    monkeypatch.setattr(sdpa, "attention_as", spy)
    packed = randn(2, 5, 3, 4, 8)  # (batch, seqlen, 3, nheads, headdim)
    query, key, value = packed.unbind(2)
    fastlm.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in (query, key, value)]
    assert all(x.stride() == y.stride() for x, y in zip(seen, (query, key, value), strict=True))


def test_sdpa_dropout_keeps_the_mean_and_follows_the_generator():
    query, value = torch.zeros(1, 2, 64, 8), torch.ones(1, 2, 64, 8)
    run = lambda: fastlm.scaled_dot_product_attention(query, query, value, dropout_p=0.5)
    torch.manual_seed(3)
    out, other = run(), run()
    torch.manual_seed(3)
    assert torch.equal(out, run()) and not torch.equal(out, other)
    kept = out * 64 * 0.5  # each row keeps a binomial number of its 64 keys
    assert torch.equal(kept, kept.round())
    assert abs(kept.mean().item() - 32) < 4 / 2**0.5  # 8 deviations of a mean of 128 rows


def test_sdpa_of_nested_tensors_is_torchs():
    nested = torch.nested.nested_tensor(
        [randn(2, 5, 8), randn(2, 3, 8, seed=1)], layout=torch.strided
    )
    expected = F.scaled_dot_product_attention(nested, nested, nested)
    actual = fastlm.scaled_dot_product_attention(nested, nested, nested)
    for a, e in zip(actual.unbind(), expected.unbind(), strict=True):
        assert torch.equal(a, e)


def test_sdpa_does_not_call_what_users_replaced(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", fastlm.scaled_dot_product_attention)
    x = randn(2, 4, 5, 8)
    assert F.scaled_dot_product_attention(x, x, x).shape == x.shape
    deep = randn(2, 2, 4, 5, 8)
    assert F.scaled_dot_product_attention(deep, deep, deep).shape == deep.shape


def test_sdpa_signature_is_torchs():
    names = list(inspect.signature(fastlm.scaled_dot_product_attention).parameters)
    assert names == [
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    ]  # fmt: skip
    documented = " ".join(F.scaled_dot_product_attention.__doc__.split()).split(" ->")[0]
    assert documented == (
        "scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, "
        "is_causal=False, scale=None, enable_gqa=False)"
    )


def test_sdpa_compiles_fullgraph():
    q, k, v = (randn(2, 4, 6, 8, seed=i).requires_grad_() for i in range(3))
    mask = randn(2, 1, 6, 6) > 0
    fn = lambda q, k, v: fastlm.scaled_dot_product_attention(q, k, v, mask).square().sum()
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(fn(q, k, v), (q, k, v))
    actual = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_sdpa_errors():
    x = torch.ones(2, 4, 5, 8)
    with pytest.raises(TypeError) as error:
        fastlm.scaled_dot_product_attention(x, None, x)
    assert str(error.value) == ("scaled_dot_product_attention: key must be a tensor, got NoneType")
    with pytest.raises(ValueError) as error:
        fastlm.scaled_dot_product_attention(x, x, x, torch.ones(5, 5), is_causal=True)
    assert str(error.value) == (
        "scaled_dot_product_attention: attn_mask must be None with is_causal=True, got (5, 5)"
    )
    with pytest.raises(ValueError) as error:
        fastlm.scaled_dot_product_attention(x, x, x, torch.ones(3, 5))
    assert str(error.value) == (
        "scaled_dot_product_attention: bias must be broadcastable to "
        "(batch, nheads, seqlen_q, seqlen_k) = (2, 4, 5, 5), got (3, 5)"
    )
    with pytest.raises(RuntimeError):  # torch's own
        fastlm.scaled_dot_product_attention(x, x[:, :3], x[:, :3])
