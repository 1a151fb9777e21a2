"""LayerNorm and RMSNorm, with dropout and residual add before them, as differentiable operators."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from fastlm.backends import Impl, choose, supports_all
from fastlm.ops import _norm_cpu
from fastlm.ops._check import (
    autocast_dtype,
    fail,
    make_seed,
    require_choice,
    require_device,
    require_dropout,
    require_eps,
    require_float,
    require_shape,
)
from fastlm.ops._library import apply, contract, cuda_contract, unwanted
from fastlm.ops._rows import as_rows, contiguous, in_shape, viewed_as
from fastlm.ops._transforms import gradients, in_create_graph, kernels_refuse, trains
from fastlm.reference import norm as reference

CASTINGS = ("torch", "llama", "gemma")


def _norm_fwd_fake(x, residual, weight, bias, seed, eps, dropout_p, kind, out_dtype, keep_z):
    rows, cols = x.shape
    z_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return (
        x.new_empty((rows, cols), dtype=out_dtype),
        x.new_empty((rows, cols), dtype=z_dtype) if keep_z else unwanted(x),
        x.new_empty(rows, dtype=torch.float32) if kind == "layer" else unwanted(x),
        x.new_empty(rows, dtype=torch.float32),
    )


@contract(_norm_fwd_fake)
def norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    kind: str,
    out_dtype: torch.dtype,
    keep_z: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlm.kernels import norm

    return norm.norm_fwd(x, residual, weight, bias, seed, eps, dropout_p, kind, out_dtype, keep_z)


def _norm_bwd_fake(
    dy, dz, z, weight, mean, rstd, seed, dropout_p, kind, dz_dtype, dx_dtype, dweight_dtype,
    dbias_dtype,
):  # fmt: skip
    new = lambda shape, dtype: unwanted(z) if dtype is None else z.new_empty(shape, dtype=dtype)
    cols = z.shape[1]
    return (
        new(z.shape, dz_dtype),
        new(z.shape, dx_dtype),
        new((cols,), dweight_dtype),
        new((cols,), dbias_dtype),
    )


@contract(_norm_bwd_fake)
def norm_bwd(
    dy: torch.Tensor,
    dz: torch.Tensor | None,
    z: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    kind: str,
    dz_dtype: torch.dtype | None,
    dx_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlm.kernels import norm_bwd

    return norm_bwd.norm_bwd(
        dy, dz, z, weight, mean, rstd, seed, dropout_p, kind, dz_dtype, dx_dtype, dweight_dtype,
        dbias_dtype,
    )  # fmt: skip


# Forward and backward, by backend.
_CONTRACTS = {
    "triton": (norm_fwd, norm_bwd),
    "cuda": (cuda_contract(norm_fwd, _norm_fwd_fake), cuda_contract(norm_bwd, _norm_bwd_fake)),
}


class _Norm(torch.autograd.Function):
    """(x, residual, ..., impl) -> (y, mean, rstd, z), without z where it is x or not needed.

    Saves z alone: it depends on x and residual linearly. (None in its place would not compile.)
    """

    @staticmethod
    def forward(x, residual, weight, bias, seed, eps, dropout_p, kind, out_dtype, keep_z, impl):
        # Named: where nothing takes a gradient, torch.compile counts them to see that no ctx comes.
        forward, _ = _CONTRACTS[impl]
        y, z, mean, rstd = forward(
            as_rows(x), None if residual is None else as_rows(residual), weight, bias, seed, eps,
            dropout_p, kind, out_dtype, keep_z,
        )  # fmt: skip
        return in_shape(y, x.shape), mean, rstd, *([in_shape(z, x.shape)] if keep_z else [])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, bias, seed, *options, ctx.impl = inputs
        ctx.eps, ctx.dropout_p, ctx.kind, ctx.out_dtype, _ = options
        _, mean, rstd, *z = output
        ctx.set_materialize_grads(False)
        constants = [rstd] if mean is None else [mean, rstd]
        if not any(ctx.needs_input_grad[:2]):  # z depends on x and residual alone
            constants += z
        ctx.mark_non_differentiable(*constants)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias)]
        ctx.save_for_backward(z[0] if z else x, weight, bias, mean, rstd, seed)

    @staticmethod
    def backward(ctx, dy, _mean, _rstd, dz=None):
        z, weight, bias, mean, rstd, seed = ctx.saved_tensors
        if in_create_graph():
            return *_differentiable_gradients(ctx, dy, dz), *[None] * 7
        need = ctx.needs_input_grad[:4]
        wanted = [t if n else None for t, n in zip(ctx.dtypes, need, strict=True)]
        dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype = wanted
        if dx_dtype == dresidual_dtype and seed is None:
            dx_dtype = None  # one buffer serves both
        if dy is None:
            dy = torch.zeros_like(z)
        _, backward = _CONTRACTS[ctx.impl]
        dz, dx, dweight, dbias = backward(
            as_rows(dy), None if dz is None else as_rows(dz), as_rows(z), weight, mean, rstd, seed,
            ctx.dropout_p, ctx.kind, dresidual_dtype, dx_dtype, dweight_dtype, dbias_dtype,
        )  # fmt: skip
        dresidual = viewed_as(dz, z) if need[1] else None
        dx = (dresidual if dx_dtype is None else viewed_as(dx, z)) if need[0] else None
        dweight = dweight if need[2] else None
        dbias = dbias if need[3] else None
        return dx, dresidual, dweight, dbias, *[None] * 7


def _differentiable_gradients(ctx, dy, dz) -> tuple[torch.Tensor | None, ...]:
    """Of x, residual, weight and bias: z's from the kernel, the first two by torch from that."""
    z, weight, bias, mean, rstd, seed = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    x_dtype, residual_dtype, *_ = ctx.dtypes
    dz, dweight, dbias = gradients(
        partial(_z_gradients, ctx.impl), _z_reference, (dy, dz), (z, weight, bias), (mean, rstd),
        (ctx.kind, ctx.eps, x_dtype, ctx.out_dtype),
        (need_x or need_residual, need_weight, need_bias),
    )  # fmt: skip
    dx = reference.dropout_rows(dz.to(x_dtype), ctx.dropout_p, seed) if need_x else None
    return dx, dz.to(residual_dtype) if need_residual else None, dweight, dbias


