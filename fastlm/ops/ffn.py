"""Fused activations and feed-forward blocks as differentiable operators."""

from __future__ import annotations

import torch

from fastlm.backends import INTERPRETED, Impl, choose, supports_all
from fastlm.ops._check import (
    autocast_dtype,
    fail,
    make_seed,
    require_bool,
    require_choice,
    require_device,
    require_dropout,
    require_float,
    require_shape,
)
from fastlm.ops._ffn_functions import BiasAct, Ffn, GatedFfn, Glu
from fastlm.ops._ffn_matmul import WAYS, choose_way, library_has
from fastlm.ops._library import apply
from fastlm.ops._rows import contiguous
from fastlm.ops._transforms import in_functorch, kernels_refuse, trains
from fastlm.reference import ffn as reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def bias_act(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """dropout(activation(x + bias)) in one pass; the kernels' backward keeps x and bias alone.

    Args:
        x: (..., cols), fp16, bf16, fp32 (fp64 by the torch backend), any strides.
        bias: (cols,), any floating dtype; the sum is taken in fp32 (of bf16 on a CPU in bf16).
        activation: "gelu" (erf), "gelu_tanh", "relu", "relu2" (its square), "silu" or
            "quick_gelu" (x * sigmoid(1.702 x)).
        dropout_p: probability of dropping an element after the activation.
        seed: of the dropout mask; None draws one from torch's generator.
        impl: the backend; None chooses (see `fastlm.explain`).

    Returns:
        As x, in x's dtype, under autocast too. Differentiable in x and bias.

    Raises:
        ValueError: shapes, dtypes, devices, probabilities or activations that do not fit.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.
    """
    _check_input("bias_act", "x", x)
    _check_bias("bias_act", "bias", bias, x, x.shape[-1], "(cols,)")
    require_choice("bias_act", "activation", activation, ACTIVATIONS)
    require_dropout("bias_act", dropout_p, seed, x.device)
    tensors = {"x": x, "bias": bias}
    backend = choose("bias_act", impl, _BIASED_BACKENDS, x.device, tensors)
    seed = make_seed(seed, dropout_p, x.device)
    if backend == "torch":
        if seed is None and bias is not None and _as_torch(x, bias):
            return reference.ACTIVATIONS[activation](x + bias)
        return reference.bias_act(x, bias, activation=activation, dropout_p=dropout_p, seed=seed)
    return apply(BiasAct, x, contiguous(bias), seed, activation, float(dropout_p), backend)


def glu(
    gate: torch.Tensor, up: torch.Tensor, *, activation: str = "silu", impl: Impl | None = None
) -> torch.Tensor:
    """activation(gate) * up in one pass; the kernels' backward keeps gate and up alone.

    Args:
        gate, up: of one shape, fp16, bf16, fp32 (fp64 by the torch backend), any strides: halves
            of one product are taken as they are.
        activation: one of `bias_act`'s.
        impl: the backend; None chooses (see `fastlm.explain`).

    Returns:
        As gate, in the wider dtype of the two. Differentiable in gate and up.

    Raises:
        ValueError: shapes, dtypes, devices or activations that do not fit.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    _check_input("glu", "gate", gate)
    require_float("glu", "up", up)
    require_shape("glu", "up", up, gate.shape, "of gate")
    require_device("glu", "up", up, gate.device)
    require_choice("glu", "activation", activation, ACTIVATIONS)
    tensors = {"gate": gate, "up": up}
    backend = choose("glu", impl, _GATED_BACKENDS, gate.device, tensors)
    if backend == "torch":
        return _torch_glu(gate, up, activation=activation)
    return apply(Glu, gate, up, activation, backend)


def ffn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    recompute: bool = False,
    impl: Impl | None = None,
) -> torch.Tensor:
    """dropout(activation(x w1^T + b1)) w2^T + b2, the Transformer's feed-forward block.

    The matrix products are torch's, and bias, activation and dropout one kernel between them; or,
    where that was measured to be faster, they are in the products' epilogues (`fastlm.explain` says
    which). The backward pass keeps x and x w1^T + b1 (the torch backend also what is activated),
    with `recompute` x alone; frozen weights cost nothing.

    Args:
        x: (..., dim), fp16, bf16, fp32 (fp64 by the torch backend), any strides.
        w1: (hidden_dim, dim), as `torch.nn.Linear.weight`; b1: (hidden_dim,) or None.
        w2: (out_dim, hidden_dim); b2: (out_dim,) or None.
        activation: one of `bias_act`'s.
        dropout_p: probability of dropping a hidden element, after the activation.
        seed: of the dropout mask; None draws one from torch's generator.
        recompute: compute the hidden layer again in the backward pass instead of keeping it.
        impl: the backend of bias, activation and dropout; None chooses (see `fastlm.explain`).

    Returns:
        (..., out_dim) in x's dtype, to which weights of another dtype are cast; in autocast's dtype
        under autocast, as `F.linear`. Differentiable in x, w1, b1, w2, b2.

    Raises:
        ValueError: shapes, dtypes, devices, probabilities or activations that do not fit.

    Source: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, section 3.3.
    """
    return ffn_by(
        None, x, w1, b1, w2, b2,
        activation=activation, dropout_p=dropout_p, seed=seed, recompute=recompute, impl=impl,
    )  # fmt: skip


def ffn_by(way: str | None, x, w1, b1, w2, b2, *, activation, dropout_p, seed, recompute, impl):
    """`ffn`, its products forced to go a way of `WAYS`: for tests and benchmarks."""
    _check_input("ffn", "x", x)
    _check_weight("ffn", "w1", w1, x, x.shape[-1], ("hidden_dim", "dim"))
    _check_bias("ffn", "b1", b1, x, w1.shape[0], "(hidden_dim,)")
    _check_weight("ffn", "w2", w2, x, w1.shape[0], ("out_dim", "hidden_dim"))
    _check_bias("ffn", "b2", b2, x, w2.shape[0], "(out_dim,)")
    require_choice("ffn", "activation", activation, ACTIVATIONS)
    require_dropout("ffn", dropout_p, seed, x.device)
    require_bool("ffn", "recompute", recompute)
    tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    keep = not recompute and trains(x, w1, b1, w2)
    dtype = _product_dtype(x)
    library = library_has(activation, b1, dropout_p > 0.0, x)
    dims = max(w1.shape[1], w2.shape[0]), w1.shape[0]
    goes = lambda backend: choose_way("ffn", way, backend, x, dtype, dims, keep, library)
    how = lambda backend: None if backend == "torch" else WAYS[goes(backend)]
    backends, free = _BIASED_BACKENDS, not isinstance(impl, str)
    if free and (x.is_cuda or INTERPRETED) and goes("triton") == "epilogue":
        backends = _GATED_BACKENDS  # Triton first: it alone has what was faster than CUDA C++ here
    backend = choose("ffn", impl, backends, x.device, tensors, how=how)
    seed, x = make_seed(seed, dropout_p, x.device), x.to(dtype)
    if backend == "torch":
        recompute = recompute and not in_functorch()
        return reference.ffn(
            x, w1, b1, w2, b2,
            activation=activation, dropout_p=dropout_p, seed=seed, recompute=recompute,
        )  # fmt: skip
    w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
    options = (activation, float(dropout_p), keep, backend, goes(backend))
    y, *_ = apply(Ffn, x, w1, contiguous(b1), w2, b2, seed, *options)
    return y


def gated_ffn(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    *,
    activation: str = "silu",
    recompute: bool = False,
    impl: Impl | None = None,
) -> torch.Tensor:
    """(activation(x w_gate^T) * (x w_up^T)) w_down^T, as in Llama ("silu") and GEGLU ("gelu").

    The matrix products are torch's, and activation and product one kernel between them; or they are
    in the products' epilogues, as in `ffn`. The backward pass keeps x and the two products, with
    `recompute` x alone.

    Args:
        x: (..., dim), fp16, bf16, fp32 (fp64 by the torch backend), any strides.
        w_gate, w_up: (hidden_dim, dim), as `torch.nn.Linear.weight`.
        w_down: (out_dim, hidden_dim).
        activation: one of `bias_act`'s.
        recompute: compute the hidden layer again in the backward pass instead of keeping it.
        impl: the backend of the gated activation; None chooses (see `fastlm.explain`).

    Returns:
        (..., out_dim); dtypes and autocast as in `ffn`. Differentiable in x and the weights.

    Raises:
        ValueError: shapes, dtypes, devices or activations that do not fit.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    return gated_ffn_by(
        None, x, w_gate, w_up, w_down, activation=activation, recompute=recompute, impl=impl
    )


