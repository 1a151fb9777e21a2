"""Every Triton kernel compiles for every target, within its registers and shared memory.

The golden table depends on triton's version, which the test requirements pin. After a change of a
kernel or a configuration: `python tests/support/compile_gate.py --update`, and review the diff.
"""

import ast
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import compile_gate
import pytest
import sass
from compile_gate import Row, broken_rules
from golden import read_table, write_table

# Kernels that no configuration of a target launches.
UNUSED = {"gfx942": {"norm_bwd_parts_kernel"}}
UPDATE = "python tests/support/compile_gate.py --update"


@pytest.mark.long
@pytest.mark.parametrize("target", compile_gate.TARGETS)
def test_compile_for(target):
    rows, problems = compile_gate.compile_target(target, f"--known={compile_gate.GOLDEN}")
    problems += [f"{row.key}: {rule}" for row in rows for rule in broken_rules(row)]
    golden = {
        key: row for key, row in read_table(compile_gate.GOLDEN, Row).items() if key[0] == target
    }
    for row in rows:
        if row != golden.pop(row.key, None):
            problems.append(f"differs from the golden table ({UPDATE}): {row}")
    problems += [f"only in the golden table ({UPDATE}): {key}" for key in golden]
    assert rows and not problems, "\n".join(problems)


@pytest.mark.parametrize("target", compile_gate.TARGETS)
def test_compile_covers_every_kernel(target):
    covered = {
        kernel.split("#")[0]
        for name, _, kernel in read_table(compile_gate.GOLDEN, Row)
        if name == target
    }
    kernels = Path(find_spec("fastlm.kernels").origin).parent
    names = {
        node.name.strip("_")
        for file in kernels.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    unused = UNUSED.get(target, set())
    assert names and names == covered | unused and not covered & unused


def _row(**changes) -> Row:
    row = {
        "target": "sm_90", "case": "attention-bf16-d128-full", "kernel": "k", "warps": 8,
        "registers": 255, "spills": 0, "shared": 1000, "load_bits": 128, "store_bits": 128,
        "dot": "wgmma", "resident": 8, "source": "",
    }  # fmt: skip
    return Row(**{**row, **changes})


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, None),
        ({"spills": 8}, "spills 8 bytes"),
        ({"spills": 8, "case": "attention-bf16-d256-full"}, None),
        ({"spills": 8, "case": "norm-bf16-odd"}, "spills 8 bytes"),
        ({"shared": 232449}, "needs 232449 bytes of shared memory, sm_90 has 232448"),
        ({"target": "gfx942", "warps": 32}, "has 2048 threads"),
        ({"dot": "mma"}, "multiplies with mma.sync instead of wgmma"),
        ({"dot": "wgmma and mma"}, "multiplies with mma.sync instead of wgmma"),
        ({"dot": "mma", "case": "attention-fp32-d64"}, None),
        ({"resident": 4}, "leaves room for 4 warps on a multiprocessor, wants 8"),
        ({"resident": 4, "case": "attention-bf16-d64-decode-odd"}, None),
        ({"resident": 0, "case": "norm-bf16-odd"}, "leaves room for 0 warps"),
        ({"dot": "wgmma, serial"}, "waits for each wgmma before the next"),
        (
            {"dot": "wgmma and mma, serial", "case": "attention-bf16-d64-decode-odd"},
            "waits for each",
        ),
        ({"case": "norm-bf16-aligned", "load_bits": 32}, "loads 32 bits at a time"),
        ({"case": "norm-bf16-aligned", "load_bits": 0}, "loads 0 bits at a time"),
        ({"case": "norm-bf16-aligned", "store_bits": 64}, "stores 64 bits at a time"),
        ({"case": "norm-bf16-aligned", "store_bits": 0}, "stores 0 bits at a time"),
        ({"case": "norm-bf16-aligned", "store_bits": 16, "target": "gfx942"}, None),
        ({"case": "norm-bf16-aligned", "store_bits": 16, "kernel": "column_sum_kernel#2"}, None),
        ({"case": "norm-bf16-odd", "load_bits": 16, "store_bits": 16}, None),
        ({"case": "loss-bf16-shifted", "load_bits": 32}, None),
        ({"case": "loss-bf16-shifted", "load_bits": 16}, "loads 16 bits at a time"),
    ],
)
def test_compile_rules(changes, rule):
    broken = list(broken_rules(_row(**changes)))
    assert len(broken) == (rule is not None)
    assert not broken or broken[0].startswith(rule)


def test_compile_excepts_what_has_to_be():
    """From wide stores: each exception is one of a kernel that has none."""
    rows = read_table(compile_gate.GOLDEN, Row).values()
    nvidia = [row for row in rows if compile_gate.TARGETS[row.target].backend == "cuda"]
    narrow = [row for row in nvidia if "-aligned" in row.case and row.store_bits < 128]
    assert {compile_gate.few_stores(row) for row in narrow} == set(compile_gate.FEW_STORES)


