"""Softmax attention and its gradients in C: a block of rows of the matrix at a time."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visattn.native import library

__all__ = ["attend", "attend_backward", "fits"]

_POINTERS = {"attention_forward": 6, "attention_backward": 9}


@functools.cache
def _function(name: str) -> Callable[..., int]:
    function: Any = getattr(library(), name)
    function.argtypes = [ctypes.c_void_p] * (2 + _POINTERS[name]) + [ctypes.c_double, ctypes.c_ssize_t]
    return function  # type: ignore[no-any-return]


def fits(query: Tensor, key: Tensor, value: Tensor, weights: Tensor | None = None, mask: Tensor | None = None) -> bool:
    """Whether the kernels are there and serve these tensors (see `attend`)."""
    numbers = [x for x in (query, key, value, weights) if x is not None]
    return (
        all(x.dtype == torch.float32 and not x.is_neg() for x in numbers)
        and all(x.device.type == "cpu" and x.layout == torch.strided for x in (*numbers, mask) if x is not None)
        and query.ndim == key.ndim == value.ndim == 4
        and query.shape[3] == key.shape[3]
        and key.shape[2] == value.shape[2]
        and library() is not None
    )


def _call(name: str, query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None, scale: float) -> None:
    shape = (*query.shape[:3], key.shape[2])
    sizes = (*shape, query.shape[3], value.shape[3])
    strides: list[int] = []
    pointers = []
    for index, x in enumerate((query, key, value, *others)):
        x = x if index not in (3, 4) or x is None else x.expand(shape)  # weights and mask
        strides += (0, 0, 0, 0) if x is None else x.stride()
        pointers.append(None if x is None else x.data_ptr())
    failed = _function(name)(
        (ctypes.c_ssize_t * len(sizes))(*sizes),
        (ctypes.c_ssize_t * len(strides))(*strides),
        *pointers,
        scale,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("visattn.native: no memory for attention")


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
    _call("attention_forward", query, key, value, weights, mask, out, scale=scale)


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
    _call("attention_backward", query, key, value, weights, mask, gradient.resolve_neg(), *into, scale=scale)
