"""Attention inputs with every option, and attention written as loops over single numbers."""

import math
from itertools import combinations

import torch

from fastlm.reference.dropout import keep_mask
from fastlm.reference.relative_bias import RelativeBias
from fastlm.testing import randn

B, M, N, H, H_K, D, DV = 2, 4, 5, 4, 2, 3, 2
SEED = 0x1234_5678_9ABC_DEF0
NUM_BUCKETS, MAX_DISTANCE = 6, 5

# Each option as (tensors that get gradients, the rest); tensors by (shape, scale).
OPTIONS = {
    "plain": ({}, {}),
    "causal": ({}, {"causal": True}),
    "top_left": ({}, {"causal": "top_left"}),
    "window": ({}, {"window": (1, 2)}),
    "left_window": ({}, {"window": (0, None)}),
    "scale": ({}, {"softmax_scale": 1.7}),
    "mask": ({}, {"mask": (B, 1, M, N)}),
    "bias": ({"bias": (H, 1, N)}, {}),
    "relative_bias": ({"table": (NUM_BUCKETS, H)}, {}),
    "seqlens_k": ({}, {"seqlens_k": [2, 0]}),
    "alibi": ({"alibi_slopes": (B, H)}, {}),
    "softcap": ({}, {"softcap": 0.8}),
    "sinks": ({"sinks": (H,)}, {}),
    "dropout": ({}, {"dropout_p": 0.4}),
}
EXCLUSIVE = ({"causal", "top_left"}, {"bias", "relative_bias"}, {"window", "left_window"})
PAIRS = [p for p in combinations(list(OPTIONS)[1:], 2) if set(p) not in EXCLUSIVE]
SINGLES = [(name,) for name in OPTIONS]


def case(*names: str, dtype=torch.float64) -> tuple[dict, dict]:
    """(tensors, options) of an attention with the named options; `run` takes both."""
    tensors = {
        "q": randn(B, M, H, D, dtype=dtype),
        "k": randn(B, N, H_K, D, dtype=dtype, seed=1),
        "v": randn(B, N, H_K, DV, dtype=dtype, seed=2),
    }
    options = {}
    for name in names:
        shapes, rest = OPTIONS[name]
        for i, (arg, shape) in enumerate(shapes.items()):
            tensors[arg] = randn(*shape, dtype=dtype, seed=3 + i)
        options.update(rest)
    if "mask" in options:
        options["mask"] = randn(*options["mask"], seed=8) > -0.3
        options["mask"][0, :, 1] = False  # a query without a key
        options["mask"][1, :, :, 3] = False  # a key without a query
    if "seqlens_k" in options:
        options["seqlens_k"] = torch.tensor(options["seqlens_k"], dtype=torch.int32)
    if "dropout_p" in options:
        options["seed"] = torch.tensor(SEED)
    return tensors, options


def run(fn, q, k, v, *, table=None, **options):
    """Calls `fn` with the table, if any, as a RelativeBias."""
    if table is not None:
        options["bias"] = relative_bias(table)
    return fn(q, k, v, **options)


def relative_bias(table: torch.Tensor) -> RelativeBias:
    return RelativeBias(table, bidirectional=True, max_distance=MAX_DISTANCE)


def naive_attention(
    q, k, v, *, causal=False, window=(None, None), softmax_scale=None, mask=None, bias=None,
    table=None, seqlens_k=None, alibi_slopes=None, softcap=None, sinks=None, dropout_p=0.0,
    seed=None,
):  # fmt: skip
    """(out, lse, weights) in fp64, one score at a time."""
    batch, seqlen_q, nheads, headdim = q.shape
    seqlen_k, nheads_k = k.shape[1:3]
    scale = 1 / math.sqrt(headdim) if softmax_scale is None else softmax_scale
    out = torch.zeros(batch, seqlen_q, nheads, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, nheads, seqlen_q), -math.inf, dtype=torch.float64)
    weights = torch.zeros(batch, nheads, seqlen_q, seqlen_k, dtype=torch.float64)
    full = (batch, nheads, seqlen_q, seqlen_k)
    mask = None if mask is None else mask.expand(full)
    bias = None if bias is None else bias.expand(full)

    def score(b, h, i, j):
        n_k = seqlen_k if seqlens_k is None else int(seqlens_k[b])
        distance = j - i if causal == "top_left" else j - (i + n_k - seqlen_q)
        left, right = window
        if (
            j >= n_k
            or (causal and distance > 0)
            or (left is not None and distance < -left)
            or (right is not None and distance > right)
            or (mask is not None and not mask[b, h, i, j])
        ):
            return None
        s = scale * float(q[b, i, h].double() @ k[b, j, h // (nheads // nheads_k)].double())
        if softcap is not None:
            s = softcap * math.tanh(s / softcap)
        if bias is not None:
            s += float(bias[b, h, i, j])
        if table is not None:
            s += float(table[naive_bucket(distance), h])
        if alibi_slopes is not None:
            s -= float(alibi_slopes.expand(batch, nheads)[b, h]) * abs(distance)
        return s

    for b in range(batch):
        for h in range(nheads):
            for i in range(seqlen_q):
                scores = {j: score(b, h, i, j) for j in range(seqlen_k)}
                scores = {j: s for j, s in scores.items() if s is not None}
                if not scores:
                    continue
                total = sum(math.exp(s) for s in scores.values())
                total += 0.0 if sinks is None else math.exp(float(sinks[h]))
                lse[b, h, i] = math.log(total)
                keep = torch.ones(seqlen_k, dtype=torch.bool)
                if dropout_p:
                    keep = keep_mask(seed, dropout_p, b, h, i, seqlen_k)
                for j, s in scores.items():
                    p = math.exp(s) / total * bool(keep[j]) / (1 - dropout_p)
                    weights[b, h, i, j] = p
                    out[b, i, h] += p * v[b, j, h // (nheads // nheads_k)].double()
    return out, lse, weights


def naive_bucket(distance: int) -> int:
    """The bucket of `relative_bias`: 3 a side, of which 1 is exact and 2 grow up to distance 5."""
    side, exact = NUM_BUCKETS // 2, 1
    first, distance = (side, distance) if distance > 0 else (0, -distance)
    if distance < exact:
        return first + distance
    grown = math.log(distance / exact) / math.log(MAX_DISTANCE / exact) * (side - exact)
    return first + min(exact + int(grown), side - 1)
