"""Derivatives of derivatives, vmap and forward mode: right, or refused by name, in every op."""

import pytest
import torch
from torch import func
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.ops._transforms import TRANSFORM_REFUSAL
from fastlm.reference import attention, embedding, ffn, loss, norm, rotary
from fastlm.testing import assert_close, randn

SEED = torch.tensor(5)
X, RESIDUAL = randn(3, 5, 8), randn(3, 5, 8, seed=3)
WEIGHT, BIAS = randn(8, seed=1), randn(8, seed=2)
QKV = {
    "q": randn(2, 4, 2, 8),
    "k": randn(2, 5, 2, 8, seed=1),
    "v": randn(2, 5, 2, 8, seed=2),
}
LSE = attention.attention(**QKV, causal=True, softcap=2.0, return_lse=True)[1]
MLP = {
    "x": X,
    "w1": randn(12, 8, seed=4),
    "b1": randn(12, seed=5),
    "w2": randn(6, 12, seed=6),
    "b2": randn(6, seed=7),
}
GATED = {
    "x": X,
    "w_gate": randn(12, 8, seed=4),
    "w_up": randn(12, 8, seed=5),
    "w_down": randn(6, 12, seed=6),
}
HEAD = {"x": X, "weight": randn(11, 8, seed=4), "bias": randn(11, seed=5)}
TARGET = {"target": torch.tensor([[1, 2, -100, 3, 0]] * 3)}
MASKED_LM = {
    "hidden": X,
    "labels": TARGET["target"],
    "dense_weight": randn(6, 8, seed=404),
    "dense_bias": randn(6, seed=405),
    "norm_weight": randn(6, seed=406),
    "norm_bias": randn(6, seed=407),
    "decoder_weight": randn(11, 6, seed=408),
    "decoder_bias": randn(11, seed=409),
}
DROPOUT = {"dropout_p": 0.3, "seed": SEED}
PACKED = {n: x.flatten(0, 1) for n, x in QKV.items()} | {
    "cu_seqlens_q": torch.tensor([0, 3, 8]),
    "cu_seqlens_k": torch.tensor([0, 4, 10]),
}

# name -> (reference, tensors, options)
CASES = {
    "layer_norm": (norm.layer_norm, {"x": X, "weight": WEIGHT, "bias": BIAS}, {}),
    "layer_norm-all": (
        norm.layer_norm,
        {"x": X, "weight": WEIGHT, "bias": BIAS, "residual": RESIDUAL},
        {"prenorm": True} | DROPOUT,
    ),
    "rms_norm": (norm.rms_norm, {"x": X, "weight": WEIGHT}, {}),
    "rms_norm-gemma": (
        norm.rms_norm,
        {"x": X, "weight": WEIGHT, "residual": RESIDUAL},
        {"casting": "gemma"},
    ),
    "bias_act": (ffn.bias_act, {"x": X, "bias": BIAS}, {"activation": "gelu"} | DROPOUT),
    "glu": (ffn.glu, {"gate": X, "up": RESIDUAL}, {}),
    "ffn": (ffn.ffn, MLP, {"activation": "gelu_tanh"} | DROPOUT),
    "ffn-recompute": (ffn.ffn, MLP, {"activation": "silu", "recompute": True}),
    "gated_ffn": (ffn.gated_ffn, GATED, {}),
    "gated_ffn-recompute": (ffn.gated_ffn, GATED, {"recompute": True}),
    "cross_entropy": (
        loss.cross_entropy,
        {"logits": X} | TARGET,
        {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0},
    ),
    "cross_entropy-none": (loss.cross_entropy, {"logits": X} | TARGET, {"reduction": "none"}),
    "linear_cross_entropy": (loss.linear_cross_entropy, HEAD | TARGET, {"label_smoothing": 0.1}),
    "linear_cross_entropy-none": (
        loss.linear_cross_entropy,
        HEAD | TARGET,
        {"reduction": "none", "softcap": 3.0},
    ),
    "masked_lm_loss": (loss.masked_lm_loss, MASKED_LM, {"z_loss": 0.1}),
    "masked_lm_loss-none": (loss.masked_lm_loss, MASKED_LM, {"reduction": "none"}),
    "next_sentence_loss": (
        loss.next_sentence_loss,
        {"hidden": X, "labels": TARGET["target"][:, 2], "weight": HEAD["weight"]}
        | {"pooler_weight": randn(8, 8, seed=14)},
        {},
    ),
    "attention": (attention.attention, QKV, {}),
    "attention-window": (
        attention.attention,
        QKV,
        {"window": (1, 1), "seqlens_k": torch.tensor([5, 3])},
    ),
    "attention-bias": (attention.attention, QKV | {"bias": randn(4, 5, seed=9)}, DROPOUT),
    "attention-lse": (
        attention.attention,
        QKV | {"sinks": randn(2, seed=8)},
        {"causal": True, "softcap": 2.0, "return_lse": True},
    ),
    "attention_varlen": (
        attention.attention_varlen,
        PACKED,
        {"causal": True, "max_seqlen_q": 5, "max_seqlen_k": 6},
    ),
    "attention_weights": (
        attention.attention_weights,
        {"q": QKV["q"], "k": QKV["k"], "lse": LSE},
        {"causal": True, "softcap": 2.0},
    ),
    "rotary": (
        rotary.rotary,
        {"x": QKV["q"], "cos": randn(4, 3, seed=4), "sin": randn(4, 3, seed=5)},
        {},
    ),
    "rotary-packed": (
        rotary.rotary,
        {"x": PACKED["k"], "cos": randn(4, 3, seed=4), "sin": randn(4, 3, seed=5)},
        {"interleaved": True, "positions": torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 0, 1])},
    ),
    "embedding": (
        embedding.embedding,
        {"ids": TARGET["target"].clamp(min=0), "token_weight": RESIDUAL[0], "norm_weight": WEIGHT},
        DROPOUT,
    ),
    "embedding-tables": (
        embedding.embedding,
        {
            "ids": TARGET["target"].clamp(min=0),
            "token_weight": RESIDUAL[0],
            "position_weight": RESIDUAL[1],
            "type_weight": RESIDUAL[2],
            "norm_weight": WEIGHT,
            "norm_bias": BIAS,
        },
        {"type_ids": torch.tensor([0, 1, 1, 3, 0]), "padding_idx": 1} | DROPOUT,
    ),
}
WITH_CUDA = ("layer_norm", "rms_norm", "bias_act", "glu", "ffn", "gated_ffn")


