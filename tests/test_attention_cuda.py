"""Attention in CUDA C++: what it takes and refuses, every option that it takes, and what must hold
bit for bit. Shapes are of one to three tiles of the kernels' own sizes: 128 queries, 32 or 64 keys.

What only its backward has is in test_attention_cuda_bwd.py.
"""

import functools

import pytest
import torch
from attention_options import VALUES, build, consistent, fused, specified
from pairwise import pairwise

import fastlm
from fastlm.reference import attention as reference
from fastlm.testing import assert_close, check_against_reference, nan_filled_empty, randn

F16, BF16 = torch.float16, torch.bfloat16
SEED = 0x1234_5678_9ABC_DEF0
COMPILED_HEADDIMS = [32, 64, 96, 128, 256]


def qkv(shape=(1, 150, 170, 3, 1), headdim=64, dtype=BF16, device="cpu"):
    batch, seqlen_q, seqlen_k, nheads, nheads_k = shape
    randn_of = lambda *s, seed: randn(*s, headdim, dtype=dtype, device=device, seed=seed)
    return {
        "q": randn_of(batch, seqlen_q, nheads, seed=0),
        "k": randn_of(batch, seqlen_k, nheads_k, seed=1),
        "v": randn_of(batch, seqlen_k, nheads_k, seed=2),
    }


def run_oracle(inputs, impl="cuda", **options):
    with nan_filled_empty():
        check_against_reference(
            lambda **kw: fastlm.attention(**kw, return_lse=True, impl=impl),
            lambda **kw: reference.attention(**kw, return_lse=True),
            inputs,
            **options,
        )


def attend(inputs, **options):
    with nan_filled_empty():
        return fastlm.attention(**inputs, return_lse=True, impl="cuda", **options)


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Each kernel, with dropout and without, on tiles that edges cut and on whole ones.
@pytest.mark.sanitized
@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("headdim", COMPILED_HEADDIMS)
def test_attention_cuda_headdims(headdim, dropout_p, impl, device):
    dtype = F16 if headdim in (64, 256) else BF16
    inputs = qkv((1, 70, 130, 2, 1), headdim, dtype, device)
    seed = torch.full((), SEED, device=device) if dropout_p else None
    run_oracle(inputs, impl, window=(90, 0), dropout_p=dropout_p, seed=seed)


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("headdim", [40, 72, 80, 104, 112, 136, 248])
def test_attention_cuda_headdims_between(headdim, dtype, impl, device):
    run_oracle(qkv((2, 33, 70, 2, 2), headdim, dtype, device), impl, causal=True)


# What the kernels take of the values that the options' tests draw from; lengths for their tiles.
SCOPE = {
    name: VALUES[name]
    for name in ("causal", "window", "seqlens_k", "dropout_p", "packed", "heads", "lse", "frozen")
} | {
    "window": [None, (3, 0), (None, 2), (20, None), (6, 9), (70, 64)],
    "lengths": [(18, 18), (1, 141), (150, 70), (70, 200), (129, 129)],
    "headdim": [32, 64, 128, 96],
    "dtype": [F16, BF16],
    "layout": ["contiguous", "transposed", "last_stride_2"],
}
PLAIN = {name: values[0] for name, values in VALUES.items()} | {n: v[0] for n, v in SCOPE.items()}
PAIRS = [consistent({**PLAIN, **case}) for case in pairwise(**SCOPE)]


