"""The forwards that swapped modules run: each is a mixin in front of the module's own class.

A mixin reads the parameters of the module's children and calls one operator where the module called
several children. Whenever that would be something else than calling them (a hook, an adapter or a
parametrization on a child, an unusual call), it runs the module's own forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm.layers._modules import dropout_rate
from fastlm.ops.ffn import bias_act, ffn, gated_ffn, glu
from fastlm.ops.norm import layer_norm, rms_norm
from fastlm.swap.structure import (
    activation_name,
    linear_weight,
    original_class,
    untouched,
)


class Swapped:
    """What every swapped module's class derives from; `unswap` gives `_fastlm_original` back."""

    _fastlm_original: type
    _fastlm_recipe: tuple  # the arguments of `swapped_class`, for copies and pickles

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _revive, type(self)._fastlm_recipe, *state


_classes: dict[tuple, type] = {}


def swapped_class(original: type, mixin: type, facts: tuple = ()) -> type:
    """`original` with `mixin` in front of it; the same class for the same arguments.

    Args:
        facts: (name, value) pairs that become attributes of the class.
    """
    recipe = (original, mixin, facts)
    if recipe not in _classes:
        bases = (mixin, original) if issubclass(mixin, Swapped) else (Swapped, mixin, original)
        attributes = {
            **dict(facts),
            "__module__": __name__,
            "__doc__": original.__doc__,
            "_fastlm_original": original,
            "_fastlm_recipe": recipe,
        }
        _classes[recipe] = type(f"Fastlm{original.__name__}", bases, attributes)
    return _classes[recipe]


def _revive(original, mixin, facts):
    cls = swapped_class(original, mixin, facts)
    return cls.__new__(cls)


class Fused(Swapped):
    """A forward over children that play known roles."""

    formulas: dict[str, tuple[str, ...]] = {}  # text -> the role of each child, in its order
    what = ""  # for the report
    # Set by `facts`:
    _fastlm_inputs: int
    _fastlm_children: tuple[tuple[str, str, object], ...]  # (role, attribute, class or function)

    @classmethod
    def facts(cls, module, found) -> tuple:
        """What `swapped_class` takes for a module whose `Formula` is one of `formulas`."""
        roles = cls.formulas[found.text]
        children = tuple(
            (role, name, original_class(getattr(module, name)))
            for role, name in zip(roles, found.children, strict=True)
        )
        names = {role: name for role, name, _ in children}
        facts = [("_fastlm_inputs", found.inputs), ("_fastlm_children", children)]
        if "act" in names:
            facts.append(("_fastlm_activation", activation_name(getattr(module, names["act"]))))
        facts += [(f"_fastlm_{role}", name) for role, name in names.items() if role != "act"]
        return tuple(facts)

    def forward(self, *args, **kwargs):
        usual = not kwargs and len(args) == self._fastlm_inputs
        if usual and all(untouched(getattr(self, n), c) for _, n, c in self._fastlm_children):
            return self._fused(*args)
        return super().forward(*args, **kwargs)


class LinearAct(Fused):
    """activation(linear(x)): the bias moves from the product into the activation's kernel."""

    formulas = {"act(linear(x))": ("act", "linear")}
    what = "bias_act"

    def _fused(self, x):
        linear = getattr(self, self._fastlm_linear)
        x = F.linear(x, linear_weight(linear))
        return bias_act(x, linear.bias, activation=self._fastlm_activation)


class LinearDropoutAddNorm(Fused):
    """LayerNorm(dropout(linear(x)) + residual), the end of a post-norm sublayer."""

    formulas = {"norm(dropout(linear(x)) + y)": ("norm", "dropout", "linear")}
    what = "linear, then layer_norm(residual=)"

    def _fused(self, x, residual):
        linear, norm = getattr(self, self._fastlm_linear), getattr(self, self._fastlm_norm)
        x = F.linear(x, linear_weight(linear), linear.bias)
        # The sum has the wider dtype, and so has its norm; under autocast the operator sees to it.
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.promote_types(x.dtype, residual.dtype))
        dropout_p = dropout_rate(getattr(self, self._fastlm_dropout))
        return layer_norm(
            x, norm.weight, norm.bias, eps=norm.eps, residual=residual, dropout_p=dropout_p
        )


class FeedForward(Fused):
    """linear2(dropout(activation(linear1(x)))), with or without either dropout."""

    formulas = {
        "linear(act(linear(x)))": ("w2", "act", "w1"),
        "linear(dropout(act(linear(x))))": ("w2", "inner", "act", "w1"),
        "dropout(linear(act(linear(x))))": ("outer", "w2", "act", "w1"),
        "dropout(linear(dropout(act(linear(x)))))": ("outer", "w2", "inner", "act", "w1"),
    }
    what = "ffn"
    _fastlm_inner = _fastlm_outer = None

    def _fused(self, x):
        w1, w2 = getattr(self, self._fastlm_w1), getattr(self, self._fastlm_w2)
        inner = self._fastlm_inner and getattr(self, self._fastlm_inner)
        if w1.weight.dtype != w2.weight.dtype:
            return super(Fused, self).forward(x)  # some models convert between the two
        x = ffn(
            x,
            linear_weight(w1),
            w1.bias,
            linear_weight(w2),
            w2.bias,
            activation=self._fastlm_activation,
            dropout_p=dropout_rate(inner) if inner else 0.0,
        )
        return getattr(self, self._fastlm_outer)(x) if self._fastlm_outer else x


class GatedFeedForward(Fused):
    """down(activation(gate(x)) * up(x)), with or without dropout of the product."""

    formulas = {
        "linear(act(linear(x)) * linear(x))": ("down", "act", "gate", "up"),
        "linear(dropout(act(linear(x)) * linear(x)))": ("down", "inner", "act", "gate", "up"),
    }
    what = "gated_ffn"
    _fastlm_inner = None

    def _fused(self, x):
        gate, up = getattr(self, self._fastlm_gate), getattr(self, self._fastlm_up)
        down = getattr(self, self._fastlm_down)
        if not gate.weight.dtype == up.weight.dtype == down.weight.dtype:
            return super(Fused, self).forward(x)  # some models convert between them
        activation = self._fastlm_activation
        inner = self._fastlm_inner and getattr(self, self._fastlm_inner)
        dropped = inner and dropout_rate(inner) > 0.0
        biased = any(linear.bias is not None for linear in (gate, up, down))
        if not dropped and not biased:
            weights = (linear_weight(linear) for linear in (gate, up, down))
            return gated_ffn(x, *weights, activation=activation)
        hidden = glu(gate(x), up(x), activation=activation)
        return down(inner(hidden) if inner else hidden)


class RMSNorm(Swapped):
    """A Hugging Face RMSNorm, whose rounding `casting` reproduces."""

    what = "rms_norm"
    _fastlm_eps: str  # the attribute that holds it
    _fastlm_casting: str

    def forward(self, *args, **kwargs):
        if kwargs or len(args) != 1 or args[0].dtype != self.weight.dtype:
            return super().forward(*args, **kwargs)  # variants differ in what they convert
        eps = getattr(self, self._fastlm_eps)
        return rms_norm(args[0], self.weight, eps=eps, casting=self._fastlm_casting)
