"""Contracts of the feed-forward's products with epilogues, and which way its products go.

Ways: "cublas", torch's products with one elementwise kernel between them; "cublaslt", the first
product with bias and activation in the library's epilogue, forward alone and without dropout;
"epilogue", our own kernels with everything elementwise in their epilogues.
"""

from __future__ import annotations

import torch

from fastlm.ops._library import contract

# What `fastlm.explain` says of a way.
WAYS = {
    "cublas": "cuBLAS and one elementwise kernel",
    "cublaslt": "cuBLASLt's epilogue",
    "epilogue": "products with bias, activation and dropout in their epilogues",
}


def _empty(like: torch.Tensor, needed: bool, *shape) -> torch.Tensor:
    return like.new_empty(shape if needed else (0,))


def _ffn_up_fake(x, w1, b1, seed, activation, dropout_p, need_z, need_a):
    shape = x.shape[0], w1.shape[0]
    return _empty(x, need_z, *shape), _empty(x, need_a, *shape)


@contract(_ffn_up_fake)
def ffn_up(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    seed: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    need_z: bool,
    need_a: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from fastlm.kernels import ffn_matmul

    return ffn_matmul.ffn_up(x, w1, b1, seed, activation, dropout_p, need_z, need_a)


def _ffn_down_bwd_fake(dy, w2, z, seed, activation, dropout_p, need_dz, db1_dtype, need_a):
    return (
        _empty(z, need_dz, *z.shape),
        _empty(z, db1_dtype is not None, z.shape[1]).to(db1_dtype or z.dtype),
        _empty(z, need_a, *z.shape),
    )


@contract(_ffn_down_bwd_fake)
def ffn_down_bwd(
    dy: torch.Tensor,
    w2: torch.Tensor,
    z: torch.Tensor,
    seed: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    need_dz: bool,
    db1_dtype: torch.dtype | None,
    need_a: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlm.kernels import ffn_matmul

    return ffn_matmul.ffn_down_bwd(
        dy, w2, z, seed, activation, dropout_p, need_dz, db1_dtype, need_a
    )


def _gated_up_fake(x, w_gate, w_up, activation, need_products, need_a):
    shape = x.shape[0], w_gate.shape[0]
    return tuple(_empty(x, needed, *shape) for needed in (need_products, need_products, need_a))


@contract(_gated_up_fake)
def gated_up(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    activation: str,
    need_products: bool,
    need_a: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlm.kernels import ffn_matmul

    return ffn_matmul.gated_up(x, w_gate, w_up, activation, need_products, need_a)


def _gated_down_bwd_fake(dy, w_down, gate, up, activation, need_dgate, need_dup, need_a):
    return tuple(_empty(gate, needed, *gate.shape) for needed in (need_dgate, need_dup, need_a))


@contract(_gated_down_bwd_fake)
def gated_down_bwd(
    dy: torch.Tensor,
    w_down: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    need_dgate: bool,
    need_dup: bool,
    need_a: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlm.kernels import ffn_matmul

    return ffn_matmul.gated_down_bwd(dy, w_down, gate, up, activation, need_dgate, need_dup, need_a)


def choose_way(
    op: str,
    forced: str | None,
    backend: str,
    x: torch.Tensor,
    dtype: torch.dtype,
    dims: tuple[int, int],
    keep: bool,
    library: bool,
) -> str:
    """The way of a call.

    Args:
        forced: a way that tests and benchmarks ask for; else the table of kernels/configs.py says.
        dtype: of the products.
        dims: (the wider of dim and out_dim, hidden_dim).
        keep: the hidden layer is kept for the backward pass.
        library: activation and options are such that cuBLASLt has an epilogue for them.

    Raises:
        NotImplementedError: the forced way cannot take the call.
    """
    refused = dict.fromkeys(WAYS)
    if backend != "triton":
        refused["epilogue"] = "is made of Triton kernels"
    elif dtype not in (torch.float16, torch.bfloat16):
        refused["epilogue"] = f"takes fp16 and bf16, not {dtype}"
    if keep or not library:
        refused["cublaslt"] = "has a bias, relu or gelu_tanh, no dropout, and keeps nothing"
    if forced is not None:
        if refused[forced] is not None:
            raise NotImplementedError(f"{op}: way={forced!r} {refused[forced]}; use way='cublas'")
        return forced
    from fastlm.kernels.configs import ffn_way

    rows = x.numel() // max(x.shape[-1], 1)
    way = ffn_way(_architecture(x.device.type, x.device.index or 0), op, keep, rows, *dims)
    return way if refused[way] is None else "cublas"


def library_has(activation: str, b1: torch.Tensor | None, dropout: bool, x: torch.Tensor) -> bool:
    """Whether cuBLASLt has the epilogue. Its GELU is the tanh one; on a CPU torch's call of the
    same name takes erf's."""
    known = activation == "relu" or (activation == "gelu_tanh" and x.is_cuda)
    return known and b1 is not None and not dropout


def library_up(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, activation: str):
    """activation(x w1^T + b1) where `library_has` it."""
    gelu = activation == "gelu_tanh"
    return torch._addmm_activation(b1.to(x.dtype), x, w1.t(), use_gelu=gelu)


def _architecture(kind: str, index: int) -> str:
    from fastlm.kernels.configs import target

    return target(torch.device(kind, index) if kind == "cuda" else torch.device(kind))


_architecture._dynamo_marked_constant = True  # see fastlm.backends
