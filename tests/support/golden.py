"""Golden tables: rows of a frozen dataclass as CSV, each found by its `key`; and what rows hold."""

from __future__ import annotations

import csv
from dataclasses import astuple, fields
from pathlib import Path
from typing import TypeVar

Row = TypeVar("Row")


def read_table(path: Path, row_type: type[Row]) -> dict[tuple[str, ...], Row]:
    with path.open(newline="") as file:
        kinds = {f.name: int if f.type == "int" else str for f in fields(row_type)}
        rows = [row_type(**{k: kinds[k](v) for k, v in r.items()}) for r in csv.DictReader(file)]
    return {row.key: row for row in rows}


def write_table(path: Path, rows: list) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(f.name for f in fields(rows[0]))
        writer.writerows(astuple(row) for row in sorted(rows))


def median_by_size(widths: list[int]) -> int:
    """Half of all bits come in accesses of at least this width; 0 where there are none."""
    left = sum(widths) / 2
    for width in sorted(widths, reverse=True):
        left -= width
        if left <= 0:
            return width
    return 0
