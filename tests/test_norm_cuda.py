"""What layer_norm and rms_norm in CUDA C++ have that other backends have not: 16-byte accesses
where pointers, strides and widths allow them, rows that one block has whole up to one width and in
tiles beyond it, rows that arrive in shared memory while others are worked on."""

import itertools

import pytest
import torch

import fastlm
from fastlm.reference import norm as reference
from fastlm.testing import assert_close, check_against_reference, nan_filled_empty, randn

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SEED = 0x1234_5678_9ABC_DEF0
WIDEST = 16384  # columns of rows that a block has whole, shared memory permitting
# Of a block in the host build, which has three multiprocessors: with fewer rows, wide ones are
# split over blocks. LITTLE has no room for the widest rows, nor for many on their way.
FULL, LITTLE = 227 * 1024, 64 * 1024

# name: rows, cols, dtypes of x and residual, shared memory. Rows for several turns of every place
# in shared memory, and fewer than there are places; several rows a warp and a block, blocks with
# several warps a row, as many as there may be; and each kernel for each pair of dtypes.
CASES = {
    "lanes-1": (3300, 8, F32, F32, FULL),
    "lanes-2": (1700, 16, F16, F16, FULL),
    "lanes-8": (170, 64, BF16, F32, FULL),
    "lanes-16": (100, 320, BF16, BF16, FULL),
    "lanes-16-full": (3, 512, F16, F16, FULL),
    "warp": (250, 768, BF16, BF16, FULL),
    "warp-full": (50, 1024, F16, F16, FULL),
    "warps": (40, 1100, F16, F32, FULL),
    "mixed": (40, 1032, BF16, F32, FULL),
    "three-warps": (13, 2600, F32, F32, FULL),
    "any-4": (5, 260, F32, F16, FULL),
    "any-8": (5, 265, F16, F16, FULL),
    "any-warps": (7, 3001, BF16, BF16, FULL),
    "little-turns": (31, 2048, BF16, BF16, LITTLE),
    "little-one-place": (7, 4096, F32, F32, LITTLE),
    "twelve-warps": (10, 12288, BF16, BF16, FULL),
    "widest": (7, WIDEST, F16, F16, FULL),
    "widest-mixed": (4, WIDEST, BF16, F32, FULL),
    "widest-any": (4, WIDEST - 1, F16, F16, FULL),
    "wide-backward-kept": (3, 8200, F16, F16, LITTLE),
    "wide-backward-read-again": (2, LITTLE // 8 + 12, F32, F32, LITTLE),
    "wide-backward-any": (2, 8193, BF16, F16, LITTLE),
    "wide-kept": (3, WIDEST + 8, BF16, BF16, LITTLE),
    "wide-read-again": (3, WIDEST + 64, F32, F32, LITTLE),
    "wide-mixed-kept": (4, WIDEST + 4, BF16, F32, FULL),  # vectors of 8 and 16 bytes, an odd number
    "wide-any-kept": (3, WIDEST - 1 + 2, F16, F16, LITTLE),
    "wide-any-read-again": (3, LITTLE // 2 + 9, BF16, F16, LITTLE),
    "split": (2, 2 * WIDEST + 8, BF16, BF16, FULL),
    "split-mixed": (1, 3 * WIDEST, F16, F32, FULL),
    "split-any": (1, WIDEST + 1, BF16, F16, FULL),
}  # fmt: skip
SANITIZED = (
    "lanes-2", "warps", "any-8", "little-turns", "wide-backward-kept", "wide-mixed-kept",
    "wide-any-kept", "split-any",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _shared_memory(request):
    """Of the case that the test runs, in the host build."""
    callspec = getattr(request.node, "callspec", None)
    name = callspec.params.get("name") if callspec else None
    shared = FULL if name is None else CASES[name][4]
    if torch.cuda.is_available() or shared == FULL:
        yield
        return
    import simt_build

    simt_build.device(shared)
    yield
    simt_build.device(FULL)


def block_inputs(name, device):
    rows, cols, x, residual, _ = CASES[name]
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


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("cols", [64, 768, 1024, 4096, 12288, WIDEST])
def test_norm_cuda_copies_each_element_once(cols, impl, device):
    import simt_build

    rows, bytes_ = 7, 2
    x, residual, dy, dz = (randn(rows, cols, dtype=BF16, device=device, seed=s) for s in range(4))
    weight = randn(cols, dtype=BF16, device=device, seed=4)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    simt_build.copied()
    y, z = fastlm.layer_norm(x, weight, residual=residual, prenorm=True, impl=impl)
    assert simt_build.copied() == 2 * rows * cols * bytes_, "x and residual"
    torch.autograd.grad((y, z), leaves, (dy, dz))
    assert simt_build.copied() == 3 * rows * cols * bytes_, "dy, z and dz"


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["cuda"])
def test_norm_cuda_wide_rows_arrive_ahead(impl, device):
    import simt_build

    rows, cols = 4, 5 * 8192 + 8
    x, weight = (randn(n, cols, dtype=BF16, device=device, seed=n) for n in (rows, 1))
    expected = fastlm.layer_norm(misaligned(x), weight[0], impl=impl)
    for mode in itertools.product(simt_build.COPIES, ["first", "last"]):
        simt_build.configure(*mode)
        simt_build.copied()
        assert torch.equal(fastlm.layer_norm(x, weight[0], impl=impl), expected), mode
        assert simt_build.copied() == rows * cols * 2


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize(("dtype", "cols"), [(BF16, 5 * 4096 + 8), (F32, WIDEST + 4)], ids=str)
def test_norm_cuda_wide_rows_of_the_backward_arrive_ahead(cols, dtype, impl, device):
    import simt_build

    rows = 7  # of which each of the three blocks has some in turn
    x, dy = (randn(rows, cols, dtype=dtype, device=device, seed=s).requires_grad_() for s in (1, 2))
    weight = randn(cols, dtype=dtype, device=device, seed=3).requires_grad_()
    y = fastlm.layer_norm(x, weight, impl=impl)
    expected = torch.autograd.grad(y, (x, weight), misaligned(dy), retain_graph=True)
    for mode in simt_build.MODES:
        simt_build.configure(*mode, seed=1)
        simt_build.copied()
        with nan_filled_empty():
            grads = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
        assert all_equal(grads, expected), mode
        assert simt_build.copied() == 2 * rows * cols * dtype.itemsize, "dy and z"


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("cols", [40, 768, 1030])
def test_norm_cuda_floats_from_halves(cols, dtype, impl, device):
    """y and so dy in fp32, x in half: what autocast has on a GPU."""
    inputs = {"x": randn(50, cols, dtype=dtype, device=device)}
    inputs["weight"] = randn(cols, dtype=F32, device=device, seed=1)
    check_against_reference(
        lambda **kw: fastlm.rms_norm(**kw, impl=impl), reference.rms_norm, inputs, casting="llama"
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("cols", [40, 768, 4100])
def test_norm_cuda_halves_added_to_a_sum_of_floats_under_autocast(cols, dtype, impl, device):
    """y and dy, z and dz are fp32 there and dx is not: rows arrive ahead, as others do."""
    import simt_build

    rows = 9
    x = randn(rows, cols, dtype=dtype, device=device).requires_grad_()
    residual = randn(rows, cols, device=device, seed=1).requires_grad_()
    weight = randn(cols, device=device, seed=2).requires_grad_()
    with torch.autocast(device, dtype=BF16):
        y = fastlm.layer_norm(x, weight, residual=residual, dropout_p=0.3, seed=1, impl=impl)
    assert y.dtype == F32
    dy = randn(rows, cols, device=device, seed=3)
    simt_build.copied()
    grads = torch.autograd.grad(y, (x, residual, weight), dy, retain_graph=True)
    assert simt_build.copied() == 2 * rows * cols * 4, "dy and z"
    assert [g.dtype for g in grads] == [dtype, F32, F32]
    assert all_equal(grads, torch.autograd.grad(y, (x, residual, weight), misaligned(dy)))


def misaligned(x):
    """The same values, one element past an aligned address."""
    storage = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].view(x.shape).copy_(x)


def padded(x):
    """The same values in rows that are an odd number of elements apart."""
    storage = torch.zeros(x.shape[0], x.shape[1] + 3, dtype=x.dtype, device=x.device)
    return storage[:, : x.shape[1]].copy_(x)


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("cols", [64, 1024, 8192 + 64, WIDEST + 64])
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
@pytest.mark.parametrize("cols", [7, 200, 1030, 8200, 2 * WIDEST + 100])
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
    cols = WIDEST + 16
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
@pytest.mark.parametrize("cols", [40, WIDEST + 16])
def test_norm_cuda_mean_of_ten_thousand_deviations(cols, impl, device):
    x = randn(3, cols, device=device) + 1e4
    y = fastlm.layer_norm(x, impl=impl)
    same = torch.nn.functional.layer_norm(x, (cols,))
    assert_close("y", y, same, torch.nn.functional.layer_norm(x.double(), (cols,)))


@pytest.mark.parametrize("impl", ["cuda"])
@pytest.mark.parametrize("cols", [64, 8192 + 64, WIDEST + 64, 5 * WIDEST])
def test_norm_cuda_past_int32_offsets(cols, impl, device):
    # Rows 2**30 elements apart: the storage is committed lazily, a page a row is touched.
    def far(x):
        big = torch.empty(2**31 + cols, device=device, dtype=F16)
        return big.as_strided((3, cols), (2**30, 1)).copy_(x)

    x, dy, residual = (randn(3, cols, dtype=F16, device=device, seed=i) for i in range(3))
    weight = randn(cols, dtype=F16, device=device)
    for rows in ({"x": x}, {"x": x, "residual": residual}):
        distant = {name: far(t) for name, t in rows.items()}
        expected = outputs_and_gradients(impl, {**rows, "weight": weight}, dy=dy)
        actual = outputs_and_gradients(impl, {**distant, "weight": weight}, dy=far(dy))
        assert all_equal(actual, expected)


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
