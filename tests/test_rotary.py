"""rotary against its formula and Hugging Face's rotations."""

import re
from functools import partial

import pytest
import torch

import fastlm
from fastlm.reference.rotary import rotary as reference
from fastlm.shapes import ROTARY_LARGE
from fastlm.testing import (
    LAYOUTS,
    assert_close,
    check_against_reference,
    nan_filled_empty,
    randn,
    with_layout,
)

IMPLS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCH, SEQLEN, NHEADS, HEADDIM = 2, 7, 3, 16


def tables(rows, half, dtype=torch.float32, device="cpu"):
    angles = torch.arange(rows)[:, None] * 10000.0 ** (-torch.arange(half) / max(half, 1))
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotary_inputs(dtype, device, half=HEADDIM // 2, table_dtype=torch.float32):
    cos, sin = tables(11, half, table_dtype, device)
    return {"x": randn(BATCH, SEQLEN, NHEADS, HEADDIM, dtype=dtype, device=device),
            "cos": cos, "sin": sin}  # fmt: skip


def run_oracle(fn, gold, inputs, **options):
    """With an incoming gradient that is not x, for which that of sin would be exactly 0."""
    with nan_filled_empty():
        check_against_reference(fn, gold, inputs, grad_seed=11, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [0, 1, 3, 8])
@pytest.mark.parametrize("positions", [None, "row", "batch"])
def test_rotary_is_a_complex_product(positions, half, interleaved, dtype, impl, device):
    """(a + i b) * exp(i angle), pair by pair, written without the reference."""
    generator = torch.Generator().manual_seed(3)
    shape = {"row": (SEQLEN,), "batch": (BATCH, SEQLEN)}.get(positions)
    where = shape and torch.randint(0, 11, shape, generator=generator).to(device)

    def gold(x, cos, sin):
        at = torch.arange(SEQLEN, device=device) if where is None else where
        wide = torch.promote_types(x.dtype, torch.float32)
        turn = torch.complex(cos[at].to(wide), sin[at].to(wide)).unsqueeze(-2)
        pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
        y = list(x.unbind(-1))
        for i, (a, b) in enumerate(pairs):
            turned = torch.complex(x[..., a].to(wide), x[..., b].to(wide)) * turn[..., i]
            y[a], y[b] = turned.real.to(x.dtype), turned.imag.to(x.dtype)
        return torch.stack(y, -1)

    run_oracle(
        lambda **kw: fastlm.rotary(**kw, interleaved=interleaved, positions=where, impl=impl),
        gold,
        rotary_inputs(dtype, device, half),
        frozen=("cos", "sin") if half == 0 else (),
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_hugging_face(interleaved, dtype, impl, device):
    """Llama turns halves, with tables that hold every column twice; GPT-J turns neighbours."""
    if interleaved:
        from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb
    else:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def gold(x, cos, sin):
        cos, sin = (t[:SEQLEN].to(x.dtype).expand(BATCH, SEQLEN, -1) for t in (cos, sin))
        if interleaved:
            return apply_rotary_pos_emb(x, sin, cos)
        cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))
        return apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]

    run_oracle(
        lambda **kw: fastlm.rotary(**kw, interleaved=interleaved, impl=impl),
        gold,
        rotary_inputs(dtype, device, table_dtype=dtype),
    )


