"""What the scripts in this folder share: options, peers, the loop over cases, the CSV.

`python benchmarks/<operator>.py` measures fastlm's backends, torch, and the peers that are
installed, on a GPU with the shapes that papers use, on a CPU with small ones. Every provider is
checked against the oracle before it is timed, and rows go to `benchmarks/results/<operator>.csv`.
What cannot make a call is named with its reason. At the end stand fastlm's ratios to every peer,
and those of its kernels to each other.
The formulas of work are in `fastlm.bench.cases` and `fastlm.bench.attention`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fastlm.bench.case import Case, Fn
from fastlm.bench.cases import CASES
from fastlm.bench.results import Row, append_csv, table
from fastlm.bench.run import OUT_OF_MEMORY, directions_of, run_case
from fastlm.bench.summary import against_peers, against_plain, between_kernels

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Makes the function that a library has for a case. NotImplementedError: why it has none;
# ImportError: it is not installed.
Peer = Callable[[Case], Fn]
# Names of cases, and what makes each.
Grid = Callable[[torch.device, torch.dtype], Iterable[tuple[str, Callable[[], Case]]]]


def torch_compile(case: Case, fn: Fn | None = None) -> Fn:
    """torch's own functions, or `fn`, under torch.compile, specialised to the case's shapes."""
    torch._dynamo.reset()  # or the limit of recompilations would make later cases eager
    # A backward pass that is timed by itself runs more than once.
    torch._functorch.config.donated_buffer = False
    return torch.compile(fn or case.providers["torch"], dynamic=False)


def main(
    op: str, doc: str, peers: Mapping[str, Peer], grid: Grid | None = None, seconds: float = 0.5
) -> int:
    """Runs a script; returns its exit code: 1 if a provider of fastlm failed its check, or a case
    could not be made, which ends no other."""
    args = _arguments(op, doc, seconds)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    append_csv(args.csv, [])  # what is no such table is better known before an hour of measuring
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    cases = grid(device, dtype) if grid else _made(CASES[op](device, dtype, False))
    rows, failed, missing, broken = [], [], set(), []
    with _going_on("making cases", broken):
        for name, make in cases:
            if not all(part in name for part in args.shape):
                continue
            with _going_on(name, broken):
                case = with_peers(make(), peers, args.provider, missing)
                rows += _measured(case, directions_of(op, quick=False), args, failed)
            case = make = None
            gc.collect()  # gigabytes, before the next case takes as many
    _report(rows, missing, failed)
    for what in broken:
        print(f"not measured: {what}", file=sys.stderr)
    return int(bool(broken) or any(_wrong(provider, why) for provider, why in failed))


@contextlib.contextmanager
def _going_on(what: str, broken: list[str]) -> Iterator[None]:
    """An exception within it is shown, and noted in `broken`."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        broken.append(f"{what}: {(str(error).splitlines() or [type(error).__name__])[0]}")


def _measured(case: Case, directions: Iterable[str], args, failed: list) -> list[Row]:
    """Runs a case, prints and writes its rows; adds who failed, with the reason, to `failed`."""
    refused = []
    rows = run_case(
        case, directions=directions, seconds=args.seconds,
        failed=lambda *why: refused.append(why),
    )  # fmt: skip
    append_csv(args.csv, rows)
    print(table(rows) or case.shape)
    for provider, why in (*case.unavailable.items(), *refused):
        print(f"  {provider} refused: {why}")
    print(flush=True)
    failed += [(provider, f"{case.shape}: {why}") for provider, why in refused]
    return rows


def _arguments(op: str, doc: str, seconds: float) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="cuda or cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if gpu else "fp32")
    parser.add_argument("--shape", nargs="+", default=[], help="only names that contain all these")
    parser.add_argument("--provider", nargs="+", help="only these, and torch")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"of each provider and pass; {seconds}"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS / f"{op}.csv", help="appended to")
    return parser.parse_args()


def _made(cases: Iterable[Case]) -> Iterable[tuple[str, Callable[[], Case]]]:
    for case in cases:
        yield case.shape, lambda case=case: case


def _wrong(provider: str, why: str) -> bool:
    """Whether fastlm is at fault: its torch backend may hold all scores, and run out of memory."""
    return provider.startswith("fastlm") and not (
        provider == "fastlm-torch" and OUT_OF_MEMORY in why
    )


def _report(rows, missing, failed) -> None:
    for title, lines in (
        ("Times of peers over fastlm's: geometric mean, worst", against_peers(rows)),
        ("Times of Triton's kernels over CUDA C++'s: geometric mean, worst", between_kernels(rows)),
        ("fastlm's options over its own plain call", against_plain(rows)),
    ):
        if lines:
            print(title, *lines, "", sep="\n", flush=True)
    for peer in sorted(missing):
        print(f"not installed: {peer}", file=sys.stderr)
    for provider, why in failed:
        if provider.startswith("fastlm"):  # the peers' stand beside their cases
            print(f"not timed: {provider} on {why}", file=sys.stderr)


def with_peers(
    case: Case, peers: Mapping[str, Peer], wanted: list[str] | None, missing: set[str]
) -> Case:
    """The case with the peers that are installed and know it, and why others do not; adds those
    that are not installed to `missing`."""
    providers, unavailable = dict(case.providers), dict(case.unavailable)
    for name, peer in peers.items():
        if wanted is not None and name not in wanted:
            continue
        try:
            providers[name] = peer(case)
        except ImportError as error:
            missing.add(f"{name} ({error})")
        except Exception as error:  # of any library: it must not end the others' measurement
            unavailable[name] = str(error) or type(error).__name__
    if wanted is not None:
        providers = {n: fn for n, fn in providers.items() if n in wanted or n == "torch"}
        unavailable = {n: why for n, why in unavailable.items() if n in wanted}
    undropped = case.undropped and with_peers(case.undropped, peers, wanted, missing)
    return replace(case, providers=providers, unavailable=unavailable, undropped=undropped)
