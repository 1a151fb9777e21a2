"""The oracle between two modules with the same parameters: ours, and torch.nn's as reference."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from fastlm.testing import Error, check_against_reference

_PREFIX = "parameter "


def check_modules(
    module: nn.Module,
    reference: nn.Module,
    inputs: dict,
    *,
    dtype: torch.dtype = torch.float32,
    frozen: tuple[str, ...] = (),
    backward: bool = True,
    **call,
) -> list[Error]:
    """Runs both with the reference's parameters, and applies the oracle to outputs and gradients.

    Args:
        inputs: tensors by argument name; floating-point ones are cast to `dtype`.
        frozen: inputs that get no gradient.
        call: other arguments of both modules.
    """
    tensors = dict(inputs)
    for name, parameter in reference.named_parameters():
        tensors[_PREFIX + name] = parameter.detach()
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            tensors[name] = x.to(dtype)
    return check_against_reference(
        _as_function(module, call),
        _as_function(reference, call),
        tensors,
        frozen=frozen,
        backward=backward,
    )


def _as_function(module: nn.Module, call: dict):
    def run(**tensors):
        parameters = {
            name.removeprefix(_PREFIX): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(_PREFIX)
        }
        out = functional_call(module, parameters, (), {**tensors, **call})
        # Modules return None for what was not asked for.
        return tuple(y for y in out if y is not None) if isinstance(out, tuple) else out

    return run


def randomize(module: nn.Module) -> nn.Module:
    """Gives every parameter random values: biases start at 0 and norms at 1, which hides errors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise.to(parameter.dtype))
    return module
