"""What only a GPU shows of the kernels in CUDA C++: the same bits 30 times, CUDA graphs, other
streams and devices. Real sizes are in the operators' own tests."""

import pytest
import torch

import fastlm
from fastlm.testing import randn

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
DROPOUT = {"dropout_p": 0.1, "seed": 7}


def bf16(device, *shapes):
    return [randn(*shape, dtype=BF16, device=device, seed=i) for i, shape in enumerate(shapes)]


def attention(headdim):
    def case(device, **options):
        leaves = bf16(device, *((2, 1000, heads, headdim) for heads in (4, 2, 2)))
        return leaves, lambda *x: fastlm.attention(*x, causal=True, impl="cuda", **options)

    return case


def packed_attention(device, **options):
    leaves = bf16(device, *((2000, heads, 64) for heads in (4, 2, 2)))
    ends = torch.tensor([0, 700, 730, 2000], dtype=torch.int32, device=device)
    return leaves, lambda *x: fastlm.attention_varlen(
        *x, ends, ends, 1270, 1270, causal=True, impl="cuda", **options
    )


def norm(name, rows, cols):
    """With a residual; LayerNorm also with a bias."""

    def case(device, **options):
        vectors = [(cols,)] * (1 + (name == "layer_norm"))
        leaves = bf16(device, (rows, cols), (rows, cols), *vectors)
        call = getattr(fastlm, name)
        return leaves, lambda x, r, *v: call(x, *v, residual=r, impl="cuda", **options)

    return case


def bias_act(device, **options):
    leaves = bf16(device, (4096, 1024), (1024,))
    return leaves, lambda *x: fastlm.bias_act(*x, activation="gelu", impl="cuda", **options)


def glu(device):
    leaves = bf16(device, (4096, 1024), (4096, 1024))
    return leaves, lambda *x: fastlm.glu(*x, impl="cuda")


# One for each path of a family: head dims with other tiles, rows that a block has whole, wide rows,
# and few rows so wide that several blocks share each.
DROPPING = {
    "attention_64": attention(64), "attention_128": attention(128),
    "attention_256": attention(256), "attention_varlen": packed_attention,
    "layer_norm": norm("layer_norm", 4096, 1024), "rms_norm": norm("rms_norm", 4096, 1024),
    "wide": norm("layer_norm", 300, 40_000), "split": norm("rms_norm", 3, 262_144),
    "bias_act": bias_act,
}  # fmt: skip
CASES = DROPPING | {"glu": glu}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
RUNS = [pytest.param(case, {}, id=name) for name, case in CASES.items()]
RUNS += [pytest.param(case, DROPOUT, id=f"{name}-dropout") for name, case in DROPPING.items()]


def results(case, device, **options):
    """() -> outputs and gradients, on fixed inputs."""
    leaves, call = case(device, **options)
    leaves = [x.requires_grad_() for x in leaves]

    def run():
        out = call(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def assert_same_bits(a, b):
    assert all(torch.equal(x, y.to(x.device)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case,options", RUNS)
def test_the_same_bits_30_times(case, options, device):
    run = results(case, device, **options)
    expected = run()
    for _ in range(30):
        assert_same_bits(run(), expected)


@EVERY
def test_in_a_cuda_graph(case, device):
    run = results(case, device)
    expected = run()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in captured:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, expected)


@EVERY
def test_on_a_second_stream(case, device):
    run = results(case, device)
    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = run()
    stream.synchronize()
    assert_same_bits(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
@EVERY
def test_on_a_second_device(case, device):
    expected = results(case, "cuda:0")()
    actual = results(case, "cuda:1")()  # the current device stays the first
    assert all(x.device.index == 1 for x in actual)
    assert_same_bits(expected, actual)