def changes(case):
    return "-".join(f"{n}={v}" for n, v in case.items() if v != PLAIN[n])


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("case", PAIRS, ids=changes)
def test_attention_cuda_pairs_of_options(case, impl, device):
    tensors, options = build(case)
    to = lambda x: x.to(device) if torch.is_tensor(x) else x
    options = {n: tuple(map(to, x)) if n == "packing" else to(x) for n, x in options.items()}
    with nan_filled_empty():
        check_against_reference(
            fused(impl), specified, {n: to(x) for n, x in tensors.items()},
            frozen=case["frozen"], **options,
        )  # fmt: skip


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("scale", [0.0, -0.4, 3.0])
def test_attention_cuda_scales(scale, impl, device):
    run_oracle(qkv(device=device, dtype=F16), impl, softmax_scale=scale, causal=True)


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("headdim", COMPILED_HEADDIMS)
def test_attention_cuda_later_tokens_do_not_matter(headdim, impl, device):
    """Causal: what comes before a token that changes keeps its bits."""
    inputs = qkv((1, 200, 200, 2, 1), headdim, device=device)
    expected = attend(inputs, causal=True)
    for token in (0, 63, 100, 191):
        changed = {n: x.clone() for n, x in inputs.items()}
        for x in changed.values():
            x[:, token] = 3.0
        out, lse = attend(changed, causal=True)
        assert torch.equal(out[:, :token], expected[0][:, :token])
        assert torch.equal(lse[..., :token], expected[1][..., :token])
        assert not torch.equal(out, expected[0])


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("headdim", COMPILED_HEADDIMS)
def test_attention_cuda_padding_does_not_matter(headdim, causal, impl, device):
    """Keys appended behind seqlens_k, NaN among them, change no bit."""
    inputs = qkv((2, 70, 150, 2, 1), headdim, device=device)
    seqlens_k = torch.tensor([150, 91], dtype=torch.int32, device=device)
    options = {"seqlens_k": seqlens_k, "causal": causal}
    expected = attend(inputs, **options)
    padded = dict(inputs)
    for name in "kv":
        x = torch.full((2, 300, *inputs[name].shape[2:]), float("nan"), dtype=BF16, device=device)
        for b, length in enumerate(seqlens_k.tolist()):
            x[b, :length] = inputs[name][b, :length]
        padded[name] = x
    assert all_equal(attend(padded, **options), expected)


@pytest.mark.sanitized
@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"window": (70, 20)}, {"causal": "top_left", "dropout_p": 0.3},
], ids=str)  # fmt: skip
def test_attention_cuda_packed_is_padded(options, impl, device):
    """Bit for bit, tokens of no sequence aside."""
    lengths_q, lengths_k = [70, 0, 140, 5], [150, 30, 64, 0]
    cu_q, cu_k = (
        torch.tensor([0, *x], device=device).cumsum(0).int() for x in (lengths_q, lengths_k)
    )
    padded = qkv((4, 140, 150, 4, 2), 64, device=device)
    seed = {"seed": SEED} if "dropout_p" in options else {}
    packed = {}
    for name, lengths in (("q", lengths_q), ("k", lengths_k), ("v", lengths_k)):
        rows = [padded[name][b, :n] for b, n in enumerate(lengths)]
        packed[name] = torch.cat([*rows, torch.full_like(padded[name][0, :3], float("nan"))])
    with nan_filled_empty():
        out, lse = fastlm.attention_varlen(
            **packed, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=140, max_seqlen_k=150,
            return_lse=True, impl=impl, **options, **seed,
        )  # fmt: skip
    for b, (m, n) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        # Dropout counts batches, so the sequence stays where it is in its batch.
        alone = {name: padded[name][: b + 1, : m if name == "q" else n] for name in padded}
        wanted, wanted_lse = attend(alone, **options, **seed)
        assert torch.equal(out[cu_q[b] : cu_q[b + 1]], wanted[b])
        assert torch.equal(lse[:, cu_q[b] : cu_q[b + 1]], wanted_lse[b])
    assert not out[cu_q[-1] :].any() and (lse[:, cu_q[-1] :] == float("-inf")).all()


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_attention_cuda_empty(shape, causal, impl, device):
    inputs = qkv((*shape, 2, 1), device=device)
    out, lse = attend(inputs, causal=causal)
    assert out.shape == inputs["q"].shape and lse.shape == (shape[0], 2, shape[1])
    assert not out.any() and (lse == float("-inf")).all()


