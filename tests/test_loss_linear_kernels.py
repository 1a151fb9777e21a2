"""linear_cross_entropy by the Triton kernels, which compute kept rows alone."""

import itertools
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm.kernels import configs, linear_loss
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
REDUCTIONS = ["mean", "sum", "none"]
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
EVERY = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0}


@pytest.fixture
def small_chunks(monkeypatch, device):
    """Chunks of 32 rows (128 on a GPU): their padding."""
    rows = configs.row_padding(torch.device(device))
    monkeypatch.setattr(linear_loss, "chunk_rows", lambda *_: rows)
    return rows


def fused(**inputs):
    impl = "torch" if inputs["x"].dtype == torch.float64 else "triton"
    return fastlm.linear_cross_entropy(**inputs, impl=impl)


def head_inputs(
    tokens, vocab, dim, dtype, device, *, bias=None, class_weight=None, ignore_index=-100
):
    """Hidden states, a head and targets, every third ignored; dtypes of bias and class weights."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    target[1::3] = ignore_index
    inputs = {
        "x": randn(tokens, dim, dtype=dtype, device=device),
        "weight": randn(vocab, dim, dtype=dtype, device=device, seed=2, scale=3 * dim**-0.5),
        "target": target.to(device),
    }
    if bias is not None:
        inputs["bias"] = randn(vocab, dtype=bias, device=device, seed=3)
    if class_weight is not None:
        inputs["class_weight"] = randn(vocab, device=device, seed=4).abs().to(class_weight)
    return inputs


def run_oracle(inputs, gold=reference.linear_cross_entropy, frozen=(), **options):
    with nan_filled_empty():
        return check_against_reference(
            fused, gold, inputs, frozen=("class_weight", *frozen), **options
        )


def gradients(inputs, **options):
    names = [n for n in ("x", "weight", "bias") if n in inputs]
    leaves = {n: inputs[n].detach().requires_grad_() for n in names}
    loss = fused(**{**inputs, **leaves}, **options)
    return loss, *torch.autograd.grad(loss.sum(), list(leaves.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LOSS_SMALL)
def test_kernels_shapes(shape, dtype, device):
    s = LOSS_SMALL[shape]
    run_oracle(head_inputs(s.tokens, s.vocab, s.dim, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LOSS_LARGE)
def test_kernels_shapes_large(shape, dtype, device):
    s = LOSS_LARGE[shape]
    run_oracle(head_inputs(s.tokens // 8, s.vocab, s.dim, dtype, device))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", [*PAIRS, tuple(OPTIONS)], ids="-".join)
def test_kernels_options(names, reduction, device):
    options = {name: OPTIONS[name] for name in names}
    data = {name: options[name] for name in DATA if name in options}
    inputs = head_inputs(19, 23, 6, torch.float32, device, **data)
    options = {n: v for n, v in options.items() if n not in ("bias", "class_weight")}
    run_oracle(inputs, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kernels_options_over_chunks(reduction, dtype, small_chunks, device):
    """Three chunks by their rows, of which the kept rows fill two."""
    tokens = 2 * small_chunks + 5
    inputs = head_inputs(tokens, 37, 21, dtype, device, bias=dtype, class_weight=dtype)
    run_oracle(inputs, reduction=reduction, **EVERY)


@pytest.mark.parametrize("kept", [0, 1, 32, 33, 64, 70], ids=str)
def test_kernels_any_number_of_kept_rows(kept, small_chunks, device):
    inputs = head_inputs(70, 23, 17, torch.bfloat16, device, bias=torch.bfloat16)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(device)
    inputs["target"] = torch.where(inputs["target"] < 0, 5, inputs["target"])
    inputs["target"][order[kept:]] = -100
    run_oracle(inputs)


@pytest.mark.parametrize("kept", [0, 1, 70], ids=str)
@pytest.mark.parametrize("flatten", [False, True])
def test_kernels_strided_products(flatten, kept, small_chunks, device, monkeypatch):
    """Programs that take several tiles, of as many as there are kept rows for."""
    original = configs.matmul_config
    strided = lambda *call: replace(original(*call), programs=1, flatten=flatten)
    monkeypatch.setattr(linear_loss, "matmul_config", strided)
    inputs = head_inputs(70, 45, 37, torch.bfloat16, device, bias=torch.bfloat16)
    inputs["target"] = torch.where(inputs["target"] < 0, 5, inputs["target"])
    inputs["target"][kept:] = -100
    run_oracle(inputs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_are_torch(dtype, reduction, device):
    def gold(x, weight, target, bias, **options):
        return F.cross_entropy(F.linear(x, weight, bias), target, **options)

    inputs = head_inputs(19, 23, 6, dtype, device, bias=dtype)
    run_oracle(inputs, gold, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES, DTYPES)), ids=str)
def test_kernels_mixed_dtypes(dtypes, device):
    x, weight, bias = dtypes
    inputs = head_inputs(9, 23, 6, x, device, bias=bias)
    inputs["weight"] = inputs["weight"].to(weight)
    run_oracle(inputs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 2, 3)], ids=str)
def test_kernels_leading_dimensions(shape, dtype, device):
    inputs = head_inputs(torch.Size(shape).numel(), 19, 5, torch.float32, device)
    inputs["x"] = inputs["x"].view(*shape, 5)
    inputs["target"] = inputs["target"].view(shape).to(dtype)
    for reduction in ("mean", "none"):
        run_oracle(inputs, reduction=reduction)
    assert fused(**inputs, reduction="none").shape == shape


@pytest.mark.parametrize("dim,vocab", [(1, 40), (16, 1), (129, 15), (15, 129), (64, 64)])
def test_kernels_odd_sizes(dim, vocab, device):
    run_oracle(head_inputs(5, vocab, dim, torch.bfloat16, device, bias=torch.bfloat16))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kernels_do_not_compute_ignored_rows(reduction, small_chunks, device):
    """What they hold reaches nothing, and buffers behind the last kept row are not touched."""
    inputs = head_inputs(3 * small_chunks, 23, 6, torch.float32, device)
    inputs["target"][small_chunks // 2 :] = -100
    clean = gradients(inputs, reduction=reduction)
    ignored = (inputs["target"] == -100)[:, None]
    buffers, new_rows = [], linear_loss.new_rows
    keep = lambda *args: buffers.append(new_rows(*args).fill_(torch.nan)) or buffers[-1]
    with mock.patch.object(linear_loss, "new_rows", keep):
        with mock.patch.object(linear_loss, "chunk_rows", lambda *_: 3 * small_chunks):
            x = inputs["x"].masked_fill(ignored, torch.nan)
            dirty = gradients({**inputs, "x": x}, reduction=reduction)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not dirty[1][ignored[:, 0]].any()
    assert len(buffers) == (4 if reduction == "none" else 2)
    assert all(b[small_chunks:].isnan().all() for b in buffers)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kernels_of_nothing_is_zero(reduction, device):
    inputs = head_inputs(6, 9, 4, torch.float32, device, bias=torch.float32)
    inputs["target"].fill_(-100)
    with nan_filled_empty():
        results = gradients(inputs, reduction=reduction, label_smoothing=0.1)
    assert not any(t.any() for t in results)


def test_kernels_of_targets_without_weight_is_zero(device):
    inputs = head_inputs(6, 9, 4, torch.float32, device)
    inputs["class_weight"] = torch.zeros(9, device=device)
    assert not any(t.any() for t in gradients(inputs, z_loss=0.1))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_kernels_empty_batch(shape, device):
    weight = randn(5, 8, device=device)
    target = torch.zeros(shape[:-1], device=device, dtype=torch.int64)
    inputs = {"x": torch.zeros(shape, device=device), "weight": weight, "target": target}
    for reduction in REDUCTIONS:
        with nan_filled_empty():
            loss, dx, dweight = gradients(inputs, reduction=reduction)
        assert loss.shape == (shape[:-1] if reduction == "none" else ())
        assert dx.shape == shape and not loss.any() and not dweight.any()


@pytest.mark.parametrize("outside", [-1, 9, 2**31 - 1])
def test_kernels_target_outside_is_nan(outside, device):
    inputs = head_inputs(6, 9, 4, torch.float32, device, class_weight=torch.float32)
    inputs["target"][3] = outside
    loss, dx, _ = gradients(inputs, label_smoothing=0.1, reduction="none")
    assert loss.isnan().tolist() == [False] * 3 + [True] + [False] * 2
    assert dx.isnan().all(1).tolist() == dx.isnan().any(1).tolist() == loss.isnan().tolist()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["x", "weight", "target"])
def test_kernels_layouts_are_bitwise_equal(what, layout, reduction, device):
    inputs = head_inputs(8, 12, 6, torch.float32, device)
    if layout == "expanded":
        inputs[what] = inputs[what][:1].repeat_interleave(len(inputs[what]), 0)
    expected = gradients(inputs, reduction=reduction)
    actual = gradients({**inputs, what: with_layout(inputs[what], layout)}, reduction=reduction)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("layout", ["last_stride_2", "expanded"])
def test_kernels_incoming_gradient_layouts(layout, device):
    inputs = head_inputs(9, 12, 6, torch.float32, device)
    x = inputs["x"].requires_grad_()
    loss = fused(**inputs, reduction="none")
    dloss = randn(9, device=device)
    if layout == "expanded":
        dloss = dloss[:1].repeat(9)
    (expected,) = torch.autograd.grad(loss, x, dloss, retain_graph=True)
    (actual,) = torch.autograd.grad(loss, x, with_layout(dloss, layout))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kernels_twice_and_inputs_unmodified(reduction, dtype, device):
    """The first backward gives its gradients away; what the caller does to them is his."""
    inputs = head_inputs(9, 12, 6, dtype, device, bias=dtype, class_weight=torch.float32)
    before = {n: t.clone() for n, t in inputs.items()}
    leaves = [inputs[n].requires_grad_() for n in ("x", "weight", "bias")]
    loss = fused(**inputs, **EVERY, reduction=reduction).sum()
    run = lambda *dloss: torch.autograd.grad(loss, leaves, *dloss, retain_graph=True)
    first = run()
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, run(), strict=True))
    doubled = run(torch.full_like(loss, 2.0))
    assert all(torch.equal(2 * a, b) for a, b in zip(kept, doubled, strict=True))
    assert all(torch.equal(inputs[n], before[n]) for n in before)


def test_kernels_hand_over_the_gradient_of_the_head(device):
    """Nothing of its size is allocated in the backward of a mean."""
    inputs = head_inputs(9, 64, 16, torch.float32, device)
    leaves = [inputs[n].requires_grad_() for n in ("x", "weight")]
    loss = fused(**inputs)
    with Allocations() as allocations:
        torch.autograd.grad(loss, leaves)
    assert allocations.peak < inputs["weight"].nbytes


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "frozen", [("x", "weight"), ("x", "bias"), ("weight", "bias")], ids="-".join
)
def test_kernels_frozen_inputs(frozen, reduction, device):
    inputs = head_inputs(9, 12, 6, torch.float32, device, bias=torch.float32)
    run_oracle(inputs, frozen=frozen, reduction=reduction)
    run_oracle(inputs, frozen=frozen[:1], reduction=reduction)


@pytest.mark.parametrize(
    "frozen,products",
    [("weight", "rows_outer"), ("x", "rows_times_matrix"), ("bias", "column_sum")],
)
def test_kernels_frozen_inputs_cost_nothing(frozen, products, device, monkeypatch):
    inputs = head_inputs(9, 64, 16, torch.float32, device, bias=torch.float32)
    for name in {"x", "weight", "bias"} - {frozen}:
        inputs[name].requires_grad_()
    monkeypatch.setattr(linear_loss, products, None)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = fused(**inputs)
    loss.backward()
    assert inputs[frozen].grad is None
    own = {t.data_ptr() for t in inputs.values()}
    assert not any(t.numel() > 1 for t in saved if t.data_ptr() not in own)


def test_kernels_no_grad_saves_and_differentiates_nothing(monkeypatch, device):
    inputs = head_inputs(9, 12, 6, torch.float32, device)
    expected = gradients(inputs)[0]
    inputs["weight"].requires_grad_()
    for product in ("rows_outer", "rows_times_matrix", "column_sum", "scatter"):
        monkeypatch.setattr(linear_loss, product, None)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            loss = fused(**inputs)
    assert not saved and not loss.requires_grad and torch.equal(loss, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_autocast(dtype, reduction, device):
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

    check_against_reference(under_autocast(fused), under_autocast(eager), inputs)


def test_kernels_fp16_gradients_do_not_underflow(device):
    """The mean's 1 / tokens meets the loss scale before anything is rounded to fp16."""
    inputs = head_inputs(512, 64, 4, torch.float16, device)

    def grads(fn, dtype):
        leaves = {n: inputs[n].to(dtype).requires_grad_() for n in ("x", "weight")}
        loss = fn(**{**inputs, **leaves}).float() * 2.0**9
        return torch.autograd.grad(loss, list(leaves.values()))

    def eager(x, weight, target):
        return F.cross_entropy(F.linear(x, weight), target)

    actual, same = grads(fused, torch.float16), grads(eager, torch.float16)
    gold = grads(eager, torch.float64)
    for name, *tensors in zip(("dx", "dweight"), actual, same, gold, strict=True):
        assert_close(name, *tensors)


