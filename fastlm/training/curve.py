"""The losses of a run: a CSV that a resumed run continues, and a plot of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from fastlm.errors import UserError
from fastlm.training.checkpoint import write_atomically

COLUMNS = ("step", "bytes", "lr", "grad_norm", "train_bits_per_byte", "held_out_bits_per_byte")


class Curve:
    """Appends to a CSV, one row a step. Rows hold no times, so equal runs write equal files."""

    def __init__(self, path: Path, last_step: int = 0):
        """Keeps the rows up to `last_step`: those after it are of steps to be run again."""
        self.rows = [row for row in read_curve(path) if int(row["step"]) <= last_step]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(path, text.getvalue().encode())
        self._file = open(path, "a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def extend(self, rows: Iterable[dict]) -> None:
        rows = [{name: _text(row.get(name)) for name in COLUMNS} for row in rows]
        self.rows += rows
        self._writer.writerows(rows)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_curve(path: Path) -> list[dict[str, str]]:
    """The rows of a loss curve; none where there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path} is not a loss curve of fastlm train")
        # A power cut may have left half a row.
        return [row for row in reader if row["step"].isdigit() and None not in row.values()]


def plot_curve(rows: list[dict[str, str]], bigram: float, path: Path) -> bool:
    """Draws the curve as PNG; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    styles = {"train": {"alpha": 0.45, "linewidth": 1}, "held_out": {"marker": "o"}}
    for name, style in styles.items():
        column = f"{name}_bits_per_byte"
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), **style)
    axes.axhline(bigram, color="gray", linestyle="--", label="byte bigram, held out")
    axes.set(xlabel="step", ylabel="bits per byte", title="Training a byte-level DecoderLM")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _text(value) -> str:
    return "" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)
