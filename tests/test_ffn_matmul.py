"""The ways that ffn's and gated_ffn's products go: epilogues of our own kernels and of cuBLASLt.
test_ffn.py has what does not depend on the way, by the one that is chosen."""

import re
from functools import partial

import pytest
import torch
from pairwise import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm.kernels import configs, ffn_matmul
from fastlm.ops import _ffn_matmul as ways
from fastlm.ops.ffn import ffn_by, gated_ffn_by
from fastlm.reference import ffn as reference
from fastlm.testing import (
    LAYOUTS,
    assert_close,
    check_against_reference,
    nan_filled_empty,
    randn,
    with_layout,
)

HALVES = [torch.float16, torch.bfloat16]
ACTIVATIONS = list(reference.ACTIVATIONS)
OPS = ["ffn", "gated_ffn"]
SEED = 0x1234_5678_9ABC_DEF0
# (rows, dim, hidden_dim): of tiles of 16 x 32 x 16 a part, one, one and a bit, several groups.
SIZES = [(1, 1, 1), (5, 8, 33), (16, 16, 32), (17, 33, 40), (70, 24, 136)]

pytestmark = pytest.mark.parametrize("impl", ["triton"])


def make_inputs(op, rows, dim, hidden, dtype, device, *, param_dtype=None, out=None):
    out = dim if out is None else out
    shapes = {"x": (rows, dim), "w1": (hidden, dim), "b1": (hidden,), "w2": (out, hidden),
              "b2": (out,)}  # fmt: skip
    if op == "gated_ffn":
        shapes = {"x": (rows, dim), "w_gate": (hidden, dim), "w_up": (hidden, dim),
                  "w_down": (out, hidden)}  # fmt: skip
    inputs = {}
    for i, (name, shape) in enumerate(shapes.items()):
        scale = max(shape[-1], 1) ** -0.5 if name.startswith("w") else 1.0
        own = dtype if name == "x" else param_dtype or dtype
        inputs[name] = randn(*shape, dtype=own, device=device, seed=i, scale=scale)
    return inputs


def by(way, op, impl, **call):
    """The operator, its products forced to go one way."""
    if op == "gated_ffn":
        call = {"activation": "silu", "recompute": False, **call}
        return gated_ffn_by(way, **call, impl=impl)
    call = {"activation": "gelu", "dropout_p": 0.0, "seed": None, "recompute": False, **call}
    return ffn_by(way, **call, impl=impl)


def run_oracle(op, impl, inputs, way="epilogue", **options):
    if options.get("dropout_p"):
        options["seed"] = torch.full((), SEED, device=inputs["x"].device)
    with nan_filled_empty():
        return check_against_reference(
            partial(by, way, op, impl), getattr(reference, op), inputs, **options
        )


def grads_of(op, inputs, impl, dy=None, way="epilogue", **options):
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    y = by(way, op, impl, **leaves, **options)
    dy = torch.ones_like(y) if dy is None else dy
    return y, *torch.autograd.grad(y, list(leaves.values()), dy)


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def options_of(op):
    return {"dropout_p": 0.25, "seed": SEED} if op == "ffn" else {}


