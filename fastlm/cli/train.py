"""Trains a byte-level decoder language model on text and saves checkpoints that resume exactly.

Without --data the text is the source of Python's own standard library. Files are split by a hash
of their names into training and held-out text, and the held-out bits per byte are compared with
those of a byte-bigram model. The folder --out receives checkpoint.safetensors, loss.csv and
loss.png. Ctrl-C saves a checkpoint and stops; `fastlm train --resume --out FOLDER` goes on from it
to the same losses.
"""

from __future__ import annotations

import argparse
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from fastlm.cli._options import add_device, at_least, device_of, make_folder
from fastlm.cli._progress import Progress
from fastlm.errors import UserError
from fastlm.training.bigram import bigram_bits, fit_bigram
from fastlm.training.checkpoint import FILE_NAME, Checkpoint
from fastlm.training.curve import Curve, plot_curve
from fastlm.training.data import evaluation_windows, load_corpus
from fastlm.training.settings import AUTOCAST, Settings
from fastlm.training.trainer import Trainer, evaluate

_LOG_EVERY = 10  # steps between reads of the loss, so that a GPU is not waited for at each
_HELP = {
    "dim": "width of the model",
    "layers": "number of layers",
    "heads": "attention heads",
    "context": "bytes in a window",
    "dropout": "probability of dropout",
    "steps": "optimiser steps",
    "batch_size": "windows in a batch",
    "accumulate": "batches whose gradients a step adds up",
    "lr": "highest learning rate",
    "warmup": "steps of warm-up",
    "weight_decay": "AdamW's decay of matrices",
    "clip": "largest norm of the gradient",
    "seed": "of initialisation, order and dropout",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/train"), help="folder of the run")
    parser.add_argument(
        "--data", nargs="+", metavar="PATH", help="files or folders of UTF-8 text to train on"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint in --out by a new run"
    )
    add_device(parser)
    settings = parser.add_argument_group("settings (the defaults take about 2 minutes on 2 cores)")
    defaults = Settings()
    for name, text in _HELP.items():
        default = getattr(defaults, name)
        # None tells "not given" from "given as the default", which matters to --resume.
        settings.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), help=f"{text} ({default})"
        )
    settings.add_argument("--autocast", choices=AUTOCAST, help="run matrix products in bf16 (none)")
    parser.add_argument(
        "--eval-every", type=at_least(1), default=100, help="steps between evaluations (100)"
    )
    parser.add_argument(
        "--save-every", type=at_least(1), default=100, help="steps between checkpoints (100)"
    )
    parser.add_argument(
        "--eval-bytes", type=at_least(1), default=32768, help="held-out bytes to predict (32768)"
    )


def run(args: argparse.Namespace) -> int:
    device, out = device_of(args), make_folder(args.out)
    given = {name: getattr(args, name) for name in (*_HELP, "autocast")}
    given = {name: value for name, value in given.items() if value is not None}
    saved = Checkpoint.load(out) if args.resume else None
    if saved is None and (out / FILE_NAME).exists() and not args.overwrite:
        raise UserError(
            f"{out} holds a checkpoint already; add --resume to go on from it, --overwrite to"
            " replace it, or name another --out"
        )
    settings, data = _resumed(saved, given, args.data) if saved else (Settings(**given), args.data)
    corpus = load_corpus(data or [])
    print(corpus, flush=True)
    trainer = Trainer(settings, corpus, [str(path) for path in data or []], device)
    if saved is not None:
        trainer.restore(saved)
    count = sum(p.numel() for p in trainer.model.parameters())
    print(f"{count / 1e6:.2f} M parameters on {device}, {settings.steps} steps of "
          f"{settings.batch_size * settings.accumulate} x {settings.context} bytes")  # fmt: skip
    held_out = evaluation_windows(corpus.held_out, settings.context, args.eval_bytes)
    bigram = bigram_bits(fit_bigram(corpus.train), *held_out)
    print(f"byte bigram: {bigram:.4f} bits per byte on the held-out text", flush=True)
    curve = Curve(out / "loss.csv", trainer.step_count)
    try:
        bits = _train(trainer, held_out, curve, out / FILE_NAME, args)
    finally:
        curve.close()
    _report(trainer, curve, bits, bigram, out)
    return 0 if trainer.step_count >= settings.steps else 128 + signal.SIGINT


