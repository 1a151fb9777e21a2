"""One small call of every operator, for `fastlm doctor` to explain."""

from __future__ import annotations

from collections.abc import Callable

import torch

Call = tuple[tuple, dict]  # positional and keyword arguments


def sample_calls(device: torch.device) -> dict[str, Callable[[], Call]]:
    """By operator name, a function that makes the arguments of a call in bf16 on `device`."""
    rand = lambda *shape: torch.zeros(shape, device=device, dtype=torch.bfloat16)
    ints = lambda *values: torch.tensor(values, device=device, dtype=torch.int32)
    ids = torch.zeros(2, 16, device=device, dtype=torch.int64)
    qkv = lambda: (rand(2, 16, 4, 64), rand(2, 16, 4, 64), rand(2, 16, 4, 64))
    packed = lambda: (rand(16, 4, 64), rand(16, 4, 64), rand(16, 4, 64))
    lse = lambda: torch.zeros(2, 4, 16, device=device)
    weights = lambda: (rand(256, 64), rand(256), rand(64, 256), rand(64))
    transform = lambda: (rand(8, 64), rand(8), rand(8), rand(8))
    gated = lambda: (rand(256, 64), rand(256, 64), rand(64, 256))
    return {
        "attention": lambda: (qkv(), {"causal": True}),
        "attention_decode": lambda: (
            (rand(2, 1, 4, 64), rand(2, 16, 4, 64), rand(2, 16, 4, 64), ints(8, 8)), {}),
        "attention_varlen": lambda: ((*packed(), ints(0, 16), ints(0, 16), 16, 16), {}),
        "attention_weights": lambda: ((*qkv()[:2], lse()), {}),
        "bias_act": lambda: ((rand(32, 64), rand(64)), {"activation": "gelu"}),
        "cross_entropy": lambda: ((rand(32, 256), ids.flatten()), {}),
        "embedding": lambda: ((ids, rand(256, 64)), {}),
        "ffn": lambda: ((rand(32, 64), *weights()), {"activation": "gelu"}),
        "gated_ffn": lambda: ((rand(32, 64), *gated()), {}),
        "glu": lambda: ((rand(32, 256), rand(32, 256)), {}),
        "layer_norm": lambda: ((rand(32, 64), rand(64), rand(64)), {}),
        "linear_cross_entropy": lambda: ((rand(32, 64), rand(256, 64), ids.flatten()), {}),
        "masked_lm_loss": lambda: ((rand(32, 64), ids.flatten(), *transform(), rand(256, 8)), {}),
        "next_sentence_loss": lambda: ((rand(2, 64), ids[:, 0], rand(2, 64), rand(2)), {}),
        "rms_norm": lambda: ((rand(32, 64), rand(64)), {}),
        "rotary": lambda: ((rand(2, 16, 4, 64), rand(16, 32), rand(16, 32)), {}),
        "scaled_dot_product_attention": lambda: (qkv(), {"is_causal": True}),
    }  # fmt: skip
