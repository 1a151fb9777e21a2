"""Rules that the code as a whole keeps: imports one way, no forbidden call, sizes, lint."""

import ast
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastlm

ROOT = Path(__file__).resolve().parent.parent
STDLIB = sys.stdlib_module_names

# What a part of the package may import at the top of a module ("top") and inside functions
# ("lazy"), besides itself and the standard library. A prefix stands for everything below it.
CORE = ("torch", "fastlm.backends", "fastlm.errors", "fastlm._version")
RULES = {
    "fastlm.reference": {"top": ("torch",), "lazy": ()},
    "fastlm.kernels": {"top": ("torch", "triton"), "lazy": ()},
    "fastlm.ops": {"top": (*CORE, "fastlm.reference"), "lazy": ("fastlm.kernels",)},
    "fastlm.layers": {"top": (*CORE, "fastlm.ops"), "lazy": ()},
    "fastlm.models": {"top": (*CORE, "fastlm.ops", "fastlm.layers"), "lazy": ("safetensors",)},
    "fastlm.backends": {"top": ("torch", "fastlm.cuda_library"), "lazy": ("fastlm",)},
    "fastlm.cuda_library": {"top": ("torch",), "lazy": ()},
    "fastlm.testing": {"top": ("torch",), "lazy": ()},
    "fastlm.shapes": {"top": (), "lazy": ()},
}
# These may import every layer above the kernels; the rest of the package never imports them.
APPLICATIONS = ("fastlm.swap", "fastlm.training", "fastlm.bench", "fastlm.cli", "fastlm.__main__")


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, `fastlm.kernels` included, with its file."""
    found = {}
    for prefix, folder in (("fastlm", ROOT / "fastlm"), ("fastlm.kernels", ROOT / "kernels")):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *parts]).removesuffix(".__init__")] = file
    return found


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def imports(file: Path, *, lazy: bool) -> set[str]:
    """Modules that the file imports at its top, or inside functions."""
    found = set()
    inner = {
        id(node)
        for fn in ast.walk(tree(file))
        if isinstance(fn, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(fn)
    }
    for node in ast.walk(tree(file)):
        if (id(node) in inner) != lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # `from fastlm.ops import norm` imports a module, `from fastlm.ops.norm import x` not.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules().keys()) or {node.module}
    return {name for name in found if name.split(".")[0] not in STDLIB}


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in prefixes)


@pytest.mark.parametrize("part", RULES)
def test_imports_go_one_way(part):
    rule, checked = RULES[part], 0
    for name, file in modules().items():
        if not within(name, (part,)):
            continue
        checked += 1
        for module in imports(file, lazy=False):
            assert within(module, (part, *rule["top"])), f"{name} imports {module}"
        for module in imports(file, lazy=True):
            allowed = (part, *rule["top"], *rule["lazy"])
            assert within(module, allowed), f"{name} imports {module} in a function"
    assert checked


def test_applications_import_no_kernel():
    """Only operators know the kernels; `bench` asks triton for a timer."""
    for name, file in modules().items():
        if within(name, APPLICATIONS):
            known = imports(file, lazy=True) - {"triton.testing"} | imports(file, lazy=False)
            bad = {module for module in known if within(module, ("fastlm.kernels", "triton"))}
            assert not bad, f"{name}: {bad}"


def test_every_module_has_a_rule():
    known = (*RULES, *APPLICATIONS, "fastlm.errors", "fastlm._version")
    assert [n for n in modules() if n != "fastlm" and not within(n, known)] == []


def test_optional_packages_are_imported_in_functions():
    """A plain install has torch, numpy and triton; the rest belongs to extras."""
    for name, file in modules().items():
        for module in imports(file, lazy=False):
            assert within(module, ("fastlm", "torch", "triton", "numpy")), f"{name}: {module}"


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


FORBIDDEN = {
    "torch.load": "runs code that a file holds; checkpoints are safetensors",
    "pickle": "runs code that a file holds",
    "eval": "runs strings",
    "exec": "runs strings",
    "torch.utils.cpp_extension": "compiles at run time",
    "tl.atomic": "is not deterministic",
    "triton.autotune": "times on the user's machine; configurations are data",
    "triton.heuristics": "hides configurations; they are data",
    "torch.cuda.synchronize": "waits for the GPU",
    "torch.cuda.empty_cache": "frees what others cache",
}
# Where a forbidden call is the point: timing waits for the GPU.
EXCEPTIONS = {("fastlm.bench", "torch.cuda.synchronize"), ("fastlm.cli", "torch.cuda.synchronize")}


@pytest.mark.parametrize("forbidden", FORBIDDEN)
def test_no_forbidden_call(forbidden):
    for name, file in modules().items():
        for node in ast.walk(tree(file)):
            used = dotted(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""
            bad = used == forbidden or used.startswith((f"{forbidden}.", f"{forbidden}_"))
            if bad and not any(
                within(name, (part,)) and forbidden == call for part, call in EXCEPTIONS
            ):
                raise AssertionError(f"{name}:{node.lineno}: {used} {FORBIDDEN[forbidden]}")
        assert forbidden not in imports(file, lazy=False) | imports(file, lazy=True)


WAITS = {"item", "tolist", "cpu", "numpy"}
WAITS_ON_THE_CPU_ALONE = {
    "fastlm.ops._attention_torch": 1,  # whether what is masked holds NaN
    "fastlm.ops._check": 1,  # names a bad target or index
    "fastlm.ops.loss": 1,  # whether a loss is NaN
    "fastlm.kernels.attention_configs": 1,  # a table of integers, computed on the CPU and cached
}


@pytest.mark.parametrize("part", ["fastlm.ops", "fastlm.layers", "fastlm.kernels"])
def test_operators_wait_for_no_device(part):
    for name, file in modules().items():
        if within(name, (part,)):
            waits = [
                f"{name}:{node.lineno}: .{node.func.attr}()"
                for node in ast.walk(tree(file))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                and node.func.attr in WAITS
            ]  # fmt: skip
            assert len(waits) == WAITS_ON_THE_CPU_ALONE.get(name, 0), waits


def test_no_cuda_call_at_import():
    """`torch.cuda.*` appears inside functions alone, also in default arguments and decorators."""
    for name, file in modules().items():
        bodies = {
            id(node)
            for fn in ast.walk(tree(file))
            if isinstance(fn, (ast.FunctionDef, ast.Lambda))
            for part in (fn.body if isinstance(fn.body, list) else [fn.body])
            for node in ast.walk(part)
        }
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Attribute) and dotted(node).startswith("torch.cuda."):
                assert id(node) in bodies, f"{name}:{node.lineno}: {dotted(node)} at import"


def test_every_masked_load_names_other():
    for name, file in modules().items():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call) and dotted(node.func) == "tl.load":
                keys = {keyword.arg for keyword in node.keywords}
                masked = "mask" in keys or len(node.args) > 1
                assert not masked or "other" in keys, f"{name}:{node.lineno}: no other="


def tracked(*suffixes: str) -> list[Path]:
    """Source files, by what git would track where this is a checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        files = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        files = [
            f for d in ("fastlm", "kernels", "tests", "benchmarks") for f in ROOT.glob(f"{d}/**/*")
        ]
    return [f for f in files if f.suffix in suffixes and f.is_file()]


