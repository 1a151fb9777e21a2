"""Contracts: a call goes to its launcher where nobody would see the operator, and to the operator
everywhere else, with the same bits; autograd functions are applied without torch's binding."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm.ops._library import apply, in_eager
from fastlm.ops._rows import in_shape
from fastlm.ops.norm import norm_bwd, norm_fwd
from fastlm.testing import randn

F32, BF16 = torch.float32, torch.bfloat16


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    """A subclass that acts on functions alone: its dispatch keys are those of any tensor."""


def negated(x):
    """The values of x, in a tensor whose memory holds -x."""
    y = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert y.is_neg() and torch.equal(y, x)
    return y


def forward_arguments(device, **changes):
    arguments = dict(
        x=randn(5, 24, device=device), residual=None, weight=randn(24, device=device, seed=1),
        bias=None, seed=None, eps=1e-5, dropout_p=0.0, kind="layer", out_dtype=F32, keep_z=False,
    )  # fmt: skip
    return tuple((arguments | changes).values())


def test_in_eager_of_ordinary_tensors(device):
    x = randn(3, 4, device=device)
    assert in_eager((x, torch.nn.Parameter(x), None, 1, 2.0, True, "layer", F32, (1, 2)))
    assert in_eager((x.t()[1:], x.requires_grad_()))
    with torch.no_grad(), torch.autocast(x.device.type, dtype=BF16):
        assert in_eager((x,))
    with torch.inference_mode():
        assert in_eager((torch.empty(2, device=device),))


@pytest.mark.parametrize("kind", ["subclass", "negated", "zero", "meta", "sparse", "fake"])
def test_in_eager_not_with_other_tensors(kind, device):
    x = randn(3, 4, device=device)
    other = {
        "subclass": lambda: x.as_subclass(Tagged),
        "negated": lambda: negated(x),
        "zero": lambda: torch._efficientzerotensor((3, 4), device=device),
        "meta": lambda: x.to("meta"),
        "sparse": lambda: x.to_sparse(),
        "fake": lambda: FakeTensorMode().from_tensor(x),
    }[kind]()
    assert in_eager((x,)) and not in_eager((x, None, other))


@pytest.mark.parametrize("scope", [FakeTensorMode, Seen, SeenFunctions, "profiler", "device"])
def test_in_eager_not_where_others_listen(scope, device):
    x = randn(3, 4, device=device)
    scopes = {
        "profiler": lambda: torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU]
        ),
        "device": lambda: torch.device("cpu"),
    }
    with scopes.get(scope, scope)():
        assert not in_eager((x,))
    assert in_eager((x,))


def test_in_eager_not_in_transforms_and_traces(device):
    x, seen = randn(3, 4, device=device), []

    def run(y):
        seen.append(in_eager((y,)))
        return y.sum()

    torch.func.vmap(run)(x)
    torch.func.grad(run)(x)
    torch.func.functionalize(run)(x)
    torch.jit.trace(run, x, check_trace=False)
    assert seen == [False] * 4


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("keep_z", [False, True])
def test_launcher_and_operator_give_the_same_bits(keep_z, kind, device):
    arguments = forward_arguments(device, kind=kind, keep_z=keep_z)
    results, complete = norm_fwd(*arguments), norm_fwd.op(*arguments)
    wanted = (True, keep_z, kind == "layer", True)
    check_same(results, complete, wanted)
    x, _, weight, *_ = arguments
    _, _, mean, rstd = results
    for dtypes in ((F32, None, F32, None), (None, F32, None, F32), (None,) * 4):
        backward = (x, None, x, weight, mean, rstd, None, 0.0, kind, *dtypes)
        grads, complete = norm_bwd(*backward), norm_bwd.op(*backward)
        check_same(grads, complete, [dtype is not None for dtype in dtypes])


def check_same(results, complete, wanted):
    for result, other, is_wanted in zip(results, complete, wanted, strict=True):
        if is_wanted:
            assert torch.equal(result, other) and result.dtype == other.dtype
        else:
            assert result is None and other.shape == (0,) and other.dtype == F32


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_modes_see_the_operators(mode, impl, device):
    x = randn(3, 16, device=device).requires_grad_()
    y = fastlm.layer_norm(x, impl=impl)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    with mode() as seen:
        same = fastlm.layer_norm(x, impl=impl)
        (same_dx,) = torch.autograd.grad(same, x, torch.ones_like(y))
    assert torch.equal(y, same) and torch.equal(dx, same_dx)
    for name in ("fastlm.norm_fwd.default", "fastlm.norm_bwd.default"):
        if mode is Seen or "fwd" in name:  # the engine calls no Python function
            assert any(name in s for s in seen.names), seen.names


@pytest.mark.parametrize("impl", ["triton"])
def test_profiles_name_the_operators(impl, device):
    x = randn(3, 16, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fastlm.layer_norm(x, impl=impl)
    assert "fastlm::norm_fwd" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("impl", ["triton"])
def test_compiled_graphs_hold_the_operators(impl, device):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    x = randn(3, 16, device=device)
    compiled = torch.compile(
        lambda x: fastlm.layer_norm(x, impl=impl), fullgraph=True, backend=keep
    )
    with torch.no_grad():
        assert torch.equal(compiled(x), fastlm.layer_norm(x, impl=impl))
    targets = {node.target for graph in graphs for node in graph.graph.nodes}
    assert torch.ops.fastlm.norm_fwd.default in targets


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("make", [negated, lambda x: x.as_subclass(Tagged)], ids=["neg", "tagged"])
def test_other_tensors_give_what_ordinary_ones_give(make, impl, device):
    x = randn(3, 16, device=device)
    assert torch.equal(fastlm.layer_norm(make(x), impl=impl), fastlm.layer_norm(x, impl=impl))


class Doubled(torch.autograd.Function):
    """(x, factor, calls) -> (factor * x,), which says in `calls` what ran."""

    @staticmethod
    def forward(x, factor, calls):
        if calls is not None:
            calls.append("forward")
        return (x * factor,)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.factor, calls = inputs
        if calls is not None:
            calls.append("context")

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.factor, None, None


def test_apply_sets_up_a_context_only_for_gradients(device):
    calls, x = [], randn(3, device=device)
    (y,) = apply(Doubled, x, 2.0, calls)
    assert torch.equal(y, 2 * x) and calls == ["forward"]
    x.requires_grad_()
    with torch.no_grad():
        assert not apply(Doubled, x, 2.0, calls)[0].requires_grad
    assert calls == ["forward"] * 2
    (y,) = apply(Doubled, x, 2.0, calls)
    assert calls == ["forward"] * 3 + ["context"]
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, torch.full_like(x, 2.0))


def test_apply_in_transforms_is_torchs(device):
    x = randn(3, device=device)
    run = lambda x: apply(Doubled, x, 2.0, None)[0].sum()
    assert torch.equal(torch.func.grad(run)(x), torch.full_like(x, 2.0))
    escaped = []
    torch.func.grad(lambda x: escaped.append(x) or x.sum())(x)
    (y,) = apply(Doubled, escaped[0], 2.0, None)  # a wrapper whose transform is over
    assert torch.equal(y, 2 * x)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.full_like(x, 2.0))


def test_in_shape_gives_no_view(device):
    for scope in (torch.no_grad, Seen):
        with scope():
            rows = randn(6, 4, device=device)
            y = in_shape(rows.clone(), torch.Size((2, 3, 4)))
            assert y.shape == (2, 3, 4) and not y._is_view()
            assert torch.equal(y.view(6, 4), rows)
            assert in_shape(rows, rows.shape) is rows
