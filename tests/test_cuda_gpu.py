"""What only a GPU shows of the kernels in CUDA C++: the same bits 30 times, CUDA graphs, other
streams and devices. Real sizes are in the operators' own tests."""

import pytest
import torch

import fastlm
from fastlm.testing import randn

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
DROPOUT = {"dropout_p": 0.1, "seed": 7}


def attention(device, **options):
    leaves = [randn(2, 1000, heads, 128, dtype=BF16, device=device, seed=i) for i, heads in
              enumerate((4, 2, 2))]  # fmt: skip
    return leaves, lambda *x: fastlm.attention(*x, causal=True, impl="cuda", **options)


def layer_norm(device, **options):
    leaves = [randn(*shape, dtype=BF16, device=device, seed=i) for i, shape in
              enumerate(((4096, 1024), (1024,), (1024,)))]  # fmt: skip
    return leaves, lambda *x: fastlm.layer_norm(*x, impl="cuda", **options)


def bias_act(device, **options):
    leaves = [randn(4096, 1024, dtype=BF16, device=device), randn(1024, dtype=BF16, device=device)]
    return leaves, lambda *x: fastlm.bias_act(*x, activation="gelu", impl="cuda", **options)


OPS = [attention, layer_norm, bias_act]


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


@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("case", OPS)
def test_the_same_bits_30_times(case, options, device):
    run = results(case, device, **options)
    expected = run()
    for _ in range(30):
        assert_same_bits(run(), expected)


@pytest.mark.parametrize("case", OPS)
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


@pytest.mark.parametrize("case", OPS)
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
@pytest.mark.parametrize("case", OPS)
def test_on_a_second_device(case, device):
    expected = results(case, "cuda:0")()
    actual = results(case, "cuda:1")()  # the current device stays the first
    assert all(x.device.index == 1 for x in actual)
    assert_same_bits(expected, actual)
