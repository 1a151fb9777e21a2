"""The build of the CUDA C++ library, with nvcc and without a GPU: what it asks for, what it makes.

The golden table depends on nvcc's version, and is compared where that is the same. After a change
of a kernel: `python tests/support/cuda_gate.py --update`, and review the diff.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_gate
import pytest
import torch
from cuda_gate import Row, broken_rules
from golden import read_table

from fastlm import cuda_library

ROOT = Path(__file__).resolve().parent.parent
PATH = os.environ["PATH"]
UPDATE = "python tests/support/cuda_gate.py --update"
SYMBOLS = ROOT / "tests" / "golden" / "torch_2_10_symbols.txt"
builder = cuda_gate.builder()


@pytest.fixture
def toolkit(tmp_path):
    """Makes a folder with an nvcc that says it has this version, for CUDA_HOME."""

    def make(version: str) -> Path:
        nvcc = tmp_path / "cuda" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}'\n"
        )
        nvcc.chmod(0o755)
        return tmp_path / "cuda"

    return make


@pytest.fixture
def torch_folder(tmp_path):
    """Makes a folder that looks like an installed torch of this version, for FASTLM_TORCH_DIR."""

    def make(version: str, cuda: str | None) -> Path:
        folder = tmp_path / "torch"
        folder.mkdir()
        text = f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n"
        (folder / "version.py").write_text(text)
        return folder

    return make


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    """The environment of a machine without nvcc."""
    monkeypatch.setattr(builder, "_find_nvcc", _without_usual_places(builder._find_nvcc))
    return {"PATH": str(tmp_path)}


def _without_usual_places(find):
    def found(environment):
        exists = Path.exists
        hidden = lambda path: path.name != "nvcc" and exists(path)
        Path.exists = hidden
        try:
            return find(environment)
        finally:
            Path.exists = exists

    return found


def test_unset_without_nvcc_is_pure_python_and_says_so(no_nvcc, capsys):
    assert builder.wanted(no_nvcc) is None
    said = capsys.readouterr().out
    assert said.startswith("fastlm: without the CUDA C++ kernels (nvcc was not found: install")
    assert said.endswith("FASTLM_BUILD_CUDA=1 asks for them.\n")


def test_1_without_nvcc_fails_with_the_command_that_helps(no_nvcc):
    with pytest.raises(builder.BuildError) as error:
        builder.wanted({**no_nvcc, "FASTLM_BUILD_CUDA": "1"})
    assert str(error.value) == (
        f"FASTLM_BUILD_CUDA=1, but nvcc was not found: {builder.INSTALL_NVCC}"
    )
    assert "pip install nvidia-cuda-nvcc" in str(error.value)


@pytest.mark.parametrize("version", ["11.8", "12.3", "14.0"])
def test_unsupported_nvcc(toolkit, version):
    home = toolkit(version)
    with pytest.raises(builder.BuildError) as error:
        builder.wanted({"CUDA_HOME": str(home), "FASTLM_BUILD_CUDA": "1", "PATH": ""})
    message = (
        f"nvcc {version} at {home}/bin/nvcc is not supported: install the CUDA toolkit, 12.4 to"
    )
    assert f"{message} 13 (" in str(error.value)


def test_0_is_never(toolkit, torch_folder):
    home, folder = toolkit("13.0"), torch_folder("2.13.0", "13.0")
    environment = {"CUDA_HOME": str(home), "FASTLM_TORCH_DIR": str(folder)}
    assert builder.wanted(environment) is not None
    assert builder.wanted({**environment, "FASTLM_BUILD_CUDA": "0"}) is None


def test_other_values_are_refused():
    with pytest.raises(
        builder.BuildError, match="FASTLM_BUILD_CUDA must be 0, 1 or unset, got 'y'"
    ):
        builder.wanted({"FASTLM_BUILD_CUDA": "y"})


def test_a_torch_for_the_cpu_is_enough_where_the_build_is_asked_for(toolkit, torch_folder, capsys):
    home, folder = toolkit("12.8"), torch_folder("2.13.0+cpu", None)
    environment = {"CUDA_HOME": str(home), "FASTLM_TORCH_DIR": str(folder)}
    assert builder.wanted(environment) is None
    assert "the torch that is installed is built without CUDA" in capsys.readouterr().out
    tools = builder.wanted({**environment, "FASTLM_BUILD_CUDA": "1"})
    assert (tools.cuda, tools.torch_version, tools.torch_cuda) == ((12, 8), "2.13.0+cpu", None)


def test_torch_in_the_environment_that_a_variable_names(toolkit, torch_folder, monkeypatch):
    """Isolated builds of build run a python of their own."""
    folder = torch_folder("2.12.0", "13.0")
    packages = folder.parent / "lib" / "python3.12" / "site-packages"
    packages.mkdir(parents=True)
    folder.rename(packages / "torch")
    monkeypatch.setattr(builder, "find_spec", lambda name: None)
    monkeypatch.setattr(builder.sysconfig, "get_path", lambda name: "/nowhere")
    environment = {"CUDA_HOME": str(toolkit("13.0")), "FASTLM_BUILD_CUDA": "1", "PATH": PATH}
    with pytest.raises(builder.BuildError, match="torch was not found beside .* FASTLM_TORCH_DIR="):
        builder.wanted(environment)
    environment["VIRTUAL_ENV"] = str(folder.parent)
    assert builder.wanted(environment).torch == packages / "torch"


def test_a_host_compiler_that_is_missing_or_that_nvcc_refuses(toolkit):
    home = toolkit("13.0")
    environment = {"CUDA_HOME": str(home), "FASTLM_BUILD_CUDA": "1"}
    with pytest.raises(builder.BuildError) as error:
        builder.wanted({**environment, "CXX": "no-such-g++"})
    assert "compiler no-such-g++ was not found: install it" in str(error.value)
    for words in ("ccache g++", "g++ -m64"):
        with pytest.raises(builder.BuildError) as error:
            builder.wanted({**environment, "CXX": words})
        message = "CXX must name one program, for nvcc takes no words before or after it, got"
        assert f"{message} {words!r}: name the compiler alone" in str(error.value)
    nvcc = home / "bin" / "nvcc"
    refusal = "#error -- unsupported GNU version! gcc versions later than 15 are not supported!"
    refuse = f'case "$*" in *-ccbin*) echo "{refusal}" >&2; exit 1;; esac\n'
    nvcc.write_text(nvcc.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{refuse}"))
    with pytest.raises(builder.BuildError) as error:
        builder.wanted(environment)
    assert f"does not compile with g++ ({refusal}): name an older compiler by CXX (CXX=g++-13)" in (
        str(error.value)
    )


def test_jobs_are_as_many_as_memory_and_cores_allow(monkeypatch):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 * 2**30 // 4096}
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(builder.os, "sysconf", sizes.get)
    monkeypatch.setattr(builder.os, "sched_getaffinity", lambda pid: range(64))
    assert builder._jobs() == 2, "4 GiB"
    sizes["SC_PHYS_PAGES"] //= 4
    assert builder._jobs() == 1, "1 GiB"
    monkeypatch.setenv("MAX_JOBS", "5")
    assert builder._jobs() == 5


def test_an_old_torch_is_refused(toolkit, torch_folder):
    home, folder = toolkit("13.0"), torch_folder("2.9.1", "13.0")
    with pytest.raises(builder.BuildError, match=r"torch 2\.9\.1 at .* is too old: pip install"):
        builder.find_tools({"CUDA_HOME": str(home), "FASTLM_TORCH_DIR": str(folder)})


def test_build_is_fast_and_small():
    cuda_gate.build()
    report = json.loads((cuda_gate.OUT / "report.json").read_text())
    assert report["peak_job_mib"] < 1536 and report["library_mib"] < 20
    # 5 minutes on two cores; processor time, because other tests run beside it.
    assert report["cpu_seconds"] < 2 * 300
    assert report["targets"] == ["sm_80", "sm_90a"]


def test_library_wants_only_symbols_of_the_stable_abi():
    """So that one file serves every torch from 2.10 on, and every Python."""
    cuda_gate.build()
    command = ["nm", "-D", "--undefined-only", str(cuda_gate.LIBRARY)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # "U name@VERSION", or w for a weak one; glibc and libstdc++ version theirs.
    symbols = {name: kind for kind, name in (line.split() for line in lines)}
    system = re.compile(r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_")
    others = {name: kind for name, kind in symbols.items() if not system.match(name)}
    weak = {name for name, kind in others.items() if kind != "U"}
    assert weak <= {
        "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__",
        "aoti_torch_get_current_cuda_stream",  # in libtorch_cuda, which a torch for the CPU lacks
    }  # fmt: skip
    stable = {line for line in SYMBOLS.read_text().splitlines() if not line.startswith("#")}
    wanted = others.keys() - weak
    assert wanted and wanted <= stable, sorted(wanted - stable)


def test_library_needs_only_torch_and_the_system():
    cuda_gate.build()
    command = ["objdump", "-p", str(cuda_gate.LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED +(\S+?)\.so", text))
    system = {"libstdc++", "libm", "libgcc_s", "libc", "libpthread", "libdl", "librt"}
    assert needed - system - {"ld-linux-x86-64", "ld-linux-aarch64"} == {"libtorch", "libtorch_cpu"}


def test_bindings_do_not_use_torch_box():
    """It leaks every string that it converts; fastlm::boxed does not."""
    for file in (ROOT / "csrc" / "bindings").glob("*.cpp"):
        assert "TORCH_BOX" not in file.read_text(), file


def test_library_loads_and_registers_its_operators():
    cuda_gate.build()
    script = f"""