def _resumed(saved: Checkpoint, given: dict, data) -> tuple[Settings, list[str]]:
    """The checkpoint's settings; only a longer or shorter schedule may be asked for."""
    settings = saved.settings.to_dict()
    for name, value in given.items():
        if name != "steps" and settings[name] != value:
            raise UserError(
                f"--{name.replace('_', '-')} is {settings[name]} in the checkpoint and cannot"
                f" become {value}; leave it out, or start a new run in another --out"
            )
    return Settings(**{**settings, **given}), saved.data if data is None else data


def _train(trainer: Trainer, held_out, curve: Curve, path: Path, args) -> float | None:
    """Steps until the end or Ctrl-C; returns the last held-out bits per byte, if measured."""
    settings, pending, bits = trainer.settings, [], None
    started, first, saved = time.monotonic(), trainer.step_count, trainer.step_count
    step_bytes = settings.batch_size * settings.accumulate * settings.context
    with _stop_on_ctrl_c() as stopped, Progress("step", settings.steps, first) as progress:
        while trainer.step_count < settings.steps and not stopped:
            pending.append((trainer.step_count + 1, trainer.step()))
            step = trainer.step_count
            evaluates = step % args.eval_every == 0 or step == settings.steps
            saves = step % args.save_every == 0 or step == settings.steps
            if evaluates:
                bits = evaluate(trainer.model, *held_out, settings)
            if evaluates or saves or step % _LOG_EVERY == 0:
                rows = _rows(pending, step_bytes)
                if evaluates:
                    rows[-1]["held_out_bits_per_byte"] = bits
                curve.extend(rows)
                pending.clear()
                rate = (step - first) * step_bytes / (time.monotonic() - started)
                note = f"train {rows[-1]['train_bits_per_byte']:.3f} bits per byte"
                note += "" if bits is None else f", held out {bits:.3f}"
                progress.update(step, f"{note}, {rate / 1e3:.1f} kB/s")
            if saves:
                trainer.checkpoint().save(path)
                saved = step
        if saved < trainer.step_count:
            curve.extend(_rows(pending, step_bytes) if pending else [])
            trainer.checkpoint().save(path)
    if bits is None and trainer.step_count >= settings.steps:
        bits = evaluate(trainer.model, *held_out, settings)
    return bits


def _rows(pending: list, step_bytes: int) -> list[dict]:
    losses = torch.stack([step.loss for _, step in pending]).double() / torch.log(torch.tensor(2.0))
    norms = torch.stack([step.grad_norm for _, step in pending])
    values = zip(pending, losses.tolist(), norms.tolist(), strict=True)
    return [
        {
            "step": number,
            "bytes": number * step_bytes,
            "lr": step.lr,
            "grad_norm": norm,
            "train_bits_per_byte": loss,
        }
        for (number, step), loss, norm in values
    ]


def _report(trainer: Trainer, curve: Curve, bits: float | None, bigram: float, out: Path) -> None:
    done, steps = trainer.step_count, trainer.settings.steps
    if done < steps:
        print(f"stopped at step {done} of {steps}; go on with: fastlm train --resume --out {out}")
    if bits is not None:
        verdict = "below" if bits < bigram else "NOT below"
        print(f"held out: {bits:.4f} bits per byte, {verdict} the byte bigram's {bigram:.4f}")
    written = [out / FILE_NAME, out / "loss.csv"]
    if plot_curve(curve.rows, bigram, out / "loss.png"):
        written.append(out / "loss.png")
    else:
        print("no plot: matplotlib is not installed (pip install 'fastlm[bench]')")
    print("wrote " + ", ".join(str(path) for path in written))


@contextmanager
def _stop_on_ctrl_c():
    """Yields a list that is no longer empty once SIGINT or SIGTERM came; a second one kills."""
    stopped = []

    def stop(number, frame):
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
