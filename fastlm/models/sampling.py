"""The choice of the next token from logits."""

from __future__ import annotations

import torch

from fastlm.ops._check import fail

_OP = "sample"


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises unless `sample` takes these options."""
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool):
        got = type(temperature).__name__
        raise fail(_OP, "temperature", "be a positive number", got, TypeError)
    if not 0 < temperature < float("inf"):
        raise fail(_OP, "temperature", "be a positive number (or use greedy=True)", temperature)
    if top_k is not None:
        if not isinstance(top_k, int) or isinstance(top_k, bool):
            raise fail(_OP, "top_k", "be None or an int", type(top_k).__name__, TypeError)
        if top_k < 1:
            raise fail(_OP, "top_k", "be at least 1", top_k)
    if top_p is not None:
        if not isinstance(top_p, (int, float)) or isinstance(top_p, bool):
            raise fail(_OP, "top_p", "be None or a number", type(top_p).__name__, TypeError)
        if not 0 < top_p <= 1:
            raise fail(_OP, "top_p", "be above 0 and at most 1", top_p)


def sample(
    logits: torch.Tensor,
    *,
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One token per row of logits (batch, vocab), as int64 (batch,).

    The logits are divided by `temperature`; `top_k` then leaves the k most probable tokens, and
    `top_p` the fewest of those left whose probabilities reach it together. The most probable token
    is always left. Ties at the k-th place go to the lower token.

    Args:
        greedy: take the most probable token; the other options are not used.
        generator: of torch, on the device of the logits; None is the default one.

    Raises:
        TypeError, ValueError: options out of range.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv:1904.09751.
    """
    if greedy:
        return logits.argmax(-1)
    check_sampling(temperature, top_k, top_p)
    # Stable, so that ties are broken alike on every device.
    scores, tokens = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        scores = scores[:, :top_k]
    p = scores.softmax(-1)  # (batch, at most vocab), most probable first
    if top_p is not None:
        before = p.cumsum(-1) - p
        p = torch.where(before < top_p, p, 0.0)
    choice = torch.multinomial(p, 1, generator=generator)
    return tokens.gather(1, choice).squeeze(1)
