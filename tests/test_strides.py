"""Vectors, tables and weights may have any stride, in every operator: kernels read from them what
they would from a contiguous one. (The layouts of what is normalised, attended to and so on are in
the operators' own tests.)"""

import pytest
import torch

import fastlm
from fastlm.testing import randn, with_layout

TARGET = torch.arange(6) % 5
IDS = torch.arange(6)


# name: operator, the shapes of its floating-point arguments, other arguments, what is laid out.
CASES = {
    "layer_norm": ("layer_norm", {"x": (6, 12), "weight": (12,), "bias": (12,)}, {}),
    "layer_norm_wide": ("layer_norm", {"x": (1, 17000), "weight": (17000,), "bias": (17000,)}, {}),
    "rms_norm": ("rms_norm", {"x": (6, 12), "weight": (12,)}, {}),
    "bias_act": ("bias_act", {"x": (6, 12), "bias": (12,)}, {"activation": "gelu"}),
    "ffn": (
        "ffn",
        {"x": (6, 16), "w1": (24, 16), "b1": (24,), "w2": (16, 24), "b2": (16,)},
        {"activation": "gelu"},
    ),
    "gated_ffn": (
        "gated_ffn", {"x": (6, 16), "w_gate": (24, 16), "w_up": (24, 16), "w_down": (16, 24)}, {},
    ),
    "cross_entropy": (
        "cross_entropy", {"logits": (6, 5), "class_weight": (5,)}, {"target": TARGET},
    ),
    "linear_cross_entropy": (
        "linear_cross_entropy",
        {"x": (6, 8), "weight": (5, 8), "bias": (5,), "class_weight": (5,)},
        {"target": TARGET},
    ),
    "masked_lm_loss": (
        "masked_lm_loss",
        {
            "hidden": (6, 8), "dense_weight": (16, 8), "dense_bias": (16,), "norm_weight": (16,),
            "norm_bias": (16,), "decoder_weight": (5, 16), "decoder_bias": (5,),
        },
        {"labels": TARGET},
    ),
    "embedding": (
        "embedding",
        {
            "token_weight": (6, 8), "position_weight": (6, 8), "type_weight": (6, 8),
            "norm_weight": (8,), "norm_bias": (8,),
        },
        {"ids": IDS, "positions": IDS, "type_ids": IDS},
    ),
    "rotary": ("rotary", {"x": (2, 6, 3, 8), "cos": (6, 4), "sin": (6, 4)}, {}),
    "attention": (
        "attention",
        {"q": (2, 6, 4, 8), "k": (2, 6, 2, 8), "v": (2, 6, 2, 8), "alibi_slopes": (4,),
         "sinks": (4,)},
        {"seqlens_k": torch.tensor([3, 6])},
    ),
}  # fmt: skip
CUDA = ("layer_norm", "layer_norm_wide", "rms_norm", "bias_act", "ffn")
FROZEN = ("class_weight", "alibi_slopes")
CALLS = [(name, "triton") for name in CASES] + [(name, "cuda") for name in CUDA]


@pytest.mark.parametrize(("name", "impl"), CALLS)
@pytest.mark.parametrize("layout", ["last_stride_2", "expanded"])
def test_parameters_of_any_stride(layout, name, impl, device):
    op, shapes, others = CASES[name]
    floats = {
        n: randn(*shape, device=device, seed=i).abs() + 0.1
        for i, (n, shape) in enumerate(shapes.items())
    }
    others = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in others.items()}

    def run(values):
        leaves = {n: t.detach().requires_grad_(n not in FROZEN) for n, t in values.items()}
        y = getattr(fastlm, op)(**leaves, **others, impl=impl)
        wanted = [t for t in leaves.values() if t.requires_grad]
        return y, *torch.autograd.grad(y, wanted, randn(*y.shape, device=device, seed=99))

    changed = [*list(floats)[1:], *(n for n, t in others.items() if isinstance(t, torch.Tensor))]
    for what in changed:
        values = floats if what in floats else others
        kept = values[what]
        plain = (
            kept[:1].repeat(len(kept), *[1] * (kept.dim() - 1)) if layout == "expanded" else kept
        )
        values[what] = plain
        expected = run(floats)
        values[what] = with_layout(plain, layout)
        actual = run(floats)
        values[what] = kept
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, msg=lambda m, what=what: f"{what}: {m}")
