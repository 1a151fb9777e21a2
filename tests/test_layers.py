"""Norm and feed-forward layers against torch.nn's, and what holds for every layer."""

import copy
import pickle
import re
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from parity import check_modules, randomize
from torch import nn

from fastlm import layers
from fastlm.layers.ffn import activation_name
from fastlm.reference import ffn as reference
from fastlm.testing import assert_close, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMPLS = ["torch", "triton"]

# Layer, positional arguments, options: what torch.nn has under the same name.
LAYERS = {
    "LayerNorm": ((12,), {}),
    "LayerNorm_no_bias": ((12,), {"bias": False}),
    "LayerNorm_2d": (([3, 4],), {"eps": 1e-3}),
    "LayerNorm_plain": ((12,), {"elementwise_affine": False}),
    "RMSNorm": ((12,), {}),
    "RMSNorm_2d": (((3, 4), 1e-3), {}),
    "MultiheadAttention": ((12, 3), {}),
    "MultiheadAttention_no_bias": ((12, 3), {"bias": False, "add_bias_kv": True}),
    "MultiheadAttention_widths": ((12, 3), {"kdim": 5, "vdim": 7, "add_zero_attn": True}),
    "TransformerEncoderLayer": ((12, 3, 20), {}),
    "TransformerEncoderLayer_no_bias": ((12, 3, 20), {"bias": False, "norm_first": True}),
    "TransformerDecoderLayer": ((12, 3, 20), {}),
    "Transformer": ((12, 2, 2, 2, 20), {"batch_first": True}),
}


def build(module, case, **options):
    args, kwargs = LAYERS[case]
    return getattr(module, case.split("_")[0])(*args, **kwargs, **options)


@pytest.mark.parametrize("case", LAYERS)
def test_layer_state_dict_is_torchs(case):
    torch.manual_seed(3)
    theirs = build(nn, case)
    torch.manual_seed(3)
    ours = build(layers, case)
    expected, state = theirs.state_dict(), ours.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), f"{name} is initialised differently"
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    fresh = build(nn, case)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


@pytest.mark.parametrize("case", LAYERS)
def test_layer_device_and_dtype(case):
    layer = build(layers, case, device="meta", dtype=torch.float64)
    for parameter in layer.parameters():
        assert parameter.is_meta and parameter.dtype == torch.float64


@pytest.mark.parametrize("case", LAYERS)
def test_layer_copies(case):
    layer = build(layers, case, impl="torch")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer) and other.state_dict().keys() == layer.state_dict().keys()
        assert all(module.impl == "torch" for module in other.modules() if hasattr(module, "impl"))


def test_layer_isinstance_of_torch():
    # Weight-decay groups and sharding policies ask for these classes.
    assert isinstance(layers.LayerNorm(4), nn.LayerNorm)
    assert isinstance(layers.RMSNorm(4), nn.RMSNorm)
    assert isinstance(layers.MultiheadAttention(4, 2), nn.MultiheadAttention)


@pytest.mark.parametrize("impl", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", ["LayerNorm", "LayerNorm_no_bias", "LayerNorm_2d", "LayerNorm_plain"]
)
def test_layer_norm_parity(case, dtype, impl):
    x = {"input": randn(2, 5, 3, 4) if "2d" in case else randn(2, 5, 12)}
    check_modules(build(layers, case, impl=impl), randomize(build(nn, case)), x, dtype=dtype)


@pytest.mark.parametrize("impl", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["RMSNorm", "RMSNorm_2d"])
def test_rms_norm_parity(case, dtype, impl):
    x = {"x": randn(2, 5, 3, 4) if "2d" in case else randn(2, 5, 12)}
    check_modules(build(layers, case, impl=impl), randomize(build(nn, case)), x, dtype=dtype)


def test_rms_norm_default_eps():
    x = randn(2, 8, scale=1e-5)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        ours, theirs = layers.RMSNorm(8, dtype=dtype), nn.RMSNorm(8, dtype=dtype)
        assert torch.equal(ours(x.to(dtype)), theirs(x.to(dtype)))


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norm_residual_and_prenorm(name, shape):
    norm = randomize(getattr(layers, name)(shape, eps=1e-5))
    x, residual = randn(2, 5, *shape), randn(2, 5, *shape, seed=1)
    y, z = norm(x, residual, prenorm=True)
    assert torch.equal(z, residual + x) and torch.equal(y, norm(z))
    assert y.shape == z.shape == x.shape
    dropped = norm(x, residual, dropout_p=0.5, seed=7, prenorm=True)[1]
    mask = dropped == residual
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(dropped, torch.where(mask, residual, residual + 2 * x))


