"""layer_norm and rms_norm, every backend, against the fp64 reference."""

import itertools
import re
from dataclasses import astuple

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.kernels import configs, norm, norm_bwd
from fastlm.reference import norm as reference
from fastlm.shapes import NORM_LARGE, NORM_SMALL
from fastlm.testing import (
    LAYOUTS,
    assert_close,
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
SEED = 0x1234_5678_9ABC_DEF0


def norm_inputs(op, rows, cols, dtype, device, *, residual=False, param_dtype=None, seed=0):
    param_dtype = param_dtype or dtype
    inputs = {
        "x": randn(rows, cols, dtype=dtype, device=device, seed=seed),
        "weight": randn(cols, dtype=param_dtype, device=device, seed=seed + 1),
    }
    if op == "layer_norm":
        inputs["bias"] = randn(cols, dtype=param_dtype, device=device, seed=seed + 2)
    if residual:
        inputs["residual"] = randn(rows, cols, dtype=dtype, device=device, seed=seed + 3)
    return inputs


def run_oracle(op, impl, inputs, check=check_against_reference, **options):
    seed = torch.full((), SEED, device=inputs["x"].device) if options.get("dropout_p") else None
    with nan_filled_empty():
        return check(
            lambda **kw: getattr(fastlm, op)(**kw, impl=impl),
            getattr(reference, op),
            inputs,
            seed=seed,
            **options,
        )


@pytest.mark.parametrize("impl", IN_EVERY_MODE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SMALL)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_norm_shapes(op, shape, dtype, impl, device):
    s = NORM_SMALL[shape]
    inputs = norm_inputs(op, s.rows, s.cols, dtype, device)
    if (shape, dtype) != ("one", torch.float32):
        run_oracle(op, impl, inputs)
        return
    # dx is what is left of a cancellation, about 0: on one draw the reference may be right by luck.
    draws = [norm_inputs(op, 1, 1, dtype, device, seed=8 * i) for i in range(64)]
    for draw in draws:  # no x near 0, whose rstd would outweigh all others
        draw["x"] += draw["x"].sign()
    run_oracle(op, impl, draws, check_over_draws)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_LARGE)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_norm_shapes_large(op, shape, dtype, impl, device):
    s = NORM_LARGE[shape]
    inputs = norm_inputs(op, s.rows, s.cols, dtype, device, residual=True)
    run_oracle(op, impl, inputs, dropout_p=0.1, prenorm=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "residual,dropout_p,prenorm", list(itertools.product([0, 1], [0.0, 0.3], [0, 1]))
)
@pytest.mark.parametrize("cols", [36, 8200])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_norm_options(op, cols, residual, dropout_p, prenorm, impl, device):
    inputs = norm_inputs(op, 5, cols, torch.float32, device, residual=bool(residual))
    run_oracle(op, impl, inputs, dropout_p=dropout_p, prenorm=bool(prenorm))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "residual,dropout_p,prenorm", list(itertools.product([0, 1], [0.0, 0.3], [0, 1]))
)
@pytest.mark.parametrize("casting", ["torch", "llama", "gemma"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_castings_with_options(
    dtype, casting, residual, dropout_p, prenorm, impl, device
):  # fmt: skip
    inputs = norm_inputs("rms_norm", 5, 36, dtype, device, residual=bool(residual))
    options = {"dropout_p": dropout_p, "prenorm": bool(prenorm), "casting": casting}
    run_oracle("rms_norm", impl, inputs, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("casting", ["torch", "llama", "gemma"])
def test_rms_norm_castings(casting, param_dtype, dtype, impl, device):
    inputs = norm_inputs("rms_norm", 6, 40, dtype, device, param_dtype=param_dtype)
    run_oracle("rms_norm", impl, inputs, casting=casting)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES, DTYPES)), ids=str)
