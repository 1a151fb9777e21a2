"""Token, position and type embeddings with LayerNorm and dropout: the specification.

    y = dropout(layer_norm(token_weight[ids] + position_weight[positions] + type_weight[type_ids]))

Sources: Vaswani et al., arXiv:1706.03762, section 3.4; Devlin et al., arXiv:1810.04805, figure 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm.reference.dropout import dropout_rows
from fastlm.reference.norm import layer_norm


def embedding(
    ids: torch.Tensor,
    token_weight: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    position_weight: torch.Tensor | None = None,
    type_ids: torch.Tensor | None = None,
    type_weight: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    padding_idx: int | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embeds ids (..., seqlen) to (..., seqlen, dim); sums and normalises in fp32 (fp64 for fp64).

    Without `positions` token i has position i; without `type_ids` every token has type 0. There is
    a LayerNorm where `norm_weight` is given. Row `padding_idx` of token_weight has gradient 0.
    Returns token_weight's dtype, rounded once.
    """
    y = F.embedding(ids, token_weight, padding_idx)
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    if position_weight is not None:
        if positions is None:
            rows = position_weight[: ids.shape[-1]]
        else:
            rows = F.embedding(positions, position_weight)
        y = y + rows.to(y.dtype)
    if type_weight is not None:
        rows = type_weight[0] if type_ids is None else F.embedding(type_ids, type_weight)
        y = y + rows.to(y.dtype)
    if norm_weight is not None:
        y = layer_norm(y, norm_weight, norm_bias, eps=eps)
    return dropout_rows(y, dropout_p, seed).to(token_weight.dtype)
