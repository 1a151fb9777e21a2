"""The Triton backend of attention: the differentiable function over its two contracts.

First derivatives are fused. Second and higher ones recompute the call in the reference.
"""

from __future__ import annotations

import torch

from fastlm.ops._attention_contract import attention_bwd, attention_fwd
from fastlm.ops._transforms import TRANSFORM_REFUSAL, in_transform
from fastlm.reference import attention as reference
from fastlm.reference.relative_bias import RelativeBias

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refuses(q, v, options: dict, packing: tuple | None = None) -> str | None:
    """Why the kernels cannot take a call, or None."""
    if q.dtype not in _DTYPES:
        return f"computes in fp32 and does not take {q.dtype}"
    if in_transform():
        return TRANSFORM_REFUSAL
    headdim = max(q.shape[-1], v.shape[-1])
    if headdim > 512:
        return f"does not take headdim above 512, here {headdim}"
    return None


def attention(q, k, v, options: dict, packing: tuple | None = None):
    """Runs the kernels on checked options.

    Args:
        q, k, v: of one dtype, last stride 1.
        packing: (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) of packed sequences.
    """
    bias, table = options["bias"], None
    bidirectional, max_distance = False, 0
    if isinstance(bias, RelativeBias):
        bidirectional, max_distance = bias.bidirectional, bias.max_distance
        bias, table = None, bias.table
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.float()
    cu_seqlens_q, cu_seqlens_k, *lengths = packing or (None, None, q.shape[1], k.shape[1])
    tensors = (
        _four_dims(options["mask"]), _four_dims(bias), _fp32(table), _int32(options["seqlens_k"]),
        _int32(cu_seqlens_q), _int32(cu_seqlens_k), _fp32(options["alibi_slopes"]),
        _fp32(options["sinks"]), options["seed"],
    )  # fmt: skip
    causal = {False: "none", True: "bottom_right"}.get(options["causal"], options["causal"])
    scale, softcap = options["softmax_scale"], options["softcap"]
    window = [-1 if side is None else side for side in options["window"] or (None, None)]
    scalars = (
        causal, q.shape[-1] ** -0.5 if scale is None else float(scale), *window,
        0.0 if softcap is None else float(softcap), float(options["dropout_p"]), bidirectional,
        max_distance, *lengths,
    )  # fmt: skip
    learned = (q, k, v, bias, table, options["alibi_slopes"], options["sinks"])
    learned = [x for x in learned if x is not None and x.requires_grad]
    if torch.is_grad_enabled() and learned:
        exact = any(x.dtype == torch.float32 for x in learned)
        out, lse, _ = _Attention.apply(q, k, v, *tensors, scalars, exact)
    else:
        out, lse, _ = attention_fwd(q, k, v, *tensors, *scalars, False)
    return (out, lse) if options["return_lse"] else out


class _Attention(torch.autograd.Function):
    """(q, k, v, the nine optional tensors, scalars, exact) -> what `attention_fwd` returns.

    Differentiable are out and lse. exact: a gradient is in fp32, and wants what lse lost to
    rounding.
    """

    @staticmethod
    def forward(*inputs):
        *tensors, scalars, exact = inputs
        return attention_fwd(*tensors, *scalars, exact)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scalars, exact = inputs
        out, lse, lse_low = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse_low)
        ctx.save_for_backward(*tensors, out, lse, lse_low if exact else None)

    @staticmethod
    def backward(ctx, do, dlse, _):
        *tensors, out, lse, lse_low = ctx.saved_tensors
        need_q, need_k, need_v, _, need_bias, need_table, *_ = ctx.needs_input_grad
        need_alibi, need_sinks = ctx.needs_input_grad[9:11]
        needs = (need_q, need_k or need_v, need_bias, need_table, need_alibi, need_sinks)
        do = torch.zeros_like(out) if do is None else last_stride_1(do)
        inputs = (do, dlse, *tensors, out, lse, lse_low, ctx.scalars, needs)
        # create_graph=True: the gradients get gradients. The compiler has no second derivatives.
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        grads = _AttentionGrad.apply(*inputs) if twice else _AttentionGrad.forward(*inputs)
        dq, dk, dv, dbias, dtable, dalibi, dsinks = grads
        return (
            dq if need_q else None, dk if need_k else None, dv if need_v else None, None,
            dbias if need_bias else None, dtable if need_table else None, None, None, None,
            dalibi if need_alibi else None, dsinks if need_sinks else None, None, None, None,
        )  # fmt: skip


