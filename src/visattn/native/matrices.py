"""Products of two large matrices, see matrices.c."""

from __future__ import annotations

import ctypes

from torch import Tensor

from visattn.native import call

__all__ = ["multiply"]


def _lying(x: Tensor) -> Tensor:
    """The matrix with the numbers of its rows or of its columns side by side."""
    return x if 1 in x.stride() else x.contiguous()


def multiply(
    a: Tensor, b: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """`a @ b + bias` of (M, K), (K, N) and what broadcasts to (M, N), or that added to `out`, whose rows are whole."""
    rows, deep, columns = *a.shape, b.shape[1]
    out = a.new_empty(rows, columns) if out is None else out
    shapes = [tuple(x.shape) for x in (a, b, out)]
    if b.shape[0] != deep or out.shape != (rows, columns) or (columns > 1 and out.stride(1) != 1):
        raise ValueError(f"visattn.native: multiply was given matrices {shapes}")
    a, b, bias = _lying(a), _lying(b), None if bias is None else bias.expand(rows, columns)
    steps = (0, 0) if bias is None else bias.stride()
    strides = (ctypes.c_ssize_t * 8)(*a.stride(), *b.stride(), *out.stride(), *steps)
    call("multiply_matrices", rows, columns, deep, a, b, bias, out, strides, add, flops=2 * rows * columns * deep)
    return out
