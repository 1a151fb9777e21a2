"""What layer_norm and rms_norm in CUDA C++ have that other backends have not: 16-byte accesses
where pointers, strides and widths allow them, rows in registers up to one width and in tiles beyond
it, rows that arrive in shared memory while others are worked on."""

import itertools

import pytest
import torch

import fastlm
from fastlm.reference import norm as reference
from fastlm.testing import assert_close, check_against_reference, nan_filled_empty, randn

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SEED = 0x1234_5678_9ABC_DEF0
# Widest rows of the kernels that have a row in registers, forward and backward.
FORWARD, BACKWARD = 16384, 8192
# Of a block in the host build; csrc/arch/device.cuh. It has three multiprocessors: with fewer rows,
# wide ones are split over blocks.
SHARED_BYTES = 65536

# name: rows, cols, dtypes of x and residual. Rows beyond the grid of the backward's blocks, several
# rows a warp and a block, blocks with several warps a row, and each kernel for each pair of dtypes.
CASES = {
    "lanes-1": (3300, 8, F32, F32),
    "lanes-2": (1700, 16, F16, F16),
    "lanes-32": (100, 256, BF16, BF16),
    "warps": (40, 1100, F16, F32),
    "mixed": (40, 1032, BF16, F32),
    "any-4": (5, 260, F32, F16),
    "any-8": (5, 265, F16, F16),
    "widest-backward": (13, BACKWARD, BF16, BF16),
    "wide-backward-kept": (3, BACKWARD + 8, F16, F16),
    "wide-backward-read-again": (2, SHARED_BYTES // 8 + 12, F32, F32),
    "wide-backward-any": (2, BACKWARD + 1, BF16, F16),
    "widest-forward": (2, FORWARD, F16, F16),
    "wide-kept": (3, FORWARD + 8, BF16, BF16),
    "wide-read-again": (3, FORWARD + 64, F32, F32),
    "wide-any-kept": (3, FORWARD - 1 + 2, F16, F16),
    "wide-any-read-again": (3, SHARED_BYTES // 2 + 9, BF16, F16),
    "split": (2, 2 * FORWARD + 8, BF16, BF16),
    "split-mixed": (1, 3 * FORWARD, F16, F32),
    "split-any": (1, FORWARD + 1, BF16, F16),
}  # fmt: skip
SANITIZED = ("lanes-2", "warps", "any-8", "wide-backward-kept", "wide-any-kept", "split-any")


def block_inputs(name, device):
    rows, cols, x, residual = CASES[name]
    return {
        "x": randn(rows, cols, dtype=x, device=device),
        "weight": randn(cols, dtype=x, device=device, seed=1),
        "bias": randn(cols, dtype=F32, device=device, seed=2),
        "residual": randn(rows, cols, dtype=residual, device=device, seed=3),
    }


def outputs_and_gradients(impl, inputs, op="layer_norm", dy=None, **options):
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    outputs = getattr(fastlm, op)(**leaves, impl=impl, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [randn(*y.shape, dtype=y.dtype, device=y.device, seed=7 + i)
                for i, y in enumerate(outputs)]  # fmt: skip
    incoming = incoming if dy is None else [dy]
    grads = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    return [*outputs, *grads]


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.sanitized if n in SANITIZED else ()) for n in CASES]
)
def test_norm_cuda_cases(name, impl, device):
    seed = torch.full((), SEED, device=device)
    with nan_filled_empty():
        check_against_reference(
            lambda **kw: fastlm.layer_norm(**kw, impl=impl),
            reference.layer_norm,
            block_inputs(name, device),
            dropout_p=0.3,
            seed=seed,
            prenorm=True,
        )


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("name", [n for n in CASES if "any" not in n])
def test_norm_cuda_bits_in_every_mode(name, impl, device):
    import simt_build

    rows, cols, *dtypes = CASES[name]
    inputs = block_inputs(name, device)
    results = []
    for mode in simt_build.MODES:
        simt_build.configure(*mode, seed=len(results))
        with nan_filled_empty():
            results.append(outputs_and_gradients(impl, inputs, dropout_p=0.3, seed=1, prenorm=True))
    assert all(all_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("cols", [
    *range(1, 10), 15, 16, 17, 31, 33, 63, 65, 127, 255, 257, 511, 513, 1023, 1025, 2047, 4097,
])  # fmt: skip
def test_norm_cuda_widths(cols, dtype, op, impl, device):
    inputs = {"x": randn(5, cols, dtype=dtype, device=device)}
    inputs["weight"] = randn(cols, dtype=dtype, device=device, seed=1)
    with nan_filled_empty():
        check_against_reference(
            lambda **kw: getattr(fastlm, op)(**kw, impl=impl), getattr(reference, op), inputs
        )


def misaligned(x):
    """The same values, one element past an aligned address."""
    storage = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].view(x.shape).copy_(x)