class _AttentionGrad(torch.autograd.Function):
    """The gradients of `_Attention`; theirs are the reference's."""

    generate_vmap_rule = True  # jacobians: one call of the kernels for each incoming gradient

    @staticmethod
    def forward(do, dlse, *inputs):
        q, k, v, *optional, out, lse, lse_low, scalars, needs = inputs
        return attention_bwd(do, q, k, v, out, lse, lse_low, dlse, *optional, *scalars, *needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, _, _, ctx.scalars, ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *incoming):
        return *_second_gradients(ctx, incoming), None, None, None, None, None


def _second_gradients(ctx, incoming) -> list[torch.Tensor | None]:
    """Gradients of (do, dlse, q, k, v, the optional tensors), from those of the seven gradients."""
    saved = ctx.saved_tensors
    # Positions in `saved`; lse's incoming gradient may be None, and only floats have gradients.
    wanted = [i for i in range(len(saved)) if ctx.needs_input_grad[i]]
    need_q, need_kv, *need_rest = ctx.needs
    produced = [need_q, need_kv, need_kv, *need_rest]  # of q, k, v, bias, table, alibi, sinks
    places = [i for i, needed in zip((2, 3, 4, 6, 7, 11, 12), produced, strict=True) if needed]
    given = [g for g, needed in zip(incoming, produced, strict=True) if needed]

    def gradients(*values):
        tensors = list(saved)
        for i, x in zip(wanted, values, strict=True):
            tensors[i] = x
        do, dlse = tensors[:2]

        def run(*inputs):
            full = list(tensors)
            for i, x in zip(places, inputs, strict=True):
                full[i] = x
            return _by_reference(full[2:], ctx.scalars)

        (out, lse), pull = torch.func.vjp(run, *(tensors[i] for i in places))
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        return pull((do.to(out.dtype), dlse))

    first, pull = torch.func.vjp(gradients, *(saved[i] for i in wanted))
    given = [torch.zeros_like(x) if g is None else g for x, g in zip(first, given, strict=True)]
    result: list[torch.Tensor | None] = [None] * len(saved)
    for i, g in zip(wanted, pull(tuple(given)), strict=True):
        result[i] = g
    return result


def _by_reference(tensors, scalars) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `attention_fwd`, with the same arguments."""
    q, k, v, mask, bias, table, seqlens_k, cu_q, cu_k, alibi_slopes, sinks, seed = tensors
    (
        causal, scale, left, right, softcap, dropout_p, bidirectional, max_distance, max_q, max_k
    ) = scalars  # fmt: skip
    if table is not None:
        bias = RelativeBias(table, bidirectional=bidirectional, max_distance=max_distance)
    options = dict(
        causal=False if causal == "none" else causal, softmax_scale=scale, mask=mask, bias=bias,
        window=tuple(None if side < 0 else side for side in (left, right)), seqlens_k=seqlens_k,
        alibi_slopes=alibi_slopes, softcap=softcap or None, sinks=sinks, dropout_p=dropout_p,
        seed=seed, return_lse=True,
    )  # fmt: skip
    if cu_q is not None:
        return reference.attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, **options)
    return reference.attention(q, k, v, **options)


def last_stride_1(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _four_dims(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x[(None,) * (4 - x.dim())]


def _fp32(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.float().contiguous()


def _int32(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()
