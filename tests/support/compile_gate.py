"""Compiles every Triton kernel as its launcher would launch it, for GPUs that are not there.

    python tests/support/compile_gate.py --only attention --target sm_90  # print a table
    python tests/support/compile_gate.py --case d64 --asm out             # and keep the PTX
    python tests/support/compile_gate.py --update                         # write the golden one

The public functions of fastlm run on meta tensors, forward and backward, with three things
replaced: the contracts call their launchers directly, `kernels/configs.py` answers for the target,
and Triton's `JITFunction.run` compiles without launching. One row for each compiled kernel has what
ptxas says of registers, and the machine code (sass.py) of spills and of the widths of accesses; on
AMD, what the assembler says.

The cases are in compile_cases.py; `--script file.py` takes them from another file of that form.

A row has the key of what was compiled: the source of the kernel and of all that it calls, types,
constants, options, target, and the versions of Triton and its assembler. The same key gives the
same row, so the tests compile each kernel of each target once, and beside these what has another
key than in the golden table (`--known`). Here everything is compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path

import sass
from golden import median_by_size, read_table, write_table

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden" / "kernels.csv"
CASES = HERE / "compile_cases.py"


@dataclass(frozen=True)
class Target:
    """A GPU by its limits: shared memory of one block, in bytes, and multiprocessors.

    On a multiprocessor `warps` fit, which share `registers` for each of their lanes.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared: int
    multiprocessors: int
    warps: int = 64
    registers: int = 2048

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """Warps of a kernel that run on a multiprocessor at a time; 0 if it cannot be launched."""
        reserved = 1024 if self.backend == "cuda" else 0  # of shared memory, for each block
        registers = -(-max(registers, 1) // 8) * 8
        limits = [self.warps // warps, self.registers // (registers * warps)]
        if shared + reserved:
            limits.append((self.shared + reserved) // (shared + reserved))
        return min(limits) * warps


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, 108),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, 132),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, 148),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, 304, warps=32),
}


@dataclass(frozen=True, order=True)
class Row:
    """One compiled kernel.

    `spills` and `shared` are bytes (spills on AMD: registers). Half of the bytes that the kernel's
    load instructions read from global memory come in pieces of at least `load_bits`, of its stores
    `store_bits`; 0 for none. `dot` is the instruction of its matrix products, or both; "wgmma,
    serial" where ptxas found that it has to wait for each (C7510 to C7520 in its log). `resident`
    warps run on a multiprocessor at a time. `source` is the key of what was compiled.
    """

    target: str
    case: str
    kernel: str
    warps: int
    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int
    dot: str
    resident: int
    source: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.target, self.case, self.kernel


