"""FLOPs of a call, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from visattn import native

__all__ = ["count"]


def _convolution_backward(
    grad_out: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    *options: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    """As much as the forward pass for each gradient; torch's own count takes no account of groups."""
    transposed, output_mask = options[4], options[7]
    forward = 2 * grad_out[0] * math.prod((x if transposed else grad_out)[2:]) * math.prod(weight)
    return forward * (int(output_mask[0]) + int(output_mask[1]))


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """The two products of attention."""
    flops: int = flop_counter.sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return flops


def _attention_backward(
    grad_out: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """The five products of its backward pass."""
    flops: int = flop_counter.sdpa_backward_flop_count(grad_out, query, key, value)  # type: ignore[no-untyped-call]
    return flops


_CORRECTED = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # torch 2.6 does not count it
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count(call: Callable[[], Any]) -> int:
    """FLOPs of matrix products, convolutions and attention in a call, those of `visattn.native` included.

    One multiply-add counts as 2.

    Args:
        call: What to run; a backward pass in it counts too.

    Example:
        >>> a = torch.ones(2, 3)
        >>> count(lambda: a @ a.T)
        24
    """
    before = native.flops()
    with FlopCounterMode(display=False, custom_mapping=_CORRECTED) as counter:
        call()
    return int(counter.get_total_flops()) + native.flops() - before
