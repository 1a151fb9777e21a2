"""Token, position and type embeddings with LayerNorm and dropout as one differentiable operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastlm.backends import Impl, choose, supports_all
from fastlm.ops import _norm_cpu
from fastlm.ops._check import (
    fail,
    make_seed,
    require_device,
    require_dropout,
    require_eps,
    require_float,
    require_rows,
    require_shape,
    require_tensor,
)
from fastlm.ops._library import apply, contract
from fastlm.ops._rows import as_rows, contiguous, in_shape
from fastlm.ops._transforms import gradients, in_plain_eager, kernels_refuse
from fastlm.reference.dropout import dropout_rows
from fastlm.reference.embedding import embedding as _reference
from fastlm.reference.norm import layer_norm

_TABLES = ("token_weight", "position_weight", "type_weight", "norm_weight", "norm_bias")


def _embedding_fwd_fake(
    ids, positions, type_ids, token_weight, position_weight, type_weight, norm_weight, norm_bias,
    seed, eps, dropout_p,
):  # fmt: skip
    rows = ids.numel()
    stats = 0 if norm_weight is None else rows
    return (
        token_weight.new_empty((rows, token_weight.shape[1])),
        token_weight.new_empty(stats, dtype=torch.float32),
        token_weight.new_empty(stats, dtype=torch.float32),
    )


@contract(_embedding_fwd_fake)
def embedding_fwd(
    ids: torch.Tensor,
    positions: torch.Tensor | None,
    type_ids: torch.Tensor | None,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor | None,
    type_weight: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlm.kernels import embedding

    return embedding.embedding_fwd(
        ids, positions, type_ids, token_weight, position_weight, type_weight, norm_weight,
        norm_bias, seed, eps, dropout_p,
    )  # fmt: skip


def _embedding_bwd_fake(
    dy, ids, positions, type_ids, token_weight, position_weight, type_weight, norm_weight, mean,
    rstd, seed, dropout_p, padding_idx, table_rows, *dtypes,
):  # fmt: skip
    dim = dy.shape[1]
    shapes = [(rows, dim) for rows in table_rows] + [(dim,), (dim,)]
    return tuple(
        dy.new_empty((0,) if dtype is None else shape, dtype=dtype or torch.float32)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


@contract(_embedding_bwd_fake)
def embedding_bwd(
    dy: torch.Tensor,
    ids: torch.Tensor,
    positions: torch.Tensor | None,
    type_ids: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    position_weight: torch.Tensor | None,
    type_weight: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    padding_idx: int,
    table_rows: Sequence[int],
    token_dtype: torch.dtype | None,
    position_dtype: torch.dtype | None,
    type_dtype: torch.dtype | None,
    norm_weight_dtype: torch.dtype | None,
    norm_bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastlm.kernels import embedding

    return embedding.embedding_bwd(
        dy, ids, positions, type_ids, token_weight, position_weight, type_weight, norm_weight,
        mean, rstd, seed, dropout_p, padding_idx, table_rows, token_dtype, position_dtype,
        type_dtype, norm_weight_dtype, norm_bias_dtype,
    )  # fmt: skip


class _Embedding(torch.autograd.Function):
    """(ids, positions, type_ids, 5 tables, seed, eps, dropout_p, padding_idx) -> (y, mean, rstd).

    With LayerNorm the tables are saved, to look the sum up again; without it, indices alone.
    """

    @staticmethod
    def forward(
        ids, positions, type_ids, token_weight, position_weight, type_weight, norm_weight,
        norm_bias, seed, eps, dropout_p, padding_idx,
    ):  # fmt: skip
        vectors = contiguous(norm_weight), contiguous(norm_bias)
        y, mean, rstd = embedding_fwd(
            *_flat(ids, positions, type_ids), token_weight, position_weight, type_weight, *vectors,
            seed, eps, dropout_p,
        )  # fmt: skip
        return in_shape(y, (*ids.shape, token_weight.shape[1])), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        *indices_and_tables, seed, ctx.eps, ctx.dropout_p, ctx.padding_idx = inputs
        indices, tables = indices_and_tables[:3], indices_and_tables[3:]
        _, mean, rstd = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in tables]
        if tables[3] is None:
            tables = [None] * 5
        ctx.save_for_backward(*indices, *tables, mean, rstd, seed)

    @staticmethod
    def backward(ctx, dy, _mean, _rstd):
        if dy is None:
            return (None,) * 12
        saved = ctx.saved_tensors  # once: checkpoint gives them away
        indices, tables = saved[:3], saved[3:8]
        if tables[3] is None:  # without LayerNorm only shapes and dtypes count: no memory
            new = lambda shape, dtype: dy.new_zeros((), dtype=dtype).expand(shape)
            tables = [None if like is None else new(*like) for like in ctx.like]
        grads = gradients(
            _gradients, _differentiable, (dy,), tables, (*indices, *saved[8:]),
            (ctx.eps, ctx.dropout_p, ctx.padding_idx), ctx.needs_input_grad[3:8],
        )  # fmt: skip
        return None, None, None, *grads, None, None, None, None


def _flat(ids, positions, type_ids):
    """As the kernels take them: ids (batch, seqlen), the others as well or (seqlen,)."""
    others = (x if x is None or x.dim() == 1 else as_rows(x) for x in (positions, type_ids))
    return as_rows(ids), *others


def _gradients(incoming, inputs, kept, options, needs):
    *indices, mean, rstd, seed = kept
    _, dropout_p, padding_idx = options
    tables, norm_weight = inputs[:3], inputs[3]
    wanted = [t.dtype if n else None for t, n in zip(inputs, needs, strict=True)]
    grads = embedding_bwd(
        as_rows(incoming[0]), *_flat(*indices),
        *([None] * 4 if norm_weight is None else (*tables, contiguous(norm_weight))),
        mean, rstd, seed,
        dropout_p, padding_idx, [0 if t is None else t.shape[0] for t in tables], *wanted,
    )  # fmt: skip
    return tuple(g if n else None for g, n in zip(grads, needs, strict=True))


def _differentiable(inputs, kept, options):
    ids, positions, type_ids, *_, seed = kept
    eps, dropout_p, padding_idx = options
    y = _reference(
        ids, positions=positions, type_ids=type_ids, seed=seed, eps=eps, dropout_p=dropout_p,
        padding_idx=None if padding_idx < 0 else padding_idx,
        **dict(zip(_TABLES, inputs, strict=True)),
    )  # fmt: skip
    return (y,)


def _kernels_refuse(tables) -> str | None:
    return kernels_refuse(**dict(zip(_TABLES, tables, strict=True)))


# The kernels first: one pass over memory where torch composes five.
_BACKENDS = {"triton": _kernels_refuse, "torch": supports_all}


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
    padding_idx: int | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """The input of a Transformer: `dropout(layer_norm(token + position + type))`.

    Args:
        ids: (..., seqlen), int64 or int32. An id outside its table, here and below, is an
            IndexError on a CPU; on a GPU it is NaN for that token by the kernels, and a failed
            device assertion by the torch backend.
        token_weight: (vocab, dim), any floating dtype.
        positions: ids' shape, or (seqlen,), int64 or int32; None is 0, 1, ...
        position_weight: (max_seqlen, dim); None adds no positions.
        type_ids: as `positions`; None is type 0 everywhere.
        type_weight: (num_types, dim); None adds no types.
        norm_weight, norm_bias: (dim,); without norm_weight there is no LayerNorm.
        padding_idx: a row of token_weight, negative ones counted from the end, that is read like
            the others and has gradient 0, as in `torch.nn.Embedding`; None is none.
        eps: of the LayerNorm, added to the variance; the default is BERT's.
        dropout_p: probability of dropping an element of the result; 0 in evaluation.
        seed: of the dropout mask; None draws one from torch's generator.
        impl: the backend; None chooses (see `fastlm.explain`).

    Returns:
        (..., seqlen, dim) in token_weight's dtype; sums, statistics and dropout are computed in
        fp32 and rounded once. Differentiable in every weight and in norm_bias, with the same bits
        from the same inputs; gradients of tables are dense.

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
    require_dropout(op, dropout_p, seed, ids.device)
    require_eps(op, eps)
    vocab = token_weight.shape[0]
    if padding_idx is not None:
        _check_padding(op, padding_idx, vocab)
    tables = (token_weight, position_weight, type_weight, norm_weight, norm_bias)
    backend = choose(op, impl, _BACKENDS, ids.device, tables)
    seed = make_seed(seed, dropout_p, ids.device)
    if backend == "torch":
        y = _torch_sum(ids, positions, type_ids, *tables[:3], padding_idx, norm_weight is not None)
        if norm_weight is not None:
            y = _normalized(y, norm_weight, norm_bias, eps)
        return dropout_rows(y, dropout_p, seed).to(token_weight.dtype)
    padding_idx = -1 if padding_idx is None else padding_idx % vocab
    y, _, _ = apply(
        _Embedding, ids, positions, type_ids, *tables, seed, float(eps), float(dropout_p),
        padding_idx,
    )  # fmt: skip
    return y


