"""Rows of a benchmark: as CSV, as a table, as a plot."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fastlm.errors import UserError


@dataclass(frozen=True)
class Row:
    """One provider on one case and pass. Times are milliseconds."""

    op: str
    shape: str
    dtype: str
    direction: str  # the CSV's column "pass"
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    host_ms: float | None  # on a GPU: until the call returned
    graph: bool  # the GPU's time is that of a CUDA graph, without the host's
    speedup: float | None  # torch's median over this one's; None where torch was not timed
    rate: float
    unit: str  # of rate: TFLOP/s or GB/s
    of_ceiling: float  # rate over what the device reached in a matrix product, or a copy
    peak_mb: float | None  # allocated during the call, beside its inputs
    max_error: float
    of_bound: float
    device: str
    driver: str
    torch: str
    triton: str
    commit: str


_COLUMNS = ["pass" if field.name == "direction" else field.name for field in fields(Row)]


def append_csv(path: Path, rows: Iterable[Row]) -> None:
    """Appends rows, with a header if the file is new.

    Raises:
        UserError: the file exists and is not such a table.
    """
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        read_csv(path)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(_COLUMNS)
        for row in rows:
            writer.writerow([_text(value) for value in asdict(row).values()])


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV that `append_csv` wrote.

    Raises:
        UserError: it is something else.
    """
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != _COLUMNS:
            raise UserError(f"{path} is not a table that fastlm bench wrote")
        return list(reader)


def table(rows: Sequence[Row]) -> str:
    """Rows as text, a block for every case and pass; "vs torch" above 1 is faster than torch, the
    floor is the time of the case's bytes, or operations, at the speed of the ceiling.

    "host" is the CPU's time for a call to a GPU; with a star the GPU's time holds it too, because
    no CUDA graph could be made of the call.
    """
    width = max([len(row.provider) for row in rows], default=0)
    lines, block = [], None
    for row in rows:
        if (row.op, row.shape, row.dtype, row.direction) != block:
            block = (row.op, row.shape, row.dtype, row.direction)
            floor = row.median_ms * row.of_ceiling
            title = f"{row.op}  {row.shape}  {row.dtype}  {row.direction}"
            lines += ["", f"{title}  floor {floor:.3f} ms"]
            lines.append(
                f"  {'provider':<{width}}{'ms':>10}{'p20-p80':>20}{'host':>8}{'vs torch':>10}"
                f"{row.unit:>10}{'of ceiling':>12}{'max error':>11}{'of bound':>10}"
                f"{'MB':>9}"
            )
        spread = f"{row.p20_ms:.3f}-{row.p80_ms:.3f}"
        bound = f"{row.of_bound:.2f}{'!' if row.of_bound > 1 else ''}"
        speedup = "-" if row.speedup is None else f"{row.speedup:.2f}x"
        peak = "-" if row.peak_mb is None else f"{row.peak_mb:.1f}"
        host = "-" if row.host_ms is None else f"{row.host_ms:.3f}{'' if row.graph else '*'}"
        lines.append(
            f"  {row.provider:<{width}}{row.median_ms:>10.3f}{spread:>20}{host:>8}{speedup:>10}"
            f"{row.rate:>10.3g}{row.of_ceiling:>12.0%}{row.max_error:>11.1e}{bound:>10}"
            f"{peak:>9}"
        )
    return "\n".join(lines[1:])


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Draws the speed of every provider relative to torch as PNG; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.speedup is not None]
    groups = list(dict.fromkeys(_group(row) for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows))
    figure, axes = pyplot.subplots(
        figsize=(9, 1.5 + 0.22 * len(groups) * max(len(providers), 1)), layout="constrained"
    )
    height = 0.8 / max(len(providers), 1)
    for i, provider in enumerate(providers):
        mine = {_group(row): row for row in rows if row.provider == provider}
        places = [groups.index(group) + (i - len(providers) / 2 + 0.5) * height for group in mine]
        bars = axes.barh(places, [row.speedup for row in mine.values()], height, label=provider)
        axes.bar_label(bars, [f"{row.median_ms:.3g} ms" for row in mine.values()], fontsize=7)
    axes.axvline(1.0, color="gray", linewidth=1)
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.set(xlabel="speed relative to torch (longer is faster)", title=rows[0].device)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _group(row: Row) -> str:
    return f"{row.op} {row.shape}\n{row.dtype} {row.direction}"


def _text(value) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
