"""The products of the linear losses, beside the library's: `_MATMUL` of kernels/configs.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple

import torch

from fastlm import shapes
from fastlm.bench.case import randn
from fastlm.kernels import compact
from fastlm.kernels.configs import TMA, MatmulConfig, chunk_rows, matmul_config, target
from fastlm.testing import assert_close
from tuning.common import (
    FASTER,
    Budget,
    Pick,
    Picks,
    fastest,
    report,
    report_library,
    source,
    tflops,
)

PRODUCTS = ("dweight", "logits", "dx")
# (block_m, block_n, block_k, num_warps, num_stages, programs, flatten)
TILES = (
    (128, 256, 64, 8, 4, 0, False), (128, 256, 64, 8, 3, 0, False), (128, 256, 64, 8, 4, 1, True),
    (128, 256, 64, 8, 3, 1, True), (128, 256, 64, 8, 4, 1, False), (256, 128, 64, 8, 4, 0, False),
    (256, 128, 64, 8, 3, 1, True), (256, 128, 64, 8, 4, 1, True), (128, 128, 64, 4, 3, 0, False),
    (128, 128, 64, 8, 3, 0, False), (128, 128, 64, 4, 3, 2, True), (128, 128, 64, 8, 3, 2, False),
    (128, 128, 64, 8, 4, 1, True), (128, 128, 128, 8, 3, 1, True), (64, 256, 64, 4, 3, 0, False),
    (64, 256, 64, 4, 2, 0, False),
)  # fmt: skip


def candidates(which: str, name: str) -> Iterator[MatmulConfig]:
    deep = name in ("sm_90", "sm_100")
    for m, n, k, *rest in TILES:
        yield MatmulConfig(m, n, k if deep else k // 2, *rest, tma=name in TMA)


class ProductCall:
    """A product of one chunk of tokens, all of them kept."""

    def __init__(self, which: str, s: shapes.LossShape, device: torch.device, dtype: torch.dtype):
        self.which, self.name = which, f"{s.tokens}x{s.dim}x{s.vocab}"
        rows = chunk_rows(s.tokens, s.vocab, dtype, device)
        new = lambda *shape, seed, scale=1.0: randn(
            *shape, dtype=dtype, device=device, seed=seed, scale=scale
        )
        self.x = new(rows, s.dim, seed=1)
        self.weight = new(s.vocab, s.dim, seed=2, scale=s.dim**-0.5)
        self.count = torch.full((1,), rows, dtype=torch.int32, device=device)
        # Rows begin at multiples of 16 bytes, as the launcher's buffer has them.
        self.s = compact.new_rows(rows, s.vocab, dtype, device)[:, : s.vocab]
        self.s.copy_(new(rows, s.vocab, seed=3))
        self.out = torch.zeros_like(self.weight if which == "dweight" else self.s)
        if which == "logits":
            self.out = compact.new_rows(rows, s.vocab, dtype, device)
        self.flops = 2 * rows * s.dim * s.vocab
        self.expected: list[torch.Tensor] | None = None

    def run(self, config: MatmulConfig) -> torch.Tensor:
        if self.which == "logits":
            compact.rows_times_weight(self.x, self.weight, None, self.count, 0, self.out, config)
            return self.out[:, : len(self.weight)]
        if self.which == "dweight":
            compact.rows_outer(self.s, self.x, self.count, 0, self.out, True, config)
            return self.out
        rows, vocab = self.s.shape
        partial = compact.new_partial(rows, self.x.shape[1], vocab, config, self.x.device)
        compact.rows_times_matrix(self.s, self.weight, self.count, 0, partial, config)
        return partial

    def finish(self, config: MatmulConfig) -> None:
        """`run` launches all that a loss does."""

    def library(self) -> torch.Tensor:
        if self.which == "logits":
            return torch.mm(self.x, self.weight.t())
        if self.which == "dweight":
            return self.out.addmm_(self.s.t(), self.x)
        return torch.mm(self.s, self.weight)

    def check(self, config: MatmulConfig) -> None:
        """The oracle on the first and last rows."""
        if self.expected is None:
            self.expected = [self._composed(None), self._composed(torch.float64)]
        if self.which == "dweight":
            self.out.zero_()  # else it adds to what the last candidate left
        out = self.run(config)
        if self.which == "dx":
            out = out.sum(0).to(self.x.dtype)
        assert_close(self.which, _ends(out), *self.expected)

    def _composed(self, dtype: torch.dtype | None) -> torch.Tensor:
        cast = lambda t: t if dtype is None else t.to(dtype)
        if self.which == "logits":
            return cast(_ends(self.x)) @ cast(self.weight).t()
        if self.which == "dweight":
            return cast(_ends(self.s.t())) @ cast(self.x)
        return cast(_ends(self.s)) @ cast(self.weight)


def _ends(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:128], x[-128:]])


def tune(args, device: torch.device, dtype: torch.dtype, picks: Picks, budget: Budget) -> None:
    table = shapes.LOSS_LARGE if device.type == "cuda" else shapes.LOSS_CPU
    chosen = [table[name] for name in args.shape or table]
    for done, which in enumerate(PRODUCTS):
        if budget.over(f"linear loss, {which}"):
            return
        calls = [ProductCall(which, s, device, dtype) for s in chosen]
        used = matmul_config(which, device, dtype)
        results = fastest(
            calls, used, candidates(which, target(device)), device,
            budget.part(1 / (len(PRODUCTS) - done)),
        )  # fmt: skip
        if not results:
            continue
        report(f"linear loss, {which}", calls, results)
        best = results[0]
        report_library("the library's", calls, best, device, 0.2)
        if best.ratio < FASTER:
            path = [[target(device), "half"], which]
            picks.add(Pick("kernels/configs.py", "_MATMUL", path, list(astuple(best.config)[:-1]),
                           source(device, tflops(calls, best))))  # fmt: skip
