"""Attention's Triton launchers: tiles, masks, layouts, determinism and offsets, one by one.

What users call is tested in test_attention.py. Here tiles are those of the interpreter, 32 queries
by 16 keys forward and 16 by 32 backward, so that few tokens make several tiles of every kind.
"""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastlm.kernels import attention_bwd as bwd
from fastlm.kernels import attention_fwd as fwd
from fastlm.kernels.attention_scores import Options, block_descriptors
from fastlm.kernels.configs import aligned_strides
from fastlm.reference import attention as reference
from fastlm.testing import assert_close, check_against_reference, nan_filled_empty, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CAUSAL = ["none", "top_left", "bottom_right"]
SCALE = 0.3


class Kernels(torch.autograd.Function):
    """(q, k, v) -> (out, lse) by the launchers alone."""

    @staticmethod
    def forward(ctx, q, k, v, causal, softmax_scale):
        ctx.options = Options(causal=causal, softmax_scale=softmax_scale)
        out, lse, lse_low = fwd.attention_fwd(q, k, v, ctx.options, q.dtype == torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, lse_low)
        return out, lse

    @staticmethod
    def backward(ctx, do, dlse):
        needs = ctx.needs_input_grad
        grads = backward(do, *ctx.saved_tensors, dlse, ctx.options, needs[0], needs[1] or needs[2])
        return *(g if need else None for g, need in zip(grads, needs, strict=False)), None, None


def backward(do, q, k, v, out, lse, lse_low, dlse, options, need_dq=True, need_dkv=True):
    """dq, dk, dv."""
    needs = (need_dq, need_dkv, False, False, False, False)
    return bwd.attention_bwd(do, q, k, v, out, lse, lse_low, dlse, options, *needs)[:3]


def kernels(q, k, v, causal="none", softmax_scale=SCALE):
    return Kernels.apply(q, k, v, causal, softmax_scale)


def specification(q, k, v, causal="none", softmax_scale=SCALE):
    causal = False if causal == "none" else causal
    return reference.attention(q, k, v, causal=causal, softmax_scale=softmax_scale, return_lse=True)


def qkv(seqlen_q, seqlen_k, *, batch=1, nheads=2, nheads_k=1, headdim=16, dtype=torch.float32,
        device="cpu"):  # fmt: skip
    keys = (batch, seqlen_k, nheads_k, headdim)
    return {
        "q": randn(batch, seqlen_q, nheads, headdim, dtype=dtype, device=device),
        "k": randn(*keys, dtype=dtype, device=device, seed=1),
        "v": randn(*keys, dtype=dtype, device=device, seed=2),
    }


def check(inputs, **options):
    with nan_filled_empty():
        return check_against_reference(kernels, specification, inputs, **options)


