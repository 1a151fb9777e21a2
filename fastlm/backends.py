"""Which backend runs a call: one ordered choice per operator, in one visible place.

Every operator lists its backends, fastest first, each with a function that says why it cannot take
a call (or None). `impl=None` takes the first without a reason; an explicit `impl` never falls back.
No environment variable picks a kernel.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fastlm import cuda_library

Impl = Literal["cuda", "triton", "torch"]
_IMPLS = get_args(Impl)
Reason = Callable[..., "str | None"]  # (*call) -> why this backend cannot take the call

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads this once, when a kernel is decorated; so do we.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Explanation:
    """What `fastlm.explain` returns: the backend that would run, and why each other would not."""

    op: str
    chosen: Impl | None
    reasons: Mapping[Impl, str | None]
    how: str | None = None  # the way that the chosen backend goes, where it has several

    def __str__(self) -> str:
        rows = [f"{self.op}: {self.chosen or 'no backend'}"]
        for impl in self.reasons:
            rows.append(f"  {impl:<6} {self.note(impl)}")
        return "\n".join(rows)

    def note(self, impl: Impl) -> str:
        """What a reader wants to know of one backend."""
        if impl == self.chosen:
            return "chosen" if self.how is None else f"chosen ({self.how})"
        return self.reasons[impl] or f"available as impl={impl!r}"


class _Explained(Exception):
    """Carries the explanation out of a call that `explain` made; never escapes it."""

    def __init__(self, explanation: Explanation):
        self.explanation = explanation


class _Probe:
    """Passed as `impl` by `explain`: the call runs its checks, then `choose` reports and stops."""


def explain(op: str | Callable, *args, **kwargs) -> Explanation:
    """Says which backend `op(*args, **kwargs)` would use and why the others would not.

    The call's own checks run, so bad input raises what the call would raise; nothing is computed.

    Args:
        op: an operator of `fastlm`, by name or itself, e.g. `"attention"`.
        args, kwargs: what the call would be given; an explicit `impl` is ignored.
    """
    from fastlm import ops
    from fastlm.ops.sdpa import sdpa_by

    if isinstance(op, str) and op not in operators():
        raise ValueError(f"explain: op must be one of {', '.join(operators())}, got {op!r}")
    fn = getattr(ops, op) if isinstance(op, str) else op
    if fn is ops.scaled_dot_product_attention:
        fn = sdpa_by
    try:
        if _takes_impl(fn):
            fn(*args, **{**kwargs, "impl": _Probe()})
    except _Explained as result:
        return result.explanation
    raise ValueError(f"explain: op must be an operator that takes impl, got {op!r}")


def _takes_impl(fn) -> bool:
    try:
        return "impl" in inspect.signature(fn).parameters
    except (TypeError, ValueError):  # builtins may have none
        return False


def operators() -> list[str]:
    """The names of fastlm's functions, sorted; `RelativeBias` is an argument of theirs."""
    from fastlm import ops

    return sorted(name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)))


def choose(
    op: str,
    impl: Impl | None,
    backends: Mapping[Impl, Reason],
    device: torch.device,
    *call,
    how: Callable[[Impl], str | None] = lambda impl: None,
) -> Impl:
    """Returns the backend for a call.

    Args:
        op: the operator's public name, for messages.
        impl: the caller's request, or None.
        backends: the operator's backends, fastest first, each with its `Reason`.
        device: where the inputs are.
        call: what the reasons look at; metadata only.
        how: for `explain`, the way that a backend would go.
    """
    if impl is None:
        return _first_that_takes(backends, device, call)
    if isinstance(impl, _Probe):
        raise _Explained(_explanation(op, backends, device, call, how))
    if impl not in _IMPLS:
        raise ValueError(f"{op}: impl must be None, 'cuda', 'triton' or 'torch', got {impl!r}")
    if impl not in backends:
        raise NotImplementedError(f"{op}: {_absent(op, impl)}; {_instead(backends, device, call)}")
    missing = None if _emulated(impl, device) else _unavailable(impl, device)
    if missing is not None:
        raise RuntimeError(f"{op}: impl must be available, got {impl!r}: {missing}")
    lacking = backends[impl](*call)
    if lacking is not None:
        raise NotImplementedError(
            f"{op}: impl={impl!r} {lacking}; {_instead(backends, device, call)}"
        )
    return impl


def _first_that_takes(backends, device, call) -> Impl:
    for name, reason in backends.items():
        if _unavailable(name, device) is None and reason(*call) is None:
            return name
    raise AssertionError("the torch backend refuses no call")


def _instead(backends, device, call) -> str:
    return f"use impl={_first_that_takes(backends, device, call)!r}"


def supports_all(*_) -> None:
    """The `Reason` of a backend that refuses nothing."""
    return None


def _explanation(op, backends, device, call, how) -> Explanation:
    reasons = {}
    for impl in _IMPLS:
        if impl not in backends:
            reasons[impl] = _absent(op, impl)
        else:
            reasons[impl] = _unavailable(impl, device) or backends[impl](*call)
    chosen = next((name for name in backends if reasons[name] is None), None)
    return Explanation(op, chosen, reasons, None if chosen is None else how(chosen))


def _absent(op: str, impl: Impl) -> str:
    return f"fastlm has no {impl} kernel for {op}"


def _emulated(impl: Impl, device: torch.device) -> bool:
    """Whether tests run the kernels of `impl` on the CPU: only where a call names it."""
    if device.type != "cpu":
        return False
    return (impl == "triton" and HAS_TRITON and INTERPRETED) or (
        impl == "cuda" and cuda_library.runs_on("cpu")
    )


def _unavailable(impl: Impl, device: torch.device) -> str | None:
    """Why this machine or this device cannot run `impl`, whatever the call."""
    if impl == "torch":
        return None
    if device.type != "cuda":
        return f"its kernels run on a GPU, the inputs are on {device.type}"
    if impl == "triton" and not HAS_TRITON:
        return "triton is not installed (pip install triton)"
    if impl == "cuda" and (reason := _no_cuda_library()) is not None:
        return reason
    return _too_old(device.index or 0)


def _no_cuda_library() -> str | None:
    return cuda_library.unavailable()


# By index of a device: asking torch costs as much as the rest of `choose`.
_old_devices: dict[int, str | None] = {}


def _too_old(index: int) -> str | None:
    if index not in _old_devices:
        old = torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0)
        reason = "its kernels need compute capability 8.0 or newer"
        _old_devices[index] = reason if old else None
    return _old_devices[index]


# What torch.compiler.assume_constant_result does, without its import of the whole compiler.
for _constant in (_too_old, _no_cuda_library):
    _constant._dynamo_marked_constant = True
