"""The kernels of attention_weights, with every option: pairs, gradients and properties."""

import functools

import pytest
import torch
import torch._dynamo.testing
from attention_options import MASKINGS, VALUES, build, build_weights, call, call_weights, consistent
from pairwise import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

import fastlm
from fastlm.kernels import attention_dbias as dbias_kernels
from fastlm.kernels import attention_weights as kernels
from fastlm.kernels.attention_scores import Options
from fastlm.reference import attention as reference
from fastlm.reference.dropout import keep_mask
from fastlm.testing import (
    LAYOUTS,
    assert_close,
    check_against_reference,
    nan_filled_empty,
    randn,
    with_layout,
)

PLAIN = {name: values[0] for name, values in VALUES.items()}
# One value fewer of each option than attention's own cases: what differs is read and stored once.
WEIGHTS = {
    name: VALUES[name]
    for name in ("causal", "relative", "seqlens_k", "alibi", "softcap", "sinks", "dropout_p")
} | {
    "window": [None, (3, 0), (None, 2), (6, 9)],
    "mask": [None, "columns", "all"],
    "bias": [None, "columns", "rows", "all", "forbids"],
    "lengths": [(18, 18), (35, 19), (5, 34)],
    "heads": [(2, 1), (1, 1)],
    "headdim": [8, 7, 24],
    "dtype": VALUES["dtype"],
    "parameters": VALUES["parameters"],
    "layout": VALUES["layout"],
    "frozen": [(), ("q", "lse"), ("k",), ("q", "bias", "table", "alibi_slopes")],
}
PAIRS = [consistent(PLAIN | case) for case in pairwise(**WEIGHTS)]
EVERYTHING = consistent(
    PLAIN | {name: values[-1] for name, values in WEIGHTS.items()}
    | {"lengths": (6, 20), "headdim": 8, "heads": (2, 1), "dtype": torch.float32,
       "window": (20, 5), "layout": "contiguous", "frozen": ()}
)  # fmt: skip
# Every option that is on, at once; a bias excludes a table.
BOTH = [EVERYTHING, EVERYTHING | {"bias": None, "relative": "one way"}]

weights = functools.partial(
    call_weights, functools.partial(fastlm.attention_weights, impl="triton")
)
specified = functools.partial(call_weights, reference.attention_weights)


def changes(case):
    """What tells a case from the plain one, as its test's name."""
    return "-".join(f"{n}={v}" for n, v in case.items() if v != PLAIN[n])


def moved(case, device, build=build_weights):
    """A case on a device, the tensors as leaves that require gradients."""
    tensors, options = build(case)
    options = {n: x.to(device) if torch.is_tensor(x) else x for n, x in options.items()}
    return {n: x.to(device).requires_grad_() for n, x in tensors.items()}, options


@pytest.mark.parametrize("case", PAIRS, ids=changes)
def test_weights_pairs_of_options(case, device):
    tensors, options = moved(case, device)
    with nan_filled_empty():
        check_against_reference(weights, specified, tensors, frozen=case["frozen"], **options)


def test_weights_of_two_groups(device):
    """Several key heads, each of several query heads, which the pairs do not have."""
    q, k = randn(1, 5, 4, 8, device=device), randn(1, 6, 2, 8, device=device, seed=1)
    lse = reference.attention(q, k, k, return_lse=True)[1]
    bias = randn(4, 1, 6, device=device, seed=2)
    tensors = {"q": q, "k": k, "lse": lse, "bias": bias}
    check_against_reference(weights, specified, tensors)


def test_weights_layouts_of_incoming_gradients(device):
    tensors, options = moved(EVERYTHING, device)
    w = weights(**tensors, **options)
    dw = with_layout(randn(*w.shape, device=device, seed=11), "expanded")  # as all others then
    expected, *others = (
        torch.autograd.grad(w, list(tensors.values()), with_layout(dw, layout), retain_graph=True)
        for layout in LAYOUTS
    )
    for layout, grads in zip(LAYOUTS[1:], others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True)), layout


