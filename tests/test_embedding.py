"""embedding against F.embedding + F.layer_norm and the fp64 reference."""

import itertools
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.reference.embedding import embedding as reference
from fastlm.shapes import EMBEDDING_LARGE
from fastlm.testing import (
    assert_close,
    check_against_reference,
    nan_filled_empty,
    randn,
    with_layout,
)

IMPLS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = 0x1234_5678_9ABC_DEF0
BATCH, SEQLEN, DIM = 3, 5, 12
PARTS = ("position", "type", "norm")


def run_oracle(fn, gold, inputs, **options):
    with nan_filled_empty():
        check_against_reference(fn, gold, inputs, **options)


def embedding_inputs(dtype, device, parts=PARTS, *, given=True, norm_dtype=None, dim=DIM):
    """Tables for `parts`; `given`: with explicit positions and types."""
    generator = torch.Generator().manual_seed(5)
    index = lambda n: torch.randint(0, n, (BATCH, SEQLEN), generator=generator).to(device)
    table = lambda rows, seed: randn(rows, dim, dtype=dtype, device=device, seed=seed)
    inputs = {"ids": index(9), "token_weight": table(9, 1)}
    if "position" in parts:
        inputs["position_weight"] = table(8, 2)
        inputs["positions"] = index(8) if given else None
    if "type" in parts:
        inputs["type_weight"] = table(2, 3)
        inputs["type_ids"] = index(2) if given else None
    if "norm" in parts:
        norm_dtype = norm_dtype or dtype
        inputs["norm_weight"] = randn(dim, dtype=norm_dtype, device=device, seed=4)
        inputs["norm_bias"] = randn(dim, dtype=norm_dtype, device=device, seed=5)
    return inputs


SUBSETS = [c for n in range(4) for c in itertools.combinations(PARTS, n)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["given", "default"])
@pytest.mark.parametrize("parts", SUBSETS, ids="-".join)
def test_embedding_is_torch(parts, given, dtype, impl, device):
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

    run_oracle(
        partial(fastlm.embedding, impl=impl),
        gold,
        embedding_inputs(dtype, device, parts, given=given),
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("parts", SUBSETS, ids="-".join)
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_embedding_dropout(dropout_p, parts, impl, device):
    inputs = embedding_inputs(torch.float32, device, parts)
    seed = torch.full((), SEED, device=device)
    run_oracle(
        partial(fastlm.embedding, impl=impl), reference, inputs, dropout_p=dropout_p, seed=seed
    )
    plain = fastlm.embedding(**inputs, impl=impl)
    dropped = fastlm.embedding(**inputs, dropout_p=dropout_p, seed=SEED, impl=impl)
    kept = dropped != 0
    assert kept.any() == (dropout_p < 1.0)
    torch.testing.assert_close(dropped[kept], (plain / (1 - dropout_p))[kept])


@pytest.mark.parametrize("impl", IMPLS)
def test_embedding_is_hugging_face_bert(impl, device):
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
        impl=impl,
    )
    assert_close("y", y, module(ids, types), module.double()(ids, types))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_dtype", DTYPES, ids=str)
def test_embedding_mixed_dtypes(norm_dtype, dtype, impl, device):
    inputs = embedding_inputs(dtype, device, norm_dtype=norm_dtype)
    inputs["position_weight"] = inputs["position_weight"].to(norm_dtype)
    run_oracle(partial(fastlm.embedding, impl=impl), reference, inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "dim,dropout_p", [(1, 0.3), (17, 0.0), (17, 0.3), (256, 0.3), (1030, 0.0), (8200, 0.3)]
)
def test_embedding_dims(dim, dropout_p, dtype, impl, device):
    inputs = embedding_inputs(dtype, device, dim=dim)
    if dim > 1000:  # the interpreter takes long
        inputs |= {n: inputs[n][:1] for n in ("ids", "positions", "type_ids")}
    seed = torch.full((), SEED, device=device) if dropout_p else None
    embed = partial(fastlm.embedding, impl=impl)
    # One column has variance 0: with BERT's eps it would be multiplied by a million.
    options = {"dropout_p": dropout_p, "seed": seed, "eps": 1e-12 if dim > 1 else 1e-3}
    run_oracle(embed, reference, inputs, **options)
    if dim == 17 or (dim == 8200 and dtype == torch.float32):
        plain = {n: t for n, t in inputs.items() if not n.startswith("norm")}
        run_oracle(embed, reference, plain, **options)
        frozen = tuple(n for n, t in inputs.items() if "norm" not in n and t.is_floating_point())
        run_oracle(embed, reference, inputs, **options, frozen=frozen)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EMBEDDING_LARGE)
