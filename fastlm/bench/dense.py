"""Attention as users of torch write it, with every mask and bias as a dense tensor.

What depends on no input that gets a gradient is made once, outside of the timed call: masks,
distances, T5's buckets. Sequences that are packed are padded for the call.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from fastlm.reference.attention_mask import allowed_pairs, key_distances
from fastlm.reference.relative_bias import relative_bucket


class Dense:
    """The functions take a case's tensors by name, and return what fastlm's function would."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], options: Mapping[str, object]):
        t, o = tensors, options
        device = t["q"].device
        self.dropout_p, self.softcap = o.get("dropout_p", 0.0), o.get("softcap")
        self.packed_q = self.packed_k = lengths_q = None
        lengths_k, causal = t.get("seqlens_k"), o.get("causal", False)
        seqlen_q, seqlen_k = t["q"].shape[1], t["k"].shape[1]
        if "cu_seqlens_q" in t:
            seqlen_q, seqlen_k = o["max_seqlen_q"], o["max_seqlen_k"]
            lengths_q, lengths_k = t["cu_seqlens_q"].diff(), t["cu_seqlens_k"].diff()
            self.packed_q = _Packed(lengths_q, seqlen_q)
            self.packed_k = _Packed(lengths_k, seqlen_k)
        if lengths_k is not None and bool((lengths_k == seqlen_k).all()):
            lengths_k = None  # no key is padding: torch's kernels need no mask
        mask, window = t.get("mask"), o.get("window")
        biased = any(name in t for name in ("bias", "table", "alibi_slopes"))
        # The only mask that torch's kernels know without a tensor.
        self.is_causal = bool(causal) and seqlen_q == seqlen_k and not biased
        self.is_causal &= window is None and mask is None and lengths_k is None
        distance = None
        if causal or window is not None or "table" in t or "alibi_slopes" in t:
            distance = key_distances(seqlen_q, seqlen_k, causal, lengths_q, lengths_k, device)
        self.allowed = allowed_pairs(
            seqlen_q, seqlen_k, distance, causal, window, mask, None, None, lengths_k, device
        )
        if self.allowed is not None:
            # Rows without a key are padding here, cut off later; NaN in them would reach others.
            self.allowed = self.allowed | ~self.allowed.any(-1, keepdim=True)
        if "table" in t:
            buckets = t["table"].shape[0]
            self.bucket = relative_bucket(
                distance[:, 0], buckets, o["bidirectional"], o["max_distance"]
            )
        if "alibi_slopes" in t:
            self.distance = distance.abs().to(t["q"].dtype)

    def undropped(self) -> Dense:
        """The same without dropout, on the same masks."""
        other = copy.copy(self)
        other.dropout_p = 0.0
        return other

    def sdpa(self, q, k, v, *, sinks=None, **biases) -> torch.Tensor:
        """`F.scaled_dot_product_attention`, on whichever kernel torch chooses."""
        if self.softcap is not None or sinks is not None:
            raise NotImplementedError("scaled_dot_product_attention has no softcap and no sinks")
        q, k, v = self._heads_first(q, k, v)
        mask = None if self.is_causal else self._added(**biases)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout_p, self.is_causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self._tokens_first(out)

    def eager(self, q, k, v, **biases) -> torch.Tensor:
        """Two matrix products and a softmax, as models without a fused kernel have it."""
        q, k, v = self._heads_first(q, k, v)
        return self._tokens_first(self._probabilities(q, k, **biases) @ _repeat(v, q.shape[1]))

    def weights(self, q, k, lse, **biases) -> torch.Tensor:
        """The probabilities, without the help of lse."""
        return self._probabilities(q.transpose(1, 2), k.transpose(1, 2), **biases)

    def _probabilities(self, q, k, *, sinks=None, **biases) -> torch.Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ _repeat(k, q.shape[1]).transpose(-2, -1)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        added = self._added(**biases)
        if added is not None and added.dtype == torch.bool:
            scores = scores.masked_fill(~added, float("-inf"))
        elif added is not None:
            scores = scores + added
        if sinks is not None:
            sink = sinks[:, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sink], dim=-1)
        p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return F.dropout(p if sinks is None else p[..., :-1], self.dropout_p)

    def _added(self, *, bias=None, table=None, alibi_slopes=None, **_) -> torch.Tensor | None:
        """What is added to the scores, or where pairs are allowed, or None."""
        if table is not None:
            bias = table[self.bucket].permute(0, 3, 1, 2)
        elif alibi_slopes is not None:
            bias = -alibi_slopes[:, None, None] * self.distance
        if bias is None or self.allowed is None:
            return self.allowed if bias is None else bias
        return bias.masked_fill(~self.allowed, float("-inf"))

    def _heads_first(self, q, k, v) -> list[torch.Tensor]:
        if self.packed_q is not None:
            q, k, v = self.packed_q.pad(q), self.packed_k.pad(k), self.packed_k.pad(v)
        return [x.transpose(1, 2) for x in (q, k, v)]

    def _tokens_first(self, out: torch.Tensor) -> torch.Tensor:
        out = out.transpose(1, 2)
        return out if self.packed_q is None else self.packed_q.unpad(out)


class _Packed:
    """Where the tokens of packed sequences are when each is padded to `longest`."""

    def __init__(self, lengths: torch.Tensor, longest: int):
        self.shape = (lengths.shape[0], longest)
        real = torch.arange(longest, device=lengths.device) < lengths[:, None]
        self.slots = real.flatten().nonzero().squeeze(1)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        padded = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
        return padded.index_copy(0, self.slots, x).unflatten(0, self.shape)

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1).index_select(0, self.slots)


def _repeat(x: torch.Tensor, nheads: int) -> torch.Tensor:
    return x if x.shape[1] == nheads else x.repeat_interleave(nheads // x.shape[1], dim=1)
