"""Norms of CPU tensors by chunks of rows, which the torch backend takes where torch falls short."""

import itertools

import pytest
import torch

import fastlm
from fastlm.ops import _norm_cpu
from fastlm.ops import norm as norm_ops
from fastlm.reference import norm as reference
from fastlm.testing import LAYOUTS, check_against_reference, nan_filled_empty, randn, with_layout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = {"layer_norm": [{}], "rms_norm": [{"casting": c} for c in ("torch", "llama", "gemma")]}
CALLS = [(op, options) for op, kinds in OPS.items() for options in kinds]


def is_own(op, z_dtype) -> bool:
    """LayerNorm of few rows in fp32 is torch's."""
    return op == "rms_norm" or z_dtype != torch.float32


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of 64 elements for tensors of any size; gives the list of calls that were made."""
    monkeypatch.setattr(norm_ops, "_RMS_FROM", 0)
    monkeypatch.setattr(_norm_cpu, "_CHUNK", 64)
    monkeypatch.setattr(_norm_cpu, "_CHUNK_BACKWARD", 64)
    return count_calls(monkeypatch)


def count_calls(monkeypatch) -> list:
    calls, forward = [], _norm_cpu.CpuNorm.forward
    monkeypatch.setattr(
        _norm_cpu.CpuNorm, "forward",
        staticmethod(lambda *args: calls.append(args) or forward(*args)),
    )  # fmt: skip
    return calls


def norm_inputs(op, rows, cols, dtypes, residual=True) -> dict:
    x, param, sums = dtypes
    inputs = {"x": randn(rows, cols, dtype=x), "weight": randn(cols, dtype=param, seed=1)}
    if op == "layer_norm":
        inputs["bias"] = randn(cols, dtype=param, seed=2)
    if residual:
        inputs["residual"] = randn(rows, cols, dtype=sums, seed=3)
    return inputs


def run_oracle(op, inputs, **options):
    with nan_filled_empty():
        check_against_reference(
            getattr(fastlm, op), getattr(reference, op), inputs,
            seed=torch.tensor(5) if options.get("dropout_p") else None, **options,
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 2), (7, 24), (5, 40), (33, 17), (2, 200)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op,options", CALLS)
def test_cpu_norm_shapes(op, options, dtype, shape, chunks):
    run_oracle(op, norm_inputs(op, *shape, [dtype] * 3, residual=False), **options)
    assert bool(chunks) == is_own(op, dtype)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("op,options", CALLS)
def test_cpu_norm_mixed_dtypes(op, options, dtypes, chunks):
    run_oracle(op, norm_inputs(op, 9, 24, dtypes), prenorm=True, dropout_p=0.3, **options)
    assert bool(chunks) == is_own(op, torch.promote_types(dtypes[0], dtypes[2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op,options", CALLS)
def test_cpu_norm_without_weight_and_bias(op, options, dtype, chunks):
    inputs = norm_inputs(op, 9, 24, [dtype] * 3)
    run_oracle(op, {**inputs, **({"bias": None} if op == "layer_norm" else {})}, **options)
    run_oracle(op, {n: t for n, t in inputs.items() if n in ("x", "residual")}, **options)
    assert bool(chunks) == is_own(op, dtype)


@pytest.mark.parametrize("frozen", [("x",), ("weight",), ("bias",), ("x", "bias")])
@pytest.mark.parametrize("op", OPS)
def test_cpu_norm_frozen_inputs(op, frozen, chunks):
    inputs = norm_inputs(op, 9, 24, [torch.bfloat16] * 3, residual=False)
    with nan_filled_empty():
        check_against_reference(
            getattr(fastlm, op), getattr(reference, op), inputs,
            frozen=tuple(name for name in frozen if name in inputs),
        )  # fmt: skip
    assert chunks


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_cpu_norm_layouts(op, layout, chunks):
    inputs = norm_inputs(op, 8, 24, [torch.bfloat16] * 3, residual=False)
    inputs["x"] = with_layout(inputs["x"], layout)
    run_oracle(op, inputs)
    assert chunks


@pytest.mark.parametrize("op,dtype", [
    ("layer_norm", torch.bfloat16), ("rms_norm", torch.bfloat16), ("rms_norm", torch.float32)
], ids=str)  # fmt: skip
def test_cpu_norm_has_second_derivatives(op, dtype, chunks):
    def penalty(norm, **inputs):
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
        y = norm(**inputs).float().square().sum()
        grads = torch.autograd.grad(y, list(inputs.values()), create_graph=True)
        total = sum(g.float().square().sum() for g in grads)
        return torch.autograd.grad(total, list(inputs.values()))

    inputs = norm_inputs(op, 6, 24, [dtype] * 3, residual=False)
    actual = penalty(getattr(fastlm, op), **inputs)
    assert chunks
    expected = penalty(getattr(reference, op), **inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0.05 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)


@pytest.mark.parametrize("op,rows,dtype", [
    ("layer_norm", 2048, torch.bfloat16), ("layer_norm", 2048, torch.float16),
    ("rms_norm", 2048, torch.bfloat16),
    ("rms_norm", 2**15, torch.float32),
])  # fmt: skip
def test_cpu_norm_sums_of_many_rows(op, rows, dtype, monkeypatch):
    """Of which torch's own sums are out of bounds."""
    calls = count_calls(monkeypatch)
    run_oracle(op, norm_inputs(op, rows, 128, [dtype] * 3, residual=False))
    assert calls


