"""The oracle, input factories and a NaN-filling allocator, for this project's tests and its users'.

The oracle needs no tolerances. Gold is the reference in fp64; a kernel passes where

    max|kernel - gold| <= 2 * (max|reference in the same dtype - gold| + eps(dtype) * max|gold|)

for every output and every gradient, all finite, of the right dtype and shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

LAYOUTS = ("contiguous", "transposed", "last_stride_2", "packed", "expanded", "offset_1")


@dataclass(frozen=True)
class Error:
    """Errors of one tensor against gold, as maxima of the absolute difference."""

    name: str
    error: float  # of the tensor under test
    reference_error: float  # of the same-dtype reference
    bound: float

    @property
    def ratio(self) -> float:
        """Error over its bound: above 1 fails."""
        if self.bound > 0:
            return self.error / self.bound
        return float("inf") if self.error > 0 else 0.0


def measure(name: str, actual: torch.Tensor, same_dtype: torch.Tensor, gold: torch.Tensor) -> Error:
    """Errors of `actual` and `same_dtype` against `gold`, with the oracle's bound."""
    gold64 = gold.detach().double()
    finite = torch.isfinite(gold64)  # an LSE of -inf is right, and compared exactly below
    gold_max = gold64[finite].abs().max().item() if finite.any() else 0.0

    def distance(x):
        x = x.detach().double()
        off = torch.where(finite, (x - gold64).abs(), (x != gold64) * float("inf"))
        # `where` above gives 0 * inf = nan for equal infinities; both mean "no error" there.
        off = torch.where(~finite & (x == gold64), 0.0, off)
        return off.max().item() if off.numel() else 0.0

    eps = torch.finfo(actual.dtype).eps
    reference_error = distance(same_dtype)
    return Error(name, distance(actual), reference_error, 2 * (reference_error + eps * gold_max))


def assert_close(
    name: str, actual: torch.Tensor, same_dtype: torch.Tensor, gold: torch.Tensor
) -> Error:
    """Asserts the oracle's bound, dtype and shape for one tensor; returns the errors."""
    assert actual.dtype == same_dtype.dtype, f"{name}: {actual.dtype}, want {same_dtype.dtype}"
    assert actual.shape == gold.shape, f"{name}: {tuple(actual.shape)}, want {tuple(gold.shape)}"
    result = measure(name, actual, same_dtype, gold)
    assert result.bound < float("inf"), (  # also where gold is NaN: then anything would pass
        f"{name}: no bound, since the reference is not finite in {actual.dtype} or in fp64"
    )
    if not result.error <= result.bound:  # NaN must fail
        off = (actual.detach().double() - gold.detach().double()).abs().nan_to_num(float("inf"))
        worst = tuple(i.item() for i in torch.unravel_index(off.argmax(), off.shape))
        raise AssertionError(
            f"{name}: error {result.error:.3e} exceeds {result.bound:.3e} "
            f"(same-dtype reference {result.reference_error:.3e}); worst at {worst}: "
            f"{actual[worst].item()} for {gold[worst].item()}"
        )
    return result


def check_against_reference(
    fn: Callable,
    reference: Callable,
    tensors: Mapping[str, torch.Tensor | None],
    *,
    frozen: tuple[str, ...] = (),
    backward: bool = True,
    grad_seed: int = 0,
    **options,
) -> list[Error]:
    """Runs `fn` and `reference` on the same inputs, forward and backward, and applies the oracle.

    Args:
        fn: the function under test, called `fn(**tensors, **options)`; one tensor or a tuple.
        reference: its specification, called in the inputs' dtypes and in fp64.
        tensors: inputs by name. Floating-point ones get gradients unless `frozen` names them;
            None, integer and boolean ones are passed through.
        backward: False checks the forward pass alone.
        grad_seed: seeds the incoming gradients, one for every output.
        options: passed to both.
    """
    results = _results(fn, reference, tensors, frozen, backward, grad_seed, options)
    return [assert_close(name, *values) for name, values in results.items()]