@pytest.mark.parametrize("case", BOTH, ids=changes)
def test_weights_twice_the_same_bits_and_nothing_written(case, device):
    tensors, options = moved(case, device)
    given = {**tensors, **{n: x for n, x in options.items() if torch.is_tensor(x)}}
    before = {n: x.detach().clone() for n, x in given.items()}
    with nan_filled_empty():
        w = weights(**tensors, **options)
        dw = randn(*w.shape, device=device, seed=13)
        copies = w.detach().clone(), dw.clone()
        first, second = (
            torch.autograd.grad(w, list(tensors.values()), dw, retain_graph=True) for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(w, copies[0]) and torch.equal(dw, copies[1])
    assert all(torch.equal(given[n], before[n]) for n in before)


@pytest.mark.parametrize("case", BOTH, ids=changes)
def test_weights_second_derivatives(case, device):
    def gradients(fn):
        def first(options, **tensors):
            leaves = [x if x.requires_grad else x.requires_grad_() for x in tensors.values()]
            w = fn(**tensors, **options)
            dw = randn(*w.shape, dtype=w.dtype, device=device, seed=15)
            return torch.autograd.grad(w, leaves, dw, create_graph=True)

        return first

    tensors, options = moved({**case, "lengths": (4, 5), "dtype": torch.bfloat16}, device)
    # A query without a key has lse -inf, whose difference quotient in fp64 is not a number.
    tensors["lse"] = tensors["lse"].detach().clamp(min=-30.0)
    check_against_reference(gradients(weights), gradients(specified), tensors, options=options)


@pytest.mark.parametrize("case", [PLAIN, *BOTH], ids=changes)
def test_weights_times_values_is_attention(case, device):
    case = {**case, "lengths": (18, 40), "headdim_v": 40}
    tensors, options = moved(case, device, build)
    v = torch.eye(40, device=device)[None, :, None].expand(2, 40, case["heads"][1], 40)
    options["return_lse"] = True
    with torch.no_grad():
        out, lse = call(
            functools.partial(fastlm.attention, impl="triton"), None, **{**tensors, "v": v},
            **options,
        )  # fmt: skip
        del options["return_lse"], tensors["v"]
        if "sinks" in tensors:
            options["sinks"] = tensors.pop("sinks")
        w = weights(**tensors, lse=lse, **options)
        gold = specified(**{n: x.double() for n, x in tensors.items()}, lse=lse.double(), **options)
        same = specified(**tensors, lse=lse, **options)
    assert_close("weights", w, same, gold)
    assert_close("weights @ 1", w, out.transpose(1, 2), gold)
    assert torch.equal(w == 0, gold.float() == 0), "not 0 exactly where forbidden or dropped"
    if case["dropout_p"]:
        batch, head, row = (torch.arange(n, device=device) for n in w.shape[:3])
        keep = keep_mask(
            options["seed"], case["dropout_p"], batch[:, None, None], head[:, None], row, 40
        )
        assert not w[~keep].any() and not out.transpose(1, 2)[~keep].any()
    elif not case["sinks"]:
        ones = torch.ones_like(w[..., 0])
        assert_close("sum", w.sum(-1), same.sum(-1), ones)


@pytest.mark.parametrize("name", MASKINGS)
def test_weights_masked_never_leaks(name, device):
    """NaN and inf in what no pair uses, incoming gradients included, leave no trace."""
    options = {n: x.to(device) if torch.is_tensor(x) else x for n, x in MASKINGS[name].items()}
    m, n = (9, 5) if name == "more queries" else (5, 9)
    q, k = (randn(2, s, 2, 16, device=device, seed=i) for i, s in enumerate((m, n)))
    _, allowed = reference.masked_scores(q, k, **options)
    allowed = allowed.expand(2, 2, m, n)
    unseen, unseeing = ~allowed.any(-2).any(1), ~allowed.any(-1).any(1)  # (batch, seqlen)
    assert unseen.any() or unseeing.any()
    _, lse = reference.attention(q, k, k, **options, return_lse=True)

    def results(one, other):
        leaves = [x.clone() for x in (q, k, lse)]
        leaves[0][unseeing], leaves[1][unseen] = one, other
        leaves = [x.requires_grad_() for x in leaves]
        dw = randn(2, 2, m, n, device=device, seed=14).masked_fill(~allowed, one)
        with nan_filled_empty():
            w = fastlm.attention_weights(*leaves, **options, impl="triton")
            return w, *torch.autograd.grad(w, leaves, dw)

    expected, poisoned = results(0.0, 0.0), results(float("nan"), float("inf"))
    assert not expected[0][~allowed].any()
    assert all(torch.equal(a, b) for a, b in zip(poisoned, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_weights_of_nothing(shape, device):
    batch, m, n = shape
    q, k = (randn(batch, s, 2, 8, device=device).requires_grad_() for s in (m, n))
    lse = torch.zeros(batch, 2, m, device=device, requires_grad=True)
    bias = torch.zeros(2, 1, n, device=device, requires_grad=True)
    w = fastlm.attention_weights(q, k, lse, bias=bias, impl="triton")
    assert w.shape == (batch, 2, m, n)
    grads = torch.autograd.grad(w, [q, k, lse, bias], w.detach())
    assert not any(g.any() for g in grads)


def test_weights_vmap_and_forward_mode_are_refused_by_name_or_right(device):
    q, k = (randn(1, 5, 2, 8, device=device, seed=i) for i in range(2))
    lse = reference.attention(q, k, k, return_lse=True)[1]
    run = lambda impl: lambda q: fastlm.attention_weights(q, k, lse, impl=impl)
    refused = "does not run under torch.func.vmap and forward-mode differentiation"
    with pytest.raises(NotImplementedError, match=refused):
        torch.func.vmap(run("triton"))(torch.stack([q, 2 * q]))
    with pytest.raises(NotImplementedError, match=refused):
        torch.func.jvp(run("triton"), (q,), (k,))
    many = torch.func.vmap(run(None))(torch.stack([q, 2 * q]))
    assert_close("vmap", many[1], run("torch")(2 * q), run("torch")(2 * q.double()))


def test_weights_explain():
    q, lse = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 4)
    reasons = fastlm.explain("attention_weights", q, q, lse).reasons
    assert reasons["torch"] is None and "run on a GPU" in reasons["triton"]


def test_weights_opcheck(device):
    q, k = randn(1, 6, 2, 8, device=device), randn(1, 9, 1, 8, device=device, seed=1)
    lse = reference.attention(q, k, k, return_lse=True)[1]
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool, device=device)
    bias, table = (randn(*s, device=device) for s in ((1, 2, 1, 9), (8, 2)))
    lens = torch.tensor([4], device=device, dtype=torch.int32)
    seed, slopes = torch.tensor(7, device=device), randn(2, device=device)
    scalars = ("top_left", 0.3, 2, -1, 5.0, 0.1, True, 24)
    everything = (mask, bias, None, lens, slopes, seed)
    for options in (everything, (None, None, table, None, None, None)):
        args = (q, k, lse, *options, *scalars)
        torch.library.opcheck(torch.ops.fastlm.attention_weights_fwd.default, args)
        w = torch.ops.fastlm.attention_weights_fwd(*args)
        learned = [options[i] is not None for i in (1, 2, 4)]
        bwd = (w, *args, options is everything, False, *learned)
        torch.library.opcheck(torch.ops.fastlm.attention_weights_bwd.default, bwd)


def test_weights_one_compilation_serves_all_lengths(device):
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    options = {"causal": True, "dropout_p": 0.2, "seed": 1, "softcap": 5.0, "impl": "triton"}
    fn = lambda q, k, lse, bias: fastlm.attention_weights(q, k, lse, bias=bias, **options)
    compiled = torch.compile(fn, fullgraph=True, backend=count)
    for seqlen in range(3, 6):
        shapes = (1, seqlen, 2, 8), (1, seqlen, 1, 8), (1, 2, seqlen), (seqlen,)
        leaves = [randn(*s, device=device, seed=i).requires_grad_() for i, s in enumerate(shapes)]
        both = [f(*leaves) for f in (fn, compiled)]
        assert torch.equal(*both)
        grads = [torch.autograd.grad(w, leaves, both[0].detach()) for w in both]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert count.frame_count <= 2


class _Allocations(TorchDispatchMode):
    """Notes the elements of every tensor that an operation creates."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.startswith(("empty", "new_", "zeros", "full", "clone")):
            self.sizes.append(out.numel())
        return out


def test_weights_backward_allocates_nothing_of_their_size(device):
    """What the docstring says of memory."""
    q, k = randn(2, 20, 2, 4, device=device), randn(2, 40, 1, 4, device=device, seed=1)
    lse = reference.attention(q, k, k, return_lse=True)[1]
    dw = randn(2, 2, 20, 40, device=device, seed=2)
    options = Options(bias=randn(1, 1, 1, 40, device=device), alibi_slopes=randn(2, device=device))
    with _Allocations() as allocations:
        kernels.attention_weights_bwd(dw, q, k, lse, options, True, True, True, False, True)
    assert 0 < max(allocations.sizes) < dw.numel() / 2, sorted(allocations.sizes)


class _Spy:
    """Stands in for a kernel and notes its grids."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


def test_weights_grid_has_one_axis(monkeypatch):
    spy = _Spy()
    for module in (kernels, dbias_kernels):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, spy)
    new = lambda *shape: torch.empty(shape, device="meta")
    q, lse, w = new(70_000, 1, 2, 16), new(70_000, 2, 1), new(70_000, 2, 1, 1)
    options = Options(bias=new(70_000, 1, 1, 1))
    kernels.attention_weights_fwd(q, q, lse, options)
    kernels.attention_weights_bwd(w, q, q, lse, options, True, True, True, False, False)
    assert spy.grids == [(140_000,)] * 3 + [(70_000,)]


