"""The feed-forward's products with epilogues, `_EPILOGUE`, and the way calls go, `_FFN_WAYS`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Iterator
from dataclasses import astuple

import torch
import torch.nn.functional as F

from fastlm import shapes
from fastlm.bench.case import randn
from fastlm.bench.cases import ffn_case, gated_case
from fastlm.bench.run import run_case
from fastlm.kernels import ffn, ffn_matmul
from fastlm.kernels.configs import EpilogueConfig, target
from fastlm.ops.ffn import ffn_by, gated_ffn_by
from fastlm.testing import assert_close
from tuning.common import (
    FASTER,
    Budget,
    Pick,
    Picks,
    fastest,
    patched,
    report,
    report_library,
    source,
    tflops,
)

PARTS = ("up", "down", "gated_up", "gated_down")
CONFIGS = "kernels/configs.py"

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


def tune(args, device: torch.device, dtype: torch.dtype, picks: Picks, budget: Budget) -> None:
    """The products' configurations first: the ways are timed with those."""
    chosen = tune_products(args, device, dtype, picks, budget.part(0.6))
    with FfnCall.sweeping(chosen):
        tune_ways(args, device, dtype, picks, budget)


def tune_products(args, device, dtype, picks, budget: Budget) -> dict[str, EpilogueConfig]:
    """The fastest configuration of each part, one for all dims: by the least and the largest."""
    chosen = {}
    for done, part in enumerate(args.part):
        if budget.over(f"ffn {part}"):
            break
        dims = sorted({min(args.dim), max(args.dim)})
        calls = [FfnCall(part, args.tokens[0], dim, device, dtype) for dim in dims]
        used = ffn_matmul.epilogue_config(part, device, True)
        with FfnCall.sweeping():
            results = fastest(
                calls, used, matmul_candidates(part, target(device)), device,
                budget.part(1 / (len(args.part) - done)),
            )  # fmt: skip
        if not results:
            continue
        report(f"ffn {part}", calls, results)
        best = results[0]
        report_library("the library and one kernel", calls, best, device, 0.1)
        if best.ratio < FASTER:
            chosen[part] = best.config
            note = source(device, tflops(calls, best))
            picks.add(Pick(CONFIGS, "_EPILOGUE", [target(device), part],
                           list(astuple(best.config)[:-1]), note))  # fmt: skip
    return chosen


def tune_ways(args, device, dtype, picks, budget: Budget) -> None:
    """Forward and backward of whole blocks: how wide they may be for epilogues to be faster."""
    for op in ("ffn", "gated_ffn"):
        rows, notes = [], []
        for tokens in sorted(args.tokens, reverse=True):
            widest = 0
            for dim in sorted(args.dim):
                if budget.over(f"{op} of {tokens}x{dim}"):
                    break
                library, own = time_ways(op, tokens, dim, device, dtype)
                print(f"{op} {tokens}x{dim}, forward and backward: library and one kernel "
                      f"{library:.4f} ms, epilogues {own:.4f} ms", flush=True)  # fmt: skip
                if not own <= FASTER * library < float("inf"):
                    break  # wider ones have less to gain
                widest = dim
                notes.append(f"{tokens}x{dim} {library / own:.2f}x")
            rows += [[tokens, 0, widest, "epilogue"]] if widest else []
            # Else wider calls would go by a row for fewer tokens, where another way may win.
            rows += [[tokens, 0, max(args.dim), "cublas"]] if widest < max(args.dim) else []
        while rows and rows[-1][-1] == "cublas":  # which is the default
            rows.pop()
        if rows:
            picks.add(Pick(CONFIGS, "_FFN_WAYS", [[target(device), op, True]], rows,
                           source(device, ", ".join(notes))))  # fmt: skip


