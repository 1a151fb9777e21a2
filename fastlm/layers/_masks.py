"""torch.nn's attention masks in the operators' terms."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm.ops._check import fail, require_shape, require_tensor

_OP = "MultiheadAttention"


def attention_masks(
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    q: torch.Tensor,
    seqlen_k: int,
    extra: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The operators' `mask` (True = attend) and `bias` for torch.nn's two masks (True = ignore).

    Args:
        attn_mask: (seqlen_q, seqlen_k) or (batch * num_heads, seqlen_q, seqlen_k).
        key_padding_mask: (batch, seqlen_k).
        q: (batch, seqlen_q, num_heads, head_dim).
        extra: number of keys after seqlen_k that no mask covers: all queries attend to them.
    """
    batch, seqlen_q, num_heads, _ = q.shape
    ignore, added = [], []
    if attn_mask is not None:
        _require_mask("attn_mask", attn_mask)
        shape, per_head = (seqlen_q, seqlen_k), (batch * num_heads, seqlen_q, seqlen_k)
        if tuple(attn_mask.shape) not in (shape, per_head):
            want = f"have shape (seqlen_q, seqlen_k) = {shape}"
            want += f" or (batch * num_heads, seqlen_q, seqlen_k) = {per_head}"
            raise fail(_OP, "attn_mask", want, tuple(attn_mask.shape))
        lead = (1, 1) if attn_mask.dim() == 2 else (batch, num_heads)
        x = attn_mask.reshape(*lead, *shape)
        (ignore if x.dtype == torch.bool else added).append(x)
    if key_padding_mask is not None:
        _require_mask("key_padding_mask", key_padding_mask)
        require_shape(
            _OP, "key_padding_mask", key_padding_mask, (batch, seqlen_k), "(batch, seqlen_k)"
        )
        x = key_padding_mask.reshape(batch, 1, 1, seqlen_k)
        (ignore if x.dtype == torch.bool else added).append(x)
    mask = ~(ignore[0] if len(ignore) == 1 else ignore[0] | ignore[1]) if ignore else None
    bias = (added[0] if len(added) == 1 else added[0] + added[1]) if added else None
    if extra:
        mask = None if mask is None else F.pad(mask, (0, extra), value=True)
        bias = None if bias is None else F.pad(bias, (0, extra))
    return mask, bias


def _require_mask(name: str, mask) -> None:
    require_tensor(_OP, name, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise fail(_OP, name, "have a boolean or floating-point dtype", mask.dtype)
