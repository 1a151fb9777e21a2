"""Named shapes: one table for tests (every tier) and benchmarks.

`SMALL` shapes run in the Triton interpreter: they hold a 1, a prime, a non-multiple of every block
and one past each configuration threshold. `LARGE` ones run on a GPU and in benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NormShape:
    rows: int
    cols: int


@dataclass(frozen=True)
class AttentionShape:
    batch: int
    seqlen_q: int
    seqlen_k: int
    nheads: int
    nheads_k: int
    headdim: int
    headdim_v: int | None = None  # None: as headdim


@dataclass(frozen=True)
class FfnShape:
    rows: int
    dim: int
    hidden_dim: int


@dataclass(frozen=True)
class LossShape:
    tokens: int
    vocab: int
    dim: int = 16  # of the hidden states that a linear head takes to logits
    ignored: float = 0.0  # the part of the tokens that has no target


@dataclass(frozen=True)
class SentenceShape:
    batch: int
    seqlen: int
    dim: int


@dataclass(frozen=True)
class RotaryShape:
    batch: int
    seqlen: int
    nheads: int
    headdim: int
    rotary_dim: int


@dataclass(frozen=True)
class EmbeddingShape:
    batch: int
    seqlen: int
    vocab: int
    dim: int
    max_seqlen: int = 512


NORM_SMALL = {
    "one": NormShape(1, 1),
    "prime": NormShape(7, 131),
    "power_of_two": NormShape(5, 256),
    "ragged": NormShape(67, 96),
    "past_one_block": NormShape(3, 8200),
    "past_one_wide_block": NormShape(3, 16400),
}

NORM_LARGE = {
    "bert_base": NormShape(16384, 768),
    "bert_large": NormShape(16384, 1024),
    "eight_mb": NormShape(4096, 1024),
    "llama_1b": NormShape(16384, 2048),
    "llama_8b": NormShape(8192, 4096),
    "llama_70b": NormShape(8192, 8192),
    "gpt3": NormShape(4096, 12288),
    "wide": NormShape(1024, 65536),
    "widest": NormShape(256, 262144),
}

FFN_SMALL = {
    "one": FfnShape(1, 1, 1),
    "prime": FfnShape(7, 13, 131),
    "power_of_two": FfnShape(5, 32, 256),
    "ragged": FfnShape(67, 24, 96),
    "past_one_block": FfnShape(5, 24, 2040),
}

FFN_LARGE = {
    "bert_base": FfnShape(16384, 768, 3072),
    "bert_large": FfnShape(16384, 1024, 4096),
    "gpt2_xl": FfnShape(8192, 1600, 6400),
    "llama_8b": FfnShape(8192, 4096, 14336),
    "odd": FfnShape(4099, 771, 3077),
}

LOSS_SMALL = {
    "one": LossShape(1, 1, 1),
    "prime": LossShape(7, 131),
    "power_of_two": LossShape(5, 256),
    "ragged": LossShape(67, 96),
    "past_one_block": LossShape(3, 8200),
}

LOSS_LARGE = {
    "mlm_bert": LossShape(16384, 30522, 768),
    "clm_gpt2": LossShape(8192, 50257, 768),
    "clm_llama2": LossShape(8192, 32000, 4096),
    "clm_llama3": LossShape(8192, 128256, 4096),
    "clm_gemma": LossShape(4096, 256000, 2304),
}

ROTARY_LARGE = {
    "llama": RotaryShape(4, 4096, 32, 128, 128),
    "llama_keys": RotaryShape(4, 4096, 8, 128, 128),
    "partial": RotaryShape(4, 4096, 32, 80, 32),
    "odd": RotaryShape(3, 1001, 7, 90, 66),
}

EMBEDDING_LARGE = {
    "bert_base": EmbeddingShape(64, 512, 30522, 768),
    "bert_large": EmbeddingShape(32, 512, 30522, 1024),
    "odd": EmbeddingShape(7, 501, 10007, 771),
}

# 15 % of the tokens have a target, as in BERT.
LOSS_MASKED = {
    "mlm_bert_masked": LossShape(16384, 30522, 768, ignored=0.85),
    "mlm_llama3_masked": LossShape(8192, 128256, 4096, ignored=0.85),
}

SENTENCE = {"bert_base": SentenceShape(32, 128, 768)}

LOSS_LOGITS = {"widest": LossShape(4096, 262144)}

ATTENTION_SMALL = {
    "one": AttentionShape(1, 1, 1, 1, 1, 16),
    "prime": AttentionShape(2, 37, 37, 3, 3, 20),
    "odd_head": AttentionShape(1, 20, 24, 2, 1, 7),
    "gqa": AttentionShape(2, 19, 45, 4, 2, 32),
    "more_queries": AttentionShape(1, 45, 19, 2, 2, 64),
    "one_query": AttentionShape(2, 1, 131, 2, 1, 40),
    "ragged": AttentionShape(1, 70, 133, 1, 1, 64),
    "past_one_block": AttentionShape(1, 150, 150, 1, 1, 80),
    "widest_head": AttentionShape(1, 33, 40, 1, 1, 256),
}

# 16,384 tokens and 2,048 features, as FlashAttention's papers measure.
ATTENTION_LARGE = {
    f"headdim_{headdim}_seqlen_{seqlen}": AttentionShape(
        16384 // seqlen, seqlen, seqlen, 2048 // headdim, 2048 // headdim, headdim
    )
    for headdim in (64, 128, 256)
    for seqlen in (512, 1024, 2048, 4096, 8192, 16384)
}

# New queries to a cache: every head with keys of its own, and groups of four.
ATTENTION_DECODE = {
    "headdim_64_keys_32k": AttentionShape(4, 1, 32768, 32, 32, 64),
    "headdim_128_keys_32k": AttentionShape(4, 1, 32768, 16, 16, 128),
    "headdim_256_keys_32k": AttentionShape(4, 1, 32768, 8, 8, 256),
    "gqa_keys_32k": AttentionShape(8, 1, 32768, 32, 8, 128),
    "gqa_one_sequence_keys_32k": AttentionShape(1, 1, 32768, 32, 8, 128),
}

# `CPU` shapes are what benchmarks time where there is no GPU: milliseconds on two cores.
NORM_CPU = {"bert_base": NormShape(2048, 768), "llama_1b": NormShape(1024, 2048)}

FFN_CPU = {"bert_base": FfnShape(512, 768, 3072), "gpt_tiny": FfnShape(2048, 128, 512)}

ROTARY_CPU = {"llama_small": RotaryShape(2, 256, 8, 64, 64)}

EMBEDDING_CPU = {"bert_base": EmbeddingShape(8, 128, 5000, 768)}

LOSS_CPU = {
    "bytes": LossShape(2048, 256, 128),
    "mlm_bert": LossShape(128, 30522, 768),
    "clm_32k": LossShape(2048, 32000, 512),
}
LOSS_MASKED_CPU = {"mlm_bert_masked": LossShape(256, 30522, 768, ignored=0.85)}

ATTENTION_CPU = {
    "bert_base": AttentionShape(4, 128, 128, 12, 12, 64),
    "gqa_512": AttentionShape(1, 512, 512, 8, 2, 64),
}

ATTENTION_DECODE_CPU = {"gqa_keys_4k": AttentionShape(2, 1, 4096, 8, 2, 64)}
