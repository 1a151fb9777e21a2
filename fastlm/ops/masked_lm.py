"""The losses of BERT's pre-training from hidden states: masked language model, next sentence."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm.backends import Impl, choose, supports_all
from fastlm.ops._check import (
    fail,
    product_dtypes,
    require_choice,
    require_classes,
    require_device,
    require_eps,
    require_float,
    require_shape,
    without_autocast,
)
from fastlm.ops._library import apply, contract
from fastlm.ops._linear_loss import LinearCrossEntropy
from fastlm.ops._rows import contiguous
from fastlm.ops._transforms import gradients, has_values, in_plain_eager, kernels_refuse
from fastlm.ops.loss import as_numbers, check_loss, cross_entropy, linear_cross_entropy
from fastlm.ops.norm import layer_norm
from fastlm.reference import loss as reference
from fastlm.reference.ffn import ACTIVATIONS as FUNCTIONS

_WIDEST = 8192  # a row of the transform stays in registers


def _fwd_fake(
    x, target, dense_weight, dense_bias, norm_weight, norm_bias, dtype, activation, eps,
    ignore_index,
):  # fmt: skip
    from fastlm.kernels.compact import padded_shape

    tokens, width = x.shape[0], dense_weight.shape[0]
    return (
        x.new_empty((tokens, width), dtype=dtype),
        x.new_empty(tokens, dtype=torch.int64),
        x.new_empty(tokens, dtype=torch.int32),
        x.new_empty(1, dtype=torch.int32),
        x.new_empty(padded_shape(tokens, width, x.device), dtype=dtype),
        x.new_empty(tokens, dtype=torch.float32),
        x.new_empty(tokens, dtype=torch.float32),
    )


@contract(_fwd_fake)
def masked_transform_fwd(
    x: torch.Tensor,
    target: torch.Tensor,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    dtype: torch.dtype,
    activation: str,
    eps: float,
    ignore_index: int,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor,
]:  # fmt: skip
    from fastlm.kernels import masked_lm

    return masked_lm.masked_transform_fwd(
        x, target, dense_weight, dense_bias, norm_weight, norm_bias, dtype, activation, eps,
        ignore_index,
    )  # fmt: skip


def _bwd_fake(
    dy, x, dense_weight, norm_weight, index, count, z, mean, rstd, activation, need_dx, need_dweight
):
    vector = lambda: x.new_empty(dense_weight.shape[0], dtype=torch.float32)
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        dense_weight.new_empty(dense_weight.shape if need_dweight else (0,)),
        *(vector() for _ in range(3)),
    )


@contract(_bwd_fake)
def masked_transform_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    dense_weight: torch.Tensor,
    norm_weight: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    z: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    activation: str,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlm.kernels import masked_lm

    return masked_lm.masked_transform_bwd(
        dy, x, dense_weight, norm_weight, index, count, z, mean, rstd, activation, need_dx,
        need_dweight,
    )  # fmt: skip


class _MaskedTransform(torch.autograd.Function):
    """(x, dense_weight, dense_bias, norm_weight, norm_bias, target, ...) -> what the contract
    returns; differentiable is y, whose rows behind the masked ones get no gradient."""

    @staticmethod
    def forward(
        x, dense_weight, dense_bias, norm_weight, norm_bias, target, dtype, activation, eps,
        ignore_index,
    ):  # fmt: skip
        return masked_transform_fwd(
            x, target, dense_weight, dense_bias, norm_weight, norm_bias, dtype, activation, eps,
            ignore_index,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, target, ctx.dtype, ctx.activation, ctx.eps, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[2:])

    @staticmethod
    def backward(ctx, dy, *_):
        saved = ctx.saved_tensors  # once: checkpoint gives them away
        inputs, kept = saved[:5], saved[5:]
        options = ctx.dtype, ctx.activation, ctx.eps
        grads = gradients(
            _transform_gradients, _transform_reference, (dy,), inputs, kept, options,
            ctx.needs_input_grad[:5],
        )  # fmt: skip
        return *grads, *[None] * 5


def _transform_gradients(incoming, inputs, kept, options, needs):
    (dy,), (x, dense_weight, _, norm_weight, _) = incoming, inputs
    dx, ddense, ddense_bias, dnorm_weight, dnorm_bias = masked_transform_bwd(
        dy.contiguous(), x, dense_weight, norm_weight, *kept, options[1], *needs[:2]
    )
    grads = dx, ddense, ddense_bias, dnorm_weight, dnorm_bias
    return tuple(g.to(t.dtype) if n else None for g, t, n in zip(grads, inputs, needs, strict=True))


def _transform_reference(inputs, kept, options):
    """Of all places behind the masked rows, the first row's; no gradient comes in there."""
    (x, *parameters), (index, count, *_), (dtype, activation, eps) = inputs, kept, options
    places = torch.arange(len(index), device=index.device)
    rows = x[torch.where(places < count, index, 0)].to(dtype)
    return (
        reference.masked_lm_transform(
            rows, *(p.to(dtype) for p in parameters), activation=activation, eps=eps
        ),
    )


