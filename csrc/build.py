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
import shlex
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
    "install the CUDA toolkit, 12.4 to 13 (https://developer.nvidia.com/cuda-downloads), or from "
    "PyPI: pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl; another place than "
    "/usr/local/cuda is named by CUDA_HOME"
)

INSTALL_TORCH = (
    "pip install 'torch>=2.10', and where the build cannot see it name its folder: "
    "FASTLM_TORCH_DIR=\"$(python -c 'import torch; print(torch.__path__[0])')\""
)


class BuildError(Exception):
    """What stands in the way of a build, with the command that removes it."""


@dataclass(frozen=True)
class Tools:
    nvcc: Path
    toolkit: Path
    cuda: tuple[int, int]
    cxx: str  # the C++ compiler, also nvcc's
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
    cxx = _host_compiler(nvcc, environment)
    torch, version, torch_cuda = _find_torch(environment)
    return Tools(nvcc, _toolkit_of(nvcc), cuda, cxx, torch, version, torch_cuda)


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
        if choice == "" and tools.torch_cuda is None:
            raise BuildError("the torch that is installed is built without CUDA")
        return tools
    except BuildError as error:
        if choice == "1":
            raise BuildError(f"{VARIABLE}=1, but {error}") from None
        print(without(error))
        return None


def without(error: BuildError) -> str:
    """What is said where a build that nobody asked for is not possible."""
    return f"fastlm: without the CUDA C++ kernels ({error}). {VARIABLE}=1 asks for them."


def _find_nvcc(environment) -> Path:
    homes = [environment.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    named = [Path(home) for home in homes if home]
    wheels = [home for site in _sites(environment) for home in sorted(site.glob("nvidia/cu*"))]
    usual = [Path("/usr/local/cuda"), *reversed(wheels)]
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


def _host_compiler(nvcc: Path, environment) -> str:
    """CXX or g++, which nvcc must take too: each accepts host compilers up to some version."""
    cxx = environment.get("CXX") or "g++"
    if shutil.which(cxx) is None and len(cxx.split()) > 1:
        raise BuildError(
            f"CXX must name one program, for nvcc takes no words before or after it, got {cxx!r}: "
            "name the compiler alone (CXX=g++)"
        )
    if shutil.which(cxx) is None:
        raise BuildError(
            f"the C++ compiler {cxx} was not found: install it (Debian and Ubuntu: apt install g++)"
            " or name another by CXX"
        )
    command = [nvcc, "-ccbin", cxx, "-E", "-x", "cu", os.devnull]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if result.returncode != 0:
        said = next((x for x in result.stderr.splitlines() if "error" in x), result.stderr.strip())
        raise BuildError(
            f"nvcc at {nvcc} does not compile with {cxx} ({said.strip()}): name an older compiler "
            f"by CXX (CXX=g++-13), or {INSTALL_NVCC}"
        )
    return cxx


def _toolkit_of(nvcc: Path) -> Path:
    """The folder with the headers and libraries: nvcc may be a script or a link elsewhere."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent


def _sites(environment) -> list[Path]:
    """Folders of installed packages, nearest first.

    Isolated builds of pip run the environment's own python, whose packages are a path away though
    hidden; those of other tools run another one's, and may leave the environment in a variable.
    """
    sites = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    spec = find_spec("torch")
    sites += [Path(spec.origin).parents[1]] if spec is not None and spec.origin else []
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if environment.get(name):
            sites += sorted(Path(environment[name]).glob("lib/python3.*/site-packages"))
    return sites


def _find_torch(environment) -> tuple[Path, str, str | None]:
    """The folder of torch, its version, and that of its CUDA."""
    folders = [site / "torch" for site in _sites(environment)]
    if environment.get("FASTLM_TORCH_DIR"):
        folders = [Path(environment["FASTLM_TORCH_DIR"])]
    torch = next((folder for folder in folders if (folder / "version.py").exists()), None)
    if torch is None:
        raise BuildError(f"torch was not found beside {sys.executable}: {INSTALL_TORCH}")
    text = (torch / "version.py").read_text()
    version = re.search(r"__version__ = '([^']+)'", text)[1]
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TORCH:
        raise BuildError(f"torch {version} at {torch} is too old: {INSTALL_TORCH}")
    cuda = re.search(r"^cuda[^=\n]*= '([^']+)'", text, re.MULTILINE)
    return torch, version, cuda[1] if cuda else None


# --- the build


def build(folder: Path, tools: Tools, out: Path = OUT, *, strict: bool = True) -> dict:
    """Builds into `folder`, by way of objects in `out`; returns and prints what it took.

    `strict` takes warnings for errors; an installation does not, for compilers newer than ours.
    """
    missing = [name for name in ("ninja", "pybind11") if find_spec(name) is None]
    if missing:
        raise BuildError(f"{' and '.join(missing)} missing: pip install {' '.join(missing)}")
    out.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    objects = _write_ninja(out, tools, strict)
    _ninja(out, "libfastlm_cuda.so")
    _write_facts(out, tools, [o for o in objects if o.endswith(".cu.o")])
    module = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
    _ninja(out, module)
    for name in ("libfastlm_cuda.so", module):
        partial = folder / f"{name}.part"
        shutil.copyfile(out / name, partial)
        partial.rename(folder / name)
    jobs = [json.loads((out / f"{o}.job").read_text()) for o in [*objects, module]]
    report = {
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(sum(job["cpu_seconds"] for job in jobs), 1),
        "jobs": _jobs(),
        "peak_job_mib": max(job["peak_mib"] for job in jobs),
        "library_mib": round((out / "libfastlm_cuda.so").stat().st_size / 2**20, 2),
        "targets": list(TARGETS),
    }
    (out / "report.json").write_text(json.dumps(report))
    print(f"fastlm: built the CUDA C++ kernels: {report}", flush=True)
    return report


def _jobs() -> int:
    """How many compilers run at once: as many as there are cores and memory for, or MAX_JOBS."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        limit = Path("/sys/fs/cgroup") / name
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            memory.append(int(text))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, int(min(memory) / 2**30 / JOB_GIB)))


