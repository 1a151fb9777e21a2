"""Language models over the layers, their configuration, and text generation."""

from fastlm.models.cache import KVCache
from fastlm.models.config import TransformerConfig
from fastlm.models.decoder import DecoderLM
from fastlm.models.generate import generate, generate_stream
from fastlm.models.sampling import sample

__all__ = [
    "DecoderLM",
    "KVCache",
    "TransformerConfig",
    "generate",
    "generate_stream",
    "sample",
]
