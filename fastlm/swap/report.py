"""What `swap` did, module by module, and how it prints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One module that fastlm has a counterpart for."""

    name: str  # dotted, as in `model.named_modules()`; "" is the model itself
    cls: str  # the class it had before
    kind: str  # one of `KINDS`
    replaced: bool
    note: str  # what runs instead, or why it was left


@dataclass(frozen=True)
class SwapReport:
    """What `swap` replaced and what it left; prints as a table.

    Attributes:
        rows: every module that fastlm has a counterpart for, in the model's order.
    """

    rows: tuple[Row, ...]

    @property
    def replaced(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.replaced)

    @property
    def left(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.replaced)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and lines; equal rows of numbered layers share a line, with `*` for the number."""
        header = ("module", "class", "kind", "count", "runs", "left because")
        groups: dict[tuple, int] = {}
        for row in self.rows:
            name = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", row.name) or "(model)"
            notes = (row.note, "") if row.replaced else ("", row.note)
            key = (name, row.cls, row.kind, *notes)
            groups[key] = groups.get(key, 0) + 1
        lines = [(*key[:3], str(count), *key[3:]) for key, count in groups.items()]
        return header, lines

    def __str__(self) -> str:
        summary = f"{len(self.replaced)} modules replaced, {len(self.left)} left"
        return f"{format_table(*self.table())}\n{summary}"


def format_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Aligned columns; columns without any content are left out."""
    lines = [list(line) for line in lines]
    kept = [i for i in range(len(header)) if any(line[i] for line in lines)]
    table = [[line[i] for i in kept] for line in [list(header), *lines]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    rows = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in table
    )
    return "\n".join(row.rstrip() for row in rows)
