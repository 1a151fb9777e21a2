"""Generation: the cache against full passes, the choice of tokens, streaming, stopping."""

import copy
import dataclasses
import re

import pytest
import torch
from parity import randomize

from fastlm.models import (
    DecoderLM,
    KVCache,
    TransformerConfig,
    generate,
    generate_stream,
    sample,
)
from fastlm.testing import assert_close, randn

TINY = TransformerConfig(
    vocab_size=23, embed_dim=12, num_heads=3, num_layers=2, dim_feedforward=20, max_seqlen=12
)


def tokens(*shape, seed=0):
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(seed))


def build(**changes):
    return randomize(DecoderLM(dataclasses.replace(TINY, **changes)))


@torch.no_grad()
def full_logits(model, ids):
    """Without a cache, in the model's dtype and in fp64."""
    return model(ids), copy.deepcopy(model).double()(ids)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("chunks", [(12,), (5, 1, 1, 1, 1, 1, 1, 1), (1,) * 12, (4, 5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache_equals_full_pass(chunks, positions, dtype):
    model, ids = build(positions=positions).to(dtype), tokens(2, 12)
    same, gold = full_logits(model, ids)
    cache = KVCache(model.config, 2, dtype=dtype)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
    assert_close("logits", torch.cat(parts, 1), same, gold)
    assert cache.lengths.tolist() == [12, 12] and cache.used == 12


def test_cache_of_rows_of_different_lengths():
    """A right-padded prompt, truncated, then continued: each row as if it were alone."""
    model, ids, lengths = build(), tokens(3, 10), [5, 2, 4]
    new = tokens(3, 3, seed=1)
    cache = KVCache(model.config, 3)
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
        cache.truncate(torch.tensor(lengths))
        cached = torch.cat([model(token, cache=cache) for token in new.split(1, dim=1)], 1)
    assert cache.lengths.tolist() == [8, 5, 7]
    for row, length in enumerate(lengths):
        alone = torch.cat([ids[row : row + 1, :length], new[row : row + 1]], 1)
        same, gold = (x[:, length:] for x in full_logits(model, alone))
        assert_close(f"row {row}", cached[row : row + 1], same, gold)


def test_cache_in_the_interpreter():
    model = DecoderLM(dataclasses.replace(TINY, num_layers=1), impl="triton")
    same, gold = full_logits(_with(DecoderLM(model.config), model.state_dict()), tokens(1, 4))
    cache = KVCache(model.config, 1)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens(1, 4).split((3, 1), dim=1)]
    assert_close("logits", torch.cat(parts, 1), same, gold)


def _with(model, state):
    model.load_state_dict(state)
    return model


def test_cache_errors():
    model, cache = build(), KVCache(TINY, 2, 4)
    with torch.no_grad():
        model(tokens(2, 3), cache=cache)
        message = "KVCache: ids must have at most 1 new tokens (3 of 4 are held), got 2"
        with pytest.raises(ValueError, match=re.escape(message)):
            model(tokens(2, 2), cache=cache)
        with pytest.raises(ValueError, match="KVCache: ids must have 2 rows, got 1"):
            model(tokens(1, 1), cache=cache)
    message = "KVCache: capacity must be from 1 to max_seqlen = 12, got 13"
    with pytest.raises(ValueError, match=re.escape(message)):
        KVCache(TINY, 2, 13)
    message = "KVCache: lengths must have shape (batch,) = (2,), got (3,)"
    with pytest.raises(ValueError, match=re.escape(message)):
        cache.truncate(torch.zeros(3))


@torch.no_grad()
def greedy_without_cache(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids[:, -n:]


@pytest.mark.parametrize("prompt", [1, 5])
def test_generate_greedy(prompt):
    model, ids = build(), tokens(3, prompt)
    expected = greedy_without_cache(model, ids, 7)
    out = generate(model, ids, max_new_tokens=7, greedy=True)
    assert out.dtype == torch.int64 and torch.equal(out, expected)
    assert torch.equal(generate(model, ids[0], max_new_tokens=7, greedy=True), expected[0])


def test_generate_up_to_the_last_position():
    """Prompt and new tokens are max_seqlen + 1: the last one is not read."""
    model, ids = build(), tokens(2, 5)
    out = generate(model, ids, max_new_tokens=8, greedy=True)
    assert torch.equal(out, greedy_without_cache(model, ids, 8))


def test_generate_prompts_of_different_lengths():
    model, ids, lengths = build(), tokens(3, 5), [5, 1, 3]
    out = generate(model, ids, max_new_tokens=6, greedy=True, prompt_lengths=lengths)
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row, :length], max_new_tokens=6, greedy=True)
        assert torch.equal(out[row], alone)
    changed = ids.clone()
    changed[1, 1:] = 7  # padding is not read
    again = generate(
        model, changed, max_new_tokens=6, greedy=True, prompt_lengths=torch.tensor(lengths)
    )
    assert torch.equal(out, again)


def test_generate_streams_what_it_generates():
    model, ids = build(), tokens(2, 5)
    options = {"max_new_tokens": 6, "temperature": 2.0, "seed": 3}
    stream = generate_stream(model, ids, **options)
    first = next(stream)
    assert first.shape == (2,)
    rest = list(stream)
    out = generate(model, ids, **options)
    assert torch.equal(torch.stack([first, *rest], 1), out)
    assert all(token.shape == () for token in generate_stream(model, ids[0], **options))


def test_generate_seeds():
    model, ids = build(), tokens(2, 5)

    def run(**options):
        return generate(model, ids, max_new_tokens=8, temperature=3.0, **options)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(run(seed=1), run(seed=1)) and not torch.equal(run(seed=1), run(seed=2))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(run(generator=generator), run(seed=1))
    assert not torch.equal(run(generator=generator), run(seed=1))  # it has advanced
    assert torch.equal(torch.get_rng_state(), state)  # torch's own was not touched
    torch.manual_seed(1)
    assert torch.equal(run(), run(seed=1))


def test_generate_stops():
    model, ids = build(), tokens(3, 5)
    free = generate(model, ids, max_new_tokens=8, greedy=True)
    stop = free[0, 2].item()
    out = generate(model, ids, max_new_tokens=8, greedy=True, stop_ids=[stop, 22])
    for row in range(3):
        ends = [i for i, token in enumerate(free[row].tolist()) if token in (stop, 22)]
        end = ends[0] if ends else out.shape[1] - 1
        assert torch.equal(out[row, : end + 1], free[row, : end + 1])
        assert (out[row, end + 1 :] == free[row, end]).all()
    alone = generate(model, ids[0], max_new_tokens=8, greedy=True, stop_ids=[stop])
    assert alone.tolist() == free[0, : free[0].tolist().index(stop) + 1].tolist()


def test_generate_restores_modes():
    model = build(dropout=0.5)
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    ids = tokens(2, 5)
    options = {"max_new_tokens": 4, "greedy": True}
    expected = generate(copy.deepcopy(model).eval(), ids, **options)
    assert torch.equal(generate(model, ids, **options), expected)  # no dropout
    assert [module.training for module in model.modules()] == modes
    stream = generate_stream(model, ids, **options)
    next(stream)
    assert torch.is_grad_enabled() and not model.training
    stream.close()
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_generate_autocast_and_half():
    ids = tokens(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(build(), ids, max_new_tokens=4, greedy=True).shape == (2, 4)
    assert generate(build().bfloat16(), ids, max_new_tokens=4, seed=0).shape == (2, 4)


def test_sample_greedy():
    logits = randn(5, 23)
    assert torch.equal(sample(logits, greedy=True), logits.argmax(-1))
    assert torch.equal(sample(logits, top_k=1), logits.argmax(-1))
    assert torch.equal(sample(logits, temperature=1e-4), logits.argmax(-1))
    assert torch.equal(sample(logits, top_p=1e-6), logits.argmax(-1))


def frequencies(logits, n=20000, **options):
    generator = torch.Generator().manual_seed(0)
    out = sample(logits.expand(n, -1), generator=generator, **options)
    return torch.bincount(out, minlength=logits.shape[-1]) / n


P = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05])


