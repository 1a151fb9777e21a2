"""linear_cross_entropy, every backend, against the fp64 reference and torch; what the torch backend
does in chunks. The Triton kernels' own: test_loss_linear_kernels.py."""

import functools
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from linear_loss_cases import DTYPES, REDUCTIONS, gradients, head_inputs, run_oracle

import fastlm
from fastlm.kernels import linear_loss
from fastlm.ops import _chunked_loss
from fastlm.ops import loss as loss_ops
from fastlm.reference import loss as reference
from fastlm.shapes import LOSS_LARGE, LOSS_SMALL
from fastlm.testing import (
    LAYOUTS,
    assert_close,
    check_against_reference,
    nan_filled_empty,
    randn,
    with_layout,
)

IMPLS = ["torch", "triton"]
OPTIONS = {
    "bias": torch.float32,
    "class_weight": torch.float32,
    "ignore_index": 3,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "softcap": 2.0,
}
DATA = ("bias", "class_weight", "ignore_index")
PAIRS = [(), *itertools.combinations(OPTIONS, 1), *itertools.combinations(OPTIONS, 2)]


@pytest.fixture
def small_chunks(monkeypatch):
    """The torch backend's chunks have 4 rows, in blocks, its half-precision products 5 classes."""
    monkeypatch.setattr(loss_ops, "_SMALL_HEAD", 0)
    monkeypatch.setattr(_chunked_loss, "_BLOCK", 48)
    monkeypatch.setattr(_chunked_loss, "_CHUNK", {"cpu": 64})
    monkeypatch.setattr(_chunked_loss, "_CHUNK_ELSEWHERE", 64)
    monkeypatch.setattr(_chunked_loss, "_CHUNK_ROWS", 4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LOSS_SMALL)