@pytest.mark.parametrize("cols,dtype,own", [
    (24, torch.float32, 0), (24, torch.bfloat16, 1), (1, torch.bfloat16, 0), (24, torch.float64, 0),
])  # fmt: skip
def test_cpu_norm_is_for_what_torch_does_not_do_well(cols, dtype, own, monkeypatch):
    calls = count_calls(monkeypatch)
    inputs = norm_inputs("layer_norm", 4, cols, [dtype] * 3)
    fastlm.layer_norm(**inputs)
    fastlm.rms_norm(inputs["x"])  # too small
    assert len(calls) == own


def test_cpu_norm_is_not_for_transforms(chunks):
    x, weight = randn(6, 24), randn(24, seed=1)
    torch.func.grad(lambda x: fastlm.rms_norm(x, weight).sum())(x)
    torch.func.vmap(lambda x: fastlm.rms_norm(x, weight))(x)
    torch.compile(lambda x: fastlm.rms_norm(x, weight), backend="eager", fullgraph=True)(x)
    assert not chunks


@pytest.mark.parametrize("op,dtype", [("layer_norm", torch.bfloat16), ("rms_norm", torch.float32)])
def test_cpu_norm_of_no_rows(op, dtype, chunks):
    inputs = norm_inputs(op, 0, 24, [dtype] * 3, residual=False)
    leaves = [t.requires_grad_() for t in inputs.values()]
    y = getattr(fastlm, op)(**inputs)
    dx, *vectors = torch.autograd.grad(y.sum(), leaves)
    assert chunks and dx.shape == (0, 24) and not any(v.any() for v in vectors)


@pytest.mark.parametrize("op", OPS)
def test_cpu_norm_may_be_written_to(op, chunks):
    inputs = norm_inputs(op, 6, 24, [torch.bfloat16] * 3, residual=False)
    x = inputs.pop("x").view(2, 3, 24).requires_grad_()
    fn = getattr(fastlm, op)
    (expected,) = torch.autograd.grad((fn(x, **inputs) * 2).sum(), x)
    (actual,) = torch.autograd.grad(fn(x, **inputs).mul_(2).sum(), x)
    assert chunks and torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [128, 129, 2048])
@pytest.mark.parametrize("op", OPS)
def test_cpu_norm_takes_many_rows(op, rows, dtype, monkeypatch):
    """Which torch's own LayerNorm adds up one after the other: too inexactly from 1,000 on."""
    calls = count_calls(monkeypatch)
    run_oracle(op, norm_inputs(op, rows, 96, [dtype] * 3))
    many = rows > 128 if op == "layer_norm" else rows * 96 >= norm_ops._RMS_FROM
    assert bool(calls) == (many or (op == "layer_norm" and dtype != torch.float32))


@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "bias"), ("x", "residual")])
def test_cpu_norm_of_many_rows_computes_what_is_wanted(frozen, monkeypatch):
    calls = count_calls(monkeypatch)
    inputs = norm_inputs("layer_norm", 300, 24, [torch.float32] * 3)
    with nan_filled_empty():
        check_against_reference(fastlm.layer_norm, reference.layer_norm, inputs, frozen=frozen)
    assert bool(calls) == (frozen != ("weight", "bias"))
    calls.clear()
    with torch.no_grad():
        fastlm.layer_norm(**{n: t.requires_grad_() for n, t in inputs.items()})
    assert not calls
