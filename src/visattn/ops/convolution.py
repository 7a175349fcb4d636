"""Grouped convolutions: the same numbers, in the form that the machine computes fastest.

CPU kernels want 8 or more channels in a group, or one. For numbers in between they fall back to code several times
slower than the machine, which these forms avoid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn.ops._shared import choose, eager, recording

__all__ = ["IMPLEMENTATIONS", "grouped_conv2d"]

_LANES = 8  # channels in a group from which the kernels of a CPU work at full width


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _channels_last(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _merged(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """Groups put together until they are wide enough, with zeros between what belonged to different ones."""
    out_channels, width = weight.shape[:2]
    together = 1
    while (
        groups % (2 * together) == 0 and min(width, out_channels // groups) * together < _LANES
    ):  # powers of two, as in the papers
        together *= 2
    merged = groups // together
    parts = weight.view(merged, together, out_channels // groups, width, *weight.shape[2:])
    apart = torch.eye(together, dtype=weight.dtype, device=weight.device)[:, None, :, None, None, None]
    wide = (parts.unsqueeze(3) * apart).reshape(out_channels, together * width, *weight.shape[2:])
    return F.conv2d(x, wide, bias, stride, padding, dilation, merged)


def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """One depthwise convolution for each output of a group, then sums over the group."""
    out_channels, width = weight.shape[:2]
    outputs = out_channels // groups
    sums = []
    for part in weight.view(groups, outputs, width, *weight.shape[2:]).unbind(dim=1):
        one = F.conv2d(x, part.reshape(-1, 1, *weight.shape[2:]), None, stride, padding, dilation, groups * width)
        summing = torch.eye(groups, dtype=x.dtype, device=x.device).repeat_interleave(width, dim=1)
        sums.append(F.conv2d(one, summing[:, :, None, None]))
    out = sums[0] if outputs == 1 else torch.stack(sums, dim=2).flatten(1, 2)
    return out if bias is None else out + bias[:, None, None]


def _auto(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    size, outputs, width = weight.shape[2], weight.shape[0] // groups, weight.shape[1]
    form = _reference
    if groups > 1 and x.device.type == "cpu" and eager(x, weight):
        if size >= 5:
            form = _channels_last
            positions = x.shape[2] * x.shape[3] / stride**2
            if outputs == 1 and stride == 1 and size >= 9 and positions >= 576 and not recording(x, weight):
                form = _depthwise
        elif 1 < min(outputs, width) < _LANES:
            form = _merged
    return form(x, weight, bias, stride, padding, dilation, groups)


_CONVOLUTION = {
    "auto": _auto,
    "reference": _reference,
    "channels_last": _channels_last,
    "merged": _merged,
    "depthwise": _depthwise,
}
IMPLEMENTATIONS = tuple(_CONVOLUTION)


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    impl: str = "auto",
) -> Tensor:
    """`torch.nn.functional.conv2d` in one of several forms that give the same numbers.

    Args:
        x: (B, C, H, W).
        weight: (D, C // groups, k, k).
        bias: (D,) or None.
        stride: As in `conv2d`.
        padding: As in `conv2d`.
        dilation: As in `conv2d`.
        groups: As in `conv2d`.
        impl: "auto", by sizes and device; "reference", conv2d as it is; "channels_last", in that layout; "merged",
            narrow groups put together; "depthwise", sums of depthwise convolutions.

    Returns:
        (B, D, H', W'), in channels-last layout where the form works in it.

    Raises:
        ValueError: Unknown `impl`.

    Example:
        >>> grouped_conv2d(torch.randn(2, 8, 5, 7), torch.randn(4, 2, 3, 3), padding=1, groups=4).shape
        torch.Size([2, 4, 5, 7])
    """
    function = choose("grouped_conv2d", impl, _CONVOLUTION)
    return function(x, weight, bias, stride, padding, dilation, groups)