def test_linear_cross_entropy_shapes(shape, dtype, impl, small_chunks, device):
    s = LOSS_SMALL[shape]
    run_oracle(impl, head_inputs(s.tokens, s.vocab, s.dim, dtype, device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LOSS_LARGE)
def test_linear_cross_entropy_shapes_large(shape, dtype, impl, device):
    s = LOSS_LARGE[shape]
    run_oracle(impl, head_inputs(s.tokens // 8, s.vocab, s.dim, dtype, device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", [*PAIRS, tuple(OPTIONS)], ids="-".join)
def test_linear_cross_entropy_options(names, reduction, impl, small_chunks, device):
    options = {name: OPTIONS[name] for name in names}
    data = {name: options[name] for name in DATA if name in options}
    inputs = head_inputs(19, 23, 6, torch.float32, device, **data)
    options = {n: v for n, v in options.items() if n not in ("bias", "class_weight")}
    run_oracle(impl, inputs, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy_options_in_half_precision(reduction, dtype, small_chunks, device):
    inputs = head_inputs(19, 23, 6, dtype, device, bias=dtype, class_weight=dtype, ignore_index=3)
    options = {n: v for n, v in OPTIONS.items() if n not in ("bias", "class_weight")}
    run_oracle("torch", inputs, reduction=reduction, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy_is_torch(dtype, reduction, impl, small_chunks, device):
    def gold(x, weight, target, bias, **options):
        return F.cross_entropy(F.linear(x, weight, bias), target, **options)

    inputs = head_inputs(19, 23, 6, dtype, device, bias=dtype)
    run_oracle(impl, inputs, gold, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES, DTYPES)), ids=str)
def test_linear_cross_entropy_mixed_dtypes(dtypes, impl, small_chunks, device):
    x, weight, bias = dtypes
    inputs = head_inputs(9, 23, 6, x, device, bias=bias)
    inputs["weight"] = inputs["weight"].to(weight)
    run_oracle(impl, inputs)


def test_linear_cross_entropy_gradcheck(small_chunks):
    inputs = head_inputs(
        7, 6, 3, torch.float64, "cpu", bias=torch.float64, class_weight=torch.float64
    )
    target, class_weight = inputs.pop("target"), inputs.pop("class_weight")
    leaves = [t.requires_grad_() for t in inputs.values()]
    chunked = functools.partial(fastlm.linear_cross_entropy, impl="torch")
    for fn, reduction in itertools.product((chunked, reference.linear_cross_entropy), REDUCTIONS):
        check = lambda x, weight, bias, fn=fn, reduction=reduction: fn(
            x, weight, target, bias=bias, class_weight=class_weight, label_smoothing=0.1,
            z_loss=0.1, softcap=2.0, reduction=reduction,
        )  # fmt: skip
        assert torch.autograd.gradcheck(check, leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy_chunks_agree(reduction, monkeypatch, device):
    inputs = head_inputs(50, 23, 6, torch.float64, device, bias=torch.float64)
    whole = gradients("torch", inputs, reduction=reduction)
    monkeypatch.setattr(_chunked_loss, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(_chunked_loss, "_CHUNK", {"cpu": 1})
    monkeypatch.setattr(_chunked_loss, "_CHUNK_ELSEWHERE", 1)
    for a, b in zip(gradients("torch", inputs, reduction=reduction), whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 2, 3)], ids=str)
def test_linear_cross_entropy_leading_dimensions(shape, dtype, impl, device):
    inputs = head_inputs(torch.Size(shape).numel(), 19, 5, torch.float32, device)
    inputs["x"] = inputs["x"].view(*shape, 5)
    inputs["target"] = inputs["target"].view(shape).to(dtype)
    for reduction in REDUCTIONS:
        run_oracle(impl, inputs, reduction=reduction)
    assert gradients(impl, inputs, reduction="none")[0].shape == shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy_makes_no_logits(reduction):
    """No allocation is as large as (tokens, vocab) floats, forward or backward."""
    inputs = head_inputs(1100, 16384, 4, torch.float32, "cpu")
    inputs["target"].clamp_(min=0)
    with torch.profiler.profile(profile_memory=True) as profile:
        gradients("torch", inputs, reduction=reduction)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 512 * 16384 * 4 <= largest < 600 * 16384 * 4


def test_linear_cross_entropy_ignored_rows_are_not_computed(small_chunks, device):
    inputs = head_inputs(19, 23, 6, torch.float32, device)
    ignored = (inputs["target"] == -100)[:, None]
    filled = lambda value: {**inputs, "x": inputs["x"].masked_fill(ignored, value)}
    clean, dirty = (gradients("torch", filled(value)) for value in (0.0, torch.nan))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not dirty[1][1::3].any()


@pytest.mark.interpreter
@pytest.mark.parametrize("reduction,passes", [("mean", 1), ("none", 2)])
def test_linear_cross_entropy_multiplies_kept_rows_alone(reduction, passes, monkeypatch):
    rows, chunk = [], _chunked_loss._chunk
    monkeypatch.setattr(
        _chunked_loss, "_chunk", lambda x, *rest: rows.append(len(x)) or chunk(x, *rest)
    )
    inputs = head_inputs(90, 23, 6, torch.float32, "cpu")
    gradients("torch", inputs, reduction=reduction)
    assert sum(rows) == 60 * passes


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_of_nothing_is_zero(reduction, impl, device):
    inputs = head_inputs(6, 9, 4, torch.float32, device, bias=torch.float32)
    inputs["target"].fill_(-100)
    with nan_filled_empty():
        results = gradients(impl, inputs, reduction=reduction, label_smoothing=0.1)
    assert not any(t.any() for t in results)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_linear_cross_entropy_empty_batch(shape, impl, device):
    weight = randn(5, 8, device=device)
    target = torch.zeros(shape[:-1], device=device, dtype=torch.int64)
    inputs = {"x": torch.zeros(shape, device=device), "weight": weight, "target": target}
    for reduction in REDUCTIONS:
        with nan_filled_empty():
            loss, dx, dweight = gradients(impl, inputs, reduction=reduction)
        assert loss.shape == (shape[:-1] if reduction == "none" else ())
        assert dx.shape == shape and not loss.any() and not dweight.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_autocast_in_transforms(reduction, device):
    """The products in autocast's dtype and the loss in fp32, there as well."""
    inputs = head_inputs(6, 9, 4, torch.float32, device)
    x = inputs.pop("x")
    with torch.autocast(device, dtype=torch.bfloat16):
        run = lambda x: fastlm.linear_cross_entropy(x, **inputs, reduction=reduction, impl="torch")
        batched = torch.func.vmap(run)(torch.stack([x, -x]))
        value, tangent = torch.func.jvp(run, (x,), (x,))
        expected = torch.stack([run(x), run(-x)])
    assert {t.dtype for t in (batched, value, tangent, expected)} == {torch.float32}
    assert_close("vmap", batched, expected, expected.double())
    assert_close("jvp", value, expected[0], expected[0].double())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_without_features(reduction, impl, device):
    """Logits are the bias alone."""
    x, weight = torch.ones(2, 3, 0, device=device), torch.ones(5, 0, device=device)
    bias, target = randn(5, device=device), torch.tensor([[0, -100, 2], [1, 3, 4]], device=device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    loss = fastlm.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction, impl=impl)
    logits = bias.expand(2, 3, 5)
    same = reference.cross_entropy(logits, target, reduction=reduction)
    gold = reference.cross_entropy(logits.double(), target, reduction=reduction)
    assert_close("loss", loss, same, gold)
    *empty, dbias = torch.autograd.grad(loss.sum(), leaves)
    assert [g.shape for g in empty] == [x.shape, weight.shape]
    assert_close("dbias", dbias, *(torch.autograd.grad(y.sum(), bias)[0] for y in (same, gold)))


@pytest.mark.interpreter
@pytest.mark.parametrize("outside", [-1, 9])
def test_linear_cross_entropy_target_outside_raises_on_cpu(outside):
    inputs = head_inputs(6, 9, 4, torch.float32, "cpu")
    inputs["target"][3] = outside
    message = f"linear_cross_entropy: target must be ignore_index or from 0 to 8, got {outside}"
    with pytest.raises(IndexError, match=re.escape(message)):
        fastlm.linear_cross_entropy(**inputs, impl="torch")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["x", "weight", "target"])
def test_linear_cross_entropy_layouts(what, layout, reduction, impl, small_chunks, device):
    # Kernels give the same bits; what a BLAS rounds depends on the layout, so torch's is in fp64.
    bitwise = impl == "triton"
    inputs = head_inputs(8, 12, 6, torch.float32 if bitwise else torch.float64, device)
    if layout == "expanded":
        inputs[what] = inputs[what][:1].repeat_interleave(len(inputs[what]), 0)
    expected = gradients(impl, inputs, reduction=reduction)
    laid_out = {**inputs, what: with_layout(inputs[what], layout)}
    for a, e in zip(gradients(impl, laid_out, reduction=reduction), expected, strict=True):
        torch.testing.assert_close(a, e, **({"rtol": 0, "atol": 0} if bitwise else {}))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["last_stride_2", "expanded"])
def test_linear_cross_entropy_incoming_gradient_layouts(layout, impl, small_chunks, device):
    inputs = head_inputs(9, 12, 6, torch.float32, device)
    x = inputs["x"].requires_grad_()
    loss = fastlm.linear_cross_entropy(**inputs, reduction="none", impl=impl)
    dloss = randn(9, device=device)
    if layout == "expanded":
        dloss = dloss[:1].repeat(9)
    (expected,) = torch.autograd.grad(loss, x, dloss, retain_graph=True)
    (actual,) = torch.autograd.grad(loss, x, with_layout(dloss, layout))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_twice_and_inputs_unmodified(
    reduction, dtype, impl, small_chunks, device
):
    """The first backward gives its gradients away; what the caller does to them is his."""
    inputs = head_inputs(9, 12, 6, dtype, device, bias=dtype, class_weight=torch.float32)
    before = {n: t.clone() for n, t in inputs.items()}
    leaves = [inputs[n].requires_grad_() for n in ("x", "weight", "bias")]
    loss = fastlm.linear_cross_entropy(
        **inputs, label_smoothing=0.1, z_loss=0.01, softcap=2.0, reduction=reduction, impl=impl
    ).sum()
    run = lambda *dloss: torch.autograd.grad(loss, leaves, *dloss, retain_graph=True)
    first = run()
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, run(), strict=True))
    doubled = run(torch.full_like(loss, 2.0))
    assert all(torch.equal(2 * a, b) for a, b in zip(kept, doubled, strict=True))
    assert all(torch.equal(inputs[n], before[n]) for n in before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "frozen", [("x", "weight"), ("x", "bias"), ("weight", "bias")], ids="-".join
)
def test_linear_cross_entropy_frozen_inputs(frozen, reduction, impl, small_chunks, device):
    inputs = head_inputs(9, 12, 6, torch.float32, device, bias=torch.float32)
    run_oracle(impl, inputs, frozen=frozen, reduction=reduction)
    run_oracle(impl, inputs, frozen=frozen[:1], reduction=reduction)


