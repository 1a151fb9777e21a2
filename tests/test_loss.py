"""cross_entropy, every backend, against the fp64 reference and torch."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F

import fastlm
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

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMPLS = ["torch", "triton"]
REDUCTIONS = ["mean", "sum", "none"]
OPTIONS = {
    "class_weight": torch.float32,
    "ignore_index": 3,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "softcap": 2.0,
}
PAIRS = [(), *itertools.combinations(OPTIONS, 1), *itertools.combinations(OPTIONS, 2)]


def loss_inputs(rows, vocab, dtype, device, *, class_weight=None, ignore_index=-100):
    """Logits of a few units and targets, every third of them ignored.

    `class_weight` is the dtype of weights that are nearly 0 for some classes; None: no weights.
    """
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[1::3] = ignore_index
    inputs = {
        "logits": randn(rows, vocab, dtype=dtype, device=device, scale=3.0),
        "target": target.to(device),
    }
    if class_weight is not None:
        weights = randn(vocab, device=device, seed=2).abs()
        inputs["class_weight"] = weights.to(class_weight)
    return inputs


def run_oracle(impl, inputs, gold=reference.cross_entropy, **options):
    with nan_filled_empty():
        return check_against_reference(
            lambda **kw: fastlm.cross_entropy(**kw, impl=impl),
            gold,
            inputs,
            frozen=("class_weight",),
            **options,
        )


def split_options(names):
    """What `loss_inputs` takes, and what the functions take, of the options with these names."""
    chosen = {name: OPTIONS[name] for name in names}
    data = {n: chosen[n] for n in ("class_weight", "ignore_index") if n in chosen}
    chosen.pop("class_weight", None)
    return data, chosen


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LOSS_SMALL)
def test_cross_entropy_shapes(shape, dtype, impl, device):
    s = LOSS_SMALL[shape]
    run_oracle(impl, loss_inputs(s.tokens, s.vocab, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LOSS_LARGE)
def test_cross_entropy_shapes_large(shape, dtype, device):
    s = LOSS_LARGE[shape]
    run_oracle("triton", loss_inputs(s.tokens // 8, s.vocab, dtype, device))
    data, options = split_options(OPTIONS)
    run_oracle("triton", loss_inputs(s.tokens // 8, s.vocab, dtype, device, **data), **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", [*PAIRS, tuple(OPTIONS)], ids="-".join)
def test_cross_entropy_options(names, reduction, impl, device):
    data, options = split_options(names)
    inputs = loss_inputs(9, 37, torch.float32, device, **data)
    run_oracle(impl, inputs, reduction=reduction, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_options_in_blocks_of_columns(dtype, impl, device):
    data, options = split_options(OPTIONS)
    inputs = loss_inputs(4, 8200, dtype, device, **data)
    run_oracle(impl, inputs, reduction="none", **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("class_weight", [None, torch.float32], ids=["", "weighted"])
def test_cross_entropy_is_torch(class_weight, label_smoothing, reduction, impl, device):
    def gold(logits, target, class_weight=None, **options):
        return F.cross_entropy(logits, target, class_weight, **options)

    inputs = loss_inputs(9, 37, torch.float32, device, class_weight=class_weight, ignore_index=5)
    options = {"label_smoothing": label_smoothing, "reduction": reduction, "ignore_index": 5}
    run_oracle(impl, inputs, gold, **options)
    check_against_reference(
        reference.cross_entropy, gold, inputs, frozen=("class_weight",), **options
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_z_loss_and_softcap_are_their_formulas(dtype, impl, device):
    def gold(logits, target):
        s = 5.0 * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / 5.0)
        partition = s.exp().sum(-1)
        kept = target >= 0
        p = s.exp().gather(1, target.clamp_min(0)[:, None])[:, 0] / partition
        loss = (0.02 * partition.log() ** 2 - p.log())[kept].sum() / kept.sum()
        return loss.to(logits.dtype)

    inputs = loss_inputs(8, 19, dtype, device)
    with nan_filled_empty():
        check_against_reference(
            lambda **kw: fastlm.cross_entropy(**kw, softcap=5.0, z_loss=0.02, impl=impl),
            gold,
            inputs,
        )


@pytest.mark.parametrize("names", [*PAIRS, tuple(OPTIONS)], ids="-".join)
def test_cross_entropy_gradcheck(names):
    data, options = split_options(names)
    inputs = loss_inputs(4, 5, torch.float64, "cpu", **data)
    logits, rest = inputs.pop("logits").requires_grad_(), inputs
    for reduction in ("mean", "none"):
        fn = lambda x, reduction=reduction: reference.cross_entropy(
            x, **rest, **options, reduction=reduction
        )
        assert torch.autograd.gradcheck(fn, [logits])
    fn = lambda x: reference.cross_entropy(x, **rest, **options)
    assert torch.autograd.gradgradcheck(fn, [logits])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_cross_entropy_mixed_dtypes(weight_dtype, dtype, impl, device):
    inputs = loss_inputs(9, 37, dtype, device, class_weight=weight_dtype)
    run_oracle(impl, inputs, label_smoothing=0.1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 2, 3)], ids=str)
def test_cross_entropy_leading_dimensions(shape, impl, device):
    rows = torch.Size(shape).numel()
    inputs = loss_inputs(rows, 19, torch.float32, device)
    inputs = {"logits": inputs["logits"].view(*shape, 19), "target": inputs["target"].view(shape)}
    for reduction in REDUCTIONS:
        run_oracle(impl, inputs, reduction=reduction)
    loss = fastlm.cross_entropy(**inputs, reduction="none", impl=impl)
    assert loss.shape == shape


@pytest.mark.parametrize("impl", IMPLS)
def test_cross_entropy_target_dtypes_are_bitwise_equal(impl, device):
    inputs = loss_inputs(9, 37, torch.float32, device)
    losses = [
        fastlm.cross_entropy(inputs["logits"], inputs["target"].to(dtype), impl=impl)
        for dtype in (torch.int64, torch.int32)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale,shift", [(100.0, 0.0), (1.0, 1e4), (1.0, -1e4)])
def test_cross_entropy_large_logits(scale, shift, impl, device):
    inputs = loss_inputs(6, 50, torch.float32, device)
    inputs["logits"] = inputs["logits"] * scale + shift
    for label_smoothing in (0.0, 0.1):
        run_oracle(impl, inputs, reduction="none", label_smoothing=label_smoothing)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab", [40, 16500])
def test_cross_entropy_excluded_classes(vocab, impl, device):
    """Logits of -inf have probability 0, also where they fill the first blocks of columns."""
    inputs = loss_inputs(4, vocab, torch.float32, device)
    excluded = vocab // 2
    inputs["logits"][:, :excluded] = -float("inf")
    inputs["target"] = inputs["target"].clamp_min(excluded + 1)
    run_oracle(impl, inputs, reduction="none", z_loss=0.01)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [0.5, 30.0, 1000.0])
def test_cross_entropy_softcaps(softcap, impl, device):
    """Far below the logits and far above them."""
    run_oracle(impl, loss_inputs(9, 300, torch.float32, device), reduction="none", softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [513, 4095, 4097, 8195, 8202])
def test_cross_entropy_rows_that_begin_anywhere(vocab, dtype, device):
    """Blocks begin at multiples of 16 bytes, before the row; rows of other strides do not."""
    data, options = split_options(OPTIONS)
    inputs = loss_inputs(5, vocab, dtype, device, **data)
    run_oracle("triton", inputs, reduction="none", **options)
    run_oracle("triton", loss_inputs(5, vocab, dtype, device))
    inputs["logits"] = with_layout(inputs["logits"], "packed")
    run_oracle("triton", inputs, reduction="none", **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_cross_entropy_never_hides_nan(bad, impl, device):
    inputs = loss_inputs(4, 300, torch.float32, device)
    inputs["logits"][2, 270] = bad
    logits = inputs["logits"].requires_grad_()
    loss = fastlm.cross_entropy(logits, inputs["target"], reduction="none", impl=impl)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, False, True, False]
    assert logits.grad.isnan().all(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("class_weight", [None, torch.float32], ids=["", "weighted"])
def test_cross_entropy_of_nothing_is_zero(class_weight, reduction, impl, device):
    inputs = loss_inputs(4, 9, torch.float32, device, class_weight=class_weight)
    inputs["target"].fill_(-100)
    logits = inputs.pop("logits").requires_grad_()
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1, "softcap": 3.0}):
        loss = fastlm.cross_entropy(logits, **inputs, **options, reduction=reduction, impl=impl)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0.0 and not grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_cross_entropy_of_targets_without_weight_is_zero(impl, device):
    inputs = loss_inputs(4, 9, torch.float32, device)
    logits = inputs["logits"].requires_grad_()
    weight = torch.zeros(9, device=device)
    weight[8] = 1.0
    target = inputs["target"].clamp_max(7)
    loss = fastlm.cross_entropy(logits, target, class_weight=weight, label_smoothing=0.1, impl=impl)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0.0 and not grad.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_cross_entropy_empty_batch(shape, impl, device):
    logits = torch.zeros(shape, device=device, requires_grad=True)
    target = torch.zeros(shape[:-1], device=device, dtype=torch.int64)
    for reduction in REDUCTIONS:
        loss = fastlm.cross_entropy(logits, target, reduction=reduction, impl=impl)
        loss.sum().backward()
        assert loss.shape == (shape[:-1] if reduction == "none" else ())
        assert not loss.any() and logits.grad.shape == shape


def test_cross_entropy_ignored_rows_are_not_read(device):
    inputs = loss_inputs(6, 40, torch.float32, device)
    inputs["logits"][1::3] = float("nan")
    logits = inputs["logits"].requires_grad_()
    loss = fastlm.cross_entropy(logits, inputs["target"], impl="triton")
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and not logits.grad[1::3].any()
    gold = reference.cross_entropy(logits.detach().double(), inputs["target"])
    assert_close("loss", loss, reference.cross_entropy(logits, inputs["target"]), gold)


@pytest.mark.parametrize("outside", [-1, 40, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_cross_entropy_target_outside_is_nan_in_the_kernels(dtype, outside, device):
    inputs = loss_inputs(6, 40, torch.float32, device, class_weight=torch.float32)
    inputs["target"][3] = outside
    inputs["target"] = inputs["target"].to(dtype)
    logits = inputs.pop("logits").requires_grad_()
    loss = fastlm.cross_entropy(
        logits, **inputs, label_smoothing=0.1, reduction="none", impl="triton"
    )
    loss.sum().backward()
    assert loss.isnan().tolist() == [False] * 3 + [True] + [False] * 2
    assert logits.grad.isnan().all(1).tolist() == loss.isnan().tolist()
    assert logits.grad.isnan().any(1).tolist() == loss.isnan().tolist()


@pytest.mark.interpreter
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("outside", [-1, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cross_entropy_target_outside_raises_on_cpu(softcap, outside, reduction):
    message = f"cross_entropy: target must be ignore_index or from 0 to 3, got {outside}"
    with pytest.raises(IndexError, match=message):
        fastlm.cross_entropy(
            torch.ones(3, 4), torch.tensor([0, -100, outside]), softcap=softcap,
            reduction=reduction,
        )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy_layouts_are_bitwise_equal(layout, device):
    inputs = loss_inputs(6, 40, torch.float32, device)
    target = inputs["target"].view(2, 3)
    logits = inputs["logits"].view(2, 3, 40)
    if layout == "expanded":
        logits = logits[:1].repeat(2, 1, 1)

    def run(logits):
        logits = logits.detach().requires_grad_()
        loss = fastlm.cross_entropy(logits, target, z_loss=0.1, impl="triton")
        return loss, *torch.autograd.grad(loss, logits)

    expected, actual = run(logits), run(with_layout(logits, layout))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_cross_entropy_of_shifted_logits_copies_nothing(device):
    logits = randn(2, 5, 40, device=device)[:, :-1]
    target = torch.arange(10, device=device).view(2, 5)[:, 1:]
    logits.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = fastlm.cross_entropy(logits, target, impl="triton")
    assert any(t.data_ptr() == logits.data_ptr() for t in saved)
    gold = F.cross_entropy(logits.detach().double().flatten(0, 1), target.flatten())
    assert_close("loss", loss, reference.cross_entropy(logits, target), gold)


@pytest.mark.parametrize("layout", ["last_stride_2", "expanded"])
def test_cross_entropy_incoming_gradient_layouts(layout, device):
    inputs = loss_inputs(6, 40, torch.float32, device)
    logits = inputs["logits"].requires_grad_()
    loss = fastlm.cross_entropy(logits, inputs["target"], reduction="none", impl="triton")
    dloss = randn(6, device=device)
    if layout == "expanded":
        dloss = dloss[:1].repeat(6)
    (expected,) = torch.autograd.grad(loss, logits, dloss, retain_graph=True)
    (actual,) = torch.autograd.grad(loss, logits, with_layout(dloss, layout))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_cross_entropy_twice_and_inputs_unmodified(impl, device):
    data, options = split_options(OPTIONS)
    inputs = loss_inputs(6, 40, torch.float32, device, **data)
    before = {n: t.clone() for n, t in inputs.items()}
    logits = inputs["logits"].requires_grad_()
    loss = fastlm.cross_entropy(**inputs, **options, impl=impl)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(inputs[n], before[n]) for n in before)


def test_cross_entropy_no_grad_saves_nothing(device):
    inputs = loss_inputs(6, 40, torch.float32, device)
    inputs["logits"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            loss = fastlm.cross_entropy(**inputs, impl="triton")
    assert not saved and not loss.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_autocast(dtype, impl, device):
    inputs = loss_inputs(6, 40, dtype, device)
    assert fastlm.cross_entropy(**inputs, impl=impl).dtype == dtype
    logits = inputs["logits"].requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = fastlm.cross_entropy(**inputs, impl=impl)
        same = F.cross_entropy(logits, inputs["target"])
    assert loss.dtype == same.dtype == torch.float32
    gold = F.cross_entropy(logits.detach().double(), inputs["target"])
    assert_close("loss", loss, same, gold)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.dtype == dtype


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_cross_entropy_compiles_fullgraph(dynamic, impl, device):
    data, options = split_options(OPTIONS)
    inputs = loss_inputs(6, 40, torch.float32, device, **data)
    logits = inputs.pop("logits").requires_grad_()

    def fn(logits, target, class_weight):
        mean = fastlm.cross_entropy(logits, target, class_weight=class_weight, **options, impl=impl)
        rows = fastlm.cross_entropy(logits, target, reduction="none", impl=impl)
        return mean + rows.square().sum()

    expected = torch.autograd.grad(fn(logits, **inputs), logits)[0]
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual = torch.autograd.grad(compiled(logits, **inputs), logits)[0]
    assert torch.equal(actual, expected)


def test_cross_entropy_opcheck(device):
    inputs = loss_inputs(6, 20, torch.float32, device)
    logits, target = inputs["logits"].view(2, 3, 20), inputs["target"].view(2, 3)
    weight = randn(20, device=device).abs()
    options = (-100, 0.1, 0.01, 2.0)
    fwd = (logits, target, weight, *options)
    torch.library.opcheck(torch.ops.fastlm.cross_entropy_fwd.default, fwd)
    loss, *lse, _ = torch.ops.fastlm.cross_entropy_fwd(*fwd)
    bwd = (logits, target, weight, *lse, loss, *options)
    torch.library.opcheck(torch.ops.fastlm.cross_entropy_bwd.default, bwd)


def test_cross_entropy_rows_past_int32_offsets(device):
    # Three rows 2**30 elements apart: the storage is committed lazily, few pages are touched.
    big = torch.empty(2**31 + 64, device=device, dtype=torch.float16)
    logits = big.as_strided((3, 64), (2**30, 1))
    logits.copy_(randn(3, 64))
    target = torch.arange(3, device=device)

    def run(logits):
        logits = logits.detach().requires_grad_()
        loss = fastlm.cross_entropy(logits, target, impl="triton")
        return loss, *torch.autograd.grad(loss, logits)

    assert all(torch.equal(a, e) for a, e in zip(run(logits), run(logits.clone()), strict=True))


@pytest.mark.gpu
def test_cross_entropy_more_than_2_31_logits(device):
    logits = torch.zeros(2**31 // 65536 + 2, 65536, dtype=torch.bfloat16, device=device)
    logits.requires_grad_()
    target = torch.zeros(len(logits), dtype=torch.int64, device=device)
    loss = fastlm.cross_entropy(logits, target, reduction="none", impl="triton")
    loss.sum().backward()
    assert torch.equal(loss, loss[:1].expand_as(loss))
    assert torch.equal(logits.grad, logits.grad[:1].expand_as(logits.grad))


@pytest.mark.gpu
def test_cross_entropy_is_deterministic(device):
    s = LOSS_LARGE["mlm_bert"]
    inputs = loss_inputs(s.tokens // 8, s.vocab, torch.bfloat16, device)
    logits = inputs.pop("logits").requires_grad_()

    def run():
        loss = fastlm.cross_entropy(logits, **inputs, label_smoothing=0.1, impl="triton")
        return loss, *torch.autograd.grad(loss, logits)

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.gpu
def test_cross_entropy_in_a_cuda_graph(device):
    inputs = loss_inputs(64, 5000, torch.bfloat16, device)
    logits = inputs.pop("logits").requires_grad_()

    def run():
        loss = fastlm.cross_entropy(logits, **inputs, impl="triton")
        return loss, *torch.autograd.grad(loss, logits)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        logits.mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_cross_entropy_explain(device):
    inputs = loss_inputs(4, 9, torch.float64, device)
    explanation = fastlm.explain("cross_entropy", **inputs)
    assert explanation.chosen == "torch"
    assert explanation.reasons["cuda"] == "fastlm has no cuda kernel for cross_entropy"


LOGITS, TARGET = torch.ones(2, 8), torch.zeros(2, dtype=torch.int64)


FIRST = "triton" if torch.cuda.is_available() else "torch"  # of the backends


@pytest.mark.parametrize("change,message", [
    ({"logits": 1.0}, "cross_entropy: logits must be a tensor, got float"),
    ({"logits": TARGET}, "cross_entropy: logits must have a floating-point dtype, got torch.int64"),
    ({"logits": torch.ones(2, 0)},
     "cross_entropy: logits must have at least one class in its last dimension, got (2, 0)"),
    ({"target": [0, 1]}, "cross_entropy: target must be a tensor, got list"),
    ({"target": torch.ones(2, 8)},
     "cross_entropy: target must have dtype torch.int64 or torch.int32, got torch.float32"),
    ({"target": torch.zeros(3, dtype=torch.int64)},
     "cross_entropy: target must have shape (...) of logits (..., vocab) = (2,), got (3,)"),
    ({"target": TARGET.to("meta")},
     "cross_entropy: target must be on the device of the first input, cpu, got meta"),
    ({"class_weight": torch.ones(7)},
     "cross_entropy: class_weight must have shape (vocab,) = (8,), got (7,)"),
    ({"class_weight": torch.ones(8, requires_grad=True)},
     "cross_entropy: class_weight must have requires_grad=False, for it gets no gradient, "
     "got True"),
    ({"ignore_index": 1.0}, "cross_entropy: ignore_index must be an int, got float"),
    ({"ignore_index": 2**63},
     "cross_entropy: ignore_index must be a 64-bit integer, got 9223372036854775808"),
    ({"label_smoothing": 1.5},
     "cross_entropy: label_smoothing must be a number from 0 to 1, got 1.5"),
    ({"z_loss": -1.0}, "cross_entropy: z_loss must be a finite number of at least 0, got -1.0"),
    ({"z_loss": None}, "cross_entropy: z_loss must be a finite number of at least 0, got NoneType"),
    ({"softcap": 0.0}, "cross_entropy: softcap must be None or a finite number above 0, got 0.0"),
    ({"softcap": float("nan")},
     "cross_entropy: softcap must be None or a finite number above 0, got nan"),
    ({"reduction": "batchmean"},
     "cross_entropy: reduction must be one of 'mean', 'sum', 'none', got 'batchmean'"),
    ({"impl": "cuda"},
     f"cross_entropy: fastlm has no cuda kernel for cross_entropy; use impl='{FIRST}'"),
    ({"logits": LOGITS.double(), "impl": "triton"},
     "cross_entropy: impl='triton' computes in fp32 and does not take a float64 logits; "
     "use impl='torch'"),
])  # fmt: skip
def test_cross_entropy_errors(change, message, device):
    call = {"logits": LOGITS, "target": TARGET, **change}
    if "impl" in change:  # kernels ask for the device first
        call = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in call.items()}
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=re.escape(message)):
        fastlm.cross_entropy(**call)
