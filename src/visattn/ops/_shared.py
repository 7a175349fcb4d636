"""What every op needs: choosing an implementation, and arithmetic that must not run in 16 bits."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from visattn.errors import check

__all__ = ["choose", "full_precision", "small_matrix", "upcast"]

Function = TypeVar("Function")


def choose(op: str, impl: str, implementations: Mapping[str, Function]) -> Function:
    """The implementation of that name; an unknown name is an error, never a fallback."""
    check(impl in implementations, op, f"impl must be one of {', '.join(implementations)}", impl=impl)
    return implementations[impl]


def upcast(x: Tensor) -> Tensor:
    """Float16 and bfloat16 to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off on the device of `x`, so that matrix products keep their inputs' precision."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def small_matrix(query: Tensor, key: Tensor) -> bool:
    """Whether to write out the attention matrix of queries (B, heads, Nq, D) and keys (B, heads, Nk, D).

    torch's fused kernels recompute the softmax from its log-sum-exp in the backward pass. In float32 that loses digits
    of the gradients where the softmax saturates, more than the budget of visattn.testing allows, so there they are for
    matrices that should not be held. 16-bit inputs are better served by them at any size, float64 has digits to spare.
    Under a compiler sizes may be symbols, on which nothing can be decided.
    """
    if torch.compiler.is_compiling() or query.dtype != torch.float32:
        return False
    return query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] <= 2**22
