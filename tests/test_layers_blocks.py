"""Encoder and decoder layers and stacks against torch.nn's."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from masks import MASKS, torch_masks
from pairwise import pairwise
from parity import check_modules, randomize
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlm import layers
from fastlm.layers import TransformerDecoderLayer, TransformerEncoderLayer
from fastlm.reference import attention as reference_attention
from fastlm.reference import ffn as reference_ffn
from fastlm.reference import norm as reference_norm
from fastlm.testing import assert_close, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DIM, HEADS, HIDDEN, BATCH = 12, 2, 20, 3
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "function": F.gelu,
    "module": nn.GELU(approximate="tanh"),
    "unknown": torch.tanh,
}
BLOCK = {
    "norm_first": (False, True),
    "layout": ("batch_first", "seq_first", "unbatched"),
    "masks": MASKS,
    "bias": (True, False),
    "activation": tuple(ACTIVATIONS),
    "mode": ("train", "eval", "no_grad"),
    "dtype": DTYPES,
}
ENCODER_CASES = pairwise(**BLOCK)
DECODER_CASES = pairwise(**BLOCK, memory_masks=MASKS)


def build(module, case):
    layer = module(
        DIM,
        HEADS,
        HIDDEN,
        dropout=0.0 if case["mode"] == "train" else 0.5,
        activation=ACTIVATIONS[case["activation"]],
        layer_norm_eps=1e-3,
        batch_first=case["layout"] == "batch_first",
        norm_first=case["norm_first"],
        bias=case["bias"],
    )
    return layer.train(case["mode"] == "train")


def tensor(case, seqlen, seed=0):
    if case["layout"] == "unbatched":
        return randn(seqlen, DIM, seed=seed)
    x = randn(BATCH, seqlen, DIM, seed=seed)
    return x if case["layout"] == "batch_first" else x.transpose(0, 1)


def name_of(case):
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


@pytest.fixture
def no_fast_path():
    """torch.nn's inference path takes every float mask for a boolean, and GELU's tanh for erf."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("case", ENCODER_CASES, ids=name_of)
def test_encoder_layer_parity(case, no_fast_path):
    batch = None if case["layout"] == "unbatched" else BATCH
    mask, padding, causal = torch_masks(case["masks"], 5, 5, batch, HEADS)
    check_modules(
        build(TransformerEncoderLayer, case),
        randomize(build(nn.TransformerEncoderLayer, case)),
        {"src": tensor(case, 5), "src_mask": mask, "src_key_padding_mask": padding},
        dtype=case["dtype"],
        backward=case["mode"] != "no_grad",
        frozen=("src_mask", "src_key_padding_mask"),
        is_causal=causal,
    )


@pytest.mark.parametrize("masks", ["none", "bool", "padding", "causal"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer_parity_with_the_fast_path(activation, masks):
    mask, padding, causal = torch_masks(masks, 5, 5, BATCH, HEADS)
    check_modules(
        TransformerEncoderLayer(DIM, HEADS, HIDDEN, activation=activation, batch_first=True).eval(),
        randomize(
            nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, activation=activation, batch_first=True)
        ).eval(),
        {"src": randn(BATCH, 5, DIM), "src_mask": mask, "src_key_padding_mask": padding},
        backward=False,
        is_causal=causal,
    )


@pytest.mark.parametrize("case", DECODER_CASES, ids=name_of)
def test_decoder_layer_parity(case):
    batch = None if case["layout"] == "unbatched" else BATCH
    mask, padding, causal = torch_masks(case["masks"], 5, 5, batch, HEADS)
    masks = {"tgt_mask": mask, "tgt_key_padding_mask": padding}
    mask, padding, memory_causal = torch_masks(case["memory_masks"], 5, 7, batch, HEADS)
    masks |= {"memory_mask": mask, "memory_key_padding_mask": padding}
    check_modules(
        build(TransformerDecoderLayer, case),
        randomize(build(nn.TransformerDecoderLayer, case)),
        {"tgt": tensor(case, 5), "memory": tensor(case, 7, 1), **masks},
        dtype=case["dtype"],
        backward=case["mode"] != "no_grad",
        frozen=tuple(masks),
        tgt_is_causal=causal,
        memory_is_causal=memory_causal,
    )


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_in_the_interpreter(norm_first):
    options = {"norm_first": norm_first, "batch_first": True, "dropout": 0.0}
    check_modules(
        TransformerEncoderLayer(8, 2, 12, impl="triton", **options),
        randomize(nn.TransformerEncoderLayer(8, 2, 12, **options)),
        {"src": randn(1, 5, 8), "src_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
        is_causal=True,
    )


def test_decoder_layer_in_the_interpreter():
    """With enough tokens that the reference is not right by luck, which halves the bound."""
    check_modules(
        TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True, impl="triton"),
        randomize(nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)),
        {"tgt": randn(2, 13, 8), "memory": randn(2, 17, 8, seed=1)},
    )


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_autocast(norm_first):
    options = {"norm_first": norm_first, "dropout": 0.0}
    ours = _Autocast(TransformerEncoderLayer(DIM, HEADS, HIDDEN, **options))
    theirs = _Autocast(randomize(nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, **options)))
    check_modules(ours, theirs, {"src": randn(5, 2, DIM)})


