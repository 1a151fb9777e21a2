"""The page that `fastlm demo` writes: one HTML file that needs no other."""

from __future__ import annotations

import base64
import datetime
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import fastlm
from fastlm.bench.results import read_csv

_TITLES = {
    "doctor": "This machine",
    "train": "Training",
    "eval": "Evaluation",
    "generate": "A generated sample",
    "swap-check": "Swapped into a pretrained encoder",
    "bench": "Benchmark",
}
_PLOT_OF = {"train": "loss plot", "bench": "benchmark plot"}
_COLUMNS = {
    "op": "operator",
    "shape": "shape",
    "dtype": "dtype",
    "pass": "pass",
    "provider": "provider",
    "median_ms": "ms",
    "speedup": "vs torch",
    "max_error": "max error",
    "of_bound": "of bound",
}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #ccc }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 12.5px }
table { border-collapse: collapse; font-size: 13px }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100% }
.failed { color: #b00020 }
"""


def render(
    steps: Sequence[tuple[str, str, str, str]], files: Mapping[str, Path], seconds: float
) -> str:
    """The page as a string.

    Args:
        steps: (name, command line, output, outcome) of the commands that ran; "ok" is success.
        files: what they wrote, by the names in `fastlm.cli.demo.FILES`.
        seconds: how long all of it took.
    """
    today = datetime.date.today().isoformat()
    parts = [
        f"<h1>fastlm {fastlm.__version__}</h1>",
        f"<p>Written by <code>fastlm demo</code> on {today}, in {seconds:.0f} seconds.</p>",
    ]
    for name, command, output, outcome in steps:
        parts.append(f"<h2>{_TITLES.get(name, name)}</h2>")
        mark = "" if outcome == "ok" else f' <span class="failed">{html.escape(outcome)}</span>'
        parts.append(f"<p><code>fastlm {html.escape(command)}</code>{mark}</p>")
        plot = files.get(_PLOT_OF.get(name, ""))
        if plot is not None:
            parts.append(_image(plot, _PLOT_OF[name]))
        if name == "bench" and "benchmark table" in files:
            parts.append(_table(read_csv(files["benchmark table"])))
            output = output[output.rfind("\non ") + 1 :]  # the rows are in the table already
        parts.append(f"<pre>{html.escape(output.strip())}</pre>")
    parts.append("<h2>Files</h2><table>")
    for name, path in files.items():
        size = f"{path.stat().st_size:,}"
        parts.append(
            f"<tr><td>{name}</td><td><code>{html.escape(str(path))}</code></td>"
            f'<td class="n">{size} bytes</td></tr>'
        )
    parts.append("</table>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>fastlm demo</title>\n<style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _image(path: Path, name: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{name}" src="data:image/png;base64,{data}"></p>'


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{title}</th>" for title in _COLUMNS.values()) + "</tr>"]
    for row in rows:
        cells = (_cell(name, row[name]) for name in _COLUMNS)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join(lines) + "</table>"


def _cell(name: str, value: str) -> str:
    formats = {
        "median_ms": "{:.3f}",
        "speedup": "{:.2f}x",
        "max_error": "{:.1e}",
        "of_bound": "{:.2f}",
    }
    if name not in formats:
        return f"<td>{html.escape(value)}</td>"
    return f'<td class="n">{formats[name].format(float(value)) if value else ""}</td>'
