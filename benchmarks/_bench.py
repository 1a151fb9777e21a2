"""What the scripts in this folder share: options, peers, the loop over cases, the CSV.

`python benchmarks/<operator>.py` measures fastlm's backends, torch, and the peers that are
installed, on a GPU with the shapes that papers use, on a CPU with small ones. Every provider is
checked against the oracle before it is timed, and rows go to `benchmarks/results/<operator>.csv`.
The formulas of work are in `fastlm.bench.cases`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fastlm.bench.cases import CASES, Case, Fn
from fastlm.bench.results import append_csv, table
from fastlm.bench.run import directions_of, run_case

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Makes the function that a library has for a case; None where it has none. ImportError: missing.
Peer = Callable[[Case], Fn | None]


def torch_compile(case: Case) -> Fn:
    """torch's own functions under torch.compile, specialised to the case's shapes."""
    torch._dynamo.reset()
    return torch.compile(case.providers["torch"], dynamic=False)


def main(op: str, doc: str, peers: Mapping[str, Peer]) -> int:
    """Runs a script; returns its exit code: 1 if a provider of fastlm failed its check."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="cuda or cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if gpu else "fp32")
    parser.add_argument("--shape", default="", help="only shapes whose name contains this")
    parser.add_argument("--provider", nargs="+", help="only these, and torch")
    parser.add_argument("--csv", type=Path, default=RESULTS / f"{op}.csv", help="appended to")
    args = parser.parse_args()
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    device, failed, missing = torch.device(args.device), [], set()
    for case in CASES[op](device, DTYPES[args.dtype], False):
        if args.shape in case.shape:
            case = with_peers(case, peers, args.provider, missing)
            tell = lambda provider, why, case=case: failed.append(
                (provider, f"{case.shape}: {why}")
            )
            rows = run_case(
                case, directions=directions_of(op, quick=False), seconds=0.5, failed=tell
            )
            append_csv(args.csv, rows)
            print(table(rows), end="\n\n", flush=True)
    for peer in sorted(missing):
        print(f"not installed: {peer}", file=sys.stderr)
    for provider, why in failed:
        print(f"not timed: {provider} on {why}", file=sys.stderr)
    return int(any(provider.startswith("fastlm") for provider, _ in failed))


def with_peers(
    case: Case, peers: Mapping[str, Peer], wanted: list[str] | None, missing: set[str]
) -> Case:
    """The case with the peers that are installed and know it; adds the others to `missing`."""
    providers = dict(case.providers)
    for name, peer in peers.items():
        if wanted is not None and name not in wanted:
            continue
        try:
            fn = peer(case)
        except ImportError as error:
            missing.add(f"{name} ({error})")
            continue
        if fn is not None:
            providers[name] = fn
    if wanted is not None:
        providers = {n: fn for n, fn in providers.items() if n in wanted or n == "torch"}
    return replace(case, providers=providers)