def masked_lm_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    decoder_weight: torch.Tensor,
    *,
    decoder_bias: torch.Tensor | None = None,
    activation: str = "gelu",
    eps: float = 1e-12,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    impl: Impl | None = None,
) -> torch.Tensor:
    """BERT's masked language model head and its loss, computed for the masked rows alone.

        h = LayerNorm(activation(hidden @ dense_weight.T + dense_bias)) * norm_weight + norm_bias
        loss = linear_cross_entropy(h, decoder_weight, labels, bias=decoder_bias)

    The rows with a label (15 % of them in BERT) are gathered, and only they go through the dense
    layer, the activation, LayerNorm and the decoder, forward and backward; the gradient of hidden
    is 0 elsewhere. How many there are the kernels read on the device. No (tokens, vocab) tensor
    exists; memory beyond inputs and gradients is `linear_cross_entropy`'s and 6 tensors of
    (tokens, width), kept until the backward are 2.

    Args:
        hidden: (..., dim), any floating dtype and strides; what the encoder returns.
        labels: (...), int64 or int32: the class of each masked token, `ignore_index` elsewhere.
        dense_weight, dense_bias: (width, dim), (width,).
        norm_weight, norm_bias: (width,).
        decoder_weight: (vocab, width), often the token embedding itself.
        decoder_bias: (vocab,).
        activation: "gelu" (erf), "gelu_tanh", "relu", "relu2", "silu" or "quick_gelu".
        eps: of LayerNorm; added to the variance.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as `linear_cross_entropy` has
            them; "mean" is over the masked tokens.
        impl: the backend; None chooses (see `fastlm.explain`).

    Products are taken in the widest dtype of all tensors, or in autocast's. The torch backend
    gathers on a CPU; on a GPU it computes every row.

    Returns:
        () or, for reduction "none", as labels; in the products' dtype (fp32 under autocast).
        Differentiable in hidden and all parameters, each with a gradient of its own dtype;
        gradients of gradients are the reference's.

    Raises:
        TypeError, ValueError: types, shapes, dtypes, devices or values that do not fit.
        NotImplementedError: impl="triton" with a width above 8,192.

    Source: Devlin et al., arXiv:1810.04805; `fastlm/reference/loss.py`.
    """
    op = "masked_lm_loss"
    parameters = {
        "dense_weight": dense_weight, "dense_bias": dense_bias, "norm_weight": norm_weight,
        "norm_bias": norm_bias, "decoder_weight": decoder_weight, "decoder_bias": decoder_bias,
    }  # fmt: skip
    _check_head(op, hidden, parameters)
    require_choice(op, "activation", activation, tuple(FUNCTIONS))
    require_eps(op, eps)
    numbers = ignore_index, label_smoothing, z_loss, softcap
    check_loss(op, hidden, "(...) of hidden (..., dim)", labels, decoder_weight.shape[0], None,
               reduction, *numbers, target_name="labels")  # fmt: skip
    backend = choose(op, impl, _BACKENDS, hidden.device, hidden, parameters)
    dtype, out_dtype = product_dtypes(hidden, *parameters.values())
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss,
               "softcap": softcap, "reduction": reduction}  # fmt: skip
    x, flat = hidden.reshape(labels.numel(), hidden.shape[-1]), labels.reshape(-1)
    if backend == "torch":
        loss = _torch_masked_lm(x, flat, parameters, dtype, activation, eps, options)
    else:
        loss = _fused_masked_lm(x, flat, parameters, dtype, activation, eps, options)
    return (loss.view(labels.shape) if reduction == "none" else loss).to(out_dtype)


