"""benchmarks/gpu_check.py, as far as a machine without a GPU goes."""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from benching import load

ROOT = Path(__file__).resolve().parent.parent
CONFTEST = ROOT / "tests" / "conftest.py"
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
    offline = "FASTLM_BUILD_CUDA=0 pip install --no-build-isolation --no-deps -e"
    assert any(offline in problem for problem in problems)  # a machine for tests has no network


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
    step, log = gpu_check.Step("gpu", [sys.executable, "-c", script]), tmp_path / "log"
    log.write_text("what was before\n")
    gpu_check.run(step, log)
    assert (step.status, step.summary) == (status, "3 passed")
    out = capsys.readouterr().out
    assert out.startswith("== gpu: ") and out.endswith("\na\n3 passed\n\n")
    assert log.read_text() == "what was before\n" + out


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("begun", flush=True)
subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
"""


@pytest.mark.parametrize("script", ["print('begun'); import time; time.sleep(60)", STUBBORN])
def test_run_stops_a_step_at_its_limit_with_all_that_it_started(
    gpu_check, tmp_path, script, monkeypatch
):
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.2)
    step = gpu_check.Step("gpu", [sys.executable, "-c", script])
    start = time.monotonic()
    gpu_check.run(step, tmp_path / "log", limit=1.0)
    assert time.monotonic() - start < 30
    assert step.status == "stopped" and step.summary.startswith("over its limit of 1 s; ")
    assert "begun\n" in (tmp_path / "log").read_text()


def test_a_step_is_logged_line_by_line_and_ends_with_the_check(gpu_check, tmp_path, monkeypatch):
    """What is in the log while a step runs is what a kill leaves."""
    step, seen = gpu_check.Step("gpu", [sys.executable, "-c", "print('a'); input()"]), []

    def tell(line, **_):
        if line == "a\n":
            raise SystemExit(143)  # as by SIGTERM

    monkeypatch.setattr(gpu_check, "GRACE_S", 0.2)
    monkeypatch.setattr(gpu_check, "print", tell, raising=False)
    open_log = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **kw: seen.append(kw) or open_log(self, *a, **kw)
    )
    end = gpu_check._end
    ended = []
    monkeypatch.setattr(gpu_check, "_end", lambda process: (end(process), ended.append(process)))
    with pytest.raises(SystemExit):
        gpu_check.run(step, tmp_path / "log")
    assert seen == [{"buffering": 1}] and ended[0].poll() is not None


def test_a_run_writes_three_files(gpu_check, tmp_path, monkeypatch):
    """One log and one table whatever the steps; a step that is stopped ends no other."""
    out = tmp_path / "out"
    slow = gpu_check.Step("slow", [sys.executable, "-c", "import time; time.sleep(60)"])
    rows = f"open({str(out / 'bench.csv')!r}, 'a').write('row')"
    others = [gpu_check.Step(name, [sys.executable, "-c", rows]) for name in ("a", "b")]
    monkeypatch.setattr(gpu_check, "steps", lambda *_: [slow, *others])
    monkeypatch.setattr(gpu_check, "missing", list)
    monkeypatch.setattr(gpu_check, "machine", dict)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out), "--limit", "1"])
    assert gpu_check.main() == gpu_check.main() == 1
    assert sorted(file.name for file in out.iterdir()) == ["bench.csv", "log.txt", "results.json"]
    steps = json.loads((out / "results.json").read_text())["steps"]
    assert [step["status"] for step in steps] == ["stopped", "passed", "passed"]
    log = (out / "log.txt").read_text()
    assert [name for name in ("slow", "a", "b") if log.count(f"== {name}: ") == 1] == [
        "slow", "a", "b",
    ]  # fmt: skip
    assert (out / "bench.csv").read_text() == "rowrow"


def test_options_reach_the_steps(gpu_check, tmp_path):
    steps = gpu_check.steps(tmp_path, False, 0.5, ["llama", "full"], "rotary or norm")
    commands = {step.name: step.command for step in steps}
    has = lambda *words: {
        name for name, command in commands.items()
        if any(tuple(command[i : i + len(words)]) == words for i in range(len(command)))
    }  # fmt: skip
    benchmarks = {f"bench-{op}" for op in gpu_check.BENCHMARKS}
    assert has("-k", "rotary or norm") == {"wrappers", "conformance", "gpu"}
    assert has("--shape", "llama", "full") == benchmarks
    assert has("--seconds", "0.5") == benchmarks | {"tune"}
    assert has("--csv", str(tmp_path / "bench.csv")) == benchmarks
    plain = [step.command for step in gpu_check.steps(tmp_path, False)]
    assert not {"-k", "--shape", "--seconds"} & set(itertools.chain(*plain))


def test_run_of_an_absent_tool_is_missing_and_not_passed(gpu_check, tmp_path):
    step = gpu_check.Step("memcheck", ["no-such-sanitizer"])
    gpu_check.run(step, tmp_path / "log")
    assert (step.status, step.summary) == ("missing", "no-such-sanitizer is not installed")


def test_smallest_launches_every_kernel(gpu_check, device, launches):
    """The calls for compute-sanitizer meet every kernel."""
    torch.manual_seed(0)
    gpu_check.smallest(device)
    sources = "".join(file.read_text() for file in (ROOT / "kernels").glob("*.py"))
    assert set(launches) == set(re.findall(r"^def _(\w+_kernel)\(", sources, re.MULTILINE))


@pytest.mark.parametrize("reserved, returned", [(2**30, False), (2**30 + 1, True)])
def test_tests_return_the_memory_of_large_tensors(reserved, returned, monkeypatch, request):
    """On a GPU, which tests that run side by side share."""
    plugins = request.config.pluginmanager.get_plugins()
    (conftest,) = (p for p in plugins if getattr(p, "__file__", None) == str(CONFTEST))
    emptied = []
    monkeypatch.setattr(conftest, "HAS_GPU", True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    run = conftest._memory_returned.__wrapped__()
    next(run)
    assert emptied == [] and next(run, None) is None and bool(emptied) == returned


@pytest.mark.interpreter
def test_smallest_launches_every_cuda_kernel(gpu_check, device):
    import simt_build

    simt_build.configure()
    torch.manual_seed(0)
    gpu_check.smallest_cuda(device)
    assert simt_build.launched() >= simt_build.kernel_names()