def padded(x):
    """The same values in rows that are an odd number of elements apart."""
    storage = torch.zeros(x.shape[0], x.shape[1] + 3, dtype=x.dtype, device=x.device)
    return storage[:, : x.shape[1]].copy_(x)


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("cols", [64, 1024, BACKWARD + 64, FORWARD + 64])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_norm_cuda_bits_do_not_depend_on_alignment(cols, dtype, impl, device):
    rows = 5 if cols <= 1024 else 2
    inputs = {
        "x": randn(rows, cols, dtype=dtype, device=device),
        "weight": randn(cols, dtype=dtype, device=device, seed=1),
        "bias": randn(cols, dtype=dtype, device=device, seed=2),
        "residual": randn(rows, cols, dtype=dtype, device=device, seed=3),
    }
    options = {"dy": randn(rows, cols, dtype=dtype, device=device, seed=4), "dropout_p": 0.3}
    expected = outputs_and_gradients(impl, inputs, seed=1, **options)
    for name, move in itertools.product([*inputs, "dy"], [misaligned, padded]):
        if name in ("weight", "bias") and move is padded:
            continue
        if name == "dy":
            changed = outputs_and_gradients(
                impl, inputs, seed=1, **{**options, "dy": move(options["dy"])}
            )
        else:
            moved = {**inputs, name: move(inputs[name])}
            changed = outputs_and_gradients(impl, moved, seed=1, **options)
        assert all_equal(expected, changed), (name, move.__name__)


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("cols", [7, 200, 1030, BACKWARD + 8, 2 * FORWARD + 100])
def test_norm_cuda_bits_of_a_row_do_not_depend_on_others(cols, impl, device):
    x, weight = randn(9, cols, device=device), randn(cols, device=device, seed=1)
    dy = randn(9, cols, device=device, seed=2)
    y, dx, _ = outputs_and_gradients(impl, {"x": x, "weight": weight}, dy=dy)
    for row in (0, 8):
        alone = outputs_and_gradients(
            impl, {"x": x[row : row + 1], "weight": weight}, dy=dy[row : row + 1]
        )
        assert all_equal((y[row : row + 1], dx[row : row + 1]), alone[:2])


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("dtypes", list(itertools.product([F32, F16, BF16], repeat=3)), ids=str)
def test_norm_cuda_mixed_dtypes_in_tiles(dtypes, impl, device):
    x, weight, residual = dtypes
    cols = FORWARD + 16
    inputs = {
        "x": randn(1, cols, dtype=x, device=device),
        "weight": randn(cols, dtype=weight, device=device, seed=1),
        "residual": randn(1, cols, dtype=residual, device=device, seed=3),
    }
    check_against_reference(
        lambda **kw: fastlm.rms_norm(**kw, impl=impl),
        reference.rms_norm,
        inputs,
        casting="llama",
        prenorm=True,
    )


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("cols", [40, FORWARD + 16])
def test_norm_cuda_mean_of_ten_thousand_deviations(cols, impl, device):
    x = randn(3, cols, device=device) + 1e4
    y = fastlm.layer_norm(x, impl=impl)
    same = torch.nn.functional.layer_norm(x, (cols,))
    assert_close("y", y, same, torch.nn.functional.layer_norm(x.double(), (cols,)))


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("cols", [64, BACKWARD + 64])
def test_norm_cuda_backward_past_int32_offsets(cols, impl, device):
    # Rows 2**30 elements apart: the storage is committed lazily, a page a row is touched.
    def far(x):
        big = torch.empty(2**31 + cols, device=device, dtype=F16)
        return big.as_strided((3, cols), (2**30, 1)).copy_(x)

    x, weight = randn(3, cols, dtype=F16, device=device), randn(cols, dtype=F16, device=device)
    dy = randn(3, cols, dtype=F16, device=device, seed=1)
    expected = outputs_and_gradients(impl, {"x": x, "weight": weight}, dy=dy)
    assert all_equal(
        outputs_and_gradients(impl, {"x": far(x), "weight": weight}, dy=far(dy)), expected
    )


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("cols", [4096, 12288, 20000])
def test_norm_cuda_repeats_bitwise_large(cols, impl, device):
    x, residual = (randn(4099, cols, dtype=BF16, device=device, seed=s) for s in (0, 1))
    weight = randn(cols, dtype=BF16, device=device, seed=2)
    inputs = {"x": x, "weight": weight, "residual": residual}
    run = lambda: outputs_and_gradients(impl, inputs, dropout_p=0.1, seed=1, prenorm=True)
    expected = run()
    assert all(all_equal(run(), expected) for _ in range(30))
