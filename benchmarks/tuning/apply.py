"""Puts picks into the tables that they are for."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_NOTE = re.compile(r"^\s*# .*, \d{4}-\d\d-\d\d: .*\n", re.MULTILINE)


def apply(file: Path, root: Path = ROOT) -> list[str]:
    """Rewrites the files that the picks name; returns what was done, an entry a line."""
    done = []
    for pick in json.loads(file.read_text()):
        target = root / pick["file"]
        path, value = _frozen(pick["path"]), _frozen(pick["value"])
        target.write_text(edited(target.read_text(), pick["table"], path, value, pick["note"]))
        done.append(f"{pick['file']}: {pick['table']}{list(path)} = {value}")
    return done


def edited(text: str, table: str, path: tuple, value: tuple, note: str) -> str:
    """The source with `value` at `path` in a dictionary that it assigns, under a comment."""
    lines = text.splitlines(keepends=True)
    node = _assigned(text, table)
    while path:
        keys = [ast.literal_eval(key) for key in node.keys]
        if path[0] not in keys:
            return _inserted(lines, node, path, value, note)
        index = keys.index(path[0])
        key, node, path = node.keys[index], node.values[index], path[1:]
    first, last = node.lineno - 1, node.end_lineno - 1
    after = _bytes(lines[last], node.end_col_offset, None)
    lines[first : last + 1] = [f"{_bytes(lines[first], 0, node.col_offset)}{value!r}{after}"]
    row = key.lineno - 1
    lines.insert(row, f"{' ' * key.col_offset}# {note}\n")
    if row and _NOTE.match(lines[row - 1]):
        del lines[row - 1]
    return "".join(lines)


def _inserted(lines: list[str], node: ast.Dict, path: tuple, value: tuple, note: str) -> str:
    """The entry first in a dictionary, with the dictionaries that are not there yet."""
    row, column = node.lineno - 1, node.col_offset + 1  # behind its brace
    indent = " " * (len(lines[row]) - len(lines[row].lstrip()))
    entry = repr(value)
    for key in reversed(path[1:]):
        entry = f"{{{key!r}: {entry}}}"
    new = f"\n{indent}    # {note}\n{indent}    {path[0]!r}: {entry},"
    if not node.keys:
        new += f"\n{indent}"
    lines[row] = _bytes(lines[row], 0, column) + new + _bytes(lines[row], column, None)
    return "".join(lines)


def _bytes(line: str, start: int, end: int | None) -> str:
    """ast counts columns in bytes."""
    return line.encode()[start:end].decode()


def _assigned(text: str, table: str) -> ast.Dict:
    for node in ast.parse(text).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(isinstance(t, ast.Name) and t.id == table for t in targets):
            return node.value
    raise SystemExit(f"tune: no table {table}")


def _frozen(value):
    """Lists, which is what JSON has, as the tuples that they were."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
