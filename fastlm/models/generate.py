"""Text generation with a KV cache: whole, or token by token as it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from fastlm.models.cache import KVCache
from fastlm.models.decoder import DecoderLM
from fastlm.models.sampling import check_sampling, sample
from fastlm.ops._check import fail, require_tensor

_OP = "generate"


def generate(
    model: DecoderLM,
    prompt_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    prompt_lengths: torch.Tensor | Sequence[int] | None = None,
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    stop_ids: Sequence[int] = (),
) -> torch.Tensor:
    """The new tokens, int64 (batch, new), or (new,) for a prompt without a batch.

    new is `max_new_tokens`, or less where every row has stopped. The arguments are those of
    `generate_stream`; rows that stopped earlier repeat their stop token.
    """
    tokens = list(
        generate_stream(
            model, prompt_ids, max_new_tokens=max_new_tokens, prompt_lengths=prompt_lengths,
            greedy=greedy, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            generator=generator, stop_ids=stop_ids,
        )
    )  # fmt: skip
    return torch.stack(tokens, -1)


def generate_stream(
    model: DecoderLM,
    prompt_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    prompt_lengths: torch.Tensor | Sequence[int] | None = None,
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    stop_ids: Sequence[int] = (),
) -> Iterator[torch.Tensor]:
    """Yields each new token as soon as it is chosen: int64 (batch,), or () without a batch.

    The arguments are checked at the call, not at the first token. The model runs in evaluation mode
    and without gradients, and gets its modes back when the iterator ends or is closed.

    Args:
        prompt_ids: (batch, seqlen) or (seqlen,) integers, at least one token.
        max_new_tokens: at least 1. Prompt and new tokens together are at most `max_seqlen` + 1, for
            the last token need not be read. More is an error, since a position has no meaning past
            the table: to continue a long text, give its end as the prompt.
        prompt_lengths: (batch,): row b of the prompt is its first prompt_lengths[b] tokens, and
            what follows is padding. Default: every row is whole.
        greedy: take the most probable token each time. Else it is drawn as `sample` says:
        temperature: divides the logits; above 0.
        top_k, top_p: limit the choice to the most probable tokens; None does not.
        seed, generator: of the draws; at most one of them. A generator is on the model's device.
            None for both is torch's default generator.
        stop_ids: tokens that end a row; they are part of the result.

    Raises:
        TypeError, ValueError: arguments that do not fit.
    """
    _check(model, prompt_ids, max_new_tokens, seed, generator)
    if not greedy:
        check_sampling(temperature, top_k, top_p)
    batched = prompt_ids.dim() == 2
    ids = prompt_ids if batched else prompt_ids[None]
    lengths = _lengths(prompt_lengths, ids)
    if seed is not None:
        generator = torch.Generator(ids.device).manual_seed(seed)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        return sample(
            logits, greedy=greedy, temperature=temperature, top_k=top_k, top_p=top_p,
            generator=generator,
        )  # fmt: skip

    tokens = _tokens(model, ids, lengths, max_new_tokens, choose, tuple(stop_ids))
    return tokens if batched else (token[0] for token in tokens)


@torch.no_grad()
def _tokens(model, ids, lengths, max_new_tokens, choose, stop_ids) -> Iterator[torch.Tensor]:
    batch, seqlen = ids.shape
    weight = model.token_weight
    dtype = weight.dtype
    if torch.is_autocast_enabled(ids.device.type):
        dtype = torch.get_autocast_dtype(ids.device.type)
    cache = KVCache(
        model.config, batch, seqlen + max_new_tokens - 1, device=ids.device, dtype=dtype
    )
    with _evaluating(model):
        x = model.hidden(ids, cache=cache)  # (batch, seqlen, embed_dim)
        if lengths is None:
            x = x[:, -1]
        else:
            cache.truncate(lengths)
            x = x[torch.arange(batch, device=x.device), lengths - 1]
        token = choose(model.head(x))
        stopped = _is_stop(token, stop_ids)
        yield token
        for _ in range(max_new_tokens - 1):
            if stop_ids and stopped.all():  # the one wait for the device, where asked for
                return
            x = model.hidden(token[:, None], cache=cache)[:, -1]
            token = torch.where(stopped, token, choose(model.head(x)))
            stopped = stopped | _is_stop(token, stop_ids)
            yield token


def _is_stop(token: torch.Tensor, stop_ids: tuple[int, ...]) -> torch.Tensor:
    stop = torch.tensor(stop_ids, dtype=token.dtype, device=token.device)
    return (token[:, None] == stop).any(-1)


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module is in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check(model, prompt_ids, max_new_tokens, seed, generator) -> None:
    require_tensor(_OP, "prompt_ids", prompt_ids)
    if prompt_ids.dim() not in (1, 2) or prompt_ids.numel() == 0:
        want = "have shape (seqlen,) or (batch, seqlen) and at least one token"
        raise fail(_OP, "prompt_ids", want, tuple(prompt_ids.shape))
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool):
        got = type(max_new_tokens).__name__
        raise fail(_OP, "max_new_tokens", "be an int", got, TypeError)
    room = model.config.max_seqlen + 1 - prompt_ids.shape[-1]
    if room < 1:
        want = f"have at most max_seqlen = {model.config.max_seqlen} tokens"
        raise fail(_OP, "prompt_ids", want, prompt_ids.shape[-1])
    if not 1 <= max_new_tokens <= room:
        want = (
            f"be from 1 to {room} (max_seqlen = {model.config.max_seqlen}, "
            f"a prompt of {prompt_ids.shape[-1]})"
        )
        raise fail(_OP, "max_new_tokens", want, max_new_tokens)
    if seed is not None and generator is not None:
        raise fail(_OP, "seed", "be None where a generator is given", seed)


def _lengths(prompt_lengths, ids: torch.Tensor) -> torch.Tensor | None:
    if prompt_lengths is None:
        return None
    lengths = torch.as_tensor(prompt_lengths, device=ids.device)
    if lengths.shape != ids.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        want = f"be integers of shape (batch,) = {tuple(ids.shape[:1])}"
        raise fail(_OP, "prompt_lengths", want, f"{lengths.dtype} {tuple(lengths.shape)}")
    if not ((lengths >= 1) & (lengths <= ids.shape[1])).all():
        want = f"be from 1 to seqlen = {ids.shape[1]}"
        raise fail(_OP, "prompt_lengths", want, lengths.tolist())
    return lengths.long()