def backends_of(op):
    kernels = ("triton", "cuda") if op in WITH_CUDA else ("triton",)
    return *kernels, "torch"


CALLS = [(name, impl) for name in CASES for impl in backends_of(name.split("-")[0])]


def op_of(name, impl, options):
    op = getattr(fastlm, name.split("-")[0])
    return lambda **tensors: op(**tensors, **options, impl=impl)


def reference_of(name, options):
    return lambda **tensors: CASES[name][0](**tensors, **options)


def moved(name, device, dtype=None):
    _, tensors, options = CASES[name]
    to = lambda x: x.to(device, dtype if x.is_floating_point() else None)
    move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x
    return {n: to(x) for n, x in tensors.items()}, {n: move(x) for n, x in options.items()}


def floats(tensors):
    return [n for n, x in tensors.items() if x.is_floating_point()]


def total(outputs):
    """The sum of all outputs; the incoming gradients are constants."""
    return sum(y.sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))


def penalty_gradients(fn, tensors):
    """Of the sum of all squared gradients, by create_graph; 0 where it does not depend on one."""
    leaves = {n: x.detach().requires_grad_() for n, x in tensors.items() if n in floats(tensors)}
    grads = torch.autograd.grad(
        total(fn(**{**tensors, **leaves})), list(leaves.values()), create_graph=True
    )
    penalty = sum(g.square().sum() for g in grads)
    assert penalty.requires_grad
    second = torch.autograd.grad(penalty, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name,impl", CALLS)
def test_gradient_penalty(name, impl, dtype, device):
    tensors, options = moved(name, device, dtype)
    actual = penalty_gradients(op_of(name, impl, options), tensors)
    same = penalty_gradients(reference_of(name, options), tensors)
    gold = penalty_gradients(reference_of(name, options), in_fp64(tensors))
    for n in gold:
        assert_close(n, actual[n], same[n], gold[n])


def in_fp64(tensors):
    return {n: x.double() if n in floats(tensors) else x for n, x in tensors.items()}


@pytest.mark.parametrize("name,impl", CALLS)
def test_compiles_fullgraph_where_nothing_takes_a_gradient(name, impl, device):
    tensors, options = moved(name, device)
    fn = lambda: total(op_of(name, impl, options)(**tensors))
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    # Not by bits: of masked_lm_loss torch gathers rows in eager mode alone.
    gold = total(reference_of(name, options)(**in_fp64(tensors)))
    assert_close("total", compiled(), fn(), gold)


# Calls that are given one tensor twice.
TWICE = {
    "attention": lambda x, w, impl: fastlm.attention(*[x[:, :, None]] * 3, impl=impl),
    "glu": lambda x, w, impl: fastlm.glu(x, x, impl=impl),
    "layer_norm": lambda x, w, impl: fastlm.layer_norm(x, residual=x, impl=impl),
    "rms_norm": lambda x, w, impl: fastlm.rms_norm(x, residual=x, prenorm=True, impl=impl)[0],
    "ffn": lambda x, w, impl: fastlm.ffn(x, w, w[0], w, w[0], impl=impl),
    "gated_ffn": lambda x, w, impl: fastlm.gated_ffn(x, w, w, w, impl=impl),
    "embedding": lambda x, w, impl: fastlm.embedding(
        IDS.to(w.device),
        w,
        position_weight=w,
        type_weight=w,
        norm_weight=w[1],
        norm_bias=w[1],
        impl=impl,
    ),
    "rotary": lambda x, w, impl: fastlm.rotary(x[:, :, None], w[:, :4], w[:, :4], impl=impl),
    "linear_cross_entropy": lambda x, w, impl: fastlm.linear_cross_entropy(
        w, w, w.new_tensor([0, 1, 2, 3, 4, 5, -100, 6]).long(), impl=impl
    ),
}
IDS = torch.tensor([[0, 2, 2, 7, 1]])


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("name", TWICE)
def test_compiles_fullgraph_where_one_tensor_comes_twice(name, impl, device):
    x = X.to(device, copy=True).requires_grad_()
    w = randn(8, 8, device=device, seed=40).requires_grad_()

    def gradients(fn):
        y = fn(x, w, impl)
        leaves = [t for t in (x, w) if name not in ("attention", "glu", "rms_norm") or t is x]
        return y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)

    expected = gradients(TWICE[name])
    torch._dynamo.reset()
    actual = gradients(torch.compile(TWICE[name], fullgraph=True, backend="aot_eager"))
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            assert_close(name, a, e, e.double())


