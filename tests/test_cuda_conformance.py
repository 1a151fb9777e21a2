"""The wrappers of csrc/arch: each alone, on random bits.

The kernels are tested on the CPU with the wrappers' host bodies, so a mistake that a kernel and a
host body share would pass. Here the host bodies are compared with definitions of their own, from
the tables of the PTX ISA; and on a machine with a GPU the device bodies with the host bodies.
"""

import ctypes
import os
import re
import subprocess

import cuda_gate
import numpy as np
import pytest
import simt_build
import torch

from fastlm.reference.dropout import philox

SOURCE = simt_build.SIMT / "conformance.cu"
WRAPPERS = ["shuffles", "copies", "ldmatrix", "ldmatrix_trans", "mma_fp16", "mma_bf16", "exp2",
            "reciprocal", "conversions", "philox", "ring_copies"]  # fmt: skip
ULPS = {"exp2": 2, "reciprocal": 1}
INEXACT = {"mma_fp16", "mma_bf16", *ULPS}
# Finite in fp16, beyond it, or halfway between two of fp16 or bf16; subnormal in fp16.
CONVERTED = [0.0, -0.0, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 65504.0, 65519.996,
             65520.0, -1e38, 3.4e38, np.inf, -np.inf, np.nan, 2**-24, 2**-25, 3 * 2**-25, -1e-8,
             1e-40]  # fmt: skip
EXPONENTS = [0.0, -0.0, -np.inf, np.inf, np.nan, -200.0, 200.0, 1e-30, 1e-40, 127.5, 128.0, -126.0,
             -126.5, -149.0]  # fmt: skip
DIVISORS = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 1.18e-38, 3e38, -3e38, 1.0, 3.0,
            2.0**126, -(2.0**127), 1.9999999]  # fmt: skip
NVCC_FLAGS = ["-std=c++17", "-Werror", "all-warnings", f"-I{simt_build.ROOT / 'csrc'}"]


def inputs(name: str, seed: int) -> np.ndarray:
    """512 words that make sense to a wrapper."""
    random = np.random.default_rng(seed)
    if name.startswith("mma"):
        # 6 words of two 16-bit numbers, 4 of fp32, 6 unused, for each lane. Even seeds: integers,
        # whose sums are exact in whatever order.
        draw = random.standard_normal
        if seed % 2 == 0:
            draw = lambda shape: random.integers(-64, 65, shape)
        dtype = torch.float16 if name == "mma_fp16" else torch.bfloat16
        factors = torch.from_numpy(draw((32, 12)).astype(np.float64)).to(dtype).view(torch.int16)
        words = np.zeros((32, 16), np.uint32)
        words[:, :6] = factors.numpy().view(np.uint32)
        words[:, 6:10] = draw((32, 4)).astype(np.float32).view(np.uint32)
        return words.ravel()
    special = {"exp2": EXPONENTS, "reciprocal": DIVISORS, "conversions": CONVERTED, "shuffles": []}
    if name in special:
        special, scale = special[name], {"exp2": 25, "conversions": 2000}.get(name, 1)
        x = (random.standard_normal(512) * scale).astype(np.float32)
        # Only every other group of four is converted.
        places = [i for i in range(256) if name != "conversions" or i % 8 < 4]
        x[places[: len(special)]] = np.array(special, np.float32)
        return x.view(np.uint32)
    return random.integers(0, 2**32, 512, dtype=np.uint32)


def halves(words: np.ndarray, name: str) -> np.ndarray:
    """fp64 of pairs of 16-bit numbers, (..., words * 2)."""
    dtype = torch.bfloat16 if "bf16" in name else torch.float16
    bits = torch.from_numpy(np.ascontiguousarray(words).view(np.int16))
    return bits.view(dtype).double().numpy()


