"""The torch backend of attention: torch's fused function where it can give our semantics.

Torch's CPU kernel knows boolean and additive masks, so every call without softcap, sinks, ALiBi,
dropout and LSE runs on it, and for a bias with a gradient its composition. Elsewhere its backward
is not deterministic, and with gradients the reference runs unless the caller allows that.
"""

from __future__ import annotations

import math

import torch

from fastlm.ops._check import without_autocast
from fastlm.ops._library import apply
from fastlm.ops._transforms import (
    gradients,
    has_values,
    in_create_graph,
    in_plain_eager,
    in_transform,
    trains,
)
from fastlm.reference import attention as reference
from fastlm.reference.attention_mask import allowed_pairs, key_distances

# Not F.scaled_dot_product_attention: a user may have pointed that name at fastlm.
torch_sdpa = torch._C._nn.scaled_dot_product_attention
_NOT_IN_SDPA = ("alibi_slopes", "softcap", "sinks")
_TENSORS = ("mask", "bias", "seqlens_k")  # the optional tensors that it can use


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict):
    """The reference's result, contiguous; q, k and v have one dtype and the options are checked."""
    with without_autocast(q.device):
        if _fits_sdpa(q, k, v, options):
            out = _fused(q, k, v, options)
            if not trains(options["bias"]):
                out = _differentiable(out, q, k, v, options)
            return out.contiguous()
        out = reference.attention(q, k, v, **options)
    if options["return_lse"]:
        return out[0].contiguous(), out[1]
    return out.contiguous()


def leads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict) -> bool:
    """Whether torch's own kernel is the fastest for a call, by benchmarks/results/attention.csv: on
    an NVIDIA GPU for halves without options, where no gradient has to be the same twice."""
    causal, headdim = options["causal"], q.shape[-1]
    return (
        q.is_cuda
        and torch.version.hip is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and all(options[name] is None for name in ("window", "mask", "bias", "seqlens_k"))
        and (not causal or causal == "top_left" or q.shape[1] == k.shape[1])
        and headdim == v.shape[-1]
        and headdim % 8 == 0
        and headdim <= 256
        and _fits_sdpa(q, k, v, options)
    )


def _fits_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict) -> bool:
    bias = options["bias"]
    if bias is not None:
        # It is taken in q's dtype alone, and the fused kernels give it no gradient; for a CPU torch
        # composes the call then, of operations with derivatives of any order.
        if not isinstance(bias, torch.Tensor) or bias.dtype != q.dtype:
            return False
        if q.device.type != "cpu" and trains(bias):
            return False
    return (
        (q.device.type == "cpu" or not options["deterministic"] or not trains(q, k, v))
        and not options["return_lse"]
        and options["dropout_p"] == 0.0
        and all(options[name] is None for name in _NOT_IN_SDPA)
        and q.numel() > 0
        and k.numel() > 0
        and not in_transform()
    )


