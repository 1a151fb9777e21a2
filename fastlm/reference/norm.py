"""LayerNorm and RMSNorm with dropout and residual add: the specification.

    z = residual + dropout(x), rounded to its dtype
    layer_norm: y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias
    rms_norm:   y = z / sqrt(mean(z^2) + eps) * weight

Sources: Ba et al., "Layer Normalization", arXiv:1607.06450; Zhang and Sennrich, "Root Mean Square
Layer Normalization", arXiv:1910.07467.
"""

from __future__ import annotations

import torch

from fastlm.reference.dropout import dropout_rows


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    prenorm: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm over the last dimension: y in x's dtype, with `prenorm` also z."""
    z = add_residual(x, residual, dropout_p, seed)
    y = normalize_layer(z, weight, bias, eps, x.dtype)
    return (y, z) if prenorm else y


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    prenorm: bool = False,
    casting: str = "torch",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm over the last dimension: y in x's dtype, with `prenorm` also z.

    `casting` says where rounding to x's dtype happens:
        "torch": after the product with weight, as `torch.nn.RMSNorm`.
        "llama": before it, as Hugging Face's LlamaRMSNorm; y then has the wider dtype of x and
            weight.
        "gemma": after the product with 1 + weight, as Hugging Face's GemmaRMSNorm.
    """
    z = add_residual(x, residual, dropout_p, seed)
    y = normalize_rms(z, weight, eps, casting, x.dtype, x.dtype)
    return (y, z) if prenorm else y


def add_residual(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """residual + dropout(x), in the wider dtype of the two; the mask counts x's flattened rows."""
    x = dropout_rows(x, dropout_p, seed)
    return x if residual is None else residual + x


def normalize(
    z, weight, bias, kind: str, eps: float, x_dtype: torch.dtype, out_dtype: torch.dtype
) -> torch.Tensor:
    """The norm of a kind: "layer", "rms", or "rms_" and a casting other than torch's."""
    if kind == "layer":
        return normalize_layer(z, weight, bias, eps, out_dtype)
    casting = "torch" if kind == "rms" else kind.removeprefix("rms_")
    return normalize_rms(z, weight, eps, casting, x_dtype, out_dtype)


def normalize_layer(z, weight, bias, eps: float, out_dtype: torch.dtype) -> torch.Tensor:
    """LayerNorm of z; statistics in fp32 (fp64 for fp64)."""
    acc = z.to(torch.promote_types(z.dtype, torch.float32))
    centered = acc - acc.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(out_dtype)


def normalize_rms(
    z, weight, eps: float, casting: str, x_dtype: torch.dtype, out_dtype: torch.dtype
) -> torch.Tensor:
    """RMSNorm of z, statistics as above; "llama" rounds to `x_dtype` and promotes."""
    acc = z.to(torch.promote_types(z.dtype, torch.float32))
    y = acc * torch.rsqrt(acc.square().mean(-1, keepdim=True) + eps)
    if casting == "llama":
        y = y.to(x_dtype)
        return y if weight is None else weight * y
    if weight is not None:
        scale = weight.to(y.dtype)
        y = y * (1.0 + scale if casting == "gemma" else scale)
    return y.to(out_dtype)
