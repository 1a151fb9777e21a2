"""The wrappers of csrc/arch: each alone, on random bits.

The kernels are tested on the CPU with the wrappers' host bodies, so a mistake that a kernel and a
host body share would pass. Here the host bodies are compared with definitions of their own, from
the tables of the PTX ISA; and on a machine with a GPU the device bodies with the host bodies.
"""

import ctypes
import os
import subprocess

import cuda_gate
import numpy as np
import pytest
import simt_build
import torch

from fastlm.reference.dropout import philox

SOURCE = simt_build.SIMT / "conformance.cu"
WRAPPERS = ["shuffles", "copies", "ldmatrix", "ldmatrix_trans", "mma_fp16", "mma_bf16", "exp2",
            "conversions", "philox"]  # fmt: skip
EXACT = {"copies", "ldmatrix", "ldmatrix_trans", "conversions", "philox"}
ULPS = {"shuffles": 8, "exp2": 2}  # the sum of a warp, in one order; 2^x by the special unit
NVCC_FLAGS = ["-std=c++17", "-Werror", "all-warnings", f"-I{simt_build.ROOT / 'csrc'}"]


def inputs(name: str, seed: int) -> np.ndarray:
    """512 words that make sense to a wrapper."""
    random = np.random.default_rng(seed)
    if name.startswith("mma"):
        # 6 words of two 16-bit numbers, 4 of fp32, 6 unused, for each lane.
        dtype = torch.float16 if name == "mma_fp16" else torch.bfloat16
        halves = torch.from_numpy(random.standard_normal((32, 12))).to(dtype).view(torch.int16)
        words = np.zeros((32, 16), np.uint32)
        words[:, :6] = halves.numpy().view(np.uint32)
        words[:, 6:10] = random.standard_normal((32, 4)).astype(np.float32).view(np.uint32)
        return words.ravel()
    if name in ("shuffles", "exp2", "conversions"):
        scale = {"shuffles": 1, "exp2": 25, "conversions": 2000}[name]
        x = (random.standard_normal(512) * scale).astype(np.float32)
        if name != "shuffles":
            x[:4] = [0.0, -np.inf, -200.0, 1e-30]
        return x.view(np.uint32)
    return random.integers(0, 2**32, 512, dtype=np.uint32)


def halves(words: np.ndarray, name: str) -> np.ndarray:
    """fp64 of pairs of 16-bit numbers, (..., words * 2)."""
    dtype = torch.bfloat16 if "bf16" in name else torch.float16
    bits = torch.from_numpy(np.ascontiguousarray(words).view(np.int16))
    return bits.view(dtype).double().numpy()


def definition(name: str, words: np.ndarray) -> np.ndarray:
    """What a wrapper gives, (32 lanes, 8 words), from the PTX ISA and not from csrc/arch."""
    out = np.zeros((32, 8), np.uint32)
    if name == "shuffles":
        x = words[:32]
        for i in range(5):
            out[:, i] = x[np.arange(32) ^ (1 << i)]
        out[:, 5] = x[(np.arange(32) * 7 + 3) % 32]
        out[:, 6] = x.view(np.float32).max(keepdims=True).view(np.uint32)
        out[:, 7] = x.view(np.float32).sum(dtype=np.float64).astype(np.float32).view(np.uint32)
    elif name == "copies":
        pieces = words[:128].reshape(32, 4)
        out[:, :4] = pieces[(np.arange(32) + 5) % 32]
        landed = np.where((np.arange(32) % 3 != 0)[:, None], pieces, 0)
        out[:, 4:] = landed[::-1]
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
        lanes = words.reshape(32, 16)
        numbers = halves(lanes[:, :6], name).reshape(32, 6, 2)
        a, b, d = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for lane in range(32):
            group, thread = divmod(lane, 4)
            for i in range(8):  # a0 .. a7
                row = group + (8 if i in (2, 3, 6, 7) else 0)
                a[row, thread * 2 + i % 2 + (8 if i >= 4 else 0)] = numbers[lane, i // 2, i % 2]
            for i in range(4):  # b0 .. b3
                b[thread * 2 + i % 2 + (8 if i >= 2 else 0), group] = numbers[
                    lane, 4 + i // 2, i % 2
                ]
            for i in range(4):  # c0 .. c3
                d[group + (8 if i >= 2 else 0), thread * 2 + i % 2] = lanes[
                    lane, 6 + i : 7 + i
                ].view(np.float32)[0]
        d = (d + a @ b).astype(np.float32)
        for lane in range(32):
            group, thread = divmod(lane, 4)
            for i in range(4):
                x = d[group + (8 if i >= 2 else 0), thread * 2 + i % 2]
                out[lane, i] = x.view(np.uint32)
    elif name == "exp2":
        x = words[:256].view(np.float32).astype(np.float64)
        y = np.exp2(x).astype(np.float32)
        out = np.where(y < np.finfo(np.float32).tiny, np.float32(0), y).view(np.uint32)
    elif name == "conversions":
        x = torch.from_numpy(words[:256].view(np.float32).reshape(32, 8)[:, :4].copy())
        both = torch.stack([x.half().float(), x.bfloat16().float()], -1)
        out = both.reshape(32, 8).numpy().view(np.uint32)
    else:
        key0, key1, *counter = torch.from_numpy(words[:192].reshape(32, 6).astype(np.int64)).T
        out[:, :4] = torch.stack(philox(*counter, key0, key1), -1).numpy().astype(np.uint32)
    return out.reshape(32, 8)


def assert_conforms(name: str, actual: np.ndarray, expected: np.ndarray, words: np.ndarray):
    if name in EXACT:
        np.testing.assert_array_equal(actual, expected)
        return
    x, y = actual.view(np.float32).astype(np.float64), expected.view(np.float32).astype(np.float64)
    if name.startswith("mma"):
        # fp32 sums of 17 terms, in an order that the ISA leaves open, each step truncated: of the
        # greatest sum of absolute values.
        lanes = words.reshape(32, 16)
        largest = np.abs(halves(lanes[:, :6], name)).max()
        bound = 17 * 2.0**-23 * (16 * largest**2 + np.abs(lanes[:, 6:10].view(np.float32)).max())
        assert np.abs(x - y).max() <= bound
        return
    if name == "shuffles":  # all but the sum is moved
        np.testing.assert_array_equal(actual[:, :7], expected[:, :7])
        scale = np.abs(words[:32].view(np.float32)).sum()
        assert np.abs(x - y)[:, 7].max() <= ULPS[name] * 2.0**-24 * scale
        return
    assert (np.abs(x - y) <= ULPS[name] * np.spacing(np.abs(y).astype(np.float32))).all()


@pytest.fixture(scope="module")
def on_host():
    library = ctypes.CDLL(str(simt_build.build((SOURCE,))))
    library.simt_failure.restype = ctypes.c_char_p

    def run(name: str, words: np.ndarray) -> np.ndarray:
        out = np.full(256, 0xFFFFFFFF, np.uint32)
        # malloc gives 16 bytes of alignment, numpy does not promise them.
        given = torch.from_numpy(words.view(np.int32).copy())
        result = torch.from_numpy(out.view(np.int32))
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
