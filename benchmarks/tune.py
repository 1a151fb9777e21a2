"""Sweeps launch configurations on a GPU and prints the row for `kernels/*configs.py`.

    python benchmarks/tune.py attention --part fwd dq dkv --headdim 64 128
    python benchmarks/tune.py decode --headdim 128 --group 4
    python benchmarks/tune.py rows --op layer_norm --cols 4096
    python benchmarks/tune.py ffn --part up down gated_up gated_down --dim 768 4096

An attention's row is its place in `_ATTENTION` and the tuple for it; decoding has a rule,
`decode_config`, and what is printed is what that rule should give. Every candidate is compiled,
checked against the oracle and timed on the pass that it belongs to. What does not fit the device,
or fails the check, is left out and counted. The feed-forward's products are timed by themselves,
beside the library's product with an elementwise kernel, and compiled on all cores first.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace

import torch
import torch.nn.functional as F

from fastlm import shapes
from fastlm.bench.attention import VARIANTS, attention_case, decode_case
from fastlm.bench.case import Case
from fastlm.bench.cases import CASES
from fastlm.bench.machine import describe
from fastlm.bench.run import run_case
from fastlm.bench.timing import measure
from fastlm.kernels import ffn, ffn_matmul
from fastlm.kernels.attention_configs import AttentionConfig, attention_row
from fastlm.kernels.configs import EpilogueConfig, RowConfig, next_power_of_2, target
from fastlm.testing import assert_close, randn

PROVIDER = "fastlm-triton"
# Which launchers read which part of the attention table, and the pass that shows its effect.
PARTS = {
    "fwd": ("attention_fwd", "forward"),
    "dq": ("attention_bwd", "backward"),
    "dkv": ("attention_bwd", "backward"),
}
# The family whose launchers read the row table, and the function that they read it by.
ROW_OPS = {
    "layer_norm": ("norm", "row_config"),
    "rms_norm": ("norm", "row_config"),
    "cross_entropy": ("loss", "loss_config"),
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


@contextlib.contextmanager
def patched(module: str, name: str, make) -> Iterator[None]:
    """Within it, a launcher's module finds `make(original)` under the name of a config function."""
    launcher = importlib.import_module(f"fastlm.kernels.{module}")
    original = getattr(launcher, name)
    setattr(launcher, name, make(original))
    try:
        yield
    finally:
        setattr(launcher, name, original)


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
    family, name = ROW_OPS[args.op]
    cases = CASES[family](device, dtype, False)
    case = next((c for c in cases if c.function == args.op and _cols(c) == args.cols), None)
    if case is None:
        raise SystemExit(f"tune: no case of {args.op} with {args.cols} columns in fastlm.shapes")
    direction = "forward" if args.part == "fwd" else "backward"
    choose = lambda original, config: lambda cols: config
    best = sweep(case, direction, family, name, choose, row_candidates(args.cols))
    return [f"{name}({args.cols}): {r.config}  {_source(r, device)}" for r in best[:3]]


def tune_ffn(args, device: torch.device, dtype: torch.dtype) -> list[str]:
    lines = []
    for part, dim in itertools.product(args.part, args.dim):
        call = FfnCall(part, args.tokens, dim, device, dtype)
        local = threading.local()  # candidates are compiled by several threads
        answer = lambda original, local=local: lambda *_: local.config
        candidates, results = list(matmul_candidates(part, target(device))), []
        with patched("ffn_matmul", "epilogue_config", answer):

            def attempt(config, call=call, local=local):
                local.config = config
                try:
                    call.run()
                except Exception as error:  # too much shared memory, for example
                    return (str(error).splitlines() or [type(error).__name__])[0]

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                reasons = list(pool.map(attempt, candidates))
            for config, why in zip(candidates, reasons, strict=True):
                local.config = config
                try:
                    if why is None:
                        call.check()
                except AssertionError as error:
                    why = str(error)
                if why is not None:
                    print(f"left out: {config}: {why}", file=sys.stderr)
                    continue
                time = measure({"": call.run}, device, 0.05)[""].median
                results.append(Result(config, time, call.flops / time / 1e9, "TFLOP/s"))
        other = measure({"": call.library}, device, 0.2)[""].median
        place = f"_EPILOGUE[{target(device)!r}][{part!r}]"
        lines.append(f"{part} of dim {dim} by the library and one kernel: {other:.4f} ms")
        lines += [
            f"{place}: {astuple(r.config)[:-1]}  {_source(r, device)}, {r.median_ms:.4f} ms,"
            f" {other / r.median_ms:.2f}x the library's way"
            for r in sorted(results, key=lambda r: r.median_ms)[:3]
        ]
    return lines


