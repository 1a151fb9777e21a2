"""Norms, forward and backward, at the widths of fastlm.shapes: `_NORM` of kernels/configs.py."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import astuple

import torch
import torch.nn.functional as F

from fastlm import shapes
from fastlm.bench.case import randn
from fastlm.kernels import norm, norm_bwd
from fastlm.kernels.configs import (
    WIDEST_NORM,
    WIDEST_ROW,
    NormConfig,
    next_power_of_2,
    norm_config,
    target,
)
from fastlm.testing import assert_close
from tuning.common import FASTER, Budget, Pick, Picks, fastest, patched, report, source

PASSES = ("fwd", "bwd")


def width(cols: int) -> int:
    """What the table is keyed by."""
    return min(next_power_of_2(cols), 2 * WIDEST_NORM)


def candidates(which: str, cols: int, itemsize: int) -> Iterator[NormConfig]:
    n = width(cols)
    if n > WIDEST_NORM:
        yield from _in_blocks()
    elif which == "fwd":
        yield from _forward(n, itemsize)
    else:
        yield from _backward(n, itemsize)


def _in_blocks() -> Iterator[NormConfig]:
    """Rows that are read twice."""
    for block_n, warps in ((16384, 32), (8192, 8), (8192, 16), (16384, 16), (4096, 8)):
        for stages in (1, 2, 3):
            yield NormConfig(1, block_n, warps, 0, stages)


def _forward(n: int, itemsize: int) -> Iterator[NormConfig]:
    if n > WIDEST_ROW:
        for warps, stages in ((16, 2), (16, 3), (16, 4), (8, 2), (8, 3), (32, 2), (32, 3)):
            yield NormConfig(1, n, warps, 1, stages)
        yield NormConfig(1, n, 16, registers=64)
        for stages in (1, 2, 3):
            yield NormConfig(1, WIDEST_ROW, 8, 0, stages)
        return
    for m, values in ((m, v) for v in (16, 8, 32) for m in (1, 2, 4)):
        warps = m * n // (32 * values)
        if not (1024 <= m * n <= 16384 and 1 <= warps <= 32):
            continue
        for resident in (16, 32) if values < 32 else (16,):
            programs = resident // warps
            for stages in (2, 4):
                shared = programs * (stages - 1) * m * n * itemsize
                if programs and shared <= 200 * 1024:
                    yield NormConfig(m, n, warps, programs, stages)
        yield NormConfig(m, n, warps)


def _backward(n: int, itemsize: int) -> Iterator[NormConfig]:
    if n > WIDEST_ROW:
        for block_n, warps in ((2048, 8), (4096, 16), (1024, 4)):
            for stages in (2, 3, 1):
                yield NormConfig(1, block_n, warps, 1, stages)
        for warps in (16, 32):
            yield NormConfig(1, n, warps)
        return
    pairs = ((16, 16), (8, 16), (8, 32), (32, 8))  # values a thread, warps on a multiprocessor
    for m, (values, resident) in ((m, pair) for pair in pairs for m in (1, 2, 4, 8)):
        warps = m * n // (32 * values)
        if not (1024 <= m * n <= 8192 and 1 <= warps <= resident):
            continue
        programs, registers = resident // warps, min(2048 // resident, 255)
        for stages, ahead in ((2, False), (3, False), (1, True)):
            if 2 * programs * (stages - 1) * m * n * itemsize <= 200 * 1024:
                yield NormConfig(m, n, warps, programs, stages, ahead, registers)
    if n > 2048:  # a row in parts
        for warps, stages in ((8, 2), (8, 3), (4, 2), (4, 3)):
            yield NormConfig(1, 2048, warps, 8 // warps, stages)


class NormCall:
    """A pass of LayerNorm without options, which is what norms are timed on."""

    _local = threading.local()  # candidates are compiled by several threads

    def __init__(self, which: str, s: shapes.NormShape, device: torch.device, dtype: torch.dtype):
        self.which, self.name = which, f"{s.rows}x{s.cols}"
        rows = lambda seed: randn(s.rows, s.cols, dtype=dtype, device=device, seed=seed)
        self.x, self.dy = rows(1), rows(2)
        self.w, self.b = (randn(s.cols, dtype=dtype, device=device, seed=i) for i in (3, 4))
        self.seed = torch.full((), 1, device=device)
        self.stats: tuple[torch.Tensor | None, torch.Tensor] | None = None
        self.expected: list | None = None

    @classmethod
    @contextlib.contextmanager
    def sweeping(cls) -> Iterator[None]:
        """Within it, launchers take the configuration that `run` was given."""
        answer = lambda original: (
            lambda *call: getattr(cls._local, "config", None) or original(*call)
        )
        with patched("norm", "norm_config", answer), patched("norm_bwd", "norm_config", answer):
            yield

    def run(self, config: NormConfig | None) -> list[torch.Tensor]:
        return self._launch(config, None, None, 0.0)

    def finish(self, config: NormConfig) -> None:
        if self.x.shape[1] <= WIDEST_ROW:  # the table holds for every option there
            self._launch(config, self.dy, self.seed, 0.1)

    def _launch(self, config, other, seed, dropout_p) -> list[torch.Tensor]:
        """other: the residual or, backward, the gradient of the sum."""
        x, dy, dtype = self.x, self.dy, self.x.dtype
        self._local.config = config
        try:
            if self.which == "fwd":
                out = norm.norm_fwd(x, other, self.w, self.b, seed, 1e-5, dropout_p, "layer",
                                    dtype, other is not None)  # fmt: skip
                return [out[0]]
            if self.stats is None:
                self._local.config = None
                forward = x, None, None, None, None, 1e-5, 0.0, "layer", dtype, False
                self.stats = norm.norm_fwd(*forward)[2:]
                self._local.config = config
            grads = norm_bwd.norm_bwd(
                dy, other, x, self.w, *self.stats, seed, dropout_p, "layer", dtype,
                None if seed is None else dtype, dtype, dtype,
            )  # fmt: skip
            return [grads[0], *grads[2:]]
        finally:
            self._local.config = None

    def check(self, config: NormConfig) -> None:
        if self.expected is None:
            self.expected = [self._composed(None), self._composed(torch.float64)]
        for i, tensors in enumerate(zip(self.run(config), *self.expected, strict=True)):
            assert_close(f"{self.which} {i}", *tensors)

    def _composed(self, dtype: torch.dtype | None) -> list[torch.Tensor]:
        cast = lambda t: (t if dtype is None else t.to(dtype)).detach().requires_grad_()
        leaves = [cast(self.x), cast(self.w), cast(self.b)]
        y = F.layer_norm(leaves[0], self.w.shape, *leaves[1:], 1e-5)
        if self.which == "fwd":
            return [y.detach()]
        return list(torch.autograd.grad(y, leaves, self.dy.to(y.dtype)))


def tune(args, device: torch.device, dtype: torch.dtype, picks: Picks, budget: Budget) -> None:
    tables = shapes.NORM_LARGE if device.type == "cuda" else shapes.NORM_CPU
    groups: dict[tuple[str, int], list[shapes.NormShape]] = {}
    for which in PASSES:
        for s in tables.values():
            if not args.cols or s.cols in args.cols:
                groups.setdefault((which, width(s.cols)), []).append(s)
    for done, ((which, n), group) in enumerate(groups.items()):
        if budget.over(f"norm, {which}, up to {n} columns"):
            return
        calls = [NormCall(which, s, device, dtype) for s in group]
        cols = group[0].cols
        used = norm_config(which, cols, dtype.itemsize, True, False, device)
        with NormCall.sweeping():
            results = fastest(
                calls, used, candidates(which, cols, dtype.itemsize), device,
                budget.part(1 / (len(groups) - done)),
            )  # fmt: skip
        if not results:
            continue
        report(f"norm, {which}, up to {n} columns", calls, results)
        best = results[0]
        if best.ratio < FASTER:
            gbytes = [(2 if which == "fwd" else 3) * c.x.nbytes / t / 1e6
                      for c, t in zip(calls, best.times_ms, strict=True)]  # fmt: skip
            what = ", ".join(f"{g:.0f}" for g in gbytes) + f" GB/s, {best.ratio:.2f} of the time"
            path = [[target(device), which, dtype.itemsize, n]]
            picks.add(Pick("kernels/configs.py", "_NORM", path, list(astuple(best.config)),
                           source(device, what)))  # fmt: skip