def launch(inputs, do, dlse=None, causal="bottom_right", **others):
    """out, lse, dq, dk, dv, without autograd, which might change layouts."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    options = Options(causal=causal, softmax_scale=SCALE, **others)
    out, lse, lse_low = fwd.attention_fwd(q, k, v, options, q.dtype == torch.float32)
    return out, lse, *backward(do, q, k, v, out, lse, lse_low, dlse, options)


def assert_same_bits(actual, expected):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == b.dtype and a.is_contiguous() and torch.equal(a, b), f"result {i}"


def assert_same_in_memory(moved, moved_do, inputs, do, expected):
    """`launch` on copies in other memory gives `expected`, the bits of `launch` on inputs and do.

    On a GPU only where as much can be loaded at once: that decides on tiles, and on the order in
    which threads add numbers up. Elsewhere the oracle judges.
    """
    actual = launch(moved, moved_do)
    unit = lambda *tensors: aligned_strides(*tensors)[0]
    same_units = unit(*moved.values()) == unit(*inputs.values()) and unit(moved_do) == unit(do)
    if same_units or do.device.type == "cpu":
        assert_same_bits(actual, expected)
        return

    def by_reference(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs.values()]
        out, lse = specification(*leaves, causal="bottom_right")
        return out, lse, *torch.autograd.grad(out, leaves, do.to(dtype))

    same, gold = by_reference(do.dtype), by_reference(torch.float64)
    for i, values in enumerate(zip(actual, same, gold, strict=True)):
        assert_close(f"result {i}", *values)


LENGTHS = {"as_many": (33, 33), "more_keys": (10, 40), "more_queries": (40, 10)}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_lengths(dtype, causal, lengths, device):
    check(qkv(*LENGTHS[lengths], dtype=dtype, device=device), causal=causal)


# On and around the edges of tiles.
EDGES = [(3, 2), (15, 17), (16, 32), (32, 16), (64, 31)]


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("seqlen_q,seqlen_k", EDGES)
def test_kernels_tile_edges(seqlen_q, seqlen_k, causal, device):
    check(qkv(seqlen_q, seqlen_k, nheads=1, device=device), causal=causal)


# In fp16: with one key dq comes from dlse alone, what is left when two sums of fp32 products
# cancel, and the reference does not compute those.
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("seqlen_q,seqlen_k", [(1, 1), (1, 20), (20, 1)])
def test_kernels_length_1(seqlen_q, seqlen_k, causal, device):
    inputs = qkv(seqlen_q, seqlen_k, batch=2, nheads=1, dtype=torch.float16, device=device)
    check(inputs, causal=causal)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("batch,seqlen_q,seqlen_k", [(1, 0, 3), (1, 3, 0), (1, 0, 0), (0, 3, 3)])
def test_kernels_empty(batch, seqlen_q, seqlen_k, causal, device):
    inputs = qkv(seqlen_q, seqlen_k, batch=batch, device=device)
    with nan_filled_empty():
        out, lse, dq, dk, dv = launch(inputs, torch.ones_like(inputs["q"]), causal=causal)
    assert torch.equal(out, torch.zeros_like(inputs["q"]))
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))
    for grad, name in ((dq, "q"), (dk, "k"), (dv, "v")):
        assert torch.equal(grad, torch.zeros_like(inputs[name]))


# 1 to 256, exact and padded, each with another dtype.
HEADDIMS = (1, 8, 16, 17, 40, 64, 80, 127, 128, 256)
HEADDIMS = [(headdim, DTYPES[i % 3]) for i, headdim in enumerate(HEADDIMS)]


@pytest.mark.parametrize("headdim,dtype", HEADDIMS, ids=str)
def test_kernels_headdim(headdim, dtype, device):
    inputs = qkv(17, 20, nheads=1, headdim=headdim, dtype=dtype, device=device)
    check(inputs, causal="bottom_right", softmax_scale=headdim**-0.5)


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("nheads_k", [1, 2, 3, 6])
def test_kernels_grouped_heads(nheads_k, causal, device):
    check(qkv(18, 18, nheads=6, nheads_k=nheads_k, device=device), causal=causal)


def test_kernels_sections_of_heads(device, monkeypatch):
    """Any number of heads in a section, the last one incomplete, gives the same bits."""
    inputs = qkv(33, 33, nheads=5, nheads_k=5, device=device)
    results = []
    for section in (1, 3, 5):
        for module in (fwd, bwd):
            monkeypatch.setattr(module, "attention_section", lambda *_, s=section: s)
        results.append(launch(inputs, torch.ones_like(inputs["q"])))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("softmax_scale", [-0.5, 0.0, 1.0])
def test_kernels_scale(softmax_scale, device):
    check(qkv(20, 20, device=device), causal="top_left", softmax_scale=softmax_scale)


def test_kernels_extreme_logits(device):
    """Logits of thousands do not overflow, and what lse loses to rounding is not lost."""
    inputs = qkv(20, 40, device=device)
    inputs["q"] *= 30
    inputs["k"] *= 30
    check(inputs, causal="bottom_right")


def test_kernels_lse_gradient_alone(device):
    """dlse with do = 0, which gives dv = 0, and none, which is the same as zeros."""
    inputs = qkv(20, 40, device=device)
    zeros = torch.zeros_like(inputs["q"])
    out, lse, dq, dk, dv = launch(inputs, zeros, torch.ones(1, 2, 20, device=device))
    assert dq.abs().max() > 0 and dk.abs().max() > 0 and torch.equal(dv, torch.zeros_like(dv))
    do = randn(*inputs["q"].shape, device=device, seed=3)
    assert_same_bits(launch(inputs, do), launch(inputs, do, torch.zeros_like(lse)))


@pytest.mark.parametrize("frozen", [("q",), ("k", "v")], ids="+".join)
def test_kernels_frozen(frozen, device):
    check(qkv(20, 20, device=device), frozen=frozen)


def test_kernels_unneeded_gradients(device):
    inputs = qkv(20, 20, device=device)
    q, k, v = inputs.values()
    options = Options(softmax_scale=SCALE)
    out, lse, lse_low = fwd.attention_fwd(q, k, v, options, True)
    call = (torch.ones_like(out), q, k, v, out, lse, lse_low, None, options)
    expected = backward(*call)
    dq, *rest = backward(*call, need_dkv=False)
    assert_same_bits([dq], expected[:1])
    assert rest == [None, None]
    dq, *rest = backward(*call, need_dq=False)
    assert_same_bits(rest, expected[1:])
    assert dq is None


@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
def test_kernels_ignore_what_nothing_sees(causal, device):
    """NaN in keys that no query sees, and in queries that see no key, leaves no trace."""
    inputs = qkv(40, 60, device=device) if causal == "top_left" else qkv(60, 40, device=device)
    do = randn(*inputs["q"].shape, device=device, seed=3)
    expected = launch(inputs, do, causal=causal)
    if causal == "top_left":
        inputs["k"][:, 40:] = inputs["v"][:, 40:] = float("nan")
    else:
        inputs["q"][:, :20] = do[:, :20] = float("nan")
    assert_same_bits(launch(inputs, do, causal=causal), expected)


def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sequence_first(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def packed(x):
    """One of three in memory, as in a product that gives q, k and v side by side."""
    buffer = x.new_full((*x.shape[:2], 3, *x.shape[2:]), float("nan"))
    buffer[:, :, 1] = x
    return buffer[:, :, 1]


def shifted(x):
    """Not aligned to 16 bytes, and with a row stride that is not either."""
    buffer = x.new_full((*x.shape[:3], x.shape[3] + 1), float("nan"))
    buffer[..., 1:] = x
    return buffer[..., 1:]


MEMORY = [heads_first, sequence_first, packed, shifted]


# Each memory for all, and one that changes the alignment for each alone.
LAYOUTS = [("q k v do", memory) for memory in MEMORY]
LAYOUTS += [(name, shifted) for name in ("q", "k", "v", "do")]


@functools.cache
def contiguous_results(device):
    inputs = qkv(18, 20, batch=2, nheads_k=2, device=device)
    do = randn(*inputs["q"].shape, device=device, seed=3)
    return inputs, do, launch(inputs, do)


@pytest.mark.parametrize("which,memory", LAYOUTS)
def test_kernels_layouts(which, memory, device):
    inputs, do, expected = contiguous_results(device)
    moved = {n: memory(x) if n in which.split() else x for n, x in inputs.items()}
    moved_do = memory(do) if "do" in which else do
    assert_same_in_memory(moved, moved_do, inputs, do, expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_kernels_stride_0(dim, device):
    """Broadcast keys and values; a broadcast gradient, as sum() gives, in all dimensions."""
    inputs = qkv(18, 20, batch=2, nheads_k=2, device=device)
    for name in ("k", "v"):
        inputs[name] = inputs[name].narrow(dim, 0, 1).expand(inputs[name].shape)
    do = torch.ones((), device=device).expand(inputs["q"].shape)
    copies = {n: x.contiguous() for n, x in inputs.items()}
    assert_same_bits(launch(inputs, do), launch(copies, do.contiguous()))


def test_kernels_leave_inputs(device):
    inputs = qkv(18, 34, device=device)
    do, dlse = randn(*inputs["q"].shape, seed=3, device=device), torch.ones(1, 2, 18, device=device)
    before = [x.clone() for x in (*inputs.values(), do, dlse)]
    launch(inputs, do, dlse)
    assert_same_bits([*inputs.values(), do, dlse], before)


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
def test_kernels_deterministic(causal, device):
    """The same bits when repeated, and for the same sequence whatever else is in the batch."""
    inputs = qkv(33, 33, batch=3, nheads=1, dtype=torch.float16, device=device)
    do = randn(*inputs["q"].shape, dtype=torch.float16, device=device, seed=3)
    results = launch(inputs, do, causal=causal)
    assert_same_bits(launch(inputs, do, causal=causal), results)
    alone = launch({n: x[1:2] for n, x in inputs.items()}, do[1:2], causal=causal)
    assert_same_bits(alone, [x[1:2] for x in results])


def test_kernels_causality(device):
    """A later token changes no bit of an earlier row."""
    inputs = qkv(40, 40, device=device)
    options = Options(causal="bottom_right", softmax_scale=SCALE)
    before = fwd.attention_fwd(*inputs.values(), options, False)[0]
    inputs["k"][:, 29:] += 1
    inputs["v"][:, 29:] += 1
    after = fwd.attention_fwd(*inputs.values(), options, False)[0]
    assert torch.equal(after[:, :29], before[:, :29]) and not torch.equal(after, before)


@pytest.mark.parametrize("far", ["batch", "seqlen", "nheads"])
def test_kernels_offsets_past_2_31(far, device):
    """Each dimension in turn 2**30 elements apart; memory that is not touched is not committed."""
    step, shape = 2**30, [1, 1, 1, 16]
    shape[["batch", "seqlen", "nheads"].index(far)] = 3
    strides = [step if n == 3 else 16 for n in shape[:3]] + [1]
    buffer = torch.empty(2 * step + 1024, dtype=torch.float16, device=device)
    tensors = []
    for i in range(4):
        x = buffer.as_strided(shape, strides, 64 * i)
        tensors.append(x.copy_(randn(*shape, dtype=torch.float16, device=device, seed=i)))
    q, k, v, do = tensors
    results = launch({"q": q, "k": k, "v": v}, do)
    copies = [x.contiguous() for x in tensors]
    assert_same_bits(results, launch(dict(zip("qkv", copies, strict=False)), copies[3]))


def launch_with_descriptors(monkeypatch, *args, **options):
    """`launch` by configurations with `tma`."""
    with monkeypatch.context() as patch:
        for module in (fwd, bwd):
            config = module.attention_config
            patch.setattr(
                module, "attention_config", lambda *a, config=config: replace(config(*a), tma=True)
            )
        return launch(*args, **options)


DESCRIBED = [(torch.bfloat16, 16), (torch.float16, 40), (torch.bfloat16, 72)]


@pytest.mark.parametrize("dtype,headdim", DESCRIBED, ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
def test_kernels_descriptors(causal, dtype, headdim, device, monkeypatch):
    """Not a bit depends on who loads: several blocks, head dims that are padded, grouped heads."""
    inputs = qkv(70, 85, nheads_k=1, headdim=headdim, dtype=dtype, device=device)
    do = randn(*inputs["q"].shape, dtype=dtype, device=device, seed=3)
    results = launch_with_descriptors(monkeypatch, inputs, do, causal=causal)
    assert_same_bits(results, launch(inputs, do, causal=causal))


OPTIONS = {
    "window": lambda: {"window_left": 40, "window_right": 5},
    "dropout": lambda: {"dropout_p": 0.3, "seed": torch.tensor([7])},
    "softcap": lambda: {"softcap": 2.0},
    "mask": lambda: {"mask": randn(1, 1, 40, 70) > 0},
    "lengths": lambda: {"seqlens_k": torch.tensor([70, 37])},
    "packed": lambda: {
        "cu_seqlens_q": torch.tensor([0, 30, 80], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 70, 140], dtype=torch.int32),
        "max_seqlen_q": 50,
        "max_seqlen_k": 70,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_descriptors_with_options(name, device, monkeypatch):
    """Also where a window has whole blocks left of them, and tokens of another sequence hold NaN.

    A packed sequence's first product with v is by a block before it: that block is 0, not NaN.
    """
    inputs = qkv(40, 70, batch=2, nheads=1, dtype=torch.float16, device=device)
    do = randn(*inputs["q"].shape, dtype=torch.float16, device=device, seed=3)
    options = {n: x.to(device) if torch.is_tensor(x) else x for n, x in OPTIONS[name]().items()}
    if name == "packed":
        inputs, do = {n: x.flatten(0, 1) for n, x in inputs.items()}, do.flatten(0, 1)
        inputs["k"][:70] = inputs["v"][:70] = float("nan")
    results = launch_with_descriptors(monkeypatch, inputs, do, causal="none", **options)
    expected = launch(inputs, do, causal="none", **options)
    if name == "packed":
        out, lse, dq, dk, dv = results
        assert not out[30:].isnan().any() and not dk[70:].isnan().any() and out[:30].isnan().all()
        results, expected = ([x.nan_to_num(9.0) for x in y] for y in (results, expected))
    assert_same_bits(results, expected)


def test_block_descriptors():
    """What the copy engine cannot address is left to pointers."""
    x = torch.empty(2, 8, 4, 24, dtype=torch.float16)
    (found,) = block_descriptors(16, x)
    assert found.strides == [768, 96, 24, 1] and found.block_shape == [1, 16, 1, 32]
    (found,) = block_descriptors(16, x.as_strided((1, 8, 1, 24), (3, 96, 5, 1)))
    assert found.strides == [8, 96, 8, 1]
    for other in (
        x[..., 1:9],  # base
        torch.empty(2, 8, 4, 20, dtype=torch.float16),  # strides
        x[:1].expand(2, 8, 4, 24),
        x[:, :0],
    ):
        assert block_descriptors(16, x, other) == (None, None)


class Spy:
    """Stands in for a kernel and notes its grids."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


