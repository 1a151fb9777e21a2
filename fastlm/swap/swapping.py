"""`swap` and `unswap`: fastlm's forwards in a model that somebody already has."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fastlm.ops._check import fail
from fastlm.swap import huggingface
from fastlm.swap.fused import Swapped
from fastlm.swap.report import Row, SwapReport
from fastlm.swap.rules import KINDS, Plan, family_rules


def swap(
    model: nn.Module, *, only: str | Iterable[str] | None = None, strict: bool = False
) -> SwapReport:
    """Makes a model run on fastlm, in place, and says what was replaced, what was left and why.

    The modules stay the objects they are, with their parameters, buffers, hooks, training flags and
    state_dict keys: they change class, to a subclass of their own whose forward calls fastlm. A
    Hugging Face model also gets `attn_implementation="fastlm"` by its own public method, which
    writes to its config, so another model built on the same config object follows. Modules that
    were swapped before are reported and stay.

    Args:
        model: any module; it may contain Hugging Face models.
        only: limits the swap. Each entry is a kind ("attention", "ffn", "layer", "norm") or a
            pattern of module names as in `model.named_modules()` ("encoder.layer.0.*"). A module
            is taken if its kind is named, or none is, and if its name matches, or no pattern is
            given. "layer", torch.nn's encoder and decoder layers fused as a whole, is implied by
            the other three together.
        strict: raise, and change nothing, if anything that was asked for would be left.

    Raises:
        ValueError: nothing to swap, an entry of `only` that names nothing, or, with `strict`,
            something left.

    Dropout in swapped modules draws fastlm's masks, with the same probabilities.
    """
    if not isinstance(model, nn.Module):
        raise fail("swap", "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    choice = _Choice.of(model, only)
    plans, chosen = _plan(model), {}
    for name, module in model.named_modules():
        if module in plans and choice.takes(name, plans[module].kind):
            _choose(module, plans, chosen)
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, Swapped):
            cls = module._fastlm_original.__name__
            rows.append(Row(name, cls, module._fastlm_kind, True, module._fastlm_note))
        elif module in chosen:
            plan, cls = chosen[module], type(module).__name__
            rows.append(Row(name, cls, plan.kind, plan.cls is not None, plan.note))
    attention_rows, pretrained = _plan_attention(model, choice)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    report = SwapReport(tuple(sorted(rows + attention_rows, key=lambda row: order[row.name])))
    _require_success(report, strict)
    for hf_model in pretrained:
        huggingface.set_attention(hf_model)
    for module, plan in chosen.items():
        if plan.cls is not None:
            module.__class__ = plan.cls
    return report


def unswap(model: nn.Module) -> None:
    """Restores every swapped module's class, and the attention of Hugging Face models.

    Outputs are bitwise those from before `swap`; a model that is not swapped stays as it is.

    Raises:
        RuntimeError: something else (a parametrization, FSDP) changed the class of a swapped
            module since; nothing is restored then.
    """
    swapped = {name: m for name, m in model.named_modules() if isinstance(m, Swapped)}
    for name, module in swapped.items():
        if "_fastlm_recipe" not in vars(type(module)):
            got = f"{type(module).__name__}; undo what wrapped it first"
            raise fail("unswap", name, "have the class that swap gave it", got, RuntimeError)
    for module in swapped.values():
        module.__class__ = module._fastlm_original
    huggingface.restore_attention(model)


def is_swapped(model: nn.Module) -> bool:
    """Whether `unswap` would change anything."""
    return any(
        isinstance(module, Swapped) or "_fastlm_attention" in vars(module)
        for module in model.modules()
    )


@dataclass(frozen=True)
class _Choice:
    """`only`, understood."""

    kinds: frozenset[str]
    patterns: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, only) -> _Choice:
        entries = [only] if isinstance(only, str) else list(only or ())
        names = [name for name, _ in model.named_modules()]
        for entry in entries:
            if not isinstance(entry, str):
                raise fail("swap", "only", "have strings", type(entry).__name__, TypeError)
            if entry not in KINDS and not any(fnmatch.fnmatchcase(n, entry) for n in names):
                kinds = ", ".join(map(repr, KINDS))
                raise fail("swap", "only", f"be {kinds} or match a module's name", repr(entry))
        kinds = {entry for entry in entries if entry in KINDS}
        if kinds >= {"attention", "ffn", "norm"}:
            kinds.add("layer")
        return cls(frozenset(kinds), tuple(entry for entry in entries if entry not in KINDS))

    def takes(self, name: str, kind: str) -> bool:
        return (not self.kinds or kind in self.kinds) and (
            not self.patterns or any(fnmatch.fnmatchcase(name, p) for p in self.patterns)
        )


def _plan(model: nn.Module) -> dict[nn.Module, Plan]:
    """A plan for every module that a rule concerns; children before their parents."""
    rules, plans = family_rules(), {}
    for module in reversed(list(model.modules())):
        if isinstance(module, Swapped):
            continue
        found = (rule(module, plans) for rule in rules)
        plan = next((plan for plan in found if plan is not None), None)
        if plan is not None:
            plans[module] = plan
    return plans


def _choose(module: nn.Module, plans, chosen) -> None:
    """Takes a module, and those that its forward needs swapped."""
    if module in plans and module not in chosen:
        chosen[module] = plans[module]
        if plans[module].cls is not None:
            for other in plans[module].needs:
                _choose(other, plans, chosen)


def _plan_attention(model: nn.Module, choice: _Choice) -> tuple[list[Row], list[nn.Module]]:
    """Rows of Hugging Face attention modules, and the models whose attention is to change."""
    rows, change = [], []
    for prefix, hf_model in huggingface.pretrained_models(model):
        modules = [
            (f"{prefix}.{name}".strip("."), module)
            for name, module in huggingface.attention_modules(hf_model)
        ]
        taken = [(name, module) for name, module in modules if choice.takes(name, "attention")]
        reason = huggingface.refusal(hf_model) if taken else None
        if reason is None and len(taken) < len(modules):
            reason = "transformers sets attention for a whole model, not for some of its modules"
        for name, module in taken:
            replaced = reason is None or huggingface.uses_fastlm(module)
            note = f"attn_implementation={huggingface.NAME!r}" if replaced else reason
            rows.append(Row(name, type(module).__name__, "attention", replaced, note))
        if reason is None and not all(huggingface.uses_fastlm(module) for _, module in taken):
            change.append(hf_model)
    return rows, change


def _require_success(report: SwapReport, strict: bool) -> None:
    if strict and report.left:
        left = "; ".join(f"{row.name or 'the model'}: {row.note}" for row in report.left)
        raise fail("swap", "model", "have counterparts for everything with strict=True", left)
    if not report.replaced:
        left = "; ".join(f"{row.name or 'the model'}: {row.note}" for row in report.left)
        got = f"none ({left})" if left else "none"
        raise fail("swap", "model", "have at least one module with a counterpart in fastlm", got)