def gated_ffn_by(way: str | None, x, w_gate, w_up, w_down, *, activation, recompute, impl):
    """`gated_ffn`, its products forced to go a way of `WAYS`: for tests and benchmarks."""
    op = "gated_ffn"
    _check_input(op, "x", x)
    _check_weight(op, "w_gate", w_gate, x, x.shape[-1], ("hidden_dim", "dim"))
    _check_weight(op, "w_up", w_up, x, x.shape[-1], ("hidden_dim", "dim"))
    require_shape(op, "w_up", w_up, w_gate.shape, "of w_gate")
    _check_weight(op, "w_down", w_down, x, w_gate.shape[0], ("out_dim", "hidden_dim"))
    require_choice(op, "activation", activation, ACTIVATIONS)
    require_bool(op, "recompute", recompute)
    tensors = {"x": x, "w_gate": w_gate, "w_up": w_up, "w_down": w_down}
    keep = not recompute and trains(*tensors.values())
    dtype = _product_dtype(x)
    dims = max(w_gate.shape[1], w_down.shape[0]), w_gate.shape[0]
    goes = lambda backend: choose_way(op, way, backend, x, dtype, dims, keep, False)
    how = lambda backend: None if backend == "torch" else WAYS[goes(backend)]
    backend = choose(op, impl, _GATED_BACKENDS, x.device, tensors, how=how)
    x = x.to(dtype)
    weights = (w_gate, w_up, w_down)
    if backend == "torch":
        recompute = recompute and not in_functorch()
        return reference.gated_ffn(
            x, *weights, activation=activation, recompute=recompute, glu=_torch_glu
        )
    weights = (w.to(x.dtype) for w in weights)
    y, *_ = apply(GatedFfn, x, *weights, activation, keep, backend, goes(backend))
    return y


