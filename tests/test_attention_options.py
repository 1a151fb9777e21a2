"""The attention kernels with every option they take: pairs, random cases and properties."""

import functools

import pytest
import torch
import torch._dynamo.testing
from attention_options import MASKINGS, VALUES, build, consistent, fused, specified
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm.reference import attention as reference
from fastlm.testing import (
    LAYOUTS,
    assert_close,
    check_against_reference,
    nan_filled_empty,
    randn,
    with_layout,
)

PLAIN = {name: values[0] for name, values in VALUES.items()}


def check(case, device):
    tensors, options = build(case)
    tensors = {n: x.to(device) for n, x in tensors.items()}
    options = {n: x.to(device) if torch.is_tensor(x) else x for n, x in options.items()}
    if "packing" in options:
        cu_q, cu_k, *lengths = options["packing"]
        options["packing"] = cu_q.to(device), cu_k.to(device), *lengths
    with nan_filled_empty():
        check_against_reference(fused(), specified, tensors, frozen=case["frozen"], **options)


def changes(case):
    """What tells a case from the plain one, as its test's name."""
    return "-".join(f"{n}={v}" for n, v in case.items() if v != PLAIN[n])


PAIRS = [consistent(case) for case in pairwise(**VALUES)]


@pytest.mark.parametrize("case", PAIRS, ids=changes)
def test_pairs_of_options(case, device):
    check(case, device)


@settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_random_cases(device, data):
    case = {name: data.draw(st.sampled_from(values), name) for name, values in VALUES.items()}
    case["lengths"] = data.draw(st.tuples(st.integers(2, 40), st.integers(2, 80)), "lengths")
    if case["window"] is not None:
        side = st.one_of(st.none(), st.integers(1, 90))
        case["window"] = data.draw(st.tuples(side, side), "window")
    case["headdim"] = data.draw(st.integers(2, 80), "headdim")
    check(consistent(case), device)


# Every option that is on, at once, dense and packed.
EVERYTHING = {
    name: values[-1] if name not in ("dtype", "layout", "frozen", "packed") else values[0]
    for name, values in VALUES.items()
} | {
    "bias": None,
    "heads": (2, 1),
    "headdim": 8,
    "headdim_v": 6,
    "window": (20, 5),
    "lengths": (6, 20),
}
BOTH = [EVERYTHING, {**EVERYTHING, "packed": True, "bias": VALUES["bias"][-1]}]
BOTH = [consistent(case) for case in BOTH]


def moved(case, device):
    """`build`, on a device, the tensors as leaves that require gradients."""
    tensors, options = build(case)
    to = lambda x: x.to(device) if torch.is_tensor(x) else x
    options = {n: tuple(map(to, x)) if n == "packing" else to(x) for n, x in options.items()}
    return {n: to(x).requires_grad_() for n, x in tensors.items()}, options


def differentiate(case, device, change=lambda tensors: tensors, do_layout="contiguous"):
    """(out, lse, gradients...) of a call whose tensors `change` replaced."""
    tensors, options = moved(case, device)
    tensors = {n: x.detach().requires_grad_() for n, x in change(tensors).items()}
    out, lse, _ = fused()(**tensors, **{**options, "return_lse": True})
    do = with_layout(randn(*out.shape, dtype=out.dtype, device=device, seed=11), do_layout)
    dlse = with_layout(randn(*lse.shape, device=device, seed=12), do_layout)
    return out, lse, *torch.autograd.grad([out, lse], list(tensors.values()), [do, dlse])


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", BOTH, ids=changes)
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "expanded"])
def test_layouts_of_incoming_gradients(layout, case, device):
    assert equal(differentiate(case, device, do_layout=layout), differentiate(case, device))


@pytest.mark.parametrize("case", BOTH, ids=changes)
def test_twice_the_same_bits_and_nothing_written(case, device):
    tensors, options = moved(case, device)
    given = {**tensors, **{n: x for n, x in options.items() if torch.is_tensor(x)}}
    before = {n: x.detach().clone() for n, x in given.items()}
    out, lse, _ = fused()(**tensors, **{**options, "return_lse": True})
    incoming = [randn(*x.shape, dtype=x.dtype, device=device, seed=13) for x in (out, lse)]
    copies = [x.clone() for x in (out, lse, *incoming)]
    leaves = list(tensors.values())
    first, second = (
        torch.autograd.grad([out, lse], leaves, incoming, retain_graph=True) for _ in range(2)
    )
    assert equal(first, second) and equal(copies, (out, lse, *incoming))
    assert all(torch.equal(given[n], before[n]) for n in before)


