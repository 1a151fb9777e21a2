"""Attention on packed sequences, on a key-value cache, and its probabilities."""

from __future__ import annotations

import torch

from fastlm.backends import Impl, choose, supports_all
from fastlm.ops import (
    _attention_decode,
    _attention_kernels,
    _attention_torch,
    _attention_weights,
)
from fastlm.ops._attention_check import (
    check_new_keys,
    check_options,
    check_packed,
    check_qkv,
    check_seqlens_k,
    to_common_dtype,
)
from fastlm.ops._check import (
    fail,
    make_seed,
    require_device,
    require_float,
    require_shape,
    without_autocast,
)
from fastlm.ops._transforms import trains
from fastlm.ops.attention import BACKENDS
from fastlm.reference import attention as reference
from fastlm.reference.relative_bias import RelativeBias

# Triton first: it reads less, and keeps nothing of the size of the scores but what it returns.
_WEIGHTS_BACKENDS = {"triton": _attention_kernels.triton_refuses, "torch": supports_all}
_DECODE_BACKENDS = {"triton": _attention_decode.refuses, "torch": supports_all}


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | RelativeBias | None = None,
    seqlens_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    impl: Impl | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` within each of several sequences packed one after another.

    Every option counts within its sequence: rows, columns, the diagonal, distances, and the
    dropout mask, whose batch index is the sequence's. So the result is that of one call for each
    sequence, the masks and biases being those of the longest, (batch, nheads, max_seqlen_q,
    max_seqlen_k), cut to the sequence's length.

    Args:
        q: (tokens_q, nheads, headdim).
        k: (tokens_k, nheads_k, headdim).
        v: (tokens_k, nheads_k, headdim_v).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 or int64, from 0: where each sequence
            starts, and the last one ends. Tokens past that get out 0 and lse -inf.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length; not verified, since
            that would wait for the device. Longer sequences lose what is past it.
        seqlens_k: (batch,); of each sequence's keys, the first so many count.

    The other arguments, what is differentiable and the errors are `attention`'s.

    Returns:
        out (tokens_q, nheads, headdim_v); with `return_lse` (out, lse), lse (nheads, tokens_q).
    """
    op = "attention_varlen"
    check_packed(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = dict(
        causal=causal, window=window, softmax_scale=softmax_scale, mask=mask, bias=bias,
        seqlens_k=seqlens_k, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks,
        dropout_p=dropout_p, seed=seed, return_lse=return_lse, deterministic=deterministic,
    )  # fmt: skip
    shape = (cu_seqlens_q.shape[0] - 1, q.shape[1], max_seqlen_q, max_seqlen_k)
    check_options(op, shape, q.device, options)
    q, k, v = (_attention_kernels.last_stride_1(x) for x in to_common_dtype(q, k, v))
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    backend = choose(op, impl, BACKENDS, q.device, q, k, v, options)
    options["seed"] = make_seed(seed, dropout_p, q.device)
    if backend != "torch":
        return _attention_kernels.attention(backend, q, k, v, options, packing)
    with without_autocast(q.device):
        return reference.attention_varlen(q, k, v, *packing, **options)


def attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seqlens_k: torch.Tensor,
    *,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    causal: bool | str = True,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | RelativeBias | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: Impl | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` of new queries to a key-value cache; for inference, without gradients.

    With k_new and v_new, writes them into the caches in place, at positions seqlens_k[b] and
    after, and then sees seqlens_k + seqlen_new keys; the caller adds seqlen_new to its own
    seqlens_k. The queries are the last seqlen_q positions of what is seen: causal by default, so
    several new queries see each other's keys in order.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k_cache, v_cache: (batch, seqlen_cache, nheads_k, headdim or headdim_v), any strides. What
            is past the filled keys may hold anything.
        seqlens_k: (batch,) int32 or int64; how many keys are filled before the call.
        k_new, v_new: (batch, seqlen_new, nheads_k, headdim or headdim_v), cast to the caches'
            dtype. Where they do not fit, indexing fails: an IndexError on the CPU, a device
            assertion on a GPU, since checking would wait for the device.
        causal, window, softmax_scale, mask, bias, alibi_slopes, softcap, sinks, return_lse, impl:
            as in `attention`, with seqlen_cache keys and, for distances, n_k the keys seen.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v); with `return_lse` (out, lse), lse (batch, nheads,
        seqlen_q).

    Raises:
        TypeError, ValueError: arguments that do not fit, or that require gradients while they
            are recorded.
    """
    op = "attention_decode"
    check_qkv(op, q, k_cache, v_cache, names=("q", "k_cache", "v_cache"))
    check_seqlens_k(op, seqlens_k, q.shape[0], q.device)
    check_new_keys(op, k_cache, v_cache, k_new, v_new)
    # deterministic=False allows torch's fused kernels; only their backward passes vary.
    options = dict(
        causal=causal, window=window, softmax_scale=softmax_scale, mask=mask, bias=bias,
        alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, dropout_p=0.0, seed=None,
        return_lse=return_lse, deterministic=False, seqlens_k=seqlens_k,
    )  # fmt: skip
    shape = (q.shape[0], q.shape[2], q.shape[1], k_cache.shape[1])
    check_options(op, shape, q.device, options)
    _require_no_grad(op, q=q, k_cache=k_cache, v_cache=v_cache, k_new=k_new, v_new=v_new)
    backend = choose(op, impl, _DECODE_BACKENDS, q.device, q, k_cache, v_cache, options)
    if backend == "triton":
        return _attention_decode.attention_decode(q, k_cache, v_cache, k_new, v_new, options)
    if k_new is not None:
        reference.append(k_cache, k_new, seqlens_k)
        reference.append(v_cache, v_new, seqlens_k)
        options["seqlens_k"] = seqlens_k + k_new.shape[1]
    return _attention_torch.attention(*to_common_dtype(q, k_cache, v_cache), options)


def attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | RelativeBias | None = None,
    seqlens_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    deterministic: bool = True,
    impl: Impl | None = None,
) -> torch.Tensor:
    """The probabilities of an attention, recomputed from q, k and its lse in a second pass.

    Args:
        q, k: as given to `attention`.
        lse: (batch, nheads, seqlen_q), what it returned with `return_lse`; it holds the sinks, so
            that rows add up to less than 1 with them.
        dropout_p, seed: with the same seed, the weights after the same dropout.

    The other options must be those of the call that gave `lse`.

    Returns:
        (batch, nheads, seqlen_q, seqlen_k) in the common dtype of q and k; 0 where a pair is not
        allowed. Differentiable in q, k, lse, bias or its table, and alibi_slopes; gradients of
        gradients are the reference's.

    Memory: beside the weights and their gradient, the Triton kernels hold nothing of their size,
    unless the gradient's last stride is not 1, as of a plain sum: it is copied then.
    """
    op = "attention_weights"
    check_qkv(op, q, k, k, names=("q", "k", "k"))
    require_float(op, "lse", lse)
    require_device(op, "lse", lse, q.device)
    batch, seqlen_q, nheads, _ = q.shape
    require_shape(op, "lse", lse, (batch, nheads, seqlen_q), "(batch, nheads, seqlen_q)")
    options = dict(
        causal=causal, window=window, softmax_scale=softmax_scale, mask=mask, bias=bias,
        seqlens_k=seqlens_k, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks,
        dropout_p=dropout_p, seed=seed, return_lse=False, deterministic=deterministic,
    )  # fmt: skip
    check_options(op, (batch, nheads, seqlen_q, k.shape[1]), q.device, options)
    del options["return_lse"]
    q, k = to_common_dtype(q, k)
    backend = choose(op, impl, _WEIGHTS_BACKENDS, q.device, q, k, k, options)
    options["seed"] = make_seed(seed, dropout_p, q.device)
    if backend == "triton":
        q, k = (_attention_kernels.last_stride_1(x) for x in (q, k))
        return _attention_weights.attention_weights(q, k, lse, options)
    with without_autocast(q.device):
        return reference.attention_weights(q, k, lse, **options)


def _require_no_grad(op: str, **tensors: torch.Tensor | None) -> None:
    for name, x in tensors.items():
        if trains(x):
            constraint = "be without gradient, since the caches change in place (use torch.no_grad)"
            raise fail(op, name, constraint, "requires_grad=True")
