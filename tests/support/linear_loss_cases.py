"""What the tests of linear_cross_entropy share: a head's inputs, the oracle, and the gradients."""

from __future__ import annotations

import torch

import fastlm
from fastlm.reference import loss as reference
from fastlm.testing import check_against_reference, nan_filled_empty, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]


def head_inputs(
    tokens, vocab, dim, dtype, device, *, bias=None, class_weight=None, ignore_index=-100
):
    """Hidden states, a head and targets, every third ignored; dtypes of bias and class weights."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    target[1::3] = ignore_index
    inputs = {
        "x": randn(tokens, dim, dtype=dtype, device=device),
        "weight": randn(vocab, dim, dtype=dtype, device=device, seed=2, scale=3 * dim**-0.5),
        "target": target.to(device),
    }
    if bias is not None:
        inputs["bias"] = randn(vocab, dtype=bias, device=device, seed=3)
    if class_weight is not None:
        inputs["class_weight"] = randn(vocab, device=device, seed=4).abs().to(class_weight)
    return inputs


def run_oracle(impl, inputs, gold=reference.linear_cross_entropy, frozen=(), **options):
    with nan_filled_empty():
        return check_against_reference(
            lambda **kw: fastlm.linear_cross_entropy(**kw, impl=impl),
            gold,
            inputs,
            frozen=("class_weight", *frozen),
            **options,
        )


def gradients(impl, inputs, **options):
    """The loss, and the gradients of its sum."""
    names = [n for n in ("x", "weight", "bias") if n in inputs]
    leaves = {n: inputs[n].detach().requires_grad_() for n in names}
    loss = fastlm.linear_cross_entropy(**{**inputs, **leaves}, impl=impl, **options)
    return loss, *torch.autograd.grad(loss.sum(), list(leaves.values()))
