"""The configuration of every model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastlm.ops._check import fail, require_choice, require_probability
from fastlm.ops.ffn import ACTIVATIONS

_OP = "TransformerConfig"
POSITIONS = ("learned", "sinusoidal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and options of a Transformer.

    Args:
        vocab_size: number of tokens; 256 for bytes.
        embed_dim: width of the residual stream, a multiple of `num_heads`.
        num_heads, num_layers: attention heads of a layer, and layers.
        dim_feedforward: hidden width of the feed-forward network; None is 4 * `embed_dim`.
        max_seqlen: the longest sequence, which is the size of the position table.
        dropout: probability, in training, of dropping attention weights, hidden elements, and
            elements of every sublayer's output.
        activation: one of the names that `fastlm.layers.FeedForward` takes.
        positions: "learned", or "sinusoidal" as in Vaswani et al., arXiv:1706.03762, section 3.5.
        bias: whether linear and normalisation layers have one.
        layer_norm_eps: of every LayerNorm.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of range, by name.
    """

    vocab_size: int = 256
    embed_dim: int = 256
    num_heads: int = 4
    num_layers: int = 4
    dim_feedforward: int | None = None
    max_seqlen: int = 256
    dropout: float = 0.0
    activation: str = "gelu"
    positions: str = "learned"
    bias: bool = True
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.dim_feedforward is None and type(self.embed_dim) is int:
            object.__setattr__(self, "dim_feedforward", 4 * self.embed_dim)
        for name in (
            "vocab_size", "embed_dim", "num_heads", "num_layers", "dim_feedforward", "max_seqlen"
        ):  # fmt: skip
            _require_positive(name, getattr(self, name))
        if self.embed_dim % self.num_heads:
            want = f"be a multiple of num_heads = {self.num_heads}"
            raise fail(_OP, "embed_dim", want, self.embed_dim)
        require_probability(_OP, "dropout", self.dropout)
        require_choice(_OP, "activation", self.activation, ACTIVATIONS)
        require_choice(_OP, "positions", self.positions, POSITIONS)
        if not isinstance(self.bias, bool):
            raise fail(_OP, "bias", "be True or False", repr(self.bias), TypeError)
        if not isinstance(self.layer_norm_eps, (int, float)) or not self.layer_norm_eps > 0:
            raise fail(_OP, "layer_norm_eps", "be a positive number", repr(self.layer_norm_eps))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TransformerConfig:
        """The inverse of `to_dict`; missing fields take their defaults, unknown ones raise."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise fail(_OP, "fields", f"be among {', '.join(known)}", repr(name))
        return cls(**fields)


def _require_positive(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise fail(_OP, name, "be a positive integer", repr(value), TypeError)
    if value < 1:
        raise fail(_OP, name, "be a positive integer", value)
