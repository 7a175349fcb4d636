"""What every op needs: choosing an implementation, arithmetic that must not run in 16 bits, gradients of our own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from visattn.errors import check

__all__ = [
    "BatchNorm",
    "autocasting",
    "choose",
    "differentiate_again",
    "eager",
    "empty_map",
    "full_precision",
    "map_layout",
    "need_eager",
    "precise",
    "recording",
    "result_dtype",
    "upcast",
]

Function = TypeVar("Function")


class BatchNorm(NamedTuple):
    """What `torch.nn.functional.batch_norm` takes, for a norm with weight, bias and running statistics."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    training: bool
    momentum: float = 0.1
    eps: float = 1e-5


def choose(op: str, impl: str, implementations: Mapping[str, Function]) -> Function:
    """The implementation of that name; an unknown name is an error, never a fallback."""
    check(impl in implementations, op, f"impl must be one of {', '.join(implementations)}", impl=impl)
    return implementations[impl]


def upcast(x: Tensor) -> Tensor:
    """Float16 and bfloat16 to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    kind = x.device.type
    if kind == "meta":  # which torch has no autocast for, and raises
        return False
    return torch.is_autocast_enabled(kind)


def result_dtype(x: Tensor) -> torch.dtype:
    """The type of what torch's convolutions and linear layers make of `x`."""
    return torch.get_autocast_dtype(x.device.type) if autocasting(x) else x.dtype


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off on the device of `x`, so that matrix products keep their inputs' precision."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else contextlib.nullcontext()


def eager(*tensors: Tensor | None) -> bool:
    """Whether code that writes into buffers of its own, or brings its own gradients, may serve these tensors.

    It may not where something looks at the operations one by one: compilers and exporters, tracers, `torch.func`,
    forward-mode derivatives, subclasses of tensors. Nor for empty tensors, inference tensors outside their mode, sparse
    ones, lazily negated ones, and tensors of several devices, which the plain operations treat as users know.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
        and forward_ad._current_level < 0
        and all(
            type(tensor) in (Tensor, torch.nn.Parameter)
            and tensor.numel() > 0
            and not (tensor.is_inference() and torch.is_grad_enabled())
            and tensor.layout == torch.strided
            and not tensor.is_neg()
            for tensor in tensors
            if tensor is not None
        )
        and len({tensor.device for tensor in tensors if tensor is not None}) <= 1
    )


def need_eager(impl: str, *tensors: Tensor | None) -> None:
    """Raise unless code that writes into buffers of its own may serve these tensors."""
    check(
        eager(*tensors),
        f"impl={impl!r}",
        "compilers, exporters, torch.func, subclasses, empty tensors and inference tensors outside their mode need "
        "plain operations",
        remedy="Leave impl at 'auto'.",
        shapes=[tuple(tensor.shape) for tensor in tensors if tensor is not None],
    )


def precise(*tensors: Tensor) -> bool:
    """Whether all are float32 or all float64, and autocast would leave them so."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes in ({torch.float32}, {torch.float64}) and not autocasting(tensors[0])


def map_layout(x: Tensor) -> torch.memory_format:
    """The memory format of a map: contiguous, or channels-last where it is that alone."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def empty_map(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for a map like `x` (B, C, H, W), in the layout of `x`, and the same seen as (B, C, N)."""
    out = torch.empty_like(x, memory_format=map_layout(x))
    return out, out.view(*x.shape[:2], -1)


def recording(*tensors: Tensor | None) -> bool:
    """Whether autograd follows what is done with these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def again(gradient: Tensor) -> bool:
    """Whether a backward pass needs plain operations, being recorded itself or transformed by torch.func."""
    return torch.is_grad_enabled() or not eager(gradient)


def differentiate_again(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """Gradients of the plain operations, which can be differentiated themselves (`create_graph=True`).

    Args:
        function: The plain form of an op.
        inputs: Its arguments.
        needed: Which of them get a gradient.
        gradient: That of its result.
    """
    with torch.enable_grad(), full_precision(gradient):
        # Aliases: the tensors may depend on one another, and that part of the graph has gradients of its own.
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need and tensor is not None]
        found = iter(torch.autograd.grad(function(*inputs), wanted, gradient, create_graph=True, allow_unused=True))
    return [next(found) if need and tensor is not None else None for tensor, need in zip(inputs, needed, strict=True)]
