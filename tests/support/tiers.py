"""Counts the tests that passed in each tier, and fails a full run in which a tier ran too few.

A tier that quietly stops running (a renamed parameter, a file that is no longer collected) looks
like success otherwise. `pytest --floors tests/floors.json` compares; `make test` passes it.
Works under xdist: workers label their reports, the controller counts them.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

_OPS = ("norm", "attention", "ffn", "loss", "rotary", "embedding", "dropout")
_FILES = {
    "compile": ("test_compile", "test_cuda_build"),
    "repository": (
        "test_repository",
        "test_wheel",
        "test_readme",
        "test_harness",
        "test_tiers",
        "test_gpu_check",
    ),
}
CUDA_BUILD = Path(__file__).resolve().parents[2] / "build" / "cuda" / "report.json"
_COUNTS = pytest.StashKey[Counter]()


def tier_of(path: Path, params: dict) -> str:
    """The tier of a test in the file `path` with the parameters `params`.

    compile, repository: by file. simt: a kernel in CUDA C++ is run, that is `impl` is "cuda", or
    the file is about their wrappers or the host build. interpreter: a Triton kernel is run, that
    is `impl` is "triton" or the file is about kernels. reference: the other tests of operators.
    integration: the rest.
    """
    stem = path.stem
    for tier, files in _FILES.items():
        if stem in files:
            return tier
    if params.get("impl") == "cuda" or stem.startswith(("test_simt", "test_cuda")):
        return "simt"
    if params.get("impl") == "triton" or "kernel" in stem:
        return "interpreter"
    return "reference" if stem.removeprefix("test_").startswith(_OPS) else "integration"


def pytest_addoption(parser):
    parser.addoption("--floors", type=Path, help="JSON: least number of passed tests, by tier")


def pytest_configure(config):
    config.stash[_COUNTS] = Counter()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    item.user_properties.append(("tier", tier_of(item.path, params)))


class Count:
    """Registered on the controller; it alone sees the reports of all workers."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            tier = dict(report.user_properties).get("tier", "none")
            self.config.stash[_COUNTS][tier] += 1


def too_few(counts: Counter, floors: dict[str, int]) -> list[str]:
    return [
        f"tier {tier}: {counts[tier]} tests passed, the floor is {floor}"
        for tier, floor in floors.items()
        if counts[tier] < floor
    ]


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Count(session.config))


def _violations(config) -> list[str]:
    path = config.getoption("--floors")
    return too_few(config.stash[_COUNTS], json.loads(path.read_text())) if path else []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    is_worker = hasattr(session.config, "workerinput")
    if not is_worker and exitstatus == pytest.ExitCode.OK and _violations(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    counts = config.stash[_COUNTS]
    line = ", ".join(f"{tier} {count}" for tier, count in sorted(counts.items()))
    terminalreporter.write_line(f"passed by tier: {line or 'none'}")
    if CUDA_BUILD.exists():
        terminalreporter.write_line(f"build of the CUDA C++ kernels: {CUDA_BUILD.read_text()}")
    for violation in _violations(config):
        terminalreporter.write_line(f"FAILED {violation}", red=True)
