"""What kernels do with memory, from their machine code: with the disassembler of triton's wheel.

nvdisasm takes 0.2 s for its start and 15 ms for a kernel. So it gets the instructions of many
kernels at once, as one binary without the ELF around each, and addresses tell them apart.
"""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from golden import median_by_size

INSTRUCTION_BYTES = 16
# Copies of whole tiles too, by the tensor memory accelerator: one instruction of one thread each.
LOADS = ("LDG", "LDGSTS", "UTMALDG", "UBLKCP.S.G")
STORES = ("STG", "UTMASTG", "UTMAREDG", "UBLKCP.G.S", "UBLKRED.G.S")
LOCAL = ("LDL", "STL")


@dataclass
class Accesses:
    """Bits of each instruction, to global memory and to a thread's own, into which it spills."""

    loads: list[int] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)
    local: list[int] = field(default_factory=list)

    def columns(self) -> dict[str, int]:
        """Of the golden table: the bytes that spill, and the medians that `Row` describes."""
        return {
            "spills": sum(self.local) // 8,
            "load_bits": median_by_size(self.loads),
            "store_bits": median_by_size(self.stores),
        }

    def add(self, name: str) -> None:
        """Of an instruction with its modifiers, such as LDG.E.128.CONSTANT."""
        for kinds, widths in ((LOADS, self.loads), (STORES, self.stores), (LOCAL, self.local)):
            if any(f"{name}.".startswith(f"{kind}.") for kind in kinds):
                widths.append(_bits(name))


def accesses(cubins: list[bytes], arch: int) -> list[Accesses]:
    """Of each kernel.

    Args:
        cubins: ELF files with one kernel each, all of one architecture.
        arch: such as 90.
    """
    codes = [b"".join(_code(cubin)) for cubin in cubins]
    ends = list(accumulate(map(len, codes)))
    found = [Accesses() for _ in cubins]
    instruction = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@\S+\s+)?([A-Z]\S*)", re.MULTILINE)
    lines = instruction.findall(_disassemble(b"".join(codes), arch)) if cubins else []
    assert len(lines) * INSTRUCTION_BYTES == sum(map(len, codes)), "nvdisasm left something out"
    for address, name in lines:
        found[bisect_right(ends, int(address, 16))].add(name)
    return found


def _disassemble(code: bytes, arch: int) -> str:
    wheel = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    # From Hopper on Triton compiles for the architecture with all its own instructions.
    name = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        command = [str(wheel / "nvdisasm"), "--no-dataflow", "--binary", name, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _code(elf: bytes) -> Iterator[bytes]:
    """The sections of a 64-bit ELF file that hold instructions."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    count, names = struct.unpack_from("<HH", elf, 0x3C)
    # Of each section: name, type, flags, address, offset, size; and four more.
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + 64 * i) for i in range(count)]
    for name, _, _, _, offset, size, *_ in sections:
        if elf.startswith(b".text", sections[names][4] + name):
            yield elf[offset : offset + size]


def _bits(name: str) -> int:
    if name.startswith("U"):  # a tile, which counts as one of its pieces of 16 bytes
        return 128
    size = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
    return int(size[1]) if size else 32
