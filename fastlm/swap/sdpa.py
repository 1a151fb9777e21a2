"""Routes torch's scaled dot-product attention to fastlm, whoever calls it."""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import nn, overrides

from fastlm.ops.sdpa import scaled_dot_product_attention

_PLAIN = (torch.Tensor, nn.Parameter)


def activate_sdpa() -> SDPARoute:
    """Routes every `F.scaled_dot_product_attention` of this thread to fastlm, from now on.

    That includes torch.nn's attention and models that know nothing of fastlm. Use it as a context
    manager, or call `deactivate` on what it returns:

        with fastlm.swap.activate_sdpa():
            model(x)

    It is a `torch.overrides.TorchFunctionMode`: no attribute of torch is replaced. Calls with
    tensor subclasses that override functions themselves keep torch's path.
    """
    return SDPARoute()


class SDPARoute(overrides.TorchFunctionMode):
    """The active route; see `activate_sdpa`."""

    def __init__(self):
        super().__init__()
        self._active = True
        super().__enter__()

    def __enter__(self) -> SDPARoute:
        return self  # entered when it was made

    def __exit__(self, *exception) -> None:
        self.deactivate()

    def deactivate(self) -> None:
        """Ends the route; a second call does nothing."""
        if self._active:
            self._active = False
            # Modes that were entered later, and not left yet, stay. On another thread it stays too.
            if any(mode is self for mode in overrides._get_current_function_mode_stack()):
                later = []
                while (mode := overrides._pop_mode()) is not self:
                    later.append(mode)
                for mode in reversed(later):
                    overrides._push_mode(mode)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._active and all(kind in _PLAIN for kind in types):
            if func is F.scaled_dot_product_attention:
                return scaled_dot_product_attention(*args, **kwargs)
            if func is F.multi_head_attention_forward:
                return _multi_head_attention_forward(*args, **kwargs)
        return func(*args, **kwargs)


def _rebound(function: types.FunctionType, **names) -> types.FunctionType:
    """A copy of a function in whose globals some names mean something else."""
    names = {**function.__globals__, **names}
    del names["__name__"]  # or torch.compile looks the names up in the module of that name
    copy = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# Torch offers this function to a mode as a whole, and runs its body outside of the mode.
_multi_head_attention_forward = _rebound(
    F.multi_head_attention_forward,
    has_torch_function=lambda tensors: False,
    scaled_dot_product_attention=scaled_dot_product_attention,
)
