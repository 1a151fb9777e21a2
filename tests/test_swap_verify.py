"""How swap reads a module: its formula, its activation, its norm's casting; and verify."""

import pytest
import torch
import torch.nn.functional as F
from parity import randomize
from swap_models import (
    DIM,
    PAD,
    Model,
    TinyGatedMLP,
    TinyIntermediate,
    TinyMLP,
    TinyOutput,
    TinyRMSNorm,
    raises,
    x_of,
)
from torch import nn

from fastlm.swap import structure, swap, verify


@pytest.mark.parametrize(
    ("module", "text", "children"),
    [
        (TinyIntermediate(), "act(linear(x))", ("act", "dense")),
        (TinyOutput(), "norm(dropout(linear(x)) + y)", ("norm", "drop", "dense")),
        (
            TinyMLP(),
            "dropout(linear(dropout(act(linear(x)))))",
            ("drop", "down", "drop", "act", "up"),
        ),
        (TinyGatedMLP(), "linear(act(linear(x)) * linear(x))", ("down", "act", "gate", "up")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_formula(module, text, children):
    found = structure.formula(module)
    assert (found.text, found.children) == (text, children)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.gelu, "gelu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))), "gelu_tanh"),
        (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
        (torch.relu, "relu"),
        (lambda x: torch.relu(x) ** 2, "relu2"),
        (nn.SiLU(), "silu"),
        (lambda x: torch.clip(F.gelu(x), -10, 10), None),
        (nn.LeakyReLU(), None),
        (nn.Mish(), None),
        (nn.PReLU(init=0.0), None),  # relu until it is trained
        (nn.Dropout(0.0), None),
        (nn.Softmax(-1), None),
        (torch.float64, None),
        (lambda x: 1 / 0, None),
    ],
)
def test_activations_are_told_apart_by_their_values(function, name):
    assert structure.activation_name(function) == name


@pytest.mark.parametrize("dim", [4, 64, 700])
@pytest.mark.parametrize("casting", ["llama", "gemma", "torch"])
def test_castings_are_told_apart_by_their_values(casting, dim):
    assert structure.rms_casting(TinyRMSNorm(casting, dim), 1e-6) == casting
    assert structure.rms_casting(TinyRMSNorm(casting, dim), 1e-2) is None


def test_verify_reports_and_leaves_everything_as_it_was():
    model = randomize(Model()).train()
    model.head.eval()
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    report = verify(model, {"x": x_of(), "padding": PAD})
    assert report.passed and report.first_failure is None
    assert [row.name for row in report.outputs] == ["output"]
    trained = [f"grad of {name}" for name, p in model.named_parameters() if p.requires_grad]
    assert [row.name for row in report.gradients] == trained
    assert [row.name for row in report.modules] == ["encoder", "intermediate", "output", "head.0"]
    assert str(report).endswith("every output and gradient is within its bound")
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert type(model.output) is TinyOutput


def test_verify_of_a_swapped_model_leaves_it_swapped():
    model = randomize(Model())
    swap(model, only=["ffn"])
    classes = [type(m) for m in model.modules()]
    report = verify(model, (x_of(), PAD))
    assert report.passed and [row.name for row in report.modules] == ["intermediate"]
    assert [type(m) for m in model.modules()] == classes


def test_verify_names_the_first_module_that_is_wrong(monkeypatch):
    from fastlm.swap import fused

    right = fused.bias_act
    monkeypatch.setattr(fused, "bias_act", lambda *a, **k: right(*a, **k) * 1.001)
    report = verify(randomize(Model()), x_of())
    assert not report.passed and report.first_failure == "intermediate"
    assert "the first module past it: intermediate" in str(report)


def test_verify_of_inputs_that_require_gradients():
    x = x_of().requires_grad_()
    report = verify(randomize(Model()), x)
    assert report.passed and report.gradients[0].name == "grad of input"
    assert x.grad is None


def test_verify_errors():
    with raises(TypeError, "verify: model must be a torch.nn.Module, got str"):
        verify("model", x_of())
    model = nn.Sequential(nn.LayerNorm(DIM), Rounded())
    message = "verify: model must have a floating-point tensor among its outputs, got none"
    with raises(ValueError, message):
        verify(model, x_of())
    assert type(model[0]) is nn.LayerNorm


class Rounded(nn.Module):
    def forward(self, x):
        return x.long()
