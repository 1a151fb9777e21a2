"""`torch.nn.Module`s over the operators: those of torch.nn, with its parameters and semantics."""

from fastlm.layers.attention import MultiheadAttention
from fastlm.layers.block import TransformerDecoderLayer, TransformerEncoderLayer
from fastlm.layers.ffn import FeedForward, GatedFeedForward
from fastlm.layers.norm import LayerNorm, RMSNorm
from fastlm.layers.stack import Transformer, TransformerDecoder, TransformerEncoder

__all__ = [
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
