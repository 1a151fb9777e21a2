"""Times attention, LayerNorm, FFN and loss on this machine, every provider checked first.

Providers are torch's own functions and the backends of fastlm that run here. Each is compared with
the reference in fp64, forward and backward, on the very inputs that are then timed: "max error" is
its largest absolute error in output and gradients, "of bound" the part of what the oracle allows
(twice the error of a plain PyTorch computation in the same dtype, and rounding). What fails is
reported and not timed, except torch itself, and what is no worse than it: "!" marks their errors.
Times are medians; "of ceiling" compares with a matrix product or a copy on the same device.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fastlm.bench.cases import CASES
from fastlm.bench.results import append_csv, plot, table
from fastlm.bench.run import directions_of, run_case
from fastlm.cli._options import add_device, device_of

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_QUICK_OPS = ("attention", "norm", "ffn", "loss")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one shape an operator, half a minute")
    parser.add_argument("--op", nargs="+", choices=list(CASES), help="operators (all)")
    parser.add_argument(
        "--dtype", choices=list(_DTYPES), help="of the inputs (bf16 on a GPU, else fp32)"
    )
    parser.add_argument("--csv", type=Path, metavar="PATH", help="append the rows to this table")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the speeds as PNG")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    device = device_of(args)
    dtype = _DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    for path in (args.csv, args.plot):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    rows, failures, unavailable = [], [], set()
    for op in args.op or (_QUICK_OPS if args.quick else CASES):
        for case in CASES[op](device, dtype, args.quick):
            failed = lambda provider, why, case=case: failures.append(
                (provider, f"{case.op} {case.shape} {provider}: {why}")
            )
            seconds = 0.25 if args.quick else 1.0
            new = run_case(
                case, directions=directions_of(op, args.quick), seconds=seconds, failed=failed
            )
            if new:
                print(table(new), end="\n\n", flush=True)
            rows += new
            unavailable |= set(case.unavailable.items())
            if args.csv:  # at once: an interrupted run keeps what it measured
                append_csv(args.csv, new)
    if rows:
        print(f"on {rows[0].device}, torch {rows[0].torch}, commit {rows[0].commit}")
    if any(row.of_bound > 1 for row in rows):
        print("! torch's own function exceeds the oracle's bound there, and fastlm-torch calls it")
    for provider, reason in sorted(unavailable):
        print(f"not timed: {provider}: {reason}")
    if args.plot and rows and not plot(rows, args.plot):
        print("no plot: matplotlib is not installed (pip install 'fastlm[bench]')")
    for _, failure in failures:
        print(f"FAILED  {failure}", file=sys.stderr)
    # What torch cannot do, for want of memory say, is no fault of fastlm.
    return int(any(provider != "torch" for provider, _ in failures))
