"""The choice of a backend, and what it says when there is none."""

import inspect
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm
from fastlm import backends
from fastlm.backends import Explanation, choose, supports_all

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def refuses_odd(n):
    return "does not take odd numbers" if n % 2 else None


TABLE = {"triton": refuses_odd, "torch": supports_all}


@pytest.fixture
def fake_gpu(monkeypatch):
    """A machine on which every backend's requirements are met."""
    monkeypatch.setattr(backends, "_unavailable", lambda impl, device: None)


def test_choose_takes_the_first_that_does_not_refuse(fake_gpu):
    assert choose("op", None, TABLE, GPU, 2) == "triton"
    assert choose("op", None, TABLE, GPU, 3) == "torch"
    assert choose("op", "torch", TABLE, GPU, 2) == "torch"


def test_choose_gives_torch_on_cpu_tensors():
    assert choose("op", None, TABLE, CPU, 2) == "torch"


def test_explicit_impl_never_falls_back(fake_gpu):
    message = "op: impl='triton' does not take odd numbers; use impl='torch'"
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        choose("op", "triton", TABLE, GPU, 3)


def test_refusals_name_the_backend_that_takes_the_call(fake_gpu):
    table = {"triton": refuses_odd, "cuda": lambda n: "is busy", "torch": supports_all}
    for n, other in ((2, "triton"), (3, "torch")):
        message = f"op: impl='cuda' is busy; use impl='{other}'"
        with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
            choose("op", "cuda", table, GPU, n)
        message = f"op: fastlm has no cuda kernel for op; use impl='{other}'"
        with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
            choose("op", "cuda", TABLE, GPU, n)


def test_impl_without_a_kernel():
    message = "op: fastlm has no cuda kernel for op; use impl='torch'"
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        choose("op", "cuda", TABLE, CPU, 2)


