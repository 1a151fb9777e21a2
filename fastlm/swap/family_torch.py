"""torch.nn's modules, which become fastlm's layers of the same name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fastlm import layers
from fastlm.layers._modules import is_changed
from fastlm.swap.fused import Swapped
from fastlm.swap.rules import Plan, Rule, become, leave, own_forward
from fastlm.swap.structure import untouched

# Overriding these changes no forward.
_HARMLESS = {"__init__", "extra_repr", "reset_parameters"}


class _Layer(Swapped):
    """In front of an encoder or decoder layer of fastlm and of torch.

    fastlm's layer fuses the dropouts and the residual adds into the norms. Where one of those has
    hooks or a forward of its own, or was replaced, torch's forward runs, over swapped attention and
    norms.
    """

    _fastlm_layer: type
    impl = None

    def forward(self, *args, **kwargs):
        norms = [m for name, m in self.named_children() if name.startswith("norm")]
        dropouts = [m for name, m in self.named_children() if name.startswith("dropout")]
        fused = all(isinstance(norm, layers.LayerNorm) and not is_changed(norm) for norm in norms)
        if fused and all(untouched(dropout, nn.Dropout) for dropout in dropouts):
            return super().forward(*args, **kwargs)
        return super(self._fastlm_layer, self).forward(*args, **kwargs)


class _EncoderLayer(_Layer, layers.TransformerEncoderLayer):
    _fastlm_layer = layers.TransformerEncoderLayer


class _DecoderLayer(_Layer, layers.TransformerDecoderLayer):
    _fastlm_layer = layers.TransformerDecoderLayer


def _module(original: type, layer: type, kind: str) -> Rule:
    """A rule for a class whose counterpart needs nothing but its own attributes."""

    def rule(module: nn.Module, plans: Mapping[nn.Module, Plan]) -> Plan | None:
        if not isinstance(module, original) or isinstance(module, layer):
            return None
        if reason := _differs(module, original):
            return leave(kind, reason)
        return become(kind, module, layer, f"fastlm.layers.{layer.__name__}")

    return rule


def _layer(original: type, mixin: type[_Layer]) -> Rule:
    """A rule for encoder and decoder layers, whose norms must become fastlm's."""
    layer = mixin._fastlm_layer

    def rule(module: nn.Module, plans: Mapping[nn.Module, Plan]) -> Plan | None:
        if not isinstance(module, original) or isinstance(module, layer):
            return None
        if reason := _differs(module, original):
            return leave("layer", reason)
        norms = {name: m for name, m in module.named_children() if name.startswith("norm")}
        for name, norm in norms.items():
            if not _becomes(norm, layers.LayerNorm, plans):
                return leave("layer", f"{name} is not a plain torch.nn.LayerNorm")
        what = f"fastlm.layers.{layer.__name__}"
        return become("layer", module, mixin, what, needs=tuple(norms.values()))

    return rule


def _stack(original: type, layer: type, inner: type) -> Rule:
    """A rule for stacks: torch's would hand padded batches over as nested tensors."""

    def rule(module: nn.Module, plans: Mapping[nn.Module, Plan]) -> Plan | None:
        if not isinstance(module, original) or isinstance(module, layer):
            return None
        if reason := _differs(module, original):
            return leave("layer", reason)
        if not all(_becomes(child, inner, plans) for child in module.layers):
            return leave("layer", f"not all of its layers become fastlm.layers.{inner.__name__}")
        what = f"fastlm.layers.{layer.__name__}"
        return become("layer", module, layer, what, needs=tuple(module.layers))

    return rule


def _becomes(module: nn.Module, layer: type, plans: Mapping[nn.Module, Plan]) -> bool:
    plan = plans.get(module)
    return isinstance(module, layer) or (
        plan is not None and plan.cls is not None and issubclass(plan.cls, layer)
    )


def _differs(module: nn.Module, original: type) -> str | None:
    """Why the module may not compute what `original` does; None if it does."""
    for cls in type(module).__mro__:
        if cls is original:
            return own_forward(module)
        changed = {name for name in vars(cls) if callable(getattr(original, name, None))}
        changed -= _HARMLESS | set(vars(object))
        if changed:
            return f"{cls.__name__} overrides {', '.join(sorted(changed))}"
    return None


RULES = (
    _module(nn.LayerNorm, layers.LayerNorm, "norm"),
    _module(nn.RMSNorm, layers.RMSNorm, "norm"),
    _module(nn.MultiheadAttention, layers.MultiheadAttention, "attention"),
    _layer(nn.TransformerEncoderLayer, _EncoderLayer),
    _layer(nn.TransformerDecoderLayer, _DecoderLayer),
    _stack(nn.TransformerEncoder, layers.TransformerEncoder, layers.TransformerEncoderLayer),
    _stack(nn.TransformerDecoder, layers.TransformerDecoder, layers.TransformerDecoderLayer),
)
