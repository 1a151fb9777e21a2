"""Cross-entropy of logits, of a linear head, and of BERT's masked language model head.

The floor of a cross-entropy of logits is their bytes: read forward, read and written backward (the
column "of ceiling" is against a copy). That of a head is its products: "bare_products" are the
three by cuBLAS on the whole batch, and what a head's loss takes is divided by that by hand.
"""

import sys

import torch.nn.functional as F
from _bench import main, torch_compile


def liger(case):
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    linear = lambda x, weight, target: LigerFusedLinearCrossEntropyFunction.apply(
        x, weight, target
    )[0]
    if case.function == "linear_cross_entropy":
        return linear
    if case.function == "masked_lm_loss":
        return _after_transform(linear)
    _only(case, "cross_entropy")
    # It overwrites the logits with their gradient: a copy keeps the next call's input, and costs.
    return lambda logits, target: LigerCrossEntropyFunction.apply(
        logits.clone(), target, None, -100, 0.0, 0.0, "mean", None, False
    )[0]


def quack(case):
    if case.function == "linear_cross_entropy":
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return lambda x, weight, target: chunked_linear_cross_entropy(x, weight, target)
    from quack import cross_entropy

    _only(case, "cross_entropy")
    return lambda logits, target: cross_entropy(logits, target, reduction="mean").to(logits.dtype)


def cut_cross_entropy(case):
    from cut_cross_entropy import linear_cross_entropy

    if case.function == "masked_lm_loss":
        return _after_transform(linear_cross_entropy)
    _only(case, "linear_cross_entropy")
    return lambda x, weight, target: linear_cross_entropy(x, weight, target)


def compiled(case):
    if case.function == "products":
        raise NotImplementedError("products alone are cuBLAS's")
    return torch_compile(case)


def _only(case, function):
    if case.function != function:
        raise NotImplementedError(f"{function} only")


def _after_transform(linear):
    """BERT's transform by torch, and a library's loss of the decoder."""

    def loss(hidden, labels, dense_weight, dense_bias, norm_weight, norm_bias, decoder_weight):
        h = F.gelu(F.linear(hidden, dense_weight, dense_bias))
        h = F.layer_norm(h, norm_weight.shape, norm_weight, norm_bias, 1e-12)
        return linear(h, decoder_weight, labels)

    return loss


PEERS = {
    "torch.compile": compiled,
    "liger": liger,
    "quack": quack,
    "cut-cross-entropy": cut_cross_entropy,
}

if __name__ == "__main__":
    sys.exit(main("loss", __doc__, PEERS))