def compile_target(target: str, *arguments: str) -> tuple[list[Row], list[str]]:
    """Rows and errors of one target's cases, compiled in a process of their own.

    Args:
        target: a name in `TARGETS`.
        arguments: command-line options that select cases.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    rows, errors, memory = [], [], {}
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, __file__, "--worker", "--target", target, *arguments]
        worker = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for line in worker.stdout:
            result = json.loads(line)
            if "memory" in result:  # the last line, of all cases
                memory = {(target, case, kernel): m for case, kernel, m in result["memory"]}
                continue
            rows += [Row(**row) for row in result["rows"]]
            if "--times" in arguments:
                took = f"{result['seconds']:6.1f} s  {result['compiled']:2} compiled"
                print(f"{took}  {target}  {result['case']}", flush=True)
            if "error" in result:
                errors.append(f"{target} {result['case']}: {result['error']}")
        if worker.wait() != 0:
            errors.append(f"{target}: the compiling process ended with {worker.returncode}")
    return [replace(row, **memory.get(row.key, {})) for row in rows], errors


def broken_rules(row: Row) -> Iterator[str]:
    """What a kernel must keep on its target whatever the golden table says."""
    target = TARGETS[row.target]
    headdim = re.search(r"-d(\d+)", row.case)
    small = headdim is None or int(headdim[1]) <= 128
    # Options of attention cost registers: one at a time they may not spill, on what is swept.
    many = "-options-many" in row.case or ("-options" in row.case and row.target == "sm_100")
    if row.spills and small and not many and target.backend == "cuda":
        yield f"spills {row.spills} bytes"
    if row.shared > target.shared:
        yield f"needs {row.shared} bytes of shared memory, {row.target} has {target.shared}"
    if row.warps * target.warp_size > 1024:
        yield f"has {row.warps * target.warp_size} threads"
    least = 8 if row.case.startswith("attention") and "-decode" not in row.case else 1
    if row.resident < least and small and target.backend == "cuda":
        yield f"leaves room for {row.resident} warps on a multiprocessor, wants {least}"
    half = "-bf16" in row.case or "-fp16" in row.case
    few_rows = "-decode" in row.case  # wgmma wants 64 rows, the queries of decoding fill 16
    if row.target == "sm_90" and half and " mma" in f" {row.dot}" and not few_rows:
        yield "multiplies with mma.sync instead of wgmma"
    if "serial" in row.dot:
        yield "waits for each wgmma before the next"
    if target.backend == "cuda":
        yield from _narrow_accesses(row)


# What names of cases promise of accesses, in bits. Rows that begin anywhere are loaded element by
# element at both ends and 16 bytes at a time between: in code of halves, a median above 16 bits.
WIDTHS = {"-aligned": 128, "-shifted": 32}
# Case and kernel of those that promise wide loads only, and why: they write few bytes.
FEW_STORES = {
    r"attention\S* attention_bwd_delta_kernel": "a number for each query",
    r"attention-bf16\S* attention_decode_combine_kernel": "a row of halves from many of floats",
    r"\S* column_sum_kernel": "a number for each column",
    r"\S* compact_kernel": "indices of rows, one after another whichever are kept",
    r"loss\S* cross_entropy_fwd_kernel": "a few numbers for each row",
    r"embedding\S* embedding_(stats|bwd_sums)_kernel": "two numbers for each row",
    # 64 columns for the 128 threads that have read them of 32 rows each.
    r"embedding\S* segment_sum_kernel#[23]": "a table of positions or types has few rows",
    r"rotary\S* segment_(parts|sum)_kernel": "a table of angles has few columns",
}


def _narrow_accesses(row: Row) -> Iterator[str]:
    """Of cases that promise wide ones. No accesses are 0 bits, which keep no promise."""
    wide = next((bits for label, bits in WIDTHS.items() if label in row.case), 0)
    if row.load_bits < wide:
        yield f"loads {row.load_bits} bits at a time, {wide} are possible"
    if row.store_bits < wide and few_stores(row) is None:
        yield f"stores {row.store_bits} bits at a time, {wide} are possible"


def few_stores(row: Row) -> str | None:
    """The entry of `FEW_STORES` that a kernel has; one with #2 has that of the kernel."""
    names = f"{row.case} {row.kernel}", f"{row.case} {row.kernel.split('#')[0]}"
    entries = (e for e in FEW_STORES if any(re.fullmatch(e, name) for name in names))
    return next(entries, None)


# From here on: the worker process, which alone imports torch, triton and fastlm.


def _pretend(name: str) -> None:
    """Points Triton, the configurations and the contracts at a target; once in a process."""
    spec = importlib.util.find_spec("fastlm")
    path = Path(spec.origin).parent / "ops" / "_library.py"
    spec = importlib.util.spec_from_file_location("fastlm.ops._library", path)
    library = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    # Meta tensors would reach the contracts' fakes; without registration they reach the launchers.
    library.contract = lambda fake, mutates=(): lambda launch: launch
    library.cuda_contract = lambda contract, fake: None

    import triton
    from triton.backends.compiler import GPUTarget

    from fastlm import backends
    from fastlm.kernels import configs, launch

    target = TARGETS[name]

    class Driver:
        def get_current_target(self):
            return GPUTarget(target.backend, target.arch, target.warp_size)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(Driver())
    launch._key = lambda *call: None  # every launch asks Triton
    configs.target = lambda device: name
    configs.multiprocessors = lambda device: target.multiprocessors
    backends._unavailable = lambda impl, device: None


class _Known(Exception):
    """Ends a compilation whose row is known."""