def _fused_masked_lm(x, labels, parameters, dtype, activation, eps, options):
    *transform, decoder_weight, decoder_bias = parameters.values()
    ignore_index, reduction = options["ignore_index"], options["reduction"]
    transform[1:], decoder_bias = map(contiguous, transform[1:]), contiguous(decoder_bias)
    y, label, *_ = apply(
        _MaskedTransform, x, *transform, labels, dtype, activation, float(eps), ignore_index
    )
    numbers = as_numbers(
        ignore_index, options["label_smoothing"], options["z_loss"], options["softcap"]
    )
    grad = torch.is_grad_enabled()
    need = tuple(
        grad and t is not None and t.requires_grad for t in (y, decoder_weight, decoder_bias)
    )
    loss, *_ = apply(
        LinearCrossEntropy, y, decoder_weight, decoder_bias, label, None, dtype, numbers, reduction,
        need, "triton",
    )  # fmt: skip
    if reduction != "none" or not loss.numel():
        return loss
    masked = labels != ignore_index
    place = masked.cumsum(0) - 1
    return torch.where(masked, loss[place.clamp(min=0)], 0.0)


def _torch_masked_lm(x, labels, parameters, dtype, activation, eps, options):
    *transform, decoder_weight, decoder_bias = parameters.values()
    reduction, masked = options["reduction"], labels != options["ignore_index"]
    # Elsewhere the number of masked rows is not known without waiting for it, or is not static.
    gathers = x.device.type == "cpu" and in_plain_eager() and has_values(labels)
    if gathers:
        index = masked.nonzero().squeeze(1)
        x, labels = x[index], labels[index]
    else:
        x = x.masked_fill(~masked[:, None], 0.0)
    dense_weight, dense_bias, norm_weight, norm_bias = transform
    with without_autocast(x.device):
        h = F.linear(x.to(dtype), dense_weight.to(dtype), dense_bias.to(dtype))
        h = layer_norm(FUNCTIONS[activation](h), norm_weight, norm_bias, eps=eps, impl="torch")
    bias = None if decoder_bias is None else decoder_bias.to(dtype)
    try:  # under autocast this returns fp32
        loss = linear_cross_entropy(
            h, decoder_weight.to(dtype), labels, bias=bias, impl="torch", **options
        )
    except IndexError:  # of a target, as it is called there
        require_classes(
            "masked_lm_loss", "labels", labels, options["ignore_index"], decoder_weight.shape[0]
        )
        raise
    if gathers and reduction == "none":
        loss = loss.new_zeros(masked.shape).index_put((index,), loss)
    return loss


def next_sentence_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pooler_weight: torch.Tensor | None = None,
    pooler_bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    impl: Impl | None = None,
) -> torch.Tensor:
    """BERT's next-sentence loss, from the pooled first token or from the hidden states.

    With a pooler it is of `tanh(hidden[:, 0] @ pooler_weight.T + pooler_bias)`, else of hidden
    itself: `cross_entropy(pooled @ weight.T + bias, labels)`. The products, of one row a sequence,
    are torch's; `impl` is that of `cross_entropy`.

    Args:
        hidden: (batch, dim), or with a pooler (batch, seqlen, dim); any floating dtype and strides.
        labels: (batch,), int64 or int32, classes or `ignore_index`. In BERT 0 is the next sentence.
        weight, bias: (classes, dim), (classes,). BERT has 2 classes.
        pooler_weight, pooler_bias: (dim, dim'), (dim,) for hidden states of dim' features.
        ignore_index, label_smoothing, reduction: as `cross_entropy` has them.
        impl: the backend; None chooses (see `fastlm.explain`).

    Products are taken in the widest dtype of all tensors, or in autocast's.

    Returns:
        () or, for reduction "none", (batch,); in the products' dtype (fp32 under autocast).
        Differentiable in hidden and all parameters.

    Raises:
        TypeError, ValueError: types, shapes, dtypes, devices or values that do not fit.

    Source: Devlin et al., arXiv:1810.04805, section 3.1; `fastlm/reference/loss.py`.
    """
    op = "next_sentence_loss"
    given = {"weight": weight, "bias": bias, "pooler_weight": pooler_weight,
             "pooler_bias": pooler_bias}  # fmt: skip
    _check_sentence(op, hidden, given)
    check_loss(op, hidden if pooler_weight is None else hidden[:, 0], "(batch,)", labels,
               weight.shape[0], None, reduction, ignore_index, label_smoothing, 0.0, None,
               target_name="labels")  # fmt: skip
    backend = choose(op, impl, _SENTENCE_BACKENDS, hidden.device, hidden, given)
    dtype, _ = product_dtypes(hidden, *given.values())
    with without_autocast(hidden.device):
        linear = lambda x, w, b: F.linear(x, w.to(dtype), None if b is None else b.to(dtype))
        pooled = hidden
        if pooler_weight is not None:
            pooled = torch.tanh(linear(hidden[:, 0].to(dtype), pooler_weight, pooler_bias))
        logits = linear(pooled.to(dtype), weight, bias)
    try:
        return cross_entropy(  # fp32 under autocast
            logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing,
            reduction=reduction, impl=backend,
        )  # fmt: skip
    except IndexError:  # of a target, as it is called there
        require_classes(op, "labels", labels, ignore_index, weight.shape[0])
        raise


