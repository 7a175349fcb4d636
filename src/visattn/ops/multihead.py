"""Multi-head attention with a mask and multiplicative weights.

Paper: Attention Is All You Need, https://arxiv.org/abs/1706.03762
Published code compared with: https://github.com/xmu-xiaoma666/External-Attention-pytorch
at d75848e40233ed56fa503c888472bab8b17c568c (model/attention/SelfAttention.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn import native
from visattn.errors import check
from visattn.native.attention import fits
from visattn.ops._attention import KEPT, attend_fused, attend_in_pieces
from visattn.ops._shared import choose, eager, full_precision, precise, upcast

__all__ = ["IMPLEMENTATIONS", "best_multihead", "multihead_attention", "multihead_weights"]


def multihead_weights(
    query: Tensor,
    key: Tensor,
    *,
    attention_mask: Tensor | None = None,
    attention_weights: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The attention matrix `softmax(mask(weights * scale * q k^T))`, rows with no key left all zero.

    Args:
        query: (B, heads, Nq, D).
        key: (B, heads, Nk, D).
        attention_mask: Boolean, broadcastable to (B, heads, Nq, Nk); True means "do not attend".
        attention_weights: Broadcastable to (B, heads, Nq, Nk); multiplies the scores before the mask.
        scale: Default `1 / sqrt(D)`.

    Returns:
        (B, heads, Nq, Nk) in the dtype of `query`; scores and softmax of 16-bit inputs run in float32.

    Example:
        >>> multihead_weights(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)).shape
        torch.Size([2, 3, 5, 7])
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    with full_precision(query):
        scores = (upcast(query) * scale) @ upcast(key).transpose(-1, -2)
    if attention_weights is not None:
        scores = scores * attention_weights
    if attention_mask is None:
        return scores.softmax(dim=-1).to(query.dtype)
    empty = attention_mask.all(dim=-1, keepdim=True)  # rows whose softmax would be 0 / 0
    scores = scores.masked_fill(attention_mask & ~empty, -math.inf)
    return scores.softmax(dim=-1).masked_fill(empty, 0.0).to(query.dtype)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    attention = multihead_weights(query, key, attention_mask=mask, attention_weights=weights, scale=scale)
    if dropout_p > 0:
        attention = F.dropout(attention, dropout_p)
    return attention @ value


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    check(weights is None, "multihead_attention", "impl='fused' knows no attention_weights", attention_weights="given")
    return attend_fused(query, key, value, _reference, scale=scale, mask=mask, dropout_p=dropout_p)


def _buffered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    scale: float,
    dropout_p: float,
    *,
    impl: str,
) -> Tensor:
    check(dropout_p == 0, "multihead_attention", f"impl={impl!r} knows no dropout", dropout_p=dropout_p)
    out = attend_in_pieces(query, key, value, _reference, scale=scale, weights=weights, mask=mask, impl=impl)
    return out.to(value.dtype)


def best_multihead(
    device: str,
    *,
    compiling: bool,
    buffers: bool,
    precise: bool,
    entries: int,
    weights: bool,
    dropout: bool,
    native: bool = False,
) -> str:
    """The implementation that "auto" takes.

    torch's fused kernels know no weights and no second derivatives, and in float32 their gradients have to be ours
    (see `attend_fused`): theirs are the matrices too large to be kept, the 16-bit types, and what compilers look at.

    Args:
        device: Type of the device.
        compiling: Whether a compiler or an exporter is at work.
        buffers: Whether code with buffers of its own may serve the tensors.
        precise: Whether they are float32 or float64, without autocast.
        entries: Size of the attention matrix.
        weights: Whether there are attention weights.
        dropout: Whether there is dropout.
        native: Whether the compiled kernels serve the tensors, on a processor where they are the fastest.
    """
    if native and buffers and precise and not dropout:
        return "native"
    small = not compiling and entries <= KEPT.get(device, KEPT["cpu"])
    if not weights and not (precise and small):
        return "fused"
    # A GPU wants all samples at once.
    return "reference" if compiling or not buffers or dropout or (device != "cpu" and small) else "pieces"


def _auto(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    compiling = torch.compiler.is_compiling()
    name = best_multihead(
        query.device.type,
        compiling=compiling,
        buffers=eager(query, key, value, weights, mask),
        precise=precise(query, key, value),
        entries=0 if compiling else math.prod(query.shape[:3]) * key.shape[2],  # a compiler has symbols here
        weights=weights is not None,
        dropout=dropout_p > 0,
        native=not compiling
        and native.leads()
        and query.dtype == torch.float32
        and fits(query, key, value, weights, mask),
    )
    return _MULTIHEAD[name](query, key, value, mask, weights, scale, dropout_p)


_MULTIHEAD: dict[str, Callable[..., Tensor]] = {
    "auto": _auto,
    "reference": _reference,
    "fused": _fused,
    "pieces": partial(_buffered, impl="pieces"),
    "native": partial(_buffered, impl="native"),
}
IMPLEMENTATIONS = native.served(_MULTIHEAD)


def multihead_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attention_mask: Tensor | None = None,
    attention_weights: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """`dropout(softmax(mask(weights * scale * q k^T))) v`.

    A weight of 0 sets a score to 0, which does not remove the key: use the mask for that. A query with all keys
    masked gives zeros, with finite gradients (the published code gives NaN).

    Args:
        query: (B, heads, Nq, D).
        key: (B, heads, Nk, D).
        value: (B, heads, Nk, E); E may differ from D.
        attention_mask: Boolean, broadcastable to (B, heads, Nq, Nk); True means "do not attend".
        attention_weights: Broadcastable to (B, heads, Nq, Nk); multiplies the scores before the mask.
        scale: Default `1 / sqrt(D)`.
        dropout_p: Share of attention entries dropped.
        impl: "auto"; "reference"; "fused", torch's kernels, without weights; "pieces", a part of the matrix at a
            time, without dropout, not for compilers; "native", the same in C, on a CPU.

    Returns:
        (B, heads, Nq, E). Softmax of 16-bit inputs runs in float32.

    Raises:
        ValueError: Unknown `impl` or one that cannot serve the arguments, or a mask that is not boolean.

    Example:
        >>> q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6)
        >>> multihead_attention(q, k, v).shape
        torch.Size([2, 3, 5, 6])
    """
    if attention_mask is not None:
        check(
            attention_mask.dtype == torch.bool,
            "multihead_attention",
            "attention_mask must be boolean, True where a key is not to be attended to",
            dtype=attention_mask.dtype,
        )
        attention_mask = attention_mask[(None,) * (4 - attention_mask.ndim)]
    if attention_weights is not None:
        attention_weights = attention_weights[(None,) * (4 - attention_weights.ndim)]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    function = choose("multihead_attention", impl, _MULTIHEAD)
    return function(query, key, value, attention_mask, attention_weights, scale, dropout_p)
