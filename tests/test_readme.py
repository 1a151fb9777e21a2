"""The documents: their Python runs, their links lead somewhere, their tables are true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import benching
import pytest
import support_matrix

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(p.name for p in ROOT.glob("*.md")) + ["csrc/README.md"]
WITH_CODE = ["README.md", "CONTRIBUTING.md"]


def blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)


@pytest.mark.parametrize("document", WITH_CODE)
def test_code_blocks_run(document, tmp_path):
    """In order, in one process, each seeing what those before it defined."""
    assert document != "README.md" or len(blocks(document)) >= 3
    script = "".join(
        f"{block}\nprint('block {i} ran')\n" for i, block in enumerate(blocks(document))
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(" ran\n") == len(blocks(document))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_files(document):
    folder = (ROOT / document).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        if not link.startswith(("http://", "https://", "#", "mailto:")):
            assert (folder / link.split("#")[0]).exists(), f"{document}: {link}"


def test_commands_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for document in DOCUMENTS:
        for target in re.findall(r"`make ([a-z-]+)", (ROOT / document).read_text()):
            assert target in targets, f"{document}: make {target}"


def test_support_matrix_is_true():
    text = (ROOT / "README.md").read_text()
    table = re.search(r"<!-- support matrix[^\n]*-->\n(.*?)\n<!-- end -->", text, re.S)
    update = "python -P tests/support/support_matrix.py --update"
    assert table and table[1] == support_matrix.render(), f"README.md is out of date: {update}"


def test_measurements_are_those_of_the_rows():
    report = benching.load("report")
    text = (ROOT / "README.md").read_text()
    assert report.with_table(text) == text, "out of date: python benchmarks/report.py --update"
    assert "| bias_gelu | forward | cuda |" in report.table(report.rows())


def test_a_measurement_is_the_mean_of_ratios_and_the_worst():
    report = benching.load("report")
    rows = [
        {"op": "norm", "shape": f"{size}/layer_norm 1x1", "dtype": "bfloat16", "pass": "forward",
         "provider": provider, "median_ms": ms, "of_ceiling": "0.5"}
        for size, provider, ms in (
            ("a", "torch", "4"), ("a", "fastlm-cuda", "1"), ("a", "liger", "0.5"),
            ("b", "torch", "1"), ("b", "fastlm-cuda", "1"),
        )
    ]  # fmt: skip
    line = "| layer_norm | forward | cuda | 2.00 (1.00) | liger 0.50 | 50 % |"
    assert report.table(rows).splitlines()[2:] == [line]
