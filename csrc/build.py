"""Builds the CUDA C++ kernels: `libfastlm_cuda.so` (operators) and `_C` (facts about them).

    python csrc/build.py [FOLDER]        # into FOLDER; default: fastlm/ of this checkout

setup.py calls `wanted` and `build`. Needs nvcc, g++, ninja, pybind11, and torch's headers and
libraries, a build for the CPU included; no GPU and no network. torch is found by its path, not by
an import, because pip hides the environment's packages from a build.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
OUT = ROOT / "build" / "cuda"

# Compiled for each; of the first also PTX, which drivers compile for GPUs that came later.
TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
OLDEST_CUDA, FIRST_UNKNOWN_CUDA = (12, 4), (14, 0)
OLDEST_TORCH = (2, 10)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # of OLDEST_TORCH
JOB_GIB = 1.5
REQUIREMENTS = ["ninja", "pybind11>=2.13"]
VARIABLE = "FASTLM_BUILD_CUDA"

INSTALL_NVCC = (
    "install the CUDA toolkit 12.4 or newer (https://developer.nvidia.com/cuda-downloads), or from "
    "PyPI: pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl; another place than "
    "/usr/local/cuda is named by CUDA_HOME"
)


class BuildError(Exception):
    """What stands in the way of a build, with the command that removes it."""


@dataclass(frozen=True)
class Tools:
    nvcc: Path
    toolkit: Path
    cuda: tuple[int, int]
    torch: Path
    torch_version: str
    torch_cuda: str | None


def find_tools(environment=os.environ) -> Tools:
    """What the build uses; raises BuildError where something is missing or does not fit."""
    nvcc = _find_nvcc(environment)
    cuda = _nvcc_version(nvcc)
    if not OLDEST_CUDA <= cuda < FIRST_UNKNOWN_CUDA:
        found = ".".join(map(str, cuda))
        raise BuildError(f"nvcc {found} at {nvcc} is not supported: {INSTALL_NVCC}")
    torch, version, torch_cuda = _find_torch(environment)
    return Tools(nvcc, _toolkit_of(nvcc), cuda, torch, version, torch_cuda)


def wanted(environment=os.environ) -> Tools | None:
    """The tools of a build that FASTLM_BUILD_CUDA asks for, or None for a pure-Python package.

    Raises BuildError where it is 1 and a build is not possible.
    """
    choice = environment.get(VARIABLE, "")
    if choice not in ("", "0", "1"):
        raise BuildError(f"{VARIABLE} must be 0, 1 or unset, got {choice!r}")
    if choice == "0":
        return None
    try:
        tools = find_tools(environment)
        missing = [name for name in ("g++",) if shutil.which(name) is None]
        if missing:
            raise BuildError("g++ was not found: install it (Debian and Ubuntu: apt install g++)")
        if choice == "" and tools.torch_cuda is None:
            raise BuildError("the torch that is installed is built without CUDA")
        return tools
    except BuildError as error:
        if choice == "1":
            raise BuildError(f"{VARIABLE}=1, but {error}") from None
        print(f"fastlm: without the CUDA C++ kernels ({error}). {VARIABLE}=1 asks for them.")
        return None


def _find_nvcc(environment) -> Path:
    homes = [environment.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    named = [Path(home) for home in homes if home]
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    usual = [Path("/usr/local/cuda"), *sorted(site.glob("cu*"), reverse=True)]
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    places = [home / "bin" / "nvcc" for home in named]
    places += [Path(on_path)] if on_path else []
    places += [home / "bin" / "nvcc" for home in usual]
    for place in places:
        if place.exists():
            return place
    raise BuildError(f"nvcc was not found: {INSTALL_NVCC}")


def _nvcc_version(nvcc: Path) -> tuple[int, int]:
    try:
        text = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"nvcc at {nvcc} does not run ({error}): {INSTALL_NVCC}") from None
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        raise BuildError(f"nvcc at {nvcc} does not tell its version: {INSTALL_NVCC}")
    return int(release[1]), int(release[2])


def _toolkit_of(nvcc: Path) -> Path:
    """The folder with the headers and libraries: nvcc may be a script or a link elsewhere."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent


