"""What the tests of the benchmarks share: small shapes, quick runs, the scripts as modules."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fastlm import shapes
from fastlm.bench import machine, timing
from fastlm.bench.run import run_case

CPU = torch.device("cpu")
SCRIPTS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """Small shapes in place of those for the CPU, and ceilings that cost nothing."""
    tables = {
        "NORM_CPU": {"small": shapes.NormShape(16, 48)},
        "FFN_CPU": {"small": shapes.FfnShape(8, 16, 32)},
        "LOSS_CPU": {"small": shapes.LossShape(12, 40, 16)},
        "LOSS_MASKED_CPU": {"small_masked": shapes.LossShape(20, 40, 16, ignored=0.85)},
        "SENTENCE": {"small": shapes.SentenceShape(3, 2, 16)},
        "ATTENTION_CPU": {"small": shapes.AttentionShape(2, 12, 20, 4, 2, 16)},
        "ATTENTION_DECODE_CPU": {"small": shapes.AttentionShape(2, 1, 24, 4, 2, 16)},
    }
    for name, table in tables.items():
        monkeypatch.setattr(shapes, name, table)
    monkeypatch.setattr("fastlm.bench.run.ceilings", lambda *_: machine.Ceilings(1.0, 100.0))
    monkeypatch.setattr(timing, "_MAX_SAMPLES", 5)


def run_quickly(case, **options):
    failed = {}
    rows = run_case(
        case, seconds=0.0, failed=lambda provider, why: failed.update({provider: why}), **options
    )
    return rows, failed


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", SCRIPTS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
