"""Activations, gated activations and feed-forward blocks: the specification.

    bias_act:  y = dropout(activation(x + bias))
    glu:       y = activation(gate) * up
    ffn:       y = dropout(activation(x w1^T + b1)) w2^T + b2
    gated_ffn: y = (activation(x w_gate^T) * (x w_up^T)) w_down^T

Sources: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, section 3.3; Hendrycks and
Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415; Shazeer, "GLU Variants Improve
Transformer", arXiv:2002.05202; So et al., "Primer", arXiv:2109.08668 (squared ReLU).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastlm.reference.dropout import dropout_rows


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    acc = x.to(torch.promote_types(x.dtype, torch.float32))
    return (acc * torch.sigmoid(1.702 * acc)).to(x.dtype)


# Each takes any floating-point dtype, computes in fp32 or wider, and rounds once.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,  # x * Phi(x), with erf
    "gelu_tanh": _gelu_tanh,  # its approximation with tanh
    "relu": F.relu,
    "relu2": _relu2,  # relu(x)^2
    "silu": F.silu,  # x * sigmoid(x)
    "quick_gelu": _quick_gelu,  # x * sigmoid(1.702 x)
}


def bias_act(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """dropout(activation(x + bias)) in x's dtype; the sum is not rounded to it.

    The dropout mask counts x's flattened rows.
    """
    z = x
    if bias is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        z = x.to(wide) + bias.to(wide)
    return dropout_rows(ACTIVATIONS[activation](z), dropout_p, seed).to(x.dtype)


def glu(gate: torch.Tensor, up: torch.Tensor, *, activation: str = "silu") -> torch.Tensor:
    """activation(gate) * up, in the wider dtype of the two, rounded once."""
    dtype = torch.promote_types(gate.dtype, up.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (ACTIVATIONS[activation](gate.to(wide)) * up.to(wide)).to(dtype)


def ffn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """Two linear layers with an activation and dropout between them, in x's dtype.

    Parameters of another dtype are cast to x's. `recompute` keeps x alone for the backward pass; it
    changes memory and time, not the value.
    """
    if recompute:
        options = dict(activation=activation, dropout_p=dropout_p, seed=seed)
        return _recomputed(ffn, x, w1, b1, w2, b2, **options)
    h = bias_act(_linear(x, w1, b1), activation=activation, dropout_p=dropout_p, seed=seed)
    return _linear(h, w2, b2)


def gated_ffn(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    *,
    activation: str = "silu",
    recompute: bool = False,
    glu: Callable = glu,
) -> torch.Tensor:
    """A gated feed-forward block without biases, in x's dtype; `recompute` as in `ffn`."""
    if recompute:
        return _recomputed(gated_ffn, x, w_gate, w_up, w_down, activation=activation, glu=glu)
    h = glu(_linear(x, w_gate), _linear(x, w_up), activation=activation)
    return _linear(h, w_down)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _recomputed(fn: Callable, *args, **options) -> torch.Tensor:
    # The seed is an argument, so there is no generator state to restore.
    return checkpoint(fn, *args, **options, use_reentrant=False, preserve_rng_state=False)
