"""attention, every backend, against the fp64 reference."""

import functools
import itertools
import re

import pytest
import torch
from attention_cases import PAIRS, SINGLES, case, run

import fastlm
from fastlm.ops import _attention_torch
from fastlm.reference import attention as reference
from fastlm.reference.relative_bias import RelativeBias
from fastlm.shapes import ATTENTION_LARGE, ATTENTION_SMALL
from fastlm.testing import (
    LAYOUTS,
    check_against_reference,
    nan_filled_empty,
    randn,
    with_layout,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMPLS = ["torch", "triton"]
ALL_IMPLS = [*IMPLS, "cuda"]
CAUSAL = [False, True, "top_left"]


def qkv(shape, dtype=torch.float32, device="cpu"):
    headdim_v = shape.headdim_v or shape.headdim
    keys = (shape.batch, shape.seqlen_k, shape.nheads_k)
    return {
        "q": randn(
            shape.batch, shape.seqlen_q, shape.nheads, shape.headdim, dtype=dtype, device=device
        ),
        "k": randn(*keys, shape.headdim, dtype=dtype, device=device, seed=1),
        "v": randn(*keys, headdim_v, dtype=dtype, device=device, seed=2),
    }


def run_oracle(impl, inputs, *, frozen=(), **options):
    with nan_filled_empty():
        return check_against_reference(
            lambda **kw: run(fastlm.attention, **kw, impl=impl),
            lambda **kw: run(reference.attention, **kw),
            inputs,
            frozen=frozen,
            **options,
        )


def small(device, dtype=torch.float32):
    return qkv(ATTENTION_SMALL["odd_head"], dtype, device)


def torch_or_reference(q, k, v, **options):
    """The oracle's reference of the torch backend where that is torch's fused function.

    In fp32 torch's CPU kernel takes exponentials with 20 ulp, which the eager reference beats more
    than twofold. So its errors are measured against torch's own, on one explicit mask.
    """
    if q.dtype == torch.float64:
        return reference.attention(q, k, v, **options)
    _, allowed = reference.masked_scores(q, k, **options)
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed, enable_gqa=True
    )
    return out.transpose(1, 2)


# Not one query with "top_left": it sees one key, and a bound of 0 for gradients of 0 is no test.
# Halves on some shapes, causal, alone: what they change is one rounding.
SHAPES = [
    (shape, causal, dtype)
    for shape, causal, dtype in itertools.product(ATTENTION_SMALL, CAUSAL, DTYPES)
    if (shape, causal) != ("one_query", "top_left")
    and (dtype == torch.float32 or causal is True and shape in ("prime", "gqa", "widest_head"))
]


def cuda_takes(shape, dtype):
    s = ATTENTION_SMALL[shape]
    return dtype != torch.float32 and s.headdim % 8 == 0 and 32 <= s.headdim <= 256


@pytest.mark.parametrize("shape,causal,dtype,impl", [
    pytest.param(*case, impl, marks=[pytest.mark.sanitized] * (impl == "cuda"))
    for case in SHAPES for impl in ALL_IMPLS if impl != "cuda" or cuda_takes(case[0], case[2])
], ids=str)  # fmt: skip
def test_attention_shapes(shape, causal, dtype, impl, device):
    with nan_filled_empty():
        check_against_reference(
            lambda **kw: fastlm.attention(**kw, impl=impl),
            torch_or_reference if impl == "torch" else reference.attention,
            qkv(ATTENTION_SMALL[shape], dtype, device),
            causal=causal,
            **({} if impl == "torch" else {"return_lse": True}),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [n for n in ATTENTION_LARGE if n.endswith(("_512", "_2048"))])
