"""Attention as FlashAttention's papers measure it: 16k tokens, hidden size 2,048, head dims 64, 128
and 256, sequences of 512 to 16k, causal and not; each option alone, and combinations that no peer
has; decoding at 32k keys; weights.
"""

import sys

import torch
from _bench import main, torch_compile
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlm.bench.attention import attention_grid

PACKING = ("cu_seqlens_q", "cu_seqlens_k")
BIASES = ("bias", "table", "alibi_slopes", "sinks", "mask")


def torch_forced(backend):
    """torch's SDPA on one named kernel; it raises where that kernel refuses the call."""

    def peer(case):
        _refuse(case, "sinks", "softcap", "lse")
        packed = PACKING[0] in case.tensors
        call = _nested(case) if packed else case.dense.sdpa

        def attention(**tensors):
            with sdpa_kernel(backend):
                return call(**tensors)

        return attention

    return peer


def _nested(case):
    """torch's own form of packed sequences."""
    _refuse(case, *BIASES, "window", "seqlens_k")
    o = case.options
    offsets = [case.tensors[name].long() for name in PACKING]
    if torch.equal(*offsets):  # nested tensors of one shape share the very tensor
        offsets[1] = offsets[0]
    longest = o["max_seqlen_q"], o["max_seqlen_k"]

    def attention(q, k, v, **_):
        def nested(x, side):
            x = torch.nested.nested_tensor_from_jagged(
                x, offsets[side], min_seqlen=1, max_seqlen=longest[side]
            )
            return x.transpose(1, 2)

        out = torch.nn.functional.scaled_dot_product_attention(
            nested(q, 0), nested(k, 1), nested(v, 1), dropout_p=o.get("dropout_p", 0.0),
            is_causal=bool(o.get("causal")), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2).values()

    return attention


def torch_varlen(case):
    """FlashAttention-2 on packed sequences, as torch has it."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse(case, *BIASES, "softcap", "dropout_p", "lse")
    if PACKING[0] not in case.tensors:
        raise NotImplementedError("packed sequences only")
    o = case.options
    right = 0 if o.get("causal") else -1
    return lambda q, k, v, cu_seqlens_q, cu_seqlens_k, **_: varlen_attn(
        q, k, v, cu_seqlens_q, cu_seqlens_k, o["max_seqlen_q"], o["max_seqlen_k"],
        window_size=o.get("window", (-1, right)), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def torch_eager(case):
    """Two matrix products and a softmax, biases as tensors: T5 as models have it."""
    return case.dense.weights if case.function == "attention_weights" else case.dense.eager


def torch_eager_compiled(case):
    if not {"table", "alibi_slopes", "sinks", "lse"} & set(case.tensors):
        raise NotImplementedError("compiles eager calls; torch has kernels for this one")
    return torch_compile(case, torch_eager(case))


def flash_attention_2(case):
    import flash_attn

    return _flash(case, flash_attn, "window", "softcap", "dropout_p")


def flash_attention_3(case):
    import flash_attn_interface

    return _flash(case, flash_attn_interface, "window", "softcap")


def flash_attention_4(case):
    import flash_attn.cute

    return _flash(case, flash_attn.cute, "window", "softcap")


def _flash(case, library, *known):
    """A version of flash-attn that takes the `known` options; none gives gradients of biases."""
    refused = {"window", "softcap", "dropout_p"} - set(known)
    _refuse(case, *BIASES, "lse", *refused)
    o, first = case.options, lambda out: out[0] if isinstance(out, tuple) else out
    names = {"window": "window_size", "softcap": "softcap", "dropout_p": "dropout_p"}
    options = {new: o[name] for name, new in names.items() if o.get(name)}
    options["causal"] = bool(o.get("causal"))
    if case.function == "attention_decode":
        fn = getattr(library, "flash_attn_with_kvcache", None)
        if fn is None:
            raise NotImplementedError("has no cache in this version")
        return lambda q, k, v, seqlens_k: first(fn(q, k, v, cache_seqlens=seqlens_k))
    _refuse(case, "seqlens_k")
    if PACKING[0] not in case.tensors:
        return lambda q, k, v, **_: first(library.flash_attn_func(q, k, v, **options))
    options |= {name: o[name] for name in ("max_seqlen_q", "max_seqlen_k")}
    return lambda q, k, v, cu_seqlens_q, cu_seqlens_k, **_: first(
        library.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options
        )
    )


def flex_attention(case):
    """FlexAttention, compiled; biases in a score_mod, all that masks in a block mask."""
    _refuse(case, "dropout_p", "lse")
    if case.tensors["q"].device.type != "cuda":
        raise NotImplementedError("differentiates on a GPU alone")
    return flex(case, torch_compile)


def flex(case, compiled=lambda case, fn: fn):
    """The call, by default not compiled."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    from fastlm.reference.relative_bias import relative_bucket

    t, o = case.tensors, case.options
    packed = PACKING[0] in t
    lengths = [t["q"].shape[not packed], t["k"].shape[not packed]]
    device, softcap = t["q"].device, o.get("softcap")
    visible, where = _visible(case, packed, lengths)
    block_mask = None
    if visible is not None:
        batch = None if packed or not {"seqlens_k", "mask"} & set(t) else t["q"].shape[0]
        block_mask = create_block_mask(visible, batch, None, *lengths, device=device)
    if "table" in t:
        zero = sum(lengths)  # where distance 0 is
        distances = torch.arange(2 * zero, device=device) - zero
        bucket = relative_bucket(
            distances, t["table"].shape[0], o["bidirectional"], o["max_distance"]
        )

    def attention(q, k, v, bias=None, table=None, alibi_slopes=None, sinks=None, **_):
        def score_mod(score, b, h, i, j):
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            row, column, distance = where(i, j)
            if bias is not None and bias.shape[1] == 1:
                score = score + bias[b, 0, 0, column]
            elif bias is not None:
                score = score + bias[0, h, row, column]
            if table is not None:
                score = score + table[bucket[distance + zero], h]
            if alibi_slopes is not None:
                score = score - alibi_slopes[h] * distance.abs()
            return score

        biased = softcap is not None or any(x is not None for x in (bias, table, alibi_slopes))
        out = flex_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            score_mod=score_mod if biased else None, block_mask=block_mask,
            enable_gqa=q.shape[2] != k.shape[2],
            return_aux=None if sinks is None else AuxRequest(lse=True),
        )  # fmt: skip
        if sinks is not None:  # a sink takes its share of the softmax
            out, aux = out
            out = out * torch.sigmoid(aux.lse - sinks[:, None])[..., None].to(out.dtype)
        return out.transpose(1, 2)

    attention = compiled(case, attention)
    if not packed:
        return attention
    return lambda q, k, v, **rest: attention(q[None], k[None], v[None], **rest)[0]