def test_impl_that_this_device_cannot_run(monkeypatch):
    monkeypatch.setattr(backends, "INTERPRETED", False)
    message = (
        "op: impl must be available, got 'triton': its kernels run on a GPU, the inputs are on cpu"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        choose("op", "triton", TABLE, CPU, 2)


def test_impl_without_triton_names_the_command(monkeypatch):
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    message = "op: impl must be available, got 'triton': triton is not installed (pip install"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        choose("op", "triton", TABLE, GPU, 2)
    assert choose("op", None, TABLE, GPU, 2) == "torch"


@pytest.mark.parametrize("impl", ["Triton", "", 3, "auto"])
def test_unknown_impl(impl):
    message = f"op: impl must be None, 'cuda', 'triton' or 'torch', got {impl!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        choose("op", impl, TABLE, CPU, 2)


def test_explanation_names_every_backend(fake_gpu):
    with pytest.raises(backends._Explained) as result:
        choose("op", backends._Probe(), TABLE, GPU, 3)
    assert str(result.value.explanation) == (
        "op: torch\n"
        "  cuda   fastlm has no cuda kernel for op\n"
        "  triton does not take odd numbers\n"
        "  torch  chosen"
    )


def test_explanation_without_a_backend():
    assert (
        str(Explanation("op", None, {"cuda": "is not built"}))
        == "op: no backend\n  cuda   is not built"
    )


def test_explain_an_operator(monkeypatch):
    x = torch.randn(2, 8)
    result = fastlm.explain("layer_norm", x)
    assert (result.op, result.chosen) == ("layer_norm", "torch")
    assert result.reasons["triton"] == "its kernels run on a GPU, the inputs are on cpu"
    assert result.reasons["torch"] is None
    assert fastlm.explain(fastlm.layer_norm, x, impl="triton") == result


def test_explain_computes_nothing(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("computed")

    monkeypatch.setattr(torch.nn.functional, "layer_norm", never)
    assert fastlm.explain("layer_norm", torch.randn(2, 8)).chosen == "torch"


def test_explain_checks_like_the_call():
    with pytest.raises(ValueError, match="^layer_norm: weight must have shape"):
        fastlm.explain("layer_norm", torch.randn(2, 8), torch.randn(7))


def test_explain_leaves_the_random_state():
    x, ids = torch.randn(2, 8), torch.zeros(2, 3, dtype=torch.int64)
    q, cu = x.view(1, 2, 2, 4), torch.tensor([0, 2])
    state = torch.get_rng_state()
    for op, *args in (
        ("layer_norm", x), ("rms_norm", x), ("embedding", ids, x), ("attention", q, q, q),
        ("attention_varlen", q[0], q[0], q[0], cu, cu, 2, 2),
        ("attention_weights", q, q, torch.ones(1, 2, 2)), ("ffn", x, x, None, x.T, None),
        ("scaled_dot_product_attention", q, q, q),
    ):  # fmt: skip
        fastlm.explain(op, *args, dropout_p=0.5)
    fastlm.explain("bias_act", x, activation="relu", dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_explain_scaled_dot_product_attention(fake_gpu):
    q = torch.randn(2, 4, 3, 8)
    result = fastlm.explain("scaled_dot_product_attention", q, q, q, is_causal=True)
    assert (result.op, result.chosen) == ("scaled_dot_product_attention", "triton")
    assert result == fastlm.explain(fastlm.scaled_dot_product_attention, q, q, q, is_causal=True)
    assert result.reasons == fastlm.explain("attention", *[q.mT.mT] * 3).reasons
    for x in (q[:, :0], q[..., :0]):  # without heads, without columns
        result = fastlm.explain("scaled_dot_product_attention", x, x, x)
        assert result.chosen == "torch"
        assert result.reasons["triton"] == (
            "has no case for these inputs, which go to torch's own function"
        )


def test_explain_of_something_else():
    with pytest.raises(ValueError, match="^explain: op must be one of .*, got 'softmax'$"):
        fastlm.explain("softmax")
    with pytest.raises(
        ValueError, match="^explain: op must be one of attention, .*got 'RelativeBias'$"
    ):
        fastlm.explain("RelativeBias", torch.randn(8, 2))
    for op in (torch.relu, fastlm.RelativeBias, torch.nn.functional.gelu):
        with pytest.raises(ValueError, match="^explain: op must be an operator that takes impl"):
            fastlm.explain(op, torch.randn(1))
    with pytest.raises(ValueError, match="^explain: op must be an operator that takes impl, got"):
        fastlm.explain(lambda x, impl: x, torch.randn(1))


OPERATORS_WITHOUT_IMPL = {"RelativeBias", "scaled_dot_product_attention"}


@pytest.mark.parametrize("name", sorted(set(fastlm.ops.__all__) - OPERATORS_WITHOUT_IMPL))
def test_every_operator_takes_impl_last(name):
    parameters = list(inspect.signature(getattr(fastlm, name)).parameters.values())
    assert parameters[-1].name == "impl" and parameters[-1].default is None
    assert parameters[-1].kind is inspect.Parameter.KEYWORD_ONLY


def calls_on(device):
    t = lambda *shape: torch.empty(shape, device=device, requires_grad=True)
    ints = lambda *shape: torch.empty(shape, device=device, dtype=torch.int64)
    x, q = t(2, 8), t(1, 4, 2, 8)
    return {
        "attention": lambda: fastlm.attention(q, q, q, causal=True, dropout_p=0.1),
        "bias_act": lambda: fastlm.bias_act(x, t(8), activation="gelu"),
        "cross_entropy": lambda: fastlm.cross_entropy(x, ints(2)),
        "embedding": lambda: fastlm.embedding(ints(2, 3), t(5, 8)),
        "ffn": lambda: fastlm.ffn(x, t(16, 8), t(16), t(8, 16), t(8)),
        "gated_ffn": lambda: fastlm.gated_ffn(x, t(16, 8), t(16, 8), t(8, 16)),
        "glu": lambda: fastlm.glu(x, x),
        "layer_norm": lambda: fastlm.layer_norm(x, t(8), t(8), dropout_p=0.1),
        "linear_cross_entropy": lambda: fastlm.linear_cross_entropy(x, t(16, 8), ints(2)),
        "masked_lm_loss": lambda: fastlm.masked_lm_loss(
            x, ints(2), t(4, 8), t(4), t(4), t(4), t(16, 4)
        ),
        "next_sentence_loss": lambda: fastlm.next_sentence_loss(x, ints(2), t(2, 8)),
        "rms_norm": lambda: fastlm.rms_norm(x, t(8), casting="gemma"),
        "rotary": lambda: fastlm.rotary(q, t(4, 4), t(4, 4)),
    }


@pytest.mark.parametrize("op", ["ffn", "gated_ffn"])
def test_recompute_is_a_bool(op):
    x = torch.ones(2, 2)
    weights = (x, None, x, None) if op == "ffn" else (x, x, x)
    with pytest.raises(TypeError, match=f"^{op}: recompute must be a bool, got str$"):
        getattr(fastlm, op)(x, *weights, recompute="no")


@pytest.mark.parametrize("to", ["to_sparse", "to_mkldnn"])
def test_other_layouts_are_refused(to):
    x = getattr(torch.ones(2, 8), to)()
    ids = torch.zeros(2, dtype=torch.int64)
    message = rf"^\w+: \w+ must have layout torch.strided, got {re.escape(str(x.layout))}$"
    for op, *args in (
        ("layer_norm", x), ("rms_norm", torch.ones(2, 8), x), ("glu", x, x),
        ("cross_entropy", x, ids), ("linear_cross_entropy", torch.ones(2, 8), x, ids),
        ("embedding", ids, x), ("ffn", x, torch.ones(4, 8), None, torch.ones(8, 4), None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            getattr(fastlm, op)(*args)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", calls_on("meta"))
def test_operators_run_on_tensors_without_memory(name, autocast):
    """Shapes can be inferred, and models built, on the meta device."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = calls_on("meta")[name]()
    y.sum().backward()
    assert y.device.type == "meta"


@pytest.mark.parametrize("name", calls_on("meta"))
def test_operators_run_on_fake_tensors(name):
    """No call and no backward pass depends on what they would hold."""
    with FakeTensorMode():
        calls_on("cpu")[name]().sum().backward()