@pytest.mark.parametrize(
    ("instruction", "loads", "stores", "spills"),
    [
        ("LDG.E.128.CONSTANT", 128, 0, 0),
        ("LDG.E.U16", 16, 0, 0),
        ("LDGSTS.E.BYPASS.LTC128B.64", 64, 0, 0),
        ("LDGDEPBAR", 0, 0, 0),
        ("STG.E", 0, 32, 0),
        ("STG.E.EF.128", 0, 128, 0),
        ("UTMALDG.4D", 128, 0, 0),
        ("UTMASTG.2D", 0, 128, 0),
        ("UBLKCP.S.G", 128, 0, 0),
        ("UBLKCP.G.S", 0, 128, 0),
        ("STL.64", 0, 0, 8),
        ("LDS.128", 0, 0, 0),
    ],
)
def test_compile_reads_instructions(instruction, loads, stores, spills):
    accesses = sass.Accesses()
    accesses.add(instruction)
    expected = {"spills": spills, "load_bits": loads, "store_bits": stores}
    assert accesses.columns() == expected


KERNEL = (
    f"import sys; sys.path.insert(0, {str(compile_gate.HERE)!r})\n"
    "import torch, triton, triton.language as tl\n"
    "from compile_cases import Case, tensor\n"
    "fused = {'enable_fp_fusion': True}\n"
    "@triton.jit\n"
    "def _good_kernel(x_ptr, N: tl.constexpr):\n"
    "    tl.store(x_ptr + tl.arange(0, N), 0.0)\n"
)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compile_tells_kernels_apart(tmp_path, target):
    """Each has the widths of its own machine code, whatever lies before it."""
    script = tmp_path / "cases.py"
    script.write_text(
        KERNEL + "@triton.jit\n"
        "def _copy_kernel(x_ptr, y_ptr, STRIDE: tl.constexpr):\n"
        "    at = tl.arange(0, 1024)\n"
        "    tl.store(y_ptr + at, tl.load(x_ptr + at * STRIDE))\n"
        "def copy(stride):\n"
        "    _copy_kernel[(1,)](tensor(4096), tensor(1024), STRIDE=stride, **fused)\n"
        "def cases():\n"
        "    for stride in (1, 3, 1):\n"
        "        yield Case(f'copy{stride}', lambda stride=stride: copy(stride))\n"
        "        yield Case('store', lambda: _good_kernel[(1,)](tensor(2048), N=2048, **fused))\n"
    )
    rows, errors = compile_gate.compile_target(target, f"--script={script}")
    widths = [(row.case, row.load_bits, row.store_bits) for row in rows]
    store = ("store", 0, 128)
    assert not errors
    assert widths == [("copy1", 128, 128), store, ("copy3", 32, 128), store, *widths[:2]]


def test_compile_leaves_out_what_is_known(tmp_path):
    """That is, a row of the same source, though not the first row of a kernel."""
    script, table = tmp_path / "cases.py", tmp_path / "golden.csv"
    script.write_text(
        KERNEL + "def cases():\n"
        "    for n in (64, 128, 256):\n"
        "        yield Case(f'n{n}', lambda n=n: _good_kernel[(1,)](tensor(n), N=n, **fused))\n"
    )
    made, errors = compile_gate.compile_target("sm_90", f"--script={script}")
    assert not errors and [row.case for row in made] == ["n64", "n128", "n256"]
    assert len({row.source for row in made}) == 3
    other = [replace(row, registers=row.registers + 1) for row in made]
    other[2] = replace(other[2], source="another")
    write_table(table, other)
    again, errors = compile_gate.compile_target("sm_90", f"--script={script}", f"--known={table}")
    in_table = {row.case: row for row in sorted(other)}
    first = next(iter(in_table))
    assert not errors
    for row, compiled in zip(again, made, strict=True):
        known = row.case not in (first, "n256")
        assert row == (in_table[row.case] if known else compiled)


def test_compile_reports_a_broken_kernel(tmp_path):
    """A kernel that does not compile is an error of its case, and the other cases go on."""
    script = tmp_path / "cases.py"
    script.write_text(
        KERNEL + "@triton.jit\n"
        "def _bad_kernel(x_ptr, N: tl.constexpr):\n"
        "    tl.store(x_ptr + tl.arange(0, N), undefined)\n"
        "def cases():\n"
        "    for fn in (_bad_kernel, _good_kernel):\n"
        "        yield Case(fn.__name__, lambda fn=fn: fn[(1,)](tensor(64), N=64, **fused))\n"
        "    yield Case('nothing', lambda: None)\n"
    )
    rows, errors = compile_gate.compile_target("sm_90", f"--script={script}")
    assert [row.kernel for row in rows] == ["good_kernel"]
    assert len(errors) == 2 and "undefined" in errors[0]
    assert errors[1] == "sm_90 nothing: AssertionError: nothing launched no kernel"
