"""Shows what this machine has, and for every operator which backend runs and why the others do not.

A small bf16 call of every operator is put to `fastlm.explain`; nothing is computed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

import fastlm
from fastlm import cuda_library
from fastlm.backends import operators
from fastlm.bench.machine import cpu_name
from fastlm.cli._options import add_device, device_of
from fastlm.cli._samples import sample_calls

# What csrc/build.py takes, which is not installed, and what it says of another.
_OLDEST_NVCC, _FIRST_UNKNOWN_NVCC = (12, 4), (14, 0)
_INSTALL_NVCC = "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl"
_PACKAGES = ("numpy", "safetensors", "rich", "matplotlib", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    device = device_of(args)
    for name, value in machine():
        print(f"{name:<14}{value}")
    print(f"\nwhich backend runs a bf16 call on {device.type}:")
    for name, chosen, notes in backends(device):
        print(f"  {name:<30}{chosen}")
        for note in notes:
            print(f"      {note}")
    return 0


def machine() -> list[tuple[str, str]]:
    """What is installed, by name."""
    rows = [
        ("fastlm", fastlm.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", _torch()),
        ("triton", _version("triton") or "not installed: Triton kernels cannot run"),
        ("nvcc", _nvcc()),
        ("cuda library", _cuda_library()),
        ("cpu", f"{cpu_name()}, {torch.get_num_threads()} threads"),
    ]
    rows += [(f"gpu {i}" if i else "gpu", text) for i, text in enumerate(_gpus())]
    return rows + [(name, _version(name) or "not installed") for name in _PACKAGES]


def backends(device: torch.device) -> list[tuple[str, str, list[str]]]:
    """(operator, chosen backend, one note for every other backend) for all operators."""
    calls = sample_calls(device)
    rows = []
    for name in operators():
        args, kwargs = calls[name]()
        explanation = fastlm.explain(name, *args, **kwargs)
        notes = [
            f"{impl}: {explanation.note(impl)}"
            for impl in explanation.reasons
            if impl != explanation.chosen
        ]
        rows.append((name, str(explanation.chosen), notes))
    return rows


def _torch() -> str:
    built = torch.version.cuda or torch.version.hip
    return f"{torch.__version__}, built {f'for {built}' if built else 'without CUDA'}"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["none that torch can use"]
    gpus = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gpus.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return gpus


def _nvcc() -> str:
    nvcc = _nvcc_path()
    if nvcc is None:
        return (
            "not found; only building the CUDA C++ kernels needs it: install the CUDA toolkit and "
            f"name it by CUDA_HOME, or {_INSTALL_NVCC}"
        )
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{nvcc} does not run: {error}"
    release = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    if release is None:
        return f"unknown version at {nvcc}"
    said = f"{release[1]}.{release[2]} at {nvcc}"
    if _OLDEST_NVCC <= (int(release[1]), int(release[2])) < _FIRST_UNKNOWN_NVCC:
        return said
    return f"{said}, not supported: the CUDA C++ kernels are built by 12.4 to 13 ({_INSTALL_NVCC})"


def _nvcc_path() -> str | None:
    """The one that a build finds: csrc/build.py looks in the same places."""
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*"))
    in_home = lambda homes: [os.path.join(home, "bin", "nvcc") for home in homes if home]
    places = [
        *in_home(named), shutil.which("nvcc"), *in_home(["/usr/local/cuda", *reversed(wheels)])
    ]  # fmt: skip
    return next((place for place in places if place and os.path.exists(place)), None)


def _cuda_library() -> str:
    """What the library of CUDA C++ kernels was built by and for, or what to do about it."""
    if (reason := cuda_library.unavailable()) is not None:
        return reason.removeprefix("its library is ").removeprefix("its library ")
    try:
        from fastlm import _C
    except ImportError:  # one file for each Python, where the library is for all
        return f"loads; built by another Python, facts unknown (to rebuild: {cuda_library.BUILD})"
    info = _C.build_info()
    if info["version"] != fastlm.__version__:
        return f"of fastlm {info['version']}; rebuild it: {cuda_library.BUILD}"
    kernels = len({row["kernel"] for row in _C.kernels()})
    return (
        f"loads; {kernels} kernels for {', '.join(info['targets'])} and newer, built by nvcc "
        f"{info['nvcc']} and {info['host_compiler']} with torch {info['torch']}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