def test_embedding_shapes_large(shape, dtype, impl, device):
    s = EMBEDDING_LARGE[shape]
    index = lambda n, shape: torch.randint(n, shape).to(device)
    table = lambda rows, seed: randn(rows, s.dim, dtype=dtype, device=device, seed=seed)
    ids = index(s.vocab, (s.batch, s.seqlen))
    inputs = {
        "ids": torch.where(torch.rand(ids.shape).to(device) < 0.5, 0, ids),  # half are padding
        "token_weight": table(s.vocab, 1),
        "position_weight": table(s.max_seqlen, 2),
        "type_ids": index(2, ids.shape),
        "type_weight": table(2, 3),
        "norm_weight": table(1, 4)[0],
        "norm_bias": table(1, 5)[0],
    }
    seed = torch.full((), SEED, device=device)
    embed = partial(fastlm.embedding, impl=impl)
    run_oracle(embed, reference, inputs, dropout_p=0.1, seed=seed)


@pytest.mark.parametrize("impl", IMPLS)
def test_embedding_mean_of_ten_thousand_deviations(impl, device):
    for dim in (48, 8200):
        inputs = embedding_inputs(torch.float32, device, dim=dim)
        inputs |= {n: inputs[n][:1] for n in ("ids", "positions", "type_ids")}
        inputs["token_weight"] = inputs["token_weight"] + 1e4
        expected = reference
        if impl == "torch":  # whose LayerNorm is torch's own, and as exact as that
            expected = lambda norm_weight, norm_bias, **kw: F.layer_norm(
                reference(**kw), norm_weight.shape, norm_weight, norm_bias, 1e-12
            )
        run_oracle(partial(fastlm.embedding, impl=impl), expected, inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_embedding_padding_idx_is_torchs(padding_idx, norm, dtype, impl, device):
    inputs = embedding_inputs(dtype, device, PARTS if norm else ())
    inputs["ids"][:, 2:] = padding_idx % 9
    gold = lambda ids, token_weight: F.embedding(ids, token_weight, padding_idx)
    embed = partial(fastlm.embedding, impl=impl, padding_idx=padding_idx)
    if not norm:
        run_oracle(embed, gold, inputs)
    run_oracle(embed, partial(reference, padding_idx=padding_idx), inputs)
    weight = inputs["token_weight"].requires_grad_()
    y = embed(**inputs)
    plain = fastlm.embedding(**inputs, impl=impl)
    assert torch.equal(y, plain)
    dy = randn(*y.shape, dtype=dtype, device=device)
    (grad,), (full,) = (torch.autograd.grad(out, weight, dy) for out in (y, plain))
    assert not grad[padding_idx].any() and full[padding_idx].any()
    full[padding_idx] = 0
    assert torch.equal(grad, full)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["batch", "row", "default"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_long_segments(dtype, form, impl, device):
    """Half of the tokens are one, positions come again in each sequence, and there are two types;
    some ids have no token. Segments begin and end in every place of a chunk."""
    generator = torch.Generator().manual_seed(11)
    index = lambda n, *shape: torch.randint(0, n, shape, generator=generator).to(device)
    ids = index(13, 6, 37)
    shape = (6, 37) if form == "batch" else (37,)
    given = form != "default"
    inputs = {
        "ids": torch.where(index(2, 6, 37) > 0, 4, ids),
        "token_weight": randn(16, 20, dtype=dtype, device=device, seed=1),
        "positions": index(40, *shape) if given else None,
        "position_weight": randn(40, 20, dtype=dtype, device=device, seed=2),
        "type_ids": index(2, *shape) if given else None,
        "type_weight": randn(3, 20, dtype=dtype, device=device, seed=3),
    }
    run_oracle(partial(fastlm.embedding, impl=impl), reference, inputs)


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9, 33])
@pytest.mark.parametrize("cols", [1, 1100])
def test_segment_sum(rows, cols, impl, device):
    """Every way in which segments of 1 to all rows lie in chunks; ids outside belong to no row."""
    from fastlm.kernels.segments import segment_sum

    x = torch.arange(1, rows + 1, device=device, dtype=torch.float32)[:, None].expand(rows, cols)
    lengths = range(1, rows + 1) if rows < 10 else (3, 5, 13, rows)
    patterns = [torch.arange(rows) // n for n in lengths]
    patterns += [torch.arange(rows) % n - 1 for n in range(1, 5)]
    for ids in (p.to(device) for p in patterns):
        for skip in (-1, 1):
            with nan_filled_empty():
                out = segment_sum(x.contiguous(), ids, 3, torch.float32, skip)
            want = [x[ids == v].sum(0) * (v != skip) for v in range(3)]
            assert torch.equal(out, torch.stack(want))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(SEQLEN,), (BATCH, SEQLEN), (1, BATCH, SEQLEN)], ids=str)