def test_files_are_short():
    lengths = {f: len(f.read_text().splitlines()) for f in tracked(".py", ".cu", ".cuh", ".h")}
    assert {str(f.relative_to(ROOT)): n for f, n in lengths.items() if n > 600} == {}


def test_functions_are_short():
    """120 lines for a kernel, 100 for a host function with its docstring."""
    long = {}
    for name, file in modules().items():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef):
                limit = 120 if node.name.endswith("_kernel") else 100
                lines = node.end_lineno - node.lineno + 1
                if lines > limit:
                    long[f"{name}.{node.name}"] = lines
    assert long == {}


def test_modules_have_docstrings():
    silent = [name for name, file in modules().items() if not ast.get_docstring(tree(file))]
    assert silent == ["fastlm._version"]


@pytest.mark.parametrize("name", fastlm.ops.__all__)
def test_operators_have_docstrings(name):
    text = inspect.getdoc(getattr(fastlm, name))
    assert text and len(text.splitlines()) > 3, f"{name}: {text}"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    run = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


PLACES = re.compile(
    r"/(?:work|root|home/\w+|tmp/\w+)/|https?://(?:localhost|127\.|10\.|\w+-mirror)"
)


def test_no_file_names_a_machine():
    files = tracked(".py", ".md", ".toml", ".yml", ".cfg", ".txt", ".ini", ".json", ".sh")
    files += [ROOT / "Makefile", ROOT / ".ci" / "run"]
    this = Path(__file__).resolve()
    found = {f"{f.relative_to(ROOT)}: {m[0]}" for f in files if f != this
             for m in PLACES.finditer(f.read_text())}  # fmt: skip
    assert found == set()