def _check_head(op: str, hidden, parameters) -> None:
    require_float(op, "hidden", hidden)
    if hidden.dim() == 0:
        raise fail(op, "hidden", "have shape (..., dim)", tuple(hidden.shape))
    for name, p in parameters.items():
        if p is not None or name != "decoder_bias":
            require_float(op, name, p)
            require_device(op, name, p, hidden.device)
    dense, decoder = parameters["dense_weight"], parameters["decoder_weight"]
    if dense.dim() != 2 or dense.shape[0] == 0 or dense.shape[1] != hidden.shape[-1]:
        constraint = f"have shape (width, dim) = (at least 1, {hidden.shape[-1]})"
        raise fail(op, "dense_weight", constraint, tuple(dense.shape))
    for name in ("dense_bias", "norm_weight", "norm_bias"):
        require_shape(op, name, parameters[name], dense.shape[:1], "(width,)")
    if decoder.dim() != 2 or decoder.shape[0] == 0 or decoder.shape[1] != dense.shape[0]:
        constraint = f"have shape (vocab, width) = (at least 1, {dense.shape[0]})"
        raise fail(op, "decoder_weight", constraint, tuple(decoder.shape))
    if parameters["decoder_bias"] is not None:
        require_shape(op, "decoder_bias", parameters["decoder_bias"], decoder.shape[:1], "(vocab,)")


def _check_sentence(op: str, hidden, given) -> None:
    require_float(op, "hidden", hidden)
    pooled = given["pooler_weight"] is not None
    form = "(batch, seqlen, dim)" if pooled else "(batch, dim)"
    if hidden.dim() != 2 + pooled or (pooled and hidden.shape[1] == 0):
        raise fail(op, "hidden", f"have shape {form}", tuple(hidden.shape))
    for name, p in given.items():
        if p is not None or name == "weight":
            require_float(op, name, p)
            require_device(op, name, p, hidden.device)
    if given["pooler_bias"] is not None and not pooled:
        raise fail(op, "pooler_bias", "be None without a pooler_weight", "a tensor")
    dim = hidden.shape[-1]
    if pooled:
        pooler = given["pooler_weight"]
        if pooler.dim() != 2 or pooler.shape[1] != dim:
            raise fail(op, "pooler_weight", f"have shape (any, {dim})", tuple(pooler.shape))
        dim = pooler.shape[0]
        if given["pooler_bias"] is not None:
            require_shape(op, "pooler_bias", given["pooler_bias"], (dim,), "(dim,)")
    weight = given["weight"]
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != dim:
        constraint = f"have shape (classes, dim) = (at least 1, {dim})"
        raise fail(op, "weight", constraint, tuple(weight.shape))
    if given["bias"] is not None:
        require_shape(op, "bias", given["bias"], weight.shape[:1], "(classes,)")


def _sentence_triton_refuses(hidden, parameters) -> str | None:
    return kernels_refuse(hidden=hidden, **parameters)


def _triton_refuses(hidden, parameters) -> str | None:
    if refused := _sentence_triton_refuses(hidden, parameters):
        return refused
    width = parameters["dense_weight"].shape[0]
    if width > _WIDEST:
        return f"is written for widths up to {_WIDEST}, and has no kernel for {width}"
    return None


# Triton first: on a GPU torch would compute the rows without a label too.
_BACKENDS = {"triton": _triton_refuses, "torch": supports_all}
_SENTENCE_BACKENDS = {"triton": _sentence_triton_refuses, "torch": supports_all}