def test_embedding_index_forms_are_bitwise_equal(shape, index_dtype, impl, device):
    inputs = embedding_inputs(torch.float32, device)
    row = torch.arange(SEQLEN, device=device)
    y = fastlm.embedding(**{**inputs, "positions": None, "type_ids": None}, impl=impl)
    inputs["ids"] = inputs["ids"][: torch.Size(shape[:-1]).numel()].view(shape).to(index_dtype)
    y = y[: torch.Size(shape[:-1]).numel()].view(*shape, DIM)
    for positions, types in ((row, row * 0), (row.expand(shape), torch.zeros_like(inputs["ids"]))):
        inputs |= {"positions": positions.to(index_dtype), "type_ids": types.to(index_dtype)}
        assert torch.equal(fastlm.embedding(**inputs, impl=impl), y)


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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["transposed", "last_stride_2", "packed", "offset_1"])
@pytest.mark.parametrize(
    "what", ["ids", "positions", "type_ids", "token_weight", "position_weight", "norm_weight", "dy"]
)
def test_embedding_layouts_are_bitwise_equal(what, layout, impl, device):
    values = embedding_inputs(torch.float32, device)
    values["dy"] = randn(BATCH, SEQLEN, DIM, device=device, seed=6)
    if layout == "packed" and what == "dy":
        layout = "expanded"
        values["dy"] = values["dy"][:1].repeat(BATCH, 1, 1)

    def grads(values):
        dy = values.pop("dy")
        values = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in values.items()}
        y = fastlm.embedding(**values, impl=impl)
        if impl == "torch":  # it adds in an order that depends on strides
            return (y,)
        return y, *torch.autograd.grad(y, [t for t in values.values() if t.requires_grad], dy)

    expected = grads(dict(values))
    actual = grads({**values, what: with_layout(values[what], layout)})
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_embedding_expanded_gradient(impl, device):
    inputs = embedding_inputs(torch.float32, device, ())
    weight = inputs["token_weight"].requires_grad_()
    fastlm.embedding(**inputs, impl=impl).sum().backward()
    counts = torch.bincount(inputs["ids"].flatten(), minlength=9)
    assert torch.equal(weight.grad, counts[:, None].expand(9, DIM).float())