def test_layer_norm_mixed_dtypes(dtypes, impl, device):
    x, param, residual = dtypes
    inputs = norm_inputs("layer_norm", 5, 24, x, device, param_dtype=param)
    inputs["residual"] = randn(5, 24, dtype=residual, device=device, seed=3)
    run_oracle("layer_norm", impl, inputs, prenorm=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_norm_without_weight_and_bias(impl, device):
    for op, names in (("layer_norm", ("weight", "bias")), ("rms_norm", ("weight",))):
        inputs = norm_inputs(op, 5, 24, torch.float32, device)
        run_oracle(op, impl, {**inputs, **dict.fromkeys(names)})
        if op == "layer_norm":
            run_oracle(op, impl, {**inputs, "bias": None})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cols", [48, 8200])
def test_layer_norm_mean_of_ten_thousand_deviations(cols, impl, device):
    inputs = norm_inputs("layer_norm", 3, cols, torch.float32, device)
    inputs["x"] = inputs["x"] + 1e4
    check_against_reference(
        lambda **kw: fastlm.layer_norm(**kw, impl=impl),
        lambda x, weight, bias: F.layer_norm(x, (cols,), weight, bias),
        inputs,
    )


def norm_with_gradients(op, inputs, dy, impl):
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    y = getattr(fastlm, op)(**leaves, impl=impl)
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True)
    )


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cols", [16, 1024, 16384])
def test_layer_norm_of_shifted_integers_is_bitwise_equal(cols, dtype, impl, device):
    """Sums of small integers and means over a power of two are exact, and so is what is left."""
    inputs = norm_inputs("layer_norm", 3, cols, dtype, device)
    inputs["x"] = inputs["x"].mul(4).round().clamp(-8, 8)
    dy = randn(3, cols, dtype=dtype, device=device, seed=4)
    expected = norm_with_gradients("layer_norm", inputs, dy, impl)
    for shift in (1, -32, 100):
        shifted = {**inputs, "x": inputs["x"] + shift}
        actual = norm_with_gradients("layer_norm", shifted, dy, impl)
        assert all(torch.equal(actual[n], expected[n]) for n in expected)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cols", [1, 37, 8208])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_norm_rows_are_independent(op, cols, dtype, impl, device):
    """A row has the same bits alone, and wherever it stands among others."""
    rows = 21
    inputs = norm_inputs(op, rows, cols, dtype, device, residual=True)
    dy = randn(rows, cols, dtype=dtype, device=device, seed=4)
    whole = norm_with_gradients(op, inputs, dy, impl)
    for some in (slice(0, 1), slice(20, 21), slice(5, 12)):
        part = {**inputs, **{n: inputs[n][some] for n in ("x", "residual")}}
        alone = norm_with_gradients(op, part, dy[some], impl)
        assert all(torch.equal(alone[n], whole[n][some]) for n in ("y", "x", "residual"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_reference_is_torch(dtype):
    i = norm_inputs("layer_norm", 9, 65, dtype, "cpu")
    gold = F.layer_norm(i["x"].double(), (65,), i["weight"].double(), i["bias"].double())
    torch_y = F.layer_norm(i["x"], (65,), i["weight"], i["bias"])
    assert_close("layer_norm", reference.layer_norm(**i), torch_y, gold)
    i.pop("bias")
    gold = F.rms_norm(i["x"].double(), (65,), i["weight"].double(), 1e-6)
    torch_y = F.rms_norm(i["x"], (65,), i["weight"], 1e-6)
    assert_close("rms_norm", reference.rms_norm(**i), torch_y, gold)


@pytest.mark.parametrize("shape", [(9, 65), (2100, 65), (301, 768)], ids=str)  # more go by chunks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("casting", ["llama", "gemma"])
def test_rms_norm_is_bitwise_hugging_face(casting, dtype, shape):
    if casting == "llama":
        from transformers.models.llama.modeling_llama import LlamaRMSNorm as Norm
    else:
        from transformers.models.gemma.modeling_gemma import GemmaRMSNorm as Norm
    module = Norm(shape[1]).to(dtype)
    module.weight.data.normal_()
    x = randn(*shape, dtype=dtype)
    y = fastlm.rms_norm(x, module.weight, eps=1e-6, casting=casting)
    assert torch.equal(y, module(x))


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("op,options", [
    ("layer_norm", {}), ("rms_norm", {}), ("rms_norm", {"casting": "gemma"}),
    ("rms_norm", {"casting": "llama"}),
])  # fmt: skip
def test_norm_gradcheck(op, options, prenorm):
    inputs = norm_inputs(op, 3, 5, torch.float64, "cpu", residual=True)
    names, tensors = zip(*inputs.items(), strict=True)
    seed = torch.tensor(SEED)
    fn = lambda *ts: getattr(reference, op)(
        **dict(zip(names, ts, strict=True)), dropout_p=0.4, seed=seed, prenorm=prenorm, **options
    )
    assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cols", [64, 300, 20000])
def test_rms_norm_of_what_overflows_when_squared_is_zero(cols, impl, device):
    x = torch.full((2, cols), 1e20, device=device, requires_grad=True)
    y = fastlm.rms_norm(x, impl=impl)
    assert not y.any() and not torch.autograd.grad(y.sum(), x)[0].any()


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["x", "residual", "dy"])
def test_layer_norm_layouts_are_bitwise_equal(what, layout, impl, device):
    inputs = norm_inputs("layer_norm", 6, 20, torch.float32, device, residual=True)
    inputs["dy"] = randn(6, 20, device=device, seed=4)
    if layout == "expanded":
        inputs[what] = inputs[what][:1].repeat(6, 1)

    def grads(values):
        dy = values.pop("dy")
        leaves = {n: t.detach().requires_grad_() for n, t in values.items()}
        y = fastlm.layer_norm(**leaves, impl=impl)
        return y, *torch.autograd.grad(y, list(leaves.values()), dy)

    expected = grads(dict(inputs))
    actual = grads({**inputs, what: with_layout(inputs[what], layout)})
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("impl", KERNELS)
def test_layer_norm_expanded_gradient_of_sum(impl, device):
    x = randn(6, 20, device=device).requires_grad_()
    fastlm.layer_norm(x, impl=impl).sum().backward()
    assert x.grad.abs().max() < 1e-5  # the sum of a normalised row does not move


@pytest.mark.parametrize("impl", KERNELS)
def test_layer_norm_twice_and_inputs_unmodified(impl, device):
    i = norm_inputs("layer_norm", 6, 20, torch.float32, device, residual=True)
    before = {n: t.clone() for n, t in i.items()}
    leaves = {n: t.requires_grad_() for n, t in i.items()}
    dy = randn(6, 20, device=device, seed=4)
    y = fastlm.layer_norm(**leaves, dropout_p=0.5, seed=SEED, impl=impl)
    first, second = (
        torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(leaves[n], before[n]) for n in before)
    assert torch.equal(dy, randn(6, 20, device=device, seed=4))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_layer_norm_empty_batch(shape, impl, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    y = fastlm.layer_norm(x, weight, residual=x, dropout_p=0.1, impl=impl)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and not weight.grad.any()


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "residual"])
def test_layer_norm_frozen_inputs(frozen, impl, device):
    inputs = norm_inputs("layer_norm", 5, 24, torch.float32, device, residual=True)
    check_against_reference(
        lambda **kw: fastlm.layer_norm(**kw, impl=impl),
        reference.layer_norm,
        inputs,
        frozen=(frozen,),
    )


