"""The public functions: check, choose a backend, run an autograd.Function over registered contracts."""

from fastlm.ops.attention import attention
from fastlm.ops.attention_variants import attention_decode, attention_varlen, attention_weights
from fastlm.ops.norm import layer_norm, rms_norm
from fastlm.ops.sdpa import scaled_dot_product_attention
from fastlm.reference.relative_bias import RelativeBias

__all__ = [
    "RelativeBias",
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "layer_norm",
    "rms_norm",
    "scaled_dot_product_attention",
]
