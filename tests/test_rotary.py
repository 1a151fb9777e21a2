"""rotary against its formula and Hugging Face's rotations."""

import re

import pytest
import torch

import fastlm
from fastlm.reference.rotary import rotary as reference
from fastlm.testing import LAYOUTS, check_against_reference, randn, with_layout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCH, SEQLEN, NHEADS, HEADDIM = 2, 7, 3, 16


def tables(rows, half, dtype=torch.float32, device="cpu"):
    angles = torch.arange(rows)[:, None] * 10000.0 ** (-torch.arange(half) / max(half, 1))
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotary_inputs(dtype, device, half=HEADDIM // 2, table_dtype=torch.float32):
    cos, sin = tables(11, half, table_dtype, device)
    return {"x": randn(BATCH, SEQLEN, NHEADS, HEADDIM, dtype=dtype, device=device),
            "cos": cos, "sin": sin}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [0, 1, 3, 8])
@pytest.mark.parametrize("positions", [None, "row", "batch"])
def test_rotary_is_a_complex_product(positions, half, interleaved, dtype, device):
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

    check_against_reference(
        lambda **kw: fastlm.rotary(**kw, interleaved=interleaved, positions=where),
        gold,
        rotary_inputs(dtype, device, half),
        frozen=("cos", "sin") if half == 0 else (),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_hugging_face(interleaved, dtype, device):
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

    check_against_reference(
        lambda **kw: fastlm.rotary(**kw, interleaved=interleaved),
        gold,
        rotary_inputs(dtype, device, table_dtype=dtype),
    )


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_rotary_mixed_dtypes(table_dtype, x_dtype, device):
    inputs = rotary_inputs(x_dtype, device, table_dtype=table_dtype)
    check_against_reference(fastlm.rotary, reference, inputs)


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


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_forms_are_bitwise_equal(interleaved, device):
    """Positions, packed tokens and tables of each sequence give what the default gives."""
    inputs = rotary_inputs(torch.float32, device)
    x, cos, sin = inputs.values()
    y = fastlm.rotary(x, cos, sin, interleaved=interleaved)
    row = torch.arange(SEQLEN, device=device)
    for positions in (row, row.int(), row.expand(BATCH, SEQLEN)):
        assert torch.equal(
            fastlm.rotary(x, cos, sin, interleaved=interleaved, positions=positions), y
        )
    for batch in (1, BATCH):
        own = (t[:SEQLEN].expand(batch, SEQLEN, -1) for t in (cos, sin))
        assert torch.equal(fastlm.rotary(x, *own, interleaved=interleaved), y)
    packed = fastlm.rotary(
        x.flatten(0, 1), cos, sin, interleaved=interleaved, positions=row.repeat(BATCH)
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_layouts_are_bitwise_equal(interleaved, layout, device):
    x, cos, sin = rotary_inputs(torch.float32, device).values()
    if layout == "expanded":
        x = x[:1].repeat(BATCH, 1, 1, 1)
    y = fastlm.rotary(x, cos, sin, interleaved=interleaved)
    assert torch.equal(fastlm.rotary(with_layout(x, layout), cos, sin, interleaved=interleaved), y)


def test_rotary_twice_and_inputs_unmodified(device):
    inputs = rotary_inputs(torch.float32, device, half=4)
    before = {n: t.clone() for n, t in inputs.items()}
    x = inputs["x"].requires_grad_()
    y = fastlm.rotary(**inputs)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(inputs[n], before[n]) for n in before)


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (0, 2, 8)], ids=str)
def test_rotary_empty(shape, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    y = fastlm.rotary(x, *tables(4, 3, device=device))
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_rotary_no_grad_saves_nothing(device):
    inputs = rotary_inputs(torch.float32, device)
    inputs["x"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            y = fastlm.rotary(**inputs)
    assert not saved and not y.requires_grad


def test_rotary_saves_tables_alone(device):
    inputs = rotary_inputs(torch.bfloat16, device)
    inputs["x"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastlm.rotary(**inputs)
    assert saved and max(t.numel() for t in saved) == SEQLEN * HEADDIM // 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_autocast_keeps_the_dtype(dtype, device):
    inputs = rotary_inputs(dtype, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = fastlm.rotary(**inputs)
    assert y.dtype == dtype and torch.equal(y, fastlm.rotary(**inputs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_rotary_compiles_fullgraph(dynamic, device):
    x, cos, sin = rotary_inputs(torch.float32, device, half=4).values()
    x.requires_grad_()
    positions = torch.arange(SEQLEN, device=device)

    def fn(x):
        y = fastlm.rotary(x, cos, sin, positions=positions)
        return fastlm.rotary(y, cos, sin, interleaved=True).square().sum(0).sum()

    expected = torch.autograd.grad(fn(x), x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], expected)


def test_rotary_explain(device):
    explanation = fastlm.explain("rotary", **rotary_inputs(torch.float32, device))
    assert explanation.chosen == "torch"
    assert explanation.reasons["triton"] == "fastlm has no triton kernel for rotary"


@pytest.mark.interpreter
def test_rotary_position_outside_raises_on_cpu():
    inputs = rotary_inputs(torch.float32, "cpu")
    with pytest.raises(IndexError, match="out of range|out of bounds"):
        fastlm.rotary(**inputs, positions=torch.full((SEQLEN,), 11))


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
    ({"impl": "triton"}, "fastlm has no triton kernel for rotary; use impl='torch'"),
])  # fmt: skip
def test_rotary_errors(change, message):
    with pytest.raises(
        (TypeError, ValueError, NotImplementedError), match=re.escape(f"rotary: {message}")
    ):
        fastlm.rotary(**{"x": X, "cos": TABLE, "sin": TABLE, **change})
