"""Encoder and decoder layers: torch.nn's, trainable and fused.

Post-norm: z = LayerNorm(Dropout(Sublayer(x)) + x), as in Vaswani et al., arXiv:1706.03762.
Pre-norm:  z = x + Dropout(Sublayer(LayerNorm(x))), as in Xiong et al., arXiv:2002.04745.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastlm.backends import Impl
from fastlm.layers._modules import add_norm
from fastlm.layers.attention import MultiheadAttention
from fastlm.layers.ffn import Activation, check_activation, feed_forward
from fastlm.layers.norm import LayerNorm


class TransformerEncoderLayer(nn.Module):
    """`torch.nn.TransformerEncoderLayer`: self-attention and a feed-forward network.

    It has torch.nn's submodules, so its state_dict and initialisation, and computes the same in
    training and evaluation, with and without gradients. Three things differ: a query that may
    attend to no key gets zeros from attention, where torch gives NaN; `is_causal=True` needs no
    `src_mask`; nested tensors are refused.

    Args:
        d_model, nhead, dim_feedforward, dropout, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype: as in `torch.nn.TransformerEncoderLayer`.
        activation: as there, or any name that `FeedForward` takes. The names, and torch's functions
            and modules for them, are fused; any other callable runs as it is.
        impl: the backend of every operator in the layer; None chooses for each.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        impl: Impl | None = None,
    ):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        # The order of torch.nn, so that one seed gives both the same parameters.
        self.self_attn = MultiheadAttention(
            d_model, nhead, dropout, bias, batch_first=batch_first, impl=impl, **place
        )
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias, **place)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, **place)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, layer_norm_eps, bias=bias, impl=impl, **place)
        self.norm2 = LayerNorm(d_model, layer_norm_eps, bias=bias, impl=impl, **place)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = check_activation("TransformerEncoderLayer", activation)
        self.impl = impl

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Arguments and result as in `torch.nn.TransformerEncoderLayer`.

        Args:
            src: (seqlen, batch, d_model), (batch, seqlen, d_model) with `batch_first`, or
                (seqlen, d_model).
            src_mask, src_key_padding_mask, is_causal: as `attn_mask`, `key_padding_mask` and
                `is_causal` of `MultiheadAttention`.
        """
        masks = src_mask, src_key_padding_mask, is_causal
        if not self.norm_first:
            x = _attend(self.self_attn, src, None, *masks)
            x = add_norm(self.norm1, self.dropout1, x, src)
            return add_norm(self.norm2, self.dropout2, self._feed_forward(x), x)
        x = _attend(self.self_attn, self.norm1(src), None, *masks)
        y, x = add_norm(self.norm2, self.dropout1, x, src, prenorm=True)
        return x + self.dropout2(self._feed_forward(y))

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return feed_forward(
            x, self.linear1, self.linear2, self.activation, self.dropout, impl=self.impl
        )


class TransformerDecoderLayer(nn.Module):
    """`torch.nn.TransformerDecoderLayer`: self-attention, attention to memory, and feed-forward.

    Arguments, parameters and differences as in `TransformerEncoderLayer`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        impl: Impl | None = None,
    ):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(
            d_model, nhead, dropout, bias, batch_first=batch_first, impl=impl, **place
        )
        self.multihead_attn = MultiheadAttention(
            d_model, nhead, dropout, bias, batch_first=batch_first, impl=impl, **place
        )
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias, **place)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, **place)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, layer_norm_eps, bias=bias, impl=impl, **place)
        self.norm2 = LayerNorm(d_model, layer_norm_eps, bias=bias, impl=impl, **place)
        self.norm3 = LayerNorm(d_model, layer_norm_eps, bias=bias, impl=impl, **place)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.activation = check_activation("TransformerDecoderLayer", activation)
        self.impl = impl

    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """Arguments and result as in `torch.nn.TransformerDecoderLayer`.

        Args:
            tgt, memory: (seqlen, batch, d_model), (batch, seqlen, d_model) with `batch_first`, or
                (seqlen, d_model), each with its own seqlen.
            tgt_mask, tgt_key_padding_mask, tgt_is_causal: of the self-attention.
            memory_mask, memory_key_padding_mask, memory_is_causal: of the attention to memory.
        """
        masks = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        memory_masks = memory_mask, memory_key_padding_mask, memory_is_causal
        if not self.norm_first:
            attended = _attend(self.self_attn, tgt, None, *masks)
            x = add_norm(self.norm1, self.dropout1, attended, tgt)
            attended = _attend(self.multihead_attn, x, memory, *memory_masks)
            x = add_norm(self.norm2, self.dropout2, attended, x)
            return add_norm(self.norm3, self.dropout3, self._feed_forward(x), x)
        attended = _attend(self.self_attn, self.norm1(tgt), None, *masks)
        y, x = add_norm(self.norm2, self.dropout1, attended, tgt, prenorm=True)
        attended = _attend(self.multihead_attn, y, memory, *memory_masks)
        y, x = add_norm(self.norm3, self.dropout2, attended, x, prenorm=True)
        return x + self.dropout3(self._feed_forward(y))

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return feed_forward(
            x, self.linear1, self.linear2, self.activation, self.dropout, impl=self.impl
        )


def _attend(attn, x, memory, attn_mask, key_padding_mask, is_causal) -> torch.Tensor:
    """Attention of x to memory, or to itself where memory is None."""
    memory = x if memory is None else memory
    return attn(
        x,
        memory,
        memory,
        key_padding_mask=key_padding_mask,
        need_weights=False,
        attn_mask=attn_mask,
        is_causal=is_causal,
    )[0]
