"""MultiheadAttention against torch.nn's."""

import re

import pytest
import torch
from masks import MASKS, torch_masks
from pairwise import pairwise
from parity import check_modules, randomize
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm.layers import MultiheadAttention
from fastlm.reference import attention as reference
from fastlm.testing import assert_close, check_against_reference, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EMBED, HEADS, KDIM, VDIM, BATCH = 12, 3, 5, 7, 3

CASES = pairwise(
    inputs=("self", "memory", "three", "widths"),  # which of query, key and value are the same
    layout=("batch_first", "seq_first", "unbatched"),
    masks=MASKS,
    weights=(None, "average", "per_head"),
    extra=((), ("add_bias_kv",), ("add_zero_attn",), ("add_bias_kv", "add_zero_attn")),
    bias=(True, False),
    mode=("train", "eval", "no_grad"),
    dtype=DTYPES,
)


def build(module, case, **options):
    widths = {"kdim": KDIM, "vdim": VDIM} if case["inputs"] == "widths" else {}
    extra = dict.fromkeys(case["extra"], True)
    layer = module(
        EMBED,
        HEADS,
        bias=case["bias"],
        batch_first=case["layout"] == "batch_first",
        **widths,
        **extra,
        **options,
    )
    return layer.train(case["mode"] == "train")


def inputs_of(case):
    seqlen_k = 5 if case["inputs"] == "self" else 7

    def tensor(seqlen, width, seed):
        if case["layout"] == "unbatched":
            return randn(seqlen, width, seed=seed)
        x = randn(BATCH, seqlen, width, seed=seed)
        return x if case["layout"] == "batch_first" else x.transpose(0, 1)

    inputs = {"query": tensor(5, EMBED, 0)}
    if case["inputs"] in ("memory", "three"):
        inputs["key"] = tensor(seqlen_k, EMBED, 1)
    if case["inputs"] == "three":
        inputs["value"] = tensor(seqlen_k, EMBED, 2)
    if case["inputs"] == "widths":
        inputs |= {"key": tensor(seqlen_k, KDIM, 1), "value": tensor(seqlen_k, VDIM, 2)}
    return inputs, seqlen_k


