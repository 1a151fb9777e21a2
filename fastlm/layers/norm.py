"""LayerNorm and RMSNorm: torch.nn's modules over the fused operators.

They are subclasses, so state_dicts, initialisation and `isinstance` checks (weight-decay groups,
sharding policies) are torch.nn's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastlm.backends import Impl
from fastlm.ops._check import fail, require_tensor
from fastlm.ops.norm import layer_norm, rms_norm

Normalized = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` with the residual add and the dropout before it in the same pass.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in `torch.nn.LayerNorm`.
        impl: the backend; None chooses.
    """

    impl: Impl | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        impl: Impl | None = None,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.impl = impl

    def forward(
        self,
        input: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        dropout_p: float = 0.0,
        seed: int | torch.Tensor | None = None,
        prenorm: bool = False,
    ) -> Normalized:
        """LayerNorm(residual + dropout(input)).

        Args:
            input: shape (*, *normalized_shape).
            residual: the same shape; None adds nothing.
            dropout_p: probability of dropping an element of `input`; applied whether or not the
                module is training.
            seed: of the dropout; None draws one from torch's generator.
            prenorm: also return residual + dropout(input).
        """
        x, residual = _as_rows("LayerNorm", input, residual, self.normalized_shape)
        weight = None if self.weight is None else self.weight.flatten()
        bias = None if self.bias is None else self.bias.flatten()
        out = layer_norm(
            x,
            weight,
            bias,
            eps=self.eps,
            residual=residual,
            dropout_p=dropout_p,
            seed=seed,
            prenorm=prenorm,
            impl=self.impl,
        )
        return _as_shape(out, input.shape)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` with the residual add and the dropout before it in the same pass.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in `torch.nn.RMSNorm`; `eps`
            None is the machine epsilon of fp32, and of fp64 for fp64 inputs.
        impl: the backend; None chooses.
    """

    impl: Impl | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
        *,
        impl: Impl | None = None,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.impl = impl

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        dropout_p: float = 0.0,
        seed: int | torch.Tensor | None = None,
        prenorm: bool = False,
    ) -> Normalized:
        """RMSNorm(residual + dropout(x)); arguments as in `LayerNorm.forward`."""
        rows, residual = _as_rows("RMSNorm", x, residual, self.normalized_shape)
        weight = None if self.weight is None else self.weight.flatten()
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        out = rms_norm(
            rows,
            weight,
            eps=eps,
            residual=residual,
            dropout_p=dropout_p,
            seed=seed,
            prenorm=prenorm,
            impl=self.impl,
        )
        return _as_shape(out, x.shape)


def _as_rows(op, x, residual, shape):
    """x and residual with the normalized dimensions flattened into one."""
    require_tensor(op, "input", x)
    if x.is_nested:
        raise fail(op, "input", "be a dense tensor", "a nested tensor", NotImplementedError)
    if tuple(x.shape[-len(shape) :]) != shape:
        raise fail(op, "input", f"have shape (*, {', '.join(map(str, shape))})", tuple(x.shape))
    if len(shape) == 1:
        return x, residual
    return x.flatten(-len(shape)), None if residual is None else residual.flatten(-len(shape))


def _as_shape(out: Normalized, shape: torch.Size) -> Normalized:
    if isinstance(out, tuple):
        return out[0].view(shape), out[1].view(shape)
    return out.view(shape)