def _write_ninja(out: Path, tools: Tools, strict: bool) -> list[str]:
    """Writes build.ninja; returns the objects of the library, as paths within `out`."""
    module = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    variables = {name: " ".join(words) for name, words in _commands(out, tools, strict).items()}
    depends = "  deps = gcc\n  depfile = $out.d"
    compile_ = "-MMD -MF $out.d -c $in -o $out"
    lines = [f"{name} = {text}" for name, text in variables.items()]
    lines += [
        f"rule cuda\n  command = $job $out $nvcc $nvccflags {compile_}\n{depends}",
        f"rule cxx\n  command = $job $out $cxx $cxxflags {compile_}\n{depends}",
        "rule link\n  command = $cxx $in $linkflags -o $out",
        "rule module\n  command = $job $out $cxx $moduleflags $in -o $out",
    ]
    objects = []
    for source in [*sorted(CSRC.rglob("*.cu")), *sorted((CSRC / "bindings").glob("*.cpp"))]:
        if source.name != "module.cpp":
            objects.append(f"{source.relative_to(CSRC).as_posix().replace('/', '.')}.o")
            rule = "cuda" if source.suffix == ".cu" else "cxx"
            lines.append(f"build {objects[-1]}: {rule} {_ninja_path(source)}")
    lines.append(f"build libfastlm_cuda.so: link {' '.join(objects)}")
    facts = _ninja_path(CSRC / "bindings" / "module.cpp")
    lines.append(f"build {module}: module {facts} | build_facts.inc")
    _write_if_changed(out / "build.ninja", "\n".join(lines) + "\n")
    return objects