def test_kernels_grid_has_one_axis(monkeypatch):
    """The others end at 65,535 programs, which batch times heads may pass."""
    spy = Spy()
    for module in (fwd, bwd):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, spy)
    q = torch.empty(70_000, 1, 2, 16, device="meta")
    launch({"q": q, "k": q, "v": q}, q)
    assert spy.grids == [(140_000,)] * 4


VARIANTS = """
import collections, itertools, json, sys
import torch
import compile_gate
compile_gate._pretend("sm_90")
from triton import knobs
from fastlm.kernels.attention_bwd import attention_bwd
from fastlm.kernels.attention_fwd import attention_fwd
from fastlm.kernels.attention_scores import Options
from fastlm.kernels.attention_weights import attention_weights_bwd, attention_weights_fwd

keys = collections.defaultdict(lambda: collections.defaultdict(set))
used = "plain"
def note(*, key, fn, **_):
    keys[used][fn.name].add(key)
    return True  # do not compile
knobs.runtime.jit_cache_hook = note
new = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
fp32 = lambda *shape: new(*shape, dtype=torch.float32)
lengths = (1, 2, 16, 17, 1024, 2**22)
for batch, nheads, m, n in itertools.product((1, 3), (1, 8), lengths, lengths):
    q, k, v = new(batch, m, nheads, 64), new(batch, n, 1, 64), new(batch, n, 1, 64)
    lse, dw = fp32(batch, nheads, m), new(batch, nheads, m, n)
    uses = {
        "plain": ({}, ""),
        "masks": ({"mask": new(batch, 1, 1, n, dtype=torch.bool), "bias": new(1, nheads, m, n),
                   "seqlens_k": new(batch, dtype=torch.int32)}, "bias"),
        "distances": ({"table": fp32(32, nheads), "bidirectional": True, "max_distance": 128,
                       "alibi_slopes": fp32(nheads)}, "table"),
        "rest": ({"window_left": m // 2, "softcap": 30.0, "dropout_p": 0.1, "sinks": fp32(nheads),
                  "seed": new(dtype=torch.int64)}, "sinks"),
    }
    for causal, name in itertools.product(("none", "top_left", "bottom_right"), uses):
        used = name if name == "plain" else f"{name}, {causal}"
        given, learned = uses[name]
        options = Options(causal=causal, softmax_scale=0.1, **given)
        attention_fwd(q, k, v, options, False)
        needs = [name in learned for name in ("bias", "table", "alibi", "sinks")]
        attention_bwd(q, q, k, v, q, lse, None, None, options, True, True, *needs)
        if name == "plain":
            attention_weights_fwd(q, k, lse, options)
            attention_weights_bwd(dw, q, k, lse, options, True, True, *[False] * 3)
print(json.dumps({u: {name: len(x) for name, x in found.items()} for u, found in keys.items()}))
"""


