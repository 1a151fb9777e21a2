"""Blocks of BERT and of the post-norm encoders after it: RoBERTa, ELECTRA, LayoutLM, BLIP's, ..."""

from fastlm.swap.fused import LinearAct, LinearDropoutAddNorm
from fastlm.swap.rules import BlockRule

RULES = (
    BlockRule("ffn", ("*Intermediate",), (LinearAct,)),
    BlockRule("norm", ("*Output",), (LinearDropoutAddNorm,)),
)