@pytest.mark.parametrize("far", ["batch", "nheads", "seqlen_q"])
def test_weights_gradient_offsets_past_2_31(far, device):
    """Each dimension in turn 2**30 elements apart; memory that is not touched is not committed."""
    shape = [1, 1, 1, 16]
    shape[["batch", "nheads", "seqlen_q"].index(far)] = 3
    strides = [2**30 if n == 3 else 16 for n in shape[:3]] + [1]
    dw = torch.empty(2**31 + 1024, dtype=torch.float16, device=device).as_strided(shape, strides)
    dw.copy_(randn(*shape, dtype=torch.float16, device=device))
    q = randn(shape[0], shape[2], shape[1], 8, dtype=torch.float16, device=device, seed=1)
    k = randn(shape[0], 16, 1, 8, dtype=torch.float16, device=device, seed=2)
    lse = reference.attention(q, k, k, return_lse=True)[1]
    options = Options(bias=randn(1, 1, 1, 16, device=device))
    run = lambda dw: kernels.attention_weights_bwd(
        dw, q, k, lse, options, True, True, True, False, False
    )
    assert all(torch.equal(a, b) for a, b in zip(run(dw), run(dw.contiguous()), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(1024, 1024), (500, 777)], ids=str)
@pytest.mark.parametrize("headdim", [17, 64, 128, 256, 512])
@pytest.mark.parametrize("dtype", VALUES["dtype"], ids=str)
@pytest.mark.parametrize("case", BOTH, ids=changes)
def test_weights_large(case, dtype, headdim, lengths, device):
    case = {**case, "lengths": lengths, "headdim": headdim, "dtype": dtype}
    tensors, options = moved(case, device)
    check_against_reference(weights, specified, tensors, **options)
