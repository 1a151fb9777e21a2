"""What a measurement was taken on: device, driver, versions, commit, and the device's ceilings."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import fastlm
from fastlm.bench.timing import measure


@dataclass(frozen=True)
class Machine:
    device: str
    driver: str
    torch: str
    triton: str
    commit: str


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this process: a matrix product and a copy."""

    tflops: float
    gbytes: float


def describe(device: torch.device) -> Machine:
    """The columns of a CSV row that name the machine."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _driver()
    else:
        name, driver = f"{cpu_name()} x {torch.get_num_threads()}", "none"
    return Machine(name, driver, torch.__version__, triton, commit())


def cpu_name() -> str:
    """The processor's model, where the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model.group(1) if model else "unknown CPU"


@functools.cache
def commit() -> str:
    """The commit of the checkout that fastlm runs from, "+" if changed; else its version."""
    root = Path(fastlm.__file__).resolve().parent.parent
    git = lambda *args: subprocess.run(
        ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=30, check=True
    ).stdout.strip()
    try:
        # Only our own repository: an installed copy may lie inside somebody else's.
        if not git("ls-files", "fastlm/__init__.py"):
            raise OSError
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fastlm", "kernels")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return f"v{fastlm.__version__}"


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures a square matrix product in `dtype` and a copy, on normal data.

    The copy is the faster of torch's own and an elementwise kernel with the same traffic: in a CUDA
    graph the first is a node for the copy engine, which is not what a kernel can reach.
    """
    size, numel = (8192, 2**28) if device.type == "cuda" else (1024, 2**24)
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    calls = {
        "product": lambda: a @ a,
        "copy": lambda: target.copy_(source),
        "negation": lambda: torch.neg(source, out=target),
    }
    seconds = {n: t.median / 1e3 for n, t in measure(calls, device, seconds=0.3).items()}
    product, copy = seconds["product"], min(seconds["copy"], seconds["negation"])
    return Ceilings(2 * size**3 / product / 1e12, 2 * 4 * numel / copy / 1e9)


@functools.cache  # rows are described one by one, and starting this takes a while
def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.splitlines()[0].strip() if answer.stdout else "unknown"