@pytest.mark.parametrize(
    "options,left",
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.6}, [1, 3]),  # 0.4 alone is less, 0.65 is enough
        ({"top_p": 0.7}, [1, 2, 3]),
        ({"top_k": 3, "top_p": 0.7}, [1, 3]),  # of 0.4, 0.25, 0.2 the first two are 0.76
        ({"temperature": 0.5, "top_p": 0.6}, [1, 3]),
        ({"temperature": 0.5, "top_p": 0.5}, [1]),  # 0.16 of 0.275
    ],
    ids=str,
)
def test_sample_distribution(options, left):
    expected = torch.zeros(5)
    expected[left] = P[left] ** (1 / options.get("temperature", 1.0))
    expected /= expected.sum()
    found = frequencies(P.log(), **options)
    assert (found[expected == 0] == 0).all()
    # Five standard deviations of a count of 20,000.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / 20000).sqrt()).all()


def test_sample_ties_go_to_the_lower_token():
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, -1.0]])
    assert set(frequencies(logits, n=500, top_k=2).nonzero().flatten().tolist()) == {1, 2}


S = "sample: "
G = "generate: "
OPTION_ERRORS = {
    "temperature": (
        {"temperature": 0.0},
        ValueError,
        S + "temperature must be a positive number (or use greedy=True), got 0.0",
    ),
    "temperature_type": (
        {"temperature": "hot"},
        TypeError,
        S + "temperature must be a positive number, got str",
    ),
    "top_k": ({"top_k": 0}, ValueError, S + "top_k must be at least 1, got 0"),
    "top_k_type": ({"top_k": 2.5}, TypeError, S + "top_k must be None or an int, got float"),
    "top_p": ({"top_p": 0.0}, ValueError, S + "top_p must be above 0 and at most 1, got 0.0"),
    "top_p_type": ({"top_p": "all"}, TypeError, S + "top_p must be None or a number, got str"),
    "long": (
        {"max_new_tokens": 9},
        ValueError,
        G + "max_new_tokens must be from 1 to 8 (max_seqlen = 12, a prompt of 5), got 9",
    ),
    "none": (
        {"max_new_tokens": 0},
        ValueError,
        G + "max_new_tokens must be from 1 to 8 (max_seqlen = 12, a prompt of 5), got 0",
    ),
    "count_type": (
        {"max_new_tokens": 1.0},
        TypeError,
        G + "max_new_tokens must be an int, got float",
    ),
    "prompt": (
        {"prompt_ids": torch.zeros(2, 0, dtype=torch.int64)},
        ValueError,
        G + "prompt_ids must have shape (seqlen,) or (batch, seqlen) and at least one token, "
        "got (2, 0)",
    ),
    "prompt_long": (
        {"prompt_ids": tokens(2, 13)},
        ValueError,
        G + "prompt_ids must have at most max_seqlen = 12 tokens, got 13",
    ),
    "lengths": (
        {"prompt_lengths": [6, 1]},
        ValueError,
        G + "prompt_lengths must be from 1 to seqlen = 5, got [6, 1]",
    ),
    "lengths_shape": (
        {"prompt_lengths": [1, 1, 1]},
        ValueError,
        G + "prompt_lengths must be integers of shape (batch,) = (2,), got torch.int64 (3,)",
    ),
    "seeds": (
        {"seed": 1, "generator": torch.Generator()},
        ValueError,
        G + "seed must be None where a generator is given, got 1",
    ),
}


@pytest.mark.parametrize("case", OPTION_ERRORS)
def test_generate_errors(case):
    """At the call, before the first token is asked for."""
    options, error, message = OPTION_ERRORS[case]
    options = {"prompt_ids": tokens(2, 5), "max_new_tokens": 3, **options}
    with pytest.raises(error, match=re.escape(message) + "$"):
        generate_stream(build(), **options)
