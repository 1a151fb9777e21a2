"""Text as bytes: which files are read, how they are split, in which order windows are drawn."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlm.errors import UserError

# Ends every file in the stream. A file that holds this byte is not text.
SEPARATOR = 0

_HELD_OUT_OF = 10  # one file in ten is held out
# Tests would double the corpus; `encodings` and `pydoc_data` are generated tables.
_STDLIB_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idle_test",
                 "encodings", "pydoc_data"}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out, each file followed by `SEPARATOR`."""

    train: torch.Tensor  # uint8
    held_out: torch.Tensor  # uint8
    train_files: int
    held_out_files: int
    skipped_files: int  # not text

    @property
    def fingerprint(self) -> str:
        """Identifies the training bytes: a run may only resume on the same ones."""
        return hashlib.sha256(self.train.numpy()).hexdigest()[:16]

    def __str__(self) -> str:
        by = f"{self.train_files} files" if self.held_out_files else "the first nine tenths"
        held_by = f"{self.held_out_files} files" if self.held_out_files else "the last tenth"
        skipped = f", {self.skipped_files} files are not text" if self.skipped_files else ""
        return (
            f"{len(self.train) / 1e6:.2f} MB to train on ({by}), "
            f"{len(self.held_out) / 1e6:.2f} MB held out ({held_by}){skipped}"
        )


def load_corpus(paths: Sequence[str | Path] = ()) -> Corpus:
    """Reads text files and splits them by file.

    A file is held out if the hash of its path, relative to the path given, says so: the split
    depends neither on the machine nor on the other files. Where that leaves a side empty (a single
    file, say), the last tenth of the bytes is held out instead.

    Args:
        paths: files or folders (searched recursively, hidden names left out); empty means the
            source of Python's standard library.

    Raises:
        UserError: a path does not exist, or there is no readable text under it.
    """
    sides: dict[bool, list[bytes]] = {True: [], False: []}
    skipped = 0
    for path in [Path(p) for p in paths] or [None]:
        found = False
        for key, file in _stdlib_files() if path is None else _files(path):
            text = _read_text(file)
            if text is None:
                skipped += 1
                continue
            found = True
            sides[is_held_out(key)].append(text)
        if not found:
            raise UserError(f"no readable text in {path or 'the standard library'}")
    return _corpus(sides[False], sides[True], skipped)


def is_held_out(key: str) -> bool:
    """Whether the file with this relative path (with forward slashes) is held out."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[0] % _HELD_OUT_OF == 0


def _corpus(train: list[bytes], held_out: list[bytes], skipped: int) -> Corpus:
    counts = len(train), len(held_out)
    if not train or not held_out:
        whole = _join(train + held_out)
        cut = len(whole) - len(whole) // _HELD_OUT_OF
        train_bytes, held_out_bytes, counts = whole[:cut], whole[cut:], (sum(counts), 0)
    else:
        train_bytes, held_out_bytes = _join(train), _join(held_out)
    return Corpus(train_bytes, held_out_bytes, *counts, skipped)


def _join(texts: list[bytes]) -> torch.Tensor:
    stream = bytearray().join(text + bytes([SEPARATOR]) for text in texts)
    return torch.frombuffer(stream, dtype=torch.uint8)


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return ((k, f) for k, f in _walk(root, _STDLIB_SKIPS) if k.endswith(".py"))


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_dir():
        return _walk(path, set())
    if path.is_file():
        return iter([(path.name, path)])
    raise UserError(f"no such file or folder: {path}")


def _walk(root: Path, skips: set[str]) -> Iterator[tuple[str, Path]]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if name not in skips and not name.startswith((".", "__pycache"))
        )
        for name in sorted(files):
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():  # a pipe or device would block
                yield file.relative_to(root).as_posix(), file


def _read_text(file: Path) -> bytes | None:
    """The file's bytes if they are UTF-8 text and not empty."""
    try:
        data = file.read_bytes()
        data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return data if data.strip() and SEPARATOR not in data else None


class Windows:
    """Training windows of `context + 1` bytes in an order that (seed, position) determines.

    Each epoch visits every window once, shuffled, and shifts the cuts by a random offset, so that
    the bytes at the borders differ from epoch to epoch. `position` counts windows drawn since the
    beginning; it is all that a resumed run needs.
    """

    def __init__(self, data: torch.Tensor, context: int, seed: int, position: int = 0):
        self.data, self.context, self.seed, self.position = data, context, seed, position
        # The offset takes up to `context` bytes from the front.
        self.per_epoch = (len(data) - 1 - context) // context
        if self.per_epoch < 1:
            raise UserError(
                f"too little text: {len(data)} bytes to train on, a context of {context} needs at"
                f" least {2 * context + 1}"
            )
        self._epoch = -1

    def next(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next `batch` windows: inputs and targets, int64 (batch, context)."""
        starts = torch.tensor([self._start(self.position + i) for i in range(batch)])
        self.position += batch
        rows = starts[:, None] + torch.arange(self.context + 1)
        window = self.data[rows].long()
        return window[:, :-1], window[:, 1:]

    def _start(self, position: int) -> int:
        epoch, index = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._offset = int(torch.randint(self.context, (), generator=generator))
            self._order = torch.randperm(self.per_epoch, generator=generator)
            self._epoch = epoch
        return self._offset + int(self._order[index]) * self.context


def evaluation_windows(
    data: torch.Tensor, context: int, max_bytes: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of held-out text, spread evenly over it: inputs and targets, int64 (n, context).

    Args:
        data: uint8 (bytes,).
        context: shortened to the text where that is shorter.
        max_bytes: about how many bytes to predict; None for all but the last partial window.

    Raises:
        UserError: fewer than two bytes.
    """
    if len(data) < 2:
        raise UserError(f"too little text to evaluate on: {len(data)} bytes held out")
    context = min(context, len(data) - 1)
    available = (len(data) - 1) // context
    wanted = available if max_bytes is None else max(1, min(available, max_bytes // context))
    starts = torch.arange(wanted) * available // wanted * context
    window = data[starts[:, None] + torch.arange(context + 1)].long()
    return window[:, :-1], window[:, 1:]
