"""Cross-entropy of logits, and of a linear head without making its logits, as operators."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastlm.backends import Impl, choose, supports_all
from fastlm.ops._check import (
    autocast_dtype,
    fail,
    product_dtypes,
    require_choice,
    require_classes,
    require_device,
    require_float,
    require_probability,
    require_shape,
    require_tensor,
)
from fastlm.ops._chunked_loss import block_losses, row_losses
from fastlm.ops._library import apply, contract, in_eager
from fastlm.ops._linear_loss import LinearCrossEntropy
from fastlm.ops._rows import contiguous
from fastlm.ops._transforms import (
    gradients,
    in_plain_eager,
    in_transform,
    kernels_refuse,
    trains,
)
from fastlm.reference import loss as reference

REDUCTIONS = ("mean", "sum", "none")


def _cross_entropy_fwd_fake(
    logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap
):
    return tuple(logits.new_empty(target.shape, dtype=torch.float32) for _ in range(4))


@contract(_cross_entropy_fwd_fake)
def cross_entropy_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlm.kernels import loss

    return loss.cross_entropy_fwd(
        logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap
    )


def _cross_entropy_bwd_fake(
    logits, target, class_weight, row_max, log_sum, dloss, ignore_index, label_smoothing, z_loss,
    softcap,
):  # fmt: skip
    return logits.new_empty(logits.shape)


@contract(_cross_entropy_bwd_fake)
def cross_entropy_bwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    dloss: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> torch.Tensor:
    from fastlm.kernels import loss

    return loss.cross_entropy_bwd(
        logits, target, class_weight, row_max, log_sum, dloss,
        ignore_index, label_smoothing, z_loss, softcap,
    )  # fmt: skip


class _CrossEntropy(torch.autograd.Function):
    """(logits (outer, inner, vocab), target (outer, inner), ...) -> what `cross_entropy_fwd`
    returns of every row; differentiable is the loss."""

    @staticmethod
    def forward(logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap):
        return cross_entropy_fwd(
            logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, class_weight, *ctx.options = inputs
        _, *lse, row_weight = output
        ctx.mark_non_differentiable(*lse, row_weight)
        ctx.save_for_backward(logits, target, class_weight, *lse)

    @staticmethod
    def backward(ctx, dloss, *_):
        logits, *kept = ctx.saved_tensors
        (dlogits,) = gradients(
            _fused_gradients, _rowwise_reference, (dloss,), (logits,), kept, ctx.options, (True,)
        )
        return dlogits, *[None] * (2 + len(ctx.options))


def _fused_gradients(incoming, inputs, kept, options, needs):
    return (cross_entropy_bwd(*inputs, *kept, *incoming, *options),)


def _rowwise_reference(inputs, kept, options):
    (logits,), (target, class_weight, *_) = inputs, kept
    ignore_index, label_smoothing, z_loss, softcap = options
    loss = reference.cross_entropy(
        logits, target, class_weight=class_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, reduction="none",
        out_dtype=torch.float32,
    )  # fmt: skip
    return (loss,)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    impl: Impl | None = None,
) -> torch.Tensor:
    """Cross-entropy of integer targets, computed in fp32 whatever the logits' dtype.

    It is `torch.nn.functional.cross_entropy`, with the classes in the last dimension, except that
    "mean" over nothing (every row ignored, or no row) is 0 with gradient 0, not NaN.

    Args:
        logits: (..., vocab), fp16, bf16, fp32 (fp64 by the torch backend), any strides; never
            written to.
        target: (...), int64 or int32. One that is neither `ignore_index` nor a class is the
            caller's error, which cannot be seen without waiting for the GPU: the triton backend
            reads nothing and gives that row's loss and gradient as NaN; the torch backend raises on
            a CPU and fails a device assertion on a GPU.
        class_weight: (vocab,), any floating dtype, without a gradient. A row's loss is multiplied
            by its target's weight (in label smoothing each class by its own, as torch does), and
            "mean" divides by the sum of the targets' weights.
        ignore_index: rows with this target have loss 0 and gradient 0, and are not in the mean.
        label_smoothing: the part, from 0 to 1, of the target that is spread over all classes.
        z_loss: adds `z_loss * logsumexp(logits) ** 2` times the target's class weight to each row.
        softcap: the logits are `softcap * tanh(logits / softcap)` before anything else.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
        impl: the backend; None chooses (see `fastlm.explain`).

    Returns:
        () or, for reduction "none", as target; in the logits' dtype (fp32 under autocast, as
        torch). Differentiable in logits; gradients of gradients are the reference's.

    Raises:
        TypeError, ValueError: types, shapes, dtypes, devices or values that do not fit.

    Source: `fastlm/reference/loss.py`.
    """
    op = "cross_entropy"
    require_float(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise fail(op, "logits", "have at least one class in its last dimension",
                   tuple(logits.shape))  # fmt: skip
    options = (ignore_index, label_smoothing, z_loss, softcap)
    check_loss(op, logits, "(...) of logits (..., vocab)", target, logits.shape[-1], class_weight,
                reduction, *options)  # fmt: skip
    backend = choose(op, impl, _BACKENDS, logits.device, logits, class_weight)
    out_dtype = logits.dtype
    if autocast_dtype(logits.device) is not None:
        out_dtype = torch.promote_types(out_dtype, torch.float32)
    if backend == "torch":
        return _torch_cross_entropy(
            op, logits, target, class_weight, *options, reduction, out_dtype
        )
    class_weight = contiguous(class_weight)
    loss, *_, row_weight = apply(
        _CrossEntropy, *_as_3d(logits, target), class_weight, *as_numbers(*options)
    )  # fmt: skip
    if reduction == "none":
        return loss.view(target.shape).to(out_dtype)
    return reference.reduce(loss, row_weight, reduction).to(out_dtype)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    impl: Impl | None = None,
) -> torch.Tensor:
    """`cross_entropy(x @ weight.T + bias, target)` without the logits: a language model's head.

    Tokens are taken in chunks, so there is never a (tokens, vocab) tensor, and rows whose target is
    `ignore_index` are not computed: on a GPU by kernels that read how many rows are kept from the
    device, which nothing waits for. With "mean" and "sum" the gradients are made together with the
    loss, at the cost of eager's three matrix products; with "none" the backward computes the logits
    again. Gradients are summed in fp32 (a bf16 weight's over a chunk, and rounded once a chunk, at
    most 8 times), and a frozen weight, bias or x costs nothing.

    Memory beyond inputs and gradients, on a GPU: the logits of a chunk, at most 384 MB or an eighth
    of all logits in the products' dtype, whichever is more, and its x and dx: in all below 512 MB
    for 8,192 tokens by 4,096 by 128,256 in bf16, where eager takes over 6 GB. To that come a copy
    of each input whose dtype is not the products', and fp32 sums for fp16 gradients. With "mean"
    and "sum" the gradients exist from the forward pass on, and the backward hands them over; a
    second backward of a retained graph computes them again. The torch backend has chunks of 32 MB
    of fp32 logits on a CPU, where it makes the logits of small heads (up to 4 MB), and of 512 MB on
    a GPU, where it computes ignored rows too; of a bf16 weight's gradient over more than 8 chunks
    it has fp32 sums.

    Args:
        x: (..., dim), any floating dtype and strides.
        weight: (vocab, dim), as `torch.nn.Linear` has it.
        target: (...), int64 or int32. One that is neither `ignore_index` nor a class is NaN by the
            triton backend, in that row's loss and in the gradients; the torch backend raises
            IndexError on a CPU and fails a device assertion on a GPU.
        bias: (vocab,).

    The other arguments and the errors are `cross_entropy`'s. The products are taken in the widest
    dtype of x, weight and bias, or in autocast's.

    Returns:
        () or, for reduction "none", as target; in the products' dtype (fp32 under autocast).
        Differentiable in x, weight and bias, each with a gradient of its own dtype; gradients of
        gradients are the reference's, which makes the logits.

    Source: `fastlm/reference/loss.py`.
    """
    op = "linear_cross_entropy"
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None or name != "bias":
            require_float(op, name, t)
            require_device(op, name, t, x.device)
    if x.dim() == 0:
        raise fail(op, "x", "have shape (..., dim)", tuple(x.shape))
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        constraint = f"have shape (vocab, dim) = (at least 1, {x.shape[-1]})"
        raise fail(op, "weight", constraint, tuple(weight.shape))
    if bias is not None:
        require_shape(op, "bias", bias, weight.shape[:1], "(vocab,)")
    options = (ignore_index, label_smoothing, z_loss, softcap)
    check_loss(op, x, "(...) of x (..., dim)", target, weight.shape[0], class_weight, reduction,
                *options)  # fmt: skip
    backend = choose(op, impl, _LINEAR_BACKENDS, x.device, x, weight, bias, class_weight)
    dtype, out_dtype = product_dtypes(x, weight, bias)
    if backend == "triton" and x.shape[-1] == 0:  # whose kernels have no grid for it
        x, weight = F.pad(x, (0, 1)), F.pad(weight, (0, 1))
    grad = torch.is_grad_enabled()
    need = tuple(grad and t is not None and t.requires_grad for t in (x, weight, bias))
    options = as_numbers(*options)
    if in_transform():  # for which the chunks have no rule
        return reference.linear_cross_entropy(
            x, weight, target, bias=bias, class_weight=class_weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, reduction=reduction,
            out_dtype=out_dtype,
        )  # fmt: skip
    if backend == "torch" and _is_small_head(
        x, weight, bias, target, class_weight, dtype, *options
    ):
        logits = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        return _torch_cross_entropy(
            op, logits, target, class_weight, *options, reduction, out_dtype
        )
    x, y = x.reshape(target.numel(), x.shape[-1]), target.reshape(-1)
    inputs = x, weight, contiguous(bias), y, class_weight
    loss, *_ = apply(LinearCrossEntropy, *inputs, dtype, options, reduction, need, backend)
    return (loss.view(target.shape) if reduction == "none" else loss).to(out_dtype)


def check_loss(
    op, x, form, target, vocab, class_weight, reduction, ignore_index, label_smoothing, z_loss,
    softcap, target_name="target",
) -> None:  # fmt: skip
    """The checks that losses share; `x` is (..., dim), described by `form` up to its last."""
    require_tensor(op, target_name, target)
    if target.dtype not in (torch.int64, torch.int32):
        raise fail(op, target_name, "have dtype torch.int64 or torch.int32", target.dtype)
    require_shape(op, target_name, target, x.shape[:-1], form)
    require_device(op, target_name, target, x.device)
    if class_weight is not None:
        require_float(op, "class_weight", class_weight)
        require_shape(op, "class_weight", class_weight, (vocab,), "(vocab,)")
        require_device(op, "class_weight", class_weight, x.device)
        if class_weight.requires_grad and torch.is_grad_enabled():
            constraint = "have requires_grad=False, for it gets no gradient"
            raise fail(op, "class_weight", constraint, True)
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise fail(op, "ignore_index", "be an int", type(ignore_index).__name__, TypeError)
    if not -(2**63) <= ignore_index < 2**63:
        raise fail(op, "ignore_index", "be a 64-bit integer", ignore_index)
    require_probability(op, "label_smoothing", label_smoothing)
    _require_number(op, "z_loss", z_loss, "be a finite number of at least 0", lambda z: z >= 0)
    if softcap is not None:
        _require_number(op, "softcap", softcap, "be None or a finite number above 0",
                        lambda c: c > 0)  # fmt: skip
    require_choice(op, "reduction", reduction, REDUCTIONS)


def as_numbers(ignore_index, label_smoothing, z_loss, softcap) -> tuple:
    """A loss's options as contracts declare them, where users may write an int for a float."""
    softcap = None if softcap is None else float(softcap)
    return ignore_index, float(label_smoothing), float(z_loss), softcap