def test_norm_errors():
    norm = layers.LayerNorm((3, 4))
    message = "LayerNorm: input must have shape (*, 3, 4), got (2, 4, 3)"
    with pytest.raises(ValueError, match=re.escape(message)):
        norm(torch.zeros(2, 4, 3))
    message = "RMSNorm: input must be a tensor, got list"
    with pytest.raises(TypeError, match=re.escape(message)):
        layers.RMSNorm(3)([1.0, 2.0, 3.0])
    nested = torch.nested.nested_tensor([torch.zeros(2, 4)], layout=torch.jagged)
    message = "LayerNorm: input must be a dense tensor, got a nested tensor"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        layers.LayerNorm(4)(nested)


class _TorchFeedForward(nn.Module):
    def __init__(self, dim, hidden, bias, activation):
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden, bias)
        self.linear2 = nn.Linear(hidden, dim, bias)
        self.activation = activation

    def forward(self, x):
        return self.linear2(self.activation(self.linear1(x)))


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "relu2": lambda x: F.relu(x) ** 2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("impl", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_parity(activation, bias, impl):
    ours = layers.FeedForward(8, 20, activation=activation, bias=bias, impl=impl)
    theirs = randomize(_TorchFeedForward(8, 20, bias, ACTIVATIONS[activation]))
    check_modules(ours, theirs, {"x": randn(2, 5, 8)})


@pytest.mark.parametrize("impl", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_feed_forward_parity(activation, impl):
    class Torch(layers.GatedFeedForward):
        def forward(self, x):
            return self.down_proj(ACTIVATIONS[activation](self.gate_proj(x)) * self.up_proj(x))

    ours = layers.GatedFeedForward(8, 20, activation, impl=impl)
    check_modules(ours, randomize(Torch(8, 20)), {"x": randn(2, 5, 8)})


@pytest.mark.parametrize("recompute", [False, True])
def test_feed_forward_recompute_is_bitwise_equal(recompute):
    torch.manual_seed(0)
    layer = layers.FeedForward(8, 20, 0.3, recompute=recompute)
    gated = layers.GatedFeedForward(8, 20, recompute=recompute)
    plain, gated_plain = copy.deepcopy(layer), copy.deepcopy(gated)
    plain.recompute = gated_plain.recompute = False
    for a, b in ((layer, plain), (gated, gated_plain)):
        grads = []
        for module in (a, b):
            torch.manual_seed(1)
            module(randn(2, 5, 8)).square().sum().backward()
            grads.append([p.grad for p in module.parameters()])
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


def test_feed_forward_dropout_replays_the_seed():
    torch.manual_seed(0)
    layer = layers.FeedForward(8, 20, 0.4, "relu")
    x = randn(2, 5, 8)
    torch.manual_seed(5)
    out = layer(x)
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    weights = (layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias)
    expected = reference.ffn(x, *weights, activation="relu", dropout_p=0.4, seed=seed)
    assert torch.equal(out, expected)
    assert not torch.equal(layer(x), out)
    layer.eval()
    assert torch.equal(layer(x), reference.ffn(x, *weights, activation="relu"))


def test_feed_forward_unknown_activation_runs():
    layer = layers.FeedForward(8, 20, activation=torch.tanh)
    x = randn(2, 8)
    assert torch.equal(layer(x), layer.linear2(torch.tanh(layer.linear1(x))))


@pytest.mark.parametrize("where", ["linear1", "linear2"])
def test_feed_forward_calls_what_replaces_linear(where):
    """An adapter in the place of a Linear, or a hook on it, must not be bypassed."""

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    x = randn(2, 8)
    layer = layers.FeedForward(8, 20, activation="silu")
    expected = layer.linear2(F.silu(layer.linear1(x) * (1 + (where == "linear1"))))
    expected = expected * (1 + (where == "linear2"))
    linear = getattr(layer, where)
    adapter = Adapter(linear.in_features, linear.out_features)
    adapter.load_state_dict(linear.state_dict())
    setattr(layer, where, adapter)
    assert_close("adapter", layer(x), expected, expected.double())
    setattr(layer, where, linear)
    linear.register_forward_hook(lambda module, inputs, output: output * 2)
    assert_close("hook", layer(x), expected, expected.double())


def test_gated_feed_forward_calls_what_replaces_linear():
    layer = layers.GatedFeedForward(8, 20)
    x = randn(2, 8)
    expected = layer(x)
    layer.down_proj.register_forward_hook(lambda module, inputs, output: output * 2)
    assert_close("hook", layer(x), expected * 2, expected.double() * 2)


def children_to_call(name):
    """A layer, its inputs, and its children that torch.nn's layer of that name calls."""
    x = randn(5, 2, 12)
    if name == "FeedForward":
        return layers.FeedForward(12, 20, 0.5), (x,), ("linear1", "linear2", "dropout")
    if name == "GatedFeedForward":
        return layers.GatedFeedForward(12, 20), (x,), ("gate_proj", "up_proj", "down_proj")
    base, _, first = name.partition("_")
    layer = getattr(layers, base)(12, 3, 20, 0.5, norm_first=first == "first")
    inputs = (x,) if "Encoder" in base else (x, x)
    return layer, inputs, [n for n, m in layer.named_children() if "attn" not in n]


BLOCKS = ("TransformerEncoderLayer", "TransformerEncoderLayer_first", "TransformerDecoderLayer",
          "TransformerDecoderLayer_first")  # fmt: skip


@pytest.mark.parametrize("name", ["FeedForward", "GatedFeedForward", *BLOCKS])
def test_layers_call_children_with_a_forward_of_their_own(name):
    """As offloading sets it, on the instance."""
    layer, inputs, children = children_to_call(name)
    for child in children:
        module = getattr(layer, child)
        module.forward = Mock(side_effect=module.forward)
        layer(*inputs)
        assert module.forward.call_count == 1, child
        del module.forward


@pytest.mark.parametrize("name", ["FeedForward", "GatedFeedForward", *BLOCKS])
def test_layers_call_what_hooks_of_all_modules_watch(name):
    layer, inputs, children = children_to_call(name)
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        hook = Mock(return_value=None)
        handle = register(hook)
        try:
            layer(*inputs)
        finally:
            handle.remove()
        seen = {call.args[0] for call in hook.call_args_list}
        assert {getattr(layer, child) for child in children} <= seen


def test_layers_call_dropouts_of_other_kinds():
    class Never(nn.Dropout):
        def forward(self, x):
            return 0 * x

    x = randn(2, 8)
    layer = layers.FeedForward(8, 20, dropout=0.5)
    for other in (nn.AlphaDropout(0.5), Never(0.5)):
        layer.dropout = other
        torch.manual_seed(0)
        actual = layer(x)
        torch.manual_seed(0)
        expected = layer.linear2(other(F.gelu(layer.linear1(x))))
        assert_close("dropout", actual, expected, expected.double())
    block = layers.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    block.dropout1 = block.dropout2 = nn.Dropout(1.0)
    expected = block(x[None])
    block.dropout1 = block.dropout2 = Never(0.0)
    assert_close("block", block(x[None]), expected, expected.double())


def test_activation_names():
    assert activation_name(nn.GELU()) == "gelu"
    assert activation_name(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_name(nn.ReLU()) == "relu" and activation_name(F.silu) == "silu"
    assert activation_name(nn.ReLU6()) is None and activation_name(torch.relu_) is None
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    assert activation_name(hooked) is None


def test_feed_forward_errors():
    message = (
        "FeedForward: activation must be one of 'gelu', 'gelu_tanh', 'relu', 'relu2', 'silu', "
        "'quick_gelu', got 'swish'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        layers.FeedForward(8, 20, activation="swish")
    message = "FeedForward: activation must be a name or a callable, got int"
    with pytest.raises(TypeError, match=re.escape(message)):
        layers.FeedForward(8, 20, activation=3)
