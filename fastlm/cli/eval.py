"""Measures a checkpoint on held-out text: bits per byte and perplexity, beside a byte bigram's.

Without --data the text is the held-out part of what the checkpoint was trained on. With --data it
is all of that text; whether the model has seen it is yours to know. The bigram is fitted on the
training text in both cases.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastlm.cli._options import add_device, at_least, device_of
from fastlm.training.bigram import bigram_bits, fit_bigram
from fastlm.training.checkpoint import Checkpoint
from fastlm.training.data import evaluation_windows, load_corpus
from fastlm.training.trainer import build_model, evaluate, load_model_state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint file, or the folder of a run")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="files or folders of UTF-8 text")
    parser.add_argument(
        "--bytes", type=at_least(0), default=131072, help="bytes to predict, 0 for all (131072)"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    device = device_of(args)
    checkpoint = Checkpoint.load(args.checkpoint)
    model = build_model(checkpoint.settings)
    load_model_state(model, checkpoint)
    trained_on = load_corpus(checkpoint.data)
    text = trained_on.held_out
    if args.data:
        corpus = load_corpus(args.data)
        text = torch.cat([corpus.train, corpus.held_out])
    windows = evaluation_windows(text, checkpoint.settings.context, args.bytes or None)
    bits = evaluate(model.to(device), *windows, checkpoint.settings)
    bigram = bigram_bits(fit_bigram(trained_on.train), *windows)
    print(f"checkpoint of step {checkpoint.step}, {windows[0].numel()} bytes predicted, "
          f"each from at most {windows[0].shape[1]} before it")  # fmt: skip
    if checkpoint.fingerprint != trained_on.fingerprint:
        print("note: the training text is not the one that the checkpoint was trained on")
    print(f"{'':12}{'bits per byte':>14}{'perplexity':>12}")
    for name, value in (("model", bits), ("byte bigram", bigram)):
        print(f"{name:12}{value:>14.4f}{2**value:>12.4f}")
    return 0
