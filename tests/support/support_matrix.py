"""The README's table of what the kernels take, asked of the operators themselves.

    python -P tests/support/support_matrix.py --update      # rewrite it in README.md

A call of every row is put to `fastlm.explain` as if the inputs were on a GPU.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

import fastlm

README = Path(__file__).resolve().parents[2] / "README.md"
IMPLS = ("triton", "cuda", "torch")  # in the order of choice
MARKS = "<!-- support matrix: written by tests/support/support_matrix.py -->", "<!-- end -->"


def calls() -> Iterator[tuple[str, str, tuple, dict]]:
    """(operator, feature, positional arguments, options)."""
    t = lambda *shape, dtype=torch.bfloat16: torch.zeros(shape, dtype=dtype)
    qkv = lambda d=64, **kw: (t(2, 8, 4, d, **kw), t(2, 8, 2, d, **kw), t(2, 8, 2, d, **kw))
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)
    table = fastlm.RelativeBias(t(32, 4), bidirectional=True, max_distance=128)
    attention = {
        "plain, causal in both alignments, GQA, LSE": {"causal": True, "return_lse": True},
        "head dim 256": {"_headdim": 256},
        "head dim 512": {"_headdim": 512},
        "window": {"window": (4, 0)},
        "boolean mask": {"mask": torch.ones(8, 8, dtype=torch.bool)},
        "bias with gradient": {"bias": t(4, 8, 8)},
        "`RelativeBias`": {"bias": table},
        "key lengths": {"seqlens_k": ints(8, 5)},
        "ALiBi": {"alibi_slopes": t(4, dtype=torch.float32)},
        "softcap": {"softcap": 30.0},
        "sinks": {"sinks": t(4, dtype=torch.float32)},
        "dropout": {"dropout_p": 0.1, "seed": 1},
    }
    for feature, options in attention.items():
        options = dict(options)
        yield "attention", feature, qkv(options.pop("_headdim", 64)), options
    packed = t(16, 4, 64), t(16, 4, 64), t(16, 4, 64)
    packed = (*packed, ints(0, 9, 16), ints(0, 9, 16), 9, 9)
    plain = {"causal": True, "window": (4, 0), "dropout_p": 0.1, "seed": 1}
    yield "attention_varlen", "causal, window, dropout", packed, plain
    slopes = {"alibi_slopes": t(4, dtype=torch.float32)}
    yield "attention_varlen", "all options", packed, {"bias": table, "softcap": 30.0, **slopes}
    decode = t(2, 1, 4, 64), t(2, 16, 4, 64), t(2, 16, 4, 64), ints(8, 8)
    yield "attention_decode", "all options", decode, {}
    yield "attention_weights", "all options", (*qkv()[:2], t(2, 4, 8, dtype=torch.float32)), {}
    norm = {"residual": t(4, 64), "dropout_p": 0.1, "seed": 1, "prenorm": True}
    everything = "residual, dropout, prenorm, mixed dtypes"
    x, vector = t(4, 64), t(64, dtype=torch.float32)
    yield "layer_norm", everything, (x, vector, vector), norm
    yield "rms_norm", f"{everything}, three castings", (x, vector), {**norm, "casting": "gemma"}
    dropout = {"dropout_p": 0.1, "seed": 1, "activation": "gelu"}
    yield "bias_act", "six activations, dropout", (x, t(64)), dropout
    yield "glu", "six activations", (x, x), {}
    yield (
        "ffn",
        "bias, activation and dropout fused",
        (x, t(256, 64), t(256), t(64, 256), t(64)),
        dropout,
    )
    yield "gated_ffn", "gate fused", (x, t(256, 64), t(256, 64), t(64, 256)), {}
    target = torch.zeros(4, dtype=torch.int64)
    yield "cross_entropy", "all options", (x, target), {"softcap": 30.0, "z_loss": 1e-4}
    yield "linear_cross_entropy", "all options", (x, t(256, 64), target), {}
    head = t(64, 64), vector, vector, vector, t(256, 64)
    yield "masked_lm_loss", "gather, transform and loss, all options", (x, target, *head), {}
    pooler = {"pooler_weight": t(64, 64), "pooler_bias": t(64)}
    yield "next_sentence_loss", "with its pooler", (x[None], target[:1], t(2, 64)), pooler
    angles = t(8, 16, dtype=torch.float32)
    yield "rotary", "both layouts, positions, trained tables", (t(2, 8, 4, 64), angles, angles), {}
    tables = {"position_weight": t(8, 64), "type_weight": t(2, 64), "norm_weight": vector}
    tables |= {"padding_idx": 0, "dropout_p": 0.1, "seed": 1}
    yield "embedding", "all tables, norm, dropout, padding", (target[None], t(256, 64)), tables


def render() -> str:
    """The table in Markdown."""
    rows = [f"| operator | feature | {' | '.join(IMPLS)} |", "|---|---|---|---|---|"]
    with mock.patch.object(fastlm.backends, "_unavailable", lambda impl, device: None):
        for op, feature, args, options in calls():
            reasons = fastlm.explain(op, *args, **options).reasons
            cells = ["yes" if reasons[impl] is None else "–" for impl in IMPLS]
            rows.append(f"| `{op}` | {feature} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    table = render()
    if "--update" not in sys.argv:
        print(table)
        return
    start, end = (re.escape(mark) for mark in MARKS)
    text = README.read_text()
    new = re.sub(f"({start}\n).*?({end})", lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)
    README.write_text(new)


if __name__ == "__main__":
    main()