def test_attention_shapes_large(shape, causal, dtype, impl, device):
    run_oracle(impl, qkv(ATTENTION_LARGE[shape], dtype, device), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("names", SINGLES, ids="-".join)
def test_attention_options(names, return_lse, dtype):
    tensors, options = case(*names, dtype=dtype)
    run_oracle("torch", tensors, **options, return_lse=return_lse)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_attention_pairs_of_options(names):
    tensors, options = case(*names, dtype=torch.float32)
    run_oracle("torch", tensors, **options)


@pytest.mark.parametrize("shape", [(), (5,), (4, 1), (2, 1, 4, 1), (1, 4, 1, 5), (4, 4, 5)])
@pytest.mark.parametrize("other", ["mask", "causal", "bias", "sinks"])
def test_attention_masks_broadcast(shape, other):
    tensors, options = case(other, dtype=torch.float32)
    options["mask"] = torch.as_tensor(randn(*shape, seed=9) > -0.5)
    run_oracle("torch", tensors, **options)
    run_oracle("torch", tensors, frozen=("bias",), **options)


def test_attention_head_masks_with_gqa():
    tensors, _ = case(dtype=torch.float32)
    mask = randn(2, 4, 4, 5, seed=9) > 0  # heads of one group see different keys
    run_oracle("torch", tensors, mask=mask)


@pytest.mark.parametrize(
    "options,fused",
    [
        ({}, True),
        ({"causal": True}, True),
        ({"mask": torch.ones(24, dtype=torch.bool)}, True),
        ({"bias": torch.zeros(20, 24)}, True),
        ({"bias": torch.zeros(20, 24, dtype=torch.float64)}, False),
        ({"bias": torch.zeros(20, 24, requires_grad=True)}, True),
        ({"seqlens_k": torch.tensor([7])}, True),
        ({"window": (3, 0), "softmax_scale": 0.5}, True),
        ({"window": (None, None)}, True),
        ({"softcap": 5.0}, False),
        ({"return_lse": True}, False),
        ({"dropout_p": 0.1}, False),
    ],
)
def test_attention_uses_the_fused_function_of_torch(options, fused, monkeypatch):
    calls = []
    original = _attention_torch.torch_sdpa
    monkeypatch.setattr(
        _attention_torch, "torch_sdpa", lambda *a, **kw: calls.append(1) or original(*a, **kw)
    )
    fastlm.attention(**small("cpu"), **options, impl="torch")
    assert bool(calls) == fused


@pytest.mark.parametrize("nheads_k", [1, 4])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 1, 5), (2, 4, 4, 5)])
@pytest.mark.parametrize("dead", ["nothing", "pairs", "a key", "a query"])
def test_attention_bias_gradients_of_every_order(dead, shape, nheads_k):
    """For a CPU by torch's composition, which has to find masked rows by itself."""
    bias = randn(*shape, seed=9)
    if dead == "pairs":
        bias[..., 0] = -torch.inf
    elif dead == "a key":  # for the first head or sequence alone, where there are some
        bias[(0,) * (bias.dim() - 1)][2] = -torch.inf
    elif dead == "a query":
        bias[(0,) * (bias.dim() - 1)] = -torch.inf
    heads = lambda n, seqlen, seed: randn(2, seqlen, n, 8, seed=seed)
    tensors = (heads(4, 4, 1), heads(nheads_k, 5, 2), heads(nheads_k, 5, 3), bias)

    def every_order(op, causal):
        leaves = [t.double().requires_grad_() for t in tensors]
        out = op(*leaves[:3], bias=leaves[3], causal=causal)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        return out, *grads, *second

    for causal in (False, True):
        ours, theirs = (every_order(op, causal) for op in (fastlm.attention, reference.attention))
        for a, e in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": "top_left"},
        {"causal": True, "seqlens_k": torch.tensor([3])},
        {"window": (2, 1), "mask": (torch.arange(24) != 5) & (torch.arange(20)[:, None] != 4)},
        {"bias": torch.zeros(24).masked_fill(torch.arange(24) > 20, float("-inf"))},
        {"mask": torch.zeros(2, 1, 24, dtype=torch.bool)},
    ],
)
def test_attention_never_reads_what_is_masked(options):
    inputs = small("cpu")
    scores, allowed = reference.masked_scores(inputs["q"], inputs["k"], **options)
    allowed = allowed.expand_as(scores)
    unseen = ~allowed.any(-2).any(1).any(0)  # (seqlen_k,)
    unseeing = ~allowed.any(-1).any(1).any(0)  # (seqlen_q,)
    assert unseen.any() or unseeing.any()

    def grads(poison):
        values = {n: x.clone() for n, x in inputs.items()}
        values["k"][:, unseen] = values["v"][:, unseen] = poison
        values["q"][:, unseeing] = poison
        leaves = [x.requires_grad_() for x in values.values()]
        out = fastlm.attention(*leaves, **options, impl="torch")
        return out, *torch.autograd.grad(out, leaves, randn(*out.shape, seed=4))

    expected = grads(0.0)
    assert not expected[0][:, unseeing].any()
    for poison in (float("nan"), float("inf")):
        assert all(torch.equal(a, e) for a, e in zip(grads(poison), expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_attention_more_causal_queries_than_keys(impl, device):
    inputs = qkv(ATTENTION_SMALL["more_queries"], device=device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    out, lse = fastlm.attention(*leaves, causal=True, return_lse=True, impl=impl)
    dead = 45 - 19
    assert not out[:, :dead].any() and (lse[..., :dead] == float("-inf")).all()
    dlse = randn(*lse.shape, device=device)
    grads = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), dlse])
    assert not grads[0][:, :dead].any() and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["q", "k", "v", "do"])