@pytest.mark.parametrize("impl", IMPLS)
def test_embedding_twice_and_inputs_unmodified(impl, device):
    inputs = embedding_inputs(torch.float32, device)
    before = {n: t.clone() for n, t in inputs.items()}
    leaves = [t.requires_grad_() for t in inputs.values() if t.is_floating_point()]
    y = fastlm.embedding(**inputs, dropout_p=0.2, seed=SEED, impl=impl)
    dy = randn(*y.shape, device=device)
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(inputs[n], before[n]) for n in before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_embedding_without_norm_has_second_derivatives(dropout_p, impl, device):
    """Through the incoming gradient: the call itself is linear, and keeps no table for them."""

    def penalty(embed):
        def run(ids, token_weight, position_weight):
            y = embed(ids, token_weight, position_weight=position_weight, padding_idx=2,
                      dropout_p=dropout_p, seed=torch.full((), SEED, device=device))  # fmt: skip
            leaves = (token_weight, position_weight)
            grads = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
            return sum(g.square().sum() for g in grads)

        return run

    inputs = embedding_inputs(torch.float32, device, ("position",), given=False)
    del inputs["positions"]
    run_oracle(penalty(partial(fastlm.embedding, impl=impl)), penalty(reference), inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_embedding_seed(impl, device):
    inputs = embedding_inputs(torch.float32, device)
    drop = lambda seed=None: fastlm.embedding(**inputs, dropout_p=0.5, seed=seed, impl=impl)
    assert torch.equal(drop(SEED), drop(torch.full((), SEED, device=device)))
    assert not torch.equal(drop(1), drop(2))
    torch.manual_seed(7)
    drawn = [drop(), drop()]
    torch.manual_seed(7)
    assert torch.equal(drop(), drawn[0]) and not torch.equal(*drawn)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", ["token_weight", "position_weight", "norm_weight"])
def test_embedding_frozen_inputs(frozen, impl, device):
    inputs = embedding_inputs(torch.float32, device)
    run_oracle(partial(fastlm.embedding, impl=impl), reference, inputs, frozen=(frozen,))


TABLE_KERNELS = ["segment_parts_kernel", "segment_sum_kernel"]
ALL = ["token_weight", "position_weight", "type_weight", "norm_weight", "norm_bias"]


@pytest.mark.parametrize("trained,expected", [
    ([], []),
    (["norm_bias"], ["embedding_bwd_kernel", "column_sum_kernel"]),
    (["type_weight"], ["embedding_bwd_kernel", *TABLE_KERNELS]),
    (ALL, ["embedding_bwd_kernel", "column_sum_kernel", *TABLE_KERNELS * 3]),
], ids=str)  # fmt: skip
def test_embedding_frozen_weights_cost_nothing(trained, expected, device, launches):
    inputs = embedding_inputs(torch.float32, device)
    for name in trained:
        inputs[name].requires_grad_()
    y = fastlm.embedding(**inputs, impl="triton")
    assert launches == ["embedding_fwd_kernel"]
    launches.clear()
    if trained:
        y.sum().backward()
    assert launches == expected


def test_embedding_of_tokens_alone_launches_no_kernel_for_the_sum(device, launches):
    inputs = embedding_inputs(torch.float32, device, ("position",), given=False)
    leaves = [inputs[n].requires_grad_() for n in ("token_weight", "position_weight")]
    y = fastlm.embedding(**inputs, impl="triton")
    torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert launches == ["embedding_fwd_kernel", *TABLE_KERNELS]


@pytest.mark.parametrize("norm", [False, True])
def test_embedding_kernels_save_inputs_and_statistics_alone(norm, device):
    inputs = embedding_inputs(torch.float32, device, PARTS if norm else PARTS[:2])
    known = {t.data_ptr() for t in inputs.values()}
    inputs["token_weight"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fastlm.embedding(**inputs, impl="triton")
    own = [t for t in saved if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in own if t.numel()] == [(BATCH * SEQLEN,)] * (2 * norm)
    assert norm or not any(t.is_floating_point() and t.numel() for t in saved)


@pytest.mark.parametrize("impl", ["triton"])
def test_embedding_opcheck(impl, device):
    i = embedding_inputs(torch.float16, device)
    seed = torch.full((), SEED, device=device)
    indices = i["ids"], i["positions"], i["type_ids"][0]
    weights = [i[n] for n in ("token_weight", "position_weight", "type_weight", "norm_weight")]
    ops = torch.ops.fastlm
    fwd = (*indices, *weights, i["norm_bias"], seed, 1e-12, 0.5)
    torch.library.opcheck(ops.embedding_fwd.default, fwd)
    y, mean, rstd = ops.embedding_fwd(*fwd)
    f16, f32 = torch.float16, torch.float32
    bwd = (y, *indices, *weights, mean, rstd, seed, 0.5, 2, [9, 8, 2], f16, f32, None, f16, None)
    torch.library.opcheck(ops.embedding_bwd.default, bwd)


@pytest.mark.parametrize("impl", ["triton"])
def test_embedding_past_int32_offsets(impl, device):
    # Three rows of a table 2**30 elements apart: the storage is committed lazily.
    big = torch.empty(2**31 + 64, device=device, dtype=torch.float16)
    weight = big.as_strided((3, 64), (2**30, 1))
    weight.copy_(randn(3, 64))
    ids = torch.tensor([2, 0, 1], device=device)
    y = fastlm.embedding(ids, weight, impl=impl)
    assert torch.equal(y, fastlm.embedding(ids, weight.contiguous(), impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)], ids=str)
def test_embedding_empty(shape, impl, device):
    inputs = embedding_inputs(torch.float32, device, given=False)
    inputs["ids"] = torch.zeros(shape, dtype=torch.int64, device=device)
    weight = inputs["token_weight"].requires_grad_()
    y = fastlm.embedding(**inputs, dropout_p=0.1, impl=impl)
    y.sum().backward()
    assert y.shape == (*shape, DIM) and not weight.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_embedding_no_grad_saves_nothing(impl, device):
    inputs = embedding_inputs(torch.float32, device)
    inputs["token_weight"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            y = fastlm.embedding(**inputs, dropout_p=0.1, impl=impl)
    assert not saved and not y.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_autocast_keeps_the_dtype(dtype, impl, device):
    inputs = embedding_inputs(dtype, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = fastlm.embedding(**inputs, impl=impl)
    assert y.dtype == dtype and torch.equal(y, fastlm.embedding(**inputs, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_embedding_compiles_fullgraph(dynamic, impl, device):
    inputs = embedding_inputs(torch.float32, device)
    ids = {n: t for n, t in inputs.items() if not t.is_floating_point()}
    leaves = {n: t.requires_grad_() for n, t in inputs.items() if n not in ids}

    def fn(ids, leaves):
        # Philox traced with symbolic shapes takes most of the test's time, and shows nothing more.
        y = fastlm.embedding(
            **ids, **leaves, dropout_p=0.0 if dynamic else 0.25, seed=SEED, impl=impl
        )
        alone = fastlm.embedding(ids["ids"], leaves["token_weight"], impl=impl)
        return (y * alone).sum()

    expected = torch.autograd.grad(fn(ids, leaves), list(leaves.values()))
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual = torch.autograd.grad(compiled(ids, leaves), list(leaves.values()))
    if impl != "torch":
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        return
    # Which leaves to the compiler what it composes itself.
    wide = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    gold = torch.autograd.grad(fn(ids, wide), list(wide.values()))
    for name, *results in zip(leaves, actual, expected, gold, strict=True):
        assert_close(name, *results)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["ids", "positions", "type_ids"])
def test_embedding_index_outside_raises_on_cpu(name):
    inputs = embedding_inputs(torch.float32, "cpu")
    table = {"ids": "token_weight", "positions": "position_weight", "type_ids": "type_weight"}[name]
    for bad in (-1, len(inputs[table])):
        inputs[name][1, 2] = bad
        message = f"^embedding: {name} must be from 0 to {len(inputs[table]) - 1}, got {bad}$"
        with pytest.raises(IndexError, match=message):
            fastlm.embedding(**inputs)


@pytest.mark.interpreter
def test_embedding_explain(device):
    explanation = fastlm.explain("embedding", **embedding_inputs(torch.float32, device))
    assert explanation.chosen == "torch"
    on_cpu = "its kernels run on a GPU, the inputs are on cpu"
    absent = "fastlm has no cuda kernel for embedding"
    assert explanation.reasons == {"cuda": absent, "triton": on_cpu, "torch": None}


@pytest.mark.parametrize("name", ["token_weight", "type_weight", "norm_bias"])
def test_embedding_kernels_refuse_float64(name, device):
    inputs = embedding_inputs(torch.float32, device)
    inputs[name] = inputs[name].double()
    message = f"embedding: impl='triton' computes in fp32 and does not take a float64 {name}; use"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        fastlm.embedding(**inputs, impl="triton")


@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("bad", [-1, 9, 2**40])
@pytest.mark.parametrize("name", ["ids", "positions", "type_ids"])
@pytest.mark.parametrize("norm", [False, True])
def test_embedding_index_outside_is_nan(norm, name, bad, impl, device):
    """By the kernels: nothing outside is read or written, and the other tokens stay as they are."""
    inputs = embedding_inputs(torch.float32, device, PARTS if norm else PARTS[:2])
    y = fastlm.embedding(**inputs, impl=impl)
    inputs[name] = inputs[name].clone()
    inputs[name][1, 2] = bad
    names = [n for n, t in inputs.items() if t.is_floating_point()]
    leaves = [inputs[n].requires_grad_() for n in names]
    z = fastlm.embedding(**inputs, impl=impl)
    others = torch.ones(BATCH, SEQLEN, dtype=torch.bool, device=device)
    others[1, 2] = False
    assert z[1, 2].isnan().all() and torch.equal(z[others], y[others])
    grads = dict(zip(names, torch.autograd.grad(z.sum(), leaves), strict=True))
    # Its gradient goes to no row of that table, and is NaN elsewhere where it depends on the sum.
    table = {"ids": "token_weight", "positions": "position_weight", "type_ids": "type_weight"}[name]
    assert not grads.pop(table).isnan().any()
    tables = [g for n, g in grads.items() if n.endswith("_weight") and n != "norm_weight"]
    assert all(g.isnan().any() == norm for g in tables)
    assert not norm or grads["norm_weight"].isnan().all()


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
    ({"eps": -1}, "eps must be a number of at least 0, got -1"),
    ({"eps": "a"}, "eps must be a number of at least 0, got str"),
    ({"dropout_p": 2}, "dropout_p must be a number from 0 to 1, got 2"),
    ({"dropout_p": 0.5, "seed": "a"},
     "seed must be an int or an int64 tensor of one element, got str"),
    ({"padding_idx": 9}, "padding_idx must be an integer from -9 to 8, got 9"),
    ({"padding_idx": -10}, "padding_idx must be an integer from -9 to 8, got -10"),
    ({"padding_idx": 1.0}, "padding_idx must be an integer from -9 to 8, got float"),
    ({"impl": "cuda"}, "fastlm has no cuda kernel for embedding; use impl='torch'"),
])  # fmt: skip
def test_embedding_errors(change, message):
    with pytest.raises(
        (TypeError, ValueError, NotImplementedError), match=re.escape(f"embedding: {message}")
    ):
        fastlm.embedding(**{"ids": IDS, "token_weight": WEIGHT, **change})
