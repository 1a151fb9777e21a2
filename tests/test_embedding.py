"""embedding against F.embedding + F.layer_norm and the fp64 reference."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.reference.embedding import embedding as reference
from fastlm.testing import assert_close, check_against_reference, randn, with_layout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = 0x1234_5678_9ABC_DEF0
BATCH, SEQLEN, DIM = 3, 5, 12
PARTS = ("position", "type", "norm")


def embedding_inputs(dtype, device, parts=PARTS, *, given=True, norm_dtype=None):
    """Tables for `parts`; `given`: with explicit positions and types."""
    generator = torch.Generator().manual_seed(5)
    index = lambda n: torch.randint(0, n, (BATCH, SEQLEN), generator=generator).to(device)
    table = lambda rows, seed: randn(rows, DIM, dtype=dtype, device=device, seed=seed)
    inputs = {"ids": index(9), "token_weight": table(9, 1)}
    if "position" in parts:
        inputs["position_weight"] = table(8, 2)
        inputs["positions"] = index(8) if given else None
    if "type" in parts:
        inputs["type_weight"] = table(2, 3)
        inputs["type_ids"] = index(2) if given else None
    if "norm" in parts:
        norm_dtype = norm_dtype or dtype
        inputs["norm_weight"] = randn(DIM, dtype=norm_dtype, device=device, seed=4)
        inputs["norm_bias"] = randn(DIM, dtype=norm_dtype, device=device, seed=5)
    return inputs


SUBSETS = [c for n in range(4) for c in itertools.combinations(PARTS, n)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["given", "default"])
@pytest.mark.parametrize("parts", SUBSETS, ids="-".join)
def test_embedding_is_torch(parts, given, dtype, device):
    def gold(ids, token_weight, position_weight=None, positions=None, type_weight=None,
             type_ids=None, norm_weight=None, norm_bias=None):  # fmt: skip
        y = F.embedding(ids, token_weight)
        if position_weight is not None:
            default = torch.arange(SEQLEN, device=device)
            y = y + F.embedding(default if positions is None else positions, position_weight)
        if type_weight is not None:
            type_ids = torch.zeros_like(ids) if type_ids is None else type_ids
            y = y + F.embedding(type_ids, type_weight)
        if norm_weight is not None:
            y = F.layer_norm(y, (DIM,), norm_weight, norm_bias, 1e-12)
        return y

    check_against_reference(
        fastlm.embedding, gold, embedding_inputs(dtype, device, parts, given=given)
    )


@pytest.mark.parametrize("parts", SUBSETS, ids="-".join)
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_embedding_dropout(dropout_p, parts, device):
    inputs = embedding_inputs(torch.float32, device, parts)
    seed = torch.full((), SEED, device=device)
    check_against_reference(fastlm.embedding, reference, inputs, dropout_p=dropout_p, seed=seed)
    plain = fastlm.embedding(**inputs)
    dropped = fastlm.embedding(**inputs, dropout_p=dropout_p, seed=SEED)
    kept = dropped != 0
    assert kept.any() == (dropout_p < 1.0)
    torch.testing.assert_close(dropped[kept], (plain / (1 - dropout_p))[kept])


def test_embedding_is_hugging_face_bert(device):
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEmbeddings

    config = BertConfig(
        vocab_size=9, hidden_size=DIM, max_position_embeddings=8, num_attention_heads=1
    )
    module = BertEmbeddings(config).to(device).eval()
    ids = embedding_inputs(torch.float32, device, ())["ids"]
    types = torch.arange(BATCH * SEQLEN, device=device).view(BATCH, SEQLEN) % 2
    y = fastlm.embedding(
        ids,
        module.word_embeddings.weight,
        position_weight=module.position_embeddings.weight,
        type_ids=types,
        type_weight=module.token_type_embeddings.weight,
        norm_weight=module.LayerNorm.weight,
        norm_bias=module.LayerNorm.bias,
        eps=module.LayerNorm.eps,
    )
    assert_close("y", y, module(ids, types), module.double()(ids, types))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_dtype", DTYPES, ids=str)
def test_embedding_mixed_dtypes(norm_dtype, dtype, device):
    inputs = embedding_inputs(dtype, device, norm_dtype=norm_dtype)
    inputs["position_weight"] = inputs["position_weight"].to(norm_dtype)
    check_against_reference(fastlm.embedding, reference, inputs)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(SEQLEN,), (BATCH, SEQLEN), (1, BATCH, SEQLEN)], ids=str)
def test_embedding_index_forms_are_bitwise_equal(shape, index_dtype, device):
    inputs = embedding_inputs(torch.float32, device)
    row = torch.arange(SEQLEN, device=device)
    y = fastlm.embedding(**{**inputs, "positions": None, "type_ids": None})
    inputs["ids"] = inputs["ids"][: torch.Size(shape[:-1]).numel()].view(shape).to(index_dtype)
    y = y[: torch.Size(shape[:-1]).numel()].view(*shape, DIM)
    for positions, types in ((row, row * 0), (row.expand(shape), torch.zeros_like(inputs["ids"]))):
        inputs |= {"positions": positions.to(index_dtype), "type_ids": types.to(index_dtype)}
        assert torch.equal(fastlm.embedding(**inputs), y)


def test_embedding_gradcheck():
    inputs = embedding_inputs(torch.float64, "cpu")
    ids = {n: t for n, t in inputs.items() if not t.is_floating_point()}
    names, tensors = zip(*((n, t) for n, t in inputs.items() if n not in ids), strict=True)
    fn = lambda *ts: reference(
        **ids, **dict(zip(names, ts, strict=True)), dropout_p=0.4, seed=torch.tensor(SEED)
    )
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(fn, tensors)
    assert torch.autograd.gradgradcheck(fn, tensors)


@pytest.mark.parametrize("layout", ["transposed", "last_stride_2", "packed", "offset_1"])
@pytest.mark.parametrize("what", ["ids", "positions", "token_weight", "position_weight"])
def test_embedding_layouts_are_bitwise_equal(what, layout, device):
    inputs = embedding_inputs(torch.float32, device)
    y = fastlm.embedding(**inputs)
    inputs[what] = with_layout(inputs[what], layout)
    assert torch.equal(fastlm.embedding(**inputs), y)


def test_embedding_expanded_gradient(device):
    inputs = embedding_inputs(torch.float32, device, ())
    weight = inputs["token_weight"].requires_grad_()
    fastlm.embedding(**inputs).sum().backward()
    counts = torch.bincount(inputs["ids"].flatten(), minlength=9)
    assert torch.equal(weight.grad, counts[:, None].expand(9, DIM).float())


def test_embedding_twice_and_inputs_unmodified(device):
    inputs = embedding_inputs(torch.float32, device)
    before = {n: t.clone() for n, t in inputs.items()}
    leaves = [t.requires_grad_() for t in inputs.values() if t.is_floating_point()]
    y = fastlm.embedding(**inputs, dropout_p=0.2, seed=SEED)
    dy = randn(*y.shape, device=device)
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(inputs[n], before[n]) for n in before)


def test_embedding_seed(device):
    inputs = embedding_inputs(torch.float32, device)
    drop = lambda seed=None: fastlm.embedding(**inputs, dropout_p=0.5, seed=seed)
    assert torch.equal(drop(SEED), drop(torch.full((), SEED, device=device)))
    assert not torch.equal(drop(1), drop(2))
    torch.manual_seed(7)
    drawn = [drop(), drop()]
    torch.manual_seed(7)
    assert torch.equal(drop(), drawn[0]) and not torch.equal(*drawn)


@pytest.mark.parametrize("frozen", ["token_weight", "position_weight", "norm_weight"])
def test_embedding_frozen_inputs(frozen, device):
    inputs = embedding_inputs(torch.float32, device)
    check_against_reference(fastlm.embedding, reference, inputs, frozen=(frozen,))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)], ids=str)
def test_embedding_empty(shape, device):
    inputs = embedding_inputs(torch.float32, device, given=False)
    inputs["ids"] = torch.zeros(shape, dtype=torch.int64, device=device)
    weight = inputs["token_weight"].requires_grad_()
    y = fastlm.embedding(**inputs, dropout_p=0.1)
    y.sum().backward()
    assert y.shape == (*shape, DIM) and not weight.grad.any()


def test_embedding_no_grad_saves_nothing(device):
    inputs = embedding_inputs(torch.float32, device)
    inputs["token_weight"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            y = fastlm.embedding(**inputs, dropout_p=0.1)
    assert not saved and not y.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_autocast_keeps_the_dtype(dtype, device):
    inputs = embedding_inputs(dtype, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = fastlm.embedding(**inputs)
    assert y.dtype == dtype and torch.equal(y, fastlm.embedding(**inputs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_embedding_compiles_fullgraph(dynamic, device):
    inputs = embedding_inputs(torch.float32, device)
    ids = {n: t for n, t in inputs.items() if not t.is_floating_point()}
    leaves = {n: t.requires_grad_() for n, t in inputs.items() if n not in ids}

    def fn(ids, leaves):
        # Philox traced with symbolic shapes takes most of the test's time, and shows nothing more.
        y = fastlm.embedding(**ids, **leaves, dropout_p=0.0 if dynamic else 0.25, seed=SEED)
        alone = fastlm.embedding(ids["ids"], leaves["token_weight"])
        return (y * alone).sum()

    expected = torch.autograd.grad(fn(ids, leaves), list(leaves.values()))
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual = torch.autograd.grad(compiled(ids, leaves), list(leaves.values()))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["ids", "positions", "type_ids"])
def test_embedding_index_outside_raises_on_cpu(name):
    inputs = embedding_inputs(torch.float32, "cpu")
    inputs[name][0, 0] = 9
    with pytest.raises(IndexError, match="out of range"):
        fastlm.embedding(**inputs)


def test_embedding_explain(device):
    explanation = fastlm.explain("embedding", **embedding_inputs(torch.float32, device))
    assert explanation.chosen == "torch"
    assert explanation.reasons["triton"] == "fastlm has no triton kernel for embedding"


IDS, WEIGHT = torch.zeros(2, 5, dtype=torch.int64), torch.ones(9, 4)


@pytest.mark.parametrize("change,message", [
    ({"ids": [1]}, "ids must be a tensor, got list"),
    ({"ids": torch.ones(2, 5)},
     "ids must have dtype torch.int64 or torch.int32, got torch.float32"),
    ({"ids": torch.tensor(1)}, "ids must have shape (..., seqlen), got ()"),
    ({"token_weight": IDS}, "token_weight must have a floating-point dtype, got torch.int64"),
    ({"token_weight": torch.ones(4)},
     "token_weight must have shape (rows, dim) = (at least 1, *), got (4,)"),
    ({"token_weight": WEIGHT.to("meta")},
     "token_weight must be on the device of the first input, cpu, got meta"),
    ({"position_weight": torch.ones(9, 5)},
     "position_weight must have shape (rows, dim) = (at least 1, 4), got (9, 5)"),
    ({"position_weight": WEIGHT[:4]}, "position_weight must have at least seqlen = 5 rows, got 4"),
    ({"positions": IDS}, "position_weight must be given with positions, got None"),
    ({"type_ids": IDS}, "type_weight must be given with type_ids, got None"),
    ({"type_weight": WEIGHT, "type_ids": IDS[:1]},
     "type_ids must have the shape of ids or its last dimension, (2, 5), got (1, 5)"),
    ({"norm_weight": torch.ones(5)}, "norm_weight must have shape (dim,) = (4,), got (5,)"),
    ({"norm_bias": torch.ones(4)}, "norm_weight must be given with norm_bias, got None"),
    ({"dropout_p": 2}, "dropout_p must be a number from 0 to 1, got 2"),
    ({"dropout_p": 0.5, "seed": "a"},
     "seed must be an int or an int64 tensor of one element, got str"),
    ({"impl": "triton"}, "fastlm has no triton kernel for embedding; use impl='torch'"),
])  # fmt: skip
def test_embedding_errors(change, message):
    with pytest.raises(
        (TypeError, ValueError, NotImplementedError), match=re.escape(f"embedding: {message}")
    ):
        fastlm.embedding(**{"ids": IDS, "token_weight": WEIGHT, **change})