@pytest.mark.parametrize("name,impl", [c for c in CALLS if c[1] != "torch"])
def test_first_gradients_are_the_kernels_with_a_graph_too(name, impl, device):
    tensors, options = moved(name, device)
    leaves = [tensors[n].requires_grad_() for n in floats(tensors)]
    run = lambda: total(op_of(name, impl, options)(**tensors))
    plain = torch.autograd.grad(run(), leaves)
    graph = torch.autograd.grad(run(), leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, graph, strict=True))


@pytest.mark.parametrize("name,impl", CALLS)
def test_gradients_under_checkpoint_are_the_same(name, impl, device):
    tensors, options = moved(name, device)
    leaves = [tensors[n].requires_grad_() for n in floats(tensors)]
    run = lambda: total(op_of(name, impl, options)(**tensors))
    plain = torch.autograd.grad(run(), leaves)
    checkpointed = torch.autograd.grad(checkpoint(run, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("name,impl", CALLS)
def test_torch_func_grad_of_grad(name, impl, device):
    tensors, options = moved(name, device)
    names = floats(tensors)

    def penalty(values):
        loss = lambda values: total(op_of(name, impl, options)(**{**tensors, **values}))
        return sum(g.square().sum() for g in func.grad(loss)(values).values())

    actual = func.grad(penalty)({n: tensors[n] for n in names})
    same = penalty_gradients(reference_of(name, options), tensors)
    gold = penalty_gradients(reference_of(name, options), in_fp64(tensors))
    for n in names:
        assert_close(n, actual[n], same[n], gold[n])


# One case for each kind of autograd function
TRANSFORMED = ["layer_norm-all", "glu", "ffn", "gated_ffn", "cross_entropy", "attention-window",
               "attention_varlen", "linear_cross_entropy", "masked_lm_loss", "rotary",
               "embedding"]  # fmt: skip


def along_first(run, tensors):
    """The first output as a function of the first floating-point tensor, and that tensor."""
    first = floats(tensors)[0]

    def along(x):
        outputs = run(**{**tensors, first: x})
        return outputs[0] if isinstance(outputs, tuple) else outputs

    return along, tensors[first]


@pytest.mark.parametrize("name,impl", [c for c in CALLS if c[0] in TRANSFORMED])
def test_vmap_and_jvp_are_right_or_refused(name, impl, device):
    tensors, options = moved(name, device)
    transforms = {
        "vmap": lambda fn, x: func.vmap(fn)(torch.stack([x, -x])),
        "jvp": lambda fn, x: func.jvp(fn, (x,), (x,))[1],
        "hvp": lambda fn, x: func.jvp(func.grad(lambda x: fn(x).sum()), (x,), (x,))[1],
    }
    run, reference = op_of(name, impl, options), reference_of(name, options)
    for kind, transform in transforms.items():
        if impl != "torch":
            with pytest.raises(NotImplementedError) as error:
                transform(*along_first(run, tensors))
            op = name.split("-")[0]
            assert str(error.value) == f"{op}: impl='{impl}' {TRANSFORM_REFUSAL}; use impl='torch'"
            continue
        actual, same, gold = (
            transform(*along_first(fn, inputs))
            for fn, inputs in (
                (run, tensors), (reference, tensors), (reference, in_fp64(tensors))
            )
        )  # fmt: skip
        assert_close(kind, actual, same, gold)


@pytest.mark.parametrize("name,impl", [c for c in CALLS if c[0] in TRANSFORMED])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_incoming_gradients(name, impl, create_graph, device):
    """What torch.autograd.functional.jacobian(vectorize=True) does."""
    tensors, options = moved(name, device)

    def batched(run, tensors):
        leaves = {n: x.detach().requires_grad_() for n, x in tensors.items() if n in names}
        incoming = torch.tensor([1.0, -2.0], device=device)
        out = run(**{**tensors, **leaves})
        out = out if isinstance(out, tuple) else (out,)
        out = sum((y * randn(*y.shape, device=device, seed=20).to(y)).sum() for y in out)
        return torch.autograd.grad(
            out, list(leaves.values()), incoming.to(out), is_grads_batched=True,
            create_graph=create_graph,
        )  # fmt: skip

    names = floats(tensors)
    run, reference = op_of(name, impl, options), reference_of(name, options)
    results = (
        batched(run, tensors),
        batched(reference, tensors),
        batched(reference, in_fp64(tensors)),
    )
    for n, *of_each in zip(names, *results, strict=True):
        assert_close(n, *of_each)


ANGLES = randn(3, 2, seed=30), randn(3, 2, seed=31)
ROWS = randn(2**17 // 24, 24, seed=32)  # with another row so many that RMSNorm goes by chunks
WIDE = randn(3, 2**20 // 3, seed=33)  # and so many logits that cross_entropy goes by blocks
# Of 24 elements, by the functions that a CPU alone has.
ON_A_CPU = {
    "rotary": lambda x: fastlm.rotary(x.view(1, 3, 2, 4), *ANGLES, impl="torch"),
    "rotary-interleaved": lambda x: fastlm.rotary(
        x.view(1, 3, 2, 4), *ANGLES, interleaved=True, impl="torch"
    ),
    "rms_norm": lambda x: fastlm.rms_norm(torch.cat([x[None], ROWS]), ROWS[0], impl="torch")[0],
    "rms_norm-bf16": lambda x: fastlm.rms_norm(
        torch.cat([x[None], ROWS]).bfloat16(), casting="llama", impl="torch"
    )[0],
    "layer_norm-bf16": lambda x: fastlm.layer_norm(x.view(3, 8).bfloat16(), impl="torch"),
    "linear_cross_entropy": lambda x: fastlm.linear_cross_entropy(
        x.view(3, 8), HEAD["weight"], TARGET["target"][0, :3], softcap=3.0, impl="torch"
    ),
    "cross_entropy": lambda x: fastlm.cross_entropy(
        torch.cat([x.view(3, 8), WIDE], 1), TARGET["target"][0, :3], impl="torch"
    ),
}


@pytest.mark.parametrize("name", ON_A_CPU)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functions_of_a_cpu_take_batched_gradients(name):
    """By torch.autograd.grad(is_grads_batched=True) and by torch.func.vmap, again and again."""
    x = randn(24, seed=34).requires_grad_()
    y = ON_A_CPU[name](x)
    incoming = randn(2, *y.shape, seed=35).to(y)
    pull = lambda g, **options: torch.autograd.grad(y, x, g, retain_graph=True, **options)[0]
    batched = pull(incoming, is_grads_batched=True), func.vmap(pull)(incoming)
    expected = torch.stack([pull(g) for g in incoming])
    for actual in batched:
        assert_close(name, actual, expected, expected.double())


def test_outputs_may_be_written_to(device):
    """Autograd forbids it for a view that an autograd function returns."""
    x, weight = randn(3, 8, device=device).requires_grad_(), randn(8, device=device)
    for run in (
        lambda: fastlm.layer_norm(x, weight, impl="triton"),
        lambda: fastlm.bias_act(x, activation="gelu", impl="triton"),
        lambda: fastlm.glu(x, x, impl="triton"),
    ):
        expected = torch.autograd.grad(run().mul(2).sum(), x)
        assert torch.equal(torch.autograd.grad(run().mul_(2).sum(), x)[0], expected[0])