# (block_m, block_n, num_warps, num_stages, programs); stages of 64 products, of 32 without the copy
# engine. Two programs on a multiprocessor multiply in each other's epilogues; one may be flattened.
TILES = (
    (128, 128, 4, 3, 2), (128, 128, 4, 2, 2), (128, 128, 8, 3, 2), (64, 256, 4, 2, 2),
    (64, 128, 4, 4, 2), (128, 128, 8, 4, 1), (128, 256, 8, 3, 1), (128, 256, 8, 4, 1),
    (256, 128, 8, 3, 1), (256, 128, 8, 4, 1),
)  # fmt: skip


def matmul_candidates(part: str, name: str) -> Iterator[EpilogueConfig]:
    """Each tile with epilogues of 16 and 32 elements a thread."""
    tma = name in ("sm_90", "sm_100")
    for (m, n, warps, stages, programs), elements in itertools.product(TILES, (16, 32)):
        if part == "gated_up":  # two products
            n //= 2
        slices = max(1, m * n // (32 * warps) // elements)
        for flatten in (False, True) if programs == 1 else (False,):
            yield EpilogueConfig(
                m, n, 64 if tma else 32, warps, stages, slices, programs, 8, flatten, tma
            )


class FfnCall:
    """One product of the feed-forward with its epilogue, in training, and what replaces it."""

    def __init__(self, part: str, rows: int, dim: int, device: torch.device, dtype: torch.dtype):
        self.part, self.gated = part, part.startswith("gated")
        hidden = -(-8 * dim // 3 // 256) * 256 if self.gated else 4 * dim
        new = lambda *shape, seed, scale=1.0: randn(
            *shape, dtype=dtype, device=device, seed=seed, scale=scale
        )
        self.x, self.z, self.u = (
            new(rows, cols, seed=seed) for seed, cols in enumerate((dim, hidden, hidden))
        )
        self.w, self.w_up = (new(hidden, dim, seed=s, scale=dim**-0.5) for s in (3, 4))
        self.w_down = new(dim, hidden, seed=5, scale=dim**-0.5)
        self.bias = new(hidden, seed=6)
        products = 2 if part == "gated_up" else 1
        self.flops = 2 * rows * dim * hidden * products
        self.expected: list | None = None

    def run(self) -> tuple[torch.Tensor, ...]:
        if self.part == "up":
            return ffn_matmul.ffn_up(self.x, self.w, self.bias, None, "gelu", 0.0, True, True)
        if self.part == "gated_up":
            return ffn_matmul.gated_up(self.x, self.w, self.w_up, "silu", True, True)
        if self.part == "down":
            options = None, "gelu", 0.0, True, self.bias.dtype, True
            return ffn_matmul.ffn_down_bwd(self.x, self.w_down, self.z, *options)
        options = "silu", True, True, True
        return ffn_matmul.gated_down_bwd(self.x, self.w_down, self.z, self.u, *options)

    def library(self) -> tuple[torch.Tensor, ...]:
        if self.part == "up":
            z = F.linear(self.x, self.w, self.bias)
            return z, ffn.bias_act_fwd(z, None, None, "gelu", 0.0)
        if self.part == "gated_up":
            gate, up = F.linear(self.x, self.w), F.linear(self.x, self.w_up)
            return gate, up, ffn.glu_fwd(gate, up, "silu")
        da = self.x @ self.w_down
        if self.part == "down":  # the bias is what says that its gradient is wanted
            zeros = torch.zeros_like(self.bias)
            return ffn.bias_act_bwd(da, self.z, zeros, None, "gelu", 0.0, True, True, True)
        return ffn.glu_bwd(da, self.z, self.u, "silu", True, True, True)

    def check(self) -> None:
        """The oracle on the first and last rows; a bias gradient needs all of them."""
        if self.expected is None:
            self.expected = [self._composed(None), self._composed(torch.float64)]
        for i, (mine, same, gold) in enumerate(zip(self.run(), *self.expected, strict=True)):
            assert_close(f"{self.part} {i}", mine if mine.dim() == 1 else _ends(mine), same, gold)

    def _composed(self, dtype: torch.dtype | None) -> list[torch.Tensor]:
        cast = lambda t: t if dtype is None else t.to(dtype)
        z = F.linear(cast(self.x), cast(self.w), None if self.gated else cast(self.bias))
        u = F.linear(cast(self.x), cast(self.w_up)) if self.gated else None
        backward = self.part.endswith("down")
        if backward:
            z, u = cast(self.z), cast(self.u) if self.gated else None
        leaves = [t.requires_grad_(backward) for t in (z.detach(), u) if t is not None]
        a = F.silu(leaves[0]) * leaves[1] if self.gated else F.gelu(leaves[0])
        if not backward:
            return [_ends(t) for t in (*leaves, a)]
        grads = torch.autograd.grad(a, leaves, cast(self.x) @ cast(self.w_down))
        dbias = [] if self.gated else [grads[0].sum(0)]
        return [*map(_ends, grads), *dbias, _ends(a.detach())]


def _ends(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:256], x[-256:]])


