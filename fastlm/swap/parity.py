"""`verify`: what a swap changed in the numbers of a model, on the user's own inputs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fastlm.ops._check import fail
from fastlm.swap import huggingface
from fastlm.swap.fused import Swapped
from fastlm.swap.report import format_table
from fastlm.swap.swapping import is_swapped, swap, unswap


@dataclass(frozen=True)
class Parity:
    """One tensor of the swapped model, against the original and against the original in fp64.

    Errors are root mean squares, not maxima as for single operators: after several layers the worst
    element of two equally accurate runs differs up to fivefold, their mean square does not.

    Attributes:
        max_difference, mean_difference: absolute, from the original.
        error, original_error: of the swapped and of the original model against fp64.
        bound: factor * (original_error + eps * scale), which `error` may not exceed; the factor is
            2 for outputs and 3 for gradients. The scale is the fp64 value's size; a gradient's, the
            largest in its module, since some (of a key's bias) are zero but for rounding.
    """

    name: str
    max_difference: float
    mean_difference: float
    error: float
    original_error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # NaN fails

    @property
    def ratio(self) -> float:
        return self.error / self.bound if self.bound > 0 else float(self.error > 0) * float("inf")


@dataclass(frozen=True)
class ParityReport:
    """Errors of a swapped model; prints as a table.

    Attributes:
        outputs, gradients: of the model; gradients are those of its parameters and of the inputs
            that require them.
        modules: outputs of the replaced modules in the order in which they ran.
    """

    outputs: tuple[Parity, ...]
    gradients: tuple[Parity, ...]
    modules: tuple[Parity, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in (*self.outputs, *self.gradients))

    @property
    def first_failure(self) -> str | None:
        """The first replaced module whose output is past the bound."""
        return next((row.name for row in self.modules if not row.passed), None)

    def table(self, gradients: int = 5) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and lines: every output, and as many gradients, the worst first."""
        header = ("tensor", "max diff", "mean diff", "rms error", "original's", "bound", "")
        worst = sorted(self.gradients, key=lambda row: row.ratio, reverse=True)
        shown = [*self.outputs, *worst[:gradients]]
        lines = [
            (row.name, *(f"{value:.2e}" for value in _numbers(row)), "ok" if row.passed else "FAIL")
            for row in shown
        ]
        return header, lines

    def __str__(self) -> str:
        lines = [format_table(*self.table())]
        if len(self.gradients) > 5:
            lines.append(f"the worst 5 of {len(self.gradients)} gradients are shown")
        if self.passed:
            lines.append("every output and gradient is within its bound")
        else:
            first = self.first_failure or "none, each output of a replaced module is within it"
            lines.append(f"past the bound; the first module past it: {first}")
        return "\n".join(lines)


def _numbers(row: Parity) -> tuple[float, ...]:
    return row.max_difference, row.mean_difference, row.error, row.original_error, row.bound


def verify(model: nn.Module, inputs, *, only=None) -> ParityReport:
    """Runs a model without and with fastlm and compares outputs and gradients.

    Three runs in evaluation mode, so without dropout: the original, the original in fp64 (a copy of
    the model, which needs the memory) and the swapped model. The swapped one passes where its error
    against fp64 is at most a small multiple of the original's: `Parity.bound`. Gradients are those
    of a fixed random projection of the outputs. The model is left as it came: swapped or not,
    training flags, gradients and random state.

    Args:
        model: swapped or not; if not, `swap(model, only=only)` is what is verified.
        inputs: a mapping of keyword arguments, a tuple of positional ones, or one tensor. With a
            two-dimensional `attention_mask` among them, outputs of shape (batch, seqlen, ...) are
            compared where it is not 0: padded positions have no defined output.

    Raises:
        ValueError: nothing to swap; the model gives no floating-point tensor.
    """
    if not isinstance(model, nn.Module):
        raise fail("verify", "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    with _evaluating(model):
        if is_swapped(model):
            restore = _remember(model)
            names = _watched(model)
            swapped = _run(model, inputs, names)
            unswap(model)
            try:
                original, gold = _run(model, inputs, names), _run_fp64(model, inputs, names)
            finally:
                restore()
        else:
            original = gold = None
            swap(model, only=only)
            try:
                names = _watched(model)
                swapped = _run(model, inputs, names)
            finally:
                unswap(model)
            original, gold = _run(model, inputs, names), _run_fp64(model, inputs, names)
    return ParityReport(
        *(
            tuple(_compare(kind, swapped[kind], original[kind], gold[kind]))
            for kind in ("outputs", "gradients", "modules")
        )
    )


def _remember(model: nn.Module):
    """A function that swaps exactly what is swapped now."""
    classes = {m: type(m) for m in model.modules() if isinstance(m, Swapped)}
    noted = [m for _, m in huggingface.pretrained_models(model) if "_fastlm_attention" in vars(m)]

    def restore():
        for hf_model in noted:
            huggingface.set_attention(hf_model)
        for module, cls in classes.items():
            module.__class__ = cls

    return restore


def _watched(model: nn.Module) -> tuple[str, ...]:
    """Replaced modules that are not inside of another: a hook there would change what runs."""
    names: list[str] = []
    candidates = {name for name, m in model.named_modules() if isinstance(m, Swapped)}
    for prefix, hf_model in huggingface.pretrained_models(model):
        for name, module in huggingface.attention_modules(hf_model):
            if huggingface.uses_fastlm(module):
                candidates.add(f"{prefix}.{name}".strip("."))
    for name, _ in model.named_modules():
        parents = {name[:i] for i, character in enumerate(name) if character == "."} | {""}
        if name in candidates and not (parents - {name}) & candidates:
            names.append(name)
    return tuple(names)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    model.eval()
    try:
        with torch.random.fork_rng(devices=sorted(devices)), torch.enable_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _run_fp64(model, inputs, names) -> dict[str, dict[str, torch.Tensor]]:
    with _SoftmaxInFp64():
        return _run(copy.deepcopy(model).double(), inputs, names, torch.float64)


class _SoftmaxInFp64(TorchFunctionMode):
    """Widens a softmax that a model fixes to fp32: there fp64's masking constants would overflow to
    -inf, and rows of padding to NaN."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _SOFTMAX and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)


def _run(model, inputs, names, dtype=None) -> dict[str, dict[str, torch.Tensor]]:
    """Outputs, gradients and outputs of the named modules, by name."""
    torch.manual_seed(0)
    args, kwargs, wanted = _arguments(inputs, dtype)
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for name in names:

        def keep(module, args, out, name=name):
            seen.update((name or "(model)", y) for y in list(_tensors("", out).values())[:1])

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        outputs = _tensors("", model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    if not outputs:
        raise fail("verify", "model", "have a floating-point tensor among its outputs", "none")
    mask = kwargs.get("attention_mask")
    attended = {name: _attended(y, mask) for name, y in outputs.items()}
    wanted.update({name: p for name, p in model.named_parameters() if p.requires_grad})
    return {
        "outputs": {name: y.detach() for name, y in attended.items()},
        "gradients": _gradients(attended, wanted),
        "modules": {name: _attended(y, mask).detach() for name, y in seen.items()},
    }


def _arguments(inputs, dtype):
    """(args, kwargs, inputs that require gradients), all of them copies where they are tensors."""
    wanted = {}

    def own(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        grad = value.requires_grad
        value = value.detach()
        if value.is_floating_point() and dtype is not None:
            value = value.to(dtype)
        if grad:
            wanted[name] = value = value.clone().requires_grad_()
        return value

    if isinstance(inputs, Mapping):
        return (), {name: own(name, value) for name, value in inputs.items()}, wanted
    if isinstance(inputs, (tuple, list)):
        return tuple(own(f"input {i}", x) for i, x in enumerate(inputs)), {}, wanted
    return (own("input", inputs),), {}, wanted


def _tensors(name: str, value) -> dict[str, torch.Tensor]:
    """The floating-point tensors in nested outputs, with dotted names."""
    if isinstance(value, torch.Tensor):
        return {name or "output": value} if value.is_floating_point() else {}
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    else:
        return {}
    found: dict[str, torch.Tensor] = {}
    for key, item in items:
        found.update(_tensors(f"{name}.{key}".strip("."), item))
    return found


def _attended(y: torch.Tensor, mask) -> torch.Tensor:
    """The rows of y that are not padding."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return y
    fits = y.dim() >= 3 and y.shape[:2] == mask.shape
    return y[mask != 0] if fits else y


def _gradients(outputs, wanted) -> dict[str, torch.Tensor]:
    used = [y for y in outputs.values() if y.requires_grad]
    if not used or not wanted:
        return {}
    generator = torch.Generator().manual_seed(0)
    incoming = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in used]
    grads = torch.autograd.grad(used, list(wanted.values()), incoming, allow_unused=True)
    pairs = zip(wanted, grads, strict=True)
    return {f"grad of {name}": grad for name, grad in pairs if grad is not None}


def _compare(kind, swapped, original, gold) -> Iterator[Parity]:
    gradients = kind == "gradients"
    owner = lambda name: name.rpartition(".")[0] if gradients else name
    scales: dict[str, float] = {}
    for name, g in gold.items():
        scales[owner(name)] = max(scales.get(owner(name), 0.0), _rms(g))
    for name, g in gold.items():
        if name not in swapped or swapped[name].shape != g.shape:
            got = "none" if name not in swapped else tuple(swapped[name].shape)
            raise fail("verify", f"{name} when swapped", f"have shape {tuple(g.shape)}", got)
        actual, before = swapped[name].double(), original[name].double()
        difference = (actual - before).abs()
        original_error = _rms(before - g)
        slack = torch.finfo(original[name].dtype).eps * scales[owner(name)]
        yield Parity(
            name,
            difference.max().item() if g.numel() else 0.0,
            difference.mean().item() if g.numel() else 0.0,
            _rms(actual - g),
            original_error,
            (3 if gradients else 2) * (original_error + slack),
        )


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0
