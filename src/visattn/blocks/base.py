"""What every block shares: the base class, checks, folded norms, picking the queries whose maps are shown."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from visattn.errors import check
from visattn.ops._shared import BatchNorm, map_layout
from visattn.ops.convolution import grouped_conv2d
from visattn.ops.linear import linear

__all__ = [
    "Block",
    "NormLayer",
    "batch_norm_tensors",
    "check_map",
    "check_tokens",
    "conv_numbers",
    "conv_with_norm",
    "convolved",
    "foldable",
    "folded",
    "has_hooks",
    "kernels_only",
    "layout_like",
    "make_norm",
    "plain_conv",
    "plain_norm",
    "projected",
    "query_indices",
    "square_conv",
    "token_query_indices",
    "wide",
]

NormLayer = Callable[[int], nn.Module]


class Block(nn.Module):
    """A visattn block; `attention_maps` tells what it attends to, for `visattn.capture`.

    Attributes:
        impls: What its argument `impl` may be, "auto" and "reference" first; empty where it has none.
        activated: Whether it ends in a norm and an activation of its own, so that `visattn.replace` takes those
            behind the convolution away.
    """

    impls: ClassVar[tuple[str, ...]] = ()
    activated: ClassVar[bool] = False

    def attention_maps(self, *inputs: Any, **options: Any) -> dict[str, Tensor]:
        """Maps by kind, for the arguments of `forward` and `queries`; empty where a block's parts speak for it.

        Args:
            inputs: The positional arguments of `forward`.
            options: The keyword arguments of `forward`, and `queries`: (row, column) fractions of height and width,
                on which position maps alone depend.
        """
        return {}

    def wake(self) -> None:
        """Leave a start as the identity to the gate of `visattn.insert`: two zeros in a row would never learn."""

    def fused(self) -> nn.Module:
        """What `visattn.fuse` puts in the block's place: a module for inference alone, equal to it in eval mode.

        The block itself where nothing is gained. It is not asked of subclasses that do not say it anew.
        """
        return self


def check_map(owner: object, x: Tensor, channels: int) -> None:
    """Raise unless `x` is (B, channels, H, W)."""
    check(
        x.ndim == 4 and x.shape[1] == channels,
        type(owner).__name__,
        f"the input must be (B, {channels}, H, W)",
        shape=tuple(x.shape),
    )


def check_tokens(owner: object, x: Tensor, dim: int) -> None:
    """Raise unless `x` is (B, N, dim)."""
    check(
        x.ndim == 3 and x.shape[2] == dim,
        type(owner).__name__,
        f"the input must be (B, N, {dim})",
        shape=tuple(x.shape),
    )


def make_norm(norm_layer: NormLayer, channels: int, device: Any, dtype: Any) -> nn.Module:
    """Build a norm whose constructor knows channels only, then place it."""
    return norm_layer(channels).to(device=device, dtype=dtype)


def foldable(norm: nn.Module) -> bool:
    """Whether a norm multiplies and shifts each channel by numbers known beforehand."""
    return type(norm) is nn.BatchNorm2d and not norm.training and norm.running_var is not None


def wide(tensor: Tensor) -> Tensor:
    """A tensor apart from its graph in float64, or what its device has nearest to that."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def affine(norm: nn.Module, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a batch norm of eval mode multiplies each channel with and what it adds, in float64, detached.

    Args:
        norm: With running statistics.
        bias: Of the layer before it, or None.
    """
    norm = cast(nn.BatchNorm2d, norm)
    scale = (wide(cast(Tensor, norm.running_var)) + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * wide(norm.weight)
    mean = wide(cast(Tensor, norm.running_mean))
    shift = -mean * scale if bias is None else (wide(bias) - mean) * scale
    return scale, shift if norm.bias is None else shift + wide(norm.bias)


def folded(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of any layer with the norm that follows it made part of them, computed in float64, detached.

    Args:
        weight: Output channels first.
        bias: One number per output channel, or None.
        norm: A batch norm of eval mode with running statistics.
    """
    scale, shift = affine(norm, bias)
    scaled = wide(weight) * scale.view(-1, *[1] * (weight.ndim - 1))
    return scaled.to(weight.dtype), shift.to(weight.dtype)