def test_kernels_variants():
    """At most three binaries of a kernel for all lengths, heads and batches. Of the weights', one
    for rows that start at multiples of 16 bytes and one for others."""
    support = Path(__file__).parent / "support"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", VARIANTS],
        env={**environment, "PYTHONPATH": str(support)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    counts = {
        used: {name.split(".")[-1].strip("_"): n for name, n in found.items()}
        for used, found in json.loads(result.stdout).items()
    }
    assert counts["plain"] == {
        "attention_fwd_kernel": 2,
        "attention_bwd_delta_kernel": 1,
        "attention_bwd_dq_kernel": 2,
        "attention_bwd_dk_dv_kernel": 2,
        "attention_weights_fwd_kernel": 4,
        "attention_weights_bwd_dq_kernel": 4,
        "attention_weights_bwd_dk_kernel": 4,
    }
    del counts["plain"]  # causal and not
    assert len(counts) == 3 * 3
    assert [(u, k, n) for u, found in counts.items() for k, n in found.items() if n > 3] == []


# Real sizes: every configuration of the table is launched.


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(1024, 1024), (1000, 1500), (1500, 1000)], ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("headdim", [16, 17, 32, 40, 64, 80, 127, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_large(dtype, headdim, causal, lengths, device):
    inputs = qkv(*lengths, batch=2, nheads=4, nheads_k=2, headdim=headdim, dtype=dtype,
                 device=device)  # fmt: skip
    check(inputs, causal=causal, softmax_scale=headdim**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("headdim", [64, 128, 256])
def test_kernels_large_tf32(headdim, device):
    """With TF32 allowed, in the kernels and in the reference alike, errors are TF32's own."""
    inputs = qkv(600, 600, headdim=headdim, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check(inputs, causal="bottom_right", softmax_scale=headdim**-0.5)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", MEMORY)
def test_kernels_large_layouts(memory, device):
    inputs = qkv(300, 500, batch=2, nheads_k=2, headdim=64, dtype=torch.bfloat16, device=device)
    do = randn(*inputs["q"].shape, dtype=torch.bfloat16, device=device, seed=3)
    expected = launch(inputs, do)
    moved = {n: memory(x) for n, x in inputs.items()}
    assert_same_in_memory(moved, memory(do), inputs, do, expected)


@pytest.mark.gpu
def test_kernels_large_deterministic(device):
    """100 repeats give the same bits: no race."""
    inputs = qkv(2000, 2000, batch=2, nheads=4, headdim=128, dtype=torch.bfloat16, device=device)
    do = randn(*inputs["q"].shape, dtype=torch.bfloat16, device=device, seed=3)
    expected = launch(inputs, do)
    for _ in range(100):
        assert_same_bits(launch(inputs, do), expected)


@pytest.mark.gpu
def test_kernels_large_batch(device):
    """More than 65,535 batches times heads."""
    inputs = qkv(2, 3, batch=70_000, headdim=16, device=device)
    do = randn(*inputs["q"].shape, device=device, seed=3)
    results = launch(inputs, do)
    for i in (0, 69_999):
        alone = launch({n: x[i : i + 1] for n, x in inputs.items()}, do[i : i + 1])
        assert_same_bits(alone, [x[i : i + 1] for x in results])