@pytest.mark.parametrize("case", BOTH, ids=changes)
def test_second_derivatives(case, device):
    """Those of the fused function are the reference's, so they are gradients of gradients."""
    case = {**case, "lengths": (4, 5), "headdim": 7, "headdim_v": None, "dtype": torch.bfloat16}

    def gradients(fn):
        def first(**tensors):
            options = {**tensors.pop("options"), "return_lse": True}
            leaves = {n: x if x.requires_grad else x.requires_grad_() for n, x in tensors.items()}
            out, lse, _ = fn(**leaves, **options)
            lse = torch.where(lse.isinf(), 0.0, lse)
            do, dlse = (randn(*x.shape, dtype=x.dtype, device=device, seed=15) for x in (out, lse))
            return torch.autograd.grad(
                [out, lse], list(leaves.values()), [do, dlse], create_graph=True
            )

        return first

    tensors, options = moved(case, device)
    check_against_reference(
        gradients(fused()), gradients(specified), tensors, options=options
    )  # fmt: skip


def test_vmap_and_forward_mode_are_refused_by_name_or_right(device):
    q, k, v = (randn(1, 5, 2, 8, device=device, seed=i) for i in range(3))
    many = torch.stack([q, 2 * q])
    plain = lambda impl: lambda q: fastlm.attention(q, k, v, causal=True, impl=impl)
    refused = "does not run under torch.func.vmap and forward-mode differentiation"
    with pytest.raises(NotImplementedError, match=refused):
        torch.func.vmap(plain("triton"))(many)
    with pytest.raises(NotImplementedError, match=refused):
        torch.func.jvp(plain("triton"), (q,), (v,))
    gold = reference.attention(*(x.double() for x in (2 * q, k, v)), causal=True)
    assert_close("vmap", torch.func.vmap(plain(None))(many)[1], plain("torch")(2 * q), gold)
    out, tangent = torch.func.jvp(plain(None), (q,), (v,))
    gold = torch.func.jvp(
        lambda q: reference.attention(q, k.double(), v.double(), causal=True),
        (q.double(),),
        (v.double(),),
    )
    same = torch.func.jvp(lambda q: reference.attention(q, k, v, causal=True), (q,), (v,))
    assert_close("out", out, same[0], gold[0])
    assert_close("tangent", tangent, same[1], gold[1])
    square = lambda f, *kv: lambda q: f(q, *kv, causal=True).square().sum()
    gold = torch.func.grad(square(reference.attention, k.double(), v.double()))(q.double())
    same = torch.func.grad(square(reference.attention, k, v))(q)
    triton = functools.partial(fastlm.attention, impl="triton")
    assert_close("torch.func.grad", torch.func.grad(square(triton, k, v))(q), same, gold)