class _Autocast(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, **inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(**inputs)


def _seeds(n):
    torch.manual_seed(5)
    return [torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64) for _ in range(n)]


def test_encoder_layer_is_the_papers_formula():
    """z = LayerNorm(Dropout(Sublayer(x)) + x), twice, with the dropout masks of our seeds."""
    layer = randomize(TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.3, batch_first=True))
    x = randn(2, 5, DIM)
    torch.manual_seed(5)
    out = layer(x)
    attention_seed, seed1, ffn_seed, seed2 = _seeds(4)

    def add_and_norm(norm, sublayer, x, seed):
        dropped = reference_norm.dropout_rows(sublayer, 0.3, seed)
        return F.layer_norm(dropped + x, (DIM,), norm.weight, norm.bias, norm.eps)

    attn = layer.self_attn
    q, k, v = attn._project(x, x, x)
    heads = reference_attention.attention(q, k, v, dropout_p=0.3, seed=attention_seed)
    x = add_and_norm(layer.norm1, attn.out_proj(heads.flatten(-2)), x, seed1)
    weights = (layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias)
    options = {"activation": "relu", "dropout_p": 0.3, "seed": ffn_seed}
    x = add_and_norm(layer.norm2, reference_ffn.ffn(x, *weights, **options), x, seed2)
    assert torch.equal(out, x)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dropout", ["dropout1", "dropout2", "dropout", "self_attn"])
