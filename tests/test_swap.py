"""swap, unswap, verify and the SDPA route, on torch.nn's modules and on blocks defined here."""

import contextlib
import copy
import io
import pickle
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from parity import check_modules, randomize
from swap_models import (
    DIM,
    HEADS,
    HIDDEN,
    PAD,
    Model,
    TinyDenseActDense,
    TinyGatedMLP,
    TinyIntermediate,
    TinyMLP,
    TinyOutput,
    TinyRMSNorm,
    decoder_layer,
    encoder_layer,
    raises,
    x_of,
)
from torch import nn
from torch.nn.utils import parametrize, prune

import fastlm
from fastlm import layers
from fastlm.swap import activate_sdpa, swap, unswap, verify
from fastlm.swap.fused import Fused

SEQUENCE = {"src": x_of()}
PADDED = {"src": x_of(), "src_key_padding_mask": PAD}
TWO = {"tgt": x_of(4, seed=1), "memory": x_of()}
PADDED_TWO = {**TWO, "memory_key_padding_mask": PAD}
MODULES = {
    "layer_norm": (lambda: nn.LayerNorm(DIM), {"input": x_of()}),
    "layer_norm_two_dims": (lambda: nn.LayerNorm((5, DIM)), {"input": x_of()}),
    "layer_norm_plain": (lambda: nn.LayerNorm(DIM, elementwise_affine=False), {"input": x_of()}),
    "rms_norm": (lambda: nn.RMSNorm(DIM), {"x": x_of()}),
    "attention": (
        lambda: nn.MultiheadAttention(DIM, HEADS, batch_first=True),
        {"query": x_of(4, seed=1), "key": x_of(), "value": x_of(), "key_padding_mask": PAD},
    ),
    "encoder_layer": (encoder_layer, PADDED),
    "encoder_layer_prenorm": (lambda: encoder_layer(norm_first=True, activation="gelu"), SEQUENCE),
    "decoder_layer": (decoder_layer, PADDED_TWO),
    "encoder": (
        lambda: nn.TransformerEncoder(encoder_layer(activation="gelu"), 2, nn.LayerNorm(DIM)),
        PADDED,
    ),
    "decoder": (lambda: nn.TransformerDecoder(decoder_layer(norm_first=True), 2), PADDED_TWO),
    "transformer": (
        lambda: nn.Transformer(DIM, HEADS, 1, 1, HIDDEN, dropout=0.0, batch_first=True),
        {"src": x_of(), "tgt": x_of(4, seed=1), "src_key_padding_mask": PAD},
    ),
    "intermediate": (TinyIntermediate, {"x": x_of()}),
    "output": (TinyOutput, {"x": x_of(), "y": x_of(seed=1)}),
    "mlp": (TinyMLP, {"x": x_of()}),
    "gated_mlp": (TinyGatedMLP, {"x": x_of()}),
    "gated_mlp_bias": (lambda: TinyGatedMLP(bias=True), {"x": x_of()}),
    "rms_llama": (TinyRMSNorm, {"x": x_of()}),
    "rms_t5": (lambda: TinyRMSNorm("t5"), {"x": x_of()}),
    "t5": (TinyDenseActDense, {"x": x_of()}),
    "rms_gemma": (lambda: TinyRMSNorm("gemma"), {"x": x_of()}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_swap_matches(name, dtype):
    build, inputs = MODULES[name]
    reference = randomize(build())
    module = copy.deepcopy(reference)
    swap(module, strict=True)
    check_modules(Positional(module), Positional(reference), inputs, dtype=dtype)


class Positional(nn.Module):
    """Passes the first inputs by position, as models do, and masks by name."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        masks = {name: inputs.pop(name) for name in list(inputs) if name.endswith("mask")}
        return self.module(*inputs.values(), **masks)


def test_swap_keeps_the_modules_and_what_they_hold():
    model = Model()
    model.shrink.weight.requires_grad_(False)
    model.output.norm.eval()
    calls = []
    model.output.register_forward_hook(lambda *_: calls.append("output"))
    model.encoder.layers[1].register_forward_pre_hook(lambda *_: calls.append("layer"))
    modules, state = dict(model.named_modules()), model.state_dict(keep_vars=True)
    flags = {name: (m.training, type(m)) for name, m in modules.items()}
    report = swap(model, strict=True)
    assert dict(model.named_modules()) == modules
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[name] is state[name] for name in state)
    assert not model.shrink.weight.requires_grad
    for name, (training, cls) in flags.items():
        assert modules[name].training == training and isinstance(modules[name], cls)
    model(x_of())
    assert calls == ["layer", "output"]
    assert {row.name for row in report.replaced} >= {"encoder.layers.1", "intermediate", "head.0"}
    unswap(model)
    assert {name: type(m) for name, m in modules.items()} == {n: c for n, (_, c) in flags.items()}
    assert dict(model.named_modules()) == modules


def test_unswap_is_bitwise():
    model = Model()
    before, attributes = model(x_of(), PAD), [set(vars(m)) for m in model.modules()]
    swap(model)
    model(x_of(), PAD).sum().backward()
    unswap(model)
    assert torch.equal(model(x_of(), PAD), before)
    assert [set(vars(m)) for m in model.modules()] == attributes
    unswap(model)  # of what is not swapped: nothing


def test_swap_is_idempotent():
    model = Model()
    first = swap(model)
    classes, out = [type(m) for m in model.modules()], model(x_of())
    assert swap(model, strict=True) == first
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x_of()), out)


def test_native_layers_stay():
    model = nn.Sequential(layers.LayerNorm(DIM), nn.LayerNorm(DIM))
    assert [row.name for row in swap(model).rows] == ["1"]
    unswap(model)
    assert type(model[0]) is layers.LayerNorm and type(model[1]) is nn.LayerNorm


@pytest.mark.parametrize(
    "only", ["norm", ["ffn"], ["attention"], ["layer"], ["norm", "*layers.0*"]]
)
def test_only(only):
    model = Model()
    report = swap(model, only=only)
    kinds = {row.kind for row in report.rows}
    names = {row.name for row in report.rows}
    if "layer" in only:  # a fused layer needs its norms
        assert kinds == {"layer", "norm"} and "output.norm" not in names
        assert "encoder" in names and "encoder.layers.0.norm1" in names
    elif len(only) == 2:
        assert names == {"encoder.layers.0.norm1", "encoder.layers.0.norm2"}
    else:
        assert kinds == {only if isinstance(only, str) else only[0]}
    randomize(model)
    assert verify(model, x_of()).passed


def test_only_names_everything():
    report = swap(Model(), only=("attention", "ffn", "norm"))
    assert {row.kind for row in report.rows} == {"attention", "ffn", "layer", "norm"}


def test_report_prints_as_a_table():
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4), TinyIntermediate(F.mish))
    text = str(swap(model))
    assert text.splitlines() == [
        "module  class             kind  count  runs                     left because",
        "------  ----------------  ----  -----  -----------------------  " + "-" * 32,
        "*       LayerNorm         norm  2      fastlm.layers.LayerNorm",
        "*       TinyIntermediate  ffn   1                               "
        "no fused form of mish(linear(x))",
        "2 modules replaced, 1 left",
    ]


def test_swap_errors():
    with raises(TypeError, "swap: model must be a torch.nn.Module, got int"):
        swap(1)
    nothing = "swap: model must have at least one module with a counterpart in fastlm, got none"
    with raises(ValueError, nothing):
        swap(nn.Linear(2, 2))
    left = "the model: no fused form of mish(linear(x))"
    with raises(ValueError, f"{nothing} ({left})"):
        swap(TinyIntermediate(F.mish))
    model = nn.Sequential(nn.LayerNorm(4), TinyIntermediate(F.mish))
    message = "swap: model must have counterparts for everything with strict=True, got "
    with raises(ValueError, f"{message}1: no fused form of mish(linear(x))"):
        swap(model, strict=True)
    assert type(model[0]) is nn.LayerNorm
    kinds = "'attention', 'ffn', 'layer', 'norm'"
    with raises(ValueError, f"swap: only must be {kinds} or match a module's name, got 'norms'"):
        swap(model, only="norms")
    with raises(TypeError, "swap: only must have strings, got int"):
        swap(model, only=[1])


class OwnNorm(nn.LayerNorm):
    def forward(self, input):
        return input


class SameNorm(nn.LayerNorm):
    def __init__(self, dim):
        super().__init__(dim, eps=1e-3)


class OwnSublayer(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return x


def own_forward():
    norm = nn.LayerNorm(DIM)
    norm.forward = lambda x: x
    return norm


def parametrized():
    norm = nn.LayerNorm(DIM)
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


def with_rms_norm():
    layer = encoder_layer()
    layer.norm1 = nn.RMSNorm(DIM)
    return layer


def with_adapter():
    block = TinyIntermediate()
    block.dense = nn.Sequential(block.dense)
    return block


def hooked():
    block = TinyIntermediate()
    block.dense.register_forward_hook(lambda *_: None)
    return block


class Branching(nn.Module):
    def forward(self, x):
        return self.dense(x) if self.training else x

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(DIM, DIM)


class BranchingOutput(Branching):
    pass


class StatefulOutput(Branching):
    def forward(self, x):
        self.seen = x
        return self.dense(x)


LEFT = {
    "own_norm": (lambda: OwnNorm(DIM), "OwnNorm overrides forward"),
    "own_sublayer": (
        lambda: OwnSublayer(DIM, HEADS, HIDDEN),
        "OwnSublayer overrides _ff_block",
    ),
    "own_forward": (own_forward, "its forward was set on the instance"),
    "parametrized": (parametrized, "it is parametrized"),
    "with_rms_norm": (with_rms_norm, "norm1 is not a plain torch.nn.LayerNorm"),
    "hooked": (hooked, "dense has hooks or a forward of its own"),
    "unknown_activation": (
        lambda: TinyIntermediate(nn.PReLU()),
        "no fused form of PReLU(linear(x))",
    ),
    "branching": (BranchingOutput, "its forward is not a chain of its children"),
    "stateful": (StatefulOutput, "its forward is not a chain of its children"),
    "other_rms_norm": (
        lambda: TinyRMSNorm("square"),
        "its numbers are those of no casting of fastlm.rms_norm",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_with_the_reason(name):
    build, reason = LEFT[name]
    model = nn.Sequential(build(), nn.RMSNorm(DIM))
    kind = type(model[0])
    (row,) = [row for row in swap(model).rows if row.name == "0"]
    assert (row.replaced, row.note, row.cls) == (False, reason, kind.__name__)
    assert type(model[0]) is kind


def test_subclasses_that_change_nothing_are_taken():
    norm = SameNorm(DIM)
    before = norm(x_of())
    swap(norm)
    assert isinstance(norm, (SameNorm, layers.LayerNorm)) and norm.eps == 1e-3
    assert torch.equal(norm(x_of()), before)


def test_adapters_keep_the_block_as_it_is():
    model = nn.Sequential(with_adapter(), nn.LayerNorm(HIDDEN))
    swap(model)
    assert type(model[0]) is TinyIntermediate


@pytest.mark.parametrize(
    "change", ["hook", "pre_hook", "adapter", "forward", "parametrize", "prune"]
)
def test_changes_after_the_swap_are_seen(change):
    """What is done to a child later (hooks, adapters, offloading) takes effect, as without swap."""
    block, calls = TinyOutput(), []
    reference = copy.deepcopy(block)
    swap(block)
    for module in (block, reference):
        if change == "hook":
            module.dense.register_forward_hook(lambda m, a, y: calls.append(1) or 2 * y)
        elif change == "pre_hook":
            module.norm.register_forward_pre_hook(lambda m, a: (2 * a[0],))
        elif change == "adapter":
            module.dense = nn.Sequential(module.dense, nn.Tanh())
        elif change == "forward":
            module.drop.forward = lambda x: 3 * x
        elif change == "parametrize":
            parametrize.register_parametrization(module.dense, "weight", nn.Tanh())
        else:
            prune.random_unstructured(module.dense, "weight", 5)
    if change == "prune":
        block.dense.weight_mask.copy_(reference.dense.weight_mask)
    x, y = x_of(), x_of(seed=1)
    torch.testing.assert_close(block(x, y), reference(x, y))
    assert len(calls) == 2 * (change == "hook")


def test_hooks_on_norms_of_a_layer_are_called():
    layer, seen = encoder_layer(), []
    reference = copy.deepcopy(layer)
    swap(layer)
    for module in (layer, reference):
        module.norm1.register_forward_hook(lambda m, args, y: seen.append(args))
    torch.testing.assert_close(layer(x_of()), reference(x_of()))
    assert [len(args) for args in seen] == [1, 1]  # the sum, as torch passes it
    torch.testing.assert_close(seen[0][0], seen[1][0])


@pytest.mark.parametrize("name", ["linear1", "linear2", "dropout", "dropout1", "norm1", "norm2"])
def test_forwards_set_on_children_of_a_layer_are_called(name):
    """As offloading sets them, after the swap and before it."""
    for swaps_first in (True, False):
        layer = encoder_layer()
        if swaps_first:
            swap(layer)
        child = getattr(layer, name)
        child.forward = Mock(side_effect=child.forward)
        if not swaps_first:
            swap(layer)
        layer(x_of())
        assert child.forward.call_count == 1


@pytest.mark.parametrize("training", [True, False])
def test_dropout_follows_the_child(training):
    block = TinyOutput(p=0.5)
    block.drop.train(training)
    swap(block)
    x, y = x_of(), x_of(seed=1)
    torch.manual_seed(3)
    out = block(x, y)
    torch.manual_seed(3)
    want = fastlm.layer_norm(
        block.dense(x), block.norm.weight, block.norm.bias, residual=y,
        dropout_p=0.5 if training else 0.0,
    )  # fmt: skip
    assert torch.equal(out, want)
    assert torch.equal(block(x, y), out) == (not training)


def test_autocast_gives_torchs_dtypes(device):
    model = nn.Sequential(TinyMLP(), nn.LayerNorm(DIM)).to(device)
    block, x = TinyOutput().to(device), x_of().to(device)
    with torch.autocast(device, torch.bfloat16):
        before = model(x), block(x, x), block(x, x.bfloat16())
        swap(model)
        swap(block)
        after = model(x), block(x, x), block(x, x.bfloat16())
    assert [y.dtype for y in after] == [y.dtype for y in before]


def test_a_wider_residual_gives_torchs_dtype():
    block, x = TinyOutput(), x_of()
    block.dense.bfloat16()
    before = block(x.bfloat16(), x)
    swap(block)
    after = block(x.bfloat16(), x)
    assert after.dtype == before.dtype == torch.float32
    torch.testing.assert_close(after, before)


def test_mixed_dtypes_give_what_the_module_gave():
    block, norm = TinyDenseActDense(), randomize(TinyRMSNorm("t5"))
    block.wi.bfloat16()
    x = x_of().bfloat16()
    before = block(x), norm(x)
    swap(block, strict=True)
    swap(norm, strict=True)
    for after, want in zip((block(x), norm(x)), before, strict=True):
        assert after.dtype == want.dtype and torch.equal(after, want)


def test_copies_and_pickles_stay_swapped():
    model = Model()
    swap(model)
    out = model(x_of())
    buffer = io.BytesIO(pickle.dumps(model))
    for other in (copy.deepcopy(model), pickle.load(buffer)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(x_of()), out)
        unswap(other)
        assert type(other.output) is TinyOutput
    assert isinstance(model.output, Fused)


def test_unswap_refuses_what_was_wrapped_since():
    model = nn.Sequential(nn.LayerNorm(DIM))
    swap(model)
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    with pytest.raises(RuntimeError, match="^unswap: 0 must have the class that swap gave it, got"):
        unswap(model)
    parametrize.remove_parametrizations(model[0], "weight")
    unswap(model)
    assert type(model[0]) is nn.LayerNorm


def test_padding_gives_one_shape_in_every_mode():
    """torch's encoder drops trailing padding in evaluation; the swapped one never does."""
    encoder = nn.TransformerEncoder(encoder_layer(), 2)
    short = torch.tensor([[False] * 3 + [True] * 2] * 3)
    swap(encoder)
    out = encoder(x_of(), src_key_padding_mask=short)
    encoder.eval()
    with torch.no_grad():
        assert torch.equal(encoder(x_of(), src_key_padding_mask=short), out)


@pytest.mark.parametrize("route", [contextlib.nullcontext, activate_sdpa])
def test_compiles_in_one_graph(route):
    model = Model()
    swap(model)
    with route():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x_of(), PAD), model(x_of(), PAD))


def test_no_attribute_of_another_package_is_assigned():
    def snapshot():
        found = {}
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "torch":
                found[name] = {key: id(value) for key, value in vars(module).items()}
        for cls in (nn.Module, nn.LayerNorm, nn.MultiheadAttention, nn.TransformerEncoderLayer):
            found[cls] = {key: id(value) for key, value in vars(cls).items()}
        return found

    use = lambda model: verify(model, x_of())
    use(Model())  # whatever torch imports lazily
    before = snapshot()
    model = Model()
    swap(model)
    use(model)
    with activate_sdpa():
        model(x_of())
        assert snapshot() == before
    unswap(model)
    assert snapshot() == before