def _torch_glu(gate: torch.Tensor, up: torch.Tensor, *, activation: str) -> torch.Tensor:
    if _as_torch(gate, up):
        return reference.ACTIVATIONS[activation](gate) * up
    return reference.glu(gate, up, activation=activation)


def _as_torch(*tensors: torch.Tensor) -> bool:
    """Whether a CPU rounds what is between two operations, as torch does, to be as fast: in bf16,
    whose range such a value cannot leave."""
    return all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)


def _check_input(op: str, arg: str, x) -> None:
    require_float(op, arg, x)
    if x.dim() == 0:
        raise fail(op, arg, "have at least one dimension", tuple(x.shape))


def _check_weight(op: str, arg: str, weight, x: torch.Tensor, cols: int, form: tuple) -> None:
    require_float(op, arg, weight)
    require_device(op, arg, weight, x.device)
    if weight.dim() != 2 or weight.shape[1] != cols:
        constraint = f"have shape ({form[0]}, {form[1]}) = (*, {cols})"
        raise fail(op, arg, constraint, tuple(weight.shape))


def _check_bias(op: str, arg: str, bias, x: torch.Tensor, cols: int, form: str) -> None:
    if bias is not None:
        require_float(op, arg, bias)
        require_shape(op, arg, bias, (cols,), form)
        require_device(op, arg, bias, x.device)


def _kernels_refuse(tensors: dict[str, torch.Tensor | None]) -> str | None:
    return kernels_refuse(**tensors)


# Kernels first: one pass over memory where torch composes up to four. By benchmarks/results/ffn.csv
# CUDA C++ is the faster of both for bias_act, and so for ffn but where a table says that epilogues
# are faster yet, and Triton for glu.
_GATED_BACKENDS = {"triton": _kernels_refuse, "cuda": _kernels_refuse, "torch": supports_all}
_BIASED_BACKENDS = {"cuda": _kernels_refuse, "triton": _kernels_refuse, "torch": supports_all}


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    """What `F.linear` would compute in: autocast lowers everything but fp64."""
    lower = autocast_dtype(x.device)
    return x.dtype if lower is None or x.dtype == torch.float64 else lower
