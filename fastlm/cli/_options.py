"""Options that several commands share, and how they are checked."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastlm.errors import UserError


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda")


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for.

    Raises:
        UserError: there is none such here.
    """
    if args.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"--device {args.device}: {first_line}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {args.device}")
    return device


def make_folder(path: Path) -> Path:
    """Creates a folder for results.

    Raises:
        UserError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror}") from error
    return path


def at_least(minimum: int):
    """An argparse type: an integer from `minimum` up."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    parse.__name__ = "int"  # argparse names it where the text is no number
    return parse
