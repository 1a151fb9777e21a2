"""Feed-forward blocks in one module: GPT-2, ViT, CLIP, Llama, Gemma, T5, ...; gated or not."""

from fastlm.swap.fused import FeedForward, GatedFeedForward
from fastlm.swap.rules import BlockRule

NAMES = (
    "*MLP",
    "*Mlp",
    "*FeedForward",
    "*FFN",
    "*DenseActDense",  # T5
    "*DenseGatedActDense",
)
RULES = (BlockRule("ffn", NAMES, (FeedForward, GatedFeedForward)),)
