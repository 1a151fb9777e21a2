"""DecoderLM against the same model of torch.nn modules, its configuration and its cache."""

import copy
import dataclasses
import json
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from parity import check_modules, randomize
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlm.models import DecoderLM, KVCache, TransformerConfig
from fastlm.models.decoder import sinusoidal_positions
from fastlm.testing import assert_close

TINY = TransformerConfig(
    vocab_size=23, embed_dim=12, num_heads=3, num_layers=2, dim_feedforward=20, max_seqlen=9
)


def config(**changes):
    return dataclasses.replace(TINY, **changes)


def tokens(*shape, seed=0):
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(seed))


class TorchBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.embed_dim, c.layer_norm_eps, bias=c.bias)
        self.self_attn = nn.MultiheadAttention(
            c.embed_dim, c.num_heads, bias=c.bias, batch_first=True
        )
        self.norm2 = nn.LayerNorm(c.embed_dim, c.layer_norm_eps, bias=c.bias)
        self.ffn = nn.Module()
        self.ffn.linear1 = nn.Linear(c.embed_dim, c.dim_feedforward, c.bias)
        self.ffn.linear2 = nn.Linear(c.dim_feedforward, c.embed_dim, c.bias)
        self.activation = {"gelu": F.gelu, "relu": F.relu}[c.activation]

    def forward(self, x, mask):
        y = self.norm1(x)
        x = x + self.self_attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = self.activation(self.ffn.linear1(self.norm2(x)))
        return x + self.ffn.linear2(y)