class Counter(TorchDispatchMode):
    """Calls by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_epilogue_sizes(op, size, dtype, impl, device):
    run_oracle(op, impl, make_inputs(op, *size, dtype, device))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_epilogue_activations(op, activation, impl, device):
    inputs = make_inputs(op, 37, 24, 72, torch.float16, device, out=40)
    run_oracle(op, impl, inputs, activation=activation)
    if op == "ffn":
        run_oracle(op, impl, inputs, activation=activation, dropout_p=0.3)


PAIRS = pairwise(
    activation=ACTIVATIONS,
    dropout_p=[0.0, 0.3, 1.0],
    recompute=[False, True],
    dtype=HALVES,
    params=[None, torch.float32],
    biases=[("b1", "b2"), ("b1",), ("b2",), ()],
    size=[(19, 16, 40), (19, 17, 40), (33, 24, 37)],  # descriptors; none for x; none for h
    dims=[1, 2],
)


@pytest.mark.parametrize("case", PAIRS, ids=range(len(PAIRS)))
def test_epilogue_option_pairs(case, impl, device):
    rows, dim, hidden = case["size"]
    sizes = rows * case["dims"], dim, hidden
    inputs = make_inputs("ffn", *sizes, case["dtype"], device, param_dtype=case["params"])
    if case["dims"] == 2:
        inputs["x"] = inputs["x"].view(2, rows, dim)
    inputs |= {n: None for n in ("b1", "b2") if n not in case["biases"]}
    options = {n: case[n] for n in ("activation", "dropout_p", "recompute")}
    reference_ffn = lambda **kw: reference.ffn(
        **{n: t if t is None or n == "x" else t.to(kw["x"].dtype) for n, t in kw.items()
           if n not in options and n != "seed"},
        **{n: kw[n] for n in (*options, "seed")},
    )  # fmt: skip
    options["seed"] = torch.full((), SEED, device=device)
    with nan_filled_empty():
        check_against_reference(partial(by, "epilogue", "ffn", impl), reference_ffn, inputs,
                                **options)  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [16, 17])
def test_gated_epilogue_options(dim, dtype, recompute, impl, device):
    inputs = make_inputs("gated_ffn", 35, dim, 40, dtype, device, out=9)
    run_oracle("gated_ffn", impl, inputs, activation="gelu_tanh", recompute=recompute)


@pytest.mark.parametrize("op", OPS)
def test_epilogue_is_what_the_elementwise_kernel_gives(op, impl, device):
    """Bit for bit where nothing rounds before it: weights of ones and zeros, no biases, relu."""
    inputs = make_inputs(op, 40, 16, 48, torch.float16, device)
    for name, t in inputs.items():
        if name.startswith("w"):
            inputs[name] = torch.eye(*t.shape, dtype=t.dtype, device=device)
    biases = {n: None for n in inputs if n.startswith("b")}
    leaves = {n: t.requires_grad_() for n, t in inputs.items() if n not in biases}
    ours, theirs = (
        by(way, op, impl, **leaves, **biases, **options_of(op), activation="relu")
        for way in ("epilogue", "cublas")
    )
    assert torch.equal(ours, theirs)
    dy = randn(*ours.shape, dtype=ours.dtype, device=device, seed=9)
    grads = (torch.autograd.grad(y, list(leaves.values()), dy) for y in (ours, theirs))
    assert all_equal(*grads)


def test_relu_keeps_the_sign_of_what_the_bias_cancels(impl, device):
    """x w1^T and b1 nearly cancel: rounded before their sum, they would have the other sign."""
    x = torch.full((4, 8), 1.0, dtype=torch.bfloat16, device=device)
    w1 = torch.full((32, 8), 0.0, dtype=torch.bfloat16, device=device)
    w1[:, 0], w1[:, 1] = 1.0, 2.0**-9  # 1 + 2^-9 rounds to 1
    b1 = torch.full((32,), -1.0, dtype=torch.bfloat16, device=device)
    inputs = {"x": x, "w1": w1, "b1": b1, "w2": w1.t().contiguous(), "b2": None}
    for way in ("epilogue", "cublas"):
        run_oracle("ffn", impl, inputs, way, activation="relu")


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_epilogue_draws_the_masks_of_every_backend(p, impl, device):
    """w2 picks single hidden elements, of more columns than a tile has."""
    inputs = make_inputs("ffn", 37, 16, 80, torch.float16, device, out=80)
    inputs |= {"b1": None, "b2": None, "w2": torch.eye(80, dtype=torch.float16, device=device)}
    inputs["x"], inputs["w1"] = inputs["x"].abs() + 1, inputs["w1"].abs() + 0.1
    call = {"activation": "relu", "dropout_p": p, "seed": SEED}
    ours = by("epilogue", "ffn", impl, **inputs, **call)
    assert torch.equal(ours == 0, fastlm.ffn(**inputs, **call, impl="torch") == 0)
    assert 0 < (ours == 0).double().mean() < 2 * p


@pytest.mark.parametrize("op", OPS)
def test_epilogue_recompute_is_bitwise_equal(op, impl, device):
    inputs = make_inputs(op, 21, 40, 72, torch.bfloat16, device)
    kept, again = (
        grads_of(op, inputs, impl, recompute=recompute, **options_of(op))
        for recompute in (False, True)
    )
    assert all_equal(kept, again)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_epilogue_layouts_are_bitwise_equal(op, layout, impl, device):
    """What descriptors cannot take goes through pointers, with the same bits."""
    inputs = make_inputs(op, 18, 16, 40, torch.float16, device)
    values = inputs | {"dy": randn(18, 16, dtype=torch.float16, device=device, seed=9)}
    for what in values:
        if layout == "expanded":
            values[what] = values[what][:1].expand(values[what].shape).clone()
        run = lambda v: grads_of(
            op, {n: t for n, t in v.items() if n != "dy"}, impl, v["dy"], **options_of(op)
        )
        changed = values | {what: with_layout(values[what], layout)}
        assert all_equal(run(changed), run(values)), what


def test_descriptors_are_for_aligned_matrices(impl, device):
    x = torch.zeros(40, 64, dtype=torch.float16, device=device)
    for good in (x, None, x[:, :24], x[:, 8:], x[1:], x[:1], x[:1, :3]):
        assert ffn_matmul._are_aligned(x, good)
    odd = x.view(-1)[: 39 * 65].view(39, 65)
    for bad in (x[:, 1:], odd, x[:1].expand(40, 64), x[:0]):
        assert not ffn_matmul._are_aligned(x, bad)


def test_unaligned_matrices_take_narrow_tiles(impl, device, monkeypatch):
    for name in ("sm_80", "sm_90", "sm_100", "gfx942"):
        monkeypatch.setattr(configs, "target", lambda device, name=name: name)
        wide, narrow = (
            configs.epilogue_config("up", torch.device("cpu"), a) for a in (True, False)
        )
        assert wide.block_m * wide.block_n > narrow.block_m * narrow.block_n and not narrow.tma
        assert wide.tma == (name in ("sm_90", "sm_100"))


@pytest.mark.parametrize("op", OPS)
def test_epilogue_backward_twice_and_inputs_unmodified(op, impl, device):
    inputs = make_inputs(op, 18, 16, 40, torch.float16, device)
    before = {n: t.clone() for n, t in inputs.items()}
    leaves = [t.requires_grad_() for t in inputs.values()]
    y = by("epilogue", op, impl, **inputs, **options_of(op))
    dy = randn(*y.shape, dtype=y.dtype, device=device, seed=9)
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    assert all_equal(first, second)
    assert all(torch.equal(inputs[n], before[n]) for n in before)
    assert torch.equal(dy, randn(*y.shape, dtype=y.dtype, device=device, seed=9))


@pytest.mark.parametrize("sizes", [(0, 8, 16), (6, 0, 16), (6, 8, 0)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_epilogue_of_empty_matrices(op, sizes, impl, device):
    run_oracle(op, impl, make_inputs(op, *sizes, torch.float16, device), activation="gelu")


@pytest.mark.parametrize("op", OPS)
def test_epilogue_frozen_inputs_change_no_other_gradient(op, impl, device):
    inputs = make_inputs(op, 18, 16, 40, torch.float16, device)
    expected = dict(zip(inputs, grads_of(op, inputs, impl, **options_of(op))[1:], strict=True))
    for trained in inputs:
        for recompute in (False, True):
            leaves = {n: t.detach().requires_grad_(n == trained) for n, t in inputs.items()}
            y = by("epilogue", op, impl, **leaves, **options_of(op), recompute=recompute)
            y.sum().backward()
            assert torch.equal(leaves[trained].grad, expected[trained]), trained


# Names of calls in the backward pass, where only these train.
COSTS = [
    ("ffn", ["b2"], {}),
    ("ffn", ["w2"], {"mm": 1, "bias_act_fwd": 1}),
    ("ffn", ["b1"], {"ffn_down_bwd": 1}),
    ("ffn", ["x"], {"ffn_down_bwd": 1, "mm": 1}),
    ("ffn", ["w1"], {"ffn_down_bwd": 1, "mm": 1}),
    ("ffn", ["x", "w1", "b1", "w2", "b2"], {"ffn_down_bwd": 1, "mm": 3}),
    ("gated_ffn", ["w_down"], {"mm": 1, "glu_fwd": 1}),
    ("gated_ffn", ["w_gate"], {"gated_down_bwd": 1, "mm": 1}),
    ("gated_ffn", ["x", "w_gate", "w_up", "w_down"],
     {"gated_down_bwd": 1, "mm": 4, "addmm_": 1}),
]  # fmt: skip


@pytest.mark.parametrize("op, trained, calls", COSTS)
def test_epilogue_frozen_weights_cost_nothing(op, trained, calls, impl, device):
    inputs = make_inputs(op, 18, 16, 40, torch.float16, device)
    loss = by("epilogue", op, impl, **{n: t.requires_grad_(n in trained)
                                       for n, t in inputs.items()}).sum()  # fmt: skip
    with Counter() as counter:
        loss.backward()
    names = {*calls, "mm", "addmm", "linear", "ffn_up", "gated_up", "bias_act_bwd", "glu_bwd"}
    assert {n: counter.names.count(n) for n in names} == dict.fromkeys(names, 0) | calls


def saved_by(fn):
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t
    ):
        fn()
    return sorted(tuple(t.shape) for t in saved.values() if t.shape != (0,))


@pytest.mark.parametrize("op", OPS)
def test_epilogue_saves_the_products_or_x_alone(op, impl, device):
    inputs = {n: t.requires_grad_() for n, t in
              make_inputs(op, 6, 16, 40, torch.float16, device).items()}  # fmt: skip
    run = lambda **kw: saved_by(lambda: by("epilogue", op, impl, **inputs, **kw))
    weights = [(16, 40), (40,), (40, 16)] if op == "ffn" else [(16, 40), (40, 16), (40, 16)]
    products = [(6, 40)] * (1 if op == "ffn" else 2)
    assert run() == sorted([(6, 16), *products, *weights])
    assert run(recompute=True) == sorted([(6, 16), *weights])
    with torch.no_grad():
        assert run() == []


@pytest.mark.parametrize("op", OPS)
def test_epilogue_writes_no_hidden_layer_that_nobody_keeps(op, impl, device):
    inputs = make_inputs(op, 6, 16, 40, torch.float16, device)
    name = "ffn_up" if op == "ffn" else "gated_up"
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == name:
                seen.extend(t.numel() for t in out)
            return out

    with Watch():
        by("epilogue", op, impl, **inputs)
    assert seen == [0, 240] if op == "ffn" else seen == [0, 0, 240]


def penalty_gradients(fn, inputs):
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    grads = torch.autograd.grad(fn(**leaves).sum(), list(leaves.values()), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()),
                               materialize_grads=True)  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_epilogue_gradient_penalty(op, recompute, impl, device):
    inputs = make_inputs(op, 5, 8, 16, torch.bfloat16, device)
    options = {"activation": "gelu"}
    run = partial(by, "epilogue", op, impl, **options, recompute=recompute)
    spec = partial(getattr(reference, op), **options)
    actual, same = penalty_gradients(run, inputs), penalty_gradients(spec, inputs)
    gold = penalty_gradients(spec, {n: t.double() for n, t in inputs.items()})
    for name, *three in zip(inputs, actual, same, gold, strict=True):
        assert_close(name, *three)


@pytest.mark.parametrize("op", OPS)
def test_epilogue_under_autocast(op, impl, device):
    inputs = make_inputs(op, 18, 16, 40, torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, *grads = grads_of(op, inputs, impl)
    halves = {n: t.bfloat16() if n[0] in "xw" else t for n, t in inputs.items()}
    y_half, *half = grads_of(op, halves, impl)
    assert torch.equal(y, y_half) and all(g.dtype == torch.float32 for g in grads)
    assert all(torch.equal(a, b.float()) for a, b in zip(grads, half, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_epilogue_compiles_fullgraph(op, dynamic, impl, device):
    inputs = make_inputs(op, 18, 16, 40, torch.float16, device)
    more = options_of(op) | {"recompute": dynamic}
    run = lambda *ts: by("epilogue", op, impl, **dict(zip(inputs, ts, strict=True)), **more)
    leaves = [t.requires_grad_() for t in inputs.values()]
    expected = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert all_equal(torch.autograd.grad(compiled(*leaves).square().sum(), leaves), expected)


def test_epilogue_opcheck(impl, device):
    t = lambda *shape, **kw: randn(*shape, device=device, dtype=torch.float16, **kw)
    x, w, h, w2, b = t(9, 16), t(40, 16), t(9, 40), t(16, 40), randn(40, device=device)
    seed = torch.full((), SEED, device=device)
    check = lambda op, *args: torch.library.opcheck(op.op, args)
    for need in ((True, True), (False, True), (True, False)):
        check(ways.ffn_up, x, w, b, seed, "gelu", 0.5, *need)
        check(ways.gated_up, x, w, w, "silu", *need)
    for need in ((True, True, True), (True, False, False), (False, True, False)):
        db1_dtype = torch.float32 if need[1] else None
        check(ways.ffn_down_bwd, x, w2, h, seed, "gelu", 0.1, need[0], db1_dtype, need[2])
        check(ways.gated_down_bwd, x, w2, h, h, "silu", *need)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [(4096, 768, 3072), (4099, 771, 3077), (300, 1600, 6400)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_epilogue_sizes_large(op, size, dtype, impl, device):
    run_oracle(op, impl, make_inputs(op, *size, dtype, device), **options_of(op))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_epilogue_repeats_bitwise_large(op, impl, device):
    inputs = make_inputs(op, 4099, 512, 2048, torch.bfloat16, device)
    expected = grads_of(op, inputs, impl, **options_of(op))
    for _ in range(50):
        assert all_equal(grads_of(op, inputs, impl, **options_of(op)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_library_epilogue(recompute, dtype, impl, device):
    """torch's call of cuBLASLt, where nothing of the hidden layer is kept."""
    inputs = make_inputs("ffn", 18, 16, 40, dtype, device)
    names = ["relu"] + ["gelu_tanh"] * (device == "cuda")  # a CPU has erf's GELU by this name
    for activation in names:
        run_oracle("ffn", impl, inputs, "cublaslt", activation=activation, recompute=True)
        run = partial(by, "cublaslt", "ffn", impl, activation=activation)
        with torch.no_grad(), Counter() as counter:
            check_against_reference(
                run, partial(reference.ffn, activation=activation), inputs, backward=False
            )
        assert "_addmm_activation" in counter.names and "bias_act_fwd" not in counter.names


