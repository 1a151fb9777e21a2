"""Checkpoints: one safetensors file that is whole at every moment and resumes exactly.

It holds the parameters, AdamW's moments and the state of the random generators as tensors, and as
JSON in its header the settings, the step and the position in the text. No pickle is read or
written, so a checkpoint from elsewhere cannot run code.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlm.errors import UserError
from fastlm.training.settings import Settings

FILE_NAME = "checkpoint.safetensors"

_KEY = "fastlm"
_FORMAT = "byte-level DecoderLM, 1"
_PARTS = ("model", "optimizer", "rng")


@dataclass
class Checkpoint:
    """A run between two steps.

    `position` counts the windows drawn; `data` are the paths given ([] for the standard library)
    and `fingerprint` identifies the bytes read from them.
    """

    settings: Settings
    step: int
    position: int
    data: list[str]
    fingerprint: str
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    rng: dict[str, torch.Tensor]

    def save(self, path: Path) -> None:
        """Writes the file under a temporary name, then renames it over `path`.

        Raises:
            UserError: it could not be written (a full disk, say); `path` is as it was.
        """
        safetensors = _safetensors()
        tensors = {
            f"{part}.{name}": tensor.detach().cpu().contiguous()
            for part in _PARTS
            for name, tensor in getattr(self, part).items()
        }
        run = {
            "format": _FORMAT,
            "settings": self.settings.to_dict(),
            "step": self.step,
            "position": self.position,
            "data": self.data,
            "fingerprint": self.fingerprint,
        }
        # One entry: safetensors writes several in any order, and equal runs write equal files.
        data = safetensors.torch.save(tensors, {_KEY: json.dumps(run)})
        write_atomically(path, data)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Reads a checkpoint; `path` is the file or the folder of a run.

        Raises:
            UserError: there is none, or it is not one of ours, or it is damaged.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"no checkpoint at {path}")
        try:
            with _safetensors().safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors has an exception of its own for each way to fail
            raise UserError(f"cannot read {path}: not a safetensors file ({error})") from error
        if _KEY not in metadata:
            raise UserError(f"{path} is not a checkpoint that fastlm train wrote")
        parts = {
            part: {
                k.removeprefix(f"{part}."): v
                for k, v in tensors.items()
                if k.startswith(f"{part}.")
            }
            for part in _PARTS
        }
        try:
            run = json.loads(metadata[_KEY])
            if run.pop("format") != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT!r}")
            settings = Settings.from_dict(run.pop("settings"))
            checkpoint = cls(settings=settings, **run, **parts)
            if not all(type(n) is int and n >= 0 for n in (checkpoint.step, checkpoint.position)):
                raise ValueError(f"step {checkpoint.step!r}, position {checkpoint.position!r}")
            return checkpoint
        except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
            raise UserError(f"{path} is a damaged checkpoint: {error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` with `data`, or, if anything goes wrong, leaves it as it was.

    Raises:
        UserError: the data could not be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "; the one saved before is whole" if path.exists() else ""
        raise UserError(f"cannot write {path}: {error.strerror}{kept}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    # The rename itself reaches the disk only with its folder.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise UserError("checkpoints need safetensors: pip install 'fastlm[train]'") from error
    return safetensors