class TorchLM(nn.Module):
    """The model written with torch.nn alone; its parameters have DecoderLM's names."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.token_weight = nn.Parameter(torch.randn(c.vocab_size, c.embed_dim))
        if c.positions == "learned":
            self.position_weight = nn.Parameter(torch.randn(c.max_seqlen, c.embed_dim))
        self.blocks = nn.ModuleList(TorchBlock(c) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(c.embed_dim, c.layer_norm_eps, bias=c.bias)

    def forward(self, ids, labels=None, **options):
        x = self.token_weight[ids]
        if self.config.positions == "learned":
            x = x + self.position_weight[: ids.shape[1]]
        else:
            scale = math.sqrt(self.config.embed_dim)
            # The table as the model holds it, so that its rounding is not counted as an error.
            x = (x + sinusoidal_positions(*self.shape()).to(x.dtype)[: ids.shape[1]]) * scale
        n = ids.shape[1]
        mask = torch.full((n, n), float("-inf"), dtype=x.dtype).triu(1)
        for block in self.blocks:
            x = block(x, mask)
        logits = self.norm(x) @ self.token_weight.t()
        if labels is None:
            return logits
        return F.cross_entropy(logits.transpose(1, 2), labels, **options)

    def shape(self):
        return self.config.max_seqlen, self.config.embed_dim


MODELS = {
    "learned": {},
    "sinusoidal": {"positions": "sinusoidal"},
    "no_bias": {"bias": False, "activation": "relu", "layer_norm_eps": 1e-3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MODELS)
def test_decoder_logits(case, dtype):
    c = config(**MODELS[case])
    theirs = randomize(TorchLM(c))
    check_modules(DecoderLM(c), theirs, {"ids": tokens(2, 7)}, dtype=dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_decoder_loss(reduction):
    labels = tokens(2, 7, seed=1)
    labels[0, 2:4] = -100
    theirs = randomize(TorchLM(TINY))
    inputs = {"ids": tokens(2, 7), "labels": labels}
    check_modules(DecoderLM(TINY), theirs, inputs, reduction=reduction)


def test_decoder_in_the_interpreter():
    c = config(num_layers=1, num_heads=2, embed_dim=8, dim_feedforward=12)
    theirs = randomize(TorchLM(c))
    inputs = {"ids": tokens(1, 5), "labels": tokens(1, 5, seed=1)}
    check_modules(DecoderLM(c, impl="triton"), theirs, inputs)


def test_decoder_labels_are_what_follows():
    """labels[b, i] follows ids[b, i]: nothing is shifted inside."""
    model, text = DecoderLM(TINY), tokens(2, 8)
    logp = model(text[:, :-1]).log_softmax(-1)
    expected = -logp.gather(-1, text[:, 1:, None]).mean()
    loss = model(text[:, :-1], labels=text[:, 1:])
    assert_close("loss", loss, expected, expected.double())


def test_decoder_sees_no_future():
    model, ids = DecoderLM(TINY), tokens(1, 7)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 23
    out, other = model(ids), model(changed)
    assert torch.equal(out[:, :5], other[:, :5]) and not torch.equal(out[:, 5], other[:, 5])


def test_decoder_state_dict():
    state = DecoderLM(TINY).state_dict()
    assert set(state) == set(TorchLM(TINY).state_dict())
    sinusoidal = DecoderLM(config(positions="sinusoidal"))
    assert "position_weight" not in sinusoidal.state_dict()
    other = DecoderLM(TINY)
    other.load_state_dict(state, strict=True)
    ids = tokens(2, 7)
    for model in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(model(ids), other(ids)) and model.config == TINY


def test_decoder_initialisation():
    c = TransformerConfig(embed_dim=64, num_layers=3)
    state = DecoderLM(c).state_dict()
    for name, value in state.items():
        if name.endswith("bias"):
            assert (value == 0).all()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            writes = name.endswith(("out_proj.weight", "linear2.weight"))
            std = 0.02 / math.sqrt(6) if writes else 0.02
            assert abs(value.std().item() / std - 1) < 0.1, name


@pytest.mark.parametrize("case", MODELS)
def test_decoder_starts_on_meta(case):
    model = DecoderLM(config(**MODELS[case]), device="meta")
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(model(tokens(2, 7))).all()


def test_sinusoidal_positions_are_the_papers():
    table = sinusoidal_positions(9, 7)
    for position in (0, 1, 8):
        for i in range(7):
            angle = position / 10000 ** (2 * (i // 2) / 7)
            expected = (math.cos if i % 2 else math.sin)(angle) / math.sqrt(7)
            assert abs(table[position, i].item() - expected) <= 2**-24


def test_decoder_dropout():
    model, ids = DecoderLM(config(dropout=0.5)), tokens(2, 7)
    assert not torch.equal(model(ids), model(ids))
    plain = DecoderLM(TINY)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(ids), plain(ids))


def test_decoder_dropout_of_the_embedding():
    """A part `dropout` of the embedding is dropped before the first block, the rest scaled."""
    model = DecoderLM(config(dropout=0.25, embed_dim=48))
    with torch.no_grad():
        model.token_weight.fill_(1.0)
        model.position_weight.fill_(0.0)
    seen = []
    model.blocks[0].norm2.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(tokens(4, 9))
    (stream,) = seen
    assert set(stream.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    dropped = (stream == 0).float().mean().item()
    assert abs(dropped - 0.25) < 5 * (0.25 * 0.75 / stream.numel()) ** 0.5


def test_decoder_checkpointing():
    model = DecoderLM(config(dropout=0.3))
    grads = []
    for run in (
        model,
        lambda ids, labels: checkpoint(model, ids, labels=labels, use_reentrant=False),
    ):
        torch.manual_seed(1)
        run(tokens(2, 7), labels=tokens(2, 7, seed=1)).backward()
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_decoder_autocast():
    class Autocast(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(ids)

    theirs = randomize(TorchLM(TINY))
    check_modules(Autocast(DecoderLM(TINY)), Autocast(theirs), {"ids": tokens(2, 7)})


@pytest.mark.parametrize("dynamic", [False, True])
def test_decoder_compiles(dynamic):
    model = DecoderLM(config(num_layers=1))
    ids, labels = tokens(2, 7), tokens(2, 7, seed=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected, loss = model(ids, labels=labels), compiled(ids, labels=labels)
    assert_close("compiled", loss, expected, expected.double())
    loss.backward()
    assert model.token_weight.grad is not None


def test_decoder_learns():
    torch.manual_seed(0)
    model = DecoderLM(config(embed_dim=24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = tokens(4, 8)
    losses = []
    for _ in range(40):
        loss = model(text[:, :-1], labels=text[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(23)) < 0.1
    assert losses[-1] < 0.5, losses


D = "DecoderLM: "
FORWARD_ERRORS = {
    "type": (lambda m: m([1, 2]), TypeError, D + "ids must be a tensor, got list"),
    "shape": (
        lambda m: m(tokens(3)),
        ValueError,
        D + "ids must have shape (batch, seqlen), got (3,)",
    ),
    "length": (
        lambda m: m(tokens(1, 10)),
        ValueError,
        D + "ids must have at most max_seqlen = 9 tokens a row, got 10",
    ),
    "labels": (
        lambda m: m(tokens(2, 5), labels=tokens(2, 4)),
        ValueError,
        D + "labels must have shape (batch, seqlen) = (2, 5), got (2, 4)",
    ),
    "cache_grad": (
        lambda m: m(tokens(2, 5), cache=KVCache(TINY, 2)),
        ValueError,
        D + "cache must be used under torch.no_grad(), got gradients on",
    ),
    "dtype": (
        lambda m: m(torch.zeros(2, 5)),
        ValueError,
        "embedding: ids must have dtype torch.int64 or torch.int32, got torch.float32",
    ),
}


@pytest.mark.parametrize("case", FORWARD_ERRORS)
def test_decoder_errors(case):
    call, error, message = FORWARD_ERRORS[case]
    with pytest.raises(error, match=re.escape(message) + "$"):
        call(DecoderLM(TINY))


def test_config_round_trip():
    fields = config(dropout=0.1, positions="sinusoidal").to_dict()
    restored = TransformerConfig.from_dict(json.loads(json.dumps(fields)))
    assert restored.to_dict() == fields
    assert TransformerConfig.from_dict({}) == TransformerConfig()
    assert TransformerConfig(embed_dim=48).dim_feedforward == 192
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.embed_dim = 3


C = "TransformerConfig: "
CONFIG_ERRORS = {
    "zero": ({"num_layers": 0}, ValueError, C + "num_layers must be a positive integer, got 0"),
    "float": (
        {"embed_dim": 12.0},
        TypeError,
        C + "embed_dim must be a positive integer, got 12.0",
    ),
    "bool": (
        {"vocab_size": True},
        TypeError,
        C + "vocab_size must be a positive integer, got True",
    ),
    "heads": (
        {"embed_dim": 10, "num_heads": 3},
        ValueError,
        C + "embed_dim must be a multiple of num_heads = 3, got 10",
    ),
    "dropout": (
        {"dropout": 1.5},
        ValueError,
        C + "dropout must be a number from 0 to 1, got 1.5",
    ),
    "positions": (
        {"positions": "rotary"},
        ValueError,
        C + "positions must be one of 'learned', 'sinusoidal', got 'rotary'",
    ),
    "activation": (
        {"activation": "swish"},
        ValueError,
        C + "activation must be one of 'gelu', 'gelu_tanh', 'relu', 'relu2', 'silu', "
        "'quick_gelu', got 'swish'",
    ),
    "bias": ({"bias": 1}, TypeError, C + "bias must be True or False, got 1"),
    "eps": (
        {"layer_norm_eps": 0.0},
        ValueError,
        C + "layer_norm_eps must be a positive number, got 0.0",
    ),
    "unknown": (
        {"dim": 3},
        ValueError,
        C + "fields must be among vocab_size, embed_dim, num_heads, num_layers, dim_feedforward, "
        "max_seqlen, dropout, activation, positions, bias, layer_norm_eps, got 'dim'",
    ),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_config_errors(case):
    fields, error, message = CONFIG_ERRORS[case]
    with pytest.raises(error, match=re.escape(message) + "$"):
        TransformerConfig.from_dict(fields)
