"""Cross-entropy of a linear head as an autograd function over its two backends: kernels that
compute kept rows alone, and chunks of torch's functions.

The gradient of a head of 128k classes takes a gigabyte. So the backward of a mean or sum scales the
gradients that the forward made where they are, and gives them away; a second backward over a
retained graph makes them again. Compiled code, whose memory the compiler plans, and torch.func's
transforms keep them and scale a copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm.ops._chunked_loss import chunked_linear_cross_entropy
from fastlm.ops._library import contract
from fastlm.ops._transforms import (
    gradients,
    has_values,
    in_create_graph,
    in_functorch,
    in_plain_eager,
)
from fastlm.reference import loss as reference


def _gradient_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _fake(
    x, weight, bias, target, class_weight, dloss, dtype, ignore_index, label_smoothing, z_loss,
    softcap, mean, need_dx, need_dweight, need_dbias,
):  # fmt: skip
    new = lambda needed, shape, dtype=torch.float32: x.new_empty(
        shape if needed else (0,), dtype=dtype
    )
    return (
        new(True, target.shape),
        new(True, (1,)),
        new(need_dx, x.shape, _gradient_dtype(x)),
        new(need_dweight, weight.shape, _gradient_dtype(weight)),
        new(need_dbias, weight.shape[:1]),
    )


@contract(_fake)
def compact_linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    dloss: torch.Tensor | None,
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    mean: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlm.kernels import linear_loss

    return linear_loss.linear_cross_entropy(
        x, weight, bias, target, class_weight, dloss, dtype, ignore_index, label_smoothing, z_loss,
        softcap, mean, need_dx, need_dweight, need_dbias,
    )  # fmt: skip


@contract(lambda x, scale, dtype: x.new_empty(x.shape, dtype=dtype))
def scaled_gradient(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from fastlm.kernels import linear_loss

    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    linear_loss.scaled(x, scale, out)
    return out


@contract(lambda x, scale: None, mutates=("x",))
def scale_gradient_(x: torch.Tensor, scale: torch.Tensor) -> None:
    from fastlm.kernels import linear_loss

    linear_loss.scaled(x, scale, x)


def _torch_scaled(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x * scale).to(dtype)


def _torch_scale_(x: torch.Tensor, scale: torch.Tensor) -> None:
    seen = scale.device.type == "cpu" and has_values(scale)
    if not seen or scale != 1.0:  # a pass over a large tensor
        x.mul_(scale)


# Losses with gradients, a gradient times a number, and the same in place, by backend.
_CALLS = {
    "triton": (compact_linear_cross_entropy, scaled_gradient, scale_gradient_),
    "torch": (chunked_linear_cross_entropy, _torch_scaled, _torch_scale_),
}


class LinearCrossEntropy(torch.autograd.Function):
    """(x, weight, bias, target, ...) -> (loss, total, *grads); of rows, or reduced.

    Args of `apply`: tensors as the contract's, which by torch may be logits without a weight; the
    products' dtype; (ignore_index, label_smoothing, z_loss, softcap); the reduction; which of x,
    weight and bias want a gradient; the backend.
    """

    @staticmethod
    def forward(x, weight, bias, target, class_weight, dtype, options, reduction, need, impl):
        summed = reduction != "none"
        loss, total, *grads = _CALLS[impl][0](
            x, weight, bias, target, class_weight, None, dtype, *options,
            _mean_in_forward(reduction, dtype), *(summed and n for n in need),
        )  # fmt: skip
        if summed:
            loss = loss.sum()
        if reduction == "mean":
            loss = loss / _divisor(total)
        return loss, total, *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, dtype, options, reduction, _, impl = inputs
        _, total, *grads = output
        ctx.options = impl, dtype, *options, reduction
        ctx.mark_non_differentiable(total, *grads)
        ctx.set_materialize_grads(False)
        ctx.ready = None
        if reduction == "none":
            grads = []
        elif not torch.compiler.is_compiling() and not in_functorch():
            ctx.ready, grads = grads, []
        ctx.save_for_backward(*tensors, total, *grads)

    @staticmethod
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 10
        x, weight, bias, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if ctx.ready is not None and not in_create_graph():
            if not in_plain_eager():  # as many gradients as there are dloss: scaled in copies
                kept += ctx.ready
            else:
                grads, ctx.ready = ctx.ready, None
                scale = _scale(dloss, kept[2], ctx.options)
                return *_given(grads, scale, (x, weight, bias), needs, ctx.options[0]), *[None] * 7
        fused = _rowwise_gradients if ctx.options[-1] == "none" else _reduced_gradients
        grads = gradients(
            fused, _reference, (dloss,), (x, weight, bias), kept, ctx.options, needs
        )  # fmt: skip
        return *grads, *[None] * 7


def _mean_in_forward(reduction: str, dtype: torch.dtype) -> bool:
    """Whether gradients have the mean's factor before they are rounded; fp16's would underflow."""
    return reduction == "mean" and dtype != torch.float16


def _divisor(total: torch.Tensor) -> torch.Tensor:
    total = total.view(())
    return torch.where(total == 0.0, float("inf"), total)


def _scale(dloss: torch.Tensor, total: torch.Tensor, options: tuple) -> torch.Tensor:
    """What the gradients lack, one number."""
    _, dtype, *_, reduction = options
    if reduction == "mean" and not _mean_in_forward(reduction, dtype):
        return dloss / _divisor(total)
    return dloss


def _given(grads, scale, inputs, needs, impl) -> tuple[torch.Tensor | None, ...]:
    """Gradients that nobody else has, scaled in place where that saves memory."""
    _, scaled, scale_ = _CALLS[impl]
    out = []
    for g, x, needed in zip(grads, inputs, needs, strict=True):
        if not needed:
            out.append(None)
        elif g.dtype == x.dtype or impl == "torch":  # which would hold the product in fp32 too
            scale_(g, scale)
            out.append(g.to(x.dtype))
        else:
            out.append(scaled(g, scale, x.dtype))
    return tuple(out)


def _reduced_gradients(incoming, inputs, kept, options, needs):
    target, class_weight, total, *grads = kept
    impl, dtype, *numbers, reduction = options
    compute, scaled, _ = _CALLS[impl]
    scale = _scale(*incoming, total, options)
    if not grads:
        _, _, *grads = compute(
            *inputs, target, class_weight, None, dtype, *numbers,
            _mean_in_forward(reduction, dtype), *needs,
        )  # fmt: skip
    return tuple(
        scaled(g, scale, x.dtype) if n else None
        for g, x, n in zip(grads, inputs, needs, strict=True)
    )


def _rowwise_gradients(incoming, inputs, kept, options, needs):
    (dloss,), (target, class_weight, *_) = incoming, kept
    impl, dtype, *numbers, _ = options
    _, _, *grads = _CALLS[impl][0](
        *inputs, target, class_weight, dloss, dtype, *numbers, False, *needs
    )
    return tuple(g.to(x.dtype) if n else None for g, x, n in zip(grads, inputs, needs, strict=True))


def _reference(inputs, kept, options):
    (x, weight, bias), (target, class_weight, *_) = inputs, kept
    _, dtype, ignore_index, label_smoothing, z_loss, softcap, reduction = options
    x = x.masked_fill((target == ignore_index)[:, None], 0.0).to(dtype)
    if weight is not None:
        x = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    loss = reference.cross_entropy(
        x, target, class_weight=class_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, reduction=reduction,
        out_dtype=torch.promote_types(dtype, torch.float32),
    )  # fmt: skip
    return (loss,)