import torch, fastlm
from fastlm import cuda_library
cuda_library.load({str(cuda_gate.LIBRARY)!r})
for name in {sorted(_operators())!r}:
    assert "CUDA: registered" in torch._C._dispatch_dump("fastlm_cuda::" + name), name
"""
    subprocess.run([sys.executable, "-P", "-c", script], check=True)


def test_library_knows_its_cuda_and_the_drivers():
    cuda_gate.build()
    nvcc = builder.find_tools().cuda
    runtime, driver = cuda_library.versions(cuda_gate.LIBRARY)
    assert (runtime // 1000, runtime % 1000 // 10) == nvcc
    assert driver == 0 or torch.cuda.is_available()


@pytest.mark.parametrize(
    ("runtime", "driver", "fits"),
    [(13000, 0, True), (13000, 13000, True), (13050, 13000, True), (12080, 13000, True),
     (13000, 12080, False)],
)  # fmt: skip
def test_library_of_a_newer_cuda_than_the_driver_is_refused(runtime, driver, fits, monkeypatch):
    monkeypatch.setattr(cuda_library, "versions", lambda path: (runtime, driver))
    cuda_gate.build()
    monkeypatch.setattr(cuda_library, "PATH", cuda_gate.LIBRARY)
    monkeypatch.setattr(cuda_library, "load", lambda path: None)
    reason = cuda_library._try_to_load()
    assert (reason is None) is fits
    assert fits or "built by CUDA 13.0, and the driver knows CUDA up to 12.8" in reason


def test_library_of_an_older_fastlm_is_refused(monkeypatch):
    monkeypatch.setattr(cuda_library, "_loaded", {})
    monkeypatch.setattr(cuda_library, "PATH", Path(torch.__file__).parent / "lib" / "libtorch.so")
    assert "is of an older fastlm" in cuda_library._try_to_load()


def _operators() -> set[str]:
    sources = (ROOT / "csrc" / "bindings").glob("*.cpp")
    return {n for f in sources for n in re.findall(r'm\.impl\("(\w+)"', f.read_text())}


def test_every_declared_operator_is_implemented():
    import fastlm  # noqa: F401  (declares them)

    declared = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fastlm_cuda::")
    }
    assert declared and declared == _operators()


def test_facts():
    facts = cuda_gate.facts()
    info = facts.build_info()
    assert info["targets"] == ["sm_80", "sm_90a"] and info["torch"] == torch.__version__
    kernels = facts.kernels()
    assert {k["target"] for k in kernels} == {"sm_80", "sm_90a"}
    assert all(k["registers"] > 0 and k["spills"] >= 0 for k in kernels)


def test_facts_have_what_launches_ask_for():
    rows = {(k["kernel"], k["target"]): k for k in cuda_gate.facts().kernels()}
    tile = (2 * 4 * 16 + 3 * 64) * 64 * 2  # of csrc/attention_fwd.cuh: q, and a ring of k and v
    forward = rows["attention_fwd_kernel<__half, 64, false>", "sm_80"]
    assert (forward["threads"], forward["shared"], forward["occupancy"]) == (128, tile, 2)
    assert rows["column_sums_kernel", "sm_80"]["shared"] == 512 * 4
    assert rows["glu_fwd_kernel<float, true>", "sm_80"]["shared"] == 0
    # Rows in shared memory take what there is, so that a multiprocessor has one block.
    norm = "norm_fwd_kernel<float, float, 4, true>"
    assert [rows[norm, t]["shared"] for t in ("sm_80", "sm_90a")] == [163 * 1024, 227 * 1024]
    assert rows[norm, "sm_90a"]["threads"] == 512 and rows[norm, "sm_90a"]["occupancy"] == 1


def test_occupancy():
    facts = cuda_gate.facts()
    kernel = min(facts.kernels(), key=lambda k: k["registers"])
    name, target = kernel["kernel"], kernel["target"]
    assert facts.occupancy(name, target) == kernel["occupancy"]
    by_registers = 65536 // (-(-kernel["registers"] * 32 // 256) * 256 * 8)
    assert facts.occupancy(name, target, 256, 0) == min(8, by_registers)
    most = (163 if target == "sm_80" else 227) * 1024
    assert facts.occupancy(name, target, shared=most) == 1
    half = (most + 1024) // 2
    assert facts.occupancy(name, target, 256, half) == 1, "1 KiB of each block is reserved"
    assert facts.occupancy(name, target, 256, half - 1024) == 2
    with pytest.raises(ValueError, match="kernel must be one of kernels"):
        facts.occupancy("no_such_kernel", target)
    with pytest.raises(ValueError, match="threads must be from 1 to 1024, got 2048"):
        facts.occupancy(name, target, threads=2048)
    with pytest.raises(ValueError, match=f"shared must be from 0 to {most}, got -1"):
        facts.occupancy(name, target, shared=-1)


def test_a_kernel_without_bounds_is_refused(monkeypatch):
    cuda_gate.build()
    monkeypatch.setattr(builder, "_bounds", lambda objects: {})
    with pytest.raises(builder.BuildError, match="column_sums_kernel is launched without"):
        builder.kernel_facts(cuda_gate.OUT, ["column_sum.cu.o"])


def test_kernels_keep_their_rules_and_the_golden_table():
    rows = cuda_gate.rows()
    problems = [f"{row.key}: {rule}" for row in rows for rule in broken_rules(row)]
    if builder.find_tools().cuda == (13, 0):
        golden = read_table(cuda_gate.GOLDEN, Row)
        for row in rows:
            if row != golden.pop(row.key, None):
                problems.append(f"differs from the golden table ({UPDATE}): {row}")
        problems += [f"only in the golden table ({UPDATE}): {key}" for key in golden]
    assert rows and not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, None),
        ({"spills": 8}, "spills 8 bytes"),
        ({"kernel": "attention_fwd_kernel<__half, 256, false>", "spills": 8}, "spills 8 bytes"),
        ({"shared": 163 * 1024}, None),
        ({"shared": 163 * 1024 + 1}, "asks for 166913 bytes of shared memory, 166912 are there"),
        ({"mma": 0}, "multiplies without tensor cores"),
        ({"load_bits": 64}, "loads 64 bits at a time, 128 are possible"),
        (
            {"kernel": "norm_fwd_kernel<__half, __half, 8>", "store_bits": 16, "mma": 0},
            "stores 16 bits at a time, 128 are possible",
        ),
        ({"kernel": "norm_fwd_kernel<Any, Any, 8>", "load_bits": 16, "mma": 0}, None),
    ],
)
def test_rules(changes, rule):
    row = {
        "target": "sm_80", "kernel": "attention_fwd_kernel<__half, 64, false>", "registers": 255,
        "spills": 0, "threads": 128, "shared": 40960, "occupancy": 2, "load_bits": 128,
        "store_bits": 128, "mma": 64,
    }  # fmt: skip
    assert list(broken_rules(Row(**{**row, **changes}))) == ([rule] if rule else [])
