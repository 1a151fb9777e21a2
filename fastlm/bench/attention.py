"""Cases of attention: plain, each option, and combinations that no other library has.

Operations are counted as FlashAttention's benchmarks count them: 4 * batch * nheads * seqlen^2 *
headdim forward, half of it for causal, and 2.5 times that backward; in general two for each visible
pair and each element of a query and of a value, causal queries seeing (seqlen_k + max(0, seqlen_k -
seqlen_q)) / 2 keys on average. Pairs outside of a window, of a sequence, or past its length do not
count, whoever computes them. Decoding and weights are counted in the bytes that they read or write.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import fastlm
from fastlm import shapes
from fastlm.bench.case import Case, Slices, Work, make_case, randn
from fastlm.bench.dense import Dense


@dataclass(frozen=True)
class Variant:
    """What a case has besides q, k and v. All biases but that of keys get gradients."""

    causal: bool | str = False
    window: int | None = None  # keys on either side
    padding: str = ""  # "lengths": seqlens_k; "mask": (batch, 1, 1, seqlen_k), as models have it
    packed: bool = False
    bias: str = ""  # "heads": (1, nheads, seqlen_q, seqlen_k); "keys": (batch, 1, 1, seqlen_k)
    relative: bool = False  # T5's
    alibi: bool = False
    softcap: float | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    gqa: bool = False  # four heads share a key head


VARIANTS = {
    "full": Variant(),
    "causal": Variant(causal=True),
    "bias": Variant(bias="heads"),
    "bias_causal": Variant(bias="heads", causal=True),
    "dropout": Variant(dropout_p=0.1),
    "dropout_causal": Variant(dropout_p=0.1, causal=True),
    "window": Variant(window=256),
    "window_causal": Variant(window=256, causal=True),
    "packed": Variant(packed=True),
    "packed_causal": Variant(packed=True, causal=True),
    "t5": Variant(relative=True),
    "t5_causal": Variant(relative=True, causal=True),
    "padding": Variant(padding="lengths"),
    "key_bias": Variant(bias="keys"),
    # Combinations that no peer has.
    "t5_dropout_padding": Variant(relative=True, dropout_p=0.1, padding="mask"),
    "alibi_window_gqa": Variant(alibi=True, window=256, gqa=True),
    "softcap_sinks_padding_causal": Variant(
        softcap=30.0, sinks=True, padding="lengths", causal="top_left"
    ),
    "bias_dropout_packed": Variant(bias="heads", dropout_p=0.1, packed=True),
}
# Those that are measured at every shape; the others at two lengths, for time.
_EVERYWHERE = tuple(VARIANTS)[:12]
_LENGTHS_OF_OTHERS = (512, 4096)
# The largest bias; its gradient takes as much again, and the peers' copies more.
_BIAS_BYTES = 2**33


def attention_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Plain, causal, with key padding, and with a bias that needs its gradient."""
    table = shapes.ATTENTION_LARGE if device.type == "cuda" else shapes.ATTENTION_CPU
    for name, s in list(table.items())[: 1 if quick else None]:
        for variant in ("full", "causal", "padding", "bias"):
            fits = variant != "bias" or s.seqlen_k <= 4096
            if fits and (variant != "padding" or not quick):
                yield attention_case(name, s, variant, device, dtype)


def attention_grid(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Case]]]:
    """All that `benchmarks/attention.py` measures: names, and what makes the case."""
    gpu = device.type == "cuda"
    for name, s in (shapes.ATTENTION_LARGE if gpu else shapes.ATTENTION_CPU).items():
        others = not gpu or (s.seqlen_k in _LENGTHS_OF_OTHERS and s.headdim <= 128)
        for variant, options in VARIANTS.items():
            bias = s.nheads * s.seqlen_q * s.seqlen_k * dtype.itemsize
            fits = options.bias != "heads" or bias <= _BIAS_BYTES
            if fits and (others or variant in _EVERYWHERE):
                yield _later(attention_case, name, s, variant, device, dtype)
        if others:
            for variant in ("weights", "weights_causal"):
                yield _later(weights_case, name, s, variant, device, dtype)
    for name, s in (shapes.ATTENTION_DECODE if gpu else shapes.ATTENTION_DECODE_CPU).items():
        for variant in ("decode", "decode_ragged"):
            yield _later(decode_case, name, s, variant, device, dtype)


def _later(make, name, s, variant, device, dtype) -> tuple[str, Callable[[], Case]]:
    return f"{name}/{variant}", lambda: make(name, s, variant, device, dtype)