def check_over_draws(
    fn: Callable,
    reference: Callable,
    draws: Iterable[Mapping[str, torch.Tensor | None]],
    *,
    frozen: tuple[str, ...] = (),
    backward: bool = True,
    **options,
) -> list[Error]:
    """`check_against_reference` of many calls of the same shapes, judged as if they were one.

    For results of a few numbers: the reference may be right by luck on one draw of them, which
    leaves no room for an error of the same size. The largest error of all draws is no luck.

    Args:
        draws: the tensors of each call; incoming gradients are seeded by its index.

    The other arguments are `check_against_reference`'s.
    """
    calls = [
        _results(fn, reference, tensors, frozen, backward, i, options)
        for i, tensors in enumerate(draws)
    ]
    stacks = {
        name: [torch.stack(x) for x in zip(*(call[name] for call in calls), strict=True)]
        for name in calls[0]
    }
    return [assert_close(name, *values) for name, values in stacks.items()]


def _results(fn, reference, tensors, frozen, backward, grad_seed, options) -> dict[str, tuple]:
    """(of fn, of the reference, of the reference in fp64), for each output and each gradient."""
    actual, actual_grads = _run(fn, tensors, frozen, None, backward, grad_seed, options)
    same, same_grads = _run(reference, tensors, frozen, None, backward, grad_seed, options)
    gold, gold_grads = _run(reference, tensors, frozen, torch.float64, backward, grad_seed, options)
    assert len(actual) == len(same), f"{len(actual)} outputs, want {len(same)}"
    outputs = enumerate(zip(actual, same, gold, strict=True))
    results = {f"output {i}": values for i, values in outputs}
    for name in gold_grads:
        grads = actual_grads[name], same_grads[name], gold_grads[name]
        assert grads[1] is not None, f"d{name}: the reference has no gradient; freeze {name}"
        assert grads[0] is not None, f"d{name}: None, want a gradient"
        assert grads[0].dtype == tensors[name].dtype
        results[f"d{name}"] = grads
    return results


def _run(fn, tensors, frozen, dtype, backward, grad_seed, options):
    inputs = {}
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            # `detach` keeps the layout under test.
            x = x.detach() if dtype is None else x.detach().to(dtype)
            x.requires_grad_(backward and name not in frozen)
        inputs[name] = x
    outputs = fn(**inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not backward:
        return outputs, {}
    wrt = {n: x for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    generator = torch.Generator().manual_seed(grad_seed)
    used = [y for y in outputs if y.requires_grad]
    incoming = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in used]
    grads = torch.autograd.grad(used, list(wrt.values()), incoming, allow_unused=True)
    return outputs, dict(zip(wrt, grads, strict=True))


def randn(*shape: int, dtype=torch.float32, device="cpu", seed=0, scale=1.0) -> torch.Tensor:
    """A normal tensor that is the same on every device: drawn on the CPU in fp32, then moved."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def with_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `x` in another memory layout; `expanded` repeats the first entry of dim 0.

    Args:
        layout: one of `LAYOUTS`. Memory that is not part of the result is NaN where it can be.
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].contiguous().expand(x.shape)
    fill = float("nan") if x.is_floating_point() else 0
    if layout == "offset_1":
        buffer = x.new_full((x.numel() + 1,), fill)
        view = buffer[1:].view(x.shape)
    elif layout == "last_stride_2":
        view = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), fill)[..., ::2]
    elif layout == "packed":
        view = x.new_full((*x.shape[:-1], 3 * x.shape[-1]), fill)
        view = view[..., x.shape[-1] : 2 * x.shape[-1]]
    else:
        raise ValueError(f"with_layout: layout must be one of {LAYOUTS}, got {layout!r}")
    return view.copy_(x)


@contextlib.contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Within it, `torch.empty` returns NaN (integers: the largest value), so that a kernel which
    leaves a part of its output or workspace unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill
