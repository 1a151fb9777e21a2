"""Continues a prompt with a trained checkpoint, byte by byte, printing the text as it is made.

Where the text grows past the model's context, the second half of what it sees is kept as the new
prompt. The end of a file ends the text.
"""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from fastlm.cli._options import add_device, at_least, device_of
from fastlm.errors import UserError
from fastlm.models import DecoderLM, generate_stream
from fastlm.training.checkpoint import Checkpoint
from fastlm.training.data import SEPARATOR
from fastlm.training.trainer import build_model, load_model_state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint file, or the folder of a run")
    parser.add_argument(
        "--prompt", default="", help="text to continue; empty starts a new file (empty)"
    )
    parser.add_argument(
        "--bytes", type=at_least(1), default=400, help="bytes to generate at most (400)"
    )
    parser.add_argument("--greedy", action="store_true", help="take the likeliest byte each time")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="divides the logits; higher is wilder (0.8)"
    )
    parser.add_argument("--top-k", type=at_least(1), help="choose among the k likeliest bytes")
    parser.add_argument("--top-p", type=float, help="choose among the likeliest, of this mass")
    parser.add_argument("--seed", type=int, default=0, help="of the choices (0)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    device = device_of(args)
    if not 0 < args.temperature < float("inf"):
        raise UserError(f"--temperature must be above 0 and finite, got {args.temperature}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1, got {args.top_p}")
    checkpoint = Checkpoint.load(args.checkpoint)
    model = build_model(checkpoint.settings)
    load_model_state(model, checkpoint)
    options = {
        "greedy": args.greedy,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "generator": torch.Generator(device).manual_seed(args.seed),
    }
    # A character may arrive in several bytes, and the model may write ones that are no text.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    _write(args.prompt)
    prompt = args.prompt.encode("utf-8", "surrogateescape")
    for byte in continue_bytes(model.to(device), prompt, args.bytes, options):
        _write(decoder.decode(bytes([byte])))
    _write(decoder.decode(b"", final=True) + "\n")
    return 0


def continue_bytes(model: DecoderLM, prompt: bytes, count: int, options: dict) -> Iterator[int]:
    """Up to `count` bytes after the prompt, ending before a `SEPARATOR`."""
    context = model.config.max_seqlen
    text = [SEPARATOR, *prompt][-context:]
    device = model.token_weight.device
    while count > 0:
        if len(text) >= context:
            text = text[-(context // 2 or 1) :]
        room = min(count, context + 1 - len(text))
        ids = torch.tensor(text, device=device)
        for token in generate_stream(
            model, ids, max_new_tokens=room, stop_ids=(SEPARATOR,), **options
        ):
            byte = int(token)
            if byte == SEPARATOR:
                return
            text.append(byte)
            count -= 1
            yield byte


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    # A terminal that cannot show a character gets a question mark, not an exception.
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
