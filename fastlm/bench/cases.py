"""What is measured: for every operator family its cases, with torch beside fastlm's backends.

Work is counted as the field does. Attention: see `fastlm.bench.attention`. Matrix products:
2 * m * n * k forward and twice that backward. Memory-bound operators: the bytes that any
implementation has to move, every tensor of the size of the input counted once for each read or
write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F

from fastlm import shapes
from fastlm.bench.attention import attention_cases
from fastlm.bench.case import Case, Work, make_case, randn


def norm_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """LayerNorm, LayerNorm of a residual sum, with dropout before it, RMSNorm."""
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
            yield _dropped_norm_case(f"{name}/drop_add_layer_norm {size}", layer, rows(4), moved)
            yield make_case(
                "norm", f"{name}/rms_norm {size}", "rms_norm", {"x": rows(1), "weight": cols(2)},
                {"eps": 1e-6}, lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
                Work("GB/s", 2 * moved, 3 * moved),
            )  # fmt: skip


def _dropped_norm_case(shape: str, layer: dict, residual: torch.Tensor, moved: float) -> Case:
    """The gradients of x and of the residual differ where x is dropped: both are written."""
    seed = torch.tensor(7, device=residual.device)  # on the device, as in a CUDA graph
    tensors = layer | {"residual": residual, "seed": seed}

    def make(dropout_p: float) -> Case:
        return make_case(
            "norm", shape, "layer_norm", tensors, {"dropout_p": dropout_p},
            lambda x, weight, bias, residual, seed: F.layer_norm(
                residual + F.dropout(x, dropout_p), weight.shape, weight, bias
            ),
            Work("GB/s", 3 * moved, 4 * moved),
        )  # fmt: skip

    return dataclasses.replace(make(0.1), undropped=make(0.0))


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
    """Cross-entropy of logits, of a linear head, and of BERT's two heads; the products of a head
    alone, which are what its loss cannot be faster than.

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
    for name, s in shapes.SENTENCE.items():
        yield _sentence_case(name, s, device, dtype)


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


def _sentence_case(name: str, s: shapes.SentenceShape, device, dtype) -> Case:
    pairs = shapes.LossShape(s.batch, 2, s.dim)
    square = randn(s.dim, s.dim, dtype=dtype, device=device, seed=4, scale=s.dim**-0.5)
    tensors = {
        "hidden": randn(s.batch, s.seqlen, s.dim, dtype=dtype, device=device, seed=2),
        "labels": _target(pairs, device), "weight": _head(pairs, device, dtype)["weight"],
        "bias": randn(2, dtype=dtype, device=device, seed=5), "pooler_weight": square,
        "pooler_bias": randn(s.dim, dtype=dtype, device=device, seed=6),
    }  # fmt: skip

    def eager(hidden, labels, weight, bias, pooler_weight, pooler_bias):
        pooled = torch.tanh(F.linear(hidden[:, 0], pooler_weight, pooler_bias))
        return F.cross_entropy(F.linear(pooled, weight, bias), labels)

    product = 2 * s.batch * s.dim * (s.dim + 2)
    return make_case(
        "loss", f"{name}/next_sentence_loss {s.batch}x{s.seqlen}x{s.dim}", "next_sentence_loss",
        tensors, {}, eager, Work("TFLOP/s", product, 2 * product),
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


def rotary_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Queries turned by fp32 angles, in halves as Llama and between neighbours as GPT-J."""
    table = shapes.ROTARY_LARGE if device.type == "cuda" else shapes.ROTARY_CPU
    for name, s in _first(table, quick):
        half = s.rotary_dim // 2
        rate = 10000.0 ** (-torch.arange(half) / half)
        angles = (torch.arange(s.seqlen)[:, None] * rate).to(device)
        x = randn(s.batch, s.seqlen, s.nheads, s.headdim, dtype=dtype, device=device, seed=1)
        tensors = {"x": x, "cos": angles.cos(), "sin": angles.sin()}
        moved = 2 * x.numel() * dtype.itemsize
        size = f"{s.batch}x{s.seqlen}x{s.nheads}x{s.headdim}"
        for interleaved in (False,) if quick else (False, True):
            layout = "neighbours" if interleaved else "halves"
            yield make_case(
                "rotary", f"{name}/{layout} {size}", "rotary", tensors,
                {"interleaved": interleaved}, _rotate_neighbours if interleaved else _rotate_halves,
                Work("GB/s", moved, moved), frozen=frozenset(("cos", "sin")),
            )  # fmt: skip


def _rotate_halves(x, cos, sin):
    """As Hugging Face's Llama, whose angles are in the dtype of x, twice in a row."""
    cos, sin = (torch.cat((t, t), -1).to(x.dtype)[:, None] for t in (cos, sin))
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-b, a), -1) * sin, rest), -1)


