"""Multi-head attention: torch.nn's module over the fused operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlm.backends import Impl
from fastlm.layers._masks import attention_masks
from fastlm.ops._check import fail, make_seed, require_probability, require_tensor
from fastlm.ops.attention import attention
from fastlm.ops.attention_variants import attention_decode, attention_weights


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` over `fastlm.attention`.

    A subclass, so state_dicts, initialisation and `isinstance` checks are torch.nn's own. Four
    things differ: a query that may attend to no key gets zeros, where torch gives NaN;
    `is_causal=True` needs no `attn_mask`, and never hides the keys of `add_bias_kv` and
    `add_zero_attn`, which torch does without `need_weights`; nested tensors are refused.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
            device, dtype: as in `torch.nn.MultiheadAttention`.
        impl: the backend of `fastlm.attention`; None chooses. Weights and cached attention choose
            theirs.
    """

    impl: Impl | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        impl: Impl | None = None,
    ):
        op = "MultiheadAttention"
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            got = f"embed_dim={embed_dim} and num_heads={num_heads}"
            raise fail(op, "embed_dim", "be a positive multiple of num_heads", got)
        require_probability(op, "dropout", dropout)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        self.impl = impl

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of every query to the keys, with torch.nn's meaning of each argument.

        Args:
            query: (seqlen_q, batch, embed_dim), (batch, seqlen_q, embed_dim) with `batch_first`,
                or (seqlen_q, embed_dim).
            key, value: as query, with seqlen_k and kdim or vdim. Passing one tensor for all three,
                or for key and value, projects it once.
            key_padding_mask: (batch, seqlen_k), or (seqlen_k,) without a batch. Boolean True =
                ignore the key; floating-point values are added to the scores.
            need_weights: also return the attention weights, from a second pass over the scores.
            attn_mask: (seqlen_q, seqlen_k) or (batch * num_heads, seqlen_q, seqlen_k). Boolean
                True = may not attend; floating-point values are added, and get gradients.
            average_attn_weights: return the mean of the weights over heads.
            is_causal: says that `attn_mask` is the causal mask (query i sees the keys up to i):
                a mask is then not read, and need not be given.

        Returns:
            The output, as query, and the weights after dropout: (batch, seqlen_q, seqlen_k), per
            head (batch, num_heads, seqlen_q, seqlen_k), both without batch if query has none; None
            without `need_weights`.
        """
        self._check(query, key, value)
        q, k, v = self._project(query, key, value)  # (batch, seqlen, num_heads, head_dim)
        k, v = self._append(k, v)
        if query.dim() == 2 and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        options = self._options(q, k, attn_mask, key_padding_mask, is_causal)
        if not need_weights:
            return self._output(attention(q, k, v, impl=self.impl, **options), query), None
        out, lse = attention(q, k, v, return_lse=True, impl=self.impl, **options)
        # Recomputed in the backward pass, which else would keep (batch, num_heads, seqlen_q,
        # seqlen_k) tensors, whether or not the loss reads the weights.
        weights = checkpoint(
            attention_weights, q, k, lse, use_reentrant=False, preserve_rng_state=False,
            impl=self.impl, **options,
        )  # fmt: skip
        weights = weights.mean(1) if average_attn_weights else weights
        return self._output(out, query), weights if query.dim() == 3 else weights.squeeze(0)

    def cached(
        self,
        x: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        seqlens_k: torch.Tensor | None,
    ) -> torch.Tensor:
        """Causal self-attention of new tokens to themselves and to cached ones, without gradients.

        Args:
            x: (batch, seqlen, embed_dim) with `batch_first`: the new tokens.
            k_cache, v_cache: (batch, max_seqlen, num_heads, head_dim); the new keys and values are
                written into them, in place, at `seqlens_k`.
            seqlens_k: (batch,) int32, how many tokens each row has cached; None: none.
        """
        q, k, v = self._project(x, x, x)  # (batch, seqlen, num_heads, head_dim)
        if seqlens_k is None:
            k_cache[:, : k.shape[1]] = k
            v_cache[:, : v.shape[1]] = v
            return self._output(attention(q, k, v, causal=True, impl=self.impl), x)
        out = attention_decode(q, k_cache, v_cache, seqlens_k, k_new=k, v_new=v)
        return self._output(out, x)

    def _options(self, q, k, attn_mask, key_padding_mask, is_causal) -> dict:
        """What `attention` and `attention_weights` are both given."""
        extra = (self.bias_k is not None) + self.add_zero_attn
        seqlen_q, seqlen_k = q.shape[1], k.shape[1] - extra
        if is_causal and extra and attn_mask is None:
            attn_mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).triu(1)
        causal = is_causal and not extra  # the appended keys lie outside the triangle
        mask, bias = attention_masks(
            None if causal else attn_mask, key_padding_mask, q, seqlen_k, extra
        )
        dropout_p = self.dropout if self.training else 0.0
        return {
            "causal": "top_left" if causal else False,
            "mask": mask,
            "bias": bias,
            "dropout_p": dropout_p,
            # Drawn here, so that the weights are dropped as the output's were.
            "seed": make_seed(None, dropout_p, q.device),
        }

    def _project(self, query, key, value):
        """Queries, keys and values by head; views of one product where the inputs are the same."""
        bias = self.in_proj_bias
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
        if not self._qkv_same_embed_dim:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key and key is value:
            return self._heads(F.linear(query, self.in_proj_weight, bias), 3)
        elif key is value:
            w_q, w_kv = self.in_proj_weight.tensor_split((self.embed_dim,))
            b_kv = None if bias is None else bias[self.embed_dim :]
            q, kv = F.linear(query, w_q, b_q), F.linear(key, w_kv, b_kv)
            return *self._heads(q, 1), *self._heads(kv, 2)
        else:
            w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        q, k, v = F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)
        return *self._heads(q, 1), *self._heads(k, 1), *self._heads(v, 1)

    def _heads(self, x: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """(..., parts * embed_dim) to `parts` views (batch, seqlen, num_heads, head_dim)."""
        # Not unflatten, which torch.compile does not trace under a mode such as activate_sdpa.
        x = x.view(*x.shape[:-1], parts, self.num_heads, self.head_dim)
        if x.dim() == 4:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unbind(2)

    def _output(self, out: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """The output projection of (batch, seqlen_q, num_heads, head_dim), laid out as query."""
        if query.dim() == 2:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return self.out_proj(out.flatten(-2))

    def _append(self, k, v):
        """Keys and values, followed by the learned and by the zero ones."""
        if self.bias_k is not None:
            one = (1, 1, self.num_heads, self.head_dim)
            k_new, v_new = (b.to(k.dtype).view(one) for b in (self.bias_k, self.bias_v))
            k = torch.cat([k, k_new.expand(k.shape[0], -1, -1, -1)], 1)
            v = torch.cat([v, v_new.expand(v.shape[0], -1, -1, -1)], 1)
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        return k, v

    def _check(self, query, key, value) -> None:
        op = "MultiheadAttention"
        batch = 0 if self.batch_first else 1
        inputs = {"query": query, "key": key, "value": value}
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for name, x in inputs.items():
            require_tensor(op, name, x)
            if x.is_nested:
                got = "a nested tensor; pad it and pass key_padding_mask"
                raise fail(op, name, "be a dense tensor", got, NotImplementedError)
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise fail(op, name, "have 2 or 3 dimensions, as query", f"{x.dim()}")
            if x.shape[-1] != widths[name]:
                raise fail(op, name, f"have width {widths[name]}", x.shape[-1])
            if x.dim() == 3 and x.shape[batch] != query.shape[batch]:
                want = f"have query's batch size {query.shape[batch]}"
                raise fail(op, name, want, x.shape[batch])
        if key.shape[:-1] != value.shape[:-1]:
            raise fail(op, "value", f"match key's shape {tuple(key.shape)}", tuple(value.shape))