def _cols(case: Case) -> int:
    return next(iter(case.tensors.values())).shape[-1]


def _source(result: Result, device: torch.device) -> str:
    """Where a row of the table comes from."""
    today = datetime.date.today().isoformat()
    return f"# {describe(device).device}, {today}: {result.rate:.4g} {result.unit}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    attention = kinds.add_parser("attention")
    attention.add_argument("--part", nargs="+", choices=PARTS, default=["fwd"])
    attention.add_argument("--seqlen", type=int, default=4096)
    attention.add_argument("--variant", choices=VARIANTS, default="full")
    decode = kinds.add_parser("decode")
    decode.add_argument("--seqlen", type=int, default=32768)
    decode.add_argument("--batch", type=int, default=4)
    decode.add_argument("--group", type=int, default=1, help="heads that share a key head")
    for kind in (attention, decode):
        kind.add_argument("--headdim", nargs="+", type=int, default=[128])
    rows = kinds.add_parser("rows")
    rows.add_argument("--op", choices=ROW_OPS, default="layer_norm")
    rows.add_argument("--part", choices=("fwd", "bwd"), default="fwd")
    rows.add_argument("--cols", type=int, default=4096)
    blocks = kinds.add_parser("ffn")
    parts = ("up", "gated_up", "down", "gated_down")
    blocks.add_argument("--part", nargs="+", choices=parts, default=parts)
    blocks.add_argument("--dim", nargs="+", type=int, default=[768, 4096])
    blocks.add_argument("--tokens", type=int, default=16384)
    for kind in (attention, decode, rows, blocks):
        kind.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune: a GPU is needed, and torch finds none", file=sys.stderr)
        return 2
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    tunes = {"attention": tune_attention, "decode": tune_decode, "rows": tune_rows, "ffn": tune_ffn}
    tune = tunes[args.kind]
    best = tune(args, torch.device("cuda", torch.cuda.current_device()), dtype)
    print("\nfor kernels/*configs.py, fastest first:", *(best or ["nothing passed"]), sep="\n")
    return 0 if best else 1


if __name__ == "__main__":
    sys.exit(main())