def _visible(case, packed, lengths):
    """(mask_mod or None, (i, j) -> row, column and distance within the sequence)."""
    t, o = case.tensors, case.options
    offset = 0 if o.get("causal") == "top_left" else lengths[1] - lengths[0]
    where = lambda i, j: (i, j, j - i - offset)
    conditions = []
    if packed:
        (sequence, row), (key_sequence, column) = (
            _places(t[name], length) for name, length in zip(PACKING, lengths, strict=True)
        )
        shift = (t[PACKING[1]].diff() - t[PACKING[0]].diff())[sequence]
        where = lambda i, j: (row[i], column[j], column[j] - row[i] - shift[i])
        conditions.append(lambda b, i, j, distance: sequence[i] == key_sequence[j])
    if o.get("causal"):
        conditions.append(lambda b, i, j, distance: distance <= 0)
    if "window" in o:
        left, right = o["window"]
        conditions.append(lambda b, i, j, distance: (distance >= -left) & (distance <= right))
    filled, mask = t.get("seqlens_k"), t.get("mask")
    if filled is not None and not bool((filled == lengths[1]).all()):
        conditions.append(lambda b, i, j, distance: j < filled[b])
    if mask is not None:
        conditions.append(lambda b, i, j, distance: mask[b, 0, 0, j])
    if not conditions:
        return None, where

    def visible(b, h, i, j):
        distance = where(i, j)[2]
        seen = conditions[0](b, i, j, distance)
        for condition in conditions[1:]:
            seen = seen & condition(b, i, j, distance)
        return seen

    return visible, where


def _places(cu_seqlens, tokens):
    """The sequence of each token, and where in it the token is."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], token.int(), right=True)
    return sequence, token - cu_seqlens[sequence]


def _refuse(case, *lacking):
    """Raises where the case has something that a library lacks."""
    found = [name for name in lacking if name in case.tensors or case.options.get(name)]
    if found:
        raise NotImplementedError(f"has no {', '.join(found)} with this call")


PEERS = {
    "torch-flash": torch_forced(SDPBackend.FLASH_ATTENTION),
    "torch-cudnn": torch_forced(SDPBackend.CUDNN_ATTENTION),
    "torch-efficient": torch_forced(SDPBackend.EFFICIENT_ATTENTION),
    "torch-varlen": torch_varlen,
    "torch-eager": torch_eager,
    "torch.compile": torch_eager_compiled,
    "flex": flex_attention,
    "flash-attn-2": flash_attention_2,
    "flash-attn-3": flash_attention_3,
    "flash-attn-4": flash_attention_4,
}

if __name__ == "__main__":
    sys.exit(main("attention", __doc__, PEERS, attention_grid, seconds=0.2))