def test_attention_layouts_are_bitwise_equal(what, layout, impl, device):
    inputs = small(device)
    inputs["do"] = randn(*inputs["q"].shape, device=device, seed=4)
    if layout == "expanded":
        inputs = {n: x.repeat(2, 1, 1, 1) for n, x in inputs.items()}

    by_impl = functools.partial(fastlm.attention, impl=impl)

    def grads(do, fn=by_impl, **values):
        leaves = [x.detach().requires_grad_() for x in values.values()]
        out = fn(*leaves, causal=True)
        return out, *torch.autograd.grad(out, leaves, do)

    changed = {**inputs, what: with_layout(inputs[what], layout)}
    if impl == "torch" and device == "cuda":  # cuBLAS has other products for other layouts
        by_reference = functools.partial(grads, fn=reference.attention)
        check_against_reference(grads, by_reference, changed, backward=False)
    else:
        results = grads(**changed), grads(**inputs)
        assert all(torch.equal(a, e) for a, e in zip(*results, strict=True))


def test_attention_expanded_gradient_of_sum(device):
    leaves = [x.requires_grad_() for x in small(device).values()]
    out = fastlm.attention(*leaves, impl="triton")
    expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    dense = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_attention_twice_and_inputs_unmodified(impl, device):
    inputs = small(device)
    before = {n: x.clone() for n, x in inputs.items()}
    leaves = [x.requires_grad_() for x in inputs.values()]
    do = randn(*inputs["q"].shape, device=device, seed=4)
    out = fastlm.attention(*leaves, causal=True, impl=impl)
    kept = out.detach().clone()
    first, second = (torch.autograd.grad(out, leaves, do, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(inputs[n], before[n]) for n in before)
    assert torch.equal(out, kept) and torch.equal(do, randn(*do.shape, device=device, seed=4))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_attention_empty(sizes, causal, impl, device):
    batch, seqlen_q, seqlen_k = sizes
    q = torch.ones(batch, seqlen_q, 2, 8, device=device, requires_grad=True)
    k = torch.ones(batch, seqlen_k, 2, 8, device=device, requires_grad=True)
    with nan_filled_empty():
        out, lse = fastlm.attention(q, k, k, causal=causal, return_lse=True, impl=impl)
        out.sum().backward()
    assert out.shape == q.shape and lse.shape == (batch, 2, seqlen_q)
    assert not out.any() and (lse == float("-inf")).all()
    assert not q.grad.any() and not k.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", [("q",), ("k",), ("v",), ("q", "k"), ("k", "v")])
def test_attention_frozen_inputs(frozen, impl, device):
    run_oracle(impl, small(device), frozen=frozen, causal=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_attention_gradient_of_lse_alone(impl, device):
    lse_of = lambda fn: lambda q, k, v, **kw: fn(q, k, v, return_lse=True, **kw)[1]
    check_against_reference(
        lse_of(lambda *a, **kw: fastlm.attention(*a, **kw, impl=impl)),
        lse_of(reference.attention),
        small(device),
        frozen=("v",),
        causal=True,
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_attention_no_grad_saves_nothing(impl, device):
    inputs = small(device)
    inputs["q"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            out = fastlm.attention(**inputs, impl=impl)
    assert not saved and not out.requires_grad


def test_attention_seed():
    tensors, _ = case(dtype=torch.float32)
    fixed = [fastlm.attention(**tensors, dropout_p=0.5, seed=s) for s in (1, 1, 2, -1, 2**64 - 1)]
    assert torch.equal(fixed[0], fixed[1]) and not torch.equal(fixed[1], fixed[2])
    assert torch.equal(fixed[3], fixed[4])  # the same 64 bits
    torch.manual_seed(7)
    drawn = [fastlm.attention(**tensors, dropout_p=0.5) for _ in range(2)]
    torch.manual_seed(7)
    again = fastlm.attention(**tensors, dropout_p=0.5)
    assert torch.equal(drawn[0], again) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES, DTYPES)), ids=str)
def test_attention_mixed_dtypes(dtypes, impl, device):
    inputs = small(device)
    inputs = {n: x.to(d) for (n, x), d in zip(inputs.items(), dtypes, strict=True)}
    run_oracle(impl, inputs, causal=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, lse = fastlm.attention(**inputs, causal=True, return_lse=True, impl=impl)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


@pytest.mark.parametrize("names", [("plain",), ("bias",), ("mask",), ("softcap",)])
def test_attention_autocast(names):
    tensors, options = case(*names, dtype=torch.float32)
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastlm.attention(**leaves, **options)
    lowered = {n: x.bfloat16() if n in "qkv" else x for n, x in leaves.items()}
    expected = fastlm.attention(**lowered, **options)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    assert all(g.dtype == torch.float32 for g in grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        doubles = fastlm.attention(**{n: x.double() for n, x in leaves.items()}, **options)
    assert doubles.dtype == torch.float64  # autocast leaves fp64 alone


@pytest.mark.parametrize(
    "impl,names,dynamic",
    [
        ("triton", ("causal",), False),
        ("triton", ("causal",), True),
        ("torch", ("causal", "mask", "dropout", "sinks", "softcap"), False),
        ("torch", ("relative_bias", "seqlens_k", "window"), True),
    ],
    ids=str,
)
def test_attention_compiles_fullgraph(impl, names, dynamic, device):
    tensors, options = case(*names, dtype=torch.float32)
    if impl == "triton":
        tensors["v"] = tensors["k"].flip(0)
    tensors = {n: x.to(device).requires_grad_() for n, x in tensors.items()}
    options = {n: x.to(device) if torch.is_tensor(x) else x for n, x in options.items()}

    def fn(values):
        out, lse = run(fastlm.attention, **values, **options, return_lse=True, impl=impl)
        return out.sum() + torch.where(lse.isinf(), 0.0, lse).square().sum()

    leaves = list(tensors.values())
    expected = torch.autograd.grad(fn(tensors), leaves)
    torch._dynamo.reset()
    if dynamic:  # in the lengths: tracing takes 4 times as long with every size symbolic
        for name in "qkv":
            torch._dynamo.mark_dynamic(tensors[name], 1)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(tensors), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_attention_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fastlm.attention, fullgraph=True, backend=count)
    for seqlen in range(4, 12):
        x = randn(2, seqlen, 2, 8)
        assert torch.equal(compiled(x, x, x, causal=True), fastlm.attention(x, x, x, causal=True))
    assert count.frame_count <= 2


def test_attention_opcheck(device):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in small(device).values())
    nothing = [None] * 9
    for causal, exact in (("none", False), ("top_left", False), ("bottom_right", True)):
        args = (q, k, v, *nothing, *scalars(causal), exact)
        torch.library.opcheck(torch.ops.fastlm.attention_fwd.default, args)
        out, lse, lse_low = torch.ops.fastlm.attention_fwd(*args)
    for dlse, need_dq, need_dkv in ((lse, True, True), (None, True, False), (None, False, True)):
        needs = (need_dq, need_dkv, False, False, False, False)
        args = (out, q, k, v, out, lse, lse_low, dlse, *nothing, *scalars("none"), *needs)
        torch.library.opcheck(torch.ops.fastlm.attention_bwd.default, args)


def scalars(causal):
    return (causal, 0.3, -1, -1, 0.0, 0.0, True, 24, 20, 24)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_opcheck_with_options(packed, device):
    q, k, v = small(device).values()
    number = lambda *values: torch.tensor(values, device=device, dtype=torch.int32)
    cu_q = cu_k = None
    if packed:
        q, k, v, cu_q, cu_k = q[0], k[0], v[0], number(0, 12, 20), number(0, 20, 24)
    batch = 2 if packed else 1
    mask = torch.ones(batch, 1, 1, 24, dtype=torch.bool, device=device)
    bias, table = (randn(*s, device=device) for s in ((1, 2, 1, 24), (8, 2)))
    vector = randn(2, device=device)
    seed = torch.tensor(7, device=device)
    for added in ((bias, None), (None, table)):
        options = (mask, *added, number(*[9] * batch), cu_q, cu_k, vector, vector, seed)
        args = (q, k, v, *options, *scalars("none"), True)
        torch.library.opcheck(torch.ops.fastlm.attention_fwd.default, args)
        out, lse, lse_low = torch.ops.fastlm.attention_fwd(*args)
        needs = (True, True, added[0] is not None, added[1] is not None, True, True)
        args = (out, q, k, v, out, lse, lse_low, lse, *options, *scalars("none"), *needs)
        torch.library.opcheck(torch.ops.fastlm.attention_bwd.default, args)


def test_attention_rows_past_int32_offsets(device):
    # Three sequences 2**30 elements apart: the storage is committed lazily, three pages touched.
    big = torch.empty(2**31 + 1024, device=device, dtype=torch.float16)
    x = big.as_strided((3, 4, 2, 16), (2**30, 32, 16, 1))
    x.copy_(randn(3, 4, 2, 16))
    dense = x.contiguous()
    expected = fastlm.attention(dense, dense, dense, impl="triton")
    assert torch.equal(fastlm.attention(x, x, x, impl="triton"), expected)


def test_attention_explains_every_refusal():
    inputs = small("cpu")
    text = str(fastlm.explain("attention", **inputs, window=(1, 1)))
    assert text.splitlines()[0] == "attention: torch"
    assert text.count("its kernels run on a GPU, the inputs are on cpu") == 2


TABLE = torch.ones(8, 2)
BOOL = torch.ones((), dtype=torch.bool)


@pytest.mark.parametrize("change,message", [
    ({"q": 1.0}, "attention: q must be a tensor, got float"),
    ({"k": torch.ones(1, 24, 1, 7, dtype=torch.int32)},
     "attention: k must have a floating-point dtype, got torch.int32"),
    ({"v": torch.ones(1, 24, 1, 7, device="meta")},
     "attention: v must be on the device of the first input, cpu, got meta"),
    ({"q": torch.ones(20, 2, 7)},
     "attention: q must have shape (batch, seqlen_q, nheads, headdim), got (20, 2, 7)"),
    ({"k": torch.ones(1, 24, 1, 8)},
     "attention: k must have shape (batch, seqlen_k, nheads_k, headdim) = (1, *, *, 7), "
     "got (1, 24, 1, 8)"),
    ({"v": torch.ones(1, 23, 1, 7)},
     "attention: v must have shape (batch, seqlen_k, nheads_k, headdim_v) = (1, 24, 1, *), "
     "got (1, 23, 1, 7)"),
    ({"k": torch.ones(1, 24, 3, 7), "v": torch.ones(1, 24, 3, 7)},
     "attention: nheads must be a positive multiple of nheads_k = 3, got 2"),
    ({"v": torch.ones(1, 24, 1, 0)}, "attention: headdim_v must be at least 1, got 0"),
    ({"causal": "left"},
     "attention: causal must be one of False, True, 'top_left', 'bottom_right', got 'left'"),
    ({"window": 3},
     "attention: window must be None or a pair (left, right), each None or an int from 0, got 3"),
    ({"window": (1, -1)},
     "attention: window must be None or a pair (left, right), each None or an int from 0, "
     "got (1, -1)"),
    ({"window": (1.0, None)},
     "attention: window must be None or a pair (left, right), each None or an int from 0, "
     "got (1.0, None)"),
    ({"softmax_scale": "1"}, "attention: softmax_scale must be None or a number, got str"),
    ({"softcap": 0.0}, "attention: softcap must be None or a positive number, got 0.0"),
    ({"mask": torch.ones(20, 24)},
     "attention: mask must have dtype torch.bool, True = attend (additive masks go to bias), "
     "got torch.float32"),
    ({"mask": BOOL.expand(3, 24)},
     "attention: mask must be broadcastable to (batch, nheads, seqlen_q, seqlen_k) = "
     "(1, 2, 20, 24), got (3, 24)"),
    ({"mask": BOOL.expand(1, 1, 1, 1, 1)},
     "attention: mask must be broadcastable to (batch, nheads, seqlen_q, seqlen_k) = "
     "(1, 2, 20, 24), got (1, 1, 1, 1, 1)"),
    ({"bias": BOOL}, "attention: bias must have a floating-point dtype, got torch.bool"),
    ({"bias": torch.ones(20, 1, 24)},
     "attention: bias must be broadcastable to (batch, nheads, seqlen_q, seqlen_k) = "
     "(1, 2, 20, 24), got (20, 1, 24)"),
    ({"bias": RelativeBias(torch.ones(8, 3), bidirectional=True, max_distance=9)},
     "attention: bias.table must have shape (num_buckets, nheads) = (*, 2), got (8, 3)"),
    ({"bias": RelativeBias(torch.ones(3, 2), bidirectional=True, max_distance=9)},
     "attention: bias.table must have at least 4 buckets, got 3"),
    ({"bias": RelativeBias(TABLE, bidirectional=False, max_distance=4)},
     "attention: bias.max_distance must be more than 4, got 4"),
    ({"seqlens_k": torch.ones(1)},
     "attention: seqlens_k must have dtype torch.int32 or torch.int64, got torch.float32"),
    ({"seqlens_k": torch.ones(2, dtype=torch.int32)},
     "attention: seqlens_k must have shape (batch,) = (1,), got (2,)"),
    ({"alibi_slopes": torch.ones(3)},
     "attention: alibi_slopes must have shape (nheads,) or (batch, nheads) = (1, 2), got (3,)"),
    ({"sinks": torch.ones(1)}, "attention: sinks must have shape (nheads,) = (2,), got (1,)"),
    ({"dropout_p": 2}, "attention: dropout_p must be a number from 0 to 1, got 2"),
    ({"return_lse": 1}, "attention: return_lse must be a bool, got int"),
    ({"impl": "numpy"},
     "attention: impl must be None, 'cuda', 'triton' or 'torch', got 'numpy'"),
])  # fmt: skip
def test_attention_errors(change, message):
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
        fastlm.attention(**{**small("cpu"), **change})
    assert str(error.value) == message


WIDE = {name: torch.ones(1, 2, 1, 600) for name in "qkv"}
REFUSED = [
    ({"q": torch.ones(1, 20, 2, 7).double()}, "computes in fp32 and does not take torch.float64"),
    (WIDE, "does not take headdim above "),
]


@pytest.mark.parametrize("change,message", REFUSED, ids=str)
def test_attention_triton_refusals(change, message, device):
    inputs = {**small(device), **change}
    inputs = {n: x.to(device) if torch.is_tensor(x) else x for n, x in inputs.items()}
    if isinstance(inputs.get("bias"), RelativeBias):
        table = inputs["bias"].table.to(device)
        inputs["bias"] = RelativeBias(table, bidirectional=True, max_distance=9)
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        fastlm.attention(**inputs, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("change,chosen", [
    ({}, "torch"),
    ({"causal": True}, "torch"),
    ({"causal": True, "trains": True}, "triton"),  # with the same gradients twice
    ({"trains": True, "deterministic": False}, "torch"),
    ({"window": (3, 0)}, "triton"),
    ({"return_lse": True}, "triton"),
    ({"dropout_p": 0.1}, "triton"),
    ({"dtype": torch.float32}, "triton"),
    ({"headdim": 20}, "triton"),
])  # fmt: skip
def test_attention_leaves_plain_calls_to_torch(change, chosen, device):
    """Where its kernel is the faster one and nothing is lost."""
    options = dict(change)
    shape = (2, 9, 4, options.pop("headdim", 16))
    dtype, trains = options.pop("dtype", torch.bfloat16), options.pop("trains", False)
    q = randn(*shape, dtype=dtype, device=device).requires_grad_(trains)
    assert fastlm.explain("attention", q, q, q, **options).chosen == chosen


def test_attention_leads_of_torch_are_on_a_gpu_alone():
    q = randn(2, 9, 4, 16, dtype=torch.bfloat16)
    assert not _attention_torch.leads(q, q, q, {"causal": False})