def test_way_follows_the_table(impl, device, monkeypatch):
    rows = ((8, 32, 16, "epilogue"), (0, 0, 64, "cublaslt"))
    table = {("sm_90", "ffn", True): rows}
    monkeypatch.setattr(configs, "_FFN_WAYS", table)
    way = lambda rows, dim, hidden, name="sm_90", op="ffn", keep=True: configs.ffn_way(
        name, op, keep, rows, dim, hidden
    )
    assert way(8, 16, 32) == "epilogue"
    assert way(7, 16, 32) == way(8, 16, 31) == way(8, 17, 32) == "cublaslt"
    assert way(8, 65, 32) == way(8, 16, 32, keep=False) == way(8, 16, 32, "sm_80") == "cublas"


@pytest.mark.parametrize("op", OPS)
def test_table_decides_and_compiles(op, impl, device, monkeypatch):
    name = configs.target(torch.device(device))
    rows = ((4, 0, 32, "epilogue"),)
    monkeypatch.setattr(configs, "_FFN_WAYS", {(name, op, keep): rows for keep in (True, False)})
    for dtype, count, way in (
        (torch.float16, 18, "epilogue"), (torch.float16, 3, "cublas"),
        (torch.float32, 18, "cublas"),
    ):  # fmt: skip
        inputs = make_inputs(op, count, 16, 40, dtype, device)
        run = lambda **kw: getattr(fastlm, op)(**kw, activation="relu", impl=impl)
        expected = by(way, op, impl, **inputs, activation="relu")
        assert torch.equal(run(**inputs), expected)
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        assert torch.equal(compiled(**inputs), expected)


