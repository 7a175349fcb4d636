"""Products of maps with small matrices: torch's own, or the kernels in C."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from visattn import native
from visattn.native import products

__all__ = ["NATIVE", "TORCH", "Products", "best_products"]


class Products(NamedTuple):
    """Who multiplies a map with the small matrices.

    Attributes:
        product: `a @ b + addend + bias[:, None]`, then ReLU if wanted; either a or b has a batch.
        product_sum: `(a @ b).sum(dim=0)`.
        gram: `x @ x.transpose(1, 2)`.
    """

    product: Callable[..., Tensor]
    product_sum: Callable[[Tensor, Tensor], Tensor]
    gram: Callable[[Tensor], Tensor]


def _torch_product(
    a: Tensor,
    b: Tensor,
    *,
    addend: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    if addend is None or out is None:
        return torch.matmul(a, b)
    # The product starts from what is added: with one term for each slot it is short enough to lose nothing by it.
    if bias is not None:
        torch.add(addend, bias[:, None], out=out)
    torch.baddbmm(addend if bias is None else out, a.expand(b.shape[0], -1, -1), b, out=out)
    return out.relu_() if relu else out


def _torch_product_sum(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b).sum(dim=0)


def _torch_gram(flat: Tensor) -> Tensor:
    """`X X^T` of (B, C, N); of large ones only what lies on and above the diagonal blocks is computed."""
    channels = flat.shape[1]
    if flat.device.type != "cpu" or channels < 256:
        return flat @ flat.transpose(1, 2)
    out = flat.new_empty(flat.shape[0], channels, channels)
    step = -(-channels // 4)
    for x, energies in zip(flat, out, strict=True):
        for start in range(0, channels, step):
            rows = slice(start, start + step)
            torch.mm(x[rows], x[start:].t(), out=energies[rows, start:])
            energies[start + step :, rows] = energies[rows, start + step :].t()
    return out


def _native_gram(flat: Tensor) -> Tensor:
    return products.product(flat, flat.transpose(1, 2), symmetric=True)


TORCH = Products(_torch_product, _torch_product_sum, _torch_gram)
NATIVE = Products(products.product, products.product_sum, _native_gram)


def best_products(impl: str, x: Tensor) -> Products:
    """Who multiplies for an implementation: "buffered" is torch alone, "auto" takes the kernels in float32.

    Args:
        impl: "auto", "buffered" or "native".
        x: The map, a contiguous one for "native".

    Raises:
        ValueError: "native" where there are no kernels for the map.
    """
    if impl == "native":
        native.need(x)
    known = native.leads() and x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
    return NATIVE if impl == "native" or (impl == "auto" and known) else TORCH
