"""Attention calls with any options, small enough for the interpreter: what pairs and fuzzing draw.

A case is a dictionary of plain values, so that a failing one can be read and repeated.
"""

from __future__ import annotations

import torch

import fastlm
from fastlm.reference import attention as reference
from fastlm.reference.relative_bias import RelativeBias
from fastlm.testing import randn, with_layout

BATCH = 2
# The first value of each is that of a plain call.
VALUES = {
    "causal": [False, True, "top_left"],
    "window": [None, (3, 0), (None, 2), (20, None), (6, 9)],
    "mask": [None, "columns", "rows", "heads", "all"],
    "bias": [None, "number", "columns", "rows", "heads", "all", "forbids"],
    "relative": [None, "bidirectional", "one way"],
    "seqlens_k": [False, True],
    "alibi": [None, "heads", "batch"],
    "softcap": [None, 2.0],
    "sinks": [False, True],
    "dropout_p": [0.0, 0.3],
    "packed": [False, True],
    "lengths": [(18, 18), (1, 41), (35, 19), (21, 70)],
    "heads": [(2, 2), (2, 1), (4, 2)],
    "headdim": [16, 7, 72],
    "headdim_v": [None, 24],
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
    "parameters": [None, torch.float32],
    "layout": ["contiguous", "transposed", "last_stride_2", "offset_1"],
    "lse": [True, False],
    "frozen": [(), ("q",), ("k", "v"), ("bias", "table", "alibi_slopes", "sinks")],
}


def consistent(case: dict) -> dict:
    """The case, changed where its options exclude each other or leave every gradient 0."""
    case = dict(case)
    if case["bias"] in ("number", "rows", "heads"):
        case["lse"] = True  # out does not change with them
    if case["bias"] is not None:
        case["relative"] = None
    narrow = case["causal"] == "top_left" or case["window"] or case["seqlens_k"]
    if case["lengths"][0] == 1 and narrow:  # one key a query has probability 1 and no gradient
        case["lengths"] = (5, case["lengths"][1])
    return case


def build(case: dict) -> tuple[dict, dict]:
    """(tensors, options) of a case; `call` takes both."""
    (m, n), (h, h_k), d = case["lengths"], case["heads"], case["headdim"]
    dv, dtype = case["headdim_v"] or d, case["dtype"]
    parameters = case["parameters"] or dtype  # of what is learned
    tensors, options = {}, {"causal": case["causal"], "window": case["window"]}
    lead_q, lead_k = (BATCH, m), (BATCH, n)
    if case["packed"]:
        # A sequence without queries, one without keys, and tokens of no sequence.
        lengths_q, lengths_k = [m, 0, m // 2 + 1, 3], [n, 4, n // 2 + 1, 0]
        lead_q, lead_k = (sum(lengths_q) + 2,), (sum(lengths_k) + 1,)
        cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
        options["packing"] = cu_q, cu_k, max(m, 4), max(n, 4)
        batch, m, n = 4, max(m, 4), max(n, 4)
    else:
        batch = BATCH
    tensors["q"] = randn(*lead_q, h, d, dtype=dtype)
    tensors["k"] = randn(*lead_k, h_k, d, dtype=dtype, seed=1)
    tensors["v"] = randn(*lead_k, h_k, dv, dtype=dtype, seed=2)
    shapes = {
        "number": (), "columns": (batch, 1, 1, n), "rows": (m, 1), "heads": (h, 1, 1),
        "all": (batch, h, m, n), "forbids": (1, m, n),
    }  # fmt: skip
    if case["bias"] is not None:
        bias = randn(*shapes[case["bias"]], dtype=parameters, seed=3)
        if case["bias"] == "forbids":
            bias = bias.masked_fill(randn(*bias.shape, seed=4) > 0.7, float("-inf"))
        tensors["bias"] = bias
    if case["relative"] is not None:
        tensors["table"] = randn(8, h, dtype=parameters, seed=3)
        options["bidirectional"] = case["relative"] == "bidirectional"
    if case["alibi"] is not None:
        lead = (batch,) if case["alibi"] == "batch" else ()
        tensors["alibi_slopes"] = randn(*lead, h, dtype=parameters, seed=5, scale=0.3)
    if case["sinks"]:
        tensors["sinks"] = randn(h, dtype=parameters, seed=6)
    if case["mask"] is not None:
        options["mask"] = randn(*shapes[case["mask"]], seed=7) > -0.8
    if case["seqlens_k"]:
        options["seqlens_k"] = torch.tensor([n - n // 4, 0, n + 3, 1][:batch])
    if case["softcap"] is not None:
        options["softcap"] = case["softcap"]
    if case["dropout_p"]:
        options.update(dropout_p=case["dropout_p"], seed=torch.tensor(-0x1234_5678_9ABC))
    options["return_lse"] = case["lse"]
    tensors = {
        name: with_layout(x, case["layout"]) if x.dim() > 1 else x for name, x in tensors.items()
    }
    return tensors, options


def build_weights(case: dict) -> tuple[dict, dict]:
    """(tensors, options) of a dense case for `attention_weights`; `call` takes both, lse as v."""
    tensors, options = build(case)
    _, lse = call(reference.attention, None, **tensors, **{**options, "return_lse": True})
    for name in ("v", "sinks"):
        tensors.pop(name, None)
    del options["return_lse"]
    return {**tensors, "lse": with_layout(lse, case["layout"])}, options


def call_weights(fn, q, k, lse, **options) -> torch.Tensor:
    """Calls `fn`, an attention_weights, with the arguments of a case."""
    return call(fn, None, q, k, lse, **options)


# What hides keys and rows from each other, as options of (5, 9) scores, and what is then unseen.
MASKINGS = {
    "causal": {"causal": "top_left"},
    "more queries": {"causal": True},
    "window": {"window": (1, 1), "causal": "top_left"},
    "mask": {"mask": (torch.arange(9) != 5) & (torch.arange(5)[:, None] != 3)},
    "seqlens_k": {"seqlens_k": torch.tensor([0, 6])},
    "bias": {"bias": torch.zeros(9).masked_fill(torch.arange(9) > 5, float("-inf"))},
}


def call(fn, varlen, q, k, v, *, table=None, bidirectional=None, packing=None, **options):
    """Calls `fn`, or `varlen` where the sequences are packed."""
    if table is not None:
        options["bias"] = RelativeBias(table, bidirectional=bidirectional, max_distance=24)
    return fn(q, k, v, **options) if packing is None else varlen(q, k, v, *packing, **options)


def fused(impl: str = "triton"):
    """The public functions, for `call`'s arguments."""
    return lambda **kw: _summed(
        call(fastlm.attention, fastlm.attention_varlen, **kw, impl=impl), kw["return_lse"]
    )


def specified(**kw):
    """The reference, for `call`'s arguments."""
    result = call(reference.attention, reference.attention_varlen, **kw)
    return _summed(result, kw["return_lse"])


def _summed(result, return_lse: bool):
    """With the sum of lse, whose gradient makes those of constant biases more than rounding."""
    if not return_lse:
        return result
    out, lse = result
    return out, lse, torch.where(lse.isinf(), 0.0, lse).sum()