class Recorder:
    """Compiles what the cases of one target launch, and describes it.

    Args:
        known: rows by their key, which need not be compiled where their source is the same.
        asm: a folder for what was compiled.
    """

    def __init__(self, target: str, known: dict[tuple, Row], asm: Path | None = None):
        from triton.compiler import compiler
        from triton.runtime.jit import JITFunction

        self.target, self.known, self.asm = target, known, asm
        self.rows: list[Row] = []
        self.cubins: dict[tuple[str, str], bytes] = {}  # by case and name
        self.compiled = 0
        self.case = ""
        self._logs: dict[str, str] = {}  # a kernel that is compiled already prints no log again
        self._sources: dict[str, str] = {}  # by the hash of a kernel
        self._seen: dict[str, list[str]] = {}
        self._name = ""  # of what is compiled now
        self._compile = JITFunction.run
        JITFunction.run = lambda fn, *args, **kwargs: self._run(fn, *args, **kwargs)
        self._cache_key = compiler.get_cache_key
        compiler.get_cache_key = self._key
        # Triton's keys have it, though nothing but debug information depends on it.
        JITFunction.starting_line_number = property(lambda fn: 0, lambda fn, line: None)

    def record(self, case) -> list[Row]:
        self.rows, self.case, self._seen = [], case.name, {}
        case.run()
        assert self.rows, f"{case.name} launched no kernel"
        return self.rows

    def _run(self, fn, *args, grid, warmup, **kwargs):
        assert "enable_fp_fusion" in kwargs, f"{fn.__name__}: Triton's default would decide"
        self._name = fn.__name__
        log = io.StringIO()
        try:
            with contextlib.redirect_stdout(log):
                kernel = self._compile(fn, *args, grid=grid, warmup=True, **kwargs)
        except _Known:
            return None
        self._logs.setdefault(kernel.hash, log.getvalue())
        source = self._sources[kernel.hash]
        name = self._name_of(source)
        if name is not None:
            self._add(source, self._describe(name, kernel))
            if "cubin" in kernel.asm:
                self.cubins[self.case, name] = kernel.asm["cubin"]
            if self.asm:
                self._write(name, kernel)
        return kernel

    def _name_of(self, source: str) -> str | None:
        """What the case's table will call a kernel of this source; None where it has it."""
        seen = self._seen.get(self._name, [])
        if source in seen:
            return None
        return self._name.strip("_") + (f"#{len(seen) + 1}" if seen else "")

    def _add(self, source: str, row: Row) -> None:
        self._seen.setdefault(self._name, []).append(source)
        self.rows.append(row)

    def _key(self, src, backend, options, env_vars) -> str:
        """Triton's key of a compilation, which begins; raises _Known where it need not.

        Our key has not the hash of Triton's own files, which depends on the Python they are for.
        """
        import triton

        parts = triton.__version__, src.hash(), backend.hash(), options.hash()
        source = hashlib.sha256(repr((*parts, sorted(env_vars.items()))).encode()).hexdigest()[:12]
        key = self._cache_key(src, backend, options, env_vars)
        self._sources[hashlib.sha256(key.encode()).hexdigest()] = source
        name = self._name_of(source)
        row = self.known.get((self.target, self.case, name))
        if row is not None and row.source == source:
            self._add(source, row)
            raise _Known
        if name is None:
            raise _Known
        self.compiled += 1
        return key

    def memory(self) -> list[tuple[str, str, dict[str, int]]]:
        """Case, kernel and what its row still needs, of all that was compiled for NVIDIA's GPUs."""
        found = sass.accesses(list(self.cubins.values()), TARGETS[self.target].arch)
        return [(*key, a.columns()) for key, a in zip(self.cubins, found, strict=True)]

    def _describe(self, name: str, kernel) -> Row:
        """A row; on NVIDIA's GPUs without the columns of `memory`."""
        meta = kernel.metadata
        read = _nvidia_resources if "ptx" in kernel.asm else _amd_resources
        registers, *memory, dot = read(kernel.asm, self._logs[kernel.hash])
        spills, load_bits, store_bits = memory or (0, 0, 0)
        where = self.target, self.case, name, meta.num_warps
        resident = TARGETS[self.target].resident(meta.num_warps, registers, meta.shared)
        numbers = registers, spills, meta.shared, load_bits, store_bits, dot, resident
        return Row(*where, *numbers, self._sources[kernel.hash])

    def _write(self, name: str, kernel) -> None:
        self.asm.mkdir(parents=True, exist_ok=True)
        for kind in ("ttgir", "ptx", "amdgcn"):
            if kind in kernel.asm:
                file = self.asm / f"{self.target}.{self.case}.{name}.{kind}"
                file.write_text(kernel.asm[kind])


def _nvidia_resources(asm, log: str) -> tuple[int, str]:
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    dots = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma"}
    serial = ", serial" if "wgmma.mma_async instructions are serialized" in log else ""
    return registers, _all(dots, asm["ptx"]) + serial


