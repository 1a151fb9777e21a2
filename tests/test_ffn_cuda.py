"""bias_act and glu in CUDA C++: what their kernels do that Triton's do not, for any address, width
and order of threads. tests/test_ffn.py has the rest."""

import pytest
import torch

import fastlm
from fastlm.reference import ffn as reference
from fastlm.testing import check_against_reference, nan_filled_empty, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = list(reference.ACTIVATIONS)
SEED = 0x1234_5678_9ABC_DEF0

pytestmark = pytest.mark.parametrize("impl", ["cuda"])  # loads the host build


def bias_act_inputs(rows, cols, dtype, device, bias_dtype=None):
    return {
        "x": randn(rows, cols, dtype=dtype, device=device),
        "bias": randn(cols, dtype=bias_dtype or dtype, device=device, seed=1),
    }


def glu_inputs(rows, cols, dtype, device, up_dtype=None):
    return {
        "gate": randn(rows, cols, dtype=dtype, device=device),
        "up": randn(rows, cols, dtype=up_dtype or dtype, device=device, seed=1),
    }


def run_oracle(op, impl, inputs, **options):
    if options.get("dropout_p"):
        options["seed"] = torch.full((), SEED, device=next(iter(inputs.values())).device)
    with nan_filled_empty():
        check_against_reference(
            lambda **kw: getattr(fastlm, op)(**kw, impl=impl),
            getattr(reference, op),
            inputs,
            **options,
        )


def grads_of(op, inputs, impl, dy, **options):
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    y = getattr(fastlm, op)(**leaves, impl=impl, **options)
    return y, *torch.autograd.grad(y, list(leaves.values()), dy)


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# (op, inputs, options) for each kernel in each dtype: whole chunks, ragged ones, several dtypes.
def every_kernel(device):
    for dtype in DTYPES:
        for cols in (40, 41):
            inputs = bias_act_inputs(70, cols, dtype, device, torch.bfloat16)
            yield "bias_act", inputs, {"activation": "gelu", "dropout_p": 0.25}
            yield "glu", glu_inputs(70, cols, dtype, device), {"activation": "silu"}
    for cols in (40, 41):
        inputs = bias_act_inputs(5, cols, torch.float16, device, torch.float32)
        yield "bias_act", inputs, {"activation": "relu"}
        inputs = bias_act_inputs(5, cols, torch.float16, device)
        yield "bias_act", inputs, {"activation": "relu"}
        inputs = glu_inputs(70, cols, torch.bfloat16, device, torch.float32)
        yield "glu", inputs, {"activation": "gelu_tanh"}


@pytest.mark.sanitized
def test_every_kernel_in_every_mode(impl, device):
    for op, inputs, options in every_kernel(device):
        run_oracle(op, impl, inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 3, 4, 7, 8, 9, 16, 33, 255, 256, 257, 264, 520])
