"""Builds and loads the host build of the CUDA C++ kernels, which runs them on the CPU.

    python tests/support/simt_build.py [--sanitized]    # build, and print where it is

g++ compiles what nvcc compiles, csrc with its bindings, and the scheduler of tests/simt in the
place of a GPU. After `load()`, `impl="cuda"` takes CPU tensors. Objects are kept in build/ under a
hash of all that they depend on, so that a run compiles what has changed.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_gate

ROOT = Path(__file__).resolve().parents[2]
SIMT = ROOT / "tests" / "simt"
OUT = ROOT / "build" / "simt"
COPIES = ("late", "early")
SCHEDULES = ("lockstep", "first", "last", "random")
MODES = [(copies, schedule) for copies in COPIES for schedule in SCHEDULES]

# Nothing that makes two calls in a kernel of one, or one of two: see `meet` in simt.h.
PLACES = ["-fno-thread-jumps", "-fno-crossjumping"]
WARNINGS = "-Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-attributes".split()
# The lowest level at which the emulated kernels are not slower than compiling them is.
OPTIMIZED = ["-O1"]
SCHEDULER = ["-O3"]  # small, and most of the time
# Compiled for a few launches: -O1 takes twice as long to compile, more than it saves.
SANITIZED = ["-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc").rglob("*.cu"))


def kernel_names() -> set[str]:
    """Of every kernel in csrc; each ends in `_kernel`, whatever launch bounds come before."""
    files = [file for end in ("*.cu", "*.cuh") for file in (ROOT / "csrc").rglob(end)]
    source = "\n".join(file.read_text() for file in files)
    names = re.findall(r"__global__ void\b[^;{]*?\b(\w+_kernel)\(", source)
    assert names and len(names) == source.count("__global__")
    return set(names)


def binding_sources() -> list[Path]:
    """All but the module of host facts, which has no operator."""
    files = (ROOT / "csrc" / "bindings").glob("*.cpp")
    return sorted(file for file in files if file.name != "module.cpp")


def _package(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    return Path(importlib.util.find_spec(name).origin).parent


def _flags(sanitized: bool) -> list[str]:
    torch = _package("torch") / "include"
    cuda = _package("triton") / "backends" / "nvidia" / "include"
    return [
        *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-DFASTLM_SIMT"),
        cuda_gate.builder().STABLE_ABI,
        *(SANITIZED if sanitized else OPTIMIZED),
        *PLACES,
        *WARNINGS,
        *("-I", str(ROOT / "csrc"), "-I", str(SIMT)),
        *("-isystem", str(torch), "-isystem", str(cuda)),
    ]


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _dependencies(listed: Path) -> list[Path]:
    """The files in what g++ -MMD wrote: "target: file file", with spaces and line ends escaped."""
    text = listed.read_text().split(": ", 1)[1].replace("\\\n", " ")
    names = re.split(r"(?<!\\)\s+", text.strip())
    return [Path(name.replace("\\ ", " ")) for name in names]


def _compile(source: Path, sanitized: bool) -> Path:
    """The object file, made anew where the source, a header that it includes, or a flag changed."""
    flags = _flags(sanitized)
    if source.parent == SIMT and source.suffix == ".cpp":
        flags += SCHEDULER
    base = f"{source.stem}-{_hash(str(source), flags, _torch_version())}"
    listed = OUT / f"{base}.d"

    def target() -> Path:
        contents = [file.read_bytes() for file in _dependencies(listed) if file.exists()]
        return OUT / f"{base}-{_hash(contents)}.o"

    if not listed.exists() or not target().exists():
        partial = OUT / f"{base}.part"
        _run(["g++", *flags, "-MMD", "-MF", str(listed), "-x", "c++", "-c", str(source),
              "-o", str(partial)])  # fmt: skip
        for old in OUT.glob(f"{base}-*.o"):
            old.unlink()
        partial.rename(target())
    return target()


@functools.cache
def _torch_version() -> str:
    return (_package("torch") / "version.py").read_text()


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-8000:]}")


def build(sources: tuple[Path, ...] | None = None, *, sanitized: bool = False) -> Path:
    """The shared library, built if need be; safe for processes that ask for it at once.

    Args:
        sources: what to link with the scheduler; None: all of csrc.
        sanitized: with the address and undefined-behaviour sanitizers, see `sanitized_environment`.
    """
    sources = sources or (*kernel_sources(), *binding_sources())
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / ("lock-sanitized" if sanitized else "lock")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            files = (*sorted(SIMT.glob("*.cpp")), *sources)
            objects = list(pool.map(lambda file: _compile(file, sanitized), files))
        torch = _package("torch") / "lib"
        link = ["-shared", *(SANITIZED if sanitized else OPTIMIZED), *map(str, objects)]
        if any(file.suffix == ".cpp" for file in sources):  # bindings
            link += ["-Wl,--no-as-needed", f"-L{torch}", "-ltorch", "-ltorch_cpu"]
        library = OUT / f"libfastlm_simt-{_hash(link)}.so"
        if not library.exists():
            partial = library.with_suffix(".part")
            _run(["g++", *link, "-o", str(partial)])
            partial.rename(library)
    return library


_current: ctypes.CDLL | None = None
_path: Path | None = None
_error: Exception | None = None


def load(*, sanitized: bool = False) -> None:
    """From here on, `impl="cuda"` takes CPU tensors."""
    global _current, _path, _error
    if _error is not None:  # one attempt is enough for all tests of a process
        raise _error
    if _current is None:
        from fastlm import cuda_library

        try:
            _path = build(sanitized=sanitized)
            cuda_library.load(_path, "cpu")
            _current = ctypes.CDLL(str(_path))
        except Exception as error:
            _error = error
            raise


def configure(copies: str = "late", schedule: str = "lockstep", seed: int = 0) -> None:
    """How the kernels run from here on.

    Args:
        copies: when asynchronous copies land: as "early" or as "late" as they may.
        schedule: "lockstep"; the "first" or the "last" warp as far ahead as it can be; or "random".
        seed: of "random".
    """
    load()
    _current.simt_configure(COPIES.index(copies), SCHEDULES.index(schedule), seed)


def device(shared_bytes: int = 227 * 1024) -> None:
    """How much shared memory launchers may give to a block from here on."""
    load()
    _current.simt_device(shared_bytes)


def copied() -> int:
    """Bytes that asynchronous copies have read since the last call."""
    load()
    _current.simt_copied.restype = ctypes.c_int64
    return _current.simt_copied()


def launched() -> set[str]:
    """The names of the kernels that ran in this process."""
    if _current is None:
        return set()
    offsets = (ctypes.c_uint64 * 4096)()
    count = _current.simt_launched(offsets, len(offsets))
    listed = subprocess.run(["nm", "-C", str(_path)], capture_output=True, text=True, check=True)
    places = dict(
        line.split(maxsplit=2)[::2] for line in listed.stdout.split("\n") if line[:1] == "0"
    )
    names = {int(place, 16): name for place, name in places.items()}
    return {re.search(r"(\w+_kernel)\b", names[offset])[1] for offset in offsets[:count]}


def sanitized_environment() -> dict[str, str]:
    """The environment in which Python can load the sanitized library."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    ask = lambda name: subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(map(ask, names)),
        # Python leaks by design; its stacks are not the fibers'.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FASTLM_SIMT_SANITIZED": "1",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sanitized", action="store_true")
    print(build(sanitized=parser.parse_args().sanitized))
    return 0


if __name__ == "__main__":
    sys.exit(main())