@pytest.mark.parametrize("dynamic", [False, True])
def test_kernels_compile_fullgraph(dynamic, device):
    inputs = head_inputs(9, 12, 6, torch.float32, device, bias=torch.float32)
    target = inputs.pop("target")
    leaves = [t.requires_grad_() for t in inputs.values()]

    def fn(x, weight, bias):
        mean = fused(x=x, weight=weight, target=target, bias=bias, z_loss=0.1)
        rows = fused(x=x, weight=weight, target=target, softcap=3.0, reduction="none")
        return mean + rows.square().sum()

    expected = torch.autograd.grad(fn(*leaves), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_kernels_opcheck(device):
    inputs = head_inputs(9, 12, 6, torch.float32, device, class_weight=torch.float32)
    x, weight, target, class_weight = inputs.values()
    for dloss, need in ((None, True), (randn(9, device=device), True), (None, False)):
        args = (x, weight, weight[:, 0], target, class_weight, dloss, torch.float32)
        options = (-100, 0.1, 0.01, 2.0, True, need, need, need)
        torch.library.opcheck(
            torch.ops.fastlm.compact_linear_cross_entropy.default, (*args, *options)
        )
    scale = torch.full((), 0.5, device=device)
    torch.library.opcheck(torch.ops.fastlm.scaled_gradient.default, (x, scale, torch.float16))
    torch.library.opcheck(torch.ops.fastlm.scale_gradient_.default, (x.clone(), scale))


def test_kernels_have_the_same_bits_again(small_chunks, device):
    inputs = head_inputs(70, 37, 21, torch.bfloat16, device, bias=torch.bfloat16)
    first, second = gradients(inputs), gradients(inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Allocations(TorchDispatchMode):
    """The most bytes of new storages that are alive at a time."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in given | self.known:
                    self._add(storage)
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.known.discard(key)
        self.alive -= size


@pytest.mark.parametrize("need_dx", [True, False])
@pytest.mark.parametrize("tokens", [7, 200])
def test_kernels_allocate_what_workspace_bytes_says(tokens, need_dx, device):
    inputs = head_inputs(tokens, 500, 60, torch.bfloat16, device)
    x, weight, target = inputs.values()
    with Allocations() as allocations:
        results = linear_loss.linear_cross_entropy(
            x, weight, None, target, None, None, x.dtype, -100, 0.0, 0.0, None, True, need_dx,
            True, False,
        )  # fmt: skip
    beyond = allocations.peak - sum(t.nbytes for t in results[2:])
    aligned = linear_loss.is_aligned(weight)
    stated = linear_loss.workspace_bytes(tokens, 60, 500, x.dtype, x.device, need_dx, aligned)
    assert stated < beyond <= stated + 8 * tokens + 1024


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_workspace_is_below_512_mb(target):
    multiprocessors = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}[target]
    with (
        mock.patch.object(configs, "target", lambda device: target),
        mock.patch.object(configs, "multiprocessors", lambda device: multiprocessors),
    ):
        for dtype, bound in ((torch.bfloat16, 512e6), (torch.float32, 640e6)):
            assert linear_loss.workspace_bytes(8192, 4096, 128256, dtype, None) < bound
        # Longer batches: an eighth of the logits, so that dweight is rounded at most 8 times.
        rows = configs.chunk_rows(65536, 128256, torch.bfloat16, None)
        assert rows == 65536 // 8
        for tokens, vocab in ((1, 1), (100, 50257), (8192, 262144), (12345, 31999)):
            rows = configs.chunk_rows(tokens, vocab, torch.bfloat16, None)
            assert rows % configs.row_padding(None) == 0
            assert -(-tokens // rows) <= 8


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [1.0, 0.15])
def test_kernels_peak_memory(kept, device):
    """8,192 x 4,096 x 128,256 in bf16: below 512 MB beyond inputs and gradients, with the backward;
    gradients of the head are handed over, not copied."""
    s = LOSS_LARGE["clm_llama3"]
    inputs = head_inputs(s.tokens, s.vocab, s.dim, torch.bfloat16, device)
    inputs["target"].clamp_(min=0)[int(kept * s.tokens) :] = -100
    leaves = [inputs[n].requires_grad_() for n in ("x", "weight")]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(fused(**inputs), leaves)
    used = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
    assert used < 512e6, used


@pytest.mark.gpu
def test_kernels_do_not_wait_for_the_device(device):
    inputs = head_inputs(512, 5000, 256, torch.bfloat16, device)
    gradients(inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_kernels_in_a_cuda_graph(device):
    """The number of kept rows changes between replays."""
    inputs = head_inputs(512, 5000, 256, torch.bfloat16, device)
    leaves = {n: inputs[n].requires_grad_() for n in ("x", "weight")}

    def run():
        loss = fused(**{**inputs, **leaves})
        return loss, *torch.autograd.grad(loss, list(leaves.values()))

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for kept in (512, 3, 200):
        inputs["target"].copy_(torch.arange(512, device=device))
        inputs["target"][kept:] = -100
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


def test_kernels_explain(device):
    inputs = head_inputs(4, 9, 4, torch.float64, device)
    explanation = fastlm.explain("linear_cross_entropy", **inputs)
    assert explanation.chosen == "torch"
    with mock.patch.object(fastlm.backends, "_unavailable", lambda impl, device: None):
        inputs = head_inputs(4, 9, 4, torch.bfloat16, device)
        assert fastlm.explain("linear_cross_entropy", **inputs).chosen == "triton"
