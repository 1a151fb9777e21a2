"""masked_lm_loss and next_sentence_loss against the fp64 reference and torch."""

import re

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.kernels import linear_loss
from fastlm.reference import loss as reference
from fastlm.reference.ffn import ACTIVATIONS
from fastlm.testing import (
    LAYOUTS,
    check_against_reference,
    check_over_draws,
    nan_filled_empty,
    randn,
    with_layout,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
IMPLS = ["triton", "torch"]
EVERY = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0, "eps": 1e-5}
PARAMETERS = ("dense_weight", "dense_bias", "norm_weight", "norm_bias", "decoder_weight",
              "decoder_bias")  # fmt: skip


def head_inputs(tokens, dim, width, vocab, dtype, device, ignored=-100):
    """Hidden states, labels of every third, and BERT's head."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.arange(tokens) % 3 != 0] = ignored
    new = lambda *shape, seed, scale=1.0: randn(
        *shape, dtype=dtype, device=device, seed=seed, scale=scale
    )
    return {
        "hidden": new(tokens, dim, seed=2),
        "labels": labels.to(device),
        "dense_weight": new(width, dim, seed=3, scale=dim**-0.5),
        "dense_bias": new(width, seed=4),
        "norm_weight": new(width, seed=5),
        "norm_bias": new(width, seed=6),
        "decoder_weight": new(vocab, width, seed=7, scale=3 * width**-0.5),
        "decoder_bias": new(vocab, seed=8),
    }


def run_oracle(impl, inputs, gold=reference.masked_lm_loss, frozen=(), **options):
    def loss(**kwargs):
        return fastlm.masked_lm_loss(**kwargs, impl=impl)

    hidden = inputs["hidden"]
    # Of few numbers in fp32 the reference may be right by luck.
    many = 16 if hidden.dtype == torch.float32 and hidden.numel() < 100 else 1
    redraw = lambda seed: randn(*hidden.shape, device=hidden.device, seed=seed)
    draws = [inputs, *({**inputs, "hidden": redraw(20 + i)} for i in range(1, many))]
    with nan_filled_empty():
        return check_over_draws(loss, gold, draws, frozen=frozen, **options)


def gradients(impl, inputs, **options):
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items() if t.is_floating_point()}
    loss = fastlm.masked_lm_loss(**{**inputs, **leaves}, impl=impl, **options)
    return loss, *torch.autograd.grad(loss.sum(), list(leaves.values()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 13, 24, 31), (67, 32, 16, 130)], ids=str)
def test_masked_lm_shapes(shape, dtype, impl, device):
    run_oracle(impl, head_inputs(*shape, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2048, 768, 768, 30522), (1000, 1024, 1020, 5001)], ids=str)
def test_masked_lm_shapes_large(shape, dtype, device):
    run_oracle("triton", head_inputs(*shape, dtype, device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_lm_options(dtype, reduction, impl, device):
    run_oracle(impl, head_inputs(9, 8, 23, 11, dtype, device), reduction=reduction, **EVERY)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_masked_lm_activations(activation, impl, device):
    run_oracle(impl, head_inputs(9, 8, 23, 11, torch.float32, device), activation=activation)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("option", ["ignore_index", "no_decoder_bias", "int32"])
def test_masked_lm_other_arguments(option, impl, device):
    ignored = 3 if option == "ignore_index" else -100
    inputs = head_inputs(9, 8, 23, 11, torch.float32, device, ignored)
    if option == "no_decoder_bias":
        del inputs["decoder_bias"]
    if option == "int32":
        inputs["labels"] = inputs["labels"].int()
    run_oracle(impl, inputs, ignore_index=ignored)


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_lm_is_the_modules_of_torch(impl, device):
    def gold(hidden, labels, dense_weight, dense_bias, norm_weight, norm_bias, decoder_weight,
             decoder_bias):  # fmt: skip
        h = F.gelu(F.linear(hidden, dense_weight, dense_bias))
        h = F.layer_norm(h, norm_weight.shape, norm_weight, norm_bias, 1e-12)
        return F.cross_entropy(F.linear(h, decoder_weight, decoder_bias), labels)

    run_oracle(impl, head_inputs(9, 8, 23, 11, torch.float32, device), gold)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wide", ["hidden", "norm_weight", "decoder_weight"])
def test_masked_lm_mixed_dtypes(wide, impl, device):
    inputs = head_inputs(9, 8, 23, 11, torch.bfloat16, device)
    inputs[wide] = inputs[wide].float()
    run_oracle(impl, inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_lm_leading_dimensions(impl, device):
    inputs = head_inputs(6, 8, 23, 11, torch.float32, device)
    inputs["hidden"], inputs["labels"] = inputs["hidden"].view(2, 3, 8), inputs["labels"].view(2, 3)
    for reduction in ("mean", "none"):
        run_oracle(impl, inputs, reduction=reduction)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_lm_rows_without_a_label_are_not_computed(reduction, impl, device):
    inputs = head_inputs(40, 8, 23, 11, torch.float32, device)
    unmasked = inputs["labels"] == -100
    clean = gradients(impl, inputs, reduction=reduction)
    inputs["hidden"] = inputs["hidden"].masked_fill(unmasked[:, None], torch.nan)
    dirty = gradients(impl, inputs, reduction=reduction)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not dirty[1][unmasked].any() and dirty[1][~unmasked].all(1).all()


@pytest.mark.interpreter
def test_masked_lm_gathers_on_the_cpu(monkeypatch):
    rows, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: rows.append(len(x)) or linear(x, *rest))
    fastlm.masked_lm_loss(**head_inputs(90, 8, 6, 11, torch.float32, "cpu"))
    assert rows == [30, 30]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_masked_lm_of_nothing_is_zero(tokens, reduction, impl, device):
    inputs = head_inputs(tokens, 8, 6, 11, torch.float32, device)
    inputs["labels"].fill_(-100)
    with nan_filled_empty():
        loss, *grads = gradients(impl, inputs, reduction=reduction)
    assert loss.shape == ((tokens,) if reduction == "none" else ())
    assert not loss.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["hidden", "labels", "dense_weight", "norm_weight"])
def test_masked_lm_layouts_are_bitwise_equal(what, layout, device):
    inputs = head_inputs(8, 8, 6, 11, torch.float32, device)
    if layout == "expanded":
        inputs[what] = inputs[what][:1].repeat_interleave(len(inputs[what]), 0)
    expected = gradients("triton", inputs)
    actual = gradients("triton", {**inputs, what: with_layout(inputs[what], layout)})
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_lm_twice_and_inputs_unmodified(reduction, impl, device):
    inputs = head_inputs(9, 8, 23, 11, torch.float32, device)
    before = {n: t.clone() for n, t in inputs.items()}
    leaves = [t.requires_grad_() for t in inputs.values() if t.is_floating_point()]
    loss = fastlm.masked_lm_loss(**inputs, reduction=reduction, impl=impl).sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(inputs[n], before[n]) for n in before)


@pytest.mark.parametrize("trained", ["hidden", *PARAMETERS])
@pytest.mark.parametrize("impl", IMPLS)
def test_masked_lm_frozen_inputs(trained, impl, device):
    inputs = head_inputs(9, 8, 23, 11, torch.float32, device)
    run_oracle(impl, inputs, frozen={"hidden", *PARAMETERS} - {trained})


def test_masked_lm_frozen_decoder_costs_nothing(monkeypatch, device):
    inputs = head_inputs(9, 8, 23, 11, torch.float32, device)
    inputs["hidden"].requires_grad_()
    monkeypatch.setattr(linear_loss, "rows_outer", None)
    monkeypatch.setattr(linear_loss, "column_sum", None)
    fastlm.masked_lm_loss(**inputs, impl="triton").backward()
    assert inputs["hidden"].grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_lm_no_grad_saves_nothing(impl, device):
    inputs = head_inputs(9, 8, 23, 11, torch.float32, device)
    inputs["decoder_weight"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            loss = fastlm.masked_lm_loss(**inputs, impl=impl)
    assert not saved and not loss.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_lm_autocast(dtype, impl, device):
    # Fp32 results of bf16 products leave the bound no room, and eager rounds the activation too, so
    # that errors are other draws: of many numbers their maxima agree, of a few sums they need not.
    inputs = head_inputs(240, 8, 64, 40, dtype, device)

    def under_autocast(fn):
        def wrapped(**kw):
            lower = kw["hidden"].dtype != torch.float64
            with torch.autocast(device, dtype=torch.bfloat16, enabled=lower):
                return fn(**kw)

        return wrapped

    def eager(hidden, labels, dense_weight, dense_bias, norm_weight, norm_bias, decoder_weight,
              decoder_bias):  # fmt: skip
        h = F.gelu(F.linear(hidden, dense_weight, dense_bias)).to(norm_weight.dtype)
        h = F.layer_norm(h, norm_weight.shape, norm_weight, norm_bias, 1e-12)
        logits = F.linear(h, decoder_weight, decoder_bias)
        return F.cross_entropy(logits, labels, reduction="none")

    vectors = ("dense_bias", "norm_weight", "norm_bias", "decoder_bias")
    fused = lambda **kw: fastlm.masked_lm_loss(**kw, reduction="none", impl=impl)
    check_against_reference(under_autocast(fused), under_autocast(eager), inputs, frozen=vectors)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_masked_lm_compiles_fullgraph(dynamic, impl, device):
    inputs = head_inputs(9, 8, 23, 11, torch.float32, device)
    labels = inputs.pop("labels")
    leaves = [t.requires_grad_() for t in inputs.values()]

    def fn(hidden, *parameters):
        *head, decoder_bias = parameters
        options = {"decoder_bias": decoder_bias, "impl": impl}
        mean = fastlm.masked_lm_loss(hidden, labels, *head, **options)
        rows = fastlm.masked_lm_loss(hidden, labels, *head, reduction="none", **options)
        return mean + rows.square().sum()

    expected = torch.autograd.grad(fn(*leaves), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*leaves), leaves)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e) if impl == "triton" else torch.allclose(a, e, atol=1e-5)


def test_masked_lm_opcheck(device):
    hidden, labels, *head, _, _ = head_inputs(9, 8, 23, 11, torch.float32, device).values()
    fwd = (hidden, labels, *head, torch.float32, "gelu", 1e-5, -100)
    # Without the comparison of values: rows behind the last masked one are whatever was there.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastlm.masked_transform_fwd.default, fwd, test_utils=tests)
    y, _, *kept = torch.ops.fastlm.masked_transform_fwd(*fwd)
    bwd = (y, hidden, head[0], head[2], *kept, "gelu", True, True)
    torch.library.opcheck(torch.ops.fastlm.masked_transform_bwd.default, bwd)


@pytest.mark.gpu
def test_masked_lm_waits_for_nothing_and_goes_into_a_graph(device):
    inputs = head_inputs(300, 96, 64, 500, torch.bfloat16, device)
    gradients("triton", inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients("triton", inputs, reduction="none")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_next_sentence(impl, dtype, reduction, pooler, device):
    new = lambda *shape, seed: randn(*shape, dtype=dtype, device=device, seed=seed)
    inputs = {
        "hidden": new(5, 3, 8, seed=1) if pooler else new(5, 8, seed=1),
        "labels": torch.tensor([0, 1, -100, 1, 0], device=device),
        "weight": new(2, 8, seed=2),
        "bias": new(2, seed=3),
    }
    if pooler:
        inputs |= {"pooler_weight": new(8, 8, seed=4), "pooler_bias": new(8, seed=5)}
    check_against_reference(
        lambda **kw: fastlm.next_sentence_loss(
            **kw, impl="torch" if kw["hidden"].dtype == torch.float64 else impl
        ),
        reference.next_sentence_loss, inputs, reduction=reduction, label_smoothing=0.1,
    )  # fmt: skip


def test_next_sentence_autocast(device):
    hidden, weight = randn(4, 3, 8, device=device), randn(2, 8, device=device, seed=1)
    labels = torch.tensor([0, 1, 1, -100], device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = fastlm.next_sentence_loss(
            hidden, labels, weight, pooler_weight=randn(8, 8).to(device)
        )
    assert loss.dtype == torch.float32


LABELS = torch.zeros(2, dtype=torch.int64)
HEAD = {"hidden": torch.ones(2, 4), "labels": LABELS, "dense_weight": torch.ones(3, 4),
        "dense_bias": torch.ones(3), "norm_weight": torch.ones(3), "norm_bias": torch.ones(3),
        "decoder_weight": torch.ones(8, 3)}  # fmt: skip


FIRST = "triton" if torch.cuda.is_available() else "torch"  # of the backends


@pytest.mark.parametrize("change,message", [
    ({"hidden": LABELS}, "hidden must have a floating-point dtype, got torch.int64"),
    ({"hidden": torch.ones(())}, "hidden must have shape (..., dim), got ()"),
    ({"dense_weight": torch.ones(3, 5)},
     "dense_weight must have shape (width, dim) = (at least 1, 4), got (3, 5)"),
    ({"dense_bias": torch.ones(4)}, "dense_bias must have shape (width,) = (3,), got (4,)"),
    ({"norm_bias": None}, "norm_bias must be a tensor, got NoneType"),
    ({"decoder_weight": torch.ones(8, 4)},
     "decoder_weight must have shape (vocab, width) = (at least 1, 3), got (8, 4)"),
    ({"decoder_bias": torch.ones(3)}, "decoder_bias must have shape (vocab,) = (8,), got (3,)"),
    ({"labels": torch.zeros(3, dtype=torch.int64)},
     "labels must have shape (...) of hidden (..., dim) = (2,), got (3,)"),
    ({"labels": LABELS.float()},
     "labels must have dtype torch.int64 or torch.int32, got torch.float32"),
    ({"activation": "tanh"}, "activation must be one of 'gelu', 'gelu_tanh', 'relu', 'relu2', "
     "'silu', 'quick_gelu', got 'tanh'"),
    ({"eps": -1e-5}, "eps must be a number of at least 0, got -1e-05"),
    ({"eps": None}, "eps must be a number of at least 0, got NoneType"),
    ({"reduction": "max"}, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
    ({"impl": "cuda"}, f"fastlm has no cuda kernel for masked_lm_loss; use impl='{FIRST}'"),
    ({"dense_weight": torch.ones(8200, 4), "dense_bias": torch.ones(8200),
      "norm_weight": torch.ones(8200), "norm_bias": torch.ones(8200),
      "decoder_weight": torch.ones(2, 8200), "impl": "triton"},
     "impl='triton' is written for widths up to 8192, and has no kernel for 8200; "
     "use impl='torch'"),
])  # fmt: skip
def test_masked_lm_errors(change, message, device):
    call = {**HEAD, **change}
    if "impl" in change:  # kernels ask for the device first
        call = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in call.items()}
    errors = (TypeError, ValueError, NotImplementedError)
    with pytest.raises(errors, match=re.escape(f"masked_lm_loss: {message}")):
        fastlm.masked_lm_loss(**call)


@pytest.mark.parametrize("change,message", [
    ({"hidden": torch.ones(2, 3, 4)}, "hidden must have shape (batch, dim), got (2, 3, 4)"),
    ({"pooler_weight": torch.ones(4, 4)},
     "hidden must have shape (batch, seqlen, dim), got (2, 4)"),
    ({"pooler_bias": torch.ones(4)},
     "pooler_bias must be None without a pooler_weight, got a tensor"),
    ({"weight": torch.ones(2, 3)},
     "weight must have shape (classes, dim) = (at least 1, 4), got (2, 3)"),
    ({"bias": torch.ones(3)}, "bias must have shape (classes,) = (2,), got (3,)"),
    ({"labels": torch.zeros(3, dtype=torch.int64)},
     "labels must have shape (batch,) = (2,), got (3,)"),
    ({"labels": LABELS.float()},
     "labels must have dtype torch.int64 or torch.int32, got torch.float32"),
    ({"labels": [0, 1]}, "labels must be a tensor, got list"),
    ({"reduction": "max"}, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
    ({"label_smoothing": 2}, "label_smoothing must be a number from 0 to 1, got 2"),
    ({"ignore_index": "a"}, "ignore_index must be an int, got str"),
    ({"impl": "x"}, "impl must be None, 'cuda', 'triton' or 'torch', got 'x'"),
    ({"impl": "cuda"}, "fastlm has no cuda kernel for next_sentence_loss; use impl='torch'"),
])  # fmt: skip
def test_next_sentence_errors(change, message):
    call = {"hidden": torch.ones(2, 4), "labels": LABELS, "weight": torch.ones(2, 4)}
    errors = (TypeError, ValueError, NotImplementedError)
    with pytest.raises(errors, match=re.escape(f"next_sentence_loss: {message}")):
        fastlm.next_sentence_loss(**{**call, **change})


def test_next_sentence_computes_nothing_before_its_checks(monkeypatch):
    never = lambda *args: pytest.fail("computed")
    monkeypatch.setattr(torch.nn.functional, "linear", never)
    with pytest.raises(ValueError, match="^next_sentence_loss: reduction must be"):
        fastlm.next_sentence_loss(torch.ones(2, 4), LABELS, torch.ones(2, 4), reduction="x")
    assert (
        fastlm.explain("next_sentence_loss", torch.ones(2, 4), LABELS, torch.ones(2, 4)).op
        == "next_sentence_loss"
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_lm_without_features(impl, device):
    """Hidden states of no column: what the biases make of them."""
    call = {n: x.to(device).clone() for n, x in HEAD.items()}
    call |= {"hidden": call["hidden"][:, :0], "dense_weight": call["dense_weight"][:, :0]}
    leaves = [x.requires_grad_() for x in call.values() if x.is_floating_point()]
    loss = fastlm.masked_lm_loss(**call, impl=impl)
    assert loss.shape == () and loss.isfinite()
    grads = torch.autograd.grad(loss, leaves)
    assert [g.shape for g in grads] == [x.shape for x in leaves]


@pytest.mark.interpreter
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("outside", [-1, 8])
def test_label_outside_raises_on_cpu(outside, reduction):
    labels = torch.tensor([-100, outside])
    for options in ({}, {"z_loss": 0.1}):  # two ways through the logits
        message = f"^masked_lm_loss: labels must be ignore_index or from 0 to 7, got {outside}$"
        with pytest.raises(IndexError, match=message):
            fastlm.masked_lm_loss(**{**HEAD, "labels": labels}, reduction=reduction, **options)
    message = f"^next_sentence_loss: labels must be ignore_index or from 0 to 1, got {outside}$"
    with pytest.raises(IndexError, match=message):
        fastlm.next_sentence_loss(torch.ones(2, 4), labels, torch.ones(2, 4), reduction=reduction)