@pytest.mark.parametrize("cols,kernels", [
    (24, ["norm_bwd_kernel"]), (8200, ["norm_bwd_wide_kernel", "norm_dweight_kernel"]),
    (8208, ["norm_bwd_parts_kernel"]),
])  # fmt: skip
@pytest.mark.parametrize("frozen", [(), ("bias",), ("x", "residual"), ("weight", "bias")], ids=str)
def test_layer_norm_launches(frozen, cols, kernels, device, launches):
    """The partial sums of both vectors end in one launch, and frozen ones cost none."""
    inputs = norm_inputs("layer_norm", 5, cols, torch.bfloat16, device, residual=True)
    leaves = [t.requires_grad_() for name, t in inputs.items() if name not in frozen]
    y = fastlm.layer_norm(**inputs, impl="triton")
    launches.clear()
    torch.autograd.grad(y, leaves, torch.ones_like(y))
    if cols == 8200:
        kernels = [k for k in kernels if ("x" if "wide" in k else "weight") not in frozen]
    assert launches == kernels + ["column_sum_kernel"] * ("weight" not in frozen)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("rows,cols", [(21, 8208), (21, 4096), (50, 48)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layer_norm_many_tiles(dtype, rows, cols, impl, device):
    """In the interpreter: programs and groups of several tiles each, the last ones without rows."""
    inputs = norm_inputs("layer_norm", rows, cols, dtype, device, residual=True)
    run_oracle("layer_norm", impl, inputs, prenorm=True)


@pytest.mark.parametrize("impl", KERNELS)
def test_rms_norm_wider_than_room_for_a_bias(impl, device):
    inputs = norm_inputs("rms_norm", 5, 12304, torch.bfloat16, device, residual=True)
    run_oracle("rms_norm", impl, inputs, prenorm=True)


# (pass, fields of its configuration): every loop and every kernel at 48 columns.
CONFIGURATIONS = [
    ("fwd", (4, 64, 4, 1, 1)), ("fwd", (4, 64, 4, 1, 3)), ("fwd", (1, 64, 4, 2, 2)),
    ("fwd", (1, 16, 4, 0, 2)),
    ("bwd", (4, 64, 4, 1, 1, True)), ("bwd", (4, 64, 4, 1, 3)), ("bwd", (1, 64, 4, 2, 2)),
    ("bwd", (1, 16, 4, 1, 1)), ("bwd", (1, 32, 4, 2, 2)),
    ("bwd", (1, 64, 4)), ("bwd", (1, 16, 4, 0, 2)),
]  # fmt: skip


@pytest.mark.parametrize("which,config", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_norm_configurations(op, dtype, which, config, device, monkeypatch):
    """Those of tables to come too, with several tiles a program, the last one without all rows."""
    module = {"fwd": norm, "bwd": norm_bwd}[which]
    asked = []

    def norm_config(asks, *call):
        asked.append(asks)
        return configs.NormConfig(*config)

    monkeypatch.setattr(module, "norm_config", norm_config)
    inputs = norm_inputs(op, 50, 48, dtype, device, residual=True)
    run_oracle(op, "triton", inputs, dropout_p=0.3, prenorm=True)
    run_oracle(op, "triton", norm_inputs(op, 50, 48, dtype, device))
    assert set(asked) == {which}


def test_norm_table_holds_where_registers_allow(monkeypatch):
    """What was found for a row of halves is not taken for calls with more in registers."""
    monkeypatch.setattr(configs, "target", lambda device: "sm_90")
    found = configs.NormConfig(1, 2048, 8, 1, 3)
    keys = [("sm_90", which, 2, 16384) for which in ("fwd", "bwd")]
    monkeypatch.setattr(configs, "_NORM", dict.fromkeys(keys, astuple(found)))
    ask = lambda *call: configs.norm_config.__wrapped__(*call, torch.device("cuda"))
    for which in ("fwd", "bwd"):
        assert ask(which, 12288, 2, True, False) == found
        assert ask(which, 16384, 2, False, False) == found
        for call in (
            (12288, 2, True, True), (12288, 4, True, False), (12296, 2, True, False),
            (16400, 2, True, False),
        ):  # fmt: skip
            assert ask(which, *call) != found
    assert ask("bwd", 12304, 2, True, False) != found


@pytest.mark.parametrize("impl", KERNELS)
def test_layer_norm_no_grad_saves_nothing(impl, device):
    inputs = norm_inputs("layer_norm", 5, 24, torch.float32, device, residual=True)
    inputs["x"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            y = fastlm.layer_norm(**inputs, impl=impl)
    assert not saved and not y.requires_grad


@pytest.mark.parametrize("impl", KERNELS)
def test_layer_norm_seed(impl, device):
    x = torch.ones(64, 32, device=device)
    masks = [
        fastlm.layer_norm(x, dropout_p=0.5, seed=s, prenorm=True, impl=by)[1]
        for s, by in ((1, "torch"), (1, impl), (2, impl))
    ]
    assert torch.equal(masks[0], masks[1])  # the same bits on every backend
    assert not torch.equal(masks[1], masks[2])
    torch.manual_seed(7)
    drawn = [fastlm.layer_norm(x, dropout_p=0.5, prenorm=True)[1] for _ in range(2)]
    torch.manual_seed(7)
    again = fastlm.layer_norm(x, dropout_p=0.5, prenorm=True)[1]
    assert torch.equal(drawn[0], again) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_layer_norm_compiles_fullgraph(dynamic, impl, device):
    i = norm_inputs("layer_norm", 6, 20, torch.float32, device, residual=True)
    leaves = [t.requires_grad_() for t in i.values()]

    def fn(x, weight, bias, residual):
        y, z = fastlm.layer_norm(
            x, weight, bias, residual=residual, dropout_p=0.25, seed=SEED, prenorm=True, impl=impl
        )
        return (y * z).sum()

    expected = torch.autograd.grad(fn(*leaves), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_norm_autocast_is_torchs(op, impl, device):
    """fp32 on CUDA, as torch's; elsewhere, where torch has no rule, the dtype of the sum."""
    x, weight = randn(4, 20, device=device), torch.ones(20, device=device, requires_grad=True)
    run = {
        "layer_norm": lambda x: F.layer_norm(x, (20,), weight),
        "rms_norm": lambda x: F.rms_norm(x, (20,), weight),
    }[op]
    with torch.autocast(device, dtype=torch.bfloat16):
        # Older versions of torch have the rule for layer_norm alone.
        ours = device == "cpu" or op == "layer_norm" or run(x.bfloat16()).dtype == torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(device, dtype=torch.bfloat16):
            y, z = getattr(fastlm, op)(x.to(dtype), weight, residual=x, prenorm=True, impl=impl)
            plain = getattr(fastlm, op)(x.to(dtype), weight, impl=impl)
            if ours:
                assert plain.dtype == run(x.to(dtype)).dtype and y.dtype == run(z).dtype
        assert plain.dtype == (dtype if device == "cpu" else torch.float32)
        assert y.dtype == z.dtype == torch.float32
        y.sum().backward()
        assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", KERNELS)
def test_norm_opcheck(impl, device):
    ops = {"triton": torch.ops.fastlm, "cuda": torch.ops.fastlm_cuda}[impl]
    x = randn(4, 20, device=device)
    seed = torch.full((), SEED, device=device)
    fwd = (x, x, x[0], x[1], seed, 1e-5, 0.5, "layer", torch.float32, True)
    torch.library.opcheck(ops.norm_fwd.default, fwd)
    y, z, mean, rstd = ops.norm_fwd(*fwd)
    f32 = torch.float32
    bwd = (y, None, z, x[0], mean, rstd, seed, 0.5, "layer", f32, f32, f32, None)
    torch.library.opcheck(ops.norm_bwd.default, bwd)


@pytest.mark.parametrize("impl", KERNELS)
def test_norm_rows_past_int32_offsets(impl, device):
    # Three rows 2**30 elements apart: the storage is committed lazily, three pages are touched.
    big = torch.empty(2**31 + 64, device=device, dtype=torch.float16)
    x = big.as_strided((3, 64), (2**30, 1))
    x.copy_(randn(3, 64))
    assert torch.equal(
        fastlm.layer_norm(x, impl=impl), fastlm.layer_norm(x.contiguous(), impl=impl)
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("compiles", [False, True])
def test_norm_of_frozen_inputs_has_a_frozen_sum(compiles, impl, device):
    """z depends on x and residual alone, y on the weight too."""
    inputs = norm_inputs("layer_norm", 3, 8, torch.float32, device, residual=True)
    run = lambda **kw: fastlm.layer_norm(**kw, prenorm=True, impl=impl)
    if compiles:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    for trained in ("weight", "residual", "x"):
        leaves = {n: t.detach().requires_grad_(n == trained) for n, t in inputs.items()}
        y, z = run(**leaves)
        assert y.requires_grad and z.requires_grad == (trained != "weight")
        (y + z).sum().backward()
        assert leaves[trained].grad is not None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows,cols", [(5, 24), (300, 40)])
def test_layer_norm_gradients_sum_to_zero(rows, cols, impl, device):
    """A shift of all columns changes nothing: in each row dx sums to 0, but for its rounding."""
    inputs = norm_inputs("layer_norm", rows, cols, torch.float32, device)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    y = fastlm.layer_norm(**leaves, impl=impl)
    (dx,) = torch.autograd.grad(y, leaves["x"], randn(rows, cols, device=device, seed=9))
    assert dx.abs().amax() > 0.1
    sums = dx.double().sum(-1).abs()
    assert (sums <= cols * torch.finfo(torch.float32).eps * dx.abs().amax(-1)).all()


EPS_ERRORS = [("1", "str"), (None, "NoneType"), (torch.tensor(1e-5), "Tensor"), (True, "bool"),
              (-1e-5, "-1e-05"), (float("nan"), "nan")]  # fmt: skip


@pytest.mark.parametrize("change,message", [
    ({"x": 1.0}, "layer_norm: x must be a tensor, got float"),
    ({"x": torch.ones(2, 8, dtype=torch.int32)},
     "layer_norm: x must have a floating-point dtype, got torch.int32"),
    ({"x": torch.ones(2, 0)},
     "layer_norm: x must have at least one column in its last dimension, got (2, 0)"),
    ({"weight": torch.ones(7)}, "layer_norm: weight must have shape (cols,) = (8,), got (7,)"),
    ({"bias": torch.ones(8, device="meta")},
     "layer_norm: bias must be on the device of the first input, cpu, got meta"),
    ({"residual": torch.ones(3, 8)},
     "layer_norm: residual must have shape of x = (2, 8), got (3, 8)"),
    ({"dropout_p": 1.5}, "layer_norm: dropout_p must be a number from 0 to 1, got 1.5"),
    ({"dropout_p": "a"}, "layer_norm: dropout_p must be a number from 0 to 1, got str"),
    *[({"eps": eps}, f"layer_norm: eps must be a number of at least 0, got {got}")
      for eps, got in EPS_ERRORS],
    ({"dropout_p": 0.5, "seed": 1.5},
     "layer_norm: seed must be an int or an int64 tensor of one element, got float"),
    ({"seed": "7"},  # where nothing is dropped, too
     "layer_norm: seed must be an int or an int64 tensor of one element, got str"),
    ({"seed": torch.zeros(2)},
     "layer_norm: seed must be an int or an int64 tensor of one element, got torch.float32 of "
     "shape (2,)"),
    ({"seed": 2**64}, f"layer_norm: seed must be a 64-bit integer, got {2**64}"),
    ({"impl": "fast"},
     "layer_norm: impl must be None, 'cuda', 'triton' or 'torch', got 'fast'"),
])  # fmt: skip
def test_layer_norm_errors(change, message):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=re.escape(message)):
        fastlm.layer_norm(**{"x": torch.ones(2, 8), **change})


@pytest.mark.parametrize("impl", KERNELS)
def test_norm_kernels_refuse_float64(impl, device):
    message = f"rms_norm: impl={impl!r} computes in fp32 and does not take a float64 weight; use"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        fastlm.rms_norm(randn(2, 8, device=device), torch.ones(8).double().to(device), impl=impl)


@pytest.mark.parametrize("eps,got", EPS_ERRORS)
def test_rms_norm_eps_errors(eps, got):
    message = f"rms_norm: eps must be a number of at least 0, got {got}"
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        fastlm.rms_norm(torch.ones(2, 8), eps=eps)


@pytest.mark.parametrize("impl", IMPLS)
def test_norm_takes_any_eps_from_0(impl, device):
    x = randn(3, 8, device=device)
    for eps in (0, 1, 3):
        for op in (fastlm.layer_norm, fastlm.rms_norm):
            assert torch.equal(op(x, eps=eps, impl=impl), op(x, eps=float(eps), impl=impl))


def test_rms_norm_casting_error():
    with pytest.raises(ValueError, match=re.escape(
        "rms_norm: casting must be one of 'torch', 'llama', 'gemma', got 'hf'"
    )):  # fmt: skip
        fastlm.rms_norm(torch.ones(2, 8), casting="hf")
