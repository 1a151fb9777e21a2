"""Without a GPU, kernels run on CPU tensors, in every test: Triton's in the hardened interpreter,
those in CUDA C++ in the host build of tests/simt."""

import gc
import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from tiers import (  # noqa: F401
    pytest_addoption,
    pytest_configure,
    pytest_runtest_setup,
    pytest_sessionstart,
    pytest_terminal_summary,
)
from tiers import pytest_sessionfinish as finish_tiers

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
SANITIZED = os.environ.get("FASTLM_SIMT_SANITIZED") == "1"

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any import
    import harden

    harden.install()


def pytest_collection_modifyitems(config, items):
    marker = "interpreter" if HAS_GPU else "gpu"
    other = [item for item in items if item.get_closest_marker(marker)]
    if other:
        items[:] = [item for item in items if not item.get_closest_marker(marker)]
        config.hook.pytest_deselected(items=other)
    _spread_long_tests(items)


def _spread_long_tests(items) -> None:
    """Puts the tests marked `long` at equal distances. Workers begin with equal parts of the list,
    and what is left at the end, for others to take over, is short."""
    long = [item for item in items if item.get_closest_marker("long")]
    rest = [item for item in items if not item.get_closest_marker("long")]
    for i, item in enumerate(long):
        rest.insert(i * (len(items) // len(long)), item)
    items[:] = rest


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _memory_returned():
    """Workers share a GPU: what torch keeps of a test with real sizes, another one may lack."""
    yield
    if HAS_GPU and torch.cuda.memory_reserved() > 2**30:
        gc.collect()
        torch.cuda.empty_cache()


def _is_simulated(item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return not HAS_GPU and params.get("impl") == "cuda"


def _set_mode(item, shift: int = 0) -> None:
    """Puts the host build into the mode that goes with the test's name, or `shift` modes on."""
    import simt_build

    name = zlib.crc32(item.nodeid.encode())
    mode = simt_build.MODES[(name + shift) % len(simt_build.MODES)]
    print("host build:", *mode)  # the last line names the mode of a failure
    simt_build.configure(*mode, seed=name)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _simulated(request, _seeded):
    """Loads the host build for a test of impl="cuda", in one of its modes: by the test's name, so
    that the tests spread over all."""
    if _is_simulated(request.node):
        import simt_build

        simt_build.load(sanitized=SANITIZED)
        _set_mode(request.node)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Runs the tests marked `sanitized`, which together meet every CUDA C++ kernel, in the other
    modes of the host build too, before their own."""
    if not _is_simulated(pyfuncitem) or not pyfuncitem.get_closest_marker("sanitized"):
        return
    import simt_build

    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    for shift in range(1, len(simt_build.MODES)):
        _set_mode(pyfuncitem, shift)
        pyfuncitem.obj(**arguments)
    _set_mode(pyfuncitem)


def pytest_sessionfinish(session, exitstatus):
    """For the run under the sanitizers: which kernels it met."""
    finish_tiers(session, exitstatus)
    if report := os.environ.get("FASTLM_SIMT_REPORT"):
        import simt_build

        Path(report).write_text(json.dumps(sorted(simt_build.launched())))


@pytest.fixture
def device() -> str:
    """Where the tests' tensors live: a GPU if there is one, else the CPU (interpreted kernels)."""
    return DEVICE


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Names of the Triton kernels that a test launches, without the leading underscore."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from fastlm.kernels import launch

    monkeypatch.setattr(launch, "_AMD", True)  # every launch is then Triton's own
    names = []
    for cls in (InterpretedFunction, JITFunction):

        def run(self, *args, original=cls.run, **kwargs):
            names.append(self.fn.__name__.strip("_"))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "run", run)
    return names
