"""bias_act, glu, ffn and gated_ffn, every backend, against the fp64 reference and torch's own."""

import itertools
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm.reference import ffn as reference
from fastlm.shapes import FFN_LARGE, FFN_SMALL
from fastlm.testing import (
    LAYOUTS,
    check_against_reference,
    check_over_draws,
    nan_filled_empty,
    randn,
    with_layout,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNELS = ["triton", "cuda"]
IMPLS = ["torch", *KERNELS]
IN_EVERY_MODE = ["torch", "triton", pytest.param("cuda", marks=pytest.mark.sanitized)]
OPS = ["bias_act", "glu", "ffn", "gated_ffn"]
SEED = 0x1234_5678_9ABC_DEF0

# What each name means, by torch's functions.
TORCH = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
ACTIVATIONS = list(TORCH)


def make_inputs(op, rows, dim, hidden, dtype, device, *, param_dtype=None, seed=0):
    """Inputs by name; matrices are scaled so that the hidden values have deviation 1."""
    shapes = {
        "bias_act": {"x": (rows, hidden), "bias": (hidden,)},
        "glu": {"gate": (rows, hidden), "up": (rows, hidden)},
        "ffn": {
            "x": (rows, dim), "w1": (hidden, dim), "b1": (hidden,),
            "w2": (dim, hidden), "b2": (dim,),
        },
        "gated_ffn": {
            "x": (rows, dim), "w_gate": (hidden, dim), "w_up": (hidden, dim),
            "w_down": (dim, hidden),
        },
    }  # fmt: skip
    inputs = {}
    for i, (name, shape) in enumerate(shapes[op].items()):
        scale = shape[-1] ** -0.5 if name.startswith("w") else 1.0
        own = dtype if name in ("x", "gate", "up") else param_dtype or dtype
        inputs[name] = randn(*shape, dtype=own, device=device, seed=seed + i, scale=scale)
    return inputs


def small(op, dtype=torch.float32, device="cpu"):
    return make_inputs(op, 6, 12, 20, dtype, device)


def options_of(op, seed=SEED):
    """One choice of every option that the operator takes."""
    options = {"activation": "gelu"}
    if op in ("bias_act", "ffn"):
        options |= {"dropout_p": 0.25, "seed": seed}
    return options


def run_oracle(op, impl, inputs, check=check_against_reference, **options):
    if options.get("dropout_p"):
        options["seed"] = torch.full((), SEED, device=next(iter(inputs.values())).device)
    with nan_filled_empty():
        return check(
            lambda **kw: getattr(fastlm, op)(**kw, impl=impl),
            getattr(reference, op),
            inputs,
            **options,
        )


def grads_of(op, inputs, impl, dy=None, **options):
    """The output and every gradient, with dy all ones unless given; of the reference for None."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    fn = partial(getattr(fastlm, op), impl=impl) if impl else getattr(reference, op)
    y = fn(**leaves, **options)
    dy = torch.ones_like(y) if dy is None else dy
    return y, *torch.autograd.grad(y, list(leaves.values()), dy)


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("impl", IN_EVERY_MODE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FFN_SMALL)
@pytest.mark.parametrize("op", OPS)
def test_ffn_shapes(op, shape, dtype, impl, device):
    s = FFN_SMALL[shape]
    draw = lambda i: make_inputs(op, s.rows, s.dim, s.hidden_dim, dtype, device, seed=8 * i)
    if (shape, dtype) == ("one", torch.float32):  # where the reference may be right by luck
        run_oracle(op, impl, map(draw, range(64)), check_over_draws, activation="gelu")
    else:
        run_oracle(op, impl, draw(0), activation="gelu")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", ["bias_act", "ffn"])
def test_ffn_activations_and_dropout(op, activation, dropout_p, dtype, impl, device):
    inputs = make_inputs(op, 9, 16, 37, dtype, device)
    run_oracle(op, impl, inputs, activation=activation, dropout_p=dropout_p)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", ["glu", "gated_ffn"])
def test_glu_activations(op, activation, dtype, impl, device):
    run_oracle(op, impl, make_inputs(op, 9, 16, 37, dtype, device), activation=activation)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_bias_act_sums_dbias_over_many_tiles(dropout_p, impl, device):
    inputs = make_inputs("bias_act", 200, 0, 300, torch.float32, device)
    run_oracle("bias_act", impl, inputs, activation="relu", dropout_p=dropout_p)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FFN_LARGE)
@pytest.mark.parametrize("op", OPS)
def test_ffn_shapes_large(op, shape, dtype, impl, device):
    s = FFN_LARGE[shape]
    inputs = make_inputs(op, s.rows, s.dim, s.hidden_dim, dtype, device)
    run_oracle(op, impl, inputs, **options_of(op))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_ffn_repeats_bitwise_large(op, impl, device):
    inputs = make_inputs(op, 4099, 512, 2048, torch.bfloat16, device)
    expected = grads_of(op, inputs, impl, **options_of(op))
    for _ in range(100):
        assert all_equal(grads_of(op, inputs, impl, **options_of(op)), expected)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.gpu
def test_bias_act_in_a_cuda_graph_follows_the_seed(impl, device):
    x, seed = torch.ones(64, 256, device=device), torch.zeros((), dtype=torch.int64, device=device)
    run = lambda: fastlm.bias_act(x, activation="relu", dropout_p=0.5, seed=seed, impl=impl)
    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for value in (3, 4):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(y, run())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ffn_means_what_torch_means(activation, dtype, impl, device):
    """Against compositions of torch's own functions, in the oracle's place of the reference."""
    act = TORCH[activation]
    composed = {
        "bias_act": lambda x, bias: act(x + bias),
        "glu": lambda gate, up: act(gate) * up,
        "ffn": lambda x, w1, b1, w2, b2: F.linear(act(F.linear(x, w1, b1)), w2, b2),
        "gated_ffn": lambda x, w_gate, w_up, w_down: F.linear(
            act(F.linear(x, w_gate)) * F.linear(x, w_up), w_down
        ),
    }
    for op, fn in composed.items():
        run = lambda op=op, **kw: getattr(fastlm, op)(**kw, activation=activation, impl=impl)
        check_against_reference(run, fn, small(op, dtype, device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", ["bias_act", "ffn"])
def test_ffn_without_biases(op, impl, device):
    inputs = small(op, device=device)
    for names in (["bias"],) if op == "bias_act" else (["b1"], ["b2"], ["b1", "b2"]):
        run_oracle(op, impl, inputs | dict.fromkeys(names), activation="silu", dropout_p=0.2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", ["ffn", "gated_ffn"])
def test_ffn_recompute_is_bitwise_equal(op, impl, device):
    inputs = small(op, device=device)
    kept, recomputed = (
        grads_of(op, inputs, impl, recompute=recompute, **options_of(op))
        for recompute in (False, True)
    )
    assert all_equal(kept, recomputed)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ffn_of_zeros(activation, impl, device):
    """Zero input gives act(b1) w2^T + b2 in every row."""
    act = TORCH[activation]
    inputs = small("ffn", device=device)
    inputs["x"] = torch.zeros_like(inputs["x"])
    check_against_reference(
        lambda **kw: fastlm.ffn(**kw, activation=activation, impl=impl),
        lambda x, w1, b1, w2, b2: F.linear(act(b1), w2, b2).expand(x.shape),
        inputs,
        backward=False,
    )
    for op in ("glu", "gated_ffn"):
        inputs = small(op, device=device)
        zero = "gate" if op == "glu" else "x"
        inputs[zero] = torch.zeros_like(inputs[zero])
        assert not getattr(fastlm, op)(**inputs, activation=activation, impl=impl).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", OPS)
def test_ffn_rows_are_independent(op, impl, device):
    inputs = small(op, device=device)
    first = next(iter(inputs))
    before = getattr(fastlm, op)(**inputs, impl=impl, **options_of(op))
    inputs[first] = inputs[first].clone()
    inputs[first][3] = float("nan")
    after = getattr(fastlm, op)(**inputs, impl=impl, **options_of(op))
    others = [0, 1, 2, 4, 5]
    assert torch.equal(after[others], before[others]) and after[3].isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_act_extreme_inputs(activation, impl, device):
    values = [float("nan"), 1e18, -1e18, 60.0, -60.0, 0.0, -0.0, 1e-30, -1e-30]
    x = torch.tensor([values], device=device)
    y, dx = grads_of("bias_act", {"x": x}, impl, activation=activation)
    assert y[0, 0].isnan() and torch.isfinite(y[0, 1:]).all() and torch.isfinite(dx[0, 1:]).all()
    assert y[0, [2, 4]].abs().max() < 1e-20 and dx[0, [2, 4]].abs().max() < 1e-20


@pytest.mark.parametrize("impl", KERNELS)
def test_gelu_tanh_gradient_where_the_square_overflows(impl, device):
    x = torch.tensor([[3e38, -3e38, 1e20, -1e20]], device=device)
    y, dx = grads_of("bias_act", {"x": x}, impl, activation="gelu_tanh")
    assert torch.equal(y, F.relu(x)) and dx.tolist() == [[1.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_bias_act_drops_the_same_elements_on_every_backend(p, impl, device):
    x = randn(37, 70, device=device).abs() + 1
    runs = [
        grads_of("bias_act", {"x": x}, each, activation="relu", dropout_p=p, seed=seed)
        for each, seed in (("torch", SEED), (impl, SEED), (impl, SEED + 1))
    ]
    assert all_equal(runs[0], runs[1])
    assert torch.equal(runs[1][0] == 0, runs[1][1] == 0)  # the backward replays the mask
    assert p == 1.0 or not torch.equal(runs[1][0], runs[2][0])
    assert abs((runs[1][0] == 0).double().mean() - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 1e-9


@pytest.mark.parametrize("impl", IMPLS)
def test_ffn_draws_its_seed_from_torchs_generator(impl, device):
    inputs = small("ffn", device=device)
    run = lambda: fastlm.ffn(**inputs, dropout_p=0.5, impl=impl)
    torch.manual_seed(7)
    drawn = [run() for _ in range(2)]
    torch.manual_seed(7)
    assert torch.equal(run(), drawn[0]) and not torch.equal(*drawn)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_ffn_gradcheck(op, activation):
    inputs = make_inputs(op, 3, 4, 5, torch.float64, "cpu")
    options = options_of(op, torch.tensor(SEED)) | {"activation": activation}
    tensors = [t.requires_grad_() for t in inputs.values()]
    for more in ({}, {"recompute": True}) if op.endswith("ffn") else ({},):
        fn = lambda *ts, more=more: getattr(reference, op)(
            **dict(zip(inputs, ts, strict=True)), **options, **more
        )
        assert torch.autograd.gradcheck(fn, tensors)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_ffn_mixed_dtypes(op, dtypes, impl, device):
    """Results have the input's dtype (glu: the wider one), gradients those of their tensors."""
    x_dtype, param_dtype = dtypes
    inputs = make_inputs(op, 6, 12, 20, x_dtype, device, param_dtype=param_dtype)
    if op == "glu":
        inputs["up"] = inputs["up"].to(param_dtype)
        x_dtype = torch.promote_types(x_dtype, param_dtype)
    run_oracle(op, impl, inputs, **options_of(op))
    assert getattr(fastlm, op)(**inputs, **options_of(op), impl=impl).dtype == x_dtype


@pytest.mark.parametrize("impl", IMPLS)
def test_ffn_autocast_as_linear(impl, device):
    """As if x and the weights were bf16; biases keep their precision until they are added."""
    for op in ("ffn", "gated_ffn"):
        for dtype in (torch.float32, torch.float16):
            inputs = small(op, dtype, device)
            lowered = {n: t if n.startswith("b") else t.bfloat16() for n, t in inputs.items()}
            expected = grads_of(op, lowered, impl, **options_of(op))
            with torch.autocast(device, torch.bfloat16):
                actual = grads_of(op, inputs, impl, **options_of(op))
            assert [t.dtype for t in actual] == [torch.bfloat16] + [dtype] * len(inputs)
            assert all(torch.equal(a, e.to(a.dtype)) for a, e in zip(actual, expected, strict=True))
    for op in ("bias_act", "glu"):
        inputs = small(op, device=device)
        with torch.autocast(device, torch.bfloat16):
            assert getattr(fastlm, op)(**inputs, **options_of(op), impl=impl).dtype == torch.float32


def test_ffn_autocast_leaves_fp64_alone():
    inputs = small("ffn", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastlm.ffn(**inputs).dtype == torch.float64


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_ffn_layouts(op, layout, impl, device):
    inputs = small(op, device=device)
    y = getattr(fastlm, op)(**inputs, **options_of(op))
    dy = randn(*y.shape, device=device, seed=9)
    values = inputs | {"dy": dy}
    options = options_of(op, torch.tensor(SEED, device=device))
    by = lambda impl: lambda dy, **inputs: grads_of(op, inputs, impl, dy, **options)
    for what in values:
        if layout == "expanded":
            values[what] = values[what][:1].expand(values[what].shape).clone()
        changed = values | {what: with_layout(values[what], layout)}
        # Other layouts are other products of torch's, and on a GPU other kernels of Triton's.
        if op.endswith("ffn") or (device == "cuda" and impl == "triton"):
            check_against_reference(by(impl), by("torch"), changed, backward=False)
        else:
            assert all_equal(by(impl)(**changed), by(impl)(**values)), what


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("op", OPS)
def test_ffn_leading_dimensions_are_rows(op, impl, device):
    inputs = small(op, device=device)
    y, *grads = grads_of(op, inputs, impl, **options_of(op))
    rows = ("x", "gate", "up")
    deep = {n: t.view(2, 1, 3, -1) if n in rows else t for n, t in inputs.items()}
    y_deep, *grads_deep = grads_of(op, deep, impl, **options_of(op))
    assert y_deep.shape[:-1] == (2, 1, 3) and torch.equal(y_deep.flatten(0, -2), y)
    assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(grads_deep, grads, strict=True))
    row = {n: t[0] if n in rows else t for n, t in inputs.items()}
    assert grads_of(op, row, impl, **options_of(op))[0].shape == y.shape[1:]


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("op", OPS)
def test_ffn_gradient_of_sum_is_expanded(op, impl, device):
    inputs = {n: t.requires_grad_() for n, t in small(op, device=device).items()}
    fn = lambda: getattr(fastlm, op)(**inputs, **options_of(op), impl=impl)
    expected = torch.autograd.grad(fn(), list(inputs.values()), torch.ones_like(fn()))
    assert all_equal(torch.autograd.grad(fn().sum(), list(inputs.values())), expected)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_ffn_backward_twice_and_inputs_unmodified(op, recompute, impl, device):
    inputs = small(op, device=device)
    before = {n: t.clone() for n, t in inputs.items()}
    leaves = [t.requires_grad_() for t in inputs.values()]
    more = {"recompute": recompute} if op.endswith("ffn") else {}
    y = getattr(fastlm, op)(**inputs, **options_of(op), **more, impl=impl)
    dy = randn(*y.shape, device=device, seed=9)
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    assert all_equal(first, second)
    assert all(torch.equal(inputs[n], before[n]) for n in before)
    assert torch.equal(dy, randn(*y.shape, device=device, seed=9))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", OPS)
def test_ffn_empty_batch(op, impl, device):
    inputs = make_inputs(op, 0, 12, 20, torch.float32, device)
    y, *grads = grads_of(op, inputs, impl, **options_of(op))
    assert y.shape[0] == 0 and [g.shape for g in grads] == [t.shape for t in inputs.values()]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("op", OPS)
def test_ffn_frozen_inputs_change_no_other_gradient(op, impl, device):
    inputs = small(op, device=device)
    expected = dict(zip(inputs, grads_of(op, inputs, impl, **options_of(op))[1:], strict=True))
    for trained in itertools.product([False, True], repeat=len(inputs)):
        choices = [{}, {"recompute": True}] if op.endswith("ffn") and sum(trained) == 1 else [{}]
        for more in choices if any(trained) else []:
            leaves = {
                n: t.detach().requires_grad_(on)
                for (n, t), on in zip(inputs.items(), trained, strict=True)
            }
            getattr(fastlm, op)(**leaves, **options_of(op), **more, impl=impl).sum().backward()
            for name, leaf in leaves.items():
                if leaf.requires_grad:
                    assert torch.equal(leaf.grad, expected[name]), (name, trained)
                else:
                    assert leaf.grad is None


class _CountProducts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        products = ("mm", "addmm", "addmm_", "bmm", "matmul", "linear")
        self.count += func.overloadpacket.__name__ in products
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("op, trained, products", [
    ("ffn", ["x"], 2), ("ffn", ["b2"], 0), ("ffn", ["w2"], 1), ("ffn", ["b1"], 1),
    ("ffn", ["w1"], 2), ("ffn", ["x", "w1", "b1", "w2", "b2"], 4),
    ("gated_ffn", ["x"], 3), ("gated_ffn", ["w_down"], 1), ("gated_ffn", ["w_gate"], 2),
    ("gated_ffn", ["x", "w_gate", "w_up", "w_down"], 6),
])  # fmt: skip
def test_ffn_frozen_weights_cost_no_product(op, trained, products, impl, device):
    inputs = {n: t.requires_grad_(n in trained) for n, t in small(op, device=device).items()}
    loss = getattr(fastlm, op)(**inputs, impl=impl).sum()
    with _CountProducts() as mode:
        loss.backward()
    assert mode.count == products


def saved_by(fn):
    """Shapes of the tensors that `fn` saves for the backward pass, without repeats."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t
    ):
        fn()
    return sorted(tuple(t.shape) for t in saved.values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", ["ffn", "gated_ffn"])
def test_ffn_recompute_saves_its_inputs_alone(op, impl, device):
    inputs = {n: t.requires_grad_() for n, t in small(op, device=device).items()}
    run = lambda: getattr(fastlm, op)(**inputs, **options_of(op), recompute=True, impl=impl)
    allowed = sorted([tuple(t.shape) for t in inputs.values()] + [()])  # (): the seed
    saved = [shape for shape in saved_by(run) if shape != (0,)]  # a dummy of torch's, to 2.12
    assert (6, 12) in saved and all(shape in allowed for shape in saved)
    assert len(saved) <= len(allowed)


@pytest.mark.parametrize("impl", KERNELS)
def test_ffn_saves_the_preactivation_alone(impl, device):
    inputs = {n: t.requires_grad_() for n, t in small("ffn", device=device).items()}
    run = lambda: fastlm.ffn(**inputs, dropout_p=0.1, impl=impl)
    assert saved_by(run) == [(), (6, 12), (6, 20), (12, 20), (20,), (20, 12)]
    for name in ("w1", "b1", "w2", "b2"):
        inputs[name].requires_grad_(False)
    assert saved_by(run) == [(), (6, 20), (12, 20), (20,), (20, 12)]  # x is not kept for dx
    inputs = {n: t.requires_grad_() for n, t in small("gated_ffn", device=device).items()}
    run = lambda: fastlm.gated_ffn(**inputs, impl=impl)
    assert saved_by(run) == [(6, 12), (6, 20), (6, 20), (12, 20), (20, 12), (20, 12)]


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("op", OPS)
def test_ffn_no_grad_saves_nothing(op, impl, device):
    inputs = {n: t.requires_grad_() for n, t in small(op, device=device).items()}
    with torch.no_grad():
        saved = saved_by(lambda: getattr(fastlm, op)(**inputs, **options_of(op), impl=impl))
    assert saved == []


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_ffn_compiles_fullgraph(op, dynamic, impl, device):
    inputs = small(op, device=device)
    options = options_of(op) | ({"recompute": not dynamic} if op.endswith("ffn") else {})
    if impl == "torch" and (op, dynamic) != ("bias_act", False):
        options.pop("dropout_p", None)  # tracing Philox takes seconds; once is enough
    run = lambda *ts: getattr(fastlm, op)(
        **dict(zip(inputs, ts, strict=True)), **options, impl=impl
    )
    leaves = [t.requires_grad_() for t in inputs.values()]
    expected = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    assert all_equal(actual, expected)
    with torch.no_grad():
        assert torch.equal(compiled(*leaves), run(*leaves))


@pytest.mark.parametrize("impl", KERNELS)
def test_ffn_opcheck(impl, device):
    x, bias = randn(4, 20, device=device), randn(20, device=device, dtype=torch.float16)
    seed = torch.full((), SEED, device=device)
    ops = torch.ops.fastlm if impl == "triton" else torch.ops.fastlm_cuda
    for args in ((x, bias, seed, "gelu", 0.5), (x, None, None, "relu", 0.0)):
        torch.library.opcheck(ops.bias_act_fwd.default, args)
        for need in ((True, True, True), (True, False, False), (False, True, False)):
            need = (need[0], need[1] and args[1] is not None, need[2])
            torch.library.opcheck(ops.bias_act_bwd.default, (x, *args, *need))
    torch.library.opcheck(ops.glu_fwd.default, (x, x.half(), "silu"))
    for need in ((True, True, True), (True, False, False), (False, True, False)):
        torch.library.opcheck(ops.glu_bwd.default, (x, x, x.half(), "silu", *need))


@pytest.mark.parametrize("impl", KERNELS)
def test_ffn_rows_past_int32_offsets(impl, device):
    x = torch.empty(2**31 + 64, device=device, dtype=torch.float16).as_strided((3, 64), (2**30, 1))
    x.copy_(randn(3, 64))  # three rows 2**30 elements apart: few pages are touched
    biased = {"x": x, "bias": randn(64, dtype=torch.float16, device=device)}
    for op, inputs in ("bias_act", {"x": x}), ("bias_act", biased), ("glu", {"gate": x, "up": x}):
        near = {n: t.contiguous() for n, t in inputs.items()}
        assert all_equal(grads_of(op, inputs, impl, x, activation="silu"),
                         grads_of(op, near, impl, x.contiguous(), activation="silu"))  # fmt: skip


def test_ffn_explain(device):
    inputs = small("ffn", torch.float64, device)
    explanation = fastlm.explain("ffn", **inputs)
    assert explanation.chosen == "torch" and explanation.reasons["triton"] is not None


NAMES = "'gelu', 'gelu_tanh', 'relu', 'relu2', 'silu', 'quick_gelu'"


@pytest.mark.parametrize("op,change,message", [
    ("bias_act", {"x": 1.0}, "bias_act: x must be a tensor, got float"),
    ("bias_act", {"x": torch.ones(2, 20, dtype=torch.int32)},
     "bias_act: x must have a floating-point dtype, got torch.int32"),
    ("bias_act", {"x": torch.tensor(1.0)}, "bias_act: x must have at least one dimension, got ()"),
    ("bias_act", {"bias": torch.ones(7)},
     "bias_act: bias must have shape (cols,) = (20,), got (7,)"),
    ("bias_act", {"bias": torch.ones(20, device="meta")},
     "bias_act: bias must be on the device of the first input, cpu, got meta"),
    ("bias_act", {"activation": "tanh"},
     f"bias_act: activation must be one of {NAMES}, got 'tanh'"),
    ("bias_act", {"activation": None}, f"bias_act: activation must be one of {NAMES}, got None"),
    ("bias_act", {"dropout_p": -0.5},
     "bias_act: dropout_p must be a number from 0 to 1, got -0.5"),
    ("glu", {"up": torch.ones(6, 1)}, "glu: up must have shape of gate = (6, 20), got (6, 1)"),
    ("glu", {"up": None}, "glu: up must be a tensor, got NoneType"),
    ("glu", {"activation": "glu"}, f"glu: activation must be one of {NAMES}, got 'glu'"),
    ("ffn", {"w1": torch.ones(20)},
     "ffn: w1 must have shape (hidden_dim, dim) = (*, 12), got (20,)"),
    ("ffn", {"w1": torch.ones(12, 20)},
     "ffn: w1 must have shape (hidden_dim, dim) = (*, 12), got (12, 20)"),
    ("ffn", {"b1": torch.ones(12)}, "ffn: b1 must have shape (hidden_dim,) = (20,), got (12,)"),
    ("ffn", {"w2": torch.ones(20, 12)},
     "ffn: w2 must have shape (out_dim, hidden_dim) = (*, 20), got (20, 12)"),
    ("ffn", {"b2": torch.ones(20)}, "ffn: b2 must have shape (out_dim,) = (12,), got (20,)"),
    ("ffn", {"w2": torch.ones(12, 20, device="meta")},
     "ffn: w2 must be on the device of the first input, cpu, got meta"),
    ("ffn", {"dropout_p": True}, "ffn: dropout_p must be a number from 0 to 1, got bool"),
    ("ffn", {"dropout_p": 0.5, "seed": 2**64}, f"ffn: seed must be a 64-bit integer, got {2**64}"),
    ("gated_ffn", {"w_up": torch.ones(21, 12)},
     "gated_ffn: w_up must have shape of w_gate = (20, 12), got (21, 12)"),
    ("gated_ffn", {"w_down": torch.ones(12, 21)},
     "gated_ffn: w_down must have shape (out_dim, hidden_dim) = (*, 20), got (12, 21)"),
    ("gated_ffn", {"impl": "fast"},
     "gated_ffn: impl must be None, 'cuda', 'triton' or 'torch', got 'fast'"),
])  # fmt: skip
def test_ffn_errors(op, change, message):
    options = {"activation": "gelu"}
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=re.escape(message)):
        getattr(fastlm, op)(**{**small(op), **options, **change})


@pytest.mark.parametrize("impl", KERNELS)
def test_ffn_kernels_refuse_fp64(impl, device):
    for op, name in (("bias_act", "bias"), ("glu", "up"), ("ffn", "b1"), ("gated_ffn", "w_up")):
        inputs = small(op, device=device)
        inputs[name] = inputs[name].double()
        message = f"{op}: impl='{impl}' computes in fp32 and does not take a float64 {name}"
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            getattr(fastlm, op)(**inputs, **options_of(op), impl=impl)
