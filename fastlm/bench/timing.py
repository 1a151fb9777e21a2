"""Times: medians with the 20th and 80th percentile, the providers of a case taken in turns."""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_SHORTEST_SAMPLE_S = 1e-3  # shorter calls are repeated within a sample: the clock costs time too
_MIN_SAMPLES, _MAX_SAMPLES = 5, 200
_HOST_S = 0.1  # for what a call costs the host


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call.

    Attributes:
        host: on a GPU, until the call returned, with the GPU still at work; None on a CPU.
        graph: whether the GPU's times are those of a CUDA graph's replay.
    """

    median: float
    p20: float
    p80: float
    host: float | None = None
    graph: bool = False


def measure(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, Times]:
    """Times every call.

    Args:
        calls: by provider.
        device: a GPU is timed by events with its L2 cache flushed before each call
            (`triton.testing.do_bench`), a CPU by the clock. A call that a CUDA graph can hold is
            timed as its replay, for the time that the GPU takes; how long the CPU takes to launch
            it is measured by itself.
        seconds: about how long to sample each call.
    """
    if device.type == "cuda":
        return {name: _on_gpu(call, seconds) for name, call in calls.items()}
    return _on_cpu(calls, seconds)


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """Megabytes that the call needed at its peak beyond what was held before: of a GPU's allocator,
    or of this process, where Linux tells. Calls once before: what is made once does not count."""
    call()
    if device.type != "cuda":
        return _peak_of_process(call)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def _peak_of_process(call: Callable[[], object]) -> float | None:
    """Of resident memory, which torch's allocator for a CPU does not count itself."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the call would find free pages that count already
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
        before = _resident("VmRSS")
    except (OSError, AttributeError, TypeError):  # no Linux, no glibc, or not allowed
        return None
    call()
    return (_resident("VmHWM") - before) / 1e6


def _resident(name: str) -> int:
    """Bytes, by its name in /proc/self/status, which has them in kB."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[1])


def _on_gpu(call: Callable[[], object], seconds: float) -> Times:
    from triton.testing import do_bench

    host = _host_time(call)
    replay = _captured(call)
    median, p20, p80 = do_bench(
        replay or call, warmup=25, rep=round(seconds * 1e3), quantiles=[0.5, 0.2, 0.8]
    )
    return Times(median, p20, p80, host, replay is not None)


def _host_time(call: Callable[[], object]) -> float:
    """Milliseconds until a call returns; few in a row, or the launch queue would fill up, and few
    in all where they take long."""
    samples, deadline = [], time.perf_counter() + _HOST_S
    while not samples or (len(samples) < 10 and time.perf_counter() < deadline):
        torch.cuda.synchronize()
        samples.append(_clock(call, 3) * 1e3)
    torch.cuda.synchronize()
    return statistics.median(samples)


def _captured(call: Callable[[], object]) -> Callable[[], object] | None:
    """Replays a CUDA graph of a call; None where the call waits for the GPU."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        torch.cuda.set_sync_debug_mode(mode)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return graph.replay


def _on_cpu(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Times]:
    repeats = {}
    for name, call in calls.items():
        call()  # warms caches and the allocator
        repeats[name] = max(1, round(_SHORTEST_SAMPLE_S / max(_clock(call, 1), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds * len(calls)
    # Turn by turn, so that a slow moment of the machine meets all providers alike.
    for i in range(_MAX_SAMPLES):
        if i >= _MIN_SAMPLES and time.perf_counter() > deadline:
            break
        for name, call in calls.items():
            samples[name].append(_clock(call, repeats[name]) * 1e3)
    return {name: _summary(values) for name, values in samples.items()}


def _clock(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _summary(values: list[float]) -> Times:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Times(statistics.median(values), fifths[0], fifths[3])