def attention_case(
    name: str, s: shapes.AttentionShape, variant: str, device: torch.device, dtype: torch.dtype
) -> Case:
    """One case; `variant` is a name in `VARIANTS`."""
    o = VARIANTS[variant]
    if o.gqa:
        s = dataclasses.replace(s, nheads_k=max(1, s.nheads // 4))
    options: dict[str, object] = {"causal": o.causal} if o.causal else {}
    if o.window is not None:
        side = min(o.window, max(1, s.seqlen_k // 4))
        options["window"] = (side, 0 if o.causal else side)
    if o.packed:
        tensors, lengths = _packed(s, options, device, dtype)
    else:
        tensors, lengths = _batched(s, o.padding, device, dtype)
    _add_biases(o, s, tensors, options, device, dtype)
    if o.softcap is not None:
        options["softcap"] = o.softcap
    if o.dropout_p:
        options["dropout_p"] = o.dropout_p
        tensors["seed"] = torch.tensor(7, device=device)  # on the device, as in a CUDA graph
    pairs = sum(visible_pairs(*n, o.causal, options.get("window")) for n in lengths)
    flops = 2 * pairs * s.nheads * (s.headdim + (s.headdim_v or s.headdim))

    def make(options, dense) -> Case:
        return make_case(
            "attention", f"{name}/{variant} {_sizes(s)}",
            "attention_varlen" if o.packed else "attention", tensors, options,
            dense.eager if o.softcap is not None or o.sinks else dense.sdpa,
            Work("TFLOP/s", flops, 2.5 * flops),
            frozen=frozenset(["bias"] if o.bias == "keys" else []), parts=_parts(o, s, tensors),
            dense=dense,
        )  # fmt: skip

    dense = Dense(tensors, options)
    if not o.dropout_p:
        return make(options, dense)
    undropped = make(options | {"dropout_p": 0.0}, dense.undropped())
    return dataclasses.replace(make(options, dense), undropped=undropped)


def weights_case(
    name: str, s: shapes.AttentionShape, variant: str, device: torch.device, dtype: torch.dtype
) -> Case:
    """The probabilities of an attention, from its lse; forward, which is what they are read for."""
    options = {"causal": True} if variant == "weights_causal" else {}
    tensors, _ = _batched(s, "", device, dtype)
    del tensors["v"]
    q, k = tensors["q"], tensors["k"]
    tensors["lse"] = fastlm.attention(q, k, k, return_lse=True, **options)[1]
    written = s.batch * s.nheads * s.seqlen_q * s.seqlen_k * dtype.itemsize
    parts = _parts(Variant(), s, tensors)
    parts["out"] = parts["lse"] = parts["q"][::2]  # (batch, nheads, seqlen_q, ...)
    dense = Dense(tensors, options)
    return make_case(
        "attention", f"{name}/{variant} {_sizes(s)}", "attention_weights", tensors, options,
        dense.weights, Work("GB/s", written + q.nbytes + k.nbytes, 0.0),
        frozen=frozenset(tensors), parts=parts, dense=dense,
    )  # fmt: skip


def decode_case(
    name: str, s: shapes.AttentionShape, variant: str, device: torch.device, dtype: torch.dtype
) -> Case:
    """New queries to a cache that is full, or with "decode_ragged" filled to a quarter and more."""
    tensors, lengths = _batched(s, "lengths" if variant == "decode_ragged" else "", device, dtype)
    tensors["seqlens_k"] = torch.tensor([n for _, n in lengths], dtype=torch.int32, device=device)
    row = s.nheads_k * (s.headdim + (s.headdim_v or s.headdim)) * dtype.itemsize
    read = sum(n for _, n in lengths) * row
    dense = Dense(tensors, {})
    return make_case(
        "attention", f"{name}/{variant} {_sizes(s)} keys {s.seqlen_k}", "attention_decode", tensors,
        {}, dense.sdpa, Work("GB/s", read, 0.0),
        frozen=frozenset(tensors), parts=_parts(Variant(), s, tensors), dense=dense,
    )  # fmt: skip


def visible_pairs(
    seqlen_q: int, seqlen_k: int, causal: bool | str, window: tuple[int, int] | None
) -> float:
    """Pairs of query and key, counted as FlashAttention's benchmarks do where they can."""
    if window is None and causal != "top_left":
        keys = (max(0, seqlen_k - seqlen_q) + seqlen_k) / 2 if causal else seqlen_k
        return seqlen_q * keys
    left, right = window or (seqlen_k + seqlen_q, 0)
    diagonal = torch.arange(seqlen_q) + (0 if causal == "top_left" else seqlen_k - seqlen_q)
    first, last = (diagonal - left).clamp(min=0), (diagonal + right).clamp(max=seqlen_k - 1)
    return (last - first + 1).clamp(min=0).sum().item()


def _batched(s, padding: str, device, dtype) -> tuple[dict, list[tuple[int, int]]]:
    """(tensors, the numbers of queries and keys of every sequence)."""
    rows = lambda n, seqlen, headdim, seed: randn(
        s.batch, seqlen, n, headdim, dtype=dtype, device=device, seed=seed
    )
    tensors = {
        "q": rows(s.nheads, s.seqlen_q, s.headdim, 1),
        "k": rows(s.nheads_k, s.seqlen_k, s.headdim, 2),
        "v": rows(s.nheads_k, s.seqlen_k, s.headdim_v or s.headdim, 3),
    }
    if not padding:
        return tensors, [(s.seqlen_q, s.seqlen_k)] * s.batch
    filled = torch.linspace(s.seqlen_k // 4, s.seqlen_k, s.batch).to(torch.int32)
    if padding == "lengths":
        tensors["seqlens_k"] = filled.to(device)
    else:
        mask = torch.arange(s.seqlen_k) < filled[:, None, None, None]
        tensors["mask"] = mask.to(device)
    return tensors, [(s.seqlen_q, n) for n in filled.tolist()]


def _packed(s, options, device, dtype) -> tuple[dict, list[tuple[int, int]]]:
    """As many tokens as the batch has, in sequences from a quarter of its length to all of it."""
    tokens = {"q": s.batch * s.seqlen_q, "k": s.batch * s.seqlen_k}
    count = math.ceil(1.6 * s.batch)
    share = torch.linspace(1, 4, count, dtype=torch.float64) / (2.5 * count)
    tensors, lengths = {}, []
    for side, total in tokens.items():
        n = (share * total).long()
        n[0] += total - n.sum()  # what rounding left
        ends = torch.nn.functional.pad(n.cumsum(0), (1, 0))
        tensors[f"cu_seqlens_{side}"] = ends.to(device, torch.int32)
        options[f"max_seqlen_{side}"] = n.max().item()
        lengths.append(n.tolist())
    flat = dataclasses.replace(s, batch=1, seqlen_q=tokens["q"], seqlen_k=tokens["k"])
    rows, _ = _batched(flat, "", device, dtype)
    return {n: x.squeeze(0) for n, x in rows.items()} | tensors, list(zip(*lengths, strict=True))


def _add_biases(o: Variant, s, tensors, options, device, dtype) -> None:
    longest = [options.get(f"max_seqlen_{side}", n) for side, n in
               (("q", s.seqlen_q), ("k", s.seqlen_k))]  # fmt: skip
    if o.bias == "heads":
        tensors["bias"] = randn(1, s.nheads, *longest, dtype=dtype, device=device, seed=4)
    elif o.bias == "keys":
        tensors["bias"] = randn(s.batch, 1, 1, s.seqlen_k, dtype=dtype, device=device, seed=4)
    if o.relative:
        tensors["table"] = randn(32, s.nheads, dtype=dtype, device=device, seed=5)
        options |= {"bidirectional": not o.causal, "max_distance": 128}
    if o.alibi:
        slopes = 2.0 ** (-8.0 * torch.arange(1, s.nheads + 1) / s.nheads)
        tensors["alibi_slopes"] = slopes.to(device, dtype)
    if o.sinks:
        tensors["sinks"] = randn(s.nheads, dtype=dtype, device=device, seed=6)


def _parts(o: Variant, s, tensors) -> dict[str, Slices]:
    """What the oracle compares: the first group of heads, which depends on no other head; of the
    first sequence alone, unless a gradient is a sum over the batch."""
    summed = o.bias == "heads" or o.relative or o.alibi or o.sinks
    batch, group = slice(None) if summed else slice(0, 1), slice(0, s.nheads // s.nheads_k)
    every, one = slice(None), slice(0, 1)
    parts = {"q": (batch, every, group), "k": (batch, every, one), "v": (batch, every, one)}
    if o.packed:
        parts = {name: part[1:] for name, part in parts.items()}
    parts["out"] = parts["q"]
    parts |= {"seqlens_k": (batch,), "mask": (batch,), "table": (every, group)}
    parts |= {"alibi_slopes": (group,), "sinks": (group,)}
    parts["bias"] = (batch,) if o.bias == "keys" else (every, group)
    return {name: part for name, part in parts.items() if name in tensors or name == "out"}


def _sizes(s: shapes.AttentionShape) -> str:
    heads_k = "" if s.nheads_k == s.nheads else f"/{s.nheads_k}"
    return f"{s.batch}x{s.seqlen_q}x{s.nheads}{heads_k}x{s.headdim}"
