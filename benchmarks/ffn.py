"""Feed-forward: GELU with biases, gated SiLU; as blocks, and the activations alone.

Blocks of 16,384 tokens, with every way that fastlm's products can go: "fastlm-triton-cublas", one
elementwise kernel between the library's products; "fastlm-triton-epilogue", kernels of our own;
"fastlm-triton-cublaslt", the library's epilogue, which has tanh's GELU and ReLU, without gradients.
Over each block stands its floor: the products at the device's rate and, one after the other, what
each way moves beside them at that of a copy.
"""

import functools
import sys

import torch
import torch.nn.functional as F
from _bench import main, torch_compile

from fastlm import shapes
from fastlm.bench.cases import CASES, ffn_case, gated_case
from fastlm.bench.machine import ceilings
from fastlm.ops.ffn import ffn_by, gated_ffn_by

TOKENS = 16384
DIMS = (768, 1024, 2048, 4096)
# (way, operator) -> reads and writes of a hidden element: forward, backward.
MOVES = {
    ("cublas", "ffn"): (3, 5),
    ("epilogue", "ffn"): (2, 3),
    ("cublas", "gated_ffn"): (5, 7),
    ("epilogue", "gated_ffn"): (3, 5),
}


def way(name, case):
    """The products of fastlm's Triton backend, forced to go one way."""
    if "fastlm-triton" not in case.providers:
        raise NotImplementedError(case.unavailable.get("fastlm-triton", "no Triton backend"))
    if case.function == "ffn":
        lacks = case.differentiable or case.options["activation"] not in ("gelu_tanh", "relu")
        if name == "cublaslt" and lacks:
            raise NotImplementedError("tanh's GELU and ReLU, without gradients")
        options = {"dropout_p": 0.0, "seed": None, "recompute": False, **case.options}
        return functools.partial(ffn_by, name, impl="triton", **options)
    if case.function != "gated_ffn" or name == "cublaslt":
        raise NotImplementedError("blocks alone" if name != "cublaslt" else "no gated epilogue")
    return functools.partial(gated_ffn_by, name, impl="triton", recompute=False, **case.options)


def library(case):
    """torch's own call of cuBLASLt's epilogue."""
    gelu = case.options.get("activation") == "gelu_tanh"
    if case.function != "ffn" or case.differentiable or not gelu:
        raise NotImplementedError("tanh's GELU, without gradients")
    return lambda x, w1, b1, w2, b2: F.linear(
        torch._addmm_activation(b1, x, w1.t(), use_gelu=True), w2, b2
    )


def liger(case):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    if case.function == "glu":
        return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)
    if case.function != "gated_ffn":
        raise NotImplementedError("gated activations only")
    return lambda x, w_gate, w_up, w_down: F.linear(
        LigerSiLUMulFunction.apply(F.linear(x, w_gate), F.linear(x, w_up)), w_down
    )


PEERS = {
    "fastlm-triton-cublas": functools.partial(way, "cublas"),
    "fastlm-triton-epilogue": functools.partial(way, "epilogue"),
    "fastlm-triton-cublaslt": functools.partial(way, "cublaslt"),
    "torch.compile": torch_compile,
    "cublaslt": library,
    "liger": liger,
}


def grid(device: torch.device, dtype: torch.dtype):
    """Blocks on a GPU, then what `fastlm bench` has."""
    for dim in DIMS if device.type == "cuda" else ():
        wide = shapes.FfnShape(TOKENS, dim, 4 * dim)
        gated = shapes.FfnShape(TOKENS, dim, -(-8 * dim // 3 // 256) * 256)
        for variant, make, s, *call in (
            ("gelu", ffn_case, wide, "gelu", device, dtype),
            ("gelu_infer", ffn_case, wide, "gelu", device, dtype, True),
            ("gelu_tanh_infer", ffn_case, wide, "gelu_tanh", device, dtype, True),
            ("gated_silu", gated_case, gated, "silu", device, dtype),
        ):
            name = f"dim_{dim}"
            yield f"{name}/{variant}", functools.partial(_with_floor, make, name, s, *call)
    for case in CASES["ffn"](device, dtype, False):
        yield case.shape, lambda case=case: case


def _with_floor(make, name, s, activation, device, dtype, *infer):
    case = make(name, s, activation, device, dtype, *infer)
    print(*floors(case, s, ceilings(device, dtype)), sep="\n")
    return case


def floors(case, s, ceiling) -> list[str]:
    """What the products take, and what each way moves beside them, in milliseconds."""
    element = s.rows * s.hidden_dim * case.dtype.itemsize
    lines = []
    for part, index in (("forward", 0), ("backward", 1)) if case.differentiable else ():
        products = case.work.of(part) / ceiling.tflops / 1e9
        moved = ", ".join(
            f"{name} {moves[index] * element / ceiling.gbytes / 1e6:.3f}"
            for (name, op), moves in MOVES.items()
            if op == case.function
        )
        lines.append(f"floor of {case.shape} {part}: products {products:.3f} ms; beside: {moved}")
    return lines


if __name__ == "__main__":
    sys.exit(main("ffn", __doc__, PEERS, grid, seconds=0.2))
