"""The feed-forward's benchmark: its ways, its floors, the sweep of its products' configurations."""

import pytest
import torch
from benching import CPU, SCRIPTS, load, run_quickly, small_shapes  # noqa: F401

from fastlm import shapes
from fastlm.bench.cases import ffn_case, gated_case
from fastlm.bench.machine import Ceilings

SHAPE = shapes.FfnShape(24, 16, 40)
WAYS = ["cublas", "epilogue", "cublaslt"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return load("ffn")


def cases():
    yield "gelu", ffn_case("a", SHAPE, "gelu", CPU, torch.float16)
    yield "relu_infer", ffn_case("a", SHAPE, "relu", CPU, torch.float16, True)
    yield "gated_silu", gated_case("a", SHAPE, "silu", CPU, torch.float16)


@pytest.mark.parametrize("name, case", cases())
def test_ways_pass_the_check(name, case, script):
    assert case.shape.split("/")[1].split(" ")[0] == name
    case.providers["fastlm-triton"] = None  # as where there is a GPU
    made, refused = {}, []
    for way in WAYS:
        try:
            made[f"fastlm-triton-{way}"] = script.way(way, case)
        except NotImplementedError:
            refused.append(way)
    assert refused == ([] if name == "relu_infer" else ["cublaslt"])
    case.providers.clear()
    case.providers.update(made)
    rows, failed = run_quickly(case, directions=["forward", "forward+backward"])
    assert failed == {}
    assert len(rows) == len(made) * (1 if name == "relu_infer" else 2)


def test_ways_need_the_triton_backend(script):
    case = ffn_case("a", SHAPE, "gelu", CPU, torch.float16)
    with pytest.raises(NotImplementedError, match="its kernels run on a GPU"):
        script.way("epilogue", case)


def test_grid_of_a_gpu(script, monkeypatch):
    """Names alone: nothing of a GPU's size is made."""
    monkeypatch.setitem(script.CASES, "ffn", lambda *_: ())
    names = [name for name, _ in script.grid(torch.device("cuda"), torch.bfloat16)]
    assert len(names) == len(set(names)) == 16
    assert "dim_768/gelu" in names and "dim_4096/gated_silu" in names
    assert list(script.grid(CPU, torch.float32)) == []


def test_floors_count_what_each_way_moves(script):
    ceiling = Ceilings(tflops=1e-9, gbytes=1e-6)  # an operation, and a byte, take a millisecond
    (_, ffn), (_, infer), (_, gated) = cases()
    assert script.floors(infer, SHAPE, ceiling) == []
    hidden = 24 * 40 * 2
    for case, moves, products in ((ffn, ((3, 2), (5, 3)), 2), (gated, ((5, 3), (7, 5)), 3)):
        forward, backward = script.floors(case, SHAPE, ceiling)
        for line, (cublas, epilogue), passes in zip(
            (forward, backward), moves, (1, 2), strict=True
        ):
            flops = 2 * 24 * 16 * 40 * products * passes
            assert f"products {flops:.3f} ms" in line
            assert f"cublas {cublas * hidden:.3f}, epilogue {epilogue * hidden:.3f}" in line
