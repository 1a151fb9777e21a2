"""Cross-entropy of logits, and of a linear head."""

import sys

from _bench import main, torch_compile


def liger(case):
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    if case.function == "linear_cross_entropy":
        return lambda x, weight, target: LigerFusedLinearCrossEntropyFunction.apply(
            x, weight, target
        )[0]
    # It overwrites the logits with their gradient: a copy keeps the next call's input, and costs.
    return lambda logits, target: LigerCrossEntropyFunction.apply(
        logits.clone(), target, None, -100, 0.0, 0.0, "mean", None, False
    )[0]


def quack(case):
    from quack import cross_entropy

    if case.function != "cross_entropy":
        raise NotImplementedError("cross-entropy of logits only")
    return lambda logits, target: cross_entropy(logits, target, reduction="mean").to(logits.dtype)


def cut_cross_entropy(case):
    from cut_cross_entropy import linear_cross_entropy

    if case.function != "linear_cross_entropy":
        raise NotImplementedError("cross-entropy of a linear head only")
    return lambda x, weight, target: linear_cross_entropy(x, weight, target)


PEERS = {
    "torch.compile": torch_compile,
    "liger": liger,
    "quack": quack,
    "cut-cross-entropy": cut_cross_entropy,
}

if __name__ == "__main__":
    sys.exit(main("loss", __doc__, PEERS))
