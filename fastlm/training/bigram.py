"""A byte-bigram model: the yardstick that a trained model has to beat.

Interpolated Kneser-Ney with one absolute discount, down to the uniform distribution:
    p(b | a) = max(c(a, b) - d, 0) / c(a) + d * n(a) / c(a) * q(b)
where n(a) is the number of different bytes seen after a, and q(b), the lower order, is
proportional to the number of different bytes seen before b, itself interpolated with 1 / 256.

Source: Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", 1998.
"""

from __future__ import annotations

import torch

VOCABULARY = 256


def fit_bigram(data: torch.Tensor) -> torch.Tensor:
    """Log2-probabilities, fp64 (256, 256): row = the byte before, column = the byte.

    Args:
        data: uint8 (bytes,), the training text.
    """
    data = data.long()
    pairs = data[:-1] * VOCABULARY + data[1:]
    counts = torch.bincount(pairs, minlength=VOCABULARY**2).double().view(VOCABULARY, VOCABULARY)
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    # The usual estimate; 0.5 where the text is too small or too regular to estimate it.
    discount = (once / (once + 2 * twice)).item() if once and twice else 0.5
    uniform = torch.full((VOCABULARY,), 1.0 / VOCABULARY, dtype=torch.float64)
    lower = _interpolate((counts > 0).sum(0).double()[None], discount, uniform)[0]
    return _interpolate(counts, discount, lower).log2()


def bigram_bits(
    log2_probabilities: torch.Tensor, ids: torch.Tensor, targets: torch.Tensor
) -> float:
    """Bits per byte on the same windows that a model is evaluated on."""
    return -log2_probabilities[ids, targets].mean().item()


def _interpolate(counts: torch.Tensor, discount: float, lower: torch.Tensor) -> torch.Tensor:
    total = counts.sum(-1, keepdim=True)
    kept = (counts - discount).clamp(min=0)
    freed = total - kept.sum(-1, keepdim=True)
    return torch.where(total > 0, (kept + freed * lower) / total.clamp(min=1), lower)
