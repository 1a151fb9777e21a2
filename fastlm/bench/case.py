"""One measured call: its inputs, its specification, its work, and who can make it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

import fastlm
from fastlm import reference

Fn = Callable[..., torch.Tensor]
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Work:
    """Operations or bytes, by pass."""

    unit: str  # "TFLOP/s" or "GB/s"
    forward: float
    backward: float

    def of(self, direction: str) -> float:
        """For "forward", "backward" or "forward+backward"."""
        return sum(getattr(self, part) for part in direction.split("+"))


@dataclass(frozen=True)
class Case:
    """One call with its inputs, its specification and those who can make it.

    Attributes:
        op, shape: the operator's family, and a name of the case that holds its sizes:
            "<shape>/<variant> <sizes>".
        function, options: the function of fastlm that it calls, and with what besides `tensors`.
        tensors: inputs by name; floating-point ones get gradients, but those in `frozen`.
        reference: the specification; called like the providers, with `tensors` by name.
        providers: functions by name; "torch" is what others are compared with.
        work: what the case costs.
        frozen: names of tensors that get no gradient.
        parts: indices that cut out what the oracle compares, by input name and "out", where all of
            it would not fit in memory in fp64; the parts must not depend on the rest.
        unavailable: why a backend of fastlm, or a peer, is not among the providers.
        dense: of attention, a `fastlm.bench.dense.Dense` for peers that take such masks.
        undropped: the case without dropout. Providers that draw masks of their own are checked on
            it, since nobody can say what their masks would give.
    """

    op: str
    shape: str
    function: str
    options: Mapping[str, object]
    dtype: torch.dtype
    tensors: Mapping[str, torch.Tensor]
    reference: Fn
    providers: dict[str, Fn]
    work: Work
    frozen: frozenset[str] = frozenset()
    parts: Mapping[str, Slices] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)
    dense: object | None = None
    undropped: Case | None = None

    def differentiates(self, name: str) -> bool:
        return self.tensors[name].is_floating_point() and name not in self.frozen

    @property
    def differentiable(self) -> bool:
        return any(map(self.differentiates, self.tensors))

    def inputs(self) -> dict[str, torch.Tensor]:
        """Fresh leaves that share the memory of `tensors`."""
        return {n: self._leaf(n, x.detach()) for n, x in self.tensors.items()}

    def part_of_inputs(self, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        """The part that the oracle compares, floating-point tensors in `dtype`."""
        parts = {}
        for name, x in self.tensors.items():
            x = self.cut(name, x.detach())
            if dtype is not None and x.is_floating_point():
                x = x.to(dtype)
            parts[name] = self._leaf(name, x)
        return parts

    def cut(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x[self.parts.get(name, ())]

    def judged(self, provider: str) -> Case:
        """The case that the oracle asks a provider for: fastlm's draw the reference's masks."""
        own_masks = self.undropped is not None and not provider.startswith("fastlm")
        return self.undropped if own_masks else self

    def _leaf(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x.requires_grad_(self.differentiates(name))


def randn(*shape: int, dtype=torch.float32, device="cpu", seed=0, scale=1.0) -> torch.Tensor:
    """A normal tensor, drawn where it is used: on a GPU in no time, however large."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def make_case(
    family: str,
    shape: str,
    op: str,
    tensors: Mapping[str, torch.Tensor],
    options: Mapping[str, object],
    torch_fn: Fn,
    work: Work,
    *,
    frozen: frozenset[str] = frozenset(),
    parts: Mapping[str, Slices] | None = None,
    dense: object | None = None,
) -> Case:
    """Adds the backends of fastlm that can take the call, and says why the others cannot."""
    call = functools.partial(_call, getattr(fastlm, op), options)
    reasons = _call(functools.partial(fastlm.explain, op), options, **tensors).reasons
    providers: dict[str, Fn] = {"torch": torch_fn}
    unavailable = {}
    for impl, reason in reasons.items():
        if reason is None:
            providers[f"fastlm-{impl}"] = functools.partial(call, impl=impl)
        else:
            unavailable[f"fastlm-{impl}"] = reason
    dtype = next(x.dtype for x in tensors.values() if x.is_floating_point())
    specification = getattr(getattr(reference, family), op)
    return Case(
        op=family, shape=shape, function=op, options=options, dtype=dtype, tensors=tensors,
        reference=functools.partial(_call, specification, options), providers=providers, work=work,
        frozen=frozen, parts=parts or {}, unavailable=unavailable, dense=dense,
    )  # fmt: skip


def _call(fn: Callable, options: Mapping[str, object], **tensors):
    """Calls a function of fastlm or its reference.

    q, k and v go by position, since attention_decode has other names for them. A `table` becomes
    the bias that is read from it.
    """
    kwargs = {**tensors, **options}
    leading = [kwargs.pop(name) for name in ("q", "k", "v") if name in kwargs]
    if "table" in kwargs:
        kwargs["bias"] = fastlm.RelativeBias(
            kwargs.pop("table"),
            bidirectional=kwargs.pop("bidirectional"),
            max_distance=kwargs.pop("max_distance"),
        )
    return fn(*leading, **kwargs)