def test_widths(cols, dtype, impl, device):
    """Chunks, warps of chunks and tiles that are just full, and one column more or less."""
    for rows in (1, 67):
        inputs = bias_act_inputs(rows, cols, dtype, device)
        run_oracle("bias_act", impl, inputs, activation="silu", dropout_p=0.3)
        run_oracle("glu", impl, glu_inputs(rows, cols, dtype, device), activation="gelu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [8, 24, 300])
def test_dbias_over_more_rows_than_the_groups_hold_at_once(cols, dtype, impl, device):
    inputs = bias_act_inputs(1700, cols, dtype, device, torch.float32)
    run_oracle("bias_act", impl, inputs, activation="gelu")


def test_gradients_that_nobody_needs(impl, device):
    """All of the backward's results, against those that it gives when asked for one alone."""
    inputs = bias_act_inputs(70, 40, torch.float16, device)
    seed = torch.full((), SEED, device=device)
    dy = randn(70, 40, dtype=torch.float16, device=device, seed=2)
    run = lambda *need: torch.ops.fastlm_cuda.bias_act_bwd(
        dy, *inputs.values(), seed, "gelu", 0.25, *need
    )
    all_of = run(True, True, True)
    y = fastlm.bias_act(**inputs, activation="gelu", dropout_p=0.25, seed=SEED, impl=impl)
    assert torch.equal(all_of[2], y)
    glu = glu_inputs(70, 40, torch.float16, device, torch.float32)
    run_glu = lambda *need: torch.ops.fastlm_cuda.glu_bwd(dy.float(), *glu.values(), "gelu", *need)
    all_of_glu = run_glu(True, True, True)
    assert torch.equal(all_of_glu[2], fastlm.glu(**glu, activation="gelu", impl=impl))
    for i in range(3):
        need = [i == j for j in range(3)]
        for results, expected in ((run(*need), all_of), (run_glu(*need), all_of_glu)):
            assert torch.equal(results[i], expected[i])
            assert all(results[j].numel() == 0 for j in range(3) if j != i)


def test_dy_of_another_dtype_is_refused(impl, device):
    x, dy = torch.ones(2, 8, device=device), torch.ones(2, 8, device=device).half()
    with pytest.raises(RuntimeError, match="dy must have y's dtype"):
        torch.ops.fastlm_cuda.glu_bwd(dy, x, x, "gelu", True, True, False)


def test_results_may_be_written_to(impl, device):
    """Autograd forbids it for a view that an autograd function returns."""
    x = randn(3, 8, device=device).requires_grad_()
    for run in (
        lambda: fastlm.bias_act(x, activation="gelu", impl=impl),
        lambda: fastlm.glu(x, x, impl=impl),
    ):
        expected = torch.autograd.grad(run().mul(2).sum(), x)
        assert all_equal(torch.autograd.grad(run().mul_(2).sum(), x), expected)


def shifted(x, by):
    """x at an address that is `by` elements after an aligned one."""
    there = torch.empty(x.numel() + by, dtype=x.dtype, device=x.device)[by:].view(x.shape)
    return there.copy_(x)


def in_wider_rows(x, by):
    """The columns of x in rows that are `by` elements longer."""
    wide = torch.empty(*x.shape[:-1], x.shape[-1] + by, dtype=x.dtype, device=x.device)
    return wide[..., : x.shape[-1]].copy_(x)


@pytest.mark.sanitized
@pytest.mark.parametrize("by", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["bias_act", "glu", "glu_mixed"])
def test_addresses_change_no_bit(op, dtype, by, impl, device):
    options = {"activation": "gelu"}
    if op == "bias_act":
        inputs = bias_act_inputs(37, 48, dtype, device, torch.float32)
        options |= {"dropout_p": 0.25, "seed": SEED}
    else:
        other = torch.float16 if op == "glu_mixed" else dtype
        inputs = glu_inputs(37, 48, dtype, device, other)
        op = "glu"
    wide = torch.promote_types(dtype, inputs["up"].dtype) if op == "glu" else dtype
    inputs["dy"] = randn(37, 48, dtype=wide, device=device, seed=2)
    run = lambda dy, **inputs: grads_of(op, inputs, impl, dy, **options)
    expected = run(**inputs)
    for name in inputs:
        for move in (shifted, in_wider_rows):
            assert all_equal(run(**{**inputs, name: move(inputs[name], by)}), expected), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_number_of_16_bits(activation, dtype, impl, device):
    """Rounds to one of the two numbers nearest to fp64's result, and to what torch has for what is
    not finite; slopes too."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256).to(device)
    y, dx = grads_of("bias_act", {"x": x}, impl, torch.ones_like(x), activation=activation)
    gold, dgold = grads_of("bias_act", {"x": x.double()}, "torch", torch.ones_like(x).double(),
                           activation=activation)  # fmt: skip
    assert torch.equal(y.isnan(), gold.isnan())
    for actual, exact in ((y, gold), (dx, dgold)):
        expected = exact.to(dtype)
        finite = exact.isfinite() & expected.isfinite()
        assert torch.equal(actual[finite].isfinite(), torch.ones_like(actual[finite]).bool())
        apart = (ordinals(actual) - ordinals(expected))[finite].abs()
        # Slopes cross 0: there their error is that of 1.
        off = (actual.double() - exact).abs()[finite]
        tiny = torch.finfo(torch.float32).tiny
        assert ((apart <= 1) | (off <= 2e-7) | (off <= tiny)).all(), activation
        assert (apart != 0).double().mean() < 0.01


def ordinals(x):
    """Integers in the order of the 16-bit numbers: neighbours differ by 1."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


# As the reference's, but without its cancellation far below 0; and the exponent that each takes.
TANH = lambda z: (8 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
EXACT = {
    "gelu": (lambda z: 0.5 * z * torch.special.erfc(-z * 0.5**0.5), lambda z: z * z / 2),
    "gelu_tanh": (lambda z: z * torch.sigmoid(TANH(z)), TANH),
    "silu": (lambda z: z * torch.sigmoid(z), lambda z: z),
    "quick_gelu": (lambda z: z * torch.sigmoid(1.702 * z), lambda z: 1.702 * z),
}


@pytest.mark.parametrize("activation", EXACT)
def test_relative_error_in_fp32(activation, impl, device):
    """That of an exponential whose argument is rounded and which is no denormal. The exponential
    is of 2 units in the last place on a GPU, the reciprocal of 1 or 2."""
    x = torch.linspace(-12, 12, 4097, device=device).view(1, -1)
    y = fastlm.bias_act(x, activation=activation, impl=impl)
    fn, exponent = EXACT[activation]
    gold = fn(x.double())
    bound = 8e-7 * (1 + exponent(x.double()).abs()) * gold.abs()
    error = (y.double() - gold).abs()
    assert (error <= bound + torch.finfo(torch.float32).tiny * x.abs()).all()
