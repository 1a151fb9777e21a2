"""The oracle on the very call that is timed; the reference and gold are computed once a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastlm.bench.cases import Case
from fastlm.testing import measure, randn


@dataclass(frozen=True)
class Verdict:
    """The worst over output and gradients."""

    error: float  # largest absolute error of any of them against gold
    of_bound: float  # largest error over its bound; above 1 fails

    @property
    def passed(self) -> bool:
        return self.of_bound <= 1.0  # False for NaN


class Oracle:
    """Judges the providers of one case."""

    def __init__(self, case: Case):
        self.case = case
        self.wanted = {name: x for name, x in case.tensors.items() if case.differentiates(name)}
        self.grad: torch.Tensor | None = None  # drawn when the first output shows its shape
        self._expected = None

    def judge(self, provider: Callable[..., torch.Tensor]) -> Verdict:
        """Runs the provider forward and backward on the whole case, compares what `parts` cut."""
        case = self.case
        inputs = case.inputs()
        out = provider(**inputs)
        if self.grad is None:
            self.grad = randn(*out.shape, seed=1).to(out.device, out.dtype)
        grads = torch.autograd.grad(out, [inputs[name] for name in self.wanted], self.grad)
        actual = {"out": out.detach(), **dict(zip(self.wanted, grads, strict=True))}
        if self._expected is None:
            self._expected = self._reference(None), self._reference(torch.float64)
        errors = [
            measure(name, case.cut(name, x), *(side[name] for side in self._expected))
            for name, x in actual.items()
        ]
        worst = max(errors, key=lambda e: (e.ratio != e.ratio, e.ratio))
        return Verdict(max(e.error for e in errors), worst.ratio)

    def _reference(self, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        inputs = self.case.part_of_inputs(dtype)
        out = self.case.reference(**inputs)
        grad = self.case.cut("out", self.grad).to(out.dtype)
        grads = torch.autograd.grad(out, [inputs[name] for name in self.wanted], grad)
        return {"out": out.detach(), **dict(zip(self.wanted, grads, strict=True))}