def _require_number(op, arg, value, constraint, holds) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise fail(op, arg, constraint, type(value).__name__, TypeError)
    if not (-math.inf < value < math.inf and holds(value)):  # Dynamo cannot trace math.isfinite
        raise fail(op, arg, constraint, value)


def _triton_refuses(logits, class_weight) -> str | None:
    return kernels_refuse(logits=logits, class_weight=class_weight)


def _linear_triton_refuses(x, weight, bias, class_weight) -> str | None:
    return kernels_refuse(x=x, weight=weight, bias=bias, class_weight=class_weight)


# Triton first: two passes over the logits, where torch makes an fp32 copy and its log-softmax of
# them (benchmarks/results/loss.csv).
_BACKENDS = {"triton": _triton_refuses, "torch": supports_all}
_LINEAR_BACKENDS = {"triton": _linear_triton_refuses, "torch": supports_all}


def _torch_cross_entropy(
    op, logits, target, class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction,
    out_dtype,
):  # fmt: skip
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    flat, y = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    try:
        if trains(logits) and _by_blocks(flat):
            numbers = as_numbers(ignore_index, label_smoothing, z_loss, softcap)
            loss, *_ = apply(LinearCrossEntropy, flat, None, None, y, class_weight, logits.dtype,
                             numbers, reduction, (True, False, False), "torch")  # fmt: skip
        elif z_loss > 0.0 or softcap is not None:
            return reference.cross_entropy(
                logits, target, class_weight=class_weight, z_loss=z_loss, softcap=softcap,
                reduction=reduction, out_dtype=out_dtype, **options,
            )  # fmt: skip
        else:
            loss = _torch_loss(flat, y.long(), class_weight, reduction, out_dtype, **options)
    except (IndexError, RuntimeError):
        if logits.device.type == "cpu":  # which has read the targets
            require_classes(op, "target", y, ignore_index, logits.shape[-1])
        raise
    return (loss.view(target.shape) if reduction == "none" else loss).to(out_dtype)


