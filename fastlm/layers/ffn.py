"""Position-wise feed-forward layers: Linear -> activation -> dropout -> Linear, and gated ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fastlm.backends import Impl
from fastlm.layers._modules import dropout_rate, is_plain
from fastlm.ops._check import fail, require_choice
from fastlm.ops.ffn import ACTIVATIONS, bias_act, ffn, gated_ffn, glu

Activation = str | Callable[[torch.Tensor], torch.Tensor]


class FeedForward(nn.Module):
    """linear2(dropout(activation(linear1(x)))), the sublayer of `torch.nn.TransformerEncoderLayer`.

    Args:
        embed_dim, dim_feedforward: widths of the input and of the hidden layer.
        dropout: probability of dropping a hidden element in training.
        activation: one of "gelu" (erf), "gelu_tanh", "quick_gelu", "relu", "relu2", "silu", or a
            callable. Those, and torch's functions and modules for them, are fused; any other
            callable runs as it is.
        bias: whether both linear layers have one.
        recompute: keep the hidden layer's input only and compute the rest again in the backward.
        impl: the backend; None chooses.
    """

    def __init__(
        self,
        embed_dim: int,
        dim_feedforward: int,
        dropout: float = 0.0,
        activation: Activation = "gelu",
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        recompute: bool = False,
        impl: Impl | None = None,
    ):
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, dim_feedforward, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, embed_dim, bias, device, dtype)
        self.activation = check_activation("FeedForward", activation)
        self.recompute = recompute
        self.impl = impl

    def reset_parameters(self) -> None:
        self.linear1.reset_parameters()
        self.linear2.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x and the result: (*, embed_dim)."""
        return feed_forward(
            x,
            self.linear1,
            self.linear2,
            self.activation,
            self.dropout,
            recompute=self.recompute,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"activation={activation_name(self.activation) or self.activation}"


class GatedFeedForward(nn.Module):
    """down_proj(activation(gate_proj(x)) * up_proj(x)), as in Llama ("silu") and GEGLU ("gelu").

    Args:
        embed_dim, dim_feedforward: widths of the input and of the hidden layer.
        activation: one of the names that `FeedForward` takes.
        recompute: keep the hidden layer's inputs only and compute the rest again in the backward.
        impl: the backend; None chooses.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """

    def __init__(
        self,
        embed_dim: int,
        dim_feedforward: int,
        activation: str = "silu",
        device=None,
        dtype=None,
        *,
        recompute: bool = False,
        impl: Impl | None = None,
    ):
        super().__init__()
        require_choice("GatedFeedForward", "activation", activation, ACTIVATIONS)
        self.gate_proj = nn.Linear(embed_dim, dim_feedforward, False, device, dtype)
        self.up_proj = nn.Linear(embed_dim, dim_feedforward, False, device, dtype)
        self.down_proj = nn.Linear(dim_feedforward, embed_dim, False, device, dtype)
        self.activation = activation
        self.recompute = recompute
        self.impl = impl

    def reset_parameters(self) -> None:
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            linear.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x and the result: (*, embed_dim)."""
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if not all(is_plain(linear, nn.Linear) for linear in projections):
            gate, up = self.gate_proj(x), self.up_proj(x)  # (*, dim_feedforward)
            return self.down_proj(glu(gate, up, activation=self.activation, impl=self.impl))
        return gated_ffn(
            x,
            self.gate_proj.weight,
            self.up_proj.weight,
            self.down_proj.weight,
            activation=self.activation,
            recompute=self.recompute,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def feed_forward(
    x: torch.Tensor,
    linear1: nn.Module,
    linear2: nn.Module,
    activation: Activation,
    dropout: nn.Module,
    *,
    recompute: bool = False,
    impl: Impl | None = None,
) -> torch.Tensor:
    """linear2(dropout(activation(linear1(x)))) over modules that the caller owns.

    It is fused as far as the modules are torch's own, without hooks and with their class's forward.
    Others (adapters, parametrizations, quantized or offloaded layers, unknown activations, other
    dropouts) are called, never bypassed.
    """
    name = activation_name(activation)
    if name is None:
        return linear2(dropout(activation(linear1(x))))
    dropout_p = dropout_rate(dropout)
    if dropout_p is None:
        return linear2(dropout(bias_act(linear1(x), activation=name, impl=impl)))
    if not (is_plain(linear1, nn.Linear) and is_plain(linear2, nn.Linear)):
        return linear2(bias_act(linear1(x), activation=name, dropout_p=dropout_p, impl=impl))
    return ffn(
        x,
        linear1.weight,
        linear1.bias,
        linear2.weight,
        linear2.bias,
        activation=name,
        dropout_p=dropout_p,
        recompute=recompute,
        impl=impl,
    )


def check_activation(op: str, activation: Activation) -> Activation:
    """The activation itself, or torch's function for "relu" and "gelu", as torch.nn stores them."""
    if not isinstance(activation, str):
        if not callable(activation):
            got = type(activation).__name__
            raise fail(op, "activation", "be a name or a callable", got, TypeError)
        return activation
    require_choice(op, "activation", activation, ACTIVATIONS)
    return {"relu": F.relu, "gelu": F.gelu}.get(activation, activation)


def activation_name(activation: Activation) -> str | None:
    """The operator's name for an activation; None where it has none."""
    if isinstance(activation, str):
        return activation
    if is_plain(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if activation is F.relu or is_plain(activation, nn.ReLU):
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if activation is F.silu or is_plain(activation, nn.SiLU):
        return "silu"
    return None
