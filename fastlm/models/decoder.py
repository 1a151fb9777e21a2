"""A decoder-only language model: pre-norm blocks, a tied head, a fused loss, a KV cache."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastlm.backends import Impl
from fastlm.layers import FeedForward, LayerNorm, MultiheadAttention
from fastlm.layers._modules import add_norm
from fastlm.models.cache import KVCache
from fastlm.models.config import TransformerConfig
from fastlm.ops._check import fail, require_shape, require_tensor
from fastlm.ops.embedding import embedding
from fastlm.ops.loss import linear_cross_entropy

# One layer's part of a cache: keys, values, and how many tokens each row holds (None: none).
Slot = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class DecoderLM(nn.Module):
    """A causal language model over tokens or bytes.

    embedding + position -> num_layers pre-norm blocks -> LayerNorm -> tied head. As in the papers,
    learned positions are added to the embedding, sinusoidal ones to sqrt(embed_dim) times it.

    Args:
        config: sizes and options.
        device, dtype: of the parameters.
        impl: the backend of norms, attention and feed-forward; None chooses for each.

    Sources: Vaswani et al., arXiv:1706.03762; Radford et al., "Language Models are Unsupervised
    Multitask Learners", 2019 (pre-norm, learned positions, initialisation).
    """

    def __init__(
        self, config: TransformerConfig, device=None, dtype=None, *, impl: Impl | None = None
    ):
        super().__init__()
        self.config = config
        place = {"device": device, "dtype": dtype}
        self.token_weight = nn.Parameter(torch.empty(config.vocab_size, config.embed_dim, **place))
        positions = torch.empty(config.max_seqlen, config.embed_dim, **place)
        if config.positions == "learned":
            self.position_weight = nn.Parameter(positions)
        else:
            # Not in the state_dict: it follows from the configuration.
            self.register_buffer("position_weight", positions, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            DecoderBlock(config, **place, impl=impl) for _ in range(config.num_layers)
        )
        self.norm = LayerNorm(
            config.embed_dim, config.layer_norm_eps, bias=config.bias, **place, impl=impl
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices normal with deviation 0.02, less for those that write to the residual stream."""
        nn.init.normal_(self.token_weight, std=0.02)
        if self.config.positions == "learned":
            nn.init.normal_(self.position_weight, std=0.02)
        else:
            self.position_weight.copy_(sinusoidal_positions(*self.position_weight.shape))
        for block in self.blocks:
            block.reset_parameters()
        self.norm.reset_parameters()

    def forward(
        self,
        ids: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        reduction: str = "mean",
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Logits of the next token at every position, or the loss against `labels`.

        Args:
            ids: (batch, seqlen) integers below `vocab_size`.
            labels: (batch, seqlen) integers: labels[b, i] is the token that follows ids[b, i], or
                -100 for none. For a text t: ids = t[:, :-1], labels = t[:, 1:].
            reduction: "mean" over the labels that are not -100, "sum", or "none" for (batch,
                seqlen).
            cache: `ids` continue what it holds, and are added to it; under `torch.no_grad()` only.

        Returns:
            Logits (batch, seqlen, vocab_size); with labels the loss alone, and the logits are never
            in memory as a whole.

        Raises:
            TypeError, ValueError: inputs that do not fit, or more than `max_seqlen` tokens.
        """
        x = self.hidden(ids, cache=cache)  # (batch, seqlen, embed_dim)
        if labels is None:
            return self.head(x)
        require_tensor("DecoderLM", "labels", labels)
        require_shape("DecoderLM", "labels", labels, ids.shape, "(batch, seqlen)")
        return linear_cross_entropy(x, self.token_weight, labels, reduction=reduction)

    def hidden(self, ids: torch.Tensor, *, cache: KVCache | None = None) -> torch.Tensor:
        """What the head reads, (batch, seqlen, embed_dim); arguments as in `forward`."""
        self._check(ids, cache)
        branch, stream = self._embed(ids, cache), None
        for i, block in enumerate(self.blocks):
            slot = None if cache is None else cache.slot(i, ids.shape[1])
            branch, stream = block(branch, stream, slot)  # both (batch, seqlen, embed_dim)
        if cache is not None:
            cache.advance(ids.shape[1])
        return add_norm(self.norm, self.dropout, branch, stream)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocab_size) of hidden states (..., embed_dim)."""
        return F.linear(x, self.token_weight)

    def _embed(self, ids: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """(batch, seqlen, embed_dim); its dropout is that of the first block's norm."""
        positions = None
        if cache is not None:
            new = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32)
            positions = cache.lengths[:, None] + new
        x = embedding(
            ids, self.token_weight, positions=positions, position_weight=self.position_weight
        )
        if self.config.positions == "learned":
            return x
        return x * math.sqrt(self.config.embed_dim)  # the table is divided by it

    def _check(self, ids: torch.Tensor, cache: KVCache | None) -> None:
        require_tensor("DecoderLM", "ids", ids)
        if ids.dim() != 2:
            raise fail("DecoderLM", "ids", "have shape (batch, seqlen)", tuple(ids.shape))
        if ids.shape[1] > self.config.max_seqlen:
            want = f"have at most max_seqlen = {self.config.max_seqlen} tokens a row"
            raise fail("DecoderLM", "ids", want, ids.shape[1])
        if cache is not None:
            if torch.is_grad_enabled():
                raise fail("DecoderLM", "cache", "be used under torch.no_grad()", "gradients on")
            cache.require_room(*ids.shape)


class DecoderBlock(nn.Module):
    """Pre-norm self-attention and feed-forward.

    A block takes and returns the residual stream in two parts, `stream + dropout(branch)`, so that
    every add is made by the norm that follows it, in one pass.
    """

    def __init__(
        self, config: TransformerConfig, device=None, dtype=None, *, impl: Impl | None = None
    ):
        super().__init__()
        dim, bias, eps = config.embed_dim, config.bias, config.layer_norm_eps
        place = {"device": device, "dtype": dtype, "impl": impl}
        self.depth = config.num_layers
        self.norm1 = LayerNorm(dim, eps, bias=bias, **place)
        self.self_attn = MultiheadAttention(
            dim, config.num_heads, config.dropout, bias, batch_first=True, **place
        )
        self.norm2 = LayerNorm(dim, eps, bias=bias, **place)
        self.ffn = FeedForward(
            dim, config.dim_feedforward, config.dropout, config.activation, bias, **place
        )
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self) -> None:
        std = 0.02
        residual_std = std / math.sqrt(2 * self.depth)
        attn, ffn = self.self_attn, self.ffn
        nn.init.normal_(attn.in_proj_weight, std=std)
        nn.init.normal_(attn.out_proj.weight, std=residual_std)
        nn.init.normal_(ffn.linear1.weight, std=std)
        nn.init.normal_(ffn.linear2.weight, std=residual_std)
        for bias in (attn.in_proj_bias, attn.out_proj.bias, ffn.linear1.bias, ffn.linear2.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        self.norm1.reset_parameters()
        self.norm2.reset_parameters()

    def forward(
        self, branch: torch.Tensor, stream: torch.Tensor | None, slot: Slot | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """branch and stream: (batch, seqlen, embed_dim); stream None is 0."""
        x, stream = add_norm(self.norm1, self.dropout, branch, stream, prenorm=True)
        if slot is None:
            attended, _ = self.self_attn(x, x, x, need_weights=False, is_causal=True)
        else:
            attended = self.self_attn.cached(x, *slot)
        x, stream = add_norm(self.norm2, self.dropout, attended, stream, prenorm=True)
        return self.ffn(x), stream


def sinusoidal_positions(max_seqlen: int, embed_dim: int) -> torch.Tensor:
    """sin and cos of position / 10000^(2i / embed_dim), interleaved, over sqrt(embed_dim), in fp32.

    `DecoderLM` multiplies the sum of embedding and position by sqrt(embed_dim).

    Source: Vaswani et al., arXiv:1706.03762, section 3.5.
    """
    position = torch.arange(max_seqlen, dtype=torch.float64)[:, None]
    rate = 10000.0 ** (-torch.arange(0, embed_dim, 2, dtype=torch.float64) / embed_dim)
    angle = position * rate  # (max_seqlen, ceil(embed_dim / 2))
    table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :embed_dim]
    return (table / math.sqrt(embed_dim)).float()