def _rotate_neighbours(x, cos, sin):
    """As Hugging Face's GPT-J, likewise."""
    cos, sin = (t.to(x.dtype).repeat_interleave(2, -1)[:, None] for t in (cos, sin))
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    return torch.cat((turned * cos + other * sin, rest), -1)


def embedding_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Tokens, positions and types added and normalised, as in BERT; half of the tokens are padding,
    and without it; and tokens and positions alone, as in GPT-2."""
    table = shapes.EMBEDDING_LARGE if device.type == "cuda" else shapes.EMBEDDING_CPU
    for name, s in _first(table, quick):
        generator = torch.Generator().manual_seed(0)
        index = lambda n, s=s, g=generator: torch.randint(n, (s.batch, s.seqlen), generator=g)
        ids, types = index(s.vocab), index(2)
        rows = lambda n, seed, s=s: randn(n, s.dim, dtype=dtype, device=device, seed=seed)
        tensors = {
            "ids": ids.to(device), "token_weight": rows(s.vocab, 1),
            "position_weight": rows(s.max_seqlen, 2), "type_ids": types.to(device),
            "type_weight": rows(2, 3), "norm_weight": rows(1, 4)[0], "norm_bias": rows(1, 5)[0],
        }  # fmt: skip
        moved = s.batch * s.seqlen * s.dim * dtype.itemsize
        vocab = s.vocab * s.dim * dtype.itemsize
        # A gradient has as many rows as its table; dy and the sum are read, the sum's gradient is
        # written, and read by each of the three tables.
        work = Work("GB/s", 2 * moved, 6 * moved + vocab)
        size = f"{s.batch}x{s.seqlen}x{s.dim}"
        yield make_case(
            "embedding", f"{name}/bert {size}", "embedding", tensors, {"eps": 1e-12},
            _bert_embedding, work,
        )  # fmt: skip
        if quick:
            continue
        padded = {**tensors, "ids": torch.where(index(2) > 0, ids, 0).to(device)}
        yield make_case(
            "embedding", f"{name}/half_padding {size}", "embedding", padded,
            {"eps": 1e-12, "padding_idx": 0}, partial(_bert_embedding, padding_idx=0), work,
        )  # fmt: skip
        alone = {n: tensors[n] for n in ("ids", "token_weight", "position_weight")}
        yield make_case(
            "embedding", f"{name}/gpt2 {size}", "embedding", alone, {},
            lambda ids, token_weight, position_weight: (
                F.embedding(ids, token_weight) + position_weight[: ids.shape[1]]
            ),
            Work("GB/s", 2 * moved, 2 * moved + vocab),
        )  # fmt: skip


def _bert_embedding(
    ids, token_weight, position_weight, type_ids, type_weight, norm_weight, norm_bias,
    padding_idx=None,
):  # fmt: skip
    x = F.embedding(ids, token_weight, padding_idx) + F.embedding(type_ids, type_weight)
    x = x + position_weight[: ids.shape[1]]
    return F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, 1e-12)


CASES: dict[str, Callable[[torch.device, torch.dtype, bool], Iterator[Case]]] = {
    "attention": attention_cases,
    "norm": norm_cases,
    "ffn": ffn_cases,
    "loss": loss_cases,
    "rotary": rotary_cases,
    "embedding": embedding_cases,
}


def _first(table: Mapping, quick: bool) -> list:
    return list(table.items())[: 1 if quick else None]
