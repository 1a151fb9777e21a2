"""scaled_dot_product_attention against torch's function of that name."""

import functools
import inspect
import itertools
import math

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


def on(device, options):
    """Options whose tensors are on a device; not for tensors whose strides matter."""
    return {n: x.to(device) if torch.is_tensor(x) else x for n, x in options.items()}


def torchs(**kw):
    """Torch's function, on a GPU too by its kernels for the CPU.

    They give 0 where a query has no key, and take every documented call and fp32 masks beside
    halves. Which of its kernels for GPUs runs depends on the call and the version, they are
    documented to have other limits and numbers, and cuDNN's gives NaN for some masks
    (pytorch/pytorch#196678). "math" is no substitute: where a query sees one key, its gradient is 0
    exactly, which bounds nothing.
    """
    return F.scaled_dot_product_attention(**on("cpu", kw)).to(kw["query"].device)


def compare(tensors, **options):
    return check_against_reference(fastlm.scaled_dot_product_attention, torchs, tensors, **options)


@pytest.fixture(params=["triton", "torch"])
def impl(request, monkeypatch):
    """Torch's signature has no impl."""
    original = sdpa.attention_as
    on = lambda op, q, k, v, _, **options: original(op, q, k, v, request.param, **options)
    monkeypatch.setattr(sdpa, "attention_as", on)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nheads_k", [4, 2, 1])
@pytest.mark.parametrize("name", CALLS)
def test_sdpa_is_torch(name, nheads_k, dtype, device):
    keys = (2, nheads_k, 13, 16)
    tensors = qkv((2, 4, 9, 16), keys, dtype=dtype, device=device)
    compare(tensors, **on(device, CALLS[name]), enable_gqa=nheads_k < 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 13), (4, 1, 13), (2, 4, 9, 13)])
@pytest.mark.parametrize("frozen", [(), ("attn_mask",)])
def test_sdpa_additive_mask_and_its_gradient(frozen, shape, dtype, device):
    shapes = (2, 4, 9, 16), (2, 4, 13, 16), (2, 4, 13, 8)
    tensors = qkv(*shapes, dtype=dtype, device=device)
    tensors["attn_mask"] = randn(*shape, dtype=dtype, device=device, seed=3)
    compare(tensors, frozen=frozen)


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min])
def test_sdpa_additive_mask_that_forbids(fill, device):
    mask = torch.zeros(2, 1, 9, 13).masked_fill(randn(2, 1, 9, 13, seed=3) > 0, fill).to(device)
    mask[0, 0, 4] = fill  # a whole row: nothing for -inf, everything alike for the least number
    named = (("query", 9), ("key", 13))
    tensors = {n: randn(2, 4, m, 16, device=device, seed=m) for n, m in named}
    tensors["value"] = randn(2, 4, 13, 16, device=device, seed=2)
    # The mask is an option, not a tensor of the oracle: its fp64 copy would hold other extremes.
    compare_with = lambda fn: (
        lambda **kw: fn(**{n: x.float() for n, x in kw.items()}, attn_mask=mask).to(
            kw["query"].dtype
        )
    )
    check_against_reference(
        compare_with(fastlm.scaled_dot_product_attention), compare_with(torchs), tensors
    )


