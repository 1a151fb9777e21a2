"""What is measured: for every operator family its cases, with torch beside fastlm's backends.

Work is counted as the field does. Attention: see `fastlm.bench.attention`. Matrix products:
2 * m * n * k forward and twice that backward. Memory-bound operators: the bytes that any
implementation has to move, every tensor of the size of the input counted once for each read or
write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F

from fastlm import shapes
from fastlm.bench.attention import attention_cases
from fastlm.bench.case import Case, Work, make_case
from fastlm.testing import randn


def norm_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """LayerNorm, LayerNorm of a residual sum, RMSNorm."""
    table = shapes.NORM_LARGE if device.type == "cuda" else shapes.NORM_CPU
    for name, s in _first(table, quick):
        rows = lambda seed, s=s: randn(s.rows, s.cols, dtype=dtype, device=device, seed=seed)
        cols = lambda seed, s=s: randn(s.cols, dtype=dtype, device=device, seed=seed)
        moved = s.rows * s.cols * torch.finfo(dtype).bits / 8
        size = f"{s.rows}x{s.cols}"
        layer = {"x": rows(1), "weight": cols(2), "bias": cols(3)}
        yield make_case(
            "norm", f"{name}/layer_norm {size}", "layer_norm", layer, {},
            lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
            Work("GB/s", 2 * moved, 3 * moved),
        )  # fmt: skip
        yield make_case(
            "norm", f"{name}/add_layer_norm {size}", "layer_norm", layer | {"residual": rows(4)},
            {}, lambda x, weight, bias, residual: F.layer_norm(
                residual + x, weight.shape, weight, bias
            ),
            Work("GB/s", 3 * moved, 3 * moved),
        )  # fmt: skip
        if not quick:
            yield make_case(
                "norm", f"{name}/rms_norm {size}", "rms_norm", {"x": rows(1), "weight": cols(2)},
                {"eps": 1e-6}, lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
                Work("GB/s", 2 * moved, 3 * moved),
            )  # fmt: skip


def ffn_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """GELU feed-forward with biases and gated SiLU, as blocks and, without their products, as the
    one kernel that is fastlm's own."""
    table = shapes.FFN_LARGE if device.type == "cuda" else shapes.FFN_CPU
    for name, s in _first(table, quick):
        yield ffn_case(name, s, "gelu", device, dtype)
        if quick:
            continue
        yield gated_case(name, s, "silu", device, dtype)
        hidden = lambda seed, s=s: randn(
            s.rows, s.hidden_dim, dtype=dtype, device=device, seed=seed
        )
        moved = s.rows * s.hidden_dim * dtype.itemsize
        size = f"{s.rows}x{s.hidden_dim}"
        bias = randn(s.hidden_dim, dtype=dtype, device=device, seed=3)
        yield make_case(
            "ffn", f"{name}/bias_gelu {size}", "bias_act",
            {"x": hidden(2), "bias": bias}, {"activation": "gelu"},
            lambda x, bias: F.gelu(x + bias),
            Work("GB/s", 2 * moved, 3 * moved),
        )  # fmt: skip
        yield make_case(
            "ffn", f"{name}/silu_glu {size}", "glu", {"gate": hidden(2), "up": hidden(3)},
            {"activation": "silu"}, lambda gate, up: F.silu(gate) * up,
            Work("GB/s", 3 * moved, 5 * moved),
        )  # fmt: skip


def ffn_case(
    name: str,
    s: shapes.FfnShape,
    activation: str,
    device: torch.device,
    dtype: torch.dtype,
    infer: bool = False,
) -> Case:
    """A feed-forward block with biases; with `infer` nothing takes a gradient."""
    vector = lambda n, seed: randn(n, dtype=dtype, device=device, seed=seed)
    tensors = {
        "x": randn(s.rows, s.dim, dtype=dtype, device=device, seed=1),
        "w1": _matrix(s.hidden_dim, s.dim, device, dtype, 2),
        "b1": vector(s.hidden_dim, 3),
        "w2": _matrix(s.dim, s.hidden_dim, device, dtype, 4),
        "b2": vector(s.dim, 5),
    }
    product = 2 * s.rows * s.dim * s.hidden_dim
    act = _ACTIVATIONS[activation]
    return make_case(
        "ffn", f"{name}/{activation}{'_infer' if infer else ''} {_ffn_size(s)}", "ffn", tensors,
        {"activation": activation},
        lambda x, w1, b1, w2, b2: F.linear(act(F.linear(x, w1, b1)), w2, b2),
        Work("TFLOP/s", 2 * product, 4 * product), frozen=frozenset(tensors if infer else ()),
    )  # fmt: skip


