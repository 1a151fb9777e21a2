"""The calls whose kernels the compile gate compiles. A name is `<family>-<dtype>[-d<headdim>]-...`.

Each kernel is compiled for every target; each of its branches, dtypes, alignments and widths for
one, and only for more where code or configurations differ: a second or two for each compilation.
Most go to Hopper, whose configurations were timed.

Names with `-aligned` promise 128-bit loads and stores, with `-shifted` 128 bits between the ends of
rows that begin anywhere; the rules are `broken_rules` in compile_gate.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import fastlm
from fastlm.ops.ffn import ffn_by, gated_ffn_by

AMPERE, HOPPER, BLACKWELL, AMD = "sm_80", "sm_90", "sm_100", "gfx942"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], None]
    targets: tuple[str, ...] = ()  # empty: all


def tensor(*shape: int, dtype=torch.float32, grad: bool = True) -> torch.Tensor:
    """A tensor without memory; floating-point ones take gradients."""
    grad = grad and dtype.is_floating_point
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def forward_backward(fn: Callable, *tensors: torch.Tensor, **options) -> None:
    """Launches the forward kernels and those of every gradient."""
    out = fn(*tensors, impl="triton", **options)
    outputs = [y for y in (out if isinstance(out, tuple) else (out,)) if y.requires_grad]
    optional = [x.table if isinstance(x, fastlm.RelativeBias) else x for x in options.values()]
    optional = [x for x in optional if isinstance(x, torch.Tensor)]
    inputs = [x for x in (*tensors, *optional) if x.requires_grad]
    torch.autograd.grad(outputs, inputs, [torch.empty_like(y) for y in outputs])


def cases() -> Iterator[Case]:
    yield from norm()
    yield from attention()
    yield from attention_options()
    yield from attention_weights()
    yield from attention_decode()
    yield from ffn()
    yield from loss()
    yield from rotary()
    yield from embedding()
    yield from linear_loss()
    yield from masked_lm()


def norm() -> Iterator[Case]:
    def case(label, rows, cols, dtype, *targets, params=None, residual=False, **options):
        def run():
            x = tensor(rows, cols, dtype=DTYPES[dtype])
            weights = [tensor(cols, dtype=params or DTYPES[dtype])]
            fn = fastlm.rms_norm
            if label.startswith("layer"):
                fn = fastlm.layer_norm
                weights.append(tensor(cols, dtype=params or DTYPES[dtype]))
            if residual:
                options["residual"] = tensor(rows, cols, dtype=DTYPES[dtype])
            forward_backward(fn, x, *weights, **options)

        return Case(f"norm-{dtype}-{label}-{cols}", run, targets)

    yield case("layer-aligned", 4096, 768, "bf16")
    yield case("layer-aligned", 4096, 1024, "fp32")
    yield case("layer-odd", 4096, 1001, "fp16")
    yield case("layer-mixed-aligned", 4096, 768, "bf16", params=torch.float32)
    block = {"residual": True, "dropout_p": 0.1, "seed": 1, "prenorm": True}
    yield case("layer-block-aligned", 4096, 1024, "bf16", **block)
    yield case("layer-block-aligned", 4096, 8192, "fp32", **block)
    yield case("layer-block-aligned", 4096, 2048, "bf16", **block)
    yield case("layer-block-aligned", 4096, 4096, "bf16", **block)
    yield case("layer-block-aligned", 4096, 8192, "bf16", **block)
    yield case("layer-block-aligned", 4096, 12288, "bf16", **block)
    yield case("layer-block-aligned", 4096, 12288, "fp32", **block)
    yield case("layer-wide-aligned", 512, 65536, "bf16")
    yield case("layer-wide-aligned", 512, 131072, "bf16", HOPPER)
    yield case("rms-wide-block-aligned", 512, 131072, "bf16", HOPPER, **block)
    yield case("layer-residual-aligned", 4096, 12288, "bf16", residual=True, prenorm=True)
    yield case("rms-aligned", 4096, 4096, "bf16")
    yield case("rms-residual-aligned", 4096, 16384, "bf16", residual=True, prenorm=True)
    yield case("rms-gemma-aligned", 4096, 2048, "fp16", casting="gemma")
    yield case("rms-llama-aligned", 4096, 4096, "bf16", casting="llama", residual=True)


def attention() -> Iterator[Case]:
    def case(label, dtype, headdim, *targets, nheads=16, nheads_k=16, seqlen_q=1024, gap=0,
             precision="highest", **options):  # fmt: skip
        def run():
            q = tensor(2, seqlen_q, nheads, headdim, dtype=DTYPES[dtype])
            k = tensor(2, 1024, nheads_k, headdim + gap, dtype=DTYPES[dtype])[..., :headdim]
            v = tensor(2, 1024, nheads_k, headdim, dtype=DTYPES[dtype])
            torch.set_float32_matmul_precision(precision)
            try:
                forward_backward(fastlm.attention, q, k, v, **options)
            finally:
                torch.set_float32_matmul_precision("highest")

        return Case(f"attention-{dtype}-d{headdim}-{label}", run, targets)

    yield case("full-aligned", "bf16", 64, AMPERE, HOPPER, BLACKWELL)
    yield case("causal-aligned", "bf16", 64, AMD, causal=True)
    yield case("causal-aligned", "bf16", 128, AMPERE, HOPPER, BLACKWELL, causal=True)
    yield case("causal-aligned", "bf16", 256, AMPERE, HOPPER, AMD, causal=True)
    yield case("full", "fp16", 17, AMPERE)
    yield case("full", "fp16", 80, HOPPER)
    yield case("pointers", "bf16", 64, HOPPER, gap=4)  # no descriptors for strides of 8 bytes
    lengths = {"nheads_k": 4, "seqlen_q": 333, "causal": "top_left"}
    yield case("causal-gqa-lengths", "bf16", 40, AMPERE, **lengths)
    yield case("causal-aligned", "fp32", 64, HOPPER, causal=True)
    yield case("full-aligned", "fp32", 128, AMPERE)
    yield case("tf32", "fp32", 64, AMPERE, precision="high")
    yield case("tf32", "fp32", 128, HOPPER, precision="high")


def attention_options() -> Iterator[Case]:
    """Each with its gradient. "options-many" may spill, see `broken_rules`."""

    def case(label, dtype, headdim, *targets, **options):
        def run():
            q, k, v = (tensor(2, 1024, 16, headdim, dtype=DTYPES[dtype]) for _ in range(3))
            forward_backward(fastlm.attention, q, k, v, **options)

        return Case(f"attention-{dtype}-d{headdim}-options-{label}", run, targets)

    table = tensor(32, 16)
    relative = fastlm.RelativeBias(table, bidirectional=True, max_distance=128)
    mask = tensor(2, 1, 1, 1024, dtype=torch.bool)
    dropout = {"dropout_p": 0.1, "seed": 1}
    yield case("bias", "bf16", 64, BLACKWELL, bias=tensor(16, 1024, 1024, dtype=torch.bfloat16))
    yield case("columns", "bf16", 128, HOPPER, bias=tensor(2, 1, 1, 1024))
    yield case("bias", "bf16", 128, AMPERE, bias=tensor(16, 1024, 1024))
    yield case("table", "bf16", 64, BLACKWELL, AMD, bias=relative)
    yield case("table", "bf16", 128, HOPPER, bias=relative)
    yield case("alibi", "fp32", 64, AMD, causal=True, alibi_slopes=tensor(16))
    yield case("alibi", "bf16", 128, HOPPER, causal=True, alibi_slopes=tensor(16))
    yield case("mask", "bf16", 64, HOPPER, mask=mask)
    yield case("dropout", "bf16", 128, HOPPER, causal=True, **dropout)
    yield case("window", "bf16", 128, HOPPER, AMD, window=(256, 0))
    yield case("lengths", "bf16", 128, HOPPER, seqlens_k=tensor(2, dtype=torch.int32))
    yield case("bert", "bf16", 64, AMPERE, mask=mask, **dropout)
    yield case("bert", "bf16", 128, HOPPER, mask=mask, **dropout)
    yield case("t5", "bf16", 64, AMPERE, HOPPER, bias=relative, mask=mask)
    yield case("many-t5", "bf16", 64, HOPPER, bias=relative, mask=mask, **dropout)


def attention_weights() -> Iterator[Case]:
    def case(label, dtype, headdim, *targets, nheads_k=16, **options):
        def run():
            q = tensor(2, 1024, 16, headdim, dtype=DTYPES[dtype])
            k = tensor(2, 1024, nheads_k, headdim, dtype=DTYPES[dtype])
            forward_backward(fastlm.attention_weights, q, k, tensor(2, 16, 1024), **options)

        return Case(f"attention-{dtype}-d{headdim}-weights-{label}", run, targets)

    yield case("aligned", "bf16", 64, HOPPER, BLACKWELL, AMD)
    yield case("aligned-causal-gqa", "bf16", 128, HOPPER, nheads_k=4, causal=True)
    yield case("plain", "fp32", 64, HOPPER, AMD)
    yield case("options-columns", "bf16", 128, AMPERE, bias=tensor(2, 1, 1, 1024))


def attention_decode() -> Iterator[Case]:
    def case(label, dtype, headdim, *targets, nheads=16, nheads_k=4, seqlen_q=1, cache=None,
             **options):  # fmt: skip
        def run():
            q = tensor(2, seqlen_q, nheads, headdim, dtype=DTYPES[dtype], grad=False)
            new = tensor(2, seqlen_q, nheads_k, headdim, dtype=DTYPES[dtype], grad=False)
            kv = tensor(2, 4096, nheads_k, headdim, dtype=DTYPES[cache or dtype], grad=False)
            lens = tensor(2, dtype=torch.int32)
            fastlm.attention_decode(q, kv, kv, lens, k_new=new, v_new=new, impl="triton", **options)

        return Case(f"attention-{dtype}-d{headdim}-decode-{label}", run, targets)

    def every():
        return dict(
            window=(512, 0), mask=tensor(2, 1, 1, 4096, dtype=torch.bool),
            bias=tensor(16, 1, 4096, grad=False), alibi_slopes=tensor(16, grad=False),
            softcap=30.0, sinks=tensor(16, grad=False),
        )  # fmt: skip

    yield case("aligned", "bf16", 128)
    yield case("queries-aligned", "bf16", 128, HOPPER, BLACKWELL, seqlen_q=16)
    yield case("aligned", "bf16", 512, AMPERE, AMD)
    yield case("aligned", "fp32", 128, HOPPER, AMD)
    yield case("odd", "fp16", 80, HOPPER)
    yield case("mixed", "fp16", 128, AMPERE, cache="bf16")
    table = lambda: fastlm.RelativeBias(
        tensor(32, 16, grad=False), bidirectional=False, max_distance=128
    )
    yield case("table", "bf16", 64, HOPPER, AMD, bias=table())
    yield case("every", "bf16", 128, AMPERE, seqlen_q=16, **every())


def ffn() -> Iterator[Case]:
    def bias_act(activation, dtype, cols, *targets, **options):
        def run():
            x, bias = tensor(4096, cols, dtype=DTYPES[dtype]), tensor(cols, dtype=DTYPES[dtype])
            forward_backward(fastlm.bias_act, x, bias, activation=activation, **options)

        label = "dropout" if options else "plain"
        return Case(f"ffn-{dtype}-bias_act-{label}-aligned-{activation}", run, targets)

    def glu(activation, dtype, cols, *targets):
        def run():
            gate, up = (tensor(4096, cols, dtype=DTYPES[dtype]) for _ in range(2))
            forward_backward(fastlm.glu, gate, up, activation=activation)

        return Case(f"ffn-{dtype}-glu-aligned-{activation}", run, targets)

    def block(op, dtype, dim, hidden, *targets, **options):
        def run():  # the backward writes the hidden values again
            shapes = {"ffn": [(hidden, dim), (hidden,), (dim, hidden), (dim,)]}
            shapes["gated_ffn"] = [(hidden, dim), (hidden, dim), (dim, hidden)]
            x, *params = (tensor(*s, dtype=DTYPES[dtype]) for s in [(4096, dim), *shapes[op]])
            forward_backward(getattr(fastlm, op), x, *params, **options)

        return Case(f"ffn-{dtype}-{op}-aligned", run, targets)

    def epilogue(op, label, dtype, dim, hidden, *targets, **options):
        def run():
            shapes = {ffn_by: [(hidden, dim), (hidden,), (dim, hidden), (dim,)]}
            shapes[gated_ffn_by] = [(hidden, dim), (hidden, dim), (dim, hidden)]
            x, *params = (tensor(*s, dtype=DTYPES[dtype]) for s in [(4096, dim), *shapes[op]])
            forced = functools.partial(op, "epilogue")
            forward_backward(forced, x, *params, recompute=False, **options)

        return Case(f"ffn-{dtype}-epilogue-{label}", run, targets)

    yield bias_act("gelu", "bf16", 3072, BLACKWELL, AMD)
    yield bias_act("gelu", "bf16", 3072, HOPPER, dropout_p=0.1, seed=1)
    yield bias_act("gelu_tanh", "fp16", 3072, AMPERE)
    yield bias_act("relu", "fp32", 2048, HOPPER, AMD)
    yield glu("silu", "bf16", 11008)
    yield glu("gelu_tanh", "fp32", 8192, HOPPER, AMD)
    yield block("ffn", "bf16", 768, 3072, AMPERE, activation="gelu", dropout_p=0.1, seed=1)
    yield block("gated_ffn", "bf16", 4096, 14336, HOPPER, activation="silu")
    gelu = {"activation": "gelu", "dropout_p": 0.0, "seed": None}
    dropped = gelu | {"dropout_p": 0.1, "seed": 1}
    yield epilogue(ffn_by, "ffn-aligned", "bf16", 768, 3072, AMPERE, BLACKWELL, AMD, **gelu)
    yield epilogue(ffn_by, "ffn-dropout-aligned", "bf16", 1024, 4096, HOPPER, **dropped)
    yield epilogue(ffn_by, "ffn-pointers", "fp16", 771, 3077, AMPERE, HOPPER, **dropped)
    nvidia = AMPERE, HOPPER, BLACKWELL
    yield epilogue(gated_ffn_by, "gated-aligned", "bf16", 4096, 11008, *nvidia, activation="silu")


def loss() -> Iterator[Case]:
    def case(dtype, vocab, *targets, label="aligned", weighted=False, **options):
        def run():
            logits = tensor(4096, vocab, dtype=DTYPES[dtype])
            if weighted:
                options["class_weight"] = tensor(vocab, grad=False)
            target = tensor(4096, dtype=torch.int64)
            forward_backward(fastlm.cross_entropy, logits, target, **options)

        return Case(f"loss-{dtype}-{label}-{vocab}", run, targets)

    yield case("bf16", 32768, BLACKWELL, AMD)
    yield case("fp32", 50304, HOPPER, AMD, label_smoothing=0.1, z_loss=1e-4)
    yield case("fp16", 30522, AMPERE, label="shifted")
    yield case("bf16", 30522, HOPPER, label="shifted")
    yield case("bf16", 50257, HOPPER, label="shifted")
    every = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
    yield case("bf16", 256000, HOPPER, label="every-aligned", weighted=True, **every)
    yield case("fp32", 257, AMPERE, HOPPER, label="every-odd", weighted=True, **every)


def rotary() -> Iterator[Case]:
    def case(label, dtype, headdim, half, *targets, nheads=32, rows=4096, trained=False,
             positions=False, **options):  # fmt: skip
        def run():
            x = tensor(4, 4096, nheads, headdim, dtype=DTYPES[dtype])
            tables = (tensor(rows, half, grad=trained) for _ in range(2))
            if positions:
                options["positions"] = tensor(4, 4096, dtype=torch.int64)
            forward_backward(fastlm.rotary, x, *tables, **options)

        return Case(f"rotary-{dtype}-{label}-{headdim}", run, targets)

    yield case("halves-aligned", "bf16", 128, 64, AMPERE, BLACKWELL, AMD)
    yield case("neighbours-aligned", "bf16", 128, 64, HOPPER, interleaved=True)
    yield case("halves-aligned", "fp32", 64, 32, HOPPER, AMD, nheads=12)
    yield case("partial-aligned", "fp16", 80, 16, AMPERE, nheads=8, positions=True)
    odd = {"nheads": 71, "interleaved": True}
    yield case("partial-neighbours-odd", "fp16", 81, 13, HOPPER, AMD, **odd)
    yield case("trained-aligned", "bf16", 128, 64, nheads=8, trained=True, positions=True)


def embedding() -> Iterator[Case]:
    def case(label, dtype, dim, *targets, norm=True, tables=True, index=torch.int64, params=None,
             **options):  # fmt: skip
        def run():
            of = {"dtype": DTYPES[dtype]}
            ids = lambda: tensor(32, 512, dtype=index)
            if norm:
                options["norm_weight"] = tensor(dim, dtype=params or DTYPES[dtype])
                options["norm_bias"] = tensor(dim, dtype=params or DTYPES[dtype])
            if tables:
                options["position_weight"], options["positions"] = tensor(512, dim, **of), ids()
                options["type_weight"], options["type_ids"] = tensor(2, dim, **of), ids()
            forward_backward(fastlm.embedding, ids(), tensor(30522, dim, **of), **options)

        return Case(f"embedding-{dtype}-{label}-{dim}", run, targets)

    dropout = {"dropout_p": 0.1, "seed": 1}
    yield case("bert-aligned", "bf16", 768, BLACKWELL, **dropout, padding_idx=0)
    yield case("bert-aligned", "fp32", 1024, HOPPER, AMD, **dropout)
    mixed = {"params": torch.float32, "index": torch.int32}
    yield case("bert-mixed-aligned", "fp16", 1024, AMPERE, **mixed)
    yield case("bert-odd", "fp16", 1001, HOPPER, **dropout)
    yield case("dropout-aligned", "bf16", 2048, HOPPER, norm=False, tables=False, **dropout)
    yield case("widest-tile-aligned", "bf16", 8192, HOPPER, BLACKWELL, **dropout)
    yield case("wide-aligned", "bf16", 16384, **dropout)


def linear_loss() -> Iterator[Case]:
    def case(dtype, vocab, dim, label, *targets, weighted=False, bias=True, **options):
        def run():
            x, weight = (
                tensor(4096, dim, dtype=DTYPES[dtype]),
                tensor(vocab, dim, dtype=DTYPES[dtype]),
            )
            target = tensor(4096, dtype=torch.int64)
            if weighted:
                options["class_weight"] = tensor(vocab, grad=False)
            if bias:
                options["bias"] = tensor(vocab, dtype=DTYPES[dtype])
            forward_backward(fastlm.linear_cross_entropy, x, weight, target, **options)

        return Case(f"linear_loss-{dtype}-{label}-{vocab}", run, targets)

    yield case("bf16", 128256, 4096, "aligned", AMD, bias=False)
    yield case("fp16", 30522, 768, "aligned", HOPPER, bias=False)
    every = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0, "reduction": "sum"}
    yield case("bf16", 256000, 2304, "every", HOPPER, weighted=True, **every)
    yield case("bf16", 257, 33, "every-odd", HOPPER, weighted=True, **every)
    yield case("fp32", 50257, 768, "plain", AMPERE, AMD)


def masked_lm() -> Iterator[Case]:
    def case(dtype, dim, vocab, label, *targets):
        def run():
            shapes = [(4096, dim), (dim, dim), (dim,), (dim,), (dim,), (vocab, dim)]
            hidden, *parameters = (tensor(*s, dtype=DTYPES[dtype]) for s in shapes)
            labels = tensor(4096, dtype=torch.int64)
            forward_backward(fastlm.masked_lm_loss, hidden, labels, *parameters)

        return Case(f"masked_lm-{dtype}-{label}-{dim}", run, targets)

    yield case("bf16", 768, 30522, "aligned", AMPERE, BLACKWELL)
    yield case("fp32", 1024, 30522, "plain", HOPPER, AMD)
