"""Says what a module computes, without reading its source.

`formula` runs a module's `forward` on symbols: its children record that they were called, sums and
products record themselves, and anything else ends the attempt. Copies of one block under other
class names, attribute names or libraries so give one formula, and a copy that differs does not.
Activations and RMSNorms, which are plain functions of numbers, are told apart by evaluating them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastlm.layers._modules import is_changed
from fastlm.ops.ffn import bias_act
from fastlm.ops.norm import CASTINGS, rms_norm

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", "silu", "quick_gelu")


class Unreadable(Exception):
    """The forward does something that symbols cannot follow."""


@dataclass(frozen=True)
class Formula:
    """What a forward computes, e.g. "norm(dropout(linear(x)) + y)".

    Attributes:
        children: their names, in the order in which the text names their roles.
        inputs: how many positional arguments it takes.
    """

    text: str
    children: tuple[str, ...]
    inputs: int


def formula(module: nn.Module) -> Formula:
    """The formula of `type(module).forward`; raises `Unreadable` where there is none."""
    for inputs in (1, 2):
        recorder = _Recorder(module)
        symbols = [_Symbol(name) for name in "xy"[:inputs]]
        try:
            result = type(module).forward(recorder, *symbols)
        except Exception:  # any: it is somebody else's code on something that is no tensor
            continue
        if isinstance(result, _Symbol) and recorder.called == set(result.children):
            return Formula(result.text, result.children, inputs)
    raise Unreadable


class _SameDtype:
    """The dtype of every symbol, equal to any other: some forwards convert where two differ."""

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    __hash__ = None


class _Symbol:
    __slots__ = ("children", "text")

    def __init__(self, text: str, children: tuple[str, ...] = ()):
        self.text, self.children = text, children

    def __add__(self, other):
        return _combine(self, "+", other)

    def __mul__(self, other):
        return _combine(self, "*", other)

    @property
    def dtype(self):
        return _SameDtype()


def _combine(a: _Symbol, sign: str, b) -> _Symbol:
    if not isinstance(b, _Symbol):
        return NotImplemented
    # One order for both ways to write a sum or a product: the plain input comes last.
    first, second = sorted((a, b), key=lambda symbol: (len(symbol.text) == 1, symbol.text))
    text = f"{_grouped(first.text)} {sign} {_grouped(second.text)}"
    return _Symbol(text, first.children + second.children)


def _grouped(text: str) -> str:
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == " " and depth == 0:
            return f"({text})"
    return text


class _Recorder:
    """Stands in for `self` within a forward."""

    def __init__(self, module: nn.Module):
        vars(self).update(_module=module, called=set())

    def __setattr__(self, name: str, value):
        raise Unreadable  # a forward with side effects

    def __getattr__(self, name: str):
        if name == "training":
            raise Unreadable  # what it computes would change with it
        value = getattr(self._module, name)
        if isinstance(value, nn.Module) or (callable(value) and name in vars(self._module)):
            return _Child(self, name, value)
        return value


class _Child:
    def __init__(self, recorder: _Recorder, name: str, target):
        self._recorder, self._name, self._target = recorder, name, target

    def __call__(self, *args):
        (argument,) = args
        if not isinstance(argument, _Symbol):
            raise Unreadable
        self._recorder.called.add(self._name)
        text = f"{role(self._target)}({argument.text})"
        return _Symbol(text, (self._name, *argument.children))

    def __getattr__(self, name: str):
        return getattr(self._target, name)


def role(child) -> str:
    """The part that a child plays in a formula; its class name where it plays none that we know."""
    cls = original_class(child)
    if is_linear(child):
        return "linear"
    if cls in (nn.Dropout, nn.Identity):
        return "dropout"
    if cls is nn.LayerNorm and len(child.normalized_shape) == 1:
        return "norm"
    return "act" if activation_name(child) else getattr(cls, "__name__", str(cls))


def original_class(module) -> type:
    """The class of a module before `swap`; of a function, the function itself."""
    if not isinstance(module, nn.Module):
        return module
    return getattr(type(module), "_fastlm_original", type(module))


def is_linear(module) -> bool:
    """nn.Linear itself, or GPT-2's Conv1D: a linear layer with the transposed weight."""
    if type(module) is nn.Linear:
        return True
    if type(module).__name__ != "Conv1D" or not hasattr(module, "nf"):
        return False
    weight = module.weight
    return weight.dim() == 2 and weight.shape[1] == module.nf and set(module._modules) == set()


def linear_weight(module: nn.Module) -> torch.Tensor:
    """(out, in), as nn.Linear keeps it; of a Conv1D, the transposed view."""
    return module.weight if type(module) is nn.Linear else module.weight.t()


def activation_name(function) -> str | None:
    """The operator's name for an activation function or module, found by evaluating it; or None."""
    if isinstance(function, nn.Module):
        if any(True for _ in function.parameters()) or any(True for _ in function.buffers()):
            return None
        cls = type(function)
        if cls in (nn.Dropout, nn.Identity) or is_linear(function) or function._modules:
            return None
        call = lambda x: cls.forward(function, x)
    elif callable(function):
        call = function
    else:
        return None
    # Past 10 for clipped variants; in fp64, where the erf and tanh forms of GELU differ by 5e-4.
    x = torch.cat([torch.linspace(-8, 8, 161), torch.tensor([-40.0, 40.0])]).double()
    try:
        with torch.no_grad():
            y = call(x.clone())
    except Exception:  # any: the argument is somebody else's code
        return None
    if not isinstance(y, torch.Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    for name in ACTIVATIONS:
        if torch.allclose(y, bias_act(x, activation=name, impl="torch"), rtol=1e-9, atol=1e-9):
            return name
    return None


def rms_casting(module: nn.Module, eps: float) -> str | None:
    """The `casting` with which `fastlm.rms_norm` equals the module's forward; or None.

    Compared in fp32 and in bf16, where the castings round at different places, on a random weight.
    """
    cols = module.weight.numel()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(16, 2048 // cols), cols, generator=generator) * 2
    weight = torch.randn(cols, generator=generator)
    for casting in CASTINGS:
        if all(
            _agrees(module, x.to(dtype), weight.to(dtype), eps, casting)
            for dtype in (torch.float32, torch.bfloat16)
        ):
            return casting
    return None


def _agrees(module, x, weight, eps, casting) -> bool:
    probe = module.__class__.__new__(module.__class__)
    probe.__dict__.update(module.__dict__)
    probe.__dict__["_parameters"] = {"weight": weight}
    try:
        with torch.no_grad():
            y = type(module).forward(probe, x)
    except Exception:  # any: it is somebody else's code
        return False
    want = rms_norm(x, weight, eps=eps, casting=casting, impl="torch")
    if not isinstance(y, torch.Tensor) or y.dtype != want.dtype or y.shape != want.shape:
        return False
    if x.dtype == torch.float32:
        return torch.allclose(y, want, rtol=1e-5, atol=1e-6)
    # A cast elsewhere changes the last bit of one element in ten; fp32 rounding, of one in 1e4.
    return bool((y != want).float().mean() < 0.01)


def untouched(child, cls) -> bool:
    """Whether calling `child` still does what class `cls` does and nothing else.

    Adapters and parametrizations change the class; for the rest see `is_changed`.
    """
    if original_class(child) is not cls:
        return False
    if not isinstance(child, nn.Module):
        return True
    return not is_changed(child)
