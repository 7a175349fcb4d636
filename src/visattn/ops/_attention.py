"""Softmax attention in pieces: a few rows of the matrix exist at a time, in a buffer that stays in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn import native
from visattn.errors import check
from visattn.native.attention import attend, attend_backward, fits
from visattn.ops._shared import (
    again,
    differentiate_again,
    eager,
    full_precision,
    need_eager,
    precise,
    recording,
    upcast,
)

__all__ = ["KEPT", "PIECE", "attend_fused", "attend_in_pieces"]

# Entries of the attention matrix at hand at one time: 8 MB of float32, about what a core's share of the cache holds. A
# GPU wants more work at a time. Up to KEPT entries the matrix of a training step is kept for the backward pass; larger
# ones are computed again there.
PIECE = {"cpu": 2**21, "cuda": 2**26}
KEPT = {"cpu": 2**23, "cuda": 2**26}


def _piece_shape(query: Tensor, key: Tensor) -> tuple[int, int]:
    """How many heads and rows of the matrix are at hand at one time: some heads whole, or some rows of one."""
    entries = PIECE.get(query.device.type, PIECE["cpu"])
    rows = max(1, min(query.shape[2], entries // key.shape[2]))
    return max(1, min(query.shape[1], entries // (rows * key.shape[2]))), rows


def _pieces(query: Tensor, key: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Sample, heads, rows of each piece."""
    some_heads, some_rows = _piece_shape(query, key)
    for sample in range(query.shape[0]):
        for head in range(0, query.shape[1], some_heads):
            for row in range(0, query.shape[2], some_rows):
                yield sample, slice(head, head + some_heads), slice(row, row + some_rows)


def _buffer(query: Tensor, key: Tensor) -> Tensor:
    """Memory for a piece, used again for the next one."""
    return query.new_empty(math.prod(_piece_shape(query, key)) * key.shape[2])


def _piece(buffer: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The part of a buffer that the scores (heads, Nq, Nk) of these queries and keys take."""
    shape = (*query.shape[:2], key.shape[1])
    return buffer[: math.prod(shape)].view(shape)


def _part(x: Tensor, sample: int, heads: slice, rows: slice) -> Tensor:
    """A piece of something that broadcasts to (B, heads, Nq, Nk)."""
    return x[
        sample if x.shape[0] > 1 else 0,
        heads if x.shape[1] > 1 else slice(None),
        rows if x.shape[2] > 1 else slice(None),
    ]


def _weights(
    out: Tensor, query: Tensor, key: Tensor, scale: float, weights: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Write the softmax of a piece's scores into `out`, (heads, Nq, Nk); rows without a key are zero."""
    torch.baddbmm(out, query, key.transpose(1, 2), beta=0, alpha=scale, out=out)
    if weights is not None:
        out.mul_(weights)
    if mask is not None:
        out.masked_fill_(mask, -math.inf)
    torch.softmax(out, -1, out=out)
    if mask is not None:
        out.masked_fill_(mask.all(dim=-1, keepdim=True), 0.0)
    return out


def _empty_result(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, rows, width = (*query.shape[:3], value.shape[3])
    if rows == value.shape[2]:
        return torch.empty_like(value)  # the layout of the values too: heads that are a view of tokens or of a map
    return query.new_empty_strided((batch, heads, rows, width), (rows * heads * width, width, heads * width, 1))


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    scale: float,
    kept: Tensor | None = None,
) -> Tensor:
    out = _empty_result(query, value)
    buffer = _buffer(query, key) if kept is None else query.new_empty(0)
    for sample, some, part in _pieces(query, key):
        q, k = query[sample, some, part], key[sample, some]
        attention = _piece(buffer, q, k) if kept is None else kept[sample, some, part]
        _weights(
            attention,
            q,
            k,
            scale,
            None if weights is None else _part(weights, sample, some, part),
            None if mask is None else _part(mask, sample, some, part),
        )
        torch.bmm(attention, value[sample, some], out=out[sample, some, part])
    return out


def _native(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    out = _empty_result(query, value)
    attend(query, key, value, weights, mask, scale, out)
    return out


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout_p: float = 0.0
) -> Tensor:
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=scale)
    # What a fused kernel gives for a row without keys depends on the kernel: let it attend everywhere, then zero it.
    empty = mask.all(dim=-1, keepdim=True)
    keep = ~mask | empty  # torch's mask has the opposite meaning
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=keep, dropout_p=dropout_p, scale=scale)
    return out.masked_fill(empty, 0.0)


