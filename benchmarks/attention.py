"""Attention: plain, causal, key padding, bias with gradient."""

import sys

from _bench import main, torch_compile
from torch.nn.attention import SDPBackend, sdpa_kernel


def torch_forced(backend):
    """torch's SDPA on one named kernel; it raises where that kernel refuses the call."""

    def peer(case):
        def attention(**tensors):
            with sdpa_kernel(backend):
                return case.providers["torch"](**tensors)

        return attention

    return peer


def flash_attention_2(case):
    from flash_attn import flash_attn_func

    return _plain(case, flash_attn_func)


def flash_attention_3(case):
    from flash_attn_interface import flash_attn_func

    def attention(*tensors, causal):
        out = flash_attn_func(*tensors, causal=causal)
        return out[0] if isinstance(out, tuple) else out  # its versions differ in that

    return _plain(case, attention)


def flash_attention_4(case):
    from flash_attn.cute import flash_attn_func

    def attention(*tensors, causal):
        out = flash_attn_func(*tensors, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return _plain(case, attention)


def _plain(case, fn):
    """flash-attn knows neither a bias nor, unpacked, key lengths."""
    if set(case.tensors) != {"q", "k", "v"}:
        return None
    return lambda q, k, v: fn(q, k, v, causal=bool(case.options.get("causal")))


def flex_attention(case):
    """Biases and padding as FlexAttention has them: a score_mod that reads the bias."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.tensors["q"].device.type != "cuda":
        return None
    flex = torch.compile(flex_attention, dynamic=False)
    batch, seqlen_q, _, _ = case.tensors["q"].shape
    seqlen_k = case.tensors["k"].shape[1]
    lengths, block_mask = case.tensors.get("seqlens_k"), None
    if case.options.get("causal") or lengths is not None:
        visible = (
            (lambda b, h, i, j: i >= j) if lengths is None else lambda b, h, i, j: j < lengths[b]
        )
        rows = None if lengths is None else batch
        block_mask = create_block_mask(visible, rows, None, seqlen_q, seqlen_k, device="cuda")

    def attention(q, k, v, bias=None, seqlens_k=None):
        add = None if bias is None else lambda score, b, h, i, j: score + bias[0, h, i, j]
        out = flex(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), score_mod=add,
            block_mask=block_mask, enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
        return out.transpose(1, 2)

    return attention


PEERS = {
    "torch-flash": torch_forced(SDPBackend.FLASH_ATTENTION),
    "torch-cudnn": torch_forced(SDPBackend.CUDNN_ATTENTION),
    "torch-efficient": torch_forced(SDPBackend.EFFICIENT_ATTENTION),
    "torch.compile": torch_compile,
    "flex": flex_attention,
    "flash-attn-2": flash_attention_2,
    "flash-attn-3": flash_attention_3,
    "flash-attn-4": flash_attention_4,
}

if __name__ == "__main__":
    sys.exit(main("attention", __doc__, PEERS))
