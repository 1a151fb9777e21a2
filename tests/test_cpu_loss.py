"""What the torch backend does on a CPU with large logits, whose loss and gradient it makes at once,
and with small heads, whose logits it makes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from linear_loss_cases import head_inputs
from linear_loss_cases import run_oracle as run_head_oracle

import fastlm
from fastlm.bench.timing import peak_memory
from fastlm.ops import _chunked_loss, _linear_loss
from fastlm.ops import loss as loss_ops
from fastlm.reference import loss as reference
from fastlm.testing import (
    LAYOUTS,
    assert_close,
    check_against_reference,
    nan_filled_empty,
    randn,
    with_layout,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
OPTIONS = {
    "class_weight": torch.float32, "ignore_index": 3, "label_smoothing": 0.1, "z_loss": 0.01,
    "softcap": 2.0,
}  # fmt: skip
PAIRS = [(), *itertools.combinations(OPTIONS, 1), *itertools.combinations(OPTIONS, 2)]


@pytest.fixture
def chunks(monkeypatch):
    """Blocks of 2 rows, for logits of any number; gives the shapes of the blocks that were made."""
    monkeypatch.setattr(loss_ops, "_BLOCKS_FROM", 0)
    monkeypatch.setattr(_chunked_loss, "_BLOCK", 48)
    return count_blocks(monkeypatch)


def count_blocks(monkeypatch) -> list:
    shapes, block = [], _chunked_loss._block
    monkeypatch.setattr(
        _chunked_loss, "_block", lambda s, *rest: shapes.append(s.shape) or block(s, *rest)
    )
    return shapes


def loss_inputs(rows, vocab, dtype, class_weight=None, ignore_index=-100) -> dict:
    """Logits and targets, every third ignored."""
    target = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1))
    target[1::3] = ignore_index
    inputs = {"logits": randn(rows, vocab, dtype=dtype, scale=3.0), "target": target}
    if class_weight is not None:
        inputs["class_weight"] = randn(vocab, seed=4).abs().to(class_weight)
    return inputs


def case_of(names, dtype) -> tuple[dict, dict]:
    """Inputs and options with those of OPTIONS that are named."""
    data = {n: OPTIONS[n] for n in names if n in ("class_weight", "ignore_index")}
    options = {n: OPTIONS[n] for n in names if n != "class_weight"}
    return loss_inputs(13, 19, dtype, **data), options


def run_oracle(inputs, **options):
    with nan_filled_empty():
        check_against_reference(
            fastlm.cross_entropy, reference.cross_entropy, inputs, frozen=("class_weight",),
            **options,
        )  # fmt: skip


def gradients(inputs, **options):
    logits = inputs["logits"].detach().requires_grad_()
    loss = fastlm.cross_entropy(**{**inputs, "logits": logits}, **options)
    return loss, *torch.autograd.grad(loss.sum(), logits)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_cross_entropy_options(dtype, names, reduction, chunks):
    inputs, options = case_of(names, dtype)
    run_oracle(inputs, reduction=reduction, **options)
    assert len(chunks) > 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (7, 200), (30, 3)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_cpu_cross_entropy_shapes(dtype, shape, chunks):
    inputs = loss_inputs(*shape, dtype)
    for reduction in REDUCTIONS:
        run_oracle(inputs, reduction=reduction)
    leading = {"logits": inputs["logits"][None], "target": inputs["target"][None].int()}
    for a, e in zip(gradients(leading), gradients(inputs), strict=True):
        assert torch.equal(a.flatten(), e.flatten())
    assert chunks


def test_cpu_cross_entropy_of_large_logits_alone(monkeypatch):
    blocks = count_blocks(monkeypatch)
    inputs = loss_inputs(40, 2**17, torch.float32)
    run_oracle(inputs)
    assert blocks and sum(rows for rows, _ in blocks) == 27
    del blocks[:]
    with torch.no_grad():
        fastlm.cross_entropy(**inputs)
    gradients(loss_inputs(40, 2**12, torch.float32))
    assert not blocks


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_cross_entropy_without_gradients(dtype, names, reduction, chunks):
    inputs, options = case_of(names, dtype)
    gold, same = (
        reference.cross_entropy(
            **{n: t.to(d) if t.is_floating_point() else t for n, t in inputs.items()},
            reduction=reduction, **options,
        )
        for d in (torch.float64, dtype)
    )  # fmt: skip
    actual = fastlm.cross_entropy(**inputs, reduction=reduction, **options)
    assert_close("loss", actual, same, gold)


def test_cpu_cross_entropy_without_gradients_holds_no_copy_of_the_logits(chunks):
    inputs = loss_inputs(64, 1000, torch.bfloat16)
    with torch.profiler.profile(profile_memory=True) as profile:
        fastlm.cross_entropy(**inputs)
    assert max(e.self_cpu_memory_usage for e in profile.events()) < inputs["logits"].numel() * 2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cpu_cross_entropy_of_nothing_is_zero(reduction, chunks):
    inputs = loss_inputs(6, 9, torch.float32)
    inputs["target"].fill_(-100)
    assert not any(t.any() for t in gradients(inputs, reduction=reduction))


def test_cpu_cross_entropy_reads_no_ignored_row_and_writes_to_no_logits(chunks):
    inputs = loss_inputs(13, 19, torch.float32)
    expected = gradients(inputs)
    inputs["logits"][1::3] = torch.nan
    before = inputs["logits"].clone()
    for a, e in zip(gradients(inputs, softcap=None), expected, strict=True):
        assert torch.equal(a, e)
    torch.testing.assert_close(inputs["logits"], before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("outside", [-1, 19])
def test_cpu_cross_entropy_target_outside_raises(outside, chunks):
    inputs = loss_inputs(6, 19, torch.float32)
    inputs["target"][3] = outside
    message = f"cross_entropy: target must be ignore_index or from 0 to 18, got {outside}"
    with pytest.raises(IndexError, match=message):
        gradients(inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu_cross_entropy_layouts(layout, chunks):
    inputs = loss_inputs(8, 12, torch.float32)
    if layout == "expanded":
        inputs["logits"] = inputs["logits"][:1].repeat(8, 1)
    expected = gradients(inputs)
    inputs["logits"] = with_layout(inputs["logits"], layout)
    for a, e in zip(gradients(inputs), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cpu_cross_entropy_twice_and_derivatives_of_derivatives(reduction, chunks):
    inputs = loss_inputs(8, 12, torch.float64)
    logits = inputs["logits"].requires_grad_()
    run = lambda x: fastlm.cross_entropy(x, inputs["target"], reduction=reduction)
    loss = run(logits).sum()
    (once,) = torch.autograd.grad(3.0 * loss, logits, retain_graph=True)
    (again,) = torch.autograd.grad(3.0 * loss, logits)
    torch.testing.assert_close(once, again)
    assert torch.autograd.gradcheck(run, logits) and torch.autograd.gradgradcheck(run, logits)
    assert chunks


def test_cpu_cross_entropy_holds_one_tensor_of_the_logits_size(chunks):
    """The gradient, which the forward makes; torch holds the log-softmax, and then it."""
    inputs = loss_inputs(64, 1000, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        gradients(inputs)
    size = inputs["logits"].numel() * 4
    assert sum(e.self_cpu_memory_usage >= size for e in profile.events()) == 1


def test_cpu_cross_entropy_by_chunks_is_not_for_transforms(chunks, monkeypatch):
    inputs = loss_inputs(6, 24, torch.float32)
    monkeypatch.setattr(_linear_loss, "_CALLS", None)
    run = lambda x: fastlm.cross_entropy(x, inputs["target"])
    torch.func.grad(run)(inputs["logits"])
    torch.compile(run, backend="eager", fullgraph=True)(inputs["logits"].requires_grad_())


SMALL = {"bias": torch.float32, "class_weight": torch.float32, "label_smoothing": 0.1}
SMALL_SETS = [names for n in range(4) for names in itertools.combinations(SMALL, n)]


@pytest.fixture
def no_chunks(monkeypatch):
    monkeypatch.setattr(_linear_loss, "_CALLS", None)


def head_of(dtype, ignored=False, **inputs) -> dict:
    head = head_inputs(13, 19, 6, dtype, "cpu", **inputs)
    if not ignored:
        head["target"].clamp_(min=0)
    return head


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", SMALL_SETS, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_small_head_options(dtype, names, reduction, no_chunks):
    inputs = {n: SMALL[n] for n in names if n != "label_smoothing"}
    options = {n: SMALL[n] for n in names if n not in inputs}
    run_head_oracle("torch", head_of(dtype, **inputs), reduction=reduction, **options)


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        (head_of(torch.float32, ignored=True), {}),
        (head_of(torch.float16), {}),
        (head_of(torch.float32), {"z_loss": 0.1}),
        (head_of(torch.float32), {"softcap": 2.0}),
    ],
    ids=["ignored", "fp16", "z_loss", "softcap"],
)
def test_cpu_small_head_goes_by_chunks_where_logits_would_not_do(inputs, options, monkeypatch):
    monkeypatch.setattr(_linear_loss, "_CALLS", None)
    with pytest.raises(TypeError, match="NoneType"):
        fastlm.linear_cross_entropy(**inputs, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cpu_small_head_derivatives_of_derivatives(reduction, no_chunks):
    inputs = head_of(torch.float64, bias=torch.float64)
    target = inputs.pop("target")
    leaves = [t.requires_grad_() for t in inputs.values()]
    run = lambda x, weight, bias: fastlm.linear_cross_entropy(
        x, weight, target, bias=bias, reduction=reduction
    )
    assert torch.autograd.gradcheck(run, leaves) and torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("outside", [-1, 19])
def test_cpu_small_head_target_outside_raises(outside, no_chunks):
    inputs = head_of(torch.float32)
    inputs["target"][3] = outside
    message = f"linear_cross_entropy: target must be ignore_index or from 0 to 18, got {outside}"
    with pytest.raises(IndexError, match=message):
        fastlm.linear_cross_entropy(**inputs)


def test_cpu_small_head_under_autocast(no_chunks):
    inputs = head_of(torch.float32)
    lowered = {n: t.bfloat16() if t.is_floating_point() else t for n, t in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastlm.linear_cross_entropy(**inputs)
    assert loss.dtype == torch.float32
    expected = fastlm.linear_cross_entropy(**lowered)
    assert torch.equal(loss.bfloat16(), expected)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy_takes_a_quarter_of_eagers_memory(dtype):
    """Gradients included, at 2,048 tokens x 512 x 32k."""
    x, weight = randn(2048, 512, dtype=dtype), randn(32_000, 512, dtype=dtype, scale=0.04, seed=1)
    target = torch.randint(32_000, (2048,), generator=torch.Generator().manual_seed(2))
    leaves = x.requires_grad_(), weight.requires_grad_()

    def peak(loss):
        call = lambda: torch.autograd.grad(loss(*leaves, target), leaves)
        return peak_memory(call, torch.device("cpu"))

    eager = peak(lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target))
    if eager is None:
        pytest.skip("this system does not tell the peak of a process")
    assert peak(fastlm.linear_cross_entropy) < eager / 4
