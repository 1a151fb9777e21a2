"""Feed-forward: GELU with biases, gated SiLU; as blocks, and the activations alone."""

import sys

import torch.nn.functional as F
from _bench import main, torch_compile


def liger(case):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    if case.function == "glu":
        return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)
    if case.function != "gated_ffn":
        raise NotImplementedError("gated activations only")
    return lambda x, w_gate, w_up, w_down: F.linear(
        LigerSiLUMulFunction.apply(F.linear(x, w_gate), F.linear(x, w_up)), w_down
    )


PEERS = {"torch.compile": torch_compile, "liger": liger}

if __name__ == "__main__":
    sys.exit(main("ffn", __doc__, PEERS))
