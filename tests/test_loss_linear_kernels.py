"""linear_cross_entropy by the Triton kernels, which compute kept rows alone: what is theirs. What
every backend does: test_loss_linear.py."""

import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch
from linear_loss_cases import DTYPES, REDUCTIONS, gradients, head_inputs, run_oracle
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm.kernels import configs, linear_loss
from fastlm.shapes import LOSS_LARGE
from fastlm.testing import randn

EVERY = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0}


@pytest.fixture
def small_chunks(monkeypatch, device):
    """Chunks of 32 rows (128 on a GPU): their padding."""
    rows = configs.row_padding(torch.device(device))
    monkeypatch.setattr(linear_loss, "chunk_rows", lambda *_: rows)
    return rows


def fused(**inputs):
    return fastlm.linear_cross_entropy(**inputs, impl="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kernels_options_over_chunks(reduction, dtype, small_chunks, device):
    """Three chunks by their rows, of which the kept rows fill two."""
    tokens = 2 * small_chunks + 5
    inputs = head_inputs(tokens, 37, 21, dtype, device, bias=dtype, class_weight=dtype)
    run_oracle("triton", inputs, reduction=reduction, **EVERY)


@pytest.mark.parametrize("kept", [0, 1, 32, 33, 64, 70], ids=str)
def test_kernels_any_number_of_kept_rows(kept, small_chunks, device):
    inputs = head_inputs(70, 23, 17, torch.bfloat16, device, bias=torch.bfloat16)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(device)
    inputs["target"] = torch.where(inputs["target"] < 0, 5, inputs["target"])
    inputs["target"][order[kept:]] = -100
    run_oracle("triton", inputs)


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
    run_oracle("triton", inputs)


@pytest.mark.parametrize("dim,vocab", [(1, 40), (16, 1), (129, 15), (15, 129), (64, 64)])
def test_kernels_odd_sizes(dim, vocab, device):
    run_oracle("triton", head_inputs(5, vocab, dim, torch.bfloat16, device, bias=torch.bfloat16))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kernels_do_not_compute_ignored_rows(reduction, small_chunks, device):
    """What they hold reaches nothing, and buffers behind the last kept row are not touched."""
    inputs = head_inputs(3 * small_chunks, 23, 6, torch.float32, device)
    inputs["target"][small_chunks // 2 :] = -100
    clean = gradients("triton", inputs, reduction=reduction)
    ignored = (inputs["target"] == -100)[:, None]
    buffers, new_rows = [], linear_loss.new_rows
    keep = lambda *args: buffers.append(new_rows(*args).fill_(torch.nan)) or buffers[-1]
    with mock.patch.object(linear_loss, "new_rows", keep):
        with mock.patch.object(linear_loss, "chunk_rows", lambda *_: 3 * small_chunks):
            x = inputs["x"].masked_fill(ignored, torch.nan)
            dirty = gradients("triton", {**inputs, "x": x}, reduction=reduction)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not dirty[1][ignored[:, 0]].any()
    assert len(buffers) == (4 if reduction == "none" else 2)
    assert all(b[small_chunks:].isnan().all() for b in buffers)


def test_kernels_of_targets_without_weight_is_zero(device):
    inputs = head_inputs(6, 9, 4, torch.float32, device)
    inputs["class_weight"] = torch.zeros(9, device=device)
    assert not any(t.any() for t in gradients("triton", inputs, z_loss=0.1))


@pytest.mark.parametrize("outside", [-1, 9, 2**31 - 1])
def test_kernels_target_outside_is_nan(outside, device):
    inputs = head_inputs(6, 9, 4, torch.float32, device, class_weight=torch.float32)
    inputs["target"][3] = outside
    loss, dx, _ = gradients("triton", inputs, label_smoothing=0.1, reduction="none")
    assert loss.isnan().tolist() == [False] * 3 + [True] + [False] * 2
    assert dx.isnan().all(1).tolist() == dx.isnan().any(1).tolist() == loss.isnan().tolist()


def test_kernels_hand_over_the_gradient_of_the_head(device):
    """Nothing of its size is allocated in the backward of a mean."""
    inputs = head_inputs(9, 64, 16, torch.float32, device)
    leaves = [inputs[n].requires_grad_() for n in ("x", "weight")]
    loss = fused(**inputs)
    with Allocations() as allocations:
        torch.autograd.grad(loss, leaves)
    assert allocations.peak < inputs["weight"].nbytes


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
    first, second = gradients("triton", inputs), gradients("triton", inputs)
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
    gradients("triton", inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients("triton", inputs)
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
