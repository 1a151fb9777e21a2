"""Sweeps of configurations: compiled on all cores, checked, timed, the fastest kept as a pick."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from fastlm.bench.machine import describe
from fastlm.bench.timing import measure

FASTER = 0.98  # of the time of what the tables say: what is nearer may be chance


class Call(Protocol):
    """What a configuration is tried on."""

    name: str

    def run(self, config) -> object: ...

    def finish(self, config) -> object:
        """Launches what else will have to be launched with the configuration, once it is used, and
        `run` does not."""

    def check(self, config) -> None:
        """AssertionError where results are not within the oracle's bound."""


@dataclass(frozen=True)
class Result:
    """ratio: the geometric mean of the calls' times over those of the configuration in use."""

    config: object
    times_ms: tuple[float, ...]
    ratio: float


class Budget:
    """Seconds that a sweep may take; after them it starts nothing new."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.0)

    def part(self, share: float) -> Budget:
        return Budget(self.left * share)

    def over(self, what: str) -> bool:
        """Whether it is too late to begin with `what`, which is said then."""
        if not self.left:
            print(f"no time left for {what}", flush=True)
        return not self.left


@dataclass(frozen=True)
class Pick:
    """An entry of a table: `path` are its keys, from the outermost; note: where it comes from."""

    file: str
    table: str
    path: list
    value: list
    note: str


@dataclass
class Picks:
    """Written to a file after every sweep, so that one that is cut short keeps what it has."""

    file: Path | None = None
    picks: list[Pick] = field(default_factory=list)

    def add(self, pick: Pick) -> None:
        self.picks.append(pick)
        print(f"pick: {pick.table}{pick.path} = {tuple(pick.value)}  # {pick.note}", flush=True)
        if self.file is not None:
            self.file.write_text(json.dumps([asdict(p) for p in self.picks], indent=1) + "\n")


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


def fastest(
    calls: Sequence[Call], used, candidates: Iterable, device: torch.device, budget: Budget
) -> list[Result]:
    """Configurations that all calls take, fastest first; `used`, the one in use, is among them, or
    there is none.

    Compiling has half of the time. The three fastest are timed once more, for longer. `used`, and
    `finish` of the fastest, are tried when the time is over too: without them it was for nothing.
    """
    configs = list(dict.fromkeys([used, *candidates]))
    refused = _launched(calls, "run", configs, device, budget.part(0.5))
    times: dict[object, tuple[float, ...]] = {}
    for config in configs:
        why = refused.get(config)
        if why is None and config is not used and not budget.left:
            why = "no time left"
        try:
            if why is None:
                for call in calls:
                    call.check(config)
                times[config] = _times(calls, config, device, 0.02)
        except Exception as error:
            why = _first_line(error)
        if why is not None:
            _leave_out(config, why)
        if used not in times:
            print(f"what is in use does not pass, and nothing is picked: {used}", flush=True)
            return []
    best = sorted(times, key=lambda config: math.prod(times[config]))[:6]
    refused = _launched(calls, "finish", best, device, Budget(min(60, budget.left)))
    for config, why in refused.items():
        _leave_out(config, why)
    best = [used, *[config for config in best if config not in refused][:3]]
    times = {config: _times(calls, config, device, 0.1) for config in dict.fromkeys(best)}
    results = [Result(c, t, _ratio(t, times[used])) for c, t in times.items()]
    return sorted(results, key=lambda result: result.ratio)


def _launched(
    calls: Sequence[Call], how: str, configs: Sequence, device: torch.device, budget: Budget
) -> dict:
    """Why some configurations cannot be launched: too much shared memory, for example.

    The first is launched alone, whatever the time: kernels that all share would else be compiled,
    and loaded, by all threads at once, of which Triton knows nothing. The others are compiled on
    all cores for the first call; for later calls, which may need the same kernels, those that were.
    """

    def attempt(call, limit: Budget | None, config) -> str | None:
        if limit is not None and not limit.left:
            return "no time left to compile"
        try:
            getattr(call, how)(config)
        except Exception as error:
            return _first_line(error)

    refused: dict[object, str] = {}
    with ThreadPoolExecutor(os.cpu_count(), initializer=_enter, initargs=(device,)) as pool:
        for call in calls:
            left = [config for config in configs if config not in refused]
            reasons = [attempt(call, None, config) for config in left[:1]]
            limit = budget if call is calls[0] else None
            reasons += pool.map(partial(attempt, call, limit), left[1:])
            refused |= {c: why for c, why in zip(left, reasons, strict=True) if why is not None}
    return refused


def _enter(device: torch.device) -> None:
    """Gives a thread the device's context, without which Triton fills no descriptors."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)


def _leave_out(config, why: str) -> None:
    print(f"left out: {config}: {why}", file=sys.stderr, flush=True)


def _times(calls, config, device, seconds) -> tuple[float, ...]:
    run = lambda call: lambda: call.run(config)
    return tuple(measure({"": run(call)}, device, seconds)[""].median for call in calls)


def _ratio(times: Sequence[float], base: Sequence[float]) -> float:
    return math.prod(t / b for t, b in zip(times, base, strict=True)) ** (1 / len(times))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def report(title: str, calls: Sequence[Call], results: Sequence[Result]) -> None:
    """The ratio to what is in use, each call's time, and the configuration."""
    print(f"{title}: {', '.join(call.name for call in calls)}")
    for result in results:
        times = ", ".join(f"{t:.4f}" for t in result.times_ms)
        print(f"  {result.ratio:.3f}  {times} ms  {result.config}", flush=True)


def report_library(
    what: str, calls: Sequence[Call], best: Result, device: torch.device, seconds: float
) -> None:
    """Prints what `library` of each call takes, beside the best configuration."""
    times = [measure({"": call.library}, device, seconds)[""].median for call in calls]
    shares = [a / b for a, b in zip(times, best.times_ms, strict=True)]
    print(f"  {what}: {', '.join(f'{t:.4f}' for t in times)} ms, "
          f"{', '.join(f'{s:.2f}' for s in shares)} of the best one's")  # fmt: skip


def tflops(calls: Sequence[Call], best: Result) -> str:
    """The rates of calls that know their `flops`."""
    rates = (c.flops / t / 1e9 for c, t in zip(calls, best.times_ms, strict=True))
    return ", ".join(f"{rate:.0f}" for rate in rates) + " TFLOP/s"


def source(device: torch.device, what: str) -> str:
    """Where an entry of a table comes from."""
    return f"{describe(device).device}, {datetime.date.today().isoformat()}: {what}"