def _find_torch(environment) -> tuple[Path, str, str | None]:
    places = [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    places = (
        [Path(environment["FASTLM_TORCH_DIR"])] if "FASTLM_TORCH_DIR" in environment else places
    )
    spec = find_spec("torch")
    places += [Path(spec.origin).parent] if spec is not None else []
    torch = next((place for place in places if (place / "version.py").exists()), None)
    remedy = "pip install 'torch>=2.10'; FASTLM_TORCH_DIR names a torch folder elsewhere"
    if torch is None:
        raise BuildError(f"torch was not found beside {sys.executable}: {remedy}")
    text = (torch / "version.py").read_text()
    version = re.search(r"__version__ = '([^']+)'", text)[1]
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TORCH:
        raise BuildError(f"torch {version} at {torch} is too old: {remedy}")
    cuda = re.search(r"^cuda[^=\n]*= '([^']+)'", text, re.MULTILINE)
    return torch, version, cuda[1] if cuda else None


# --- the build


def build(folder: Path, tools: Tools, out: Path = OUT) -> dict:
    """Builds into `folder`, by way of objects in `out`; returns and prints what it took."""
    missing = [name for name in ("ninja", "pybind11") if find_spec(name) is None]
    if missing:
        raise BuildError(f"{' and '.join(missing)} missing: pip install {' '.join(missing)}")
    out.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    objects = _write_ninja(out, tools)
    _ninja(out, "libfastlm_cuda.so")
    _write_facts(out, tools, [o for o in objects if o.endswith(".cu.o")])
    module = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
    _ninja(out, module)
    for name in ("libfastlm_cuda.so", module):
        partial = folder / f"{name}.part"
        shutil.copyfile(out / name, partial)
        partial.rename(folder / name)
    jobs = [json.loads((out / f"{o}.job").read_text()) for o in objects]
    report = {
        "seconds": round(time.monotonic() - start, 1),
        "compile_seconds": round(sum(job["seconds"] for job in jobs), 1),
        "jobs": _jobs(),
        "peak_job_mib": max(job["peak_mib"] for job in jobs),
        "library_mib": round((out / "libfastlm_cuda.so").stat().st_size / 2**20, 2),
        "targets": list(TARGETS),
    }
    (out / "report.json").write_text(json.dumps(report))
    print(f"fastlm: built the CUDA C++ kernels: {report}", flush=True)
    return report


def _jobs() -> int:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, int(memory / JOB_GIB)))


def _write_ninja(out: Path, tools: Tools) -> list[str]:
    """Writes build.ninja; returns the objects of the library, as paths within `out`."""
    import pybind11

    cuda = tools.toolkit
    torch = tools.torch / "include"
    oldest = next(iter(TARGETS))
    gencode = " ".join(
        f"-gencode arch={virtual},code=[{real}{f',{virtual}' if real == oldest else ''}]"
        for real, virtual in TARGETS.items()
    )
    libraries = [cuda / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    cudart = next((p for p in libraries if (p / "libcudart_static.a").exists()), None)
    if cudart is None:
        raise BuildError(f"libcudart_static.a was not found in {cuda}: {INSTALL_NVCC}")
    variables = {
        "job": f"{sys.executable} {CSRC / 'build.py'} --job",
        "nvccflags": "-std=c++17 -O3 --expt-relaxed-constexpr -Werror all-warnings -Xptxas -v "
        f"-Xcompiler -fPIC,-fvisibility=hidden {gencode} -I{CSRC}",
        "cxxflags": "-std=c++17 -O2 -fPIC -fvisibility=hidden -Wall -Wextra -Werror "
        f"{STABLE_ABI} -isystem {torch} -isystem {cuda / 'include'} -I{CSRC}",
        "moduleflags": "-std=c++17 -O2 -fPIC -fvisibility=hidden -Wall -Wextra -Werror "
        f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')} -I{out}",
        "linkflags": f"-shared -Wl,--as-needed,-s,--exclude-libs,ALL -L{cudart} -lcudart_static "
        f"-lpthread -ldl -lrt -Wl,--no-as-needed -L{tools.torch / 'lib'} -ltorch -ltorch_cpu",
    }
    lines = ["ninja_required_version = 1.5"] + [f"{k} = {v}" for k, v in variables.items()]
    deps = ["  deps = gcc", "  depfile = $out.d"]
    lines += [
        "rule cuda",
        f"  command = $job $out {tools.nvcc} $nvccflags -MMD -MF $out.d -c $in -o $out",
    ]
    lines += [
        *deps,
        "rule cxx",
        "  command = $job $out g++ $cxxflags -MMD -MF $out.d -c $in -o $out",
    ]
    lines += [*deps, "rule link", "  command = g++ $in $linkflags -o $out"]
    lines += ["rule module", "  command = g++ -shared $moduleflags $in -o $out -s"]
    objects = []
    for source in [*sorted(CSRC.rglob("*.cu")), *sorted((CSRC / "bindings").glob("*.cpp"))]:
        if source.name == "module.cpp":
            continue
        objects.append(f"{source.relative_to(CSRC).as_posix().replace('/', '.')}.o")
        lines.append(f"build {objects[-1]}: {'cuda' if source.suffix == '.cu' else 'cxx'} {source}")
    lines.append(f"build libfastlm_cuda.so: link {' '.join(objects)}")
    module = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    lines.append(f"build {module}: module {CSRC / 'bindings' / 'module.cpp'} | build_facts.inc")
    _write_if_changed(out / "build.ninja", "\n".join(lines) + "\n")
    return objects


def _ninja(out: Path, target: str) -> None:
    command = [sys.executable, "-m", "ninja", "-C", str(out), f"-j{_jobs()}", target]
    # Isolated builds find the ninja of their own environment through PYTHONPATH.
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"the compiler failed:\n{(result.stdout + result.stderr)[-6000:]}")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# --- facts about the kernels, from what ptxas says