def run_python(code: str, *options: str, cwd=None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", *options, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light():
    """No triton, no optional package, no CUDA, no warning; the time is printed, not judged."""
    code = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import sys
before = set(sys.modules)
import fastlm
end = time.perf_counter()
added = set(sys.modules) - before
others = {m.split('.')[0] for m in added} - {'fastlm', 'torch'} - set(sys.stdlib_module_names)
assert not others, others
assert not added & {'torch._dynamo', 'torch._inductor', 'fastlm._C', 'fastlm.kernels'}, added
assert not torch.cuda.is_initialized()
print(f'import torch {1e3 * (middle - start):.0f} ms, fastlm adds {1e3 * (end - middle):.0f} ms')
"""
    print(
        run_python(
            code, "-W", "error::UserWarning:fastlm", "-W", "error::DeprecationWarning:fastlm"
        )
    )


@pytest.mark.parametrize(
    "name", ["fastlm.layers", "fastlm.models", "fastlm.swap", "fastlm.testing"]
)
def test_import_of_modules_is_light(name):
    run_python(
        f"import sys, {name}; assert not {{'triton', 'transformers'}} & set(sys.modules);"
        "import torch; assert not torch.cuda.is_initialized()"
    )


def test_works_without_triton():
    """As on a machine where triton cannot be installed: every operator runs by the reference."""
    code = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, NoTriton())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda n, *a: None if n == 'triton' else find_spec(n, *a)
import torch, fastlm
assert not fastlm.backends.HAS_TRITON
x = torch.randn(2, 8, requires_grad=True)
fastlm.layer_norm(x).sum().backward()
q = torch.randn(1, 4, 2, 8, requires_grad=True)
fastlm.attention(q, q, q, causal=True).sum().backward()
assert x.grad is not None and q.grad is not None
try:
    fastlm.layer_norm(x, impl='triton')
except RuntimeError as error:
    print(error)
"""
    assert run_python(code).startswith("layer_norm: impl must be available, got 'triton'")


# Of triton.language, what Triton 3.6 has, the oldest that we support, and we use.
TRITON_3_6 = """
abs arange bfloat16 cast cdiv constexpr cumsum device_assert dot erf exp exp2 float16 float32 fma
full int1 int16 int32 int64 join load log log2 max maximum min minimum num_programs philox
program_id range reshape rsqrt split static_assert static_range store sum trans uint32 where zeros
zeros_like
"""


def test_kernels_use_what_the_oldest_triton_has():
    """It has no `to_tensor`, for example. Before adding a name, look whether 3.6 has it."""
    used = {
        node.attr
        for file in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "tl"
    }
    assert used == set(TRITON_3_6.split())


def test_kernels_is_not_ours():
    """A top-level `kernels` would shadow the Hugging Face package of that name."""
    spec = find_spec("kernels")
    assert spec is None or not Path(spec.origin).is_relative_to(ROOT)
    assert find_spec("fastlm.kernels") is not None
    code = "import importlib.util as u; print(getattr(u.find_spec('kernels'), 'origin', None))"
    assert str(ROOT) not in run_python(code, cwd=ROOT)
    assert not (ROOT / "conftest.py").exists() and not (ROOT / "tests" / "__init__.py").exists()


def test_version_is_one():
    assert importlib.metadata.version("fastlm") == fastlm.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", fastlm.__version__)
    assert f"[{fastlm.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names():
    assert fastlm.ops.__all__ == sorted(fastlm.ops.__all__)
    missing = [name for name in fastlm.__all__ if not hasattr(fastlm, name)]
    assert missing == []


def test_ci_runs_what_a_user_runs():
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line and line[0] != "#"]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]
    assert os.access(script, os.X_OK)


def test_requirements_are_pinned():
    """The golden table and the interpreter's checks hold for one torch and one triton."""
    lines = [
        line
        for file in (ROOT / "requirements").glob("*.txt")
        for line in file.read_text().splitlines()
        if line and not line.startswith(("#", "-r"))
    ]
    assert [line for line in lines if "==" not in line] == ["setuptools>=77"]
    for name in ("torch", "triton"):
        (pin,) = (line for line in lines if line.startswith(f"{name}=="))
        version = pin.split(";")[0].split("==")[1]
        assert importlib.metadata.version(name).split("+")[0] == version
