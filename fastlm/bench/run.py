"""Checks and times the cases of an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from fastlm.bench.cases import Case, Fn
from fastlm.bench.check import Oracle, Verdict
from fastlm.bench.machine import ceilings, describe
from fastlm.bench.results import Row
from fastlm.bench.timing import measure
from fastlm.testing import randn

DIRECTIONS = ("forward", "forward+backward", "backward")


def directions_of(op: str, quick: bool) -> tuple[str, ...]:
    """What to time: the backward pass by itself says nothing of a loss.

    Linear cross-entropies compute gradients in the forward pass, while the logits are there.
    """
    return DIRECTIONS[:2] if quick or op == "loss" else DIRECTIONS


def run_case(
    case: Case,
    *,
    directions: Iterable[str] = DIRECTIONS[:2],
    seconds: float = 0.3,
    failed: Callable[[str, str], None] = lambda provider, why: None,
) -> list[Row]:
    """Applies the oracle to every provider of a case and times torch and those that pass.

    Args:
        directions: which of `DIRECTIONS`.
        seconds: about how long to sample a provider in a direction.
        failed: told of every provider that did not pass, and why.
    """
    oracle, verdicts = Oracle(case), {}
    for name, fn in sorted(case.providers.items(), key=lambda item: item[0] != "torch"):
        try:
            verdict = oracle.judge(fn)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            failed(name, f"cannot: {str(error).splitlines()[0]}")
            continue
        # torch itself is what users have: it is timed whatever its error, which the table shows.
        if name == "torch" or verdict.passes(verdicts.get("torch")):
            verdicts[name] = verdict
        else:
            failed(name, f"error {verdict.error:.1e} is {verdict.of_bound:.2f} of the bound")
    del oracle  # its fp64 tensors are large
    passed = {name: case.providers[name] for name in verdicts}
    rows = []
    for direction in directions:
        rows += _time(case, direction, passed, verdicts, seconds)
    return rows


def _time(
    case: Case,
    direction: str,
    providers: Mapping[str, Fn],
    verdicts: Mapping[str, Verdict],
    seconds: float,
) -> list[Row]:
    device = next(iter(case.tensors.values())).device
    calls = {name: _call(case, fn, direction) for name, fn in providers.items()}
    times = measure(calls, device, seconds)
    ceiling = ceilings(device, case.dtype)
    scale, top = (1e12, ceiling.tflops) if case.work.unit == "TFLOP/s" else (1e9, ceiling.gbytes)
    machine = describe(device)
    rows = []
    for name, time in times.items():
        rate = case.work.of(direction) / (time.median / 1e3) / scale
        speedup = times["torch"].median / time.median if "torch" in times else None
        verdict = verdicts[name]
        rows.append(
            Row(
                case.op, case.shape, str(case.dtype).removeprefix("torch."), direction, name,
                time.median, time.p20, time.p80, speedup, rate, case.work.unit, rate / top,
                verdict.error, verdict.of_bound, machine.device, machine.driver, machine.torch,
                machine.triton, machine.commit,
            )
        )  # fmt: skip
    return rows


def _call(case: Case, fn: Fn, direction: str) -> Callable[[], object]:
    if direction == "forward":
        inputs = {name: x.detach() for name, x in case.tensors.items()}
        return lambda: fn(**inputs)
    inputs = case.inputs()
    wanted = [x for x in inputs.values() if x.requires_grad]
    out = fn(**inputs)
    grad = randn(*out.shape, seed=99).to(out.device, out.dtype)
    if direction == "backward":
        return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)
    return lambda: torch.autograd.grad(fn(**inputs), wanted, grad)
