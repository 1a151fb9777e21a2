"""LayerNorm, LayerNorm of a residual sum, RMSNorm."""

import sys

from _bench import main, torch_compile


def liger(case):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if case.function == "rms_norm":
        # offset 0, casting after the product; not in place, which would overwrite our gradient
        return lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "none", False)

    def layer_norm(x, weight, bias, residual=None):
        x = x if residual is None else residual + x
        return LigerLayerNormFunction.apply(x, weight, bias, 1e-5)

    return layer_norm


def quack(case):
    from quack import rmsnorm

    if case.function != "rms_norm":
        raise NotImplementedError("RMSNorm only")
    return lambda x, weight: rmsnorm(x, weight, eps=1e-6)


PEERS = {"torch.compile": torch_compile, "liger": liger, "quack": quack}

if __name__ == "__main__":
    sys.exit(main("norm", __doc__, PEERS))
