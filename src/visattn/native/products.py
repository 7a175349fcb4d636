"""Matrix products with one short side, see products.c."""

from __future__ import annotations

import math

from torch import Tensor

from visattn.native import call

__all__ = ["product", "product_sum"]


def _rows(x: Tensor) -> Tensor:
    """The tensor with the numbers of each row side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _count(a: Tensor, b: Tensor) -> int:
    return max(x.shape[0] if x.ndim == 3 else 1 for x in (a, b))


def _run(name: str, a: Tensor, b: Tensor, out: Tensor, *others: Tensor | bool | None, share: float = 1.0) -> None:
    batches = {x.shape[0] for x in (a, b) if x.ndim == 3}
    fit = a.shape[-1] == b.shape[-2] and len(batches) <= 1 and out.shape[-2:] == (a.shape[-2], b.shape[-1])
    if not fit or not out.is_contiguous():
        shapes = [tuple(x.shape) for x in (a, b, out)]
        raise ValueError(f"visattn.native: {name} was given matrices {shapes}")
    turned = b.stride(-2) == 1 and b.stride(-1) != 1
    sizes = (_count(a, b), a.shape[-2], b.shape[-1], a.shape[-1])
    a, b = _rows(a), _rows(b.transpose(-1, -2) if turned else b)
    # Of a matrix without a batch every sample has the same.
    steps = [(x.stride(0) if x.ndim == 3 else 0, x.stride(-2)) for x in (a, b)]
    call(name, *sizes, a, *steps[0], b, *steps[1], turned, out, *others, flops=int(2 * math.prod(sizes) * share))


def product(
    a: Tensor,
    b: Tensor,
    *,
    addend: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    symmetric: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`a @ b + addend + bias[:, None]`, then ReLU if wanted, of (B, M, K) and (B, K, N); one may have no batch.

    Of a product that is known to be symmetric half is computed, of one without anything added.
    """
    out = a.new_empty(_count(a, b), a.shape[-2], b.shape[-1]) if out is None else out
    bias = None if bias is None else bias.contiguous()
    alike = addend is None or (addend.is_contiguous() and addend.shape == out.shape)
    if not alike or (bias is not None and bias.shape != out.shape[-2:-1]):
        raise ValueError(f"visattn.native: what is added does not fit a product of {tuple(out.shape)}")
    _run("product_each", a, b, out, addend, bias, relu, symmetric, share=0.5 if symmetric else 1.0)
    return out


def product_sum(a: Tensor, b: Tensor) -> Tensor:
    """`(a @ b).sum(dim=0)` of (B, M, K) and (B, K, N)."""
    out = a.new_empty(a.shape[-2], b.shape[-1])
    _run("product_sum", a, b, out)
    return out
