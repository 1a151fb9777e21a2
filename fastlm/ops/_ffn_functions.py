"""Contracts of bias_act and glu, and the autograd functions over them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastlm.ops._library import contract
from fastlm.ops._rows import as_rows


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
        x.new_empty(x.shape if need_dx else (0,)),
        (bias if need_dbias else x).new_empty(x.shape[1:] if need_dbias else (0,)),
        x.new_empty(x.shape if need_y else (0,)),
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
        gate.new_empty(gate.shape if need_dgate else (0,)),
        up.new_empty(up.shape if need_dup else (0,)),
        gate.new_empty(gate.shape if need_y else (0,), dtype=dtype),
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


class BiasAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, seed, activation, dropout_p):
        ctx.options = activation, dropout_p
        ctx.save_for_backward(x, bias, seed)
        return bias_act_fwd(as_rows(x), bias, seed, activation, dropout_p).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, bias, seed = ctx.saved_tensors
        need_dx, need_dbias = ctx.needs_input_grad[:2]
        dx, dbias, _ = bias_act_bwd(
            as_rows(dy), as_rows(x), bias, seed, *ctx.options, need_dx, need_dbias, False
        )
        return (
            dx.view(x.shape) if need_dx else None,
            dbias if need_dbias else None,
            None,
            None,
            None,
        )


class Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return glu_fwd(as_rows(gate), as_rows(up), activation).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        need_dgate, need_dup = ctx.needs_input_grad[:2]
        dgate, dup, _ = glu_bwd(
            as_rows(dy), as_rows(gate), as_rows(up), ctx.activation, need_dgate, need_dup, False
        )
        return (
            dgate.view(gate.shape) if need_dgate else None,
            dup.view(up.shape) if need_dup else None,
            None,
        )


class Ffn(torch.autograd.Function):
    """The weights have x's dtype. Saves x where w1 trains, and h = x w1^T unless recomputing."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, seed, activation, dropout_p, recompute):
        need_x, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad[:5]
        below_w2 = need_x or need_w1 or need_b1
        h = as_rows(F.linear(x, w1))
        a = bias_act_fwd(h, b1, seed, activation, dropout_p)
        y = F.linear(a, w2, None if b2 is None else b2.to(a.dtype))
        need_h = below_w2 or need_w2
        ctx.options = activation, dropout_p
        ctx.b2_dtype = b2.dtype if need_b2 else None
        ctx.save_for_backward(
            x if need_w1 or (need_h and recompute) else None,
            h if need_h and not recompute else None,
            w1, b1, w2, seed,
        )  # fmt: skip
        return y.view(*x.shape[:-1], w2.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, w1, b1, w2, seed = ctx.saved_tensors
        need_x, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad[:5]
        leading, dy = dy.shape[:-1], as_rows(dy)
        dx = dw1 = db1 = dw2 = db2 = None
        x = None if x is None else as_rows(x)
        if h is None and (need_x or need_w1 or need_b1 or need_w2):
            h = F.linear(x, w1)
        if need_x or need_w1 or need_b1:
            need_dh = need_x or need_w1
            dh, db1, a = bias_act_bwd(dy @ w2, h, b1, seed, *ctx.options, need_dh, need_b1, need_w2)
            dx = (dh @ w1).view(*leading, w1.shape[1]) if need_x else None
            dw1 = dh.t() @ x if need_w1 else None
            db1 = db1 if need_b1 else None
        elif need_w2:
            a = bias_act_fwd(h, b1, seed, *ctx.options)
        if need_w2:
            dw2 = dy.t() @ a
        if need_b2:
            db2 = dy.sum(0, dtype=ctx.b2_dtype)
        return dx, dw1, db1, dw2, db2, None, None, None, None


class GatedFfn(torch.autograd.Function):
    """As `Ffn`; the products with w_gate and w_up are what it keeps or computes again."""

    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down, activation, recompute):
        need_x, need_gate, need_up, need_down = ctx.needs_input_grad[:4]
        gate, up = as_rows(F.linear(x, w_gate)), as_rows(F.linear(x, w_up))
        y = F.linear(glu_fwd(gate, up, activation), w_down)
        ctx.activation = activation
        keep = (None, None) if recompute else (gate, up)
        keep_x = need_gate or need_up or recompute
        ctx.save_for_backward(x if keep_x else None, *keep, w_gate, w_up, w_down)
        return y.view(*x.shape[:-1], w_down.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate, up, w_gate, w_up, w_down = ctx.saved_tensors
        need_x, need_gate, need_up, need_down = ctx.needs_input_grad[:4]
        leading, dy = dy.shape[:-1], as_rows(dy)
        dx = dw_gate = dw_up = dw_down = None
        x = None if x is None else as_rows(x)
        if gate is None:
            gate, up = F.linear(x, w_gate), F.linear(x, w_up)
        if need_x or need_gate or need_up:
            dgate, dup, a = glu_bwd(
                dy @ w_down, gate, up, ctx.activation,
                need_x or need_gate, need_x or need_up, need_down,
            )  # fmt: skip
            if need_x:
                dx = (dgate @ w_gate).add_(dup @ w_up).view(*leading, w_up.shape[1])
            dw_gate = dgate.t() @ x if need_gate else None
            dw_up = dup.t() @ x if need_up else None
        elif need_down:
            a = glu_fwd(gate, up, ctx.activation)
        if need_down:
            dw_down = dy.t() @ a
        return dx, dw_gate, dw_up, dw_down, None, None