def conv_with_norm(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """One convolution in place of a convolution and its norm, or the two in a row where they cannot be one."""
    if type(conv) is not nn.Conv2d or not foldable(norm):
        return nn.Sequential(conv, norm)
    weight, bias = folded(conv.weight, conv.bias, norm)
    if not (weight.isfinite().all() and bias.isfinite().all()):  # float16 has an end
        return nn.Sequential(conv, norm)
    one = copy.deepcopy(conv)
    one.weight, one.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return one


def has_hooks(module: nn.Module) -> bool:
    """Whether something beside its class takes part in a call of the module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, kind) for kind in hooks)


def plain_conv(conv: nn.Module) -> bool:
    """Whether a call of a convolution is that of `grouped_conv2d` with `conv_numbers`, and no more.

    Compilers see the call: they choose for themselves.
    """
    known = not torch.compiler.is_compiling() and type(conv) is nn.Conv2d and not has_hooks(conv)
    return known and square_conv(cast(nn.Conv2d, conv))


def square_conv(conv: nn.Conv2d) -> bool:
    """Whether `conv_numbers` say all of a convolution that its tensors do not."""
    pairs = (conv.stride, conv.padding, conv.dilation)
    return conv.padding_mode == "zeros" and all(not isinstance(pair, str) and pair[0] == pair[1] for pair in pairs)


def conv_numbers(conv: nn.Conv2d) -> dict[str, Any]:
    """Stride, padding, dilation and groups of a plain convolution."""
    padding = cast(tuple[int, int], conv.padding)[0]
    return {"stride": conv.stride[0], "padding": padding, "dilation": conv.dilation[0], "groups": conv.groups}


def convolved(conv: nn.Module, x: Tensor, impl: str) -> Tensor:
    """What a convolution makes of `x`, by an implementation of `grouped_conv2d` where that is all that a call does."""
    if not plain_conv(conv):
        return cast(Tensor, conv(x))
    conv = cast(nn.Conv2d, conv)
    return grouped_conv2d(x, conv.weight, conv.bias, **conv_numbers(conv), impl=impl)


def plain_norm(norm: nn.Module) -> bool:
    """Whether a call of a norm is that of a batch norm with all its tensors, and no more."""
    return (
        not torch.compiler.is_compiling()
        and type(norm) is nn.BatchNorm2d
        and not has_hooks(norm)
        and (norm.track_running_stats or not norm.training)
        and not any(t is None for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum))
    )


def batch_norm_tensors(norm: nn.Module, *, count: bool = True) -> BatchNorm | None:
    """What an op needs of a plain batch norm; None for every other norm.

    Args:
        norm: Any norm.
        count: Whether its batch is counted, as a call does in training.
    """
    if not plain_norm(norm):
        return None
    norm = cast(nn.BatchNorm2d, norm)
    if count and norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    statistics = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    return BatchNorm(norm.weight, norm.bias, *statistics, norm.training, cast(float, norm.momentum), norm.eps)


def projected(layer: nn.Module, x: Tensor, impl: str) -> Tensor:
    """What a linear layer makes of `x`, by an implementation of `linear` where that is all that a call does."""
    if type(layer) is not nn.Linear or has_hooks(layer) or torch.compiler.is_compiling():
        return cast(Tensor, layer(x))
    return linear(x, layer.weight, layer.bias, impl=impl)


def kernels_only(impl: str) -> str:
    """The implementation of the layers around an op that has this one: the kernels, or torch's for all other names."""
    return impl if impl in ("auto", "native") else "reference"


def layout_like(out: Tensor, x: Tensor) -> Tensor:
    """`out` in the memory format of `x`: contiguous, or channels-last where `x` is that alone."""
    return out.contiguous(memory_format=map_layout(x))


def query_indices(
    queries: Sequence[tuple[float, float]], height: int, width: int, device: torch.device | None = None
) -> Tensor:
    """Flat position of each (row, column) fraction in a height x width map."""
    rows_columns = [(min(int(r * height), height - 1), min(int(c * width), width - 1)) for r, c in queries]
    return torch.tensor([row * width + column for row, column in rows_columns], dtype=torch.long, device=device)


def token_query_indices(
    queries: Sequence[tuple[float, float]], tokens: int, device: torch.device | None = None
) -> Tensor:
    """Token of each (row, column) fraction, the last isqrt(tokens)^2 tokens taken for a square grid of patches."""
    side = math.isqrt(tokens)
    return tokens - side * side + query_indices(queries, side, side, device)