# From how many logits on, 4 MB of fp32, a CPU goes block by block: they do not stay in its caches.
_BLOCKS_FROM = 2**20


def _by_blocks(logits: torch.Tensor) -> bool:
    """Whether a CPU goes block by block, loss and gradient in one go; where nothing compiles it."""
    return logits.numel() >= _BLOCKS_FROM and logits.device.type == "cpu" and in_plain_eager()


# Up to how many logits of a head, 4 MB of fp32, a CPU makes them: chunks would cost more in calls.
_SMALL_HEAD = 2**20


def _is_small_head(
    x, weight, bias, target, class_weight, dtype, ignore_index, label_smoothing, z_loss, softcap
) -> bool:
    """Whether torch's functions are as good: no row is ignored, whose NaN would spread, and fp16
    does not have to hold gradients of logits, which are small."""
    if x.device.type != "cpu" or target.numel() * weight.shape[0] > _SMALL_HEAD:
        return False
    if z_loss > 0.0 or softcap is not None or dtype == torch.float16:
        return False
    ordinary = in_eager((x, weight, bias, target, class_weight)) and in_plain_eager()
    return ordinary and bool((target != ignore_index).all())


def _torch_loss(logits, target, class_weight, reduction, out_dtype, **options) -> torch.Tensor:
    """torch's loss in fp32 at least, but for the mean over nothing."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    weight = None if class_weight is None else class_weight.to(acc)
    if not trains(logits):
        once = weight is None and options["label_smoothing"] == 0.0 and out_dtype == logits.dtype
        rows, blocks = logits.dtype if once else acc, _by_blocks(logits)
        if blocks or rows != acc:
            losses = block_losses if blocks else row_losses
            loss = losses(logits, target, weight, rows, **options).to(acc)
            return reference.reduce(loss, _row_weights(target, weight, **options), reduction)
    logits = logits.to(acc)
    if reduction != "mean":
        return F.cross_entropy(logits, target, weight, reduction=reduction, **options)
    if logits.device.type == "cpu" and in_eager((logits, target, weight)):
        loss = F.cross_entropy(logits, target, weight, **options)
        if not math.isnan(loss.item()):
            return loss
    loss = F.cross_entropy(logits, target, weight, reduction="sum", **options)
    return reference.reduce(loss, _row_weights(target, weight, **options), "mean")


def _row_weights(target, weight, *, ignore_index, label_smoothing) -> torch.Tensor:
    kept = target != ignore_index
    return kept if weight is None else torch.where(kept, weight[torch.where(kept, target, 0)], 0.0)


def _as_3d(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As (outer, inner, vocab) and (outer, inner): logits[:, :-1] of a batch is not copied."""
    vocab = logits.shape[-1]
    if logits.dim() < 3:
        logits = logits.reshape(1, -1, vocab)
    elif logits.dim() > 3:
        logits = logits.reshape(-1, logits.shape[-2], vocab)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return logits, target.reshape(logits.shape[:-1]).contiguous()
