"""The public functions: check, choose a backend, run an autograd function over contracts."""

from fastlm.ops.attention import attention
from fastlm.ops.attention_variants import attention_decode, attention_varlen, attention_weights
from fastlm.ops.embedding import embedding
from fastlm.ops.ffn import bias_act, ffn, gated_ffn, glu
from fastlm.ops.loss import cross_entropy, linear_cross_entropy
from fastlm.ops.masked_lm import masked_lm_loss, next_sentence_loss
from fastlm.ops.norm import layer_norm, rms_norm
from fastlm.ops.rotary import rotary
from fastlm.ops.sdpa import scaled_dot_product_attention
from fastlm.reference.relative_bias import RelativeBias

__all__ = [
    "RelativeBias",
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "bias_act",
    "cross_entropy",
    "embedding",
    "ffn",
    "gated_ffn",
    "glu",
    "layer_norm",
    "linear_cross_entropy",
    "masked_lm_loss",
    "next_sentence_loss",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
]