def _z_gradients(impl, incoming, inputs, kept, options, needs):
    dy, dz = incoming
    z, weight, _ = inputs
    wanted = [t.dtype if n else None for t, n in zip(inputs, needs, strict=True)]
    dz_dtype, *vectors = wanted
    _, backward = _CONTRACTS[impl]
    dz, _, *dvectors = backward(
        as_rows(torch.zeros_like(z) if dy is None else dy), None if dz is None else as_rows(dz),
        as_rows(z), weight, *kept, None, 0.0, options[0], dz_dtype, None, *vectors,
    )  # fmt: skip
    return tuple(
        viewed_as(g, t) if n else None
        for g, t, n in zip((dz, *dvectors), inputs, needs, strict=True)
    )


def _z_reference(inputs, kept, options):
    z, weight, bias = inputs
    return reference.normalize(z, weight, bias, *options), z


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    prenorm: bool = False,
    impl: Impl | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm of `z = residual + dropout(x)` over the last dimension.

    Args:
        x: (..., cols), fp16, bf16, fp32 (fp64 by the torch backend), any strides.
        weight, bias: (cols,), any floating dtype; None leaves the scale or the shift out.
        eps: at least 0, added to the variance.
        residual: as x, any floating dtype; z has the wider dtype of the two.
        dropout_p: probability of dropping an element of x before the add.
        seed: of the dropout mask; None draws one from torch's generator.
        prenorm: return z as well, for the next residual add.
        impl: the backend; None chooses (see `fastlm.explain`).

    Returns:
        y as x, in x's dtype; with `prenorm` (y, z). Under autocast y is fp32 on CUDA, as torch's
        layer_norm and, in its newer versions, rms_norm are; elsewhere in z's dtype.
        Differentiable in x, weight, bias and residual, through y and z.

    Raises:
        TypeError, ValueError: types, shapes, dtypes, devices or values that do not fit.

    Source: Ba et al., "Layer Normalization", arXiv:1607.06450.
    """
    _check_norm("layer_norm", x, weight, bias, residual, dropout_p, seed, eps)
    return _norm(
        "layer_norm", x, weight, bias, eps, residual, dropout_p, seed, prenorm, "layer", impl
    )


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    prenorm: bool = False,
    casting: str = "torch",
    impl: Impl | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of `z = residual + dropout(x)` over the last dimension.

    Args:
        casting: where rounding to x's dtype happens: "torch", after the product with weight, as
            `torch.nn.RMSNorm`; "llama", before it, as Hugging Face's LlamaRMSNorm (y then has the
            wider dtype of x and weight); "gemma", after the product with 1 + weight.

    The other arguments, what is returned, what is differentiable and the errors are `layer_norm`'s.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    _check_norm("rms_norm", x, weight, None, residual, dropout_p, seed, eps)
    require_choice("rms_norm", "casting", casting, CASTINGS)
    kind = "rms" if casting == "torch" else f"rms_{casting}"
    return _norm("rms_norm", x, weight, None, eps, residual, dropout_p, seed, prenorm, kind, impl)


def _check_norm(op, x, weight, bias, residual, dropout_p, seed, eps) -> None:
    require_float(op, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise fail(op, "x", "have at least one column in its last dimension", tuple(x.shape))
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            require_float(op, name, vector)
            require_shape(op, name, vector, (x.shape[-1],), "(cols,)")
            require_device(op, name, vector, x.device)
    if residual is not None:
        require_float(op, "residual", residual)
        require_shape(op, "residual", residual, x.shape, "of x")
        require_device(op, "residual", residual, x.device)
    require_dropout(op, dropout_p, seed, x.device)
    require_eps(op, eps)


def _kernels_refuse(x, weight, bias, residual) -> str | None:
    return kernels_refuse(x=x, weight=weight, bias=bias, residual=residual)


# Kernels first: one pass over memory where torch composes three; Triton before CUDA C++, as they
# measured (benchmarks/results/norm.csv).
_BACKENDS = {"triton": _kernels_refuse, "cuda": _kernels_refuse, "torch": supports_all}


def _norm(op, x, weight, bias, eps, residual, dropout_p, seed, prenorm, kind, impl):
    backend = choose(op, impl, _BACKENDS, x.device, x, weight, bias, residual)
    seed = make_seed(seed, dropout_p, x.device)
    out_dtype = x.dtype
    if kind == "rms_llama" and weight is not None:
        out_dtype = torch.promote_types(x.dtype, weight.dtype)
    elif autocast_dtype(x.device) is not None and kind in ("layer", "rms"):
        # torch's autocast runs both in fp32 on CUDA (older versions layer_norm alone); elsewhere in
        # the dtype of the sum.
        z_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        out_dtype = torch.float32 if x.is_cuda else z_dtype
    if backend == "torch":
        y, z = _torch_norm(x, weight, bias, eps, residual, dropout_p, seed, kind, out_dtype)
        return (y, z) if prenorm else y
    weight, bias = contiguous(weight), contiguous(bias)
    has_z = residual is not None or seed is not None
    y, _, _, *z = apply(
        _Norm, x, residual, weight, bias, seed, eps, float(dropout_p), kind, out_dtype,
        has_z and (prenorm or trains(x, residual, weight, bias)), backend,
    )  # fmt: skip
    return (y, *(z or [x])) if prenorm else y


def _torch_norm(x, weight, bias, eps, residual, dropout_p, seed, kind, out_dtype):
    """(y, z) by torch's functions where they are ours, else by the reference."""
    z = reference.add_residual(x, residual, dropout_p, seed)
    if _is_own_on_cpu(z, kind, trains(weight, bias)):
        y, *_ = apply(_norm_cpu.CpuNorm, z, weight, bias, kind, eps, x.dtype, out_dtype)
        return y, z
    exact = x.is_cuda or (z.dtype not in _HALVES and z.shape[-1] > 1)
    if exact and all(t is None or t.dtype == out_dtype for t in (x, residual, weight, bias)):
        if kind == "layer":
            return F.layer_norm(z, z.shape[-1:], weight, bias, eps), z
        if kind == "rms":
            return F.rms_norm(z, z.shape[-1:], weight, eps), z
    return reference.normalize(z, weight, bias, kind, eps, x.dtype, out_dtype), z


_HALVES = (torch.float16, torch.bfloat16)
_RMS_FROM = 2**17  # elements from which it is a matter of memory, not of the number of calls


def _is_own_on_cpu(z: torch.Tensor, kind: str, sums: bool) -> bool:
    """Whether `CpuNorm` is to normalise z, in place of torch or the reference; `sums`: a weight or
    bias wants a gradient."""
    if not _norm_cpu.is_for(z):
        return False
    if kind == "layer":  # torch adds up its gradients of vectors row by row
        many = z.numel() > _norm_cpu.ROWS_OF_TORCH * z.shape[-1]
        return z.dtype in _HALVES or (sums and many)
    return z.numel() >= _RMS_FROM