def operands(name: str, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a (16, 16), b (16, 8) and the accumulators (16, 8) of an mma in fp64: the ISA's figures of
    fragments of mma.m16n8k16, by the index of an element in its lane."""
    lanes = words.reshape(32, 16)
    numbers = halves(lanes[:, :6], name).reshape(32, 12)
    a, b, d = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for i in range(8):  # a0 .. a7
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            a[row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)] = numbers[lane, i]
        for i in range(4):  # b0 .. b3
            b[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group] = numbers[lane, 8 + i]
        for i in range(4):  # c0 .. c3
            row = group if i < 2 else group + 8
            d[row, thread * 2 + (i & 1)] = lanes[lane].view(np.float32)[6 + i]
    return a, b, d


def accumulators(d: np.ndarray) -> np.ndarray:
    """(32 lanes, 4) of a (16, 8)."""
    lanes = [divmod(lane, 4) for lane in range(32)]
    rows = [[g, g, g + 8, g + 8] for g, _ in lanes]
    columns = [[2 * t, 2 * t + 1, 2 * t, 2 * t + 1] for _, t in lanes]
    return d[rows, columns]


def definition(name: str, words: np.ndarray) -> np.ndarray:
    """What a wrapper gives, (32 lanes, 8 words), from the PTX ISA and not from csrc/arch."""
    out = np.zeros((32, 8), np.uint32)
    if name == "shuffles":
        x, lanes = words[:32], np.arange(32)
        for i in range(5):
            out[:, i] = x[lanes ^ (1 << i)]
        out[:, 5] = x[(lanes * 7 + 3) % 32]
        out[:, 6] = x.view(np.float32).max(keepdims=True).view(np.uint32)
        total = x.view(np.float32)
        for i in (16, 8, 4, 2, 1):
            total = total + total[lanes ^ i]
        out[:, 7] = total.view(np.uint32)
    elif name == "copies":
        pieces = words[:128].reshape(32, 4)
        out[:, :4] = pieces[(np.arange(32) + 5) % 32]
        landed = np.where((np.arange(32) % 3 != 0)[:, None], pieces, 0)
        out[:, 4:] = landed[::-1]
        out[:, 6] ^= pieces[::-1, 0]
        out[:, 7] ^= pieces[::-1, 3]
    elif name == "ring_copies":
        out[:, :4] = words[:128].reshape(32, 4)[::-1]
        out[:, 4:6] = words[:64].reshape(32, 2)[(np.arange(32) + 7) % 32][::-1]
    elif name.startswith("ldmatrix"):
        # Thread l gives row l % 8 of matrix l / 8, and gets elements 2 (l % 4), +1 of row l / 4.
        rows = words[:128].reshape(32, 4)[(np.arange(32) * 5 + 2) % 32]
        matrices = rows.view(np.uint16).reshape(4, 8, 8)
        if name.endswith("trans"):
            matrices = matrices.transpose(0, 2, 1)
        for lane in range(32):
            pair = matrices[:, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            out[lane, :4] = np.ascontiguousarray(pair).view(np.uint32).ravel()
    elif name.startswith("mma"):
        a, b, d = operands(name, words)
        out[:, :4] = accumulators((d + a @ b).astype(np.float32)).view(np.uint32)
    elif name == "exp2":
        x = words[:256].view(np.float32).astype(np.float64)
        with np.errstate(over="ignore"):
            y = np.exp2(x).astype(np.float32)
        out = np.where(y < np.finfo(np.float32).tiny, np.float32(0), y).view(np.uint32)
    elif name == "reciprocal":
        x, tiny = words[:256].view(np.float32).astype(np.float64), np.finfo(np.float32).tiny
        with np.errstate(divide="ignore"):
            y = (1 / np.where(np.abs(x) < tiny, np.copysign(0, x), x)).astype(np.float32)
        out = np.where(np.abs(y) < tiny, np.copysign(0, y), y).view(np.uint32)
    elif name == "conversions":
        x = torch.from_numpy(words[:256].view(np.float32).reshape(32, 8)[:, :4].copy())
        both = torch.stack([x.half().float(), x.bfloat16().float()], -1)
        out = both.reshape(32, 8).numpy().view(np.uint32)
    else:
        key0, key1, *counter = torch.from_numpy(words[:192].reshape(32, 6).astype(np.int64)).T
        out[:, :4] = torch.stack(philox(*counter, key0, key1), -1).numpy().astype(np.uint32)
    return out.reshape(32, 8)


def assert_conforms(name: str, actual: np.ndarray, expected: np.ndarray, words: np.ndarray):
    if name == "conversions" or name in INEXACT:
        x, y = (bits.view(np.float32).astype(np.float64) for bits in (actual, expected))
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))  # of any bits
        finite = np.isfinite(y)
        np.testing.assert_array_equal(x[~np.isfinite(x)], y[~finite])
        error, y = np.abs(x[finite] - y[finite]), y[finite]
    if name.startswith("mma"):
        a, b, d = operands(name, words)
        # Tensor cores add in an order of their own, and cut off what is below the last bit of the
        # largest of 8 products and the sum before them: 2 steps of 9 terms and a rounding each
        # (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021). Integers lose nothing.
        sizes = accumulators(np.abs(d) + np.abs(a) @ np.abs(b))
        exact = (a == np.round(a)).all() and (b == np.round(b)).all()
        bound = np.zeros((32, 8))
        bound[:, :4] = 0 if exact else 20 * 2.0**-23 * sizes
        assert (error <= bound[finite]).all()
    elif name in ULPS:
        assert (error <= ULPS[name] * np.spacing(np.abs(y).astype(np.float32))).all()
    elif name == "conversions":
        np.testing.assert_array_equal(actual[~np.isnan(x)], expected[~np.isnan(x)])
    else:
        np.testing.assert_array_equal(actual, expected)


@pytest.fixture(scope="module")
def on_host():
    library = ctypes.CDLL(str(simt_build.build((SOURCE,))))
    library.simt_failure.restype = ctypes.c_char_p

    def run(name: str, words: np.ndarray) -> np.ndarray:
        # Cloned, because torch aligns to 16 bytes and numpy need not.
        given = torch.from_numpy(words.view(np.int32)).clone()
        result = torch.full((256,), -1, dtype=torch.int32)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (given, result))
        status = library.conformance(WRAPPERS.index(name), *pointers)
        assert status == 0, library.simt_failure().decode()
        return result.numpy().view(np.uint32).reshape(32, 8)

    return run


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", WRAPPERS)
def test_host_bodies_are_as_defined(name, seed, on_host):
    words = inputs(name, seed)
    assert_conforms(name, on_host(name, words), definition(name, words), words)


def test_every_wrapper_is_here():
    wrappers = set()
    for file in (simt_build.ROOT / "csrc" / "arch").glob("*.cuh"):
        wrappers |= set(re.findall(r"^__device__ .*?(\w+)\(", file.read_text(), re.MULTILINE))
    wrappers -= {"shared_address", "warp_id", "forget"}  # nothing to emulate
    used = set(re.findall(r"\w+", SOURCE.read_text()))
    assert len(wrappers) > 15 and wrappers <= used, wrappers - used


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_wrappers_compile(target, tmp_path):
    nvcc = cuda_gate.builder().find_tools().nvcc
    command = [nvcc, f"-arch={target}", *NVCC_FLAGS, "-cubin", SOURCE, "-o", tmp_path / "cubin"]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def on_device(tmp_path_factory):
    path = tmp_path_factory.mktemp("conformance") / "conformance.so"
    nvcc = cuda_gate.builder().find_tools().nvcc
    command = [nvcc, "-arch=native", *NVCC_FLAGS, "-shared", "-Xcompiler", "-fPIC", "-cudart"]
    subprocess.run([*command, "static", SOURCE, "-o", path], check=True, env=dict(os.environ))
    library = ctypes.CDLL(str(path))

    def run(name: str, words: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(words.view(np.int32).copy()).cuda()
        result = torch.full((256,), -1, dtype=torch.int32, device="cuda")
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (given, result))
        torch.cuda.synchronize()
        status = library.conformance(WRAPPERS.index(name), *pointers)
        assert status == 0, f"CUDA error {status}"
        return result.cpu().numpy().view(np.uint32).reshape(32, 8)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", WRAPPERS)
def test_device_bodies_are_as_host_bodies(name, seed, on_host, on_device):
    words = inputs(name, seed)
    assert_conforms(name, on_device(name, words), on_host(name, words), words)