@pytest.mark.parametrize("name", MASKINGS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_masked_never_leaks(name, poison, device):
    options = {n: x.to(device) if torch.is_tensor(x) else x for n, x in MASKINGS[name].items()}
    m, n = (9, 5) if name == "more queries" else (5, 9)
    q, k, v = (randn(2, s, 2, 16, device=device, seed=i) for i, s in enumerate((m, n, n)))
    scores, allowed = reference.masked_scores(q, k, **options)
    allowed = allowed.expand_as(scores)
    unseen, unseeing = ~allowed.any(-2).any(1), ~allowed.any(-1).any(1)  # (batch, seqlen)
    assert unseen.any() or unseeing.any()

    def results(value):
        poisoned = [x.clone() for x in (q, k, v)]
        poisoned[0][unseeing], poisoned[1][unseen], poisoned[2][unseen] = value, value, value
        leaves = [x.requires_grad_() for x in poisoned]
        with nan_filled_empty():
            out, lse = fastlm.attention(*leaves, **options, return_lse=True, impl="triton")
            incoming = [randn(*x.shape, device=device, seed=14) for x in (out, lse)]
            return out, lse, *torch.autograd.grad([out, lse], leaves, incoming)

    assert equal(results(poison), results(0.0))


def test_a_changed_token_leaves_earlier_rows_alone(device):
    q, k, v = (randn(1, 40, 2, 16, device=device, seed=i) for i in range(3))
    before = fastlm.attention(q, k, v, causal=True, impl="triton")
    for x in (q, k, v):
        x[:, 33] = 7.0
    after = fastlm.attention(q, k, v, causal=True, impl="triton")
    assert torch.equal(before[:, :33], after[:, :33]) and not torch.equal(before, after)


@pytest.mark.parametrize("name", ["causal", "seqlens_k", "mask", "bias"])
def test_masked_keys_change_nothing(name, device):
    q, k, v = (randn(2, 20, 2, 16, device=device, seed=i) for i in range(3))
    longer = [torch.cat([x, randn(2, 60, 2, 16, device=device, seed=9)], dim=1) for x in (k, v)]
    visible = torch.arange(80, device=device) < 20
    options = {
        "causal": "top_left",
        "seqlens_k": torch.tensor([20, 20], device=device),
        "mask": visible,
        "bias": torch.zeros(80, device=device).masked_fill(~visible, float("-inf")),
    }
    cut = options[name][:20] if name in ("mask", "bias") else options[name]
    expected = fastlm.attention(q, k, v, **{name: cut}, impl="triton")
    actual = fastlm.attention(q, *longer, **{name: options[name]}, impl="triton")
    assert torch.equal(actual, expected)


def test_batch_and_heads_are_independent(device):
    case = {**EVERYTHING, "dropout_p": 0.0, "heads": (3, 3)}  # dropout counts batch and head
    tensors, options = moved(case, device)
    out, lse, _ = fused()(**tensors, **{**options, "return_lse": True})
    order, heads = torch.tensor([1, 0], device=device), torch.tensor([2, 0, 1], device=device)
    permuted = {n: tensors[n][order][:, :, heads] for n in "qkv"}
    permuted |= {n: tensors[n][heads] for n in ("sinks",) if n in tensors}
    permuted |= {n: tensors[n][..., heads] for n in ("table",) if n in tensors}
    if "alibi_slopes" in tensors:
        permuted["alibi_slopes"] = tensors["alibi_slopes"][order][:, heads]
    if "mask" in options:
        options["mask"] = options["mask"][order][:, heads]
    if "seqlens_k" in options:
        options["seqlens_k"] = options["seqlens_k"][order]
    again, lse_again, _ = fused()(**permuted, **{**options, "return_lse": True})
    assert torch.equal(again, out[order][:, :, heads])
    assert torch.equal(lse_again, lse[order][:, heads])


def test_packed_sequences_are_padded_ones_bit_for_bit(device):
    """With every option; dropout too, which counts sequences as a batch."""
    case = {**EVERYTHING, "causal": "top_left", "seqlens_k": False, "mask": "columns"}
    lengths_q, lengths_k = (5, 0, 9), (20, 3, 33)
    tensors, options = moved({**case, "lengths": (9, 33)}, device)
    batch = lambda x: torch.cat([x, x[:1]]).detach().requires_grad_()
    tensors |= {n: batch(tensors[n]) for n in ("q", "k", "v", "alibi_slopes")}
    options |= {"mask": batch(options["mask"].float()).bool(), "return_lse": True}
    seqlens_k = torch.tensor(lengths_k, device=device)
    out, lse, _ = fused()(**tensors, **options, seqlens_k=seqlens_k)
    do, dlse = (randn(*x.shape, dtype=x.dtype, device=device, seed=16) for x in (out, lse))
    for b, n in enumerate(lengths_q):  # rows of padding
        do[b, n:] = dlse[b, :, n:] = 0.0
    grads = torch.autograd.grad([out, lse], list(tensors.values()), [do, dlse])

    ends = {
        n: torch.tensor((0, *x), device=device).cumsum(0)
        for n, x in zip("qk", (lengths_q, lengths_k), strict=True)
    }
    unpad = lambda x, lengths: torch.cat([y[:n] for y, n in zip(x, lengths, strict=True)])
    lengths = {"q": lengths_q, "k": lengths_k, "v": lengths_k}
    packed = {n: unpad(x, lengths[n]) if n in lengths else x for n, x in tensors.items()}
    packed = {n: x.detach().requires_grad_() for n, x in packed.items()}
    packing = ends["q"], ends["k"], 9, 33
    out2, lse2, _ = fused()(**packed, **options, packing=packing)
    rows = lambda x: unpad(x.transpose(1, 2), lengths_q)
    do2, dlse2 = unpad(do, lengths_q), rows(dlse).T
    grads2 = torch.autograd.grad([out2, lse2], list(packed.values()), [do2, dlse2])
    assert torch.equal(out2, unpad(out, lengths_q)) and torch.equal(lse2.T, rows(lse))
    for name, a, b in zip(tensors, grads, grads2, strict=True):
        if name == "sinks":  # added up by torch, whose order follows the layout
            torch.testing.assert_close(a, b)
            continue
        assert torch.equal(b, unpad(a, lengths[name]) if name in lengths else a), name


def test_values_of_one_give_one(device):
    tensors, options = moved({**EVERYTHING, "dropout_p": 0.0, "sinks": False}, device)
    tensors["v"] = torch.ones_like(tensors["v"])
    out, lse, _ = fused()(**tensors, **{**options, "return_lse": True})
    dead = (lse == float("-inf")).transpose(1, 2)
    assert not out[dead].any()
    assert_close("ones", out[~dead], torch.ones_like(out[~dead]), torch.ones_like(out[~dead]))


def test_a_constant_bias_shifts_lse(device):
    tensors, options = moved({**EVERYTHING, "sinks": False, "relative": None}, device)
    options["return_lse"] = True
    out, lse, _ = fused()(**tensors, **options)
    shifted, lse_shifted, _ = fused()(**tensors, bias=torch.tensor(2.0, device=device), **options)
    assert_close("out", shifted, out, out)
    alive = lse.isfinite()
    assert_close("lse", lse_shifted[alive], lse[alive] + 2.0, lse[alive] + 2.0)


class _Allocations(TorchDispatchMode):
    """Counts the elements of every tensor that an operation creates."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fastlm.attention_bwd.default:
            from fastlm.kernels.attention_bwd import attention_bwd
            from fastlm.kernels.attention_scores import Options

            with self:  # what happens within an operator is hidden from it otherwise
                return attention_bwd(*args[:8], Options(*args[8:27]), *args[27:])
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.startswith(("empty", "new_", "zeros", "full", "clone")):
            self.sizes.append(out.numel())
        return out


@pytest.mark.parametrize("bias", ["number", "columns", "rows", "heads", "relative"])
def test_no_gradient_of_a_broadcast_bias_has_the_size_of_the_scores(bias, device):
    """What `attention`'s docstring says of memory."""
    relative = {"relative": "one way", "bias": None} if bias == "relative" else {"bias": bias}
    case = PLAIN | {"lengths": (40, 44), "headdim": 2, "alibi": "batch", "sinks": True} | relative
    tensors, options = moved(consistent(case), device)
    q, k, v = (tensors[n].numel() for n in "qkv")
    rows = q // 2  # batch * nheads * seqlen_q
    out, lse, _ = fused()(**tensors, **options)
    with _Allocations() as allocations:
        torch.autograd.grad([out, lse], list(tensors.values()), [out.detach(), lse.detach()])
    small = max(q, k, v, rows)
    scores = rows * 44
    assert max(allocations.sizes) < scores / 2, sorted(allocations.sizes)[-5:]
    assert sum(n for n in allocations.sizes if n > small) < scores


def test_one_compilation_serves_all_lengths(device):
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("eager")
    options = {"causal": True, "window": (3, None), "dropout_p": 0.2, "seed": 1, "softcap": 5.0}
    fn = lambda q, slopes, bias: fastlm.attention(
        q, q, q, alibi_slopes=slopes, bias=bias, impl="triton", **options
    )
    compiled = torch.compile(fn, fullgraph=True, backend=count)
    slopes = randn(2, device=device)
    for seqlen in range(3, 23):
        q, bias = (randn(1, seqlen, 2, 8, device=device), randn(seqlen, device=device))
        out = compiled(q, slopes, bias)
        if seqlen % 6 == 0:
            assert torch.equal(out, fn(q, slopes, bias))
    assert count.frame_count <= 2