def test_linear_cross_entropy_frozen_weight_costs_nothing(small_chunks, device):
    inputs = head_inputs(9, 12, 6, torch.float32, device)
    inputs["x"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastlm.linear_cross_entropy(**inputs, impl="torch")
    # Itself, which the caller keeps alive anyway, but nothing of its size.
    weight = inputs["weight"]
    assert not any(t.numel() == weight.numel() for t in saved if t.data_ptr() != weight.data_ptr())


@pytest.mark.parametrize("impl", IMPLS)
def test_linear_cross_entropy_no_grad_saves_and_differentiates_nothing(impl, monkeypatch, device):
    inputs = head_inputs(9, 12, 6, torch.float32, device)
    expected = gradients(impl, inputs)[0]
    inputs["weight"].requires_grad_()
    monkeypatch.setattr(_chunked_loss, "_add_product", None)  # a gradient would call it, and these
    for product in ("rows_outer", "rows_times_matrix", "column_sum", "scatter"):
        monkeypatch.setattr(linear_loss, product, None)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            loss = fastlm.linear_cross_entropy(**inputs, impl=impl)
    assert not saved and not loss.requires_grad and torch.equal(loss, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy_autocast(dtype, reduction, impl, small_chunks, device):
    inputs = head_inputs(9, 12, 6, dtype, device)

    def under_autocast(fn):
        def wrapped(**kw):
            lower = kw["x"].dtype != torch.float64
            with torch.autocast(device, dtype=torch.bfloat16, enabled=lower):
                loss = fn(**kw, reduction=reduction)
            assert loss.dtype == (torch.float32 if lower else torch.float64)
            return loss

        return wrapped

    def eager(x, weight, target, reduction):
        return F.cross_entropy(F.linear(x, weight), target, reduction=reduction)

    fused = functools.partial(fastlm.linear_cross_entropy, impl=impl)
    check_against_reference(under_autocast(fused), under_autocast(eager), inputs)


@pytest.mark.parametrize(("impl", "tokens"), [("torch", 4096), ("triton", 512)])
def test_linear_cross_entropy_fp16_gradients_do_not_underflow(impl, tokens, device):
    """The mean's 1 / tokens meets the loss scale before anything is rounded to fp16."""
    inputs = head_inputs(tokens, 64, 4, torch.float16, device)

    def grads(fn, dtype):
        leaves = {n: inputs[n].to(dtype).requires_grad_() for n in ("x", "weight")}
        with torch.autocast(device, dtype=torch.float16, enabled=dtype == torch.float16):
            loss = fn(**{**inputs, **leaves}) * float(tokens)
        return torch.autograd.grad(loss, list(leaves.values()))

    def eager(x, weight, target):
        return F.cross_entropy(F.linear(x, weight), target)

    fused = functools.partial(fastlm.linear_cross_entropy, impl=impl)
    actual = grads(fused, torch.float16)
    same, gold = grads(eager, torch.float16), grads(eager, torch.float64)
    for name, *tensors in zip(("dx", "dweight"), actual, same, gold, strict=True):
        assert_close(name, *tensors)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_linear_cross_entropy_compiles_fullgraph(dynamic, impl, small_chunks, device):
    inputs = head_inputs(9, 12, 6, torch.float32, device, bias=torch.float32)
    target = inputs.pop("target")
    leaves = [t.requires_grad_() for t in inputs.values()]
    fused = functools.partial(fastlm.linear_cross_entropy, impl=impl)

    def fn(x, weight, bias):
        mean = fused(x, weight, target, bias=bias, z_loss=0.1)
        rows = fused(x, weight, target, softcap=3.0, reduction="none")
        return mean + rows.square().sum()

    expected = torch.autograd.grad(fn(*leaves), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_linear_cross_entropy_opcheck(device):
    inputs = head_inputs(9, 12, 6, torch.float32, device, class_weight=torch.float32)
    x, weight, target, class_weight = inputs.values()
    for dloss, need in ((None, True), (randn(9, device=device), True), (None, False)):
        args = (x, weight, weight[:, 0], target, class_weight, dloss, torch.float32)
        options = (-100, 0.1, 0.01, 2.0, True, need, need, need)
        op = torch.ops.fastlm.chunked_linear_cross_entropy.default
        torch.library.opcheck(op, (*args, *options))


X, WEIGHT, TARGET = torch.ones(2, 4), torch.ones(8, 4), torch.zeros(2, dtype=torch.int64)


FIRST = "triton" if torch.cuda.is_available() else "torch"  # of the backends


@pytest.mark.parametrize("change,message", [
    ({"x": TARGET}, "x must have a floating-point dtype, got torch.int64"),
    ({"x": torch.ones(())}, "x must have shape (..., dim), got ()"),
    ({"weight": torch.ones(8, 5)},
     "weight must have shape (vocab, dim) = (at least 1, 4), got (8, 5)"),
    ({"weight": torch.ones(0, 4)},
     "weight must have shape (vocab, dim) = (at least 1, 4), got (0, 4)"),
    ({"weight": WEIGHT.to("meta")},
     "weight must be on the device of the first input, cpu, got meta"),
    ({"bias": torch.ones(4)}, "bias must have shape (vocab,) = (8,), got (4,)"),
    ({"target": torch.zeros(3, dtype=torch.int64)},
     "target must have shape (...) of x (..., dim) = (2,), got (3,)"),
    ({"class_weight": torch.ones(4)}, "class_weight must have shape (vocab,) = (8,), got (4,)"),
    ({"softcap": -1}, "softcap must be None or a finite number above 0, got -1"),
    ({"impl": "cuda"}, f"fastlm has no cuda kernel for linear_cross_entropy; use impl='{FIRST}'"),
    ({"x": X.double(), "impl": "triton"},
     "impl='triton' computes in fp32 and does not take a float64 x; use impl='torch'"),
])  # fmt: skip
def test_linear_cross_entropy_errors(change, message, device):
    call = {"x": X, "weight": WEIGHT, "target": TARGET, **change}
    if "impl" in change:  # kernels ask for the device first
        call = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in call.items()}
    with pytest.raises(
        (TypeError, ValueError, NotImplementedError),
        match=re.escape(f"linear_cross_entropy: {message}"),
    ):
        fastlm.linear_cross_entropy(**{"impl": "torch", **call})
