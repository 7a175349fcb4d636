"""Softmax attention and its gradients in C: a block of queries and keys at a time."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from visattn import native

__all__ = ["attend", "attend_backward", "fits"]


def fits(query: Tensor, key: Tensor, value: Tensor, weights: Tensor | None = None, mask: Tensor | None = None) -> bool:
    """Whether the kernels are there and serve these tensors (see `attend`)."""
    numbers = [x for x in (query, key, value, weights) if x is not None]
    return (
        all(x.dtype == query.dtype and not x.is_neg() for x in numbers)
        and (mask is None or mask.dtype == torch.bool)
        and query.dtype in native.DTYPES
        and all(x.device.type == "cpu" and x.layout == torch.strided for x in (*numbers, mask) if x is not None)
        and query.ndim == key.ndim == value.ndim == 4
        and query.shape[3] == key.shape[3]
        and key.shape[2] == value.shape[2]
        and native.available()
    )


def _call(
    name: str, query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None, scale: float, products: int
) -> None:
    shape = (*query.shape[:3], key.shape[2])
    output, *gradients = others[2:]
    expected = [(*query.shape[:3], value.shape[3]), *(x.shape for x in (query, key, value))]
    given = [tuple(x.shape) for x in (output, *gradients) if x is not None]
    alike = query.shape[:2] == key.shape[:2] == value.shape[:2] and fits(query, key, value, *others[:2])
    if not alike or given != [tuple(x) for x in expected[: len(given)]]:
        raise ValueError(f"visattn.native: {name} was given shapes {[tuple(x.shape) for x in (query, key, value)]}")
    sizes = (*shape, query.shape[3], value.shape[3])
    arrays = [query, key, value, *others]
    arrays[4] = None if others[1] is None else others[1].view(torch.uint8)
    arrays[3:5] = [None if x is None else x.expand(shape) for x in arrays[3:5]]  # weights and mask
    strides = [step for x in arrays for step in ((0, 0, 0, 0) if x is None else x.stride())]
    native.call(
        name,
        (ctypes.c_ssize_t * len(sizes))(*sizes),
        (ctypes.c_ssize_t * len(strides))(*strides),
        *arrays,
        float(scale),
        flops=2 * math.prod(shape) * products,
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor | None, mask: Tensor | None, scale: float, out: Tensor
) -> None:
    """Write `softmax(mask(weights * scale * q k^T)) v` into `out`; rows without a key are zero.

    Args:
        query: (B, heads, Nq, D), of any strides, as all.
        key: (B, heads, Nk, D).
        value: (B, heads, Nk, E).
        weights: Broadcasts to (B, heads, Nq, Nk).
        mask: The same; True means "do not attend".
        scale: Of the scores.
        out: (B, heads, Nq, E).
    """
    products = query.shape[3] + value.shape[3]
    _call("attention_forward", query, key, value, weights, mask, out, scale=scale, products=products)


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    scale: float,
    gradient: Tensor,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of queries, keys and values of `attend` into three tensors.

    Args:
        query: See `attend`.
        key: See `attend`.
        value: See `attend`.
        weights: See `attend`.
        mask: See `attend`.
        scale: See `attend`.
        gradient: Of the result.
        into: Like queries, keys and values.
    """
    products = 3 * query.shape[3] + 2 * value.shape[3]
    others = (weights, mask, gradient.resolve_neg(), *into)
    _call("attention_backward", query, key, value, *others, scale=scale, products=products)
