"""The table of what can be swapped: one entry per kind of block, one file per family.

A rule names the classes to look at by pattern; what such a class computes decides (see
`structure`). So copies of a block in other architectures need no entry of their own, or one name.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastlm.swap import structure
from fastlm.swap.fused import Fused, swapped_class

KINDS = ("attention", "ffn", "layer", "norm")


@dataclass(frozen=True)
class Plan:
    """What to do with a module: become `cls`, or stay, because of `note`.

    Attributes:
        kind: one of `KINDS`.
        note: what runs instead, or why the module is left.
        needs: modules that must be swapped too if this one is.
    """

    kind: str
    cls: type | None
    note: str
    needs: tuple[nn.Module, ...] = ()


# (module, the plans made for its descendants) -> a plan, or None if the rule does not concern it.
Rule = Callable[[nn.Module, Mapping[nn.Module, Plan]], "Plan | None"]


def leave(kind: str, reason: str) -> Plan:
    return Plan(kind, None, reason)


def become(
    kind: str, module: nn.Module, mixin: type, what: str, facts: tuple = (), needs: tuple = ()
) -> Plan:
    """The plan to run `mixin`'s forward; `facts` as in `swapped_class`."""
    facts = (*facts, ("_fastlm_kind", kind), ("_fastlm_note", what))
    return Plan(kind, swapped_class(type(module), mixin, facts), what, needs)


@dataclass(frozen=True)
class BlockRule:
    """Blocks that compute one of the formulas of `fused`.

    Attributes:
        kind: one of `KINDS`.
        names: patterns of class names.
        fused: the forwards that may replace theirs.
    """

    kind: str
    names: tuple[str, ...]
    fused: tuple[type[Fused], ...]

    def __call__(self, module: nn.Module, plans: Mapping[nn.Module, Plan]) -> Plan | None:
        if not matches(module, self.names):
            return None
        children = list(module.children())
        if not any(structure.is_linear(child) for child in children):
            return None  # something else of that name
        if overridden := own_forward(module):
            return leave(self.kind, overridden)
        try:
            found = structure.formula(module)
        except structure.Unreadable:
            return leave(self.kind, "its forward is not a chain of its children")
        for fused in self.fused:
            if found.text in fused.formulas:
                return self._plan(module, fused, found)
        return leave(self.kind, f"no fused form of {found.text}")

    def _plan(self, module, fused, found) -> Plan:
        for name in found.children:
            child = getattr(module, name)
            if not structure.untouched(child, structure.original_class(child)):
                return leave(self.kind, f"{name} has hooks or a forward of its own")
        facts = fused.facts(module, found)
        activation = dict(facts).get("_fastlm_activation")
        what = f"{fused.what} ({activation})" if activation else fused.what
        return become(self.kind, module, fused, what, facts)


def matches(module: nn.Module, names: tuple[str, ...]) -> bool:
    name = type(module).__name__
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in names)


def own_forward(module: nn.Module) -> str | None:
    """Why the class does not say all of what calling this instance does; None if it does."""
    if "forward" in vars(module):
        return "its forward was set on the instance"
    if is_parametrized(module):
        return "it is parametrized"
    return None


def family_rules() -> tuple[Rule, ...]:
    """Every rule; the first that concerns a module decides."""
    from fastlm.swap import family_bert, family_mlp, family_rms, family_torch

    families = (family_torch, family_bert, family_mlp, family_rms)
    return tuple(rule for family in families for rule in family.RULES)
