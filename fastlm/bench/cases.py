"""What is measured: for every operator family its cases, with torch beside fastlm's backends.

Work is counted as the field does. Attention: 4 * batch * nheads * seqlen^2 * headdim operations
forward, half of it for causal, and 2.5 times that backward. Matrix products: 2 * m * n * k forward
and twice that backward. Memory-bound operators: the bytes that any implementation has to move,
every tensor of the size of the input counted once for each read or write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import fastlm
from fastlm import reference, shapes
from fastlm.testing import randn

Fn = Callable[..., torch.Tensor]
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Work:
    """Operations or bytes, by pass."""

    unit: str  # "TFLOP/s" or "GB/s"
    forward: float
    backward: float

    def of(self, direction: str) -> float:
        """For "forward", "backward" or "forward+backward"."""
        return sum(getattr(self, part) for part in direction.split("+"))


@dataclass(frozen=True)
class Case:
    """One call with its inputs, its specification and those who can make it.

    Attributes:
        op, shape: the operator's family, and a name of the case that holds its sizes.
        function, options: the function of fastlm that it calls, and with what besides `tensors`.
        tensors: inputs by name; floating-point ones get gradients.
        reference: the specification; called like the providers, with `tensors` by name.
        providers: functions by name; "torch" is what others are compared with.
        work: what the case costs.
        parts: indices that cut out what the oracle compares, by input name and "out", where all of
            it would not fit in memory in fp64; the parts must not depend on the rest.
        unavailable: why a backend of fastlm is not among the providers.
    """

    op: str
    shape: str
    function: str
    options: Mapping[str, object]
    dtype: torch.dtype
    tensors: Mapping[str, torch.Tensor]
    reference: Fn
    providers: dict[str, Fn]
    work: Work
    parts: Mapping[str, Slices] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)

    def differentiates(self, name: str) -> bool:
        return self.tensors[name].is_floating_point()

    def inputs(self) -> dict[str, torch.Tensor]:
        """Fresh leaves that share the memory of `tensors`."""
        return {n: self._leaf(n, x.detach()) for n, x in self.tensors.items()}

    def part_of_inputs(self, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        """The part that the oracle compares, floating-point tensors in `dtype`."""
        parts = {}
        for name, x in self.tensors.items():
            x = self.cut(name, x.detach())
            if dtype is not None and x.is_floating_point():
                x = x.to(dtype)
            parts[name] = self._leaf(name, x)
        return parts

    def cut(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x[self.parts.get(name, ())]

    def _leaf(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x.requires_grad_(self.differentiates(name))


def attention_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Plain, causal, with key padding, and with a bias that needs its gradient."""
    table = shapes.ATTENTION_LARGE if device.type == "cuda" else shapes.ATTENTION_CPU
    for name, s in _first(table, quick):
        for variant in ("full", "causal", "padding", "bias"):
            # A bias of 16k x 16k for every head has no room beside its gradient.
            fits = variant != "bias" or s.seqlen_k <= 4096
            if fits and (variant != "padding" or not quick):
                yield attention_case(name, s, variant, device, dtype)


