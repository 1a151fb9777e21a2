"""Builds the CUDA C++ library with nvcc, and reads what the compiler made of each kernel.

    python tests/support/cuda_gate.py [--update]         # print the table, or write the golden one

The build is csrc/build.py's own, of all targets, into build/cuda; a second one compiles what has
changed. Needs no GPU. The widths of global accesses and the tensor-core instructions come from the
SASS, by the cuobjdump of triton's wheel; the rest is what `_C` says.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from golden import median_by_size, write_table

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "cuda_kernels.csv"
OUT = ROOT / "build" / "cuda"
PACKAGE = OUT / "package"
LIBRARY = PACKAGE / "libfastlm_cuda.so"


@dataclass(frozen=True, order=True)
class Row:
    """One kernel of one target.

    `spills` and `shared` are bytes; `threads` and `shared` are the most that a launch asks for a
    block, and `occupancy` is how many such blocks a multiprocessor holds at a time. Half of the
    bytes that its load instructions read from global memory come in pieces of at least `load_bits`,
    of its stores `store_bits`; 0 for none. `mma` is the number of tensor-core instructions in its
    code.
    """

    target: str
    kernel: str
    registers: int
    spills: int
    threads: int
    shared: int
    occupancy: int
    load_bits: int
    store_bits: int
    mma: int

    @property
    def key(self) -> tuple[str, str]:
        return self.target, self.kernel


@functools.cache
def builder():
    """csrc/build.py as a module."""
    spec = importlib.util.spec_from_file_location("fastlm_build", ROOT / "csrc" / "build.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def build() -> Path:
    """The package folder with the library and `_C`; safe for processes that ask for it at once."""
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builder().build(PACKAGE, builder().find_tools())
    return PACKAGE


@functools.cache
def facts():
    """`fastlm._C` of the build."""
    (path,) = build().glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("fastlm._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> list[Row]:
    """What the compiler made of every kernel that the library holds."""
    kernels = facts().kernels()
    accesses = _accesses()
    columns = ("load_bits", "store_bits", "mma")
    return sorted(
        Row(**fact, **dict(zip(columns, accesses[fact["target"], fact["kernel"]], strict=True)))
        for fact in kernels
    )


def broken_rules(row: Row) -> Iterator[str]:
    """What a kernel must keep whatever the golden table says."""
    if row.spills:
        yield f"spills {row.spills} bytes"
    if row.shared > BLOCK_SHARED[row.target]:
        yield f"asks for {row.shared} bytes of shared memory, {BLOCK_SHARED[row.target]} are there"
    if row.mma == 0 and re.match(r"attention_(?!delta)\w+_kernel", row.kernel):
        yield "multiplies without tensor cores"
    for pattern, load_bits, store_bits in WIDE:
        if re.fullmatch(pattern, row.kernel):
            if row.load_bits < load_bits:
                yield f"loads {row.load_bits} bits at a time, {load_bits} are possible"
            if row.store_bits < store_bits:
                yield f"stores {row.store_bits} bits at a time, {store_bits} are possible"


BLOCK_SHARED = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024}  # bytes that a block may have

# Kernels that promise wide accesses, with the bits of their loads and stores; the others are for
# what is not aligned, or write few bytes. Where halves go with floats in vectors of 4, halves take
# 8 bytes.
HALF = "(?:__half|__nv_bfloat16)"
WIDE = (
    (rf"norm_(?:fwd|bwd)(?:_wide)?_kernel<({HALF}), \1, 8(?:, \w+)?>", 128, 128),
    (r"norm_(?:fwd|bwd)(?:_wide)?_kernel<(?!Any)\w+, float, 4(?:, \w+)?>", 128, 64),
    (rf"norm_bwd(?:_wide)?_kernel<float, {HALF}, 4(?:, \w+)?>", 64, 64),
    (r"norm_bwd_columns_kernel<(?!Any).*>", 128, 0),
    (r"(?:bias_act|glu)_(?:fwd|bwd)_kernel<\w+, true>", 128, 128),
    (r"attention_(?:fwd|dq|dkv)_kernel<.*>", 128, 128),
    (r"attention_delta_kernel<.*>", 128, 0),
)


def _accesses() -> dict[tuple[str, str], tuple[int, int, int]]:
    """(load_bits, store_bits, mma) of each (target, kernel), from the SASS."""
    wheel = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    command = [str(wheel / "cuobjdump"), "-sass", str(LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instruction = re.compile(r"\b(LDG|LDGSTS|STG|HMMA|HGMMA)(\.\S*)")
    # Each cubin begins with its architecture, each function with its name.
    found, names = [], []
    for cubin in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        target = cubin.split(maxsplit=1)[0]
        for function in re.split(r"^\s*Function : ", cubin, flags=re.MULTILINE)[1:]:
            name, body = function.split("\n", 1)
            names.append(name.strip())
            code = {"LDG": [], "LDGSTS": [], "STG": [], "HMMA": [], "HGMMA": []}
            for kind, suffix in instruction.findall(body):
                code[kind].append(suffix)
            bits = _median_bits(code["LDG"] + code["LDGSTS"]), _median_bits(code["STG"])
            found.append((target, (*bits, len(code["HMMA"] + code["HGMMA"]))))
    demangled = builder().demangled(names)
    return {(t, name): values for (t, values), name in zip(found, demangled, strict=True)}


def _median_bits(instructions: list[str]) -> int:
    sizes = [re.search(r"\.[US]?(8|16|64|128)\b", text) for text in instructions]
    return median_by_size([int(size[1]) if size else 32 for size in sizes])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="rewrite the golden table")
    options = parser.parse_args()
    table = rows()
    broken = False
    for row in table:
        problems = "; ".join(broken_rules(row))
        broken = broken or bool(problems)
        print(*astuple(row), f"<- {problems}" if problems else "", sep="  ")
    if options.update:
        write_table(GOLDEN, table)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