class _Attention(torch.autograd.Function):
    """Attention whose backward pass goes piece by piece too, in the arithmetic of torch's own softmax and products."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weights: Tensor | None,
        mask: Tensor | None,
        scale: float,
        plain: Any,
        kernel: str,
    ) -> Tensor:
        ctx.scale, ctx.plain, ctx.kernel = scale, plain, kernel
        if kernel != "pieces":
            ctx.save_for_backward(query, key, value, weights, mask, None)
            if kernel == "fused":
                return _fused(query, key, value, mask, scale)
            return _native(query, key, value, weights, mask, scale)
        keep = math.prod(query.shape[:3]) * key.shape[2] <= KEPT.get(query.device.type, KEPT["cpu"])
        kept = query.new_empty(*query.shape[:3], key.shape[2]) if keep else None
        out = _forward(query, key, value, weights, mask, scale, kept)
        ctx.save_for_backward(query, key, value, weights, mask, kept)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with full_precision(gradient):
            return _Attention._backward(ctx, gradient)

    @staticmethod
    def _backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, weights, mask, kept = ctx.saved_tensors
        scale, needed = ctx.scale, ctx.needs_input_grad
        if again(gradient):
            plain = differentiate_again(
                lambda q, k, v, w: ctx.plain(q, k, v, mask, w, scale),
                (query, key, value, weights),
                needed[:4],
                gradient,
            )
            return (*plain, None, None, None, None)
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))  # heads stay views of tokens
        if ctx.kernel == "native" and not needed[3]:  # gradients of weights are rare, and go piece by piece
            attend_backward(query, key, value, weights, mask, scale, gradient, (d_query, d_key, d_value))
            return d_query, d_key, d_value, None, None, None, None, None
        d_weights = torch.zeros_like(weights) if weights is not None and needed[3] else None
        buffer = _buffer(query, key)
        recomputed = _buffer(query, key) if kept is None else buffer
        for sample, some, part in _pieces(query, key):
            q, k, v, g = query[sample, some, part], key[sample, some], value[sample, some], gradient[sample, some, part]
            factor = None if weights is None else _part(weights, sample, some, part)
            gone = None if mask is None else _part(mask, sample, some, part)
            if kept is None:
                attention = _weights(_piece(recomputed, q, k), q, k, scale, factor, gone)
            else:
                attention = kept[sample, some, part]
            d_v, d_k, d_q = d_value[sample, some], d_key[sample, some], d_query[sample, some, part]
            beta = 0 if part.start == 0 else 1  # the first rows of a head write what the others add to
            torch.baddbmm(d_v, attention.transpose(1, 2), g, beta=beta, out=d_v)
            d_scores = torch.bmm(g, v.transpose(1, 2), out=_piece(buffer, q, k))
            # A row without keys is zero here, so its gradient is, too.
            torch.ops.aten._softmax_backward_data.out(d_scores, attention, -1, attention.dtype, grad_input=d_scores)
            if factor is not None:
                if d_weights is not None:
                    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale).mul_(d_scores)
                    into = _part(d_weights, sample, some, part)
                    into += scores.sum_to_size(into.shape)
                d_scores.mul_(factor)
            torch.baddbmm(d_q, d_scores, k, beta=0, alpha=scale, out=d_q)
            torch.baddbmm(d_k, d_scores.transpose(1, 2), q, beta=beta, alpha=scale, out=d_k)
        return d_query, d_key, d_value, d_weights, None, None, None, None


def _expanded(*tensors: Tensor) -> list[Tensor]:
    """All with the batch and the heads that they broadcast to."""
    shared = torch.broadcast_shapes(*(x.shape[:2] for x in tensors))  # type: ignore[no-untyped-call]  # torch has no types
    return [x.expand(*shared, *x.shape[2:]) for x in tensors]


def attend_in_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plain: Any,
    *,
    scale: float = 1.0,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    impl: str = "pieces",
) -> Tensor:
    """`softmax(mask(weights * scale * q k^T)) v` with a small part of the matrix in memory, in float32 or float64.

    Args:
        query: (B, heads, Nq, D).
        key: (B, heads, Nk, D).
        value: (B, heads, Nk, E).
        plain: The same in plain operations, called (query, key, value, mask, weights, scale), for second derivatives.
        scale: Of the scores.
        weights: Multiplies the scores; broadcasts to (B, heads, Nq, Nk).
        mask: Boolean, as `weights`; True means "do not attend".
        impl: "pieces", or "native" for kernels in C where numbers are float32.

    Returns:
        (B, heads, Nq, E), float32 for 16-bit inputs; laid out as the values, or as (B, Nq, heads, E).

    Raises:
        ValueError: Where only plain operations will do, as under a compiler, or "native" without kernels.
    """
    need_eager(impl, query, key, value, weights, mask)
    if impl == "native":
        native.need(upcast(query))
    with full_precision(query):
        query, key, value = _expanded(upcast(query), upcast(key), upcast(value))
        weights = None if weights is None else weights.to(query.dtype)
        check(
            impl != "native" or fits(query, key, value, weights, mask),
            "impl='native'",
            "queries, keys and values need four dimensions that fit and one type",
            shapes=[tuple(x.shape) for x in (query, key, value)],
        )
        entries = (*query.shape[:3], key.shape[2])
        for name, x in (("attention_weights", weights), ("attention_mask", mask)):
            broadcasts = x is None or all(size in (1, whole) for size, whole in zip(x.shape, entries, strict=True))
            rule = f"{name} must broadcast to the batch, heads, queries and keys {entries}"
            check(broadcasts, "multihead_attention", rule, shape=None if x is None else tuple(x.shape))
        if recording(query, key, value, weights):
            out: Tensor = _Attention.apply(query, key, value, weights, mask, scale, plain, impl)
            return out
        return (_native if impl == "native" else _forward)(query, key, value, weights, mask, scale)


def attend_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plain: Any,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Torch's fused attention, with gradients of our own in float32.

    Its kernels compute the softmax of the backward pass from a log-sum-exp. Where the softmax saturates, that loses
    more digits of float32 gradients than the budget of visattn.testing allows; 16-bit types have none to lose.

    Args:
        query: (B, heads, Nq, D).
        key: (B, heads, Nk, D).
        value: (B, heads, Nk, E).
        plain: See `attend_in_pieces`.
        scale: Of the scores.
        mask: See `attend_in_pieces`.
        dropout_p: Share of attention entries dropped; then the gradients are torch's.
    """
    ours = dropout_p == 0 and query.dtype == torch.float32 and recording(query, key, value)
    if ours and eager(query, key, value, mask) and precise(query, key, value):
        out: Tensor = _Attention.apply(*_expanded(query, key, value), None, mask, scale, plain, "fused")
        return out
    return _fused(query, key, value, mask, scale, dropout_p)