def test_explain_says_the_way(impl, device, monkeypatch):
    from fastlm import backends

    others = "not asked here"
    monkeypatch.setattr(backends, "_unavailable", lambda i, device: others if i != impl else None)
    inputs = make_inputs("ffn", 18, 16, 40, torch.float16, device)
    explanation = fastlm.explain("ffn", **inputs)
    assert explanation.note(impl) == f"chosen ({ways.WAYS['cublas']})"
    key = configs.target(torch.device(device)), "ffn", False
    monkeypatch.setattr(configs, "_FFN_WAYS", {key: ((0, 0, 64, "epilogue"),)})
    with Counter() as counter:
        assert ways.WAYS["epilogue"] in str(fastlm.explain("ffn", **inputs))
    assert not set(counter.names) & {"mm", "addmm", "ffn_up", "_to_copy"}
    assert fastlm.explain("ffn", **{n: t.double() for n, t in inputs.items()}).how is None


def test_epilogues_that_are_faster_go_before_cuda(impl, device, monkeypatch):
    """The table's rows were timed against CUDA C++'s kernel, which `ffn` runs elsewhere."""
    from fastlm import backends

    monkeypatch.setattr(backends, "_unavailable", lambda i, device: None)
    inputs = make_inputs("ffn", 18, 16, 40, torch.float16, device)
    assert fastlm.explain("ffn", **inputs).chosen == "cuda"
    key = configs.target(torch.device(device)), "ffn", False
    monkeypatch.setattr(configs, "_FFN_WAYS", {key: ((8, 0, 64, "epilogue"),)})
    explanation = fastlm.explain("ffn", **inputs)
    assert explanation.note(impl) == f"chosen ({ways.WAYS['epilogue']})"
    assert explanation.note("cuda") == "available as impl='cuda'"
    with Counter() as counter:
        fastlm.ffn(**inputs)
    assert "ffn_up" in counter.names
    assert fastlm.explain("ffn", **{**inputs, "x": inputs["x"][:7]}).chosen == "cuda"
    reasons = {"triton": "not asked here"}
    monkeypatch.setattr(backends, "_unavailable", lambda i, device: reasons.get(i))
    assert fastlm.explain("ffn", **inputs).chosen == "cuda"


@pytest.mark.parametrize("way, change, message", [
    ("epilogue", {"dtype": torch.float32},
     "ffn: way='epilogue' takes fp16 and bf16, not torch.float32; use way='cublas'"),
    ("cublaslt", {"activation": "gelu"},
     "ffn: way='cublaslt' has a bias, relu or gelu_tanh, no dropout, and keeps nothing; "
     "use way='cublas'"),
    ("cublaslt", {"activation": "relu", "dropout_p": 0.5},
     "ffn: way='cublaslt' has a bias, relu or gelu_tanh, no dropout, and keeps nothing; "
     "use way='cublas'"),
])  # fmt: skip
def test_way_refuses(way, change, message, impl, device):
    change = dict(change)
    inputs = make_inputs("ffn", 6, 16, 40, change.pop("dtype", torch.float16), device)
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        by(way, "ffn", impl, **inputs, **change)
