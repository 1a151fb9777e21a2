"""What the rows of a run say together: fastlm against every peer, and its options against none."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence

from fastlm.bench.results import Row

# (shape's name, variant, dtype, pass) -> rows by provider
Cells = dict[tuple[str, str, str, str], dict[str, Row]]


def against_peers(rows: Sequence[Row]) -> list[str]:
    """The time of each peer over fastlm's, by variant and pass: geometric mean, and worst shape."""
    lines = []
    for variant, direction, group in _groups(rows):
        providers = list(dict.fromkeys(name for cell in group.values() for name in cell))
        peers = [name for name in providers if not name.startswith("fastlm")]
        pairs = [(ours, peer) for ours in _ours(providers) for peer in peers]
        lines += [_ratio(variant, direction, group, *pair) for pair in pairs]
    return list(filter(None, lines))


def between_kernels(rows: Sequence[Row]) -> list[str]:
    """The time of Triton's kernels over that of CUDA C++'s, by variant and pass: what the order of
    an operator's backends is to follow."""
    pair = ("fastlm-cuda", "fastlm-triton")
    lines = (_ratio(*group, *pair) for group in _groups(rows))
    return list(filter(None, lines))


def against_plain(rows: Sequence[Row]) -> list[str]:
    """fastlm's time for a variant over its own for "full", or "causal", at the same shape; and the
    same for one operation, where variants differ in how many they have."""
    cells = _cells(rows)
    lines = []
    for (shape, variant, dtype, direction), cell in cells.items():
        plain = "causal" if variant.endswith("causal") else "full"
        base = cells.get((shape, plain, dtype, direction), {})
        for ours in _ours(cell):
            if variant == plain or ours not in base or cell[ours].unit != base[ours].unit:
                continue
            time = cell[ours].median_ms / base[ours].median_ms
            lines.append(
                f"{variant:<28} {direction:<16} {ours:<13} {time:6.2f} of the time of {plain:<6}"
                f" {base[ours].rate / cell[ours].rate:6.2f} an operation  {shape} {dtype}"
            )
    return lines


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, str, Cells]]:
    """(variant, pass, its cells)."""
    cells = _cells(rows)
    for kind in dict.fromkeys((key[1], key[3]) for key in cells):
        yield *kind, {key: cell for key, cell in cells.items() if (key[1], key[3]) == kind}


def _ratio(variant: str, direction: str, group: Cells, ours: str, other: str) -> str | None:
    """The time of `other` over that of `ours` where both were timed."""
    ratios = {
        f"{key[0]} {key[2]}": cell[other].median_ms / cell[ours].median_ms
        for key, cell in group.items()
        if ours in cell and other in cell
    }
    if not ratios:
        return None
    worst = min(ratios, key=ratios.get)
    mean = statistics.geometric_mean(ratios.values())
    return (
        f"{variant:<28} {direction:<16} {ours:<13} vs {other:<15} {mean:6.2f}x"
        f"  worst {ratios[worst]:6.2f}x at {worst}  ({len(ratios)} of {len(group)})"
    )


def _cells(rows: Iterable[Row]) -> Cells:
    cells: Cells = {}
    for row in rows:
        shape, _, variant = row.shape.split(" ")[0].partition("/")
        key = (shape, variant, row.dtype, row.direction)
        cells.setdefault(key, {})[row.provider] = row
    return cells


def _ours(providers: Iterable[str]) -> list[str]:
    """fastlm's kernels; without one, as on a CPU, its torch backend."""
    ours = [name for name in providers if name.startswith("fastlm")]
    return [name for name in ours if name != "fastlm-torch"] or ours
