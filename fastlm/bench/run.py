"""Checks and times the cases of an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from fastlm.bench.case import Case, Fn
from fastlm.bench.check import Oracle, Verdict
from fastlm.bench.machine import ceilings, describe
from fastlm.bench.results import Row
from fastlm.bench.timing import Times, measure, peak_memory

Measured = tuple[Times, float | None]  # with the peak memory in MB
OUT_OF_MEMORY = "out of memory"
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
        directions: which of `DIRECTIONS`; forward alone where nothing gets a gradient.
        seconds: about how long to sample a provider in a direction.
        failed: told of every provider that did not pass, and why.
    """
    oracles = {id(c): Oracle(c) for c in (case, case.undropped) if c is not None}
    verdicts, grad = {}, None
    for name in sorted(case.providers, key=lambda name: name != "torch"):
        judged = case.judged(name)
        try:
            verdict = oracles[id(judged)].judge(judged.providers[name])
        except Exception as error:  # of any library: it must not end the others' measurement
            failed(name, _cannot(error))
            continue
        grad = oracles[id(judged)].grad
        # torch itself is what users have: it is timed whatever its error, which the table shows.
        rival = verdicts.get("torch") if judged is case.judged("torch") else None
        if name == "torch" or verdict.passes(rival):
            verdicts[name] = verdict
        else:
            failed(name, f"error {verdict.error:.1e} is {verdict.of_bound:.2f} of the bound")
    del oracles  # their fp64 tensors are large
    device = next(iter(case.tensors.values())).device
    # On a GPU one after the other: what one keeps for its backward leaves the next less memory.
    turns = [[name] for name in verdicts] if device.type == "cuda" else [list(verdicts)]
    rows = []
    for direction in directions if case.differentiable else DIRECTIONS[:1]:
        told = lambda name, error, direction=direction: failed(
            name, f"{direction}: {_cannot(error)}"
        )
        measured: dict[str, Measured] = {}
        for names in turns:
            measured |= _measure(case, direction, names, grad, seconds, told)
        rows += _rows(case, direction, measured, verdicts)
    return rows


def _cannot(error: Exception) -> str:
    reason = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else "cannot"
    return f"{reason}: {(str(error).splitlines() or [type(error).__name__])[0]}"


def _measure(case, direction, names, grad, seconds, failed) -> dict[str, Measured]:
    device = next(iter(case.tensors.values())).device
    calls, peaks = {}, {}
    for name in names:
        try:
            call = _call(case, case.providers[name], direction, grad)
            peaks[name] = peak_memory(call, device)
            calls[name] = call
        except Exception as error:
            failed(name, error)
    try:
        times = measure(calls, device, seconds)
    except Exception as error:
        if len(calls) == 1:
            failed(*calls, error)
            return {}
        # By turns nobody can say whose it is.
        alone = (_measure(case, direction, [name], grad, seconds, failed) for name in calls)
        return {name: found for each in alone for name, found in each.items()}
    return {name: (times[name], peaks[name]) for name in calls}


def _rows(
    case: Case,
    direction: str,
    measured: Mapping[str, Measured],
    verdicts: Mapping[str, Verdict],
) -> list[Row]:
    device = next(iter(case.tensors.values())).device
    ceiling = ceilings(device, case.dtype)
    scale, top = (1e12, ceiling.tflops) if case.work.unit == "TFLOP/s" else (1e9, ceiling.gbytes)
    machine = describe(device)
    rows = []
    for name, (time, peak) in measured.items():
        rate = case.work.of(direction) / (time.median / 1e3) / scale
        speedup = measured["torch"][0].median / time.median if "torch" in measured else None
        verdict = verdicts[name]
        rows.append(
            Row(
                case.op, case.shape, str(case.dtype).removeprefix("torch."), direction, name,
                time.median, time.p20, time.p80, time.host, time.graph, speedup, rate,
                case.work.unit, rate / top, peak, verdict.error, verdict.of_bound, machine.device,
                machine.driver, machine.torch, machine.triton, machine.commit,
            )
        )  # fmt: skip
    return rows


def _call(case: Case, fn: Fn, direction: str, grad: torch.Tensor | None) -> Callable[[], object]:
    if direction == "forward":
        inputs = {name: x.detach() for name, x in case.tensors.items()}
        return lambda: fn(**inputs)
    inputs = case.inputs()
    wanted = [x for x in inputs.values() if x.requires_grad]
    if direction == "backward":
        out = fn(**inputs)
        return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)
    return lambda: torch.autograd.grad(fn(**inputs), wanted, grad)