@pytest.mark.parametrize("leading", [(), (3,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_leading_dimensions(leading, is_causal, device):
    compare(five_and_seven(*leading, device=device), is_causal=is_causal)


def five_and_seven(*leading, device):
    """Five queries, seven keys, and the keys as values."""
    lengths = {"query": 5, "key": 7, "value": 7}
    return {n: randn(*leading, m, 8, device=device, seed=m) for n, m in lengths.items()}


def test_sdpa_mask_of_three_dimensions(device):
    mask = randn(3, 5, 7, device=device, seed=9) > 0
    compare(five_and_seven(3, device=device), attn_mask=mask)


@pytest.mark.parametrize(
    "key,value", [((1, 4), (2, 1)), ((2, 1), (2, 1)), ((1, 1), (1, 4))], ids=str
)
def test_sdpa_broadcasts_leading_dimensions(key, value, device):
    compare(qkv((2, 4, 5, 8), (*key, 7, 8), (*value, 7, 8), device=device))


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


# What follows are the cases of torch's own tests (test/test_transformers.py).
Q, K = (2, 2, 9, 8), (2, 2, 13, 8)
MASKS = [
    (9, 13), (9, 1), (1, 13), (1, 1), (2, 9, 13), (1, 9, 13),
    *itertools.product((2, 1), (2, 1), (9, 1), (13, 1)),
]  # fmt: skip


def qkv(query=Q, key=K, value=None, *, dtype=torch.float32, device):
    shapes = {"query": query, "key": key, "value": key if value is None else value}
    return {
        n: randn(*shape, dtype=dtype, device=device, seed=i)
        for i, (n, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_sdpa_mask_shapes(shape, additive, dtype, impl, device):
    tensors = qkv(dtype=dtype, device=device)
    mask = randn(*shape, dtype=dtype, device=device, seed=3)
    if additive:
        compare(tensors | {"attn_mask": mask}, frozen=("attn_mask",))
    else:
        compare(tensors, attn_mask=mask > 0)


@pytest.mark.parametrize("kind", ["add", "bool"])
def test_sdpa_mask_of_one_dimension(kind, impl, device):
    """Torch's fused CPU kernel has no case for it, its others do."""
    tensors, mask = qkv(device=device), randn(13, device=device, seed=3)
    mask = mask > 0 if kind == "bool" else mask
    actual = fastlm.scaled_dot_product_attention(**tensors, attn_mask=mask)
    expected = fastlm.scaled_dot_product_attention(**tensors, attn_mask=mask[None])
    assert torch.equal(actual, expected)


def test_sdpa_mask_of_fp32_beside_halves(impl, device):
    """Not `compare`: its fp64 copies take the mask in fp64 alone."""
    mask = randn(9, 13, device=device, seed=3)
    widened = lambda x: mask.double() if x.dtype == torch.float64 else mask
    check_against_reference(
        lambda **kw: fastlm.scaled_dot_product_attention(**kw, attn_mask=mask),
        lambda **kw: torchs(**kw, attn_mask=widened(kw["query"])),
        qkv(dtype=torch.bfloat16, device=device),
    )


@pytest.mark.parametrize("scale", [-1e4, -0.5, 0.0, 3])
def test_sdpa_scales(scale, impl, device):
    """Negative ones too; logits of tens of thousands."""
    x = randn(1, 3, 20, 16, device=device)
    compare({"query": x, "key": x, "value": x}, scale=scale)


def test_sdpa_band_of_infinities(impl, device):
    full = torch.full((70, 70), -math.inf, device=device)
    band = torch.triu(full, diagonal=1) + torch.tril(full, diagonal=-10)
    fn = lambda sdpa: lambda **kw: sdpa(**kw, attn_mask=band.to(kw["query"].dtype))
    check_against_reference(
        fn(fastlm.scaled_dot_product_attention),
        fn(torchs),
        qkv((1, 2, 70, 8), (1, 2, 70, 8), device=device),
    )


@pytest.mark.parametrize("queries,keys", [(13, 9), (9, 13), (1, 13), (13, 1)])
def test_sdpa_causal_is_top_left(queries, keys, impl, device):
    compare(qkv((4, 4, queries, 8), (4, 4, keys, 8), device=device), is_causal=True)


# query, key and value from a `randn` of the device, since moving a tensor may change its strides.
STRIDED = {
    "packed": lambda new: new(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0),
    "last_stride": lambda new: [new(2, 2, 8, 9, seed=i).transpose(2, 3) for i in range(3)],
    "overlapping": lambda new: [
        new(40, seed=i).as_strided((2, 2, 8, 8), (2,) * 4) for i in range(3)
    ],
    "no_stride": lambda new: [
        new(2304 * 3).as_strided((3, 4, 1, 8), (2304, 128, 2048, 1)),
        *(new(3584 * 3, seed=i).as_strided((3, 4, 14, 8), (3584, 0, 256, 1)) for i in (1, 2)),
    ],
    "unaligned": lambda new: [new(2, 2, 8, 6, seed=i)[..., 1:] for i in range(3)],
    "singleton": lambda new: [
        new(1, 1, 1, 2).transpose(2, 3), new(1, 1, 1, 1, seed=1), new(1, 1, 1, 1, seed=2),
    ],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", STRIDED)
def test_sdpa_strides(name, dtype, impl, device):
    """Forward alone: a gradient of overlapping memory is another matter, and contiguous."""
    strided = STRIDED[name](functools.partial(randn, device=device))
    tensors = dict(zip(("query", "key", "value"), strided, strict=True))
    half = {n: x.to(dtype) for n, x in tensors.items()}
    if dtype == torch.float32:
        assert all(half[n] is x for n, x in tensors.items())
    compare(half, backward=False)


def test_sdpa_mask_strides(impl, device):
    mask = randn(2, 2, 9, 13, device=device, seed=3)
    for strided in (
        mask.as_strided((2, 2, 9, 13), (0, 0, 0, 1)),
        mask.transpose(0, 1),
        randn(2, 2, 13, 9, device=device).transpose(2, 3),
        randn(2, 2, 9, 26, device=device)[..., 1::2],
    ):
        compare(qkv(device=device) | {"attn_mask": strided}, backward=False)
        compare(qkv(device=device), attn_mask=strided > 0, backward=False)


@pytest.mark.parametrize("headdim,headdim_v", [(1, 1), (5, 5), (57, 57), (16, 20), (20, 4)])
def test_sdpa_head_dims(headdim, headdim_v, impl, device):
    shapes = (1, 2, 9, headdim), (1, 2, 7, headdim), (1, 2, 7, headdim_v)
    compare(qkv(*shapes, device=device))


def test_sdpa_large_values_are_finite(impl, device):
    x = torch.full((1, 1, 1, 64), 133120.0, dtype=torch.bfloat16, device=device)
    assert torch.equal(fastlm.scaled_dot_product_attention(x, x, x), x)


EMPTY = {
    "batch": [(0, 2, 9, 8), (0, 2, 13, 8)],
    "heads": [(2, 0, 9, 8), (2, 0, 13, 8)],
    "queries": [(2, 2, 0, 8), K],
    "keys": [Q, (2, 2, 0, 8)],
    "everything": [(0, 0, 0, 0), (0, 0, 0, 0)],
    "head_dim": [(2, 2, 9, 0), (2, 2, 13, 0), K],
    "value_dim": [Q, K, (2, 2, 13, 0)],
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", EMPTY)
def test_sdpa_empty(name, is_causal, impl, device):
    """0 where there are no keys. (Torch's fused kernel leaves that memory as it was, and without
    heads some versions of it divide by 0.)"""
    tensors = {n: x.requires_grad_() for n, x in qkv(*EMPTY[name], device=device).items()}
    out = fastlm.scaled_dot_product_attention(**tensors, is_causal=is_causal)
    query, value = tensors["query"], tensors["value"]
    assert out.shape == (*query.shape[:-1], value.shape[-1]) and out.dtype == query.dtype
    if name == "head_dim":  # the mean of value
        expected = F.scaled_dot_product_attention(**tensors, is_causal=is_causal)
        assert torch.equal(out, expected)
    elif out.numel():
        assert name == "keys" and not out.any()
    grads = torch.autograd.grad(out.sum(), list(tensors.values()), allow_unused=True)
    for grad, x in zip(grads, tensors.values(), strict=True):
        assert grad is None or (grad.shape == x.shape and grad.isfinite().all())


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("contiguous", [True, False])
def test_sdpa_gradcheck(contiguous, check):
    packed = randn(2, 4, 3, 2, 4, dtype=torch.float64).permute(2, 0, 3, 1, 4).unbind(0)
    inputs = [x.contiguous() if contiguous else x for x in packed]
    inputs = [x.detach().requires_grad_() for x in inputs]
    assert check(lambda *qkv: fastlm.scaled_dot_product_attention(*qkv, is_causal=True), inputs)


# By one x for query, key and value, (2, 4, 5, 8).
REFUSED = {
    "dtypes": lambda sdpa, x: sdpa(x, x.half(), x.half()),
    "devices": lambda sdpa, x: sdpa(x, x.to("meta"), x.to("meta")),
    "one_dim": lambda sdpa, x: sdpa(x[0, 0, 0], x[0, 0], x[0, 0]),
    "headdim": lambda sdpa, x: sdpa(x, x[..., :4], x),
    "nheads": lambda sdpa, x: sdpa(x, x[:, :3], x[:, :3]),
    "gqa": lambda sdpa, x: sdpa(x, x[:, :3], x[:, :3], enable_gqa=True),
    "mask_shape": lambda sdpa, x: sdpa(x, x, x, x.new_ones(3, 5)),
    "mask_dims": lambda sdpa, x: sdpa(x, x, x, x.new_ones(3, 2, 4, 5, 5)),
    "mask_dtype": lambda sdpa, x: sdpa(x, x, x, x.new_ones(5, 5, dtype=torch.int32)),
    "mask_half": lambda sdpa, x: sdpa(x, x, x, x.new_ones(5, 5, dtype=torch.float16)),
    "none": lambda sdpa, x: sdpa(x, None, x),
    "dropout": lambda sdpa, x: sdpa(x, x, x, dropout_p="half"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sdpa_refuses_what_torch_refuses(name, device):
    x = torch.ones(2, 4, 5, 8, device=device)
    with pytest.raises(Exception) as expected:
        REFUSED[name](F.scaled_dot_product_attention, x)
    with pytest.raises(expected.type):
        REFUSED[name](fastlm.scaled_dot_product_attention, x)


def test_sdpa_errors(device):
    x = torch.ones(2, 4, 5, 8, device=device)
    with pytest.raises(TypeError) as error:
        fastlm.scaled_dot_product_attention(x, None, x)
    assert str(error.value) == ("scaled_dot_product_attention: key must be a tensor, got NoneType")
    with pytest.raises(RuntimeError) as error:  # as torch documents, its own CPU kernel apart
        fastlm.scaled_dot_product_attention(x, x, x, x.new_ones(5, 5), is_causal=True)
    assert str(error.value) == (
        "scaled_dot_product_attention: attn_mask must be None with is_causal=True, got (5, 5)"
    )
    with pytest.raises(ValueError) as error:
        fastlm.scaled_dot_product_attention(x, x, x, dropout_p=2.0)
    assert str(error.value) == (
        "scaled_dot_product_attention: dropout_p must be a number from 0 to 1, got 2.0"
    )
    with pytest.raises(RuntimeError) as error:  # torch's CPU kernel would read past value's end
        fastlm.scaled_dot_product_attention(x, x, x[:, :, :3])
    assert str(error.value) == (
        "scaled_dot_product_attention: value must have key's seqlen 5, got (2, 4, 3, 8)"
    )