def gated_case(
    name: str, s: shapes.FfnShape, activation: str, device: torch.device, dtype: torch.dtype
) -> Case:
    """A gated feed-forward block."""
    tensors = {
        "x": randn(s.rows, s.dim, dtype=dtype, device=device, seed=1),
        "w_gate": _matrix(s.hidden_dim, s.dim, device, dtype, 2),
        "w_up": _matrix(s.hidden_dim, s.dim, device, dtype, 3),
        "w_down": _matrix(s.dim, s.hidden_dim, device, dtype, 4),
    }
    product = 2 * s.rows * s.dim * s.hidden_dim
    act = _ACTIVATIONS[activation]
    return make_case(
        "ffn", f"{name}/gated_{activation} {_ffn_size(s)}", "gated_ffn", tensors,
        {"activation": activation},
        lambda x, w_gate, w_up, w_down: F.linear(
            act(F.linear(x, w_gate)) * F.linear(x, w_up), w_down
        ),
        Work("TFLOP/s", 3 * product, 6 * product),
    )  # fmt: skip


_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def _matrix(rows: int, cols: int, device, dtype, seed: int) -> torch.Tensor:
    """Scaled as initialised weights are, so that what it gives has size 1."""
    return randn(rows, cols, dtype=dtype, device=device, seed=seed, scale=cols**-0.5)


def _ffn_size(s: shapes.FfnShape) -> str:
    return f"{s.rows}x{s.dim}x{s.hidden_dim}"


def loss_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Cross-entropy of logits, and of a linear head."""
    table = shapes.LOSS_LARGE if device.type == "cuda" else shapes.LOSS_CPU
    for name, s in _first(table, quick):
        generator = torch.Generator().manual_seed(0)
        target = torch.randint(s.vocab, (s.tokens,), generator=generator).to(device)
        moved = s.tokens * s.vocab * torch.finfo(dtype).bits / 8
        logits = randn(s.tokens, s.vocab, dtype=dtype, device=device, seed=1)
        yield make_case(
            "loss", f"{name}/cross_entropy {s.tokens}x{s.vocab}", "cross_entropy",
            {"logits": logits, "target": target}, {},
            lambda logits, target: F.cross_entropy(logits, target),
            Work("GB/s", moved, 2 * moved),
        )  # fmt: skip
        del logits
        tensors = {
            "x": randn(s.tokens, s.dim, dtype=dtype, device=device, seed=2),
            "weight": randn(s.vocab, s.dim, dtype=dtype, device=device, seed=3, scale=s.dim**-0.5),
            "target": target,
        }
        product = 2 * s.tokens * s.vocab * s.dim
        yield make_case(
            "loss", f"{name}/linear_cross_entropy {s.tokens}x{s.vocab}x{s.dim}",
            "linear_cross_entropy", tensors, {},
            lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target),
            Work("TFLOP/s", product, 2 * product),
        )  # fmt: skip


def embedding_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Tokens, positions and types added and normalised, as in BERT."""
    batch, seqlen, vocab = (64, 512, 30522) if device.type == "cuda" else (8, 128, 5000)
    dim = 768
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (batch, seqlen), generator=generator).to(device)
    table = lambda rows, seed: randn(rows, dim, dtype=dtype, device=device, seed=seed)
    tensors = {
        "ids": ids,
        "token_weight": table(vocab, 1),
        "position_weight": table(seqlen, 2),
        "norm_weight": table(1, 3)[0],
        "norm_bias": table(1, 4)[0],
    }
    moved = batch * seqlen * dim * torch.finfo(dtype).bits / 8
    yield make_case(
        "embedding", f"bert {batch}x{seqlen}x{dim}", "embedding", tensors, {"eps": 1e-12},
        lambda ids, token_weight, position_weight, norm_weight, norm_bias: F.layer_norm(
            F.embedding(ids, token_weight) + position_weight, norm_weight.shape, norm_weight,
            norm_bias, 1e-12,
        ),
        Work("GB/s", 2 * moved, 3 * moved),
    )  # fmt: skip


CASES: dict[str, Callable[[torch.device, torch.dtype, bool], Iterator[Case]]] = {
    "attention": attention_cases,
    "norm": norm_cases,
    "ffn": ffn_cases,
    "loss": loss_cases,
    "embedding": embedding_cases,
}


def _first(table: Mapping, quick: bool) -> list:
    return list(table.items())[: 1 if quick else None]
