"""torch.nn's attention masks, of every kind, by name."""

from __future__ import annotations

import torch

from fastlm.testing import randn

MASKS = (
    "none",
    "bool",
    "bool_per_head",
    "float",
    "float_per_head",
    "padding",
    "float_padding",
    "bool_and_padding",
    "float_and_float_padding",
    "causal",
    "causal_and_padding",
)


def torch_masks(name: str, seqlen_q: int, seqlen_k: int, batch: int | None, num_heads: int):
    """(attn_mask, key_padding_mask, is_causal), True = ignore; every query keeps a key.

    Args:
        batch: None for inputs without a batch.
    """
    generator = torch.Generator().manual_seed(11)
    rows = 1 if batch is None else batch
    attn_mask = key_padding_mask = None
    if name.startswith(("bool", "float")) and name != "float_padding":
        lead = (rows * num_heads,) if "per_head" in name else ()
        attn_mask = torch.rand(*lead, seqlen_q, seqlen_k, generator=generator) < 0.3
        attn_mask[..., 0] = False
        if name.startswith("float"):
            values = randn(*attn_mask.shape, seed=12)
            attn_mask = values.masked_fill(attn_mask, float("-inf"))
    if name.startswith("causal"):
        attn_mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(1)
    if "padding" in name:
        kept = torch.arange(rows) % 3 + max(seqlen_k - 2, 1)
        key_padding_mask = torch.arange(seqlen_k) >= kept[:, None]
        if "float" in name:
            values = randn(rows, seqlen_k, seed=13)
            key_padding_mask = values.masked_fill(key_padding_mask, float("-inf"))
        if batch is None:
            key_padding_mask = key_padding_mask[0]
    return attn_mask, key_padding_mask, name.startswith("causal")