def test_encoder_layer_dropout_modules_are_obeyed(dropout, norm_first):
    """As in torch.nn, each dropout module's p and mode count on their own."""
    layer = TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, norm_first=norm_first)
    x = randn(5, 2, DIM)
    plain = layer(x)
    module = getattr(layer, dropout)
    setattr(module, "dropout" if dropout == "self_attn" else "p", 0.5)
    assert not torch.equal(layer(x), plain)
    module.eval()
    assert torch.equal(layer(x), plain)
    if dropout != "self_attn":
        setattr(layer, dropout, nn.Identity())
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_same_bits_in_every_mode(norm_first):
    layer = randomize(TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, norm_first=norm_first))
    x = randn(5, 2, DIM)
    expected = layer(x)
    assert torch.equal(layer.eval()(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    assert torch.equal(checkpoint(layer, x, use_reentrant=False), expected)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_block_checkpointing_replays_dropout(kind):
    block = {"encoder": TransformerEncoderLayer, "decoder": TransformerDecoderLayer}[kind]
    layer = block(DIM, HEADS, HIDDEN, 0.3)
    inputs = (randn(5, 2, DIM).requires_grad_(), *([randn(7, 2, DIM)] if kind == "decoder" else []))
    grads = []
    for run in (layer, lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False)):
        torch.manual_seed(1)
        run(*inputs).square().sum().backward()
        grads.append([inputs[0].grad, *(p.grad for p in layer.parameters())])
        inputs[0].grad = None
        layer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("norm_first,dynamic", [(False, True), (True, False)])
def test_encoder_layer_compiles(norm_first, dynamic):
    options = {"norm_first": norm_first, "batch_first": True, "dropout": 0.0}
    layer = randomize(TransformerEncoderLayer(DIM, HEADS, HIDDEN, **options))
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x = randn(2, 5, DIM)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    expected = layer(x, src_key_padding_mask=padding)
    out = compiled(x, src_key_padding_mask=padding)
    assert_close("compiled", out, expected, expected.double())
    out.sum().backward()
    assert layer.linear1.weight.grad is not None


def test_encoder_layer_compiles_with_dropout():
    layer = TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.3, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = randn(2, 5, DIM)
    outs = []
    for run in (layer, compiled):
        torch.manual_seed(1)
        outs.append(run(x))
    assert_close("compiled", outs[1], outs[0], outs[0].double())
    outs[1].sum().backward()


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_block_calls_what_replaces_linear(name):
    layer = getattr(layers, name)(DIM, HEADS, HIDDEN, 0.0)
    inputs = [randn(5, 2, DIM)] * (1 if "Encoder" in name else 2)
    before = layer(*inputs)
    layer.linear1.register_forward_hook(lambda module, args, output: output * 0)
    expected = copy.deepcopy(layer)
    nn.init.zeros_(expected.linear1.weight)
    nn.init.zeros_(expected.linear1.bias)
    assert torch.equal(layer(*inputs), expected(*inputs))
    assert not torch.equal(layer(*inputs), before)


STACK_CASES = pairwise(
    norm_first=(False, True),
    batch_first=(False, True),
    norm=(False, True),
    masks=("none", "padding", "causal", "float"),
    hint=(None, True),
)


@pytest.mark.parametrize("case", STACK_CASES, ids=name_of)
def test_encoder_stack_parity(case):
    if case["masks"] != "causal":
        case = {**case, "hint": None}
    mask, padding, _ = torch_masks(case["masks"], 5, 5, BATCH, HEADS)
    x = randn(BATCH, 5, DIM)
    stacks = []
    for module in (layers, nn):
        layer = module.TransformerEncoderLayer(
            DIM, HEADS, HIDDEN, 0.0, norm_first=case["norm_first"], batch_first=case["batch_first"]
        )
        norm = module.LayerNorm(DIM) if case["norm"] else None
        stacks.append(module.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False))
    check_modules(
        stacks[0],
        randomize(stacks[1]),
        {
            "src": x if case["batch_first"] else x.transpose(0, 1),
            "mask": mask,
            "src_key_padding_mask": padding,
        },
        frozen=("mask",),
        is_causal=case["hint"],
    )


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("hint", [None, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_parity(norm_first, hint):
    options = {"dropout": 0.0, "norm_first": norm_first, "batch_first": True}
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    assert torch.equal(layers.Transformer.generate_square_subsequent_mask(4), mask)
    padding = torch.arange(6) >= torch.tensor([[6], [3]])
    check_modules(
        layers.Transformer(DIM, HEADS, 2, 1, HIDDEN, **options),
        randomize(nn.Transformer(DIM, HEADS, 2, 1, HIDDEN, **options)),
        {
            "src": randn(2, 6, DIM),
            "tgt": randn(2, 4, DIM, seed=1),
            "tgt_mask": mask,
            "src_key_padding_mask": padding,
            "memory_key_padding_mask": padding,
        },
        frozen=("tgt_mask",),
        tgt_is_causal=hint,
    )


def test_stacks_take_foreign_layers():
    """Our layer in torch.nn's stack, and torch.nn's in ours."""
    x = randn(2, 5, DIM)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    theirs = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, batch_first=True).eval()
    ours = TransformerEncoderLayer(DIM, HEADS, HIDDEN, batch_first=True).eval()
    ours.load_state_dict(theirs.state_dict())
    expected = nn.TransformerEncoder(theirs, 2, enable_nested_tensor=False)(
        x, src_key_padding_mask=padding
    )
    for stack, layer in ((nn.TransformerEncoder, ours), (layers.TransformerEncoder, theirs)):
        out = stack(layer, 2, enable_nested_tensor=False)(x, src_key_padding_mask=padding)
        assert_close("stack", out, expected, expected.double())


def test_transformer_takes_custom_parts():
    encoder, decoder = nn.Identity(), nn.Identity()
    model = layers.Transformer(DIM, HEADS, custom_encoder=encoder, custom_decoder=decoder)
    assert model.encoder is encoder and model.decoder is decoder


def test_stack_errors():
    layer = TransformerEncoderLayer(DIM, HEADS, HIDDEN)
    message = "TransformerEncoder: num_layers must be a positive integer, got 0"
    with pytest.raises(ValueError, match=re.escape(message)):
        layers.TransformerEncoder(layer, 0)
    model = layers.Transformer(DIM, HEADS, 1, 1, HIDDEN)
    with pytest.raises(ValueError, match="Transformer: src must have width 12, got 8"):
        model(randn(5, 2, 8), randn(5, 2, DIM))
    message = "Transformer: tgt must have src's batch size 2, got 3"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(randn(5, 2, DIM), randn(5, 3, DIM))


def test_block_errors():
    message = "TransformerEncoderLayer: activation must be one of 'gelu', 'gelu_tanh', 'relu'"
    with pytest.raises(ValueError, match=re.escape(message)):
        TransformerEncoderLayer(DIM, HEADS, HIDDEN, activation="swish")
    message = "MultiheadAttention: query must be a dense tensor, got a nested tensor"
    nested = torch.nested.nested_tensor([torch.zeros(3, DIM)], layout=torch.jagged)
    layer = TransformerEncoderLayer(DIM, HEADS, HIDDEN, batch_first=True)
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        layer(nested)