def time_ways(op: str, tokens: int, dim: int, device, dtype) -> tuple[float, float]:
    """Milliseconds of both ways, each checked before; infinite where one fails. The library's is
    timed with the elementwise kernel that a call would run: CUDA C++'s of `ffn`, where it is."""
    make, by = {"ffn": (ffn_case, ffn_by), "gated_ffn": (gated_case, gated_ffn_by)}[op]
    shape = shapes.FfnShape(tokens, dim, hidden_dim(dim, op == "gated_ffn"))
    case = make("tune", shape, "gelu" if op == "ffn" else "silu", device, dtype)
    options = {"recompute": False, **case.options}
    if op == "ffn":
        options |= {"dropout_p": 0.0, "seed": None}
    one_kernel = "cuda" if op == "ffn" and "fastlm-cuda" in case.providers else "triton"
    case.providers.clear()
    for way, impl in (("cublas", one_kernel), ("epilogue", "triton")):
        case.providers[way] = functools.partial(by, way, impl=impl, **options)
    rows = run_case(case, directions=["forward+backward"], seconds=0.2,
                    failed=lambda *why: print("left out:", *why, flush=True))  # fmt: skip
    times = {row.provider: row.median_ms for row in rows}
    return times.get("cublas", float("inf")), times.get("epilogue", float("inf"))


def hidden_dim(dim: int, gated: bool) -> int:
    return -(-8 * dim // 3 // 256) * 256 if gated else 4 * dim


class FfnCall:
    """One product of the feed-forward with its epilogue, in training, and what replaces it."""

    _local = threading.local()  # candidates are compiled by several threads

    def __init__(self, part: str, rows: int, dim: int, device: torch.device, dtype: torch.dtype):
        self.part, self.gated, self.name = part, part.startswith("gated"), f"{rows}x{dim}"
        hidden = hidden_dim(dim, self.gated)
        new = lambda *shape, seed, scale=1.0: randn(
            *shape, dtype=dtype, device=device, seed=seed, scale=scale
        )
        weight = lambda seed: new(hidden, dim, seed=seed, scale=dim**-0.5)
        self.x = new(rows, dim, seed=0)  # backward: the gradient of the output
        self.bias = None if self.gated else new(hidden, seed=6)
        self.backward = part.endswith("down")
        if self.backward:
            self.w_down = new(dim, hidden, seed=5, scale=dim**-0.5)
            self.z = new(rows, hidden, seed=1)
            self.u = new(rows, hidden, seed=2) if self.gated else None
        else:
            self.w, self.w_up = weight(3), weight(4) if self.gated else None
        products = 2 if part == "gated_up" else 1
        self.flops = 2 * rows * dim * hidden * products
        self.expected: list | None = None

    @classmethod
    @contextlib.contextmanager
    def sweeping(cls, chosen: dict[str, EpilogueConfig] | None = None) -> Iterator[None]:
        """Within it, launchers take what `run` was given, or what is chosen for a part."""
        answer = lambda original: (
            lambda which, *call: (
                getattr(cls._local, "config", None)
                or (chosen or {}).get(which)
                or original(which, *call)
            )
        )
        with patched("ffn_matmul", "epilogue_config", answer):
            yield

    def run(self, config: EpilogueConfig) -> tuple[torch.Tensor, ...]:
        self._local.config = config
        try:
            return self._run()
        finally:
            self._local.config = None

    def finish(self, config: EpilogueConfig) -> None:
        """`run` launches all that a block does."""

    def _run(self) -> tuple[torch.Tensor, ...]:
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

    def check(self, config: EpilogueConfig) -> None:
        """The oracle on the first and last rows; a bias gradient needs all of them."""
        if self.expected is None:
            self.expected = [self._composed(None), self._composed(torch.float64)]
        for i, (mine, same, gold) in enumerate(zip(self.run(config), *self.expected, strict=True)):
            assert_close(f"{self.part} {i}", mine if mine.dim() == 1 else _ends(mine), same, gold)

    def _composed(self, dtype: torch.dtype | None) -> list[torch.Tensor]:
        cast = lambda t: t if t is None or dtype is None else t.to(dtype)
        if self.backward:
            z, u = cast(self.z), cast(self.u)
        else:
            z = F.linear(cast(self.x), cast(self.w), cast(self.bias))
            u = F.linear(cast(self.x), cast(self.w_up)) if self.gated else None
        leaves = [t.detach().requires_grad_(self.backward) for t in (z, u) if t is not None]
        a = F.silu(leaves[0]) * leaves[1] if self.gated else F.gelu(leaves[0])
        if not self.backward:
            return [_ends(t) for t in (*leaves, a)]
        grads = torch.autograd.grad(a, leaves, cast(self.x) @ cast(self.w_down))
        dbias = [] if self.gated else [grads[0].sum(0)]
        return [*map(_ends, grads), *dbias, _ends(a.detach())]


def _ends(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:256], x[-256:]])
