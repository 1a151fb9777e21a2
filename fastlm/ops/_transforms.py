"""What torch's transforms ask of a fused function: derivatives of its derivatives, vmap, jvp.

A fused backward is not made of differentiable operations, and `once_differentiable` is silent
where the incoming gradient is a constant: `create_graph=True` would give gradients without a graph,
and a gradient penalty would count for nothing. Here they get the reference's graph instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

from fastlm.ops._check import without_autocast

Tensors = Sequence["torch.Tensor | None"]
# Why a backend of kernels refuses a call where `in_transform`.
TRANSFORM_REFUSAL = "does not run under torch.func.vmap and forward-mode differentiation"
_BATCHED = torch._C.DispatchKeySet(torch._C._parse_dispatch_key("VmapMode")).raw_repr()


def in_transform() -> bool:
    """Within torch.func.vmap or forward-mode differentiation, for which fused functions have no
    rule."""
    if torch.compiler.is_compiling():
        return False  # there the compiler refuses what it cannot trace
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    vmap = torch._C._functorch.TransformType.Vmap
    return any(i.key() == vmap for i in torch._C._functorch.get_interpreter_stack() or ())


def kernels_refuse(**tensors: torch.Tensor | None) -> str | None:
    """Why kernels that compute in fp32 cannot take a call with these tensors, by their names."""
    for name, t in tensors.items():
        if t is not None and t.dtype == torch.float64:
            return f"computes in fp32 and does not take a float64 {name}"
    return TRANSFORM_REFUSAL if in_transform() else None


def trains(*tensors: torch.Tensor | None) -> bool:
    """Whether one of them wants a gradient, so that a backward pass may come."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def in_functorch() -> bool:
    """Within any transform of torch.func, which take no hooks on saved tensors (checkpoint's)."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def in_batched_gradients() -> bool:
    """Within the vmap of `torch.autograd.grad(is_grads_batched=True)`, which is not torch.func's:
    incoming gradients then take no view in a function of ours, no `out=` and no branch."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._dispatch_tls_local_include_set().raw_repr() & _BATCHED)


def in_plain_eager() -> bool:
    """Neither compiled nor within a transform: calls may depend on data, and write in place."""
    compiling = torch.compiler.is_compiling()
    return not (compiling or in_functorch() or in_transform() or in_batched_gradients())


def has_values(x: torch.Tensor) -> bool:
    """Whether a branch may depend on what x holds: not for fake tensors and others like them."""
    return not torch._C._dispatch_keys(x).has(torch._C.DispatchKey.Python)


def in_create_graph() -> bool:
    """Within a backward whose gradients are to be differentiable. (Compiled code has none such: the
    compiler refuses second derivatives by itself.)"""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients(
    fused: Callable,
    reference: Callable,
    incoming: Tensors,
    inputs: Tensors,
    kept: Tensors,
    options: tuple,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `inputs` by `fused`, themselves differentiable where they are asked to be.

    Args:
        fused: (incoming, inputs, kept, options, needs) -> a gradient, or None, for each input.
        reference: (inputs, kept, options) -> the outputs whose gradients come in, as a tuple.
        incoming: gradients of the outputs; None stands for 0.
        inputs: what is differentiable.
        kept: other tensors of the call, such as a seed, and results of the forward pass.
        options: the rest of it.
        needs: which inputs want a gradient.
    """
    if in_create_graph():
        counts = len(incoming), len(inputs)
        call = (fused, reference, counts, tuple(options), tuple(needs))
        return _Gradients.apply(call, *incoming, *inputs, *kept)
    return fused(incoming, inputs, kept, options, needs)


class _Gradients(torch.autograd.Function):
    """`fused`, and as its derivative the reference's second one."""

    generate_vmap_rule = True  # jacobians: one call of the kernels for each incoming gradient

    @staticmethod
    def forward(*arguments):
        (fused, _, counts, options, needs), *tensors = arguments
        results, seen = [], []
        for g in fused(*_split(tensors, counts), options, needs):
            # One buffer may serve two inputs; autograd wants a tensor for each.
            results.append(g.clone() if any(g is other for other in seen) else g)
            seen += [] if g is None else [g]
        return tuple(results)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *ddinputs):
        _, reference, counts, options, needs = ctx.call
        saved = ctx.saved_tensors
        kept = saved[sum(counts) :]
        chosen = [i for i, n in enumerate(needs) if n]
        wanted = [i for i in range(sum(counts)) if ctx.needs_input_grad[1 + i]]

        def first(*values):
            incoming, inputs, _ = _split(_replaced(saved, wanted, values), counts)
            run = lambda *leaves: reference(_replaced(inputs, chosen, leaves), kept, options)
            outputs, pull = torch.func.vjp(run, *(inputs[i] for i in chosen))
            return pull(_filled(incoming, outputs))

        results = [None] * len(saved)
        with without_autocast(saved[counts[0]].device):
            grads, pull = torch.func.vjp(first, *(saved[i] for i in wanted))
            second = pull(_filled([ddinputs[i] for i in chosen], grads))
        for i, g in zip(wanted, second, strict=True):
            results[i] = g
        return None, *results


def _split(tensors: Tensors, counts: tuple[int, int]) -> tuple[Tensors, Tensors, Tensors]:
    first, second = counts[0], sum(counts)
    return tensors[:first], tensors[first:second], tensors[second:]


def _replaced(tensors: Tensors, places: list[int], values: Tensors) -> list[torch.Tensor | None]:
    tensors = list(tensors)
    for i, x in zip(places, values, strict=True):
        tensors[i] = x
    return tensors


def _filled(gradients: Tensors, like: Tensors) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.zeros_like(x) if g is None else g.to(x.dtype)
        for g, x in zip(gradients, like, strict=True)
    )
