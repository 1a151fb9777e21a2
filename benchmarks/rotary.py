"""Rotary position embedding of queries and keys."""

import sys

from _bench import main, torch_compile


def liger(case):
    from liger_kernel.ops.rope import LigerRopeFunction

    if case.options["interleaved"]:
        raise NotImplementedError("halves only")
    if 2 * case.tensors["cos"].shape[-1] != case.tensors["x"].shape[-1]:
        raise NotImplementedError("all of the head dim only")

    def rotate(x, cos, sin):
        # It turns q and k at once, (batch, nheads, seqlen, headdim), and writes to what it is
        # given: a copy keeps the next call's input, and costs. k is one head of zeros.
        cos, sin = (t.repeat(1, 2).to(x.dtype)[None] for t in (cos, sin))
        k = x.new_zeros(x.shape[0], 1, x.shape[1], x.shape[3])
        return LigerRopeFunction.apply(x.clone().transpose(1, 2), k, cos, sin)[0].transpose(1, 2)

    return rotate


def flash_attn(case):
    from flash_attn.layers.rotary import apply_rotary_emb

    interleaved = case.options["interleaved"]
    return lambda x, cos, sin: apply_rotary_emb(x, cos.to(x.dtype), sin.to(x.dtype), interleaved)


PEERS = {"torch.compile": torch_compile, "liger": liger, "flash-attn": flash_attn}

if __name__ == "__main__":
    sys.exit(main("rotary", __doc__, PEERS))
