"""The shared library of CUDA C++ kernels: where it is, why it is not, and loading it once.

Its operators, `fastlm_cuda::*`, are declared in Python beside those of Triton
(`fastlm.ops._library.cuda_contract`); the library has their implementations for CUDA tensors.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

PATH = Path(__file__).resolve().parent / "libfastlm_cuda.so"
BUILD = "FASTLM_BUILD_CUDA=1 pip install --no-deps ."

# Device types whose tensors a loaded library takes; None in the place of an error for no error.
_loaded: dict[str, str | None] = {}


def load(path: Path = PATH, device_type: str = "cuda") -> None:
    """Loads a library whose operators take tensors on `device_type`.

    Anything but the defaults is for the tests' host build, which runs the kernels on the CPU.
    """
    torch.ops.load_library(path)
    _loaded[device_type] = None


def runs_on(device_type: str) -> bool:
    """Whether a library is loaded that takes tensors on `device_type`."""
    return _loaded.get(device_type, "no") is None


def unavailable() -> str | None:
    """Why CUDA tensors cannot go to the library, or None. Loads it at the first call."""
    if "cuda" not in _loaded:
        _loaded["cuda"] = _try_to_load()
    return _loaded["cuda"]


def _try_to_load() -> str | None:
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs, torch is built for ROCm"
    if not PATH.exists():
        return f"its library is not built (from a checkout: {BUILD})"
    try:
        load(PATH)
        return _too_new(*versions(PATH))
    except OSError as error:
        return f"its library does not load: {error} (from a checkout: {BUILD})"
    except AttributeError:  # it cannot say for which CUDA it is
        return f"its library is of an older fastlm (from a checkout: {BUILD})"


def versions(path: Path) -> tuple[int, int]:
    """Of CUDA, 13000 for 13.0: the runtime's in a library, and the newest that the driver knows (0
    where there is no driver)."""
    numbers = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(str(path)).fastlm_cuda_versions(*map(ctypes.byref, numbers))
    runtime, driver = (number.value for number in numbers)
    return runtime, driver


def _too_new(runtime: int, driver: int) -> str | None:
    """A driver runs what any CUDA of its own major version has built, and what older ones have."""
    if driver == 0 or runtime // 1000 <= driver // 1000:
        return None
    built, known = (f"{v // 1000}.{v % 1000 // 10}" for v in (runtime, driver))
    return (
        f"its library was built by CUDA {built}, and the driver knows CUDA up to {known}: update "
        f"the driver, or build the library with an older nvcc (CUDA_HOME=... {BUILD})"
    )
