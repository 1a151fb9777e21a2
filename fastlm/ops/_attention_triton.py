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
    tensors, scalars = kernel_options(options, q, k, packing)
    bias = options["bias"]
    bias = bias.table if isinstance(bias, RelativeBias) else bias
    learned = (q, k, v, bias, options["alibi_slopes"], options["sinks"])
    learned = [x for x in learned if x is not None and x.requires_grad]
    if torch.is_grad_enabled() and learned:
        exact = any(x.dtype.itemsize >= 4 for x in learned)
        out, lse, _ = _Attention.apply(q, k, v, *tensors, scalars, exact)
    else:
        out, lse, _ = attention_fwd(q, k, v, *tensors, *scalars, False)
    return (out, lse) if options["return_lse"] else out


def kernel_options(options: dict, q, k, packing: tuple | None = None) -> tuple[tuple, tuple]:
    """(the nine optional tensors, scalars): `attention_fwd`'s arguments from the mask on."""
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
    return tensors, scalars


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
        need_q, need_kv, *need_rest = ctx.needs
        grads = second_gradients(
            lambda *tensors: _by_reference(tensors, ctx.scalars),
            ctx, 2, (2, 3, 4, 6, 7, 11, 12), (need_q, need_kv, need_kv, *need_rest), incoming,
        )  # fmt: skip
        return *grads, None, None, None, None, None


def second_gradients(fn, ctx, outputs: int, places, produced, incoming):
    """Gradients of what `ctx` saved, from those of the gradients computed from it.

    Args:
        fn: the tensors that the call took -> a tuple of its outputs.
        ctx: saved are the incoming gradients of the first `outputs` outputs, of which all but the
            first may be None, and the tensors.
        places: of each gradient, where the tensor that it belongs to is among the saved ones.
        produced: whether that gradient was computed.
        incoming: the gradient of each; None where there is none.
    """
    saved = ctx.saved_tensors
    wanted = [i for i in range(len(saved)) if ctx.needs_input_grad[i]]
    places = [i for i, needed in zip(places, produced, strict=True) if needed]
    given = [g for g, needed in zip(incoming, produced, strict=True) if needed]

    def gradients(*values):
        tensors = list(saved)
        for i, x in zip(wanted, values, strict=True):
            tensors[i] = x

        def run(*inputs):
            full = list(tensors)
            for i, x in zip(places, inputs, strict=True):
                full[i] = x
            return fn(*full[outputs:])

        results, pull = torch.func.vjp(run, *(tensors[i] for i in places))
        pairs = zip(tensors[:outputs], results, strict=True)
        return pull(tuple(torch.zeros_like(y) if g is None else g.to(y.dtype) for g, y in pairs))

    first, pull = torch.func.vjp(gradients, *(saved[i] for i in wanted))
    given = [torch.zeros_like(x) if g is None else g for x, g in zip(first, given, strict=True)]
    result: list[torch.Tensor | None] = [None] * len(saved)
    for i, g in zip(wanted, pull(tuple(given)), strict=True):
        result[i] = g
    return result


def _by_reference(tensors, scalars) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `attention_fwd`, with the same arguments."""
    q, k, v, *optional = tensors
    options = reference_options(optional, scalars)
    cu_q, cu_k, sinks = optional[4], optional[5], optional[7]
    if cu_q is not None:
        return reference.attention_varlen(
            q, k, v, cu_q, cu_k, *scalars[-2:], sinks=sinks, return_lse=True, **options
        )
    return reference.attention(q, k, v, sinks=sinks, return_lse=True, **options)


def reference_options(tensors, scalars) -> dict:
    """The reference's options, from what `kernel_options` gives; without sinks and packing."""
    mask, bias, table, seqlens_k, _, _, alibi_slopes, _, seed = tensors
    causal, scale, left, right, softcap, dropout_p, bidirectional, max_distance, *_ = scalars
    if table is not None:
        bias = RelativeBias(table, bidirectional=bidirectional, max_distance=max_distance)
    return dict(
        causal=False if causal == "none" else causal, softmax_scale=scale, mask=mask, bias=bias,
        window=tuple(None if side < 0 else side for side in (left, right)), seqlens_k=seqlens_k,
        alibi_slopes=alibi_slopes, softcap=softcap or None, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip


def last_stride_1(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _four_dims(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x[(None,) * (4 - x.dim())]


def _fp32(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.float().contiguous()


def _int32(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()