class Sharing(nn.Module):
    """Passes one tensor as key and value, or as all three, where the case says so."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, query, key=None, value=None, **masks):
        key = query if key is None else key
        return self.attention(query, key, key if value is None else value, **masks)


def name_of(case):
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_attention_layer_parity(case):
    inputs, seqlen_k = inputs_of(case)
    batch = None if case["layout"] == "unbatched" else BATCH
    attn_mask, padding, causal = torch_masks(case["masks"], 5, seqlen_k, batch, HEADS)
    if causal and case["extra"]:
        causal = False  # torch.nn then forgets the mask, and hides the appended keys
    theirs = randomize(build(nn.MultiheadAttention, case))
    check_modules(
        Sharing(build(MultiheadAttention, case)),
        Sharing(theirs),
        {**inputs, "attn_mask": attn_mask, "key_padding_mask": padding},
        dtype=case["dtype"],
        backward=case["mode"] != "no_grad",
        frozen=("attn_mask", "key_padding_mask") if case["weights"] is None else (),
        need_weights=case["weights"] is not None,
        average_attn_weights=case["weights"] != "per_head",
        is_causal=causal,
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_attention_layer_impl(weights, causal, impl):
    x = {"query": randn(2, 5, 8)}
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    check_modules(
        Sharing(MultiheadAttention(8, 2, batch_first=True, impl=impl)),
        Sharing(randomize(nn.MultiheadAttention(8, 2, batch_first=True))),
        {**x, "attn_mask": mask},
        need_weights=weights,
        is_causal=causal,
    )


def test_attention_layer_impl_refuses():
    layer = MultiheadAttention(8, 2, impl="triton", dtype=torch.float64)
    x = randn(5, 2, 8, dtype=torch.float64)
    message = "attention: impl='triton' computes in fp32 and does not take torch.float64"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        layer(x, x, x)


def test_attention_layer_projects_once():
    """Self-attention reads q, k and v as views of one product, attention to memory k and v."""
    layer = MultiheadAttention(12, 3, batch_first=True)
    x, memory = randn(2, 5, 12), randn(2, 7, 12)
    q, k, v = layer._project(x, x, x)
    assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1
    assert q.shape == (2, 5, 3, 4) and q.stride() == (5 * 36, 36, 4, 1)
    q, k, v = layer._project(x, memory, memory)
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert k.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()


def test_attention_layer_causal_needs_no_mask():
    layer = MultiheadAttention(12, 3, add_zero_attn=False, batch_first=True)
    x = randn(2, 5, 12)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for module in (layer, MultiheadAttention(12, 3, add_zero_attn=True, batch_first=True)):
        expected = module(x, x, x, attn_mask=mask)
        out = module(x, x, x, is_causal=True)
        for a, e in zip(out, expected, strict=True):
            assert_close("causal", a, e, e.double())


def test_attention_layer_causal_with_appended_keys():
    """Every query sees the learned key, with and without the hint that the mask is causal."""
    layer = randomize(MultiheadAttention(12, 3, add_bias_kv=True))
    x = randn(5, 2, 12)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    _, weights = layer(x, x, x, attn_mask=mask, is_causal=True)
    assert weights.shape == (2, 5, 6) and (weights[..., 5] > 0).all()
    assert (weights[:, 0, 1:5] == 0).all()


def test_attention_layer_fully_masked():
    """Zeros from attention, so the output is the bias of its projection; gradients are finite."""
    layer = randomize(MultiheadAttention(12, 3, batch_first=True))
    x = randn(2, 5, 12).requires_grad_()
    padding = torch.tensor([[False] * 5, [True] * 5])
    for mask in (padding, padding.float().masked_fill(padding, float("-inf"))):
        out, weights = layer(x, x, x, key_padding_mask=mask)
        assert torch.equal(out[1], layer.out_proj.bias.expand(5, 12))
        assert (weights[1] == 0).all() and torch.isfinite(out).all()
        (out.square().sum() + weights.square().sum()).backward()
        assert torch.isfinite(x.grad).all() and (x.grad[1] == 0).all()
        x.grad = None


def test_attention_layer_weights_of_nothing_kept():
    """No (seqlen_q, seqlen_k) tensor waits for the backward pass, though weights are returned."""
    layer = MultiheadAttention(8, 2, batch_first=True, impl="triton")
    query, memory = randn(1, 5, 8), randn(1, 7, 8)
    saved = []

    def pack(x):
        saved.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, weights = layer(query, memory, memory)
    assert weights.shape == (1, 5, 7) and saved
    assert not [shape for shape in saved if shape[-2:] in ((5, 7), (7, 5))]
    (out.sum() + weights.square().sum()).backward()
    assert layer.in_proj_weight.grad is not None


def test_attention_layer_dropout_replays_the_seed():
    layer = randomize(MultiheadAttention(12, 3, dropout=0.3, batch_first=True))
    x = randn(2, 40, 12)
    torch.manual_seed(5)
    out, weights = layer(x, x, x, average_attn_weights=False)
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    q, k, v = layer._project(x, x, x)
    expected, lse = reference.attention(q, k, v, dropout_p=0.3, seed=seed, return_lse=True)
    assert torch.equal(out, layer.out_proj(expected.flatten(-2)))
    probabilities = reference.attention_weights(q, k, lse, dropout_p=0.3, seed=seed)
    assert torch.equal(weights, probabilities)
    dropped = (weights == 0).float().mean().item()
    deviation = (0.3 * 0.7 / weights.numel()) ** 0.5
    assert abs(dropped - 0.3) < 5 * deviation


def test_attention_layer_dropout_only_in_training():
    layer = MultiheadAttention(12, 3, dropout=0.5, batch_first=True)
    x = randn(2, 5, 12)
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    plain = MultiheadAttention(12, 3, batch_first=True)
    plain.load_state_dict(layer.state_dict())
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(x, x, x)[0], plain(x, x, x)[0])
    assert torch.equal(state, torch.get_rng_state())


def test_attention_layer_autocast():
    class Autocast(Sharing):
        def forward(self, **inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(**inputs)

    theirs = randomize(nn.MultiheadAttention(12, 3))
    ours = MultiheadAttention(12, 3)
    inputs = {"query": randn(5, 2, 12), "key": randn(7, 2, 12)}
    check_modules(Autocast(ours), Autocast(theirs), inputs, need_weights=False)


def test_attention_layer_learned_mask():
    """A floating-point mask gets its gradient, as an additive bias."""

    def run(module):
        def attend(x, mask, **_):
            return module(x, x, x, attn_mask=mask, need_weights=False)[0]

        return attend

    ours, theirs = MultiheadAttention(12, 3), nn.MultiheadAttention(12, 3)
    ours.load_state_dict(theirs.state_dict())
    x, mask = randn(5, 2, 12), randn(6, 5, 5, seed=1)
    for module in (ours, theirs):
        module.double()
    x, mask = x.double(), mask.double()
    check_against_reference(run(ours), run(theirs), {"x": x, "mask": mask})


def test_attention_layer_checkpointing():
    layer = MultiheadAttention(12, 3, dropout=0.3)
    x = randn(5, 2, 12).requires_grad_()
    grads = []
    for wrap in (lambda *a: layer(*a), lambda *a: checkpoint(layer, *a, use_reentrant=False)):
        torch.manual_seed(1)
        out, weights = wrap(x, x, x)
        (out.square().sum() + weights.square().sum()).backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
        x.grad = None
        layer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("weights,dynamic", [(False, True), (True, False)])
def test_attention_layer_compiles(weights, dynamic):
    layer = MultiheadAttention(12, 3, batch_first=True)
    x = randn(2, 5, 12)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True

    def run(module):
        out, w = module(x, x, x, key_padding_mask=padding, need_weights=weights)
        return out if w is None else (out.sum() + w.square().sum())

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected, out = run(layer), run(compiled)
    assert_close("compiled", out, expected, expected.double())
    out.sum().backward()
    assert layer.in_proj_weight.grad is not None


E = "MultiheadAttention: "
ERRORS = {
    "query_type": (lambda f, x: f(3, x, x), TypeError, E + "query must be a tensor, got int"),
    "query_dim": (
        lambda f, x: f(x[None], x[None], x[None]),
        ValueError,
        E + "query must have 2 or 3 dimensions, as query, got 4",
    ),
    "key_dim": (
        lambda f, x: f(x, x[0], x[0]),
        ValueError,
        E + "key must have 2 or 3 dimensions, as query, got 2",
    ),
    "width": (
        lambda f, x: f(x, x[..., :8], x),
        ValueError,
        E + "key must have width 12, got 8",
    ),
    "batch": (
        lambda f, x: f(x, x[:1], x[:1]),
        ValueError,
        E + "key must have query's batch size 2, got 1",
    ),
    "value": (
        lambda f, x: f(x, x, x[:, :3]),
        ValueError,
        E + "value must match key's shape (2, 5, 12), got (2, 3, 12)",
    ),
    "mask_shape": (
        lambda f, x: f(x, x, x, attn_mask=torch.zeros(5, 4)),
        ValueError,
        E + "attn_mask must have shape (seqlen_q, seqlen_k) = (5, 5) or "
        "(batch * num_heads, seqlen_q, seqlen_k) = (6, 5, 5), got (5, 4)",
    ),
    "mask_dtype": (
        lambda f, x: f(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.uint8)),
        ValueError,
        E + "attn_mask must have a boolean or floating-point dtype, got torch.uint8",
    ),
    "padding_shape": (
        lambda f, x: f(x, x, x, key_padding_mask=torch.zeros(5, 2, dtype=torch.bool)),
        ValueError,
        E + "key_padding_mask must have shape (batch, seqlen_k) = (2, 5), got (5, 2)",
    ),
    "nested": (
        lambda f, x: f(torch.nested.as_nested_tensor(list(x)), x, x),
        NotImplementedError,
        E + "query must be a dense tensor, got a nested tensor; pad it and pass key_padding_mask",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", ERRORS)
def test_attention_layer_errors(case):
    call, error, message = ERRORS[case]
    layer = MultiheadAttention(12, 3, batch_first=True)
    with pytest.raises(error, match=re.escape(message) + "$"):
        call(layer, randn(2, 5, 12))


@pytest.mark.parametrize(
    "args,message",
    [
        (
            (12, 5),
            "embed_dim must be a positive multiple of num_heads, got embed_dim=12 and num_heads=5",
        ),
        (
            (0, 1),
            "embed_dim must be a positive multiple of num_heads, got embed_dim=0 and num_heads=1",
        ),
        ((12, 3, 1.5), "dropout must be a number from 0 to 1, got 1.5"),
    ],
)
def test_attention_layer_constructor_errors(args, message):
    with pytest.raises(ValueError, match=re.escape(E + message) + "$"):
        MultiheadAttention(*args)


def test_attention_layer_explains_itself():
    x = randn(2, 5, 3, 4)
    assert fastlm.explain("attention", x, x, x).chosen == "torch"
