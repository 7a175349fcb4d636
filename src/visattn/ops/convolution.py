"""Grouped convolutions: the same numbers, in the form that the machine computes fastest.

CPU kernels want 8 or more channels in a group, or one. For numbers in between they fall back to code several times
slower than the machine, which these forms avoid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn.ops._shared import again, choose, differentiate_again, eager, full_precision, precise, recording, upcast

__all__ = ["IMPLEMENTATIONS", "best_form", "grouped_conv2d"]

_LANES = 8  # channels in a group from which the kernels of a CPU work at full width
_BAND = 800  # positions after which a sum of a weight's gradient is begun anew


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _together(weight: Tensor, groups: int) -> int:
    """How many groups to put together for kernels to work at full width: a power of two, as in the papers."""
    together = 1
    while groups % (2 * together) == 0 and min(weight.shape[1], weight.shape[0] // groups) * together < _LANES:
        together *= 2
    return together


def _wide(weight: Tensor, groups: int, together: int) -> Tensor:
    """The weight of `together` groups as one, with zeros between channels of different ones."""
    outputs, width = weight.shape[0] // groups, weight.shape[1]
    parts = weight.view(groups // together, together, outputs, 1, width, *weight.shape[2:])
    apart = torch.eye(together, dtype=weight.dtype, device=weight.device)[:, None, :, None, None, None]
    return (parts * apart).reshape(weight.shape[0], together * width, *weight.shape[2:])


def _weight_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """The gradient of a weight, summed over some samples or a band of one, and then over these.

    CPU kernels add up all positions of all samples one after the other, which costs a digit of float32.
    """
    height, width = gradient.shape[2:]
    samples = max(1, _BAND // (height * width))
    rows = height if height * width <= _BAND else max(1, _BAND // width)
    reach = dilation * (weight.shape[2] - 1) + 1
    if rows < height:
        last = x.is_contiguous(memory_format=torch.channels_last)
        x = F.pad(x, (0, 0, padding, padding))
        x = x.contiguous(memory_format=torch.channels_last) if last else x
    total = torch.zeros_like(weight)
    for sample in range(0, x.shape[0], samples):
        of_samples = slice(sample, sample + samples)
        for row in range(0, height, rows):
            seen = slice(row * stride, (min(row + rows, height) - 1) * stride + reach) if rows < height else slice(None)
            part = torch.ops.aten.convolution_backward(
                gradient[of_samples, :, row : row + rows],
                x[of_samples, :, seen],
                weight,
                None,
                [stride, stride],
                [0 if rows < height else padding, padding],
                [dilation, dilation],
                False,
                [0, 0],
                groups,
                [False, True, False],
            )[1]
            total += part
    return total


class _Convolution(torch.autograd.Function):
    """A grouped convolution whose gradients come from the kernels that are fast for them, whatever the forward used."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: int,
        dilation: int,
        groups: int,
        form: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias, ctx.numbers = bias is not None, (stride, padding, dilation, groups)
        out: Tensor = form(x, weight, bias, stride, padding, dilation, groups)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.numbers
        needed = ctx.needs_input_grad
        if again(gradient):
            plain = differentiate_again(
                lambda x, weight: F.conv2d(x, weight, None, *ctx.numbers), (x, weight), needed[:2], gradient
            )
            return (*plain, gradient.sum(dim=(0, 2, 3)) if ctx.bias else None, None, None, None, None, None)
        d_x = d_weight = None
        with full_precision(x):
            merge = weight.shape[2] < 5
            layout = torch.contiguous_format if merge else torch.channels_last
            gradient, x = gradient.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
            together = _together(weight, groups) if merge else 1
            wide = _wide(weight, groups, together)
            if needed[0]:
                d_x = torch.ops.aten.convolution_backward(
                    gradient,
                    x,
                    wide,
                    None,
                    [stride, stride],
                    [padding, padding],
                    [dilation, dilation],
                    False,
                    [0, 0],
                    groups // together,
                    [True, False, False],
                )[0]
            if needed[1]:
                d_wide = _weight_gradient(gradient, x, wide, stride, padding, dilation, groups // together)
                shape = (groups // together, together, -1, together, *weight.shape[1:])
                blocks = d_wide.view(shape).diagonal(dim1=1, dim2=3)  # of each group with itself
                d_weight = blocks.movedim(-1, 1).reshape(weight.shape)
            d_bias = gradient.sum(dim=(0, 2, 3)) if ctx.bias else None
        return d_x, d_weight, d_bias, None, None, None, None, None


def _channels_last(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _merged(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    together = _together(weight, groups)
    return F.conv2d(x, _wide(weight, groups, together), bias, stride, padding, dilation, groups // together)


def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """One depthwise convolution for each output of a group, then sums over the group."""
    dtype, x, weight = x.dtype, upcast(x), upcast(weight)  # each part would be rounded to 16 bits before the sum
    bias = None if bias is None else upcast(bias)
    out_channels, width = weight.shape[:2]
    outputs = out_channels // groups
    sums = []
    for part in weight.view(groups, outputs, width, *weight.shape[2:]).unbind(dim=1):
        one = F.conv2d(x, part.reshape(-1, 1, *weight.shape[2:]), None, stride, padding, dilation, groups * width)
        summing = torch.eye(groups, dtype=x.dtype, device=x.device).repeat_interleave(width, dim=1)
        sums.append(F.conv2d(one, summing[:, :, None, None]))
    out = sums[0] if outputs == 1 else torch.stack(sums, dim=2).flatten(1, 2)
    return (out if bias is None else out + bias[:, None, None]).to(dtype)


def best_form(device: str, *, size: int, outputs: int, width: int, groups: int, stride: int, positions: int) -> str:
    """The form that "auto" takes, by what measured best on CPUs; on other devices `conv2d` as it is.

    Args:
        device: Type of the device.
        size: Of the kernel.
        outputs: Output channels of a group.
        width: Input channels of a group.
        groups: Groups.
        stride: Stride.
        positions: Of the input map.
    """
    if device != "cpu" or groups == 1 or outputs == width == 1:
        return "reference"
    if size >= 5:
        return "depthwise" if outputs == stride == 1 and size >= 9 and positions >= 576 else "channels_last"
    return "merged" if min(outputs, width) < _LANES else "reference"


def _auto(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    numbers = (stride, padding, dilation, groups)
    if not eager(x, weight, bias):
        return _reference(x, weight, bias, *numbers)
    outputs, width = weight.shape[0] // groups, weight.shape[1]
    name = best_form(
        x.device.type,
        size=weight.shape[2],
        outputs=outputs,
        width=width,
        groups=groups,
        stride=stride,
        positions=x.shape[2] * x.shape[3],
    )
    if name == "depthwise" and not precise(x, weight):
        name = "channels_last"
    form = _CONVOLUTION[name]
    if name != "reference" and min(outputs, width) < _LANES and recording(x, weight, bias) and precise(x, weight):
        out: Tensor = _Convolution.apply(x, weight, bias, *numbers, form)
        return out
    return form(x, weight, bias, *numbers)


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
            narrow groups put together; "depthwise", sums of depthwise convolutions. The last
            two have zeros between groups, so that an infinity or NaN of one group may reach others.

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
