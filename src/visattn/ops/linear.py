"""Linear layers around attention: torch's, or the products of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn import native
from visattn.errors import check
from visattn.native.matrices import multiply
from visattn.ops._shared import (
    again,
    choose,
    differentiate_again,
    eager,
    need_eager,
    precise,
    recording,
    result_dtype,
    upcast,
)

__all__ = ["IMPLEMENTATIONS", "linear"]

LEAST = 2**24  # FLOPs of a product that is worth a call


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight.t(), bias=bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        d_bias = gradient.sum(dim=0) if needed[2] else None
        if again(gradient):
            return (*differentiate_again(F.linear, (x, weight), needed[:2], gradient), d_bias)
        d_x = multiply(gradient, weight) if needed[0] else None
        return d_x, multiply(gradient.t(), x) if needed[1] else None, d_bias


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    need_eager("native", x, weight, bias)
    dtype = result_dtype(x)
    x, weight, bias = upcast(x), upcast(weight), None if bias is None else upcast(bias)
    native.need(x, weight, bias)
    same = {tensor.dtype for tensor in (x, weight, bias) if tensor is not None} == {x.dtype}
    fit = x.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])
    check(
        same and fit, "impl='native'", "input, weight and bias must fit", x=tuple(x.shape), weight=tuple(weight.shape)
    )
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = (
        _Linear.apply(rows, weight, bias) if recording(x, weight, bias) else multiply(rows, weight.t(), bias=bias)
    )
    return out.view(*x.shape[:-1], -1).to(dtype)


def _auto(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    known = native.leads() and x.dtype == torch.float32 and x.device.type == "cpu" and eager(*given) and precise(*given)
    if known and x.shape[-1] == weight.shape[1] and 2 * x.numel() * len(weight) >= LEAST:
        return _native(x, weight, bias)
    return F.linear(x, weight, bias)


_LINEAR: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "auto": _auto,
    "reference": F.linear,
    "native": _native,
}
IMPLEMENTATIONS = native.served(_LINEAR)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """`torch.nn.functional.linear`.

    Args:
        x: (..., D).
        weight: (E, D).
        bias: (E,) or None.
        impl: "auto"; "reference", torch's; "native", products by the kernels of `visattn.native`, which "auto" takes
            where they are faster, not for compilers.

    Returns:
        (..., E).

    Raises:
        ValueError: Unknown `impl`, or one that cannot serve the arguments.

    Example:
        >>> linear(torch.randn(2, 3, 5), torch.randn(7, 5)).shape
        torch.Size([2, 3, 7])
    """
    return choose("linear", impl, _LINEAR)(x, weight, bias)