@pytest.mark.parametrize("impl", ["cuda"])
def test_attention_cuda_rows_past_int32_offsets(impl, device):
    # Three sequences 2**30 elements apart: the storage is committed lazily, few pages touched.
    big = torch.empty(2**31 + 8192, device=device, dtype=F16)
    x = big.as_strided((3, 70, 1, 32), (2**30, 32, 32, 1))
    x.copy_(randn(3, 70, 1, 32))

    def results(x):
        q, k, v = (x.detach().requires_grad_() for _ in range(3))
        out, lse = attend({"q": q, "k": k, "v": v}, causal=True)
        # With the gradient of out as far away as the inputs.
        return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), x.detach())

    assert all_equal(results(x), results(x.contiguous()))
    rows = big.as_strided((1, 3, 1, 32), (0, 2**30, 32, 1))  # and three rows of one sequence
    rows.copy_(randn(1, 3, 1, 32))
    assert all_equal(results(rows), results(rows.contiguous()))


@pytest.mark.parametrize("impl", ["cuda"])
def test_attention_cuda_gradients_of_gradients(impl, device):
    tensors = qkv((1, 5, 6, 2, 1), 32, device=device).values()

    def second(attention, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = attention(*leaves, causal=True)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
        return torch.autograd.grad(grads, leaves, [torch.ones_like(g) for g in grads])

    actual = second(functools.partial(fastlm.attention, impl=impl), BF16)
    same_dtype = second(reference.attention, BF16)
    gold = second(reference.attention, torch.float64)
    for name, *grads in zip("qkv", actual, same_dtype, gold, strict=True):
        assert_close(name, *grads)


@pytest.mark.parametrize("impl", ["cuda"])
def test_attention_cuda_incoming_gradients_of_any_layout(impl, device):
    leaves = [x.requires_grad_() for x in qkv((2, 40, 40, 2, 1), device=device).values()]
    out, lse = fastlm.attention(*leaves, return_lse=True, impl=impl)
    grads = lambda do, dlse: torch.autograd.grad([out, lse], leaves, [do, dlse], retain_graph=True)
    do, dlse = torch.ones_like(out), torch.ones_like(lse)
    expected = grads(do, dlse)
    unaligned = torch.ones(do.numel() + 1, dtype=BF16, device=device)[1:].view(do.shape)
    one = torch.ones((), device=device)
    for other in (unaligned, one.to(BF16).expand(do.shape), torch.ones_like(out.mT).mT):
        assert all_equal(grads(other, one.expand(lse.shape)), expected)


@pytest.mark.parametrize("impl", ["cuda"])
def test_attention_cuda_compiles_fullgraph(impl, device):
    def loss(q, k, v):
        out, lse = fastlm.attention(q, k, v, causal=True, return_lse=True, impl=impl)
        return out.float().square().sum() + lse.sum()

    leaves = [x.requires_grad_() for x in qkv((1, 40, 40, 2, 1), device=device).values()]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all_equal(torch.autograd.grad(compiled(*leaves), leaves), expected)


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_cuda_opcheck(packed, impl, device):
    q, k, v = qkv((1, 20, 24, 2, 1), device=device).values()
    optional = [None] * 9
    if packed:
        q, k, v = q[0], k[0], v[0]
        number = lambda *values: torch.tensor(values, device=device, dtype=torch.int32)
        optional[4], optional[5] = number(0, 12, 20), number(0, 20, 24)
    scalars = ("bottom_right", 0.3, -1, -1, 0.0, 0.0, False, 0, 20, 24)
    args = (q, k, v, *optional, *scalars, False)
    torch.library.opcheck(torch.ops.fastlm_cuda.attention_fwd.default, args)
    out, lse, _ = torch.ops.fastlm_cuda.attention_fwd(*args)
    for needs in ((True, True), (True, False), (False, True)):
        args = (out, q, k, v, out, lse, None, lse, *optional, *scalars, *needs, *[False] * 4)
        torch.library.opcheck(torch.ops.fastlm_cuda.attention_bwd.default, args)


BIAS = fastlm.RelativeBias(torch.ones(8, 2), bidirectional=True, max_distance=9)
ODD = torch.ones(2 * 20 * 2 * 64 + 8, dtype=BF16)
REFUSED = {
    "float32": (qkv(dtype=torch.float32), "takes torch.float16 and torch.bfloat16, not "
                "torch.float32"),
    "mask": ({"mask": torch.ones(24, dtype=torch.bool)}, "does not take mask"),
    "bias": ({"bias": torch.ones(24)}, "does not take bias"),
    "RelativeBias": ({"bias": BIAS}, "does not take RelativeBias"),
    "ALiBi": ({"alibi_slopes": torch.ones(2)}, "does not take alibi_slopes"),
    "softcap": ({"softcap": 2.0}, "does not take softcap"),
    "sinks": ({"sinks": torch.ones(2)}, "does not take sinks"),
    "headdim_v": ({"v": torch.ones(1, 24, 1, 32, dtype=BF16)},
                  "needs headdim = headdim_v, here 64 and 32"),
    "narrow": (qkv(headdim=24), "takes headdim from 32 to 256 in steps of 8, here 24"),
    "odd": (qkv(headdim=36), "takes headdim from 32 to 256 in steps of 8, here 36"),
    "wide": (qkv(headdim=264), "takes headdim from 32 to 256 in steps of 8, here 264"),
    "pointer": ({"q": ODD[1 : 1 + 20 * 2 * 64].view(1, 20, 2, 64)},
                "needs q aligned to 16 bytes in every dimension"),
    "stride": ({"q": ODD.as_strided((1, 20, 2, 64), (0, 132, 64, 1))},
               "needs q aligned to 16 bytes in every dimension"),
}  # fmt: skip


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("what", REFUSED)
def test_attention_cuda_refusals(what, impl, device):
    change, message = REFUSED[what]
    inputs = {**qkv((1, 20, 24, 2, 1)), **change}
    if device != "cpu" and what not in ("pointer", "stride", "RelativeBias"):
        inputs = {n: x.to(device) if torch.is_tensor(x) else x for n, x in inputs.items()}
    elif device != "cpu":
        pytest.skip("moving it to a GPU changes what is refused")
    with pytest.raises(NotImplementedError) as error:
        fastlm.attention(**inputs, impl=impl)
    other = fastlm.explain("attention", **inputs).chosen
    assert str(error.value) == f"attention: impl='cuda' {message}; use impl={other!r}"


@pytest.mark.parametrize("impl", ["cuda"])
def test_attention_cuda_refuses_transforms(impl, device):
    inputs = qkv((1, 5, 6, 2, 1), device=device)
    attend = lambda q: fastlm.attention(q, inputs["k"], inputs["v"], impl=impl)
    with pytest.raises(NotImplementedError, match="does not run under torch.func.vmap"):
        torch.func.vmap(attend)(inputs["q"][None])


@pytest.mark.parametrize("impl", ["cuda"])
def test_attention_cuda_explains(impl, device):
    """What other operators have, and strides that mean nothing: of one head, of one batch."""
    inputs = qkv((1, 20, 24, 2, 1), device=device)
    reasons = fastlm.explain("attention", **inputs, softcap=2.0).reasons
    assert "impl" not in reasons and reasons["cuda"] is not None
    weights = fastlm.explain("attention_weights", inputs["q"], inputs["k"], attend(inputs)[1])
    assert weights.reasons["cuda"] == "fastlm has no cuda kernel for attention_weights"
    one = {n: x[:, :, :1].as_strided((1, 20, 1, 64), (7, 64 * x.shape[2], 3, 1))
           for n, x in inputs.items()}  # fmt: skip
    dense = {n: x.contiguous() for n, x in one.items()}
    assert all_equal(attend(one), attend(dense))