def _fused(q, k, v, options: dict) -> torch.Tensor:
    """`torch_sdpa` on masks that leave no row without a key and no NaN where no pair is allowed."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    causal, bias = options["causal"], options["bias"]
    only_causal = all(options[name] is None for name in ("window", "mask", "bias", "seqlens_k"))
    if only_causal and causal == "top_left":
        k, v = k[:, :seqlen_q], v[:, :seqlen_q]  # no query sees the keys past that
    if only_causal and (not causal or causal == "top_left" or seqlen_q in (1, seqlen_k)):
        # torch aligns top-left: the same diagonal for a square, and no mask for one last query.
        diagonal = bool(causal) and not (causal != "top_left" and seqlen_q == 1)
        return _sdpa(q, k, v, options, is_causal=diagonal)
    window, seqlens_k, distance = options["window"], options["seqlens_k"], None
    if causal or window is not None:
        distance = key_distances(seqlen_q, seqlen_k, causal, None, seqlens_k, q.device)
    looks = q.device.type == "cpu" and has_values(q) and in_plain_eager()
    finite = bias is not None and looks and _is_finite(bias)  # then it forbids nothing
    allowed = allowed_pairs(
        seqlen_q, seqlen_k, distance, causal, window, options["mask"], None if finite else bias,
        None, seqlens_k, q.device,
    )  # fmt: skip
    if allowed is None:
        mask = None if bias is None else bias[(None,) * (4 - bias.dim())]
        return _sdpa(q, k, v, options, attn_mask=mask)
    if looks and _is_harmless(allowed, k, v):
        mask = allowed if bias is None else torch.where(allowed, bias, float("-inf"))
        return _sdpa(q, k, v, options, attn_mask=mask)
    if k.shape[2] != q.shape[2] and allowed.shape[1] > 1:
        group = q.shape[2] // k.shape[2]  # heads of a group may see different keys
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    alive = allowed.any(-1)[..., None]  # (batch, nheads, seqlen_q, 1)
    visible = allowed.any(-2).transpose(1, 2)[..., None]  # (batch, seqlen_k, nheads, 1)
    q = torch.where(alive.transpose(1, 2), q, 0.0)
    k, v = torch.where(visible, k, 0.0), torch.where(visible, v, 0.0)
    attend = allowed | ~alive
    if bias is not None:
        attend = torch.where(attend, torch.where(alive, bias, 0.0), float("-inf"))
    return torch.where(alive.transpose(1, 2), _sdpa(q, k, v, options, attn_mask=attend), 0.0)


def _is_harmless(allowed, k, v) -> bool:
    """Whether every query has a key, and what no query sees does no harm to products with 0."""
    if not allowed.any(-1).all():
        return False
    return bool(allowed.any(-2).all()) or (_is_finite(k) and _is_finite(v))


def _is_finite(x: torch.Tensor) -> bool:
    return all(math.isfinite(end.item()) for end in torch.aminmax(x.detach()))


def _differentiable(out, q, k, v, options: dict) -> torch.Tensor:
    """out, with second derivatives, of which torch's fused kernels have none."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and out.requires_grad):
        return out
    tensors = [options[name] for name in _TENSORS]
    others = {name: x for name, x in options.items() if name not in _TENSORS}
    return apply(_Detour, out, q, k, v, *tensors, others)


class _Detour(torch.autograd.Function):
    """(out, q, k, v, optional tensors, options) -> out.

    The gradient goes on to the operations that made out; under create_graph it turns off to q, k
    and v, whose gradients are then computed from them again, in operations with derivatives.
    """

    @staticmethod
    def forward(out, *_):
        return out.detach()  # not a view: users may write to it

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, do):
        rest = [None] * (1 + len(_TENSORS))
        if not in_create_graph():
            return do, None, None, None, *rest
        q, k, v, *tensors = ctx.saved_tensors
        options = (tuple(ctx.options.items()),)
        grads = gradients(
            _fused_gradients, _by_reference, (do,), (q, k, v), tensors, options,
            ctx.needs_input_grad[1:4],
        )  # fmt: skip
        return None, *grads, *rest


def _fused_gradients(incoming, inputs, kept, options, needs):
    _, pull = torch.func.vjp(lambda *qkv: _fused(*qkv, _options(kept, options)), *inputs)
    return tuple(g if n else None for g, n in zip(pull(*incoming), needs, strict=True))


def _by_reference(inputs, kept, options):
    return (reference.attention(*inputs, **_options(kept, options)),)


def _options(tensors, options: tuple) -> dict:
    return dict(options[0]) | dict(zip(_TENSORS, tensors, strict=True))


def _sdpa(q, k, v, options: dict, **masking) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch_sdpa(
        q, k, v, scale=options["softmax_scale"], enable_gqa=k.shape[1] != q.shape[1], **masking
    )
    return out.transpose(1, 2)
