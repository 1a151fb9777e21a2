"""Cross-entropy of a linear head, or of logits, in chunks of tokens, composed of torch's functions.

    logits = x @ weight.T + bias, or x;  loss, ds: as in kernels/loss.py
    dx = ds @ weight, or ds;  dweight = ds.T @ x;  dbias = sum_rows(ds)

There is never a (tokens, vocab) tensor of a head: ds takes the place of a chunk's logits, and goes
into its part of every gradient while it is there, so the head is multiplied three times, as by
eager. On a CPU a chunk goes block by block, so that all passes over logits but the first are over
what the caches hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastlm.ops._check import require_classes
from fastlm.ops._library import contract
from fastlm.ops._rows import Widened

# Logits of one chunk: 32 MB of fp32 stay near the caches of a CPU, 512 MB fill a GPU. A chunk has
# at least 256 rows, or its matrix products would be bound by reading the head.
_CHUNK = {"cpu": 2**23}
_CHUNK_ELSEWHERE = 2**27
_CHUNK_ROWS = 256
_BLOCK = 2**18  # logits of one block of a CPU, for each thread: 1 MB of fp32
# Chunks up to which a bf16 gradient is rounded once a chunk; more of them are added up in fp32.
_ROUNDINGS = 8


@dataclass(frozen=True)
class _Options:
    label_smoothing: float
    z_loss: float
    softcap: float | None


def gradient_dtypes(x, weight) -> tuple[torch.dtype, torch.dtype]:
    """Of dx and dweight, from `chunked_linear_cross_entropy`: fp16 may not hold them unscaled."""
    unscaled = lambda t: torch.float32 if t.dtype == torch.float16 else t.dtype
    if weight is None or weight.dtype != torch.bfloat16:
        return unscaled(x), unscaled(x if weight is None else weight)
    few = x.shape[0] <= _ROUNDINGS * _chunk_rows(x.device, weight.shape[0])
    return unscaled(x), torch.bfloat16 if few else torch.float32


def _fake(
    x, weight, bias, target, class_weight, dloss, dtype, ignore_index, label_smoothing, z_loss,
    softcap, mean, need_dx, need_dweight, need_dbias,
):  # fmt: skip
    acc = torch.promote_types(dtype, torch.float32)
    dx_dtype, dweight_dtype = gradient_dtypes(x, weight)
    new = lambda needed, like, dtype=acc: x.new_empty(
        like.shape if needed and like is not None else (0,), dtype=dtype
    )
    return (
        new(True, target),
        x.new_empty((), dtype=acc),
        new(need_dx, x, dx_dtype),
        new(need_dweight, weight, dweight_dtype),
        new(need_dbias, bias),
    )


@contract(_fake)
def chunked_linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    dloss: torch.Tensor | None,
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    mean: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, total, dx, dweight, dbias): losses of rows and the sum of their weights w[y], fp32
    (fp64 for fp64); gradients in `gradient_dtypes`, dbias as loss, empty where not needed.

    Args:
        x, weight, bias, target: (tokens, dim), (vocab, dim), (vocab,), (tokens,); x is the logits
            where weight is None.
        dloss: (tokens,), the incoming gradient of each loss; None: 1 each.
        dtype: of the matrix products.
        mean: gradients are those of the mean, and dloss of it.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        acc = torch.promote_types(dtype, torch.float32)
        vocab, classes = _vocab(x, weight), None if class_weight is None else class_weight.to(acc)
        index = _kept_rows(target, ignore_index, vocab, weight is not None)
        kept, y, w_y = _targets(target, ignore_index, classes, acc)
        total = w_y.sum()
        row = kept.to(acc) if dloss is None else torch.where(kept, dloss.to(acc), 0.0)
        if mean:
            row = row * torch.where(total == 0.0, 0.0, 1.0 / total)
        options, head = _Options(label_smoothing, z_loss, softcap), None
        if weight is not None:
            head = weight.to(dtype), None if bias is None else bias.to(dtype)
        sums = _Sums(x, weight, bias, need_dx, need_dweight, need_dbias, acc, index is not None)
        loss = x.new_zeros(target.shape, dtype=acc)
        for rows in _chunks(x, vocab, weight is not None, index):
            x_c, some = x[rows].to(dtype), [t[rows] for t in (kept, y, w_y, row)]
            if x.device.type != "cpu":  # else there is no ignored row in the chunk
                x_c = x_c.masked_fill(~some[0][:, None], 0.0)  # not even its NaN reaches a gradient
            own = sums.place(rows, head)
            loss[rows], ds = _chunk(x_c, head, *some, classes, options, sums.wanted, own)
            sums.add(rows, x_c, head, ds if own is None else None)
        return loss, total, *sums.results()


class _Sums:
    """The gradients, to which each chunk adds its part."""

    def __init__(self, x, weight, bias, need_dx, need_dweight, need_dbias, acc, gathers):
        self.wanted = need_dx or need_dweight or need_dbias
        self.first = True
        dx_dtype, dweight_dtype = gradient_dtypes(x, weight)
        new = lambda make, needed, like, dtype: make(like.shape if needed else (0,), dtype=dtype)
        # Ignored rows get no chunk.
        self.dx = new(x.new_zeros if gathers else x.new_empty, need_dx, x, dx_dtype)
        self.dweight = new(x.new_empty, need_dweight, weight, dweight_dtype)
        self.dbias = new(x.new_zeros, need_dbias, bias, acc)

    def place(self, rows, head) -> torch.Tensor | None:
        """Where the gradients of these rows of logits may be written, needing no `add`."""
        direct = head is None and isinstance(rows, slice) and self.dx.numel() > 0
        return self.dx[rows] if direct else None

    def add(self, rows, x, head, ds: torch.Tensor | None) -> None:
        if self.dx.numel() and ds is not None:
            self.dx[rows] = (ds if head is None else ds @ head[0]).to(self.dx.dtype)
        if self.dweight.numel():
            _add_product(self.dweight, ds, x, self.first)
        if self.dbias.numel():
            self.dbias += ds.sum(0, dtype=self.dbias.dtype)
        self.first = False

    def results(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.first:  # there was no chunk
            self.dweight.zero_()
        return self.dx, self.dweight, self.dbias


def _vocab(x: torch.Tensor, weight: torch.Tensor | None) -> int:
    return x.shape[1] if weight is None else weight.shape[0]


def _targets(target, ignore_index, class_weight, acc) -> tuple[torch.Tensor, ...]:
    """Of each row whether it is kept, its class y and its weight w[y], both 0 where it is not."""
    kept = target != ignore_index
    y = torch.where(kept, target, 0).long()
    w_y = kept.to(acc) if class_weight is None else torch.where(kept, class_weight[y], 0.0)
    return kept, y, w_y


def _kept_rows(target, ignore_index, vocab, linear) -> torch.Tensor | None:
    """The rows that are not ignored, or None for all: they are known without a sync on a CPU alone,
    and elsewhere every row is computed."""
    if target.device.type != "cpu":
        return None
    kept = (target != ignore_index).nonzero().squeeze(1)
    op = "linear_cross_entropy" if linear else "cross_entropy"
    require_classes(op, "target", target[kept], ignore_index, vocab)
    return kept if len(kept) < target.shape[0] else None


def _chunk_rows(device: torch.device, vocab: int) -> int:
    return max(_CHUNK.get(device.type, _CHUNK_ELSEWHERE) // vocab, _CHUNK_ROWS)


def _chunks(x, vocab, linear, index) -> Iterator[slice | torch.Tensor]:
    """The rows of each chunk: a slice, or the indices of rows that are not ignored."""
    tokens = x.shape[0] if index is None else len(index)
    # Logits that nobody has to make or gather are one.
    size = _chunk_rows(x.device, vocab) if linear or index is not None else max(tokens, 1)
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        yield rows if index is None else index[rows]


def _add_product(dweight: torch.Tensor, ds: torch.Tensor, x: torch.Tensor, first: bool) -> None:
    """dweight (+)= ds.T @ x; a product in another dtype is made in slices."""
    if dweight.dtype == ds.dtype:
        if first:
            torch.mm(ds.t(), x, out=dweight)
        else:
            dweight.addmm_(ds.t(), x)
        return
    size = max(_CHUNK.get(x.device.type, _CHUNK_ELSEWHERE) // (4 * x.shape[1] + 1), _CHUNK_ROWS)
    for rows, columns in zip(dweight.split(size), ds.split(size, 1), strict=True):
        part = columns.t() @ x
        rows.copy_(part) if first else rows.add_(part)


def _chunk(x, head, kept, y, w_y, row, class_weight, options: _Options, gradients: bool, own):
    """(loss, ds) of some rows, ds in the logits' dtype, or what is to hold it, or None; block by
    block on a CPU."""
    s = x if head is None else F.linear(x, *head)
    if not gradients and options.z_loss == 0.0 and options.softcap is None:
        smooth = {"label_smoothing": options.label_smoothing}
        loss = block_losses(s, y, class_weight, w_y.dtype, **smooth)
        return torch.where(kept, loss, 0.0), None
    ds = own
    if gradients and own is None:
        ds = torch.empty_like(s) if head is None else s
    loss = _losses(s, y, w_y, row, class_weight, options, ds)
    return torch.where(kept, loss, 0.0), ds


def block_losses(logits, target, weight, dtype: torch.dtype, **options) -> torch.Tensor:
    """`row_losses` without a copy of all logits, or their log-softmax."""
    size = _block_rows(logits)
    blocks = zip(logits.split(size), target.split(size), strict=True)
    return torch.cat([row_losses(s, y, weight, dtype, **options) for s, y in blocks])


def row_losses(logits, target, weight, dtype: torch.dtype, **options) -> torch.Tensor:
    """torch's losses of rows in `dtype`: in a half computed in fp32, and rounded once."""
    return F.cross_entropy(logits.to(dtype), target, weight, reduction="none", **options)


