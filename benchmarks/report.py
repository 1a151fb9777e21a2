"""Writes README.md's table of measurements from benchmarks/results/, where rows are never typed.

python benchmarks/report.py             # print it
python benchmarks/report.py --update    # write it
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from fastlm.bench.results import read_csv
from fastlm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- measurements: [^\n]*-->\n).*?(<!-- end measurements -->)", re.DOTALL)


def rows() -> list[dict[str, str]]:
    """All rows, with the name of their file."""
    files = sorted(RESULTS.glob("*.csv"))
    return [{**row, "file": file.name} for file in files for row in read_csv(file)]


def comparable(measured: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows whose times may be divided by one another: of a case and pass those of the newest
    versions, which are the last ones.

    Raises:
        UserError: an operator's pass was measured on several devices.
    """
    devices, versions = defaultdict(dict), {}
    case = lambda row: tuple(row[name] for name in ("op", "shape", "dtype", "pass"))
    version = lambda row: tuple(row.get(name) for name in ("commit", "torch", "triton", "driver"))
    for row in measured:
        devices[row["op"], row["pass"]][row.get("device")] = row.get("file")
        versions[case(row)] = version(row)
    for (op, direction), found in devices.items():
        if len(found) > 1:
            files = ", ".join(dict.fromkeys(found.values()))
            raise UserError(
                f"{files}: the rows of {op}, {direction}, must be of one device, got "
                + ", ".join(found)
            )
    return [row for row in measured if version(row) == versions[case(row)]]


def table(measured: list[dict[str, str]]) -> str:
    """A line for each operator, pass and family of our kernels: how many times as long others take,
    as the geometric mean over shapes and (the worst shape). Of rows that are `comparable`."""
    cells: dict[tuple, dict[tuple, dict[str, dict]]] = defaultdict(lambda: defaultdict(dict))
    for row in comparable(measured):
        shape, _, variant = row["shape"].split(" ")[0].partition("/")
        if row["op"] == "loss":  # a shape is another problem here, of which no mean makes sense
            name = f"{variant}, {shape}"
        elif row["op"] in ("attention", "rotary", "embedding"):
            name = f"{row['op']}, {variant}"
        else:
            name = variant
        cells[name, row["pass"]][shape, row["dtype"]][row["provider"]] = row
    lines = [
        "| operator | pass | kernels | torch takes | others take | of the ceiling |",
        "|---|---|---|---|---|---|",
    ]
    for (name, direction), shapes in cells.items():
        providers = list(dict.fromkeys(p for cell in shapes.values() for p in cell))
        peers = [p for p in providers if not p.startswith("fastlm") and p != "torch"]
        for ours in (p for p in providers if p.startswith("fastlm")):
            others = ", ".join(filter(None, (_ratio(shapes, ours, p, True) for p in peers)))
            reached = [float(c[ours]["of_ceiling"]) for c in shapes.values() if ours in c]
            lines.append(
                f"| {name} | {direction} | {ours.removeprefix('fastlm-')} "
                f"| {_ratio(shapes, ours, 'torch')} | {others or '–'} | {_percent(reached)} |"
            )
    return "\n".join(lines) + "\n"


def _ratio(shapes, ours: str, peer: str, named: bool = False) -> str:
    """The times of `peer` over ours, where both were measured."""
    ratios = [
        float(cell[peer]["median_ms"]) / float(cell[ours]["median_ms"])
        for cell in shapes.values()
        if ours in cell and peer in cell
    ]
    if not ratios:
        return ""
    text = f"{statistics.geometric_mean(ratios):.2f}"
    if len(ratios) > 1:
        text += f" ({min(ratios):.2f})"
    return f"{peer} {text}" if named else text


def _percent(values: list[float]) -> str:
    low, high = (f"{100 * x:.0f}" for x in (min(values), max(values)))
    return f"{low} %" if low == high else f"{low}–{high} %"


def with_table(text: str) -> str:
    """README.md's text with the table of the rows that there are."""
    return BLOCK.sub(lambda m: m[1] + table(rows()) + m[2], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="rewrite README.md's table")
    update = parser.parse_args().update
    try:
        if update:
            README.write_text(with_table(README.read_text()))
        else:
            print(table(rows()), end="")
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
