"""benchmarks/gpu_check.py, as far as a machine without a GPU goes."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from benching import load

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check():
    return load("gpu_check")


@pytest.mark.interpreter
def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path):
    run = [sys.executable, "-P", str(SCRIPT), "--out", str(tmp_path / "out")]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("gpu-check: no GPU that torch can use: torch is built for")
    assert not (tmp_path / "out").exists()


def test_every_missing_package_is_named_with_a_remedy(gpu_check):
    with mock.patch.object(importlib.util, "find_spec", lambda name: None):
        problems = gpu_check.missing()
    for name in ("torch", "triton", "pytest", "fastlm"):
        assert sum(problem.startswith(f"{name} is not installed") for problem in problems) == 1
    assert all(": " in problem for problem in problems)


def test_steps_begin_with_the_build_and_conformance(gpu_check, tmp_path):
    steps = gpu_check.steps(tmp_path, quick=True)
    sanitizers = [
        f"{tool}-{impl}" for tool in ("memcheck", "racecheck") for impl in ("cuda", "triton")
    ]
    assert [s.name for s in steps] == [
        "build",
        "wrappers",
        "conformance",
        "gpu",
        *sanitizers,
        "bench",
        "tune",
    ]
    assert [s.name for s in steps if s.optional] == ["tune"]
    assert Path(steps[0].command[-1]).is_file() and Path(steps[1].command[-1]).is_file()
    files = [Path(word).name for word in steps[2].command if word.endswith(".py")]
    assert {"test_norm.py", "test_attention.py", "test_ffn.py", "test_loss.py"} <= set(files)


def test_only_takes_the_names_of_steps(gpu_check, capsys):
    with (
        mock.patch.object(gpu_check, "missing", list),
        mock.patch.object(sys, "argv", ["gpu_check.py", "--only", "wrappers", "no-such-step"]),
    ):
        assert gpu_check.main() == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "gpu-check: --only takes build, wrappers, conformance, gpu, memcheck-cuda"
    )
    assert said.endswith(", got no-such-step\n")


def test_every_benchmark_is_a_script(gpu_check, tmp_path):
    benchmarks = [s for s in gpu_check.steps(tmp_path, quick=False) if s.name.startswith("bench")]
    scripts = {Path(s.command[1]) for s in benchmarks}
    assert ROOT / "benchmarks" / "attention.py" in scripts
    assert len(scripts) >= 4 and all(script.is_file() for script in scripts)


@pytest.mark.parametrize(("code", "status"), [(0, "passed"), (1, "failed")])
def test_run_keeps_the_log_and_the_last_line(gpu_check, tmp_path, capsys, code, status):
    script = f"print('a'); print('3 passed'); print(); raise SystemExit({code})"
    step = gpu_check.Step("gpu", [sys.executable, "-c", script])
    gpu_check.run(step, tmp_path / "log")
    assert (step.status, step.summary) == (status, "3 passed")
    assert capsys.readouterr().out == (tmp_path / "log").read_text() == "a\n3 passed\n\n"


def test_run_of_an_absent_tool_is_missing_and_not_passed(gpu_check, tmp_path):
    step = gpu_check.Step("memcheck", ["no-such-sanitizer"])
    gpu_check.run(step, tmp_path / "log")
    assert (step.status, step.summary) == ("missing", "no-such-sanitizer is not installed")


def test_smallest_launches_every_kernel(gpu_check, device):
    """The calls for compute-sanitizer meet every kernel."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launched = set()
    original = {cls: cls.run for cls in (InterpretedFunction, JITFunction)}

    def recording(cls):
        def run(self, *args, **kwargs):
            launched.add(self.fn.__name__.strip("_"))
            return original[cls](self, *args, **kwargs)

        return run

    for cls in original:
        cls.run = recording(cls)
    try:
        torch.manual_seed(0)
        gpu_check.smallest(device)
    finally:
        for cls, run in original.items():
            cls.run = run
    sources = "".join(file.read_text() for file in (ROOT / "kernels").glob("*.py"))
    assert launched == set(re.findall(r"^def _(\w+_kernel)\(", sources, re.MULTILINE))


@pytest.mark.interpreter
def test_smallest_launches_every_cuda_kernel(gpu_check, device):
    import simt_build

    simt_build.configure()
    torch.manual_seed(0)
    gpu_check.smallest_cuda(device)
    assert simt_build.launched() >= simt_build.kernel_names()
