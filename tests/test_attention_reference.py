"""The reference of attention: against loops, torch, Hugging Face's T5, and known properties."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    H_K,
    PAIRS,
    SINGLES,
    B,
    D,
    H,
    M,
    N,
    case,
    naive_attention,
    relative_bias,
    run,
)

from fastlm.reference import attention as reference
from fastlm.reference.relative_bias import RelativeBias, relative_bucket
from fastlm.testing import assert_close, check_against_reference, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def finite(lse):
    """-inf as 0, so that differences of an lse are numbers."""
    return torch.where(lse == float("-inf"), 0.0, lse)


@pytest.mark.parametrize("names", SINGLES + PAIRS, ids="-".join)
def test_reference_is_the_loop(names):
    tensors, options = case(*names)
    gold_out, gold_lse, gold_weights = naive_attention(**tensors, **options)
    out, lse = run(reference.attention, **tensors, **options, return_lse=True)
    sinks = tensors.pop("sinks", None)
    del tensors["v"]
    weights = run(reference.attention_weights, v=lse, sinks=sinks, **tensors, **options)
    # fp64 against fp64: both must be the same number in fp32.
    for name, actual, gold in (
        ("out", out, gold_out), ("lse", lse, gold_lse), ("weights", weights, gold_weights),
    ):  # fmt: skip
        assert_close(name, actual.float(), gold.float(), gold)


@pytest.mark.parametrize("names", SINGLES + PAIRS, ids="-".join)
def test_reference_gradcheck(names):
    tensors, options = case(*names)

    def fn(*values):
        inputs = dict(zip(tensors, values, strict=True))
        out, lse = run(reference.attention, **inputs, **options, return_lse=True)
        return out, finite(lse)

    leaves = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(fn, leaves, fast_mode=len(names) > 1)


@pytest.mark.parametrize("names", [("causal", "bias", "sinks"), ("mask", "alibi", "softcap")])
def test_reference_gradgradcheck(names):
    tensors, options = case(*names)
    fn = lambda *values: run(
        reference.attention, **dict(zip(tensors, values, strict=True)), **options
    )
    leaves = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradgradcheck(fn, leaves, fast_mode=True)


@pytest.mark.parametrize("names", [("plain",), ("causal", "relative_bias"), ("mask", "sinks")])
def test_attention_weights_gradcheck(names):
    tensors, options = case(*names, "dropout")
    sinks, v = tensors.pop("sinks", None), tensors.pop("v")
    with torch.no_grad():
        extra = {} if sinks is None else {"sinks": sinks}
        lse = run(reference.attention, **tensors, v=v, **extra, **options, return_lse=True)[1]
    alive = lse > float("-inf")
    tensors["lse"] = lse[alive]

    def fn(*values):
        inputs = dict(zip(tensors, values, strict=True))
        full = lse.masked_scatter(alive, inputs.pop("lse"))
        return run(reference.attention_weights, v=full, **inputs, **options)

    assert torch.autograd.gradcheck(fn, [x.requires_grad_() for x in tensors.values()])


TORCH_CASES = {
    "plain": {},
    "top_left": {"causal": "top_left"},
    "scale": {"softmax_scale": 0.3},
    "mask": {"mask": (2, 1, 9, 13)},
    "head_mask": {"mask": (4, 9, 13)},
    "bias": {"bias": (4, 9, 13)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nheads_k", [4, 2, 1])
@pytest.mark.parametrize("name", TORCH_CASES)
def test_reference_is_torch(name, nheads_k, dtype):
    tensors = {
        "q": randn(2, 9, 4, 16, dtype=dtype),
        "k": randn(2, 13, nheads_k, 16, dtype=dtype, seed=1),
        "v": randn(2, 13, nheads_k, 24, dtype=dtype, seed=2),
    }
    options = dict(TORCH_CASES[name])
    if "mask" in options:
        options["mask"] = randn(*options["mask"], seed=3) > 0
    if "bias" in options:
        tensors["bias"] = randn(*options.pop("bias"), dtype=dtype, seed=3)

    def torch_attention(q, k, v, *, bias=None, mask=None, causal=False, softmax_scale=None):
        out = F.scaled_dot_product_attention(
            *heads_first(q, k, v), attn_mask=mask if bias is None else bias,
            is_causal=bool(causal), scale=softmax_scale, enable_gqa=True,
        )  # fmt: skip
        return out.transpose(1, 2)

    check_against_reference(reference.attention, torch_attention, tensors, **options)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets,max_distance", [(32, 128), (32, 20), (7, 50), (64, 1000)])
def test_relative_bucket_is_hugging_face_t5(num_buckets, max_distance, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-3000, 3000)
    expected = T5Attention._relative_position_bucket(
        distance, bidirectional, num_buckets, max_distance
    )
    actual = relative_bucket(distance, num_buckets, bidirectional, max_distance)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_relative_bias_is_hugging_face_t5_attention(is_decoder):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(d_model=24, d_kv=8, num_heads=3, is_decoder=is_decoder, dropout_rate=0.0)
    config._attn_implementation = "eager"
    t5 = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    bias = RelativeBias(
        t5.relative_attention_bias.weight, bidirectional=not is_decoder, max_distance=128
    )
    values = bias.values(torch.arange(300)[None, None, None] - torch.arange(300)[:, None])
    assert torch.equal(values, t5.compute_bias(300, 300))

    def hugging_face(x, table):
        # The module adds its mask to the bias; T5Stack gives it the causal one.
        hidden = torch.full((x.shape[1],) * 2, float("-inf")).triu(1) if is_decoder else None
        module = t5.to(x.dtype)
        with torch.no_grad():
            module.relative_attention_bias.weight.copy_(table)
        return module(x, mask=None if hidden is None else hidden.to(x.dtype)[None, None])[0]

    def ours(x, table):
        module = t5.to(x.dtype)
        q, k, v = (p(x).unflatten(-1, (3, 8)) for p in (module.q, module.k, module.v))
        bias = RelativeBias(table, bidirectional=not is_decoder, max_distance=128)
        out = reference.attention(q, k, v, causal=is_decoder, softmax_scale=1.0, bias=bias)
        return module.o(out.flatten(2))

    inputs = {"x": randn(2, 40, 24), "table": randn(32, 3, seed=1)}
    check_against_reference(ours, hugging_face, inputs, backward=False)


@pytest.mark.parametrize("causal", [True, "top_left"])
def test_reference_with_relative_bias_counts_from_the_diagonal(causal):
    tensors, _ = case("relative_bias")
    q, k, v, table = tensors.values()
    offset = 0 if causal == "top_left" else N - M
    distance = torch.arange(N) - torch.arange(M)[:, None] - offset
    dense = relative_bias(table).values(distance[None, None])
    expected = reference.attention(q, k, v, causal=causal, bias=dense)
    assert torch.equal(
        reference.attention(q, k, v, causal=causal, bias=relative_bias(table)), expected
    )


# What must not be looked at: the key of sequence 0 that no query sees, all keys of sequence 1
# (length 0), and the query of sequence 0 that sees no key.
@pytest.mark.parametrize("names", SINGLES + PAIRS, ids="-".join)
def test_reference_never_reads_what_is_masked(names):
    tensors, options = case(*names)
    mask = torch.ones(B, 1, M, N, dtype=torch.bool) & options.pop("mask", True)
    mask[0, :, :, N - 1] = mask[0, :, 2] = False
    options["seqlens_k"] = torch.tensor([N, 0])

    def grads(poison):
        values = {n: x.clone() for n, x in tensors.items()}
        for name in ("k", "v"):
            values[name][0, N - 1] = values[name][1] = poison
        values["q"][0, 2] = values["q"][1] = poison
        leaves = {n: x.requires_grad_() for n, x in values.items()}
        out, lse = run(reference.attention, **leaves, **options, mask=mask, return_lse=True)
        do, dlse = randn(*out.shape, dtype=out.dtype), randn(*lse.shape, dtype=lse.dtype)
        got = torch.autograd.grad([out, lse], list(leaves.values()), [do, dlse])
        return out, lse, dict(zip(leaves, got, strict=True))

    out, lse, got = grads(0.0)
    for poison in (float("nan"), float("inf"), -float("inf")):
        poisoned_out, poisoned_lse, poisoned = grads(poison)
        assert torch.equal(out, poisoned_out) and torch.equal(lse, poisoned_lse)
        assert all(torch.equal(got[n], poisoned[n]) for n in got)
    assert not out[1].any() and not out[0, 2].any()
    assert (lse[1] == float("-inf")).all() and (lse[0, :, 2] == float("-inf")).all()
    assert not got["q"][1].any() and not got["q"][0, 2].any()
    for name in ("k", "v"):
        assert not got[name][1].any() and not got[name][0, N - 1].any()
    assert all(x.isfinite().all() for x in got.values())


def test_reference_bias_of_minus_infinity_masks():
    tensors, options = case("mask")
    mask = options["mask"]
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    values = {**tensors, "bias": bias}
    leaves = [x.requires_grad_() for x in values.values()]
    out, lse = reference.attention(*leaves[:3], bias=leaves[3], return_lse=True)
    expected, expected_lse = reference.attention(*leaves[:3], mask=mask, return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    grads = torch.autograd.grad(out.square().sum() + finite(lse).sum(), leaves)
    assert all(x.isfinite().all() for x in grads) and not grads[3][~mask].any()


@pytest.mark.parametrize("names", SINGLES, ids="-".join)
@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_k"])
def test_reference_empty(names, empty):
    tensors, options = case(*names)
    if empty == "seqlen_k":
        tensors["k"], tensors["v"] = tensors["k"][:, :0], tensors["v"][:, :0]
        cut = lambda x: x[..., :0]
    elif empty == "seqlen_q":
        tensors["q"] = tensors["q"][:, :0]
        cut = lambda x: x[..., :0, :]
    else:
        for name in ("q", "k", "v", "alibi_slopes"):
            if name in tensors:
                tensors[name] = tensors[name][:0]
        cut = lambda x: x[:0] if x.dim() == 4 else x
        if "seqlens_k" in options:
            options["seqlens_k"] = options["seqlens_k"][:0]
    for holder in (tensors, options):
        for name in ("mask", "bias"):
            if name in holder and not (empty == "seqlen_q" and holder[name].shape[-2] == 1):
                holder[name] = cut(holder[name])
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    out, lse = run(reference.attention, **leaves, **options, return_lse=True)
    assert out.shape == (*tensors["q"].shape[:3], 2) and not out.any()
    assert (lse == float("-inf")).all()
    (out.sum() + finite(lse).sum()).backward()
    assert all(x.grad is None or not x.grad.any() for x in leaves.values())


def test_reference_causality_is_bitwise():
    q, k, v = (randn(1, 7, 2, 8, seed=i) for i in range(3))
    before = reference.attention(q, k, v, causal=True)
    for x in (q, k, v):
        x[:, 4] += 1.0
    after = reference.attention(q, k, v, causal=True)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before, after)


def test_reference_permutes_with_batch_and_heads():
    q, k, v = (randn(3, 6, 4, 8, seed=i) for i in range(3))
    out = reference.attention(q, k, v, causal=True)
    batch, heads = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    permuted = reference.attention(*(x[batch][:, :, heads] for x in (q, k, v)), causal=True)
    assert torch.equal(out[batch][:, :, heads], permuted)


def exact(name, actual, gold):
    """Equal but for rounding of fp32 numbers computed in fp64."""
    assert_close(name, actual.float(), gold.float(), gold)


@pytest.mark.parametrize("names", SINGLES[:-1], ids="-".join)
def test_reference_identities(names):
    tensors, options = case(*names)
    sinks = tensors.pop("sinks", None)  # they take a share: rows no longer add up to 1
    q, k, v = (tensors.pop(n) for n in ("q", "k", "v"))
    call = lambda v, **extra: run(
        reference.attention, q, k, v, **tensors, **options, **extra, return_lse=True
    )
    out, lse = call(v)
    alive = (lse > float("-inf")).transpose(1, 2)[..., None].to(v.dtype)
    exact("ones", call(torch.ones_like(v))[0], alive.expand_as(out))
    exact("linear", call(3 * v - 1)[0], 3 * out - alive)
    group = out.float().unflatten(2, (H_K, -1))  # in the hull of its head's values
    low, high = (x.float()[:, None, :, None] for x in (v.amin(1), v.amax(1)))
    assert (((group >= low) & (group <= high)) | (group == 0)).all()
    leaf = v.clone().requires_grad_()
    do = randn(*out.shape, dtype=v.dtype)
    (dv,) = torch.autograd.grad(call(leaf)[0], leaf, do)
    exact("sum of dv", dv.sum(1), (do * alive).sum(1).unflatten(1, (H_K, -1)).sum(2))
    if "bias" not in tensors and "table" not in tensors:
        shift = torch.full((1, H, 1, 1), 2.5, dtype=v.dtype)
        shifted_out, shifted_lse = call(v, bias=shift)
        exact("shifted out", shifted_out, out)
        exact("shifted lse", finite(shifted_lse - 2.5), finite(lse))
    if sinks is not None:
        weight = torch.exp(lse - torch.logaddexp(lse, sinks[:, None]))
        exact("sinks", call(v, sinks=sinks)[0], out * weight.transpose(1, 2)[..., None])


def test_reference_appended_padding_changes_nothing():
    tensors, _ = case()
    q, k, v = tensors.values()
    out = reference.attention(q, k, v, causal=True)
    pad = torch.full((B, 3, H_K, D), float("nan"), dtype=q.dtype)
    lens = torch.full((B,), N)
    padded = reference.attention(
        q, torch.cat([k, pad], 1), torch.cat([v, pad[..., :2]], 1), causal=True, seqlens_k=lens
    )
    exact("padded", padded, out)


def test_reference_dropout_does_not_change_lse_and_p_of_one_drops_all():
    tensors, options = case("dropout")
    out, lse = reference.attention(**tensors, return_lse=True)
    dropped, same = reference.attention(**tensors, **options, return_lse=True)
    assert torch.equal(lse, same) and not torch.equal(out, dropped)
    options["dropout_p"] = 1.0
    assert not reference.attention(**tensors, **options).any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reference_dtypes(dtype):
    tensors, _ = case(dtype=dtype)
    out, lse = reference.attention(**tensors, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
