"""When layers may read a module's parameters and settings instead of calling it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_modules


def is_plain(module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class does and nothing else."""
    return type(module) is kind and not is_changed(module)


def is_changed(module: nn.Module) -> bool:
    """Whether a call does more than the class says: hooks want to see it, and offloading and kernel
    libraries set `forward` on the instance."""
    return "forward" in module.__dict__ or has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Its own, or those of all modules."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
        or torch_modules._global_backward_hooks
        or torch_modules._global_backward_pre_hooks
    )


def dropout_rate(dropout: nn.Module) -> float | None:
    """What a dropout module would drop now: layers fuse it but keep the module for its settings.
    None where it has to be called, for it is changed or no plain dropout."""
    if is_plain(dropout, nn.Identity):
        return 0.0
    if is_plain(dropout, nn.Dropout):
        return dropout.p if dropout.training else 0.0
    return None


def add_norm(norm: nn.Module, dropout: nn.Module, x, residual, *, prenorm: bool = False):
    """norm(residual + dropout(x)) by a norm of ours, in one pass where the dropout may be fused."""
    dropout_p = dropout_rate(dropout)
    if dropout_p is None:
        x, dropout_p = dropout(x), 0.0
    return norm(x, residual, dropout_p=dropout_p, prenorm=prenorm)
