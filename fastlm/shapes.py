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
class LossShape:
    tokens: int
    vocab: int
    dim: int = 16  # of the hidden states that a linear head takes to logits


NORM_SMALL = {
    "one": NormShape(1, 1),
    "prime": NormShape(7, 131),
    "power_of_two": NormShape(5, 256),
    "ragged": NormShape(67, 96),
    "past_one_block": NormShape(3, 8200),
}

NORM_LARGE = {
    "bert_base": NormShape(16384, 768),
    "bert_large": NormShape(16384, 1024),
    "llama_8b": NormShape(8192, 4096),
    "wide": NormShape(1024, 65536),
    "widest": NormShape(256, 262144),
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
