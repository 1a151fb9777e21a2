"""Runs everything once and writes a report: doctor, train, eval, generate, swap-check, bench.

Each step is the command of that name, run in the folder --out with the arguments shown. A step that
fails does not stop those that do not need it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fastlm.cli._options import at_least, make_folder
from fastlm.cli._report import render
from fastlm.training.checkpoint import write_atomically

# What the steps write, relative to --out, in the order in which it is named at the end.
FILES = {
    "checkpoint": "train/checkpoint.safetensors",
    "loss curve": "train/loss.csv",
    "loss plot": "train/loss.png",
    "benchmark table": "benchmark.csv",
    "benchmark plot": "benchmark.png",
}
REPORT = "report.html"

_NEEDS_TRAINING = ("eval", "generate")


@dataclass(frozen=True)
class Step:
    """A command that ran: what it printed on standard output, its exit code, its seconds."""

    arguments: tuple[str, ...]
    output: str
    code: int
    seconds: float

    @property
    def name(self) -> str:
        return self.arguments[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for results")
    parser.add_argument("--steps", type=at_least(1), help="of the training (as fastlm train)")


def run(args: argparse.Namespace) -> int:
    out = make_folder(args.out)
    for name in (*FILES.values(), REPORT):
        (out / name).unlink(missing_ok=True)  # of a demo before: `bench` would append to it
    started, done = time.monotonic(), []
    todo = commands(args.steps)
    for i, arguments in enumerate(todo, 1):
        print(f"\n=== {i}/{len(todo)}  fastlm {_shown(arguments)}", flush=True)
        if arguments[0] in _NEEDS_TRAINING and any(s.code for s in done if s.name == "train"):
            print("left out: there is no checkpoint")
            continue
        done.append(run_step(arguments, out))
        print(f"=== {done[-1].name}: {_outcome(done[-1])}, {done[-1].seconds:.0f} s", flush=True)
    seconds = time.monotonic() - started
    files = {name: out / file for name, file in FILES.items() if (out / file).exists()}
    page = render([(s.name, _shown(s.arguments), s.output, _outcome(s)) for s in done], files,
                  seconds)  # fmt: skip
    write_atomically(out / REPORT, page.encode())
    print(f"\ndone in {seconds:.0f} s; wrote")
    for name, file in {**files, "report": out / REPORT}.items():
        print(f"  {name:<16} {file}")
    succeeded = {s.name for s in done if s.code == 0}
    failed = [arguments[0] for arguments in todo if arguments[0] not in succeeded]
    if failed:
        print(f"fastlm demo: these did not succeed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def commands(steps: int | None) -> list[tuple[str, ...]]:
    """The command lines of the demo, without the word fastlm."""
    return [
        ("doctor",),
        ("train", "--out", "train", *(("--steps", str(steps)) if steps else ())),
        ("eval", "train"),
        ("generate", "train", "--prompt", "def main("),
        ("swap-check",),
        ("bench", "--quick", "--csv", FILES["benchmark table"], "--plot", FILES["benchmark plot"]),
    ]


def run_step(arguments: tuple[str, ...], folder: Path) -> Step:
    """Runs a command in a process of its own, showing and keeping what it prints."""
    # With the folder as working directory, no module of a checkout shadows an installed one.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastlm", *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE,
    )  # fmt: skip
    kept = []
    try:
        # As it comes, not line by line: `generate` prints byte by byte.
        while chunk := os.read(process.stdout.fileno(), 4096):
            kept.append(chunk)
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
    finally:
        process.stdout.close()
        code = process.wait()
    output = b"".join(kept).decode("utf-8", "replace")
    return Step(arguments, output, code, time.monotonic() - started)


def _shown(arguments: tuple[str, ...]) -> str:
    return " ".join(f"'{word}'" if set(word) & set(" (") else word for word in arguments)


def _outcome(step: Step) -> str:
    return "ok" if step.code == 0 else f"exit code {step.code}"
