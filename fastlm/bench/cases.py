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
        # Scaled as initialised weights are, so that the hidden values have size 1.
        matrix = lambda rows, cols, seed: randn(
            rows, cols, dtype=dtype, device=device, seed=seed, scale=cols**-0.5
        )
        x = randn(s.rows, s.dim, dtype=dtype, device=device, seed=1)
        vector = lambda n, seed: randn(n, dtype=dtype, device=device, seed=seed)
        product = 2 * s.rows * s.dim * s.hidden_dim
        size = f"{s.rows}x{s.dim}x{s.hidden_dim}"
        tensors = {
            "x": x,
            "w1": matrix(s.hidden_dim, s.dim, 2), "b1": vector(s.hidden_dim, 3),
            "w2": matrix(s.dim, s.hidden_dim, 4), "b2": vector(s.dim, 5),
        }  # fmt: skip
        yield make_case(
            "ffn", f"{name}/gelu {size}", "ffn", tensors, {"activation": "gelu"},
            lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
            Work("TFLOP/s", 2 * product, 4 * product),
        )  # fmt: skip
        if quick:
            continue
        tensors = {
            "x": x,
            "w_gate": matrix(s.hidden_dim, s.dim, 2), "w_up": matrix(s.hidden_dim, s.dim, 3),
            "w_down": matrix(s.dim, s.hidden_dim, 4),
        }  # fmt: skip
        yield make_case(
            "ffn", f"{name}/gated_silu {size}", "gated_ffn", tensors, {"activation": "silu"},
            lambda x, w_gate, w_up, w_down: F.linear(
                F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down
            ),
            Work("TFLOP/s", 3 * product, 6 * product),
        )  # fmt: skip
        hidden = lambda seed, s=s: randn(
            s.rows, s.hidden_dim, dtype=dtype, device=device, seed=seed
        )
        moved = s.rows * s.hidden_dim * dtype.itemsize
        size = f"{s.rows}x{s.hidden_dim}"
        yield make_case(
            "ffn", f"{name}/bias_gelu {size}", "bias_act",
            {"x": hidden(2), "bias": vector(s.hidden_dim, 3)}, {"activation": "gelu"},
            lambda x, bias: F.gelu(x + bias),
            Work("GB/s", 2 * moved, 3 * moved),
        )  # fmt: skip
        yield make_case(
            "ffn", f"{name}/silu_glu {size}", "glu", {"gate": hidden(2), "up": hidden(3)},
            {"activation": "silu"}, lambda gate, up: F.silu(gate) * up,
            Work("GB/s", 3 * moved, 5 * moved),
        )  # fmt: skip


def loss_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Cross-entropy of logits, of a linear head, and of BERT's head; the products of a head alone,
    which are what its loss cannot be faster than.

    Work of a head is that of the tokens that have a target.
    """
    gpu = device.type == "cuda"
    table = shapes.LOSS_LARGE if gpu else shapes.LOSS_CPU
    for name, s in _first(table, quick):
        yield _logits_case(name, s, device, dtype)
        yield _linear_case(name, s, device, dtype)
        if not quick:
            yield _products_case(name, s, device, dtype)
    if quick:
        return
    for name, s in (shapes.LOSS_LOGITS if gpu else {}).items():
        yield _logits_case(name, s, device, dtype)
    for name, s in (shapes.LOSS_MASKED if gpu else shapes.LOSS_MASKED_CPU).items():
        yield _linear_case(name, s, device, dtype)
        yield _masked_lm_case(name, s, device, dtype)


def _target(s: shapes.LossShape, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(s.vocab, (s.tokens,), generator=generator)
    order = torch.randperm(s.tokens, generator=generator)
    target[order[: round(s.ignored * s.tokens)]] = -100
    return target.to(device)


def _logits_case(name: str, s: shapes.LossShape, device, dtype) -> Case:
    moved = s.tokens * s.vocab * torch.finfo(dtype).bits / 8
    logits = randn(s.tokens, s.vocab, dtype=dtype, device=device, seed=1)
    return make_case(
        "loss", f"{name}/cross_entropy {s.tokens}x{s.vocab}", "cross_entropy",
        {"logits": logits, "target": _target(s, device)}, {},
        lambda logits, target: F.cross_entropy(logits, target),
        Work("GB/s", moved, 2 * moved),
    )  # fmt: skip


def _head(s: shapes.LossShape, device, dtype) -> dict[str, torch.Tensor]:
    return {
        "x": randn(s.tokens, s.dim, dtype=dtype, device=device, seed=2),
        "weight": randn(s.vocab, s.dim, dtype=dtype, device=device, seed=3, scale=s.dim**-0.5),
    }


def _products_of(s: shapes.LossShape) -> Work:
    product = 2 * (s.tokens - round(s.ignored * s.tokens)) * s.vocab * s.dim
    return Work("TFLOP/s", product, 2 * product)


def _linear_case(name: str, s: shapes.LossShape, device, dtype) -> Case:
    return make_case(
        "loss", f"{name}/linear_cross_entropy {s.tokens}x{s.vocab}x{s.dim}",
        "linear_cross_entropy", _head(s, device, dtype) | {"target": _target(s, device)}, {},
        lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target), _products_of(s),
    )  # fmt: skip


def _masked_lm_case(name: str, s: shapes.LossShape, device, dtype) -> Case:
    vector = lambda seed: randn(s.dim, dtype=dtype, device=device, seed=seed)
    head = _head(s, device, dtype)
    dense = randn(s.dim, s.dim, dtype=dtype, device=device, seed=4, scale=s.dim**-0.5)
    tensors = {
        "hidden": head["x"], "labels": _target(s, device), "dense_weight": dense,
        "dense_bias": vector(5), "norm_weight": vector(6), "norm_bias": vector(7),
        "decoder_weight": head["weight"],
    }  # fmt: skip

    def eager(
        hidden, labels, dense_weight, dense_bias, norm_weight, norm_bias, decoder_weight
    ):  # fmt: skip
        h = F.gelu(F.linear(hidden, dense_weight, dense_bias))
        h = F.layer_norm(h, norm_weight.shape, norm_weight, norm_bias, 1e-12)
        return F.cross_entropy(F.linear(h, decoder_weight), labels)

    return make_case(
        "loss", f"{name}/masked_lm_loss {s.tokens}x{s.vocab}x{s.dim}", "masked_lm_loss", tensors,
        {}, eager, _products_of(s),
    )  # fmt: skip


class _Products(torch.autograd.Function):
    """The three products of a head, with its logits in the place of their gradients."""

    @staticmethod
    def forward(ctx, x, weight):
        logits = F.linear(x, weight)
        ctx.save_for_backward(x, weight, logits)
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx, dout):
        x, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ x


def _products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _Products.apply(x, weight)


def _products_case(name: str, s: shapes.LossShape, device, dtype) -> Case:
    return Case(
        op="loss", shape=f"{name}/bare_products {s.tokens}x{s.vocab}x{s.dim}", function="products",
        options={}, dtype=dtype, tensors=_head(s, device, dtype), reference=_products,
        providers={"torch": _products}, work=_products_of(s),
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