def _commands(out: Path, tools: Tools, strict: bool) -> dict[str, list[str]]:
    """The words of each command, as ninja's variables."""
    import pybind11

    cuda, torch = tools.toolkit, tools.torch
    lib = [cuda / name for name in ("lib64", "lib", f"targets/{os.uname().machine}-linux/lib")]
    cudart = next((p for p in lib if (p / "libcudart_static.a").exists()), None)
    if cudart is None:
        raise BuildError(f"libcudart_static.a was not found in {cuda}: {INSTALL_NVCC}")
    oldest = next(iter(TARGETS))
    gencode = []
    for real, virtual in TARGETS.items():
        code = f"{real},{virtual}" if real == oldest else real
        gencode += ["-gencode", f"arch={virtual},code=[{code}]"]
    host = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    host += ["-Werror"] if strict else []
    nvcc = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", *gencode]
    nvcc += ["-ccbin", shlex.quote(tools.cxx), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    nvcc += ["-Werror", "all-warnings"] if strict else []
    q = lambda path: shlex.quote(str(path)).replace("$", "$$")
    system = lambda *folders: [w for folder in folders for w in ("-isystem", q(folder))]
    link = ["-shared", "-Wl,--as-needed,-s,--exclude-libs,ALL", f"-L{q(cudart)}"]
    link += ["-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    link += ["-Wl,--no-as-needed", f"-L{q(torch / 'lib')}", "-ltorch", "-ltorch_cpu"]
    python = [pybind11.get_include(), sysconfig.get_path("include")]
    return {
        "job": [q(sys.executable), q(CSRC / "build.py"), "--job"],
        "nvcc": [q(tools.nvcc)],
        "cxx": [q(tools.cxx)],
        "nvccflags": [*nvcc, f"-I{q(CSRC)}"],
        "cxxflags": [*host, STABLE_ABI, *system(torch / "include", cuda / "include"),
                     f"-I{q(CSRC)}"],
        "moduleflags": ["-shared", "-s", *host, *system(*python), f"-I{q(out)}"],
        "linkflags": link,
    }  # fmt: skip


def _ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _ninja(out: Path, target: str) -> None:
    command = [sys.executable, "-m", "ninja", "-C", str(out), f"-j{_jobs()}", target]
    # Isolated builds find the ninja of their own environment through PYTHONPATH.
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"the compiler failed:\n{(result.stdout + result.stderr)[-6000:]}")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# --- facts about the kernels, from what ptxas says and from the names of their launches' bounds


def kernel_facts(out: Path, objects: list[str]) -> list[dict]:
    """Of each kernel and target: registers, spilled bytes, and the most threads and bytes of shared
    memory, static and dynamic, of a block: -1 for all that it may have."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<target>\w+)'.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    facts = []
    for log in (out / f"{o}.log" for o in objects):
        for found in entry.finditer(log.read_text()):
            static = re.search(r"(\d+) bytes smem", found["rest"])
            facts.append({
                "kernel": found["name"],
                "target": found["target"],
                "registers": int(found["registers"]),
                "spills": int(found["stores"]) + int(found["loads"]),
                "shared": int(static[1]) if static else 0,
            })  # fmt: skip
    bounds = _bounds([out / o for o in objects])
    for fact, name in zip(facts, demangled([f["kernel"] for f in facts]), strict=True):
        if name not in bounds:
            raise BuildError(f"{name} is launched without `bounded` of csrc/arch/platform.cuh")
        fact["kernel"] = name
        fact["threads"], dynamic = bounds[name]
        fact["shared"] = fact["shared"] + dynamic if dynamic >= 0 else -1
    return sorted(facts, key=lambda f: (f["target"], f["kernel"]))


def _bounds(objects: list[Path]) -> dict[str, tuple[int, int]]:
    """Most threads and dynamic shared bytes of each kernel (-1: all), from names of `bounded`."""
    text = subprocess.run(["nm", *objects], capture_output=True, text=True, check=True).stdout
    symbols = _readable(re.findall(r"\b_ZN6fastlm7boundedI\w+", text))
    # bounded<&(a_kernel<__half, 4>(Call)), 512, -1>, or bounded<&a_kernel, ... of no template
    parts = (re.fullmatch(r"bounded<&\(?([^(]+?)(?:\(.*)?, (\d+), (-?\d+)>", s) for s in symbols)
    return {part[1]: (int(part[2]), int(part[3])) for part in parts}


def demangled(names: list[str]) -> list[str]:
    """`norm_fwd_kernel<__half, 4>` of each mangled name."""
    return [name.split("(")[0] for name in _readable(names)]


def _readable(names: list[str]) -> list[str]:
    filtered = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.split("\n")[: len(names)]
    for noise in ("(anonymous namespace)::", "fastlm::", "void "):
        filtered = [name.replace(noise, "") for name in filtered]
    return [re.sub(r"\((?:int|bool)\)", "", name) for name in filtered]


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
        f" {f['threads']}, {f['shared']}}},"
        for f in kernel_facts(out, objects)
    ]
    _write_if_changed(out / "build_facts.inc", "\n".join([*lines, "};"]) + "\n")


def _run_job(output: str, command: list[str]) -> int:
    """Runs a compiler; keeps what it says in OUTPUT.log and what it took in OUTPUT.job."""
    start = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    Path(f"{output}.log").write_text(result.stdout + result.stderr)
    took = {
        "seconds": round(time.monotonic() - start, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_mib": round(used.ru_maxrss / 1024),
    }
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