def attention_case(
    name: str,
    s: shapes.AttentionShape,
    variant: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Case:
    """One case; `variant` is full, causal, padding or bias."""
    heads = lambda n, seqlen, seed: randn(
        s.batch, seqlen, n, s.headdim, dtype=dtype, device=device, seed=seed
    )
    tensors = {
        "q": heads(s.nheads, s.seqlen_q, 1),
        "k": heads(s.nheads_k, s.seqlen_k, 2),
        "v": heads(s.nheads_k, s.seqlen_k, 3),
    }
    options, batch, group = {}, slice(0, 1), s.nheads // s.nheads_k
    if variant == "causal":
        options["causal"] = True
    elif variant == "padding":
        lengths = torch.linspace(s.seqlen_k // 4, s.seqlen_k, s.batch, device=device)
        tensors["seqlens_k"] = lengths.to(torch.int32)
    elif variant == "bias":
        shape = (1, s.nheads, s.seqlen_q, s.seqlen_k)
        tensors["bias"] = randn(*shape, dtype=dtype, device=device, seed=4)
        batch = slice(None)  # its gradient is a sum over the batch
    parts = {"q": (batch, slice(None), slice(0, group)), "k": (batch, slice(None), slice(0, 1))}
    parts |= {"v": parts["k"], "out": parts["q"], "seqlens_k": (batch,)}
    parts["bias"] = (slice(None), slice(0, group))
    pairs = s.batch * s.nheads * s.seqlen_q * s.seqlen_k
    if variant == "causal":
        pairs /= 2
    elif variant == "padding":
        pairs *= tensors["seqlens_k"].float().mean().item() / s.seqlen_k
    flops = 4 * pairs * s.headdim
    heads_k = "" if s.nheads_k == s.nheads else f"/{s.nheads_k}"
    return _case(
        "attention",
        f"{name}/{variant} {s.batch}x{s.seqlen_q}x{s.nheads}{heads_k}x{s.headdim}",
        "attention",
        tensors,
        options,
        lambda q, k, v, bias=None, seqlens_k=None: _sdpa(q, k, v, bias, seqlens_k, options),
        Work("TFLOP/s", flops, 2.5 * flops),
        parts,
    )


def _sdpa(q, k, v, bias, seqlens_k, options) -> torch.Tensor:
    mask = bias
    if seqlens_k is not None:
        mask = torch.arange(k.shape[1], device=k.device) < seqlens_k[:, None, None, None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask,
        is_causal=bool(options.get("causal")), enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)


def norm_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """LayerNorm, LayerNorm of a residual sum, RMSNorm."""
    table = shapes.NORM_LARGE if device.type == "cuda" else shapes.NORM_CPU
    for name, s in _first(table, quick):
        rows = lambda seed, s=s: randn(s.rows, s.cols, dtype=dtype, device=device, seed=seed)
        cols = lambda seed, s=s: randn(s.cols, dtype=dtype, device=device, seed=seed)
        moved = s.rows * s.cols * torch.finfo(dtype).bits / 8
        size = f"{s.rows}x{s.cols}"
        layer = {"x": rows(1), "weight": cols(2), "bias": cols(3)}
        yield _case(
            "norm", f"{name}/layer_norm {size}", "layer_norm", layer, {},
            lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias),
            Work("GB/s", 2 * moved, 3 * moved),
        )  # fmt: skip
        yield _case(
            "norm", f"{name}/add_layer_norm {size}", "layer_norm", layer | {"residual": rows(4)},
            {}, lambda x, weight, bias, residual: F.layer_norm(
                residual + x, weight.shape, weight, bias
            ),
            Work("GB/s", 3 * moved, 3 * moved),
        )  # fmt: skip
        if not quick:
            yield _case(
                "norm", f"{name}/rms_norm {size}", "rms_norm", {"x": rows(1), "weight": cols(2)},
                {"eps": 1e-6}, lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
                Work("GB/s", 2 * moved, 3 * moved),
            )  # fmt: skip


def ffn_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """GELU feed-forward with biases, and gated SiLU."""
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
        yield _case(
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
        yield _case(
            "ffn", f"{name}/gated_silu {size}", "gated_ffn", tensors, {"activation": "silu"},
            lambda x, w_gate, w_up, w_down: F.linear(
                F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down
            ),
            Work("TFLOP/s", 3 * product, 6 * product),
        )  # fmt: skip


def loss_cases(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    """Cross-entropy of logits, and of a linear head."""
    table = shapes.LOSS_LARGE if device.type == "cuda" else shapes.LOSS_CPU
    for name, s in _first(table, quick):
        generator = torch.Generator().manual_seed(0)
        target = torch.randint(s.vocab, (s.tokens,), generator=generator).to(device)
        moved = s.tokens * s.vocab * torch.finfo(dtype).bits / 8
        logits = randn(s.tokens, s.vocab, dtype=dtype, device=device, seed=1)
        yield _case(
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
        yield _case(
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
    yield _case(
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


def _case(family, shape, op, tensors, options, torch_fn, work, parts=None) -> Case:
    """Adds the backends of fastlm that can take the call, and says why the others cannot."""
    fn, specification = getattr(fastlm, op), _reference(family, op)
    explanation = fastlm.explain(op, **tensors, **options)
    providers: dict[str, Fn] = {"torch": torch_fn}
    unavailable = {}
    for impl, reason in explanation.reasons.items():
        if reason is None:
            providers[f"fastlm-{impl}"] = lambda impl=impl, **x: fn(**x, **options, impl=impl)
        else:
            unavailable[f"fastlm-{impl}"] = reason
    dtype = next(x.dtype for x in tensors.values() if x.is_floating_point())
    return Case(
        op=family, shape=shape, function=op, options=options, dtype=dtype, tensors=tensors,
        reference=lambda **x: specification(**x, **options), providers=providers, work=work,
        parts=parts or {}, unavailable=unavailable,
    )  # fmt: skip


def _reference(family: str, op: str) -> Fn:
    return getattr(getattr(reference, family), op)
