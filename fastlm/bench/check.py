"""The oracle on the very call that is timed; the reference and gold are computed once a case."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastlm.bench.case import Case, randn
from fastlm.testing import Error, measure


@dataclass(frozen=True)
class Verdict:
    """The worst over output and gradients."""

    errors: Mapping[str, Error]

    @property
    def error(self) -> float:
        """The largest absolute error of any tensor against gold."""
        return max(e.error for e in self.errors.values())

    @property
    def of_bound(self) -> float:
        """The largest error over its bound: above 1 is outside of the oracle."""
        ratios = [e.ratio for e in self.errors.values()]
        return math.nan if any(map(math.isnan, ratios)) else max(ratios)

    def passes(self, torch_verdict: Verdict | None) -> bool:
        """Within the oracle's bound, or where torch's own function is not, no worse than that."""
        return all(
            e.ratio <= 1.0 or (torch_verdict and e.error <= torch_verdict.errors[name].error)
            for name, e in self.errors.items()
        )


class Oracle:
    """Judges the providers of one case."""

    def __init__(self, case: Case):
        self.case = case
        self.wanted = {name: x for name, x in case.tensors.items() if case.differentiates(name)}
        self.grad: torch.Tensor | None = None  # drawn when the first output shows its shape
        self._expected = None

    def judge(self, provider: Callable[..., torch.Tensor]) -> Verdict:
        """Runs the provider on the whole case, backward too where anything gets a gradient, and
        compares what `parts` cut."""
        case = self.case
        inputs = case.inputs()
        out = provider(**inputs)
        if self.grad is None and self.wanted:
            self.grad = randn(*out.shape, dtype=out.dtype, device=out.device, seed=99)
        actual = self._with_gradients(out, inputs, self.grad)
        if self._expected is None:
            self._expected = self._reference(None), self._reference(torch.float64)
        return Verdict(
            {
                name: measure(name, case.cut(name, x), *(side[name] for side in self._expected))
                for name, x in actual.items()
            }
        )

    def _reference(self, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        inputs = self.case.part_of_inputs(dtype)
        out = self.case.reference(**inputs)
        grad = self.case.cut("out", self.grad).to(out.dtype) if self.wanted else None
        return self._with_gradients(out, inputs, grad)

    def _with_gradients(self, out, inputs, grad) -> dict[str, torch.Tensor]:
        wanted = [inputs[name] for name in self.wanted]
        grads = torch.autograd.grad(out, wanted, grad) if wanted else []
        return {"out": out.detach(), **dict(zip(self.wanted, grads, strict=True))}
