"""The floors on how many tests each tier ran."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiers

HERE = Path(__file__).resolve().parent
FLOORS = json.loads((HERE / "floors.json").read_text())


@pytest.mark.parametrize(
    ("file", "params", "tier"),
    [
        ("test_compile.py", {}, "compile"),
        ("test_wheel.py", {}, "repository"),
        ("test_norm.py", {"impl": "triton"}, "interpreter"),
        ("test_attention_kernels.py", {}, "interpreter"),
        ("test_norm.py", {"impl": "cuda"}, "simt"),
        ("test_simt.py", {}, "simt"),
        ("test_cuda_conformance.py", {}, "simt"),
        ("test_norm.py", {"impl": "torch"}, "reference"),
        ("test_attention_bias.py", {}, "reference"),
        ("test_models.py", {}, "integration"),
    ],
)
def test_tier_of_a_test(file, params, tier):
    assert tiers.tier_of(Path(file), params) == tier


def test_floors_name_every_tier():
    names = ["compile", "integration", "interpreter", "reference", "repository", "simt"]
    assert sorted(FLOORS) == names
    assert min(FLOORS.values()) > 0


def test_too_few_tests_are_named():
    counts = Counter(reference=5, interpreter=2)
    assert tiers.too_few(counts, {"reference": 5, "interpreter": 3}) == [
        "tier interpreter: 2 tests passed, the floor is 3"
    ]
    assert tiers.too_few(counts, {"compile": 1}) == ["tier compile: 0 tests passed, the floor is 1"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("floor", "status"), [(3, 0), (4, 1)])
def test_a_run_below_its_floor_fails(tmp_path, workers, floor, status):
    (tmp_path / "conftest.py").write_text(
        "from tiers import (pytest_addoption, pytest_configure, pytest_runtest_setup,"
        " pytest_sessionfinish, pytest_sessionstart, pytest_terminal_summary)\n"
    )
    (tmp_path / "test_norm.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(3))\ndef test_a(i): pass\n"
    )
    (tmp_path / "floors.json").write_text(json.dumps({"reference": floor}))
    xdist = ["-n", str(workers)] if workers else ["-p", "no:xdist"]
    result = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "--floors=floors.json", *xdist],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE / "support")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == status, result.stdout + result.stderr
    assert "passed by tier: reference 3" in result.stdout
    assert ("FAILED tier reference" in result.stdout) == bool(status)
    assert result.stdout.strip().splitlines()[-1].startswith("3 passed")