def _amd_resources(asm, log: str) -> tuple[int, int, int, int, str]:
    text = asm["amdgcn"]
    count = {key: int(n) for key, n in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    spills = count["vgpr_spill_count"] + count["sgpr_spill_count"]
    words = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}
    widths = {"load": [], "store": []}
    for kind, size in re.findall(r"(?:global|buffer)_(load|store)_(\w+)", text):
        widths[kind].append(words.get(size, 16))
    bits = [median_by_size(widths[kind]) for kind in ("load", "store")]
    return count["vgpr_count"], spills, *bits, _all({"v_mfma": "mfma"}, text)


def _all(names: dict[str, str], text: str) -> str:
    return " and ".join(short for name, short in names.items() if name in text)


def known_rows(table: Path | None) -> dict[tuple[str, str, str], Row]:
    """Of a golden table, without the first of each kernel of a target, which are compiled."""
    rows, first = {} if table is None else read_table(table, Row), set()
    for key, row in list(rows.items()):
        kernel = row.target, row.kernel.split("#")[0]
        if kernel not in first:
            first.add(kernel)
            del rows[key]
    return rows


def _work(options) -> None:
    """Prints one line of JSON for each case: its name, rows and, where it failed, the error.

    The last line has the columns that are known for all of them at once.
    """
    _pretend(options.target)
    recorder = Recorder(options.target, known_rows(options.known), options.asm)
    for case in runpy.run_path(str(options.script))["cases"]():
        if options.only and case.name.split("-")[0] != options.only:
            continue
        if options.case not in case.name or options.target not in (case.targets or TARGETS):
            continue
        result, start = {"case": case.name, "rows": []}, _cpu_seconds()
        recorder.compiled = 0
        try:
            result["rows"] = [asdict(row) for row in recorder.record(case)]
        except Exception as error:  # report the others too
            result["error"] = f"{type(error).__name__}: {error}"
            if options.traceback:
                raise
        result |= {"seconds": _cpu_seconds() - start, "compiled": recorder.compiled}
        print(json.dumps(result), flush=True)
    print(json.dumps({"memory": recorder.memory()}))


def _cpu_seconds() -> float:
    """Of this process and of the assemblers that it ran."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _print_table(rows: list[Row]) -> None:
    cells = [[f.name for f in fields(Row)], *([str(v) for v in astuple(r)] for r in sorted(rows))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row, source in zip(cells, [None, *sorted(rows)], strict=True):
        broken = "; ".join(broken_rules(source)) if source else ""
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line, f"<- {broken}" if broken else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, help="one target (default: all)")
    parser.add_argument("--only", default="", help="one family: norm, attention, ffn, loss, ...")
    parser.add_argument("--case", default="", help="cases whose name contains this")
    parser.add_argument("--script", type=Path, default=CASES, help="where the cases are")
    parser.add_argument(
        "--asm", type=Path, help="write ttgir and ptx or amdgcn of each kernel here"
    )
    parser.add_argument("--update", action="store_true", help="rewrite the golden table")
    parser.add_argument("--times", action="store_true", help="CPU seconds of each case")
    parser.add_argument("--known", type=Path, help="a golden table: compile what is not in it")
    parser.add_argument("--traceback", action="store_true", help="stop at the first error")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options)
        return 0
    if options.update and (options.target or options.only or options.case):
        parser.error("--update takes all targets and cases")
    passed = [f"--only={options.only}", f"--case={options.case}", f"--script={options.script}"]
    passed += [f"--asm={options.asm}"] if options.asm else []
    passed += [f"--known={options.known}"] if options.known else []
    passed += ["--traceback"] if options.traceback else []
    passed += ["--times"] if options.times else []
    start = time.monotonic()
    names = [options.target] if options.target else list(TARGETS)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda name: compile_target(name, *passed), names))
    rows = [row for result in results for row in result[0]]
    errors = [error for result in results for error in result[1]]
    _print_table(rows)
    print(*errors, sep="\n")
    print(f"{len(rows)} kernels, {len(errors)} errors, {time.monotonic() - start:.0f} s")
    if options.update and not errors:
        write_table(GOLDEN, rows)
    return 1 if errors or any(True for row in rows for _ in broken_rules(row)) else 0


if __name__ == "__main__":
    sys.exit(main())