def _torch_sum(ids, positions, type_ids, token_weight, position_weight, type_weight, *options):
    try:
        return _sum(ids, positions, type_ids, token_weight, position_weight, type_weight, *options)
    except IndexError:
        if in_plain_eager():
            for name, index, table in (
                ("ids", ids, token_weight),
                ("positions", positions, position_weight),
                ("type_ids", type_ids, type_weight),
            ):
                if index is not None:
                    require_rows("embedding", name, index, table.shape[0])
        raise


def _sum(
    ids, positions, type_ids, token_weight, position_weight, type_weight, padding_idx, wide
):  # fmt: skip
    """What the tables have for each token, added in fp32 (fp64 for fp64) in as few passes as torch
    can; `wide` keeps that dtype, as more than one rounding to a half would."""
    y = F.embedding(ids, token_weight, padding_idx)
    rows = []
    if position_weight is not None:
        rows.append(
            position_weight[: ids.shape[-1]] if positions is None
            else F.embedding(positions, position_weight)
        )  # fmt: skip
    if type_weight is not None:
        rows.append(type_weight[0] if type_ids is None else F.embedding(type_ids, type_weight))
    acc = torch.promote_types(y.dtype, torch.float32)
    if wide or len(rows) > 1 or any(t.dtype != y.dtype for t in rows):
        y = y + rows.pop(0).to(acc) if rows and y.dtype != acc else y.to(acc)
    in_place = in_plain_eager()
    for t in rows:
        y = y.add_(t) if in_place else y + t.to(y.dtype)
    return y


def _normalized(y, weight, bias, eps) -> torch.Tensor:
    if _norm_cpu.is_for(y):
        return apply(_norm_cpu.CpuNorm, y, weight, bias, "layer", eps, y.dtype, y.dtype)[0]
    return layer_norm(y, weight, bias, eps=eps)


def _check_padding(op, padding_idx, vocab) -> None:
    constraint = f"be an integer from {-vocab} to {vocab - 1}"
    if not isinstance(padding_idx, int) or isinstance(padding_idx, bool):
        raise fail(op, "padding_idx", constraint, type(padding_idx).__name__, TypeError)
    if not -vocab <= padding_idx < vocab:
        raise fail(op, "padding_idx", constraint, padding_idx)


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
