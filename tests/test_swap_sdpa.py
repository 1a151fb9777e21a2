"""activate_sdpa: F.scaled_dot_product_attention through fastlm, within a context."""

import pytest
import torch
import torch.nn.functional as F
from swap_models import DIM, HEADS, PAD, x_of
from torch import nn, overrides

from fastlm.swap import activate_sdpa
from fastlm.testing import randn

REFUSED = "scaled_dot_product_attention: dropout_p must be a number from 0 to 1, got 2.0"


def routed(call) -> bool:
    """Whether an attention with an impossible dropout raises fastlm's error, not torch's."""
    with pytest.raises(Exception) as error:
        call()
    return str(error.value) == REFUSED


def test_sdpa_route_is_active_within_its_context():
    q = randn(2, 3, 5, 8)
    bad = lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=2.0)
    before = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with activate_sdpa() as route:
        assert routed(bad)
        inside = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert not routed(bad)
    torch.testing.assert_close(inside, before)
    route.deactivate()  # a second time
    route = activate_sdpa()
    assert routed(bad)
    route.deactivate()
    assert not routed(bad)
    with pytest.raises(KeyError), activate_sdpa():
        raise KeyError
    assert not routed(bad)


def test_sdpa_route_leaves_other_modes_alone():
    class Other(overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen, q = [], randn(2, 3, 5, 8)
    bad = lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=2.0)
    stack = overrides._get_current_function_mode_stack
    before = stack()
    route = activate_sdpa()
    with Other() as other:
        assert routed(bad)
        route.deactivate()  # before the mode that was entered after it
        assert stack() == [*before, other]
        assert not routed(bad)
        seen.clear()
        torch.relu(q)
        assert torch.relu in seen
    assert stack() == before


def test_sdpa_route_reaches_torchs_own_attention():
    module = nn.MultiheadAttention(DIM, HEADS, dropout=0.5, batch_first=True)
    x = x_of()
    module.eval()
    before, weights = module(x, x, x, key_padding_mask=PAD)
    with activate_sdpa():
        after = module(x, x, x, key_padding_mask=PAD, need_weights=False)[0]
        with_weights = module(x, x, x, key_padding_mask=PAD)
        module.dropout = 2.0
        module.train()
        assert routed(lambda: module(x, x, x, need_weights=False))
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(with_weights, (before, weights))


def test_sdpa_route_differentiates_and_compiles():
    q = randn(2, 3, 5, 8).requires_grad_()
    call = lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3) * 2
    (before,) = torch.autograd.grad(call(q).sum(), q)
    with activate_sdpa():
        (after,) = torch.autograd.grad(call(q).sum(), q)
        compiled = torch.compile(call, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(q), call(q))
    torch.testing.assert_close(after, before)


def test_sdpa_route_passes_tensor_subclasses_by():
    class Counting(torch.Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.calls += func is F.scaled_dot_product_attention
            return super().__torch_function__(func, types, args, kwargs)

    q = randn(2, 3, 5, 8).as_subclass(Counting)
    with activate_sdpa():
        out = F.scaled_dot_product_attention(q, q, q)
    assert Counting.calls == 1 and type(out) is Counting
