"""Contracts of bias_act and glu, and the autograd functions over them.

The last input of each function but `way` is the backend whose contracts it calls. `forward` names
its inputs one by one: where nothing takes a gradient, torch.compile tells by their number that it
has no `ctx`.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from fastlm.ops._ffn_matmul import ffn_down_bwd, ffn_up, gated_down_bwd, gated_up, library_up
from fastlm.ops._library import contract, cuda_contract, unwanted
from fastlm.ops._rows import as_rows, in_shape, viewed_as
from fastlm.ops._transforms import gradients, in_create_graph
from fastlm.reference import ffn as reference


def _bias_act_fwd_fake(x, bias, seed, activation, dropout_p):
    return x.new_empty(x.shape)


@contract(_bias_act_fwd_fake)
def bias_act_fwd(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    dropout_p: float,
) -> torch.Tensor:
    from fastlm.kernels import ffn

    return ffn.bias_act_fwd(x, bias, seed, activation, dropout_p)


def _bias_act_bwd_fake(dy, x, bias, seed, activation, dropout_p, need_dx, need_dbias, need_y):
    return (
        x.new_empty(x.shape) if need_dx else unwanted(x),
        bias.new_empty(x.shape[1:]) if need_dbias else unwanted(x),
        x.new_empty(x.shape) if need_y else unwanted(x),
    )


@contract(_bias_act_bwd_fake)
def bias_act_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    need_dx: bool,
    need_dbias: bool,
    need_y: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlm.kernels import ffn

    return ffn.bias_act_bwd(dy, x, bias, seed, activation, dropout_p, need_dx, need_dbias, need_y)


def _glu_fwd_fake(gate, up, activation):
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


@contract(_glu_fwd_fake)
def glu_fwd(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    from fastlm.kernels import ffn

    return ffn.glu_fwd(gate, up, activation)


def _glu_bwd_fake(dy, gate, up, activation, need_dgate, need_dup, need_y):
    dtype = torch.promote_types(gate.dtype, up.dtype)
    return (
        gate.new_empty(gate.shape) if need_dgate else unwanted(gate),
        up.new_empty(up.shape) if need_dup else unwanted(gate),
        gate.new_empty(gate.shape, dtype=dtype) if need_y else unwanted(gate),
    )


@contract(_glu_bwd_fake)
def glu_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    need_dgate: bool,
    need_dup: bool,
    need_y: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlm.kernels import ffn

    return ffn.glu_bwd(dy, gate, up, activation, need_dgate, need_dup, need_y)


# Forward and backward, by backend.
_BIAS_ACT = {
    "triton": (bias_act_fwd, bias_act_bwd),
    "cuda": (
        cuda_contract(bias_act_fwd, _bias_act_fwd_fake),
        cuda_contract(bias_act_bwd, _bias_act_bwd_fake),
    ),
}
_GLU = {
    "triton": (glu_fwd, glu_bwd),
    "cuda": (cuda_contract(glu_fwd, _glu_fwd_fake), cuda_contract(glu_bwd, _glu_bwd_fake)),
}


class BiasAct(torch.autograd.Function):
    """(x, bias, seed, activation, dropout_p, impl) -> y."""

    @staticmethod
    def forward(x, bias, seed, activation, dropout_p, impl):
        forward, _ = _BIAS_ACT[impl]
        return in_shape(forward(as_rows(x), bias, seed, activation, dropout_p), x.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, bias, seed, *ctx.options, ctx.impl = inputs
        ctx.save_for_backward(x, bias, seed)

    @staticmethod
    def backward(ctx, dy):
        x, bias, seed = ctx.saved_tensors
        grads = gradients(
            partial(_bias_act_gradients, ctx.impl), _bias_act_reference, (dy,), (x, bias), (seed,),
            ctx.options, ctx.needs_input_grad[:2],
        )  # fmt: skip
        return *grads, *[None] * 4


def _bias_act_gradients(impl, incoming, inputs, kept, options, needs):
    (dy,), (x, bias) = incoming, inputs
    need_dx, need_dbias = needs
    _, backward = _BIAS_ACT[impl]
    dx, dbias, _ = backward(
        as_rows(dy), as_rows(x), bias, *kept, *options, need_dx, need_dbias, False
    )
    return viewed_as(dx, x) if need_dx else None, dbias if need_dbias else None


def _bias_act_reference(inputs, kept, options):
    (seed,), (activation, dropout_p) = kept, options
    return (reference.bias_act(*inputs, activation=activation, dropout_p=dropout_p, seed=seed),)


class Glu(torch.autograd.Function):
    """(gate, up, activation, impl) -> y."""

    @staticmethod
    def forward(gate, up, activation, impl):
        forward, _ = _GLU[impl]
        return in_shape(forward(as_rows(gate), as_rows(up), activation), gate.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.activation, ctx.impl = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        grads = gradients(
            partial(_glu_gradients, ctx.impl), _glu_reference, (dy,), ctx.saved_tensors, (),
            (ctx.activation,), ctx.needs_input_grad[:2],
        )  # fmt: skip
        return *grads, None, None


def _glu_gradients(impl, incoming, inputs, kept, options, needs):
    rows = [as_rows(x) for x in (*incoming, *inputs)]
    _, backward = _GLU[impl]
    *grads, _ = backward(*rows, *options, *needs, False)
    return tuple(viewed_as(g, inputs[0]) if n else None for g, n in zip(grads, needs, strict=True))


def _glu_reference(inputs, kept, options):
    return (reference.glu(*inputs, activation=options[0]),)


class Ffn(torch.autograd.Function):
    """(x, w1, b1, w2, b2, seed, activation, dropout_p, keep, impl, way) -> (y, z), or (y,) without
    `keep`.

    The weights have x's dtype. Saves x where w1 trains, and z = x w1^T + b1 with `keep`, else x to
    compute it again; z is an output so that gradients of gradients reach x through it. With b1 in
    it z keeps its sign when it is rounded, and relu its derivative. `way`: see _ffn_matmul.py.
    """

    @staticmethod
    def forward(x, w1, b1, w2, b2, seed, activation, dropout_p, keep, impl, way):
        a, *z = _ffn_hidden(impl, way, as_rows(x), w1, b1, seed, activation, dropout_p, keep)
        y = _linear(a, w2, b2)
        return in_shape(y, (*x.shape[:-1], w2.shape[0])), *z

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w1, b1, w2, b2, seed, activation, dropout_p, keep, ctx.impl, ctx.way = inputs
        need_x, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad[:5]
        need_z = need_x or need_w1 or need_b1 or need_w2
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.options = x.shape, (activation, dropout_p)
        ctx.b2_dtype = b2.dtype if need_b2 else None
        ctx.save_for_backward(
            x if need_w1 or (need_z and not keep) else None,
            output[1] if need_z and keep else None,
            w1, b1, w2, seed,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dy, dz=None):
        x, z, w1, b1, w2, seed = ctx.saved_tensors
        need_x, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad[:5]
        needs = need_x or need_w1, need_b1, need_w2
        x = None if x is None else as_rows(x)
        dx = dw1 = dw2 = db2 = None
        db1 = dz.sum(0, dtype=b1.dtype) if need_b1 and dz is not None else None
        if dy is not None:
            dy = as_rows(dy)
            if any(needs):
                z = _ffn_product(ctx.way, x, w1, b1, ctx.options[0]) if z is None else z
                # z holds b1: what is differentiated is one of zeros beside it.
                zeros = torch.zeros_like(b1) if need_b1 else None
                tail = gradients(
                    partial(_ffn_tail_gradients, ctx.impl, ctx.way), _ffn_tail_reference, (dy,),
                    (z, zeros, w2), (seed,), ctx.options, needs,
                )  # fmt: skip
                dz, db1, dw2 = _sum(dz, tail[0]), _sum(db1, tail[1]), tail[2]
            db2 = dy.sum(0, dtype=ctx.b2_dtype) if need_b2 else None
        if dz is not None:
            dx = (dz @ w1).view(ctx.shape) if need_x else None
            dw1 = dz.t() @ x if need_w1 else None
        return dx, dw1, db1, dw2, db2, *[None] * 6


def _linear(x, weight, bias):
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _ffn_hidden(impl, way, x, w1, b1, seed, activation, dropout_p, keep):
    """(dropout(activation(z)), z = x w1^T + b1), the first alone without `keep`."""
    if way == "epilogue":
        z, a = ffn_up(x, w1, b1, seed, activation, dropout_p, keep, True)
    elif way == "cublaslt":
        return (library_up(x, w1, b1, activation),)
    else:
        forward, _ = _BIAS_ACT[impl]
        z = _linear(x, w1, b1)
        a = forward(z, None, seed, activation, dropout_p)
    return (a, z) if keep else (a,)


def _ffn_product(way, x, w1, b1, activation):
    """x w1^T + b1, with the bits that `_ffn_hidden` gives it."""
    if way == "epilogue" and not in_create_graph():
        return ffn_up(x, w1, b1, None, activation, 0.0, True, False)[0]
    return _linear(x, w1, b1)


def _ffn_tail_gradients(impl, way, incoming, inputs, kept, options, needs):
    """Of z, zeros and w2 in dropout(activation(z + zeros)) w2^T."""
    (dy,), (z, zeros, w2), (seed,) = incoming, inputs, kept
    need_z, need_b1, need_w2 = needs
    forward, backward = _BIAS_ACT[impl]
    dz = db1 = None
    if not (need_z or need_b1):
        a = forward(z, None, seed, *options)
    elif way == "epilogue":
        db1_dtype = zeros.dtype if need_b1 else None
        dz, db1, a = ffn_down_bwd(dy, w2, z, seed, *options, need_z, db1_dtype, need_w2)
    else:
        dz, db1, a = backward(dy @ w2, z, zeros, seed, *options, *needs)
    return dz if need_z else None, db1 if need_b1 else None, dy.t() @ a if need_w2 else None


def _ffn_tail_reference(inputs, kept, options):
    z, zeros, w2 = inputs
    return (F.linear(*_bias_act_reference((z, zeros), kept, options), w2),)


class GatedFfn(torch.autograd.Function):
    """(x, w_gate, w_up, w_down, activation, keep, impl, way) -> (y, gate, up), or (y,) without
    `keep`.

    As `Ffn`; the products with w_gate and w_up are what it keeps or computes again.
    """

    @staticmethod
    def forward(x, w_gate, w_up, w_down, activation, keep, impl, way):
        a, *products = _gated_hidden(impl, way, as_rows(x), w_gate, w_up, activation, keep)
        y = F.linear(a, w_down)
        return in_shape(y, (*x.shape[:-1], w_down.shape[0])), *products

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w_gate, w_up, w_down, ctx.activation, keep, ctx.impl, ctx.way = inputs
        need_x, need_gate, need_up, need_down = ctx.needs_input_grad[:4]
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        keep_x = need_gate or need_up or not keep
        products = output[1:] if keep else (None, None)
        ctx.save_for_backward(x if keep_x else None, *products, w_gate, w_up, w_down)

    @staticmethod
    def backward(ctx, dy, dgate=None, dup=None):
        x, gate, up, w_gate, w_up, w_down = ctx.saved_tensors
        need_x, need_gate, need_up, need_down = ctx.needs_input_grad[:4]
        needs = need_x or need_gate, need_x or need_up, need_down
        dw_down = None
        x = None if x is None else as_rows(x)
        if dy is not None:
            if gate is None:
                gate, up = _gated_products(ctx.way, x, w_gate, w_up, ctx.activation)
            *tail, dw_down = gradients(
                partial(_gated_tail_gradients, ctx.impl, ctx.way), _gated_tail_reference,
                (as_rows(dy),), (gate, up, w_down), (), (ctx.activation,), needs,
            )  # fmt: skip
            dgate, dup = _sum(dgate, tail[0]), _sum(dup, tail[1])
        parts = [(d, w) for d, w in ((dgate, w_gate), (dup, w_up)) if need_x and d is not None]
        dx = None
        if parts:
            dx = parts[0][0] @ parts[0][1]
            dx = (dx.addmm_(*parts[1]) if len(parts) == 2 else dx).view(ctx.shape)
        dw_gate = dgate.t() @ x if need_gate and dgate is not None else None
        dw_up = dup.t() @ x if need_up and dup is not None else None
        return dx, dw_gate, dw_up, dw_down, *[None] * 4


def _gated_hidden(impl, way, x, w_gate, w_up, activation, keep):
    """(activation(gate) * up, gate, up), the first alone without `keep`."""
    if way == "epilogue":
        gate, up, a = gated_up(x, w_gate, w_up, activation, keep, True)
    else:
        forward, _ = _GLU[impl]
        gate, up = F.linear(x, w_gate), F.linear(x, w_up)
        a = forward(gate, up, activation)
    return (a, gate, up) if keep else (a,)


def _gated_products(way, x, w_gate, w_up, activation):
    """(x w_gate^T, x w_up^T), with the bits that `_gated_hidden` gives them."""
    if way == "epilogue" and not in_create_graph():
        return gated_up(x, w_gate, w_up, activation, True, False)[:2]
    return F.linear(x, w_gate), F.linear(x, w_up)


def _gated_tail_gradients(impl, way, incoming, inputs, kept, options, needs):
    """Of gate, up and w_down in (activation(gate) * up) w_down^T."""
    (dy,), (gate, up, w_down) = incoming, inputs
    need_gate, need_up, need_down = needs
    forward, backward = _GLU[impl]
    dgate = dup = None
    if not (need_gate or need_up):
        a = forward(gate, up, *options)
    elif way == "epilogue":
        dgate, dup, a = gated_down_bwd(dy, w_down, gate, up, *options, *needs)
    else:
        dgate, dup, a = backward(dy @ w_down, gate, up, *options, *needs)
    return dgate if need_gate else None, dup if need_up else None, dy.t() @ a if need_down else None


def _gated_tail_reference(inputs, kept, options):
    *products, w_down = inputs
    return (F.linear(*_glu_reference(products, kept, options), w_down),)


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b