def _block_rows(logits: torch.Tensor) -> int:
    if logits.device.type != "cpu":
        return max(len(logits), 1)
    return max(_BLOCK * torch.get_num_threads() // logits.shape[1], 1)


def _losses(s, y, w_y, row, w, options: _Options, ds: torch.Tensor | None) -> torch.Tensor:
    """The losses of rows with logits s, and into `ds`, which may be s, their gradients; formulas:
    `fastlm/reference/loss.py`.

    One exponential a logit: the sum of exp(s - max) is 1 over the largest probability. A block has
    passes over its logits alone; what is one number a row is computed for all blocks at once.
    """
    vocab, e, z, cap = s.shape[1], options.label_smoothing, options.z_loss, options.softcap
    y = y[:, None]
    s_y = s.gather(1, y)[:, 0].to(w_y.dtype)
    s_y = s_y if cap is None else (s_y / cap).tanh_().mul_(cap)
    classes = vocab if w is None else w.sum()
    on_target = row * w_y * (e - 1.0)
    on_p = row * (e / vocab) * classes - on_target if e > 0.0 else -on_target
    m, top, rest = (torch.empty_like(w_y) for _ in range(3))
    size = max(min(_block_rows(s), len(s)), 1)
    p = s.new_empty((size, vocab), dtype=w_y.dtype)  # once: fresh pages cost as much as exp
    widened = Widened(s, size)
    of_rows = [m, top, rest, y, w_y, row, on_target[:, None], on_p[:, None]]
    of_rows += [] if ds is None else [ds]
    for s_b, *of_block in zip(*(t.split(size) for t in (s, *of_rows)), strict=True):
        _block(widened(s_b), p[: len(s_b)], w, options, *of_block)
    log_l = -top.log_()
    loss = (1.0 - e) * w_y * (log_l + (m - s_y))
    if e > 0.0:
        loss += e / vocab * (classes * log_l - rest)
    if z > 0.0:
        loss += z * w_y * (m + log_l).square()
    return loss


def _block(s, p, w, options: _Options, m, top, rest, y, w_y, row, on_target, on_p, ds=None) -> None:
    """Of a block of logits, with p for probabilities: m = max s, top = max p, with label smoothing
    rest = sum_c w[c] * (s[c] - m), and ds, which has on_p of p and on_target more at y."""
    e, z, cap = options.label_smoothing, options.z_loss, options.softcap
    if cap is not None:
        s = (s / cap).tanh_().mul_(cap)
    torch.softmax(s, 1, out=p)
    torch.amax(s, 1, out=m), torch.amax(p, 1, out=top)
    if e > 0.0:
        centered = s - m[:, None]
        rest.copy_(centered.sum(1) if w is None else centered @ w)
    if ds is None:
        return
    if z > 0.0:
        on_p = on_p + (row * w_y * (2.0 * z) * (m - top.log()))[:, None]
    p.mul_(on_p).scatter_add_(1, y, on_target)
    if e > 0.0:
        p.addr_(row, torch.ones_like(p[0]) if w is None else w, alpha=-e / s.shape[1])
    if cap is not None:
        p.sub_(s.square_().mul_(p), alpha=cap**-2)  # times 1 - tanh^2
    ds.copy_(p)
