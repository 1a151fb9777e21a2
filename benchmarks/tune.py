"""Sweeps launch configurations on a GPU, and puts the fastest into the tables of `kernels/`.

    python benchmarks/tune.py all --seconds 420 --json picks.json    # ffn, norm, linear-loss
    python benchmarks/tune.py apply picks.json                       # into kernels/configs.py
    python benchmarks/tune.py norm --cols 1024 4096 --seconds 60
    python benchmarks/tune.py ffn --part up down --dim 768 4096
    python benchmarks/tune.py linear-loss --shape clm_llama3
    python benchmarks/tune.py attention --part fwd dq dkv --headdim 64 128
    python benchmarks/tune.py decode --headdim 128 --group 4
    python benchmarks/tune.py rows --cols 32000

The first three time launchers by themselves (benchmarks/tuning), each beside the configuration in
use; what is faster than that by 2 % is a pick. Candidates are compiled on all cores first. After
`--seconds` nothing new is started, and the fastest so far is the pick; `--json` has the picks so
far at any time. `apply` writes them under a comment that says where they come from: reword what the
table's own comment says of them, and run `make format`, the compile gate and the tests.

The last three print what is to be pasted. An attention's row is its place in `_ATTENTION` and the
tuple for it; decoding has a rule, `decode_config`, and what is printed is what that rule should
give; rows are those of cross-entropy.

Every candidate is checked against the oracle before it is timed on the pass that it belongs to.
What does not fit the device, or fails the check, is left out and counted.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import sys
import traceback
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from tuning import ffn, linear_loss, norm
from tuning.apply import apply
from tuning.common import Budget, Picks, patched

from fastlm import shapes
from fastlm.bench.attention import VARIANTS, attention_case, decode_case
from fastlm.bench.case import Case
from fastlm.bench.cases import CASES
from fastlm.bench.machine import describe
from fastlm.bench.run import run_case
from fastlm.kernels.attention_configs import AttentionConfig, attention_row
from fastlm.kernels.configs import RowConfig, next_power_of_2, target

PROVIDER = "fastlm-triton"
# Which launchers read which part of the attention table, and the pass that shows its effect.
PARTS = {
    "fwd": ("attention_fwd", "forward"),
    "dq": ("attention_bwd", "backward"),
    "dkv": ("attention_bwd", "backward"),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Sweeps that make picks, in the order of `all`, and their shares of its time.
SWEEPS = {
    "ffn": (ffn.tune, 0.35),
    "norm": (norm.tune, 0.4),
    "linear-loss": (linear_loss.tune, 0.25),
}


@dataclass(frozen=True)
class Result:
    config: object
    median_ms: float
    rate: float
    unit: str


def attention_candidates(tma: tuple[bool, ...] = (False,)) -> Iterator[AttentionConfig]:
    for m, n, warps, *rest in itertools.product(
        (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4), tma
    ):
        if m * n >= 128 * warps:  # smaller tiles leave warps without work
            yield AttentionConfig(m, n, warps, *rest)


def row_candidates(cols: int) -> Iterator[RowConfig]:
    widest = min(max(next_power_of_2(cols), 16), 8192)
    for m, n, warps in itertools.product((1, 2, 4, 8, 16), (widest, widest // 2), (1, 2, 4, 8, 16)):
        # All columns in one tile, or the kernel takes its looping path, which one row a tile suits.
        if n >= 16 and m * n <= 16384 and (n == widest or m == 1):
            yield RowConfig(m, n, warps)


def decode_candidates() -> Iterator[tuple[int, int, int, int]]:
    """(block_n, num_warps, num_stages, splits); the rows of a tile follow from the call."""
    yield from itertools.product((16, 32, 64, 128), (2, 4, 8), (2, 3, 4), (1, 2, 4, 8, 16, 32, 64))


def sweep(case: Case, direction: str, module: str, name: str, choose, candidates) -> list[Result]:
    """Times the candidates that compile and pass, fastest first."""
    case.providers.pop("torch", None)  # each candidate is judged by the oracle alone
    results, rejected = [], {}
    for config in candidates:
        why = []
        with patched(module, name, lambda original, config=config: choose(original, config)):
            rows = run_case(
                case,
                directions=[direction],
                seconds=0.1,
                failed=lambda _, reason, why=why: why.append(reason),
            )
        if not rows:
            rejected[config] = why[0] if why else "no triton backend here"
            continue
        results.append(Result(config, rows[0].median_ms, rows[0].rate, rows[0].unit))
        print(
            f"{config}  {rows[0].median_ms:.4f} ms  {rows[0].rate:.4g} {rows[0].unit}", flush=True
        )
    for config, why in rejected.items():
        print(f"left out: {config}: {why}", file=sys.stderr)
    return sorted(results, key=lambda result: result.median_ms)


def tune_attention(args, device: torch.device, dtype: torch.dtype) -> list[str]:
    lines = []
    for part, headdim in itertools.product(args.part, args.headdim):
        module, direction = PARTS[part]
        heads, batch = max(1, 2048 // headdim), max(1, 16384 // args.seqlen)
        shape = shapes.AttentionShape(batch, args.seqlen, args.seqlen, heads, heads, headdim)
        case = attention_case("tune", shape, args.variant, device, dtype)

        asked = {}

        def choose(original, config, part=part, asked=asked):
            def chosen(which, *rest):
                asked[which] = rest
                return config if which == part else original(which, *rest)

            return chosen

        tma = (True, False) if target(device) in ("sm_90", "sm_100") else (False,)
        candidates = attention_candidates(tma)
        best = sweep(case, direction, module, "attention_config", choose, candidates)
        if best:
            place, _ = attention_row(part, *asked[part])
            lines += [f"{place}: {astuple(r.config)}  {_source(r, device)}" for r in best[:3]]
    return lines


def tune_decode(args, device: torch.device, dtype: torch.dtype) -> list[str]:
    lines = []
    for headdim in args.headdim:
        heads = max(1, 2048 // headdim)
        shape = shapes.AttentionShape(
            args.batch, 1, args.seqlen, heads, max(1, heads // args.group), headdim
        )
        case = decode_case("tune", shape, "decode", device, dtype)

        def choose(original, candidate):
            block_n, warps, stages, splits = candidate
            return lambda *call: (
                replace(original(*call)[0], block_n=block_n, num_warps=warps, num_stages=stages),
                splits,
            )

        best = sweep(
            case, "forward", "attention_decode", "decode_config", choose, decode_candidates()
        )
        lines += [
            f"{target(device)} decode_config of {case.shape}: (block_n, num_warps, num_stages, "
            f"splits) = {r.config}  {_source(r, device)}"
            for r in best[:3]
        ]
    return lines


def tune_rows(args, device: torch.device, dtype: torch.dtype) -> list[str]:
    cases = CASES["loss"](device, dtype, False)
    case = next((c for c in cases if c.function == "cross_entropy" and _cols(c) == args.cols), None)
    if case is None:
        raise SystemExit(f"tune: no cross-entropy of {args.cols} columns in fastlm.shapes")
    choose = lambda original, config: lambda *call: config
    best = sweep(case, "forward", "loss", "loss_config", choose, row_candidates(args.cols))
    return [f"loss_config({args.cols}): {r.config}  {_source(r, device)}" for r in best[:3]]


def _cols(case: Case) -> int:
    return next(iter(case.tensors.values())).shape[-1]


def _source(result: Result, device: torch.device) -> str:
    """Where a row of the table comes from."""
    today = datetime.date.today().isoformat()
    return f"# {describe(device).device}, {today}: {result.rate:.4g} {result.unit}"


def tune_picks(args, device: torch.device, dtype: torch.dtype) -> int:
    """One sweep, or all of them."""
    picks, budget, failed = Picks(args.json), Budget(args.seconds), False
    sweeps = SWEEPS if args.kind == "all" else {args.kind: SWEEPS[args.kind]}
    shares = sum(share for _, share in sweeps.values())
    for name, (tune, share) in sweeps.items():
        try:  # what one leaves of the time is the next one's
            tune(args, device, dtype, picks, budget.part(share / shares))
        except Exception:
            print(f"tune: {name} ended early", traceback.format_exc(), file=sys.stderr)
            failed = True
        shares -= share
    print(f"{len(picks.picks)} picks" + (f" in {args.json}" if args.json else ""))
    return int(failed)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    add = lambda name: kinds.add_parser(name)
    attention, decode, rows = add("attention"), add("decode"), add("rows")
    attention.add_argument("--part", nargs="+", choices=PARTS, default=["fwd"])
    attention.add_argument("--seqlen", type=int, default=4096)
    attention.add_argument("--variant", choices=VARIANTS, default="full")
    decode.add_argument("--seqlen", type=int, default=32768)
    decode.add_argument("--batch", type=int, default=4)
    decode.add_argument("--group", type=int, default=1, help="heads that share a key head")
    for kind in (attention, decode):
        kind.add_argument("--headdim", nargs="+", type=int, default=[128])
    rows.add_argument("--cols", type=int, default=32000)
    everything, blocks, norms, products = map(add, ("all", *SWEEPS))
    for kind in (everything, blocks):
        kind.add_argument("--part", nargs="+", choices=ffn.PARTS, default=ffn.PARTS)
        kind.add_argument("--dim", nargs="+", type=int, default=[768, 1024, 4096])
        kind.add_argument("--tokens", nargs="+", type=int, default=[16384, 2048])
    for kind in (everything, norms):
        kind.add_argument("--cols", nargs="+", type=int, help="of fastlm.shapes; default: all")
    for kind in (everything, products):
        names = shapes.LOSS_LARGE
        kind.add_argument("--shape", nargs="+", choices=names, default=["clm_llama3", "mlm_bert"])
    for kind in (everything, blocks, norms, products):
        kind.add_argument("--seconds", type=float, default=420.0 if kind is everything else 180.0)
        kind.add_argument("--json", type=Path, help="where picks go")
    for kind in (attention, decode, rows, norms):
        kind.add_argument("--dtype", choices=DTYPES, default="bf16")
    for kind in (everything, blocks, products):  # whose tables are those of halves
        kind.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    add("apply").add_argument("picks", type=Path, help="what --json wrote")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.kind == "apply":
        print(*apply(args.picks), sep="\n")
        return 0
    if not torch.cuda.is_available():
        print("tune: a GPU is needed, and torch finds none", file=sys.stderr)
        return 2
    device, dtype = torch.device("cuda", torch.cuda.current_device()), DTYPES[args.dtype]
    if args.kind not in ("attention", "decode", "rows"):
        return tune_picks(args, device, dtype)
    tunes = {"attention": tune_attention, "decode": tune_decode, "rows": tune_rows}
    best = tunes[args.kind](args, device, dtype)
    print("\nfor kernels/*configs.py, fastest first:", *(best or ["nothing passed"]), sep="\n")
    return 0 if best else 1


if __name__ == "__main__":
    sys.exit(main())