def kernel_facts(out: Path = OUT, objects: list[str] | None = None) -> list[dict]:
    """Of each kernel and target: registers, spilled bytes, static shared memory."""
    logs = (
        sorted(out.glob("*.cu.o.log")) if objects is None else [out / f"{o}.log" for o in objects]
    )
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<target>\w+)'.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    facts = []
    for log in logs:
        for found in entry.finditer(log.read_text()):
            shared = re.search(r"(\d+) bytes smem", found["rest"])
            facts.append({
                "kernel": found["name"],
                "target": found["target"],
                "registers": int(found["registers"]),
                "spills": int(found["stores"]) + int(found["loads"]),
                "shared": int(shared[1]) if shared else 0,
            })  # fmt: skip
    for fact, name in zip(facts, demangled([f["kernel"] for f in facts]), strict=True):
        fact["kernel"] = name
    return sorted(facts, key=lambda f: (f["target"], f["kernel"]))


def demangled(names: list[str]) -> list[str]:
    """`norm_fwd_kernel<__half, 4>` of each mangled name."""
    filtered = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.split("\n")[: len(names)]
    for noise in ("(anonymous namespace)::", "fastlm::", "void "):
        filtered = [name.replace(noise, "") for name in filtered]
    return [re.sub(r"\((?:int|bool)\)", "", name).split("(")[0] for name in filtered]


def _write_facts(out: Path, tools: Tools, objects: list[str]) -> None:
    quote = json.dumps
    version = re.search(r'"([^"]+)"', (ROOT / "fastlm" / "_version.py").read_text())[1]
    lines = [f"constexpr const char* kVersion = {quote(version)};",
             f"constexpr const char* kNvcc = {quote('.'.join(map(str, tools.cuda)))};",
             f"constexpr const char* kTorch = {quote(tools.torch_version)};",
             f"constexpr const char* kTargets[] = {{{', '.join(map(quote, TARGETS))}}};",
             "constexpr Kernel kKernels[] = {"]  # fmt: skip
    lines += [
        f"  {{{quote(f['kernel'])}, {quote(f['target'])}, {f['registers']}, {f['spills']},"
        f" {f['shared']}}},"
        for f in kernel_facts(out, objects)
    ]
    _write_if_changed(out / "build_facts.inc", "\n".join([*lines, "};"]) + "\n")


def _run_job(output: str, command: list[str]) -> int:
    """Runs a compiler; keeps what it says in OUTPUT.log and what it took in OUTPUT.job."""
    start = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    Path(f"{output}.log").write_text(result.stdout + result.stderr)
    took = {"seconds": round(time.monotonic() - start, 2), "peak_mib": round(peak)}
    Path(f"{output}.job").write_text(json.dumps(took))
    if result.returncode != 0:
        print(result.stdout, result.stderr, sep="\n", file=sys.stderr)
    return result.returncode


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        sys.exit(_run_job(sys.argv[2], sys.argv[3:]))
    try:
        build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "fastlm", find_tools())
    except BuildError as error:
        sys.exit(f"fastlm: {error}")
