"""Cross-entropy of a linear head in chunks of tokens: one (chunk, vocab) tile of logits at a time.

Each chunk's logits become its losses and, while they are there, its part of every gradient, so the
head is multiplied three times, as by eager, and no (tokens, vocab) tensor exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastlm.ops._check import fail
from fastlm.ops._library import contract
from fastlm.ops._transforms import gradients, in_create_graph, in_functorch
from fastlm.reference import loss as reference

# Logits of one chunk: 32 MB of fp32 stay near the caches of a CPU, 512 MB fill a GPU. A chunk has
# at least 256 rows, or its matrix products would be bound by reading the head.
_CHUNK = {"cpu": 2**23}
_CHUNK_ELSEWHERE = 2**27
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class _Options:
    label_smoothing: float
    z_loss: float
    softcap: float | None
    gradients: bool


def _fake(
    x, weight, bias, target, class_weight, dloss, dtype, ignore_index, label_smoothing, z_loss,
    softcap, need_dx, need_dweight, need_dbias,
):  # fmt: skip
    acc = torch.promote_types(dtype, torch.float32)
    new = lambda shape, needed: x.new_empty(shape if needed else (0,), dtype=acc)
    return (
        new(target.shape, True),
        new(target.shape, True),
        new(x.shape, need_dx),
        new(weight.shape, need_dweight),
        new(weight.shape[:1], need_dbias),
    )


@contract(_fake)
def chunked_linear_cross_entropy(
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
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, row_weight, dx, dweight, dbias), fp32 (fp64 for fp64); gradients not needed are empty.

    Args:
        x, weight, bias, target: (tokens, dim), (vocab, dim), (vocab,), (tokens,).
        dloss: (tokens,), the incoming gradient of each loss; None: 1 each.
        dtype: of the matrix products.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        acc = torch.promote_types(dtype, torch.float32)
        new = lambda shape, needed: x.new_zeros(shape if needed else (0,), dtype=acc)
        loss, row_weight = new(target.shape, True), new(target.shape, True)
        dx, dweight = new(x.shape, need_dx), new(weight.shape, need_dweight)
        dbias = new(weight.shape[:1], need_dbias)
        head = weight.to(dtype), None if bias is None else bias.to(dtype)
        classes = None if class_weight is None else class_weight.to(acc)
        options = _Options(label_smoothing, z_loss, softcap, need_dx or need_dweight or need_dbias)
        for rows in _chunks(target, ignore_index, weight.shape[0]):
            x_c, y, kept = x[rows].to(dtype), target[rows], target[rows] != ignore_index
            if x.device.type != "cpu":  # else there is no ignored row in the chunk
                x_c = x_c.masked_fill(~kept[:, None], 0.0)  # not even its NaN reaches a gradient
            grad = None if dloss is None else dloss[rows].to(acc)
            loss[rows], row_weight[rows], ds = _chunk(x_c, *head, y, kept, classes, grad, options)
            if need_dbias:
                dbias += ds.sum(0)
            if ds is not None:
                ds = ds.to(dtype)
            if need_dx:
                dx[rows] = (ds @ head[0]).to(acc)
            if need_dweight:
                _add_product(dweight, ds, x_c)
        return loss, row_weight, dx, dweight, dbias


class LinearCrossEntropy(torch.autograd.Function):
    """(x, weight, bias, target, ...) -> (loss, row_weight, *grads); per row, or losses summed.

    The sum has one incoming gradient, so the forward already makes the gradients, up to that
    factor; per row they are made in the backward, from logits computed again. The backward of a
    sum scales the gradients where they are and gives them away, as in `_linear_loss`.
    """

    @staticmethod
    def forward(x, weight, bias, target, class_weight, dtype, options, summed, need):
        loss, row_weight, *grads = chunked_linear_cross_entropy(
            x, weight, bias, target, class_weight, None, dtype, *options,
            *(summed and n for n in need),
        )  # fmt: skip
        return loss.sum() if summed else loss, row_weight, *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, dtype, options, summed, _ = inputs
        _, row_weight, *grads = output
        ctx.options = dtype, *options, summed
        ctx.mark_non_differentiable(row_weight, *grads)
        ctx.ready = None
        if not summed:
            grads = []
        elif not torch.compiler.is_compiling() and not in_functorch():
            ctx.ready, grads = grads, []
        ctx.save_for_backward(*tensors, *grads)

    @staticmethod
    def backward(ctx, dloss, *_):
        x, weight, bias, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if ctx.ready is not None and not in_create_graph():
            ready, ctx.ready = ctx.ready, None
            grads = tuple(
                g.mul_(dloss).to(t.dtype) if n else None
                for g, t, n in zip(ready, (x, weight, bias), needs, strict=True)
            )
            return *grads, *[None] * 6
        summed = ctx.options[-1]
        grads = gradients(
            _scaled_gradients if summed else _rowwise_gradients, _reference, (dloss,),
            (x, weight, bias), kept, ctx.options, needs,
        )  # fmt: skip
        return *grads, *[None] * 6


def _scaled_gradients(incoming, inputs, kept, options, needs):
    (dloss,), (target, class_weight, *grads), (*options, _) = incoming, kept, options
    if not grads:
        _, _, *grads = chunked_linear_cross_entropy(
            *inputs, target, class_weight, None, *options, *needs
        )
    # Out of place: a second backward over a retained graph finds them unscaled.
    return tuple(
        (g * dloss).to(x.dtype) if n else None for g, x, n in zip(grads, inputs, needs, strict=True)
    )


def _rowwise_gradients(incoming, inputs, kept, options, needs):
    *options, _ = options
    _, _, *grads = chunked_linear_cross_entropy(*inputs, *kept, *incoming, *options, *needs)
    return tuple(g.to(x.dtype) if n else None for g, x, n in zip(grads, inputs, needs, strict=True))


def _reference(inputs, kept, options):
    (x, weight, bias), (target, class_weight, *_) = inputs, kept
    dtype, ignore_index, label_smoothing, z_loss, softcap, summed = options
    x = x.masked_fill((target == ignore_index)[:, None], 0.0)
    logits = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    loss = reference.cross_entropy(
        logits, target, class_weight=class_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        reduction="sum" if summed else "none", out_dtype=torch.promote_types(dtype, torch.float32),
    )  # fmt: skip
    return (loss,)


def _chunks(target: torch.Tensor, ignore_index: int, vocab: int):
    """Yields the rows of each chunk: a slice, or the indices of rows that are not ignored.

    Which rows these are is known without a sync on the CPU alone; elsewhere every row is computed.
    """
    index, tokens = None, target.shape[0]
    if target.device.type == "cpu":
        kept = (target != ignore_index).nonzero().squeeze(1)
        outside = (target[kept] < 0) | (target[kept] >= vocab)
        if outside.any():
            first, classes = target[kept][outside][0].item(), f"from 0 to {vocab - 1}"
            raise fail(
                "linear_cross_entropy", "target", f"be ignore_index or {classes}", first, IndexError
            )
        if len(kept) < tokens:
            index, tokens = kept, len(kept)
    size = max(_CHUNK.get(target.device.type, _CHUNK_ELSEWHERE) // vocab, _CHUNK_ROWS)
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        yield rows if index is None else index[rows]


def _add_product(dweight: torch.Tensor, ds: torch.Tensor, x: torch.Tensor) -> None:
    """dweight += ds.T @ x; a product in half precision is made in slices, and added in fp32."""
    if dweight.dtype == ds.dtype:
        dweight.addmm_(ds.t(), x)
        return
    size = max(_CHUNK.get(x.device.type, _CHUNK_ELSEWHERE) // (4 * x.shape[1] + 1), _CHUNK_ROWS)
    for rows, columns in zip(dweight.split(size), ds.split(size, 1), strict=True):
        rows += columns.t() @ x


def _chunk(x, weight, bias, target, kept, w, dloss, options: _Options):
    """(loss, row_weight, dloss/dlogits) of some rows; formulas: `fastlm/reference/loss.py`.

    Works in place where it can: of (rows, vocab) there are two tensors, and s alone stays.
    """
    vocab, e = weight.shape[0], options.label_smoothing
    y = torch.where(kept, target, 0).long()[:, None]
    s = F.linear(x, weight, bias)
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    if options.softcap is not None:
        s = s.div_(options.softcap).tanh_().mul_(options.softcap)
    logp = s.log_softmax(-1)
    w_y = kept.to(s.dtype) if w is None else torch.where(kept, w[y[:, 0]], 0.0)
    loss = w_y * (1.0 - e) * -logp.gather(1, y)[:, 0]
    if e > 0.0:
        loss -= e / vocab * (logp.sum(1) if w is None else logp @ w)
    if options.z_loss > 0.0:
        lse = s.amax(1) - logp.amax(1)
        loss += options.z_loss * w_y * lse.square()
    loss = torch.where(kept, loss, 0.0)
    if not options.gradients:
        return loss, w_y, None
    row = kept.to(s.dtype) if dloss is None else torch.where(kept, dloss, 0.0)
    on_target = row * w_y * (1.0 - e)
    on_p = on_target
    if options.z_loss > 0.0:
        on_p = on_p + row * w_y * (2.0 * options.z_loss) * lse
    if e > 0.0:
        on_p = on_p + row * (e / vocab) * (vocab if w is None else w.sum())
    ds = logp.exp_().mul_(on_p[:, None])
    ds.scatter_(1, y, ds.gather(1, y) - on_target[:, None])
    if e > 0.0:
        ds.addr_(row, torch.ones_like(ds[0]) if w is None else w, alpha=-e / vocab)
    if options.softcap is not None:
        ds.sub_(s.square_().mul_(ds), alpha=options.softcap**-2)  # times 1 - tanh^2
    return loss, w_y, ds
