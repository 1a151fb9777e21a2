"""Without a GPU, Triton kernels run in the hardened interpreter, on CPU tensors, in every test."""

import os

import pytest
import torch
from tiers import (  # noqa: F401
    pytest_addoption,
    pytest_configure,
    pytest_runtest_setup,
    pytest_sessionfinish,
    pytest_sessionstart,
    pytest_terminal_summary,
)

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"

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


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def device() -> str:
    """Where the tests' tensors live: a GPU if there is one, else the CPU (interpreted kernels)."""
    return DEVICE