SHAPES = {  # batch, seqlen, nheads, headdim, half
    "one": (1, 1, 1, 2, 1),
    "prime": (2, 13, 5, 22, 11),
    "past_one_block_of_heads": (1, 2, 70, 130, 64),
    "many_tokens_a_program": (2, 300, 1, 8, 4),
    "mostly_through": (1, 3, 2, 300, 2),
    "wide": (1, 2, 1, 600, 300),
    "decoding": (37, 1, 4, 16, 8),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary_shapes(shape, interleaved, dtype, impl, device):
    *x, half = SHAPES[shape]
    cos, sin = tables(x[1] + 1, half, device=device)
    inputs = {"x": randn(*x, dtype=dtype, device=device), "cos": cos, "sin": sin}
    run_oracle(partial(fastlm.rotary, impl=impl), reference, inputs, interleaved=interleaved)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", ROTARY_LARGE)
def test_rotary_shapes_large(shape, interleaved, dtype, impl, device):
    s = ROTARY_LARGE[shape]
    cos, sin = tables(s.seqlen, s.rotary_dim // 2, device=device)
    x = randn(s.batch, s.seqlen, s.nheads, s.headdim, dtype=dtype, device=device)
    inputs = {"x": x, "cos": cos, "sin": sin}
    run_oracle(partial(fastlm.rotary, impl=impl), reference, inputs, interleaved=interleaved)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", [("x",), ("cos",), ("sin",), ("x", "cos")], ids=str)
@pytest.mark.parametrize("form", ["default", "row", "batch", "sequences", "one_sequence", "packed"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_gradients_of_tables(interleaved, form, frozen, impl, device):
    """Of rows that many tokens share, and of rows that no token has."""
    inputs = rotary_inputs(torch.float32, device, half=5)
    positions = torch.tensor([3, 3, 0, 3, 10, 3, 3], device=device)
    if form == "packed":
        inputs["x"] = inputs["x"].flatten(0, 1)
        positions = positions.repeat(BATCH)
    elif form == "batch":
        positions = positions.repeat(BATCH, 1)
    elif form != "row":
        positions = None
    if "sequence" in form:
        rows = 1 if form == "one_sequence" else BATCH
        for seed, name in enumerate(("cos", "sin")):
            inputs[name] = randn(rows, SEQLEN, 5, device=device, seed=seed + 7)
    run_oracle(
        partial(fastlm.rotary, impl=impl), reference, inputs, frozen=frozen,
        interleaved=interleaved, positions=positions,
    )  # fmt: skip


@pytest.mark.parametrize("impl", ["triton"])
def test_rotary_frozen_tables_cost_nothing(impl, device, launches):
    inputs = rotary_inputs(torch.float32, device)
    y = fastlm.rotary(inputs["x"].requires_grad_(), inputs["cos"], inputs["sin"], impl=impl)
    assert launches == ["rotary_kernel"]
    y.sum().backward()
    assert launches == ["rotary_kernel"] * 2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_rotary_mixed_dtypes(table_dtype, x_dtype, impl, device):
    inputs = rotary_inputs(x_dtype, device, table_dtype=table_dtype)
    run_oracle(partial(fastlm.rotary, impl=impl), reference, inputs)


def test_rotary_rotates_norms_and_distances(device):
    """Norms stay, and q·k depends on the distance of positions alone."""
    cos, sin = tables(11, 8, torch.float64, device)
    x = randn(1, 1, 1, 16, dtype=torch.float64, device=device).expand(1, 9, 1, 16)
    y = fastlm.rotary(x, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    scores = torch.einsum("bqhd,bkhd->qk", y, y)
    for shift in range(9):
        diagonal = scores.diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_forms_are_bitwise_equal(interleaved, impl, device):
    """Positions, packed tokens and tables of each sequence give what the default gives."""
    inputs = rotary_inputs(torch.float32, device)
    x, cos, sin = inputs.values()
    y = fastlm.rotary(x, cos, sin, interleaved=interleaved, impl=impl)
    row = torch.arange(SEQLEN, device=device)
    for positions in (row, row.int(), row.expand(BATCH, SEQLEN)):
        assert torch.equal(
            fastlm.rotary(x, cos, sin, interleaved=interleaved, positions=positions, impl=impl), y
        )
    for batch in (1, BATCH):
        own = (t[:SEQLEN].expand(batch, SEQLEN, -1) for t in (cos, sin))
        assert torch.equal(fastlm.rotary(x, *own, interleaved=interleaved, impl=impl), y)
    packed = fastlm.rotary(
        x.flatten(0, 1), cos, sin, interleaved=interleaved, positions=row.repeat(BATCH), impl=impl
    )
    assert torch.equal(packed.view_as(y), y)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [0, 1, 2])
def test_rotary_gradcheck(half, interleaved):
    x = randn(1, 3, 2, 5, dtype=torch.float64).requires_grad_()
    cos, sin = (t.requires_grad_() for t in tables(4, half, torch.float64))
    fn = lambda x, cos, sin: reference(
        x, cos, sin, interleaved=interleaved, positions=torch.tensor([2, 0, 2])
    )
    assert torch.autograd.gradcheck(fn, (x, cos, sin))
    assert torch.autograd.gradgradcheck(fn, (x, cos, sin))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["x", "dy", "cos", "sin"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_layouts_are_bitwise_equal(interleaved, what, layout, impl, device):
    values = rotary_inputs(torch.float32, device, half=4)
    values["dy"] = randn(*values["x"].shape, device=device, seed=4)
    if layout == "expanded":
        repeats = (len(values[what]), *[1] * (values[what].dim() - 1))
        values[what] = values[what][:1].repeat(repeats)

    def grads(x, cos, sin, dy):
        leaves = [t.detach().requires_grad_() for t in (x, cos, sin)]
        y = fastlm.rotary(*leaves, interleaved=interleaved, impl=impl)
        if impl == "torch":  # it adds in an order that depends on strides
            return (y,)
        return y, *torch.autograd.grad(y, leaves, dy)

    changed = {**values, what: with_layout(values[what], layout)}
    if device == "cuda" and impl == "triton":  # another alignment is another kernel, by fma
        inputs = {n: x for n, x in changed.items() if n != "dy"}
        gold = partial(reference, interleaved=interleaved)
        run_oracle(partial(fastlm.rotary, impl=impl, interleaved=interleaved), gold, inputs)
        return
    actual, expected = grads(**changed), grads(**values)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_rotary_expanded_gradient_of_sum(impl, device):
    inputs = rotary_inputs(torch.float32, device, half=4)
    leaves = [t.requires_grad_() for t in inputs.values()]
    y = fastlm.rotary(**inputs, impl=impl)
    ones = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    summed = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(ones, summed, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_rotary_twice_and_inputs_unmodified(impl, device):
    inputs = rotary_inputs(torch.float32, device, half=4)
    before = {n: t.clone() for n, t in inputs.items()}
    x = inputs["x"].requires_grad_()
    y = fastlm.rotary(**inputs, impl=impl)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(inputs[n], before[n]) for n in before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_may_be_written_to(interleaved, impl, device):
    x, cos, sin = rotary_inputs(torch.float32, device, half=6).values()
    x.requires_grad_()
    turn = partial(fastlm.rotary, interleaved=interleaved, impl=impl)
    (expected,) = torch.autograd.grad((turn(x, cos, sin) * 2).sum(), x)
    (actual,) = torch.autograd.grad(turn(x, cos, sin).mul_(2).sum(), x)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_rotary_with_frozen_tables_has_second_derivatives(impl, device):
    """Through the incoming gradient, without x."""

    def penalty(rotate):
        def run(x, cos, sin):
            y = rotate(x, cos, sin)
            grad = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)[0]
            return grad.square().sum()

        return run

    inputs = rotary_inputs(torch.float32, device, half=5)
    rotate = partial(fastlm.rotary, impl=impl)
    run_oracle(penalty(rotate), penalty(reference), inputs, frozen=("cos", "sin"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (0, 2, 8)], ids=str)
def test_rotary_empty(shape, impl, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    y = fastlm.rotary(x, *tables(4, 3, device=device), impl=impl)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize("impl", IMPLS)
def test_rotary_no_grad_saves_nothing(impl, device):
    inputs = rotary_inputs(torch.float32, device)
    inputs["x"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            y = fastlm.rotary(**inputs, impl=impl)
    assert not saved and not y.requires_grad


def test_rotary_saves_tables_alone(device):
    inputs = rotary_inputs(torch.bfloat16, device)
    inputs["x"].requires_grad_()
    saved = saved_by(lambda: fastlm.rotary(**inputs))
    assert saved and max(t.numel() for t in saved) <= inputs["cos"].numel()


@pytest.mark.parametrize("trained", [False, True])
def test_rotary_kernel_saves_its_inputs_alone(trained, device):
    inputs = rotary_inputs(torch.bfloat16, device)
    inputs["x"].requires_grad_()
    inputs["sin"].requires_grad_(trained)
    saved = saved_by(lambda: fastlm.rotary(**inputs, impl="triton"))
    names = ("x", "cos", "sin") if trained else ("cos", "sin")
    assert {t.data_ptr() for t in saved} == {inputs[n].data_ptr() for n in names}


def saved_by(call) -> list[torch.Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call()
    return saved


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_autocast_keeps_the_dtype(dtype, impl, device):
    inputs = rotary_inputs(dtype, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = fastlm.rotary(**inputs, impl=impl)
    assert y.dtype == dtype and torch.equal(y, fastlm.rotary(**inputs, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_rotary_compiles_fullgraph(dynamic, impl, device):
    x, cos, sin = rotary_inputs(torch.float32, device, half=4).values()
    x.requires_grad_()
    positions = torch.arange(SEQLEN, device=device)

    def fn(x, impl=impl):
        y = fastlm.rotary(x, cos, sin, positions=positions, impl=impl)
        return fastlm.rotary(y, cos, sin, interleaved=True, impl=impl).square().sum(0).sum()

    expected = torch.autograd.grad(fn(x), x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual = torch.autograd.grad(compiled(x), x)[0]
    if impl == "torch":  # which leaves to the compiler what it composes of few passes itself
        wide = x.detach().double().requires_grad_()
        assert_close("dx", actual, expected, torch.autograd.grad(fn(wide, None), wide)[0])
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("trained", [False, True])
def test_rotary_opcheck(trained, impl, device):
    cos, sin = tables(11, 4, torch.float16, device)
    x, positions = randn(2, 5, 3, 12, device=device), torch.arange(5, device=device)
    torch.library.opcheck(torch.ops.fastlm.rotary_fwd.default, (x, cos, sin, positions, True))
    bwd = (x, x if trained else None, cos, sin, positions, True, True)
    torch.library.opcheck(torch.ops.fastlm.rotary_bwd.default, bwd)


@pytest.mark.parametrize("impl", ["triton"])
def test_rotary_past_int32_offsets(impl, device):
    # Three sequences 2**30 elements apart: the storage is committed lazily.
    big = torch.empty(2**31 + 64, device=device, dtype=torch.float16)
    x = big.as_strided((3, 1, 2, 32), (2**30, 1, 32, 1))
    x.copy_(randn(3, 1, 2, 32))
    cos, sin = tables(1, 16, device=device)
    expected = fastlm.rotary(x.contiguous(), cos, sin, impl=impl)
    assert torch.equal(fastlm.rotary(x, cos, sin, impl=impl), expected)


@pytest.mark.interpreter
def test_rotary_explain(device):
    explanation = fastlm.explain("rotary", **rotary_inputs(torch.float32, device))
    assert explanation.chosen == "torch"
    on_cpu = "its kernels run on a GPU, the inputs are on cpu"
    absent = "fastlm has no cuda kernel for rotary"
    assert explanation.reasons == {"cuda": absent, "triton": on_cpu, "torch": None}


@pytest.mark.parametrize("name", ["x", "cos"])
def test_rotary_kernel_refuses_float64(name, device):
    inputs = rotary_inputs(torch.float32, device)
    inputs[name] = inputs[name].double()
    message = f"rotary: impl='triton' computes in fp32 and does not take a float64 {name}; use"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        fastlm.rotary(**inputs, impl="triton")


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("bad", [-1, 11, 2**40])
def test_rotary_position_outside_is_nan(bad, impl, device):
    """By the kernel: nothing outside is read, and what the others give stays as it is."""
    inputs = rotary_inputs(torch.float32, device)
    leaves = [t.requires_grad_() for t in inputs.values()]
    good = torch.arange(SEQLEN, device=device)
    wrong = good.clone()
    wrong[2] = bad
    y, z = (fastlm.rotary(**inputs, positions=p, impl=impl) for p in (good, wrong))
    others = good != 2
    assert z[:, 2].isnan().all() and torch.equal(z[:, others], y[:, others])
    dx, dcos, dsin = torch.autograd.grad(z[:, others].sum() + z[:, 2].sum(), leaves)
    assert dx[:, 2].isnan().all() and not dx[:, others].isnan().any()
    expected = torch.autograd.grad(y[:, others].sum(), leaves)
    assert torch.equal(dcos, expected[1]) and torch.equal(dsin, expected[2])


@pytest.mark.interpreter
@pytest.mark.parametrize("outside", [11, -1])
def test_rotary_position_outside_raises_on_cpu(outside):
    inputs = rotary_inputs(torch.float32, "cpu")
    last = len(inputs["cos"]) - 1
    positions = torch.tensor([0] * (SEQLEN - 1) + [outside])
    for trained in (False, True):
        inputs["cos"].requires_grad_(trained)
        message = f"^rotary: positions must be from 0 to {last}, got {outside}$"
        with pytest.raises(IndexError, match=message):
            fastlm.rotary(**inputs, positions=positions)


X, TABLE = torch.ones(2, 5, 3, 8), torch.ones(6, 4)


@pytest.mark.parametrize("change,message", [
    ({"x": TABLE}, "x must have shape (batch, seqlen, nheads, headdim) or (tokens, nheads, "
     "headdim), got (6, 4)"),
    ({"x": X.long()}, "x must have a floating-point dtype, got torch.int64"),
    ({"cos": None}, "cos must be a tensor, got NoneType"),
    ({"sin": TABLE.to("meta")}, "sin must be on the device of the first input, cpu, got meta"),
    ({"sin": TABLE[:5]}, "sin must have the shape of cos, (6, 4), got (5, 4)"),
    ({"cos": TABLE[0], "sin": TABLE[0]},
     "cos must have shape (rows, rotary_dim / 2) or, for x of 4 dimensions, (batch or 1, seqlen, "
     "rotary_dim / 2), got (4,)"),
    ({"cos": torch.ones(6, 8), "sin": torch.ones(6, 8)},
     "cos must have one column for each pair, at most headdim / 2 = 4, got 8"),
    ({"cos": TABLE[:4], "sin": TABLE[:4]}, "cos must have at least seqlen = 5 rows, got 4"),
    ({"cos": torch.ones(3, 5, 4), "sin": torch.ones(3, 5, 4)},
     "cos must have shape (batch or 1, seqlen, rotary_dim / 2) = (2, 5, 4), got (3, 5, 4)"),
    ({"positions": torch.ones(5)},
     "positions must have dtype torch.int64 or torch.int32, got torch.float32"),
    ({"positions": torch.ones(4, dtype=torch.int64)},
     "positions must have shape (5,) or (2, 5), got (4,)"),
    ({"x": X[0], "positions": torch.ones(4, dtype=torch.int64)},
     "positions must have shape (5,), got (4,)"),
    ({"cos": torch.ones(2, 5, 4), "sin": torch.ones(2, 5, 4),
      "positions": torch.ones(5, dtype=torch.int64)},
     "positions must be None for cos of 3 dimensions, got (5,)"),
    ({"impl": "cuda"}, "fastlm has no cuda kernel for rotary; use impl='torch'"),
])  # fmt: skip
def test_rotary_errors(change, message):
    with pytest.raises(
        (TypeError, ValueError, NotImplementedError), match=re.escape(f"rotary: {message}")
    ):
        fastlm.rotary(**{"x": X, "cos": TABLE, "sin": TABLE, **change})
