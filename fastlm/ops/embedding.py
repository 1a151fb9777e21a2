"""Token, position and type embeddings with LayerNorm and dropout as one differentiable operator."""

from __future__ import annotations

import torch

from fastlm.backends import Impl, choose, supports_all
from fastlm.ops._check import (
    fail,
    make_seed,
    require_device,
    require_float,
    require_probability,
    require_shape,
    require_tensor,
)
from fastlm.reference.embedding import embedding as _reference

_BACKENDS = {"torch": supports_all}


def embedding(
    ids: torch.Tensor,
    token_weight: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    position_weight: torch.Tensor | None = None,
    type_ids: torch.Tensor | None = None,
    type_weight: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """The input of a Transformer: `dropout(layer_norm(token + position + type))`.

    Args:
        ids: (..., seqlen), int64 or int32. An id outside its table, here and below, is an error on
            a CPU and a failed device assertion on a GPU.
        token_weight: (vocab, dim), any floating dtype.
        positions: ids' shape, or (seqlen,), int64 or int32; None is 0, 1, ...
        position_weight: (max_seqlen, dim); None adds no positions.
        type_ids: as `positions`; None is type 0 everywhere.
        type_weight: (num_types, dim); None adds no types.
        norm_weight, norm_bias: (dim,); without norm_weight there is no LayerNorm.
        eps: of the LayerNorm, added to the variance; the default is BERT's.
        dropout_p: probability of dropping an element of the result; 0 in evaluation.
        seed: of the dropout mask; None draws one from torch's generator.
        impl: the backend; None chooses (see `fastlm.explain`).

    Returns:
        (..., seqlen, dim) in token_weight's dtype; sums, statistics and dropout are computed in
        fp32 and rounded once. Differentiable in every weight and in norm_bias.

    Raises:
        TypeError, ValueError: types, shapes, dtypes, devices or values that do not fit.

    Sources: Vaswani et al., arXiv:1706.03762, section 3.4; Devlin et al., arXiv:1810.04805.
    """
    op = "embedding"
    _check_ids(op, "ids", ids, ids)
    _check_table(op, "token_weight", token_weight, ids)
    dim = token_weight.shape[1]
    lookups = (
        ("positions", positions, "position_weight", position_weight),
        ("type_ids", type_ids, "type_weight", type_weight),
    )
    for index_name, index, name, table in lookups:
        if table is not None:
            _check_table(op, name, table, ids, dim)
        if index is not None:
            _check_ids(op, index_name, index, ids)
            if table is None:
                raise fail(op, name, f"be given with {index_name}", None)
    if position_weight is not None and positions is None:
        if position_weight.shape[0] < ids.shape[-1]:
            constraint = f"have at least seqlen = {ids.shape[-1]} rows"
            raise fail(op, "position_weight", constraint, position_weight.shape[0])
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None:
            require_float(op, name, vector)
            require_shape(op, name, vector, (dim,), "(dim,)")
            require_device(op, name, vector, ids.device)
    if norm_bias is not None and norm_weight is None:
        raise fail(op, "norm_weight", "be given with norm_bias", None)
    require_probability(op, "dropout_p", dropout_p)
    choose(op, impl, _BACKENDS, ids.device)
    return _reference(
        ids, token_weight, positions=positions, position_weight=position_weight, type_ids=type_ids,
        type_weight=type_weight, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
        dropout_p=dropout_p, seed=make_seed(op, seed, dropout_p, ids.device),
    )  # fmt: skip


def _check_ids(op, name, index, ids) -> None:
    require_tensor(op, name, index)
    if index.dtype not in (torch.int64, torch.int32):
        raise fail(op, name, "have dtype torch.int64 or torch.int32", index.dtype)
    if index.dim() == 0:
        raise fail(op, name, "have shape (..., seqlen)", ())
    if index.shape not in (ids.shape, ids.shape[-1:]):
        constraint = f"have the shape of ids or its last dimension, {tuple(ids.shape)}"
        raise fail(op, name, constraint, tuple(index.shape))
    require_device(op, name, index, ids.device)


def _check_table(op, name, table, ids, dim=None) -> None:
    require_float(op, name, table)
    if table.dim() != 2 or table.shape[0] == 0 or dim not in (None, table.shape[1]):
        constraint = f"have shape (rows, dim) = (at least 1, {'*' if dim is None else dim})"
        raise fail(op, name, constraint, tuple(table.shape))
    require_device(op, name, table, ids.device)
