"""What is in the sdist and the wheel, and that the wheel works where nothing else of ours is.

Built and installed without a network. The wheel is built from the sdist, as pip does it, and is
pure Python; another one has a CUDA C++ library of one small kernel (test_cuda_build builds all).
"""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

import fastlm

ROOT = Path(__file__).resolve().parent.parent
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "*.egg-info", "__pycache__", "build", "dist", ".*_cache", "*_out"
)
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_FIND_LINKS": ""}
KERNEL = """
#include "common.cuh"
namespace fastlm {
__global__ void zero_kernel(float* x) { x[threadIdx.x] = 0.0f; }
cudaError_t zero(float* x) { return launch(bounded<zero_kernel, 32, 0>, dim3(1), nullptr, x); }
}  // namespace fastlm
"""


def run(*command, cwd, **environment) -> str:
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment = {**inherited, **OFFLINE, "FASTLM_BUILD_CUDA": "0", **environment}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def dist(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel; one for all workers of a run."""
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "dist"
    with FileLock(f"{shared}.lock"):
        if not (shared / "done").exists():
            source = shared / "source"
            shutil.copytree(ROOT, source, ignore=IGNORED)
            build = (sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", shared)
            run(*build, "--sdist", source, cwd=shared)
            wheel = (sys.executable, "-P", "-m", "pip", "wheel", "--no-deps", "-w", shared)
            run(*wheel, "--no-build-isolation", *shared.glob("*.tar.gz"), cwd=shared)
            (shared / "done").touch()
    return shared


@pytest.fixture(scope="session")
def wheel(dist) -> zipfile.ZipFile:
    (path,) = dist.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_and_nothing_else(wheel):
    sources = [*ROOT.glob("fastlm/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    expected = {str(f.relative_to(ROOT)) for f in sources} | {"fastlm/py.typed"}
    expected = {re.sub("^kernels/", "fastlm/kernels/", name) for name in expected}
    info = f"fastlm-{fastlm.__version__}.dist-info/"
    assert {n for n in wheel.namelist() if not n.startswith(info)} == expected
    assert f"{info}licenses/LICENSE" in wheel.namelist()
    assert wheel.read(f"{info}top_level.txt").decode().split() == ["fastlm"]


def test_wheel_metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(required) == [
        "numpy",
        "torch>=2.10",
        'triton>=3.6; platform_system == "Linux"',
    ], "torch is a lower bound: an install never replaces the torch that is there"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "make demo" in metadata.get_payload()
    tag = wheel.read(name.replace("METADATA", "WHEEL")).decode()
    assert "Tag: py3-none-any" in tag


def test_sdist_holds_the_sources(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    for pattern in ("fastlm/**/*.py", "kernels/**/*.py", "csrc/**/*"):
        files = [f for f in ROOT.glob(pattern) if f.is_file() and "__pycache__" not in f.parts]
        assert files and {str(file.relative_to(ROOT)) for file in files} <= names
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "setup.py"):
        assert name in names
    assert {"csrc/build.py", "tests/simt/simt.h", "tests/golden/torch_2_10_symbols.txt"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)
    assert not any(n.startswith((".venv", "demo_out", "gpu_check_out")) for n in names)


def test_wheel_with_the_cuda_library(tmp_path):
    """Of its platform and Python; what is in it loads where torch is built for the CPU."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=IGNORED)
    csrc = source / "csrc"
    for file in [*csrc.rglob("*.cu"), *csrc.glob("bindings/*.cpp")]:
        if file.name not in ("module.cpp", "runtime.cpp"):
            file.unlink()
    (csrc / "zero.cu").write_text(KERNEL)
    wheel = (sys.executable, "-P", "-m", "pip", "wheel", "--no-deps", "-w", tmp_path)
    run(*wheel, "--no-build-isolation", source, cwd=tmp_path, FASTLM_BUILD_CUDA="1")
    (path,) = tmp_path.glob("*.whl")
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert path.name == f"fastlm-{fastlm.__version__}-{python}-{python}-{platform}.whl"
    zipfile.ZipFile(path).extractall(tmp_path / "site")
    built = {file.name.split(".")[0] for file in tmp_path.glob("site/**/*.so")}
    assert built == {"libfastlm_cuda", "_C"}
    code = "from fastlm.cli import main; import fastlm; print(fastlm.__file__); main(['doctor'])"
    out = run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert out.startswith(str(tmp_path / "site"))
    assert re.search(
        r"^cuda library +loads; 1 kernels? for sm_80, sm_90a and newer, built by", out, re.M
    )


@pytest.fixture(scope="session")
def clean(dist, tmp_path_factory) -> Path:
    """A virtual environment with the wheel; torch and its like come from this one's folder.

    Python does not read the .pth files of a folder that a .pth file adds, so an editable install
    of fastlm in it stays invisible.
    """
    venv = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    pip = (sys.executable, "-P", "-m", "pip", "--python", python, "install", "--no-deps")
    run(*pip, *dist.glob("*.whl"), cwd=venv.parent)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv


def test_wheel_works_in_a_clean_environment(clean, tmp_path):
    code = """
import pathlib, sys, fastlm, fastlm.kernels, torch
for module in (fastlm, fastlm.kernels):
    assert pathlib.Path(module.__file__).is_relative_to(sys.prefix), module
q = torch.randn(1, 5, 2, 16, requires_grad=True)
fastlm.attention(q, q, q, causal=True).sum().backward()
x = torch.randn(3, 8, requires_grad=True)
fastlm.layer_norm(x, impl='triton' if fastlm.backends.INTERPRETED else None).sum().backward()
assert x.grad is not None and q.grad is not None
print(fastlm.__version__)
"""
    for interpret in ("0", "1"):
        python = (clean / "bin" / "python", "-P", "-c", code)
        assert run(*python, cwd=tmp_path, TRITON_INTERPRET=interpret).strip() == fastlm.__version__


def test_wheel_brings_the_command(clean, tmp_path):
    out = run(clean / "bin" / "fastlm", "doctor", cwd=tmp_path)
    assert fastlm.__version__ in out and "attention" in out and "layer_norm" in out
    out = run(clean / "bin" / "fastlm", "--version", cwd=tmp_path)
    assert out.strip() == f"fastlm {fastlm.__version__}"
    assert "usage: fastlm" in run(
        clean / "bin" / "python", "-P", "-m", "fastlm", "--help", cwd=tmp_path
    )
