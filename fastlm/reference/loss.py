"""Cross-entropy of logits, and of a linear head's logits: the specification.

With s = logits, or softcap * tanh(logits / softcap), lse = logsumexp(s), y the target, V the number
of classes, w the class weights (ones without them) and e = label_smoothing, a row's loss is

    (1 - e) * w[y] * (lse - s[y]) + e / V * sum_c w[c] * (lse - s[c]) + z_loss * w[y] * lse^2

and 0 where y is ignore_index. "mean" is the sum over rows divided by the sum of their w[y], and 0
where that sum is 0, so a batch whose rows are all ignored has loss 0 and gradient 0; torch has NaN
there, which a training run does not survive. The rest is `torch.nn.functional.cross_entropy`.

Sources: Szegedy et al., arXiv:1512.00567 (label smoothing); Chowdhery et al., arXiv:2204.02311,
section 5 (z_loss); Gemma Team, arXiv:2408.00118 (softcap).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm.reference.ffn import bias_act
from fastlm.reference.norm import layer_norm


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
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Cross-entropy of logits (..., vocab) and integer targets (...), in fp32 (fp64 for fp64).

    Returns (...) for reduction "none", else (), in `out_dtype` (default the logits').
    """
    s = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = target != ignore_index
    y = torch.where(kept, target, 0).long()
    # What an ignored row holds, NaN included, reaches neither its loss nor its gradient.
    s = s.masked_fill(~kept[..., None], 0.0)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    w = s.new_ones(s.shape[-1]) if class_weight is None else class_weight.to(s.dtype)
    logp = s.log_softmax(-1)
    loss = -(1.0 - label_smoothing) * w[y] * logp.gather(-1, y[..., None]).squeeze(-1)
    if label_smoothing > 0.0:
        loss = loss - label_smoothing / s.shape[-1] * (logp * w).sum(-1)
    if z_loss > 0.0:
        loss = loss + z_loss * w[y] * s.logsumexp(-1).square()
    loss = torch.where(kept, loss, 0.0)
    return reduce(loss, torch.where(kept, w[y], 0.0), reduction).to(out_dtype or logits.dtype)


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
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`cross_entropy(x @ weight.T + bias, target)`.

    x is (..., dim), weight (vocab, dim), bias (vocab,). The product is taken in the widest dtype of
    the three, or autocast's, which is also the default of `out_dtype`, the result's.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if bias is not None:
        dtype = torch.promote_types(dtype, bias.dtype)
        bias = bias.to(dtype)
    x = x.masked_fill((target == ignore_index)[..., None], 0.0)
    return cross_entropy(
        F.linear(x.to(dtype), weight.to(dtype), bias),
        target,
        class_weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
        out_dtype=out_dtype,
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
    **options,
) -> torch.Tensor:
    """BERT's masked language model head and its loss (Devlin et al., arXiv:1810.04805):

        h = LayerNorm(activation(hidden @ dense_weight.T + dense_bias)) * norm_weight + norm_bias
        loss = linear_cross_entropy(h, decoder_weight, labels, bias=decoder_bias)

    hidden is (..., dim), dense_weight (width, dim), decoder_weight (vocab, width). Everything is in
    the widest dtype of the tensors. `options` are `linear_cross_entropy`'s.
    """
    parameters = (dense_weight, dense_bias, norm_weight, norm_bias, decoder_weight, decoder_bias)
    dtype = hidden.dtype
    for p in parameters:
        dtype = dtype if p is None else torch.promote_types(dtype, p.dtype)
    ignored = labels == options.get("ignore_index", -100)
    hidden = hidden.to(dtype).masked_fill(ignored[..., None], 0.0)
    h = masked_lm_transform(
        hidden, *(p.to(dtype) for p in parameters[:4]), activation=activation, eps=eps
    )
    return linear_cross_entropy(h, decoder_weight, labels, bias=decoder_bias, **options)


def masked_lm_transform(
    hidden: torch.Tensor,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    *,
    activation: str = "gelu",
    eps: float = 1e-12,
) -> torch.Tensor:
    """Dense, activation and LayerNorm, all in one dtype."""
    h = bias_act(F.linear(hidden, dense_weight, dense_bias), activation=activation)
    return layer_norm(h, norm_weight, norm_bias, eps=eps)


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
) -> torch.Tensor:
    """BERT's next-sentence loss: `cross_entropy(pooled @ weight.T + bias, labels)`.

    hidden is `pooled` (batch, dim) or, with a pooler, (batch, seqlen, dim), of which the first
    token goes through tanh(x @ pooler_weight.T + pooler_bias). Everything is in the widest dtype
    of the tensors.
    """
    dtype = hidden.dtype
    for p in (weight, bias, pooler_weight, pooler_bias):
        dtype = dtype if p is None else torch.promote_types(dtype, p.dtype)
    linear = lambda x, w, b: F.linear(x, w.to(dtype), None if b is None else b.to(dtype))
    pooled = hidden.to(dtype)
    if pooler_weight is not None:
        pooled = torch.tanh(linear(pooled[:, 0], pooler_weight, pooler_bias))
    return cross_entropy(
        linear(pooled, weight, bias), labels, ignore_index=ignore_index,
        label_smoothing=label_smoothing, reduction=reduction,
    )  # fmt: skip


def reduce(loss: torch.Tensor, row_weight: torch.Tensor, reduction: str) -> torch.Tensor:
    """Reduces losses of rows; `row_weight` is w[y], 0 for ignored rows.

    For "mean", `loss` may also be their sum.
    """
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = row_weight.sum()
    # x / inf is 0, and so is its gradient; nothing is read back to the host.
    return loss.sum() / torch.where(total == 0.0, float("inf"), total)
