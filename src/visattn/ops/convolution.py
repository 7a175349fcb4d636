"""Grouped convolutions: the same numbers, in the form that the machine computes fastest.

Torch's CPU kernels want 8 or more channels in a group, or one. For numbers in between they fall back to code several
times slower than the machine, which these forms avoid: by kernels of our own or, where these could not be compiled, by
torch's convolutions of other shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn import native
from visattn.errors import check
from visattn.native import convolution as kernels
from visattn.ops._shared import (
    again,
    choose,
    differentiate_again,
    eager,
    full_precision,
    need_eager,
    precise,
    recording,
    result_dtype,
    upcast,
)

__all__ = ["IMPLEMENTATIONS", "Convolution", "best_form", "conv2d_relu", "gradients", "grouped_conv2d"]

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


class Convolution(NamedTuple):
    """What `torch.nn.functional.conv2d` takes, with one number for both directions."""

    weight: Tensor
    bias: Tensor | None = None
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def geometry(self) -> kernels.Geometry:
        """All but the tensors."""
        return kernels.Geometry(*self[2:])


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
        ctx.bias, ctx.numbers, ctx.native = bias is not None, (stride, padding, dilation, groups), form is _kernels
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
        if ctx.native:
            d_x, d_weight = gradients(gradient, x, Convolution(weight, None, *ctx.numbers), "native", needed[:2])
            d_bias = gradient.sum(dim=(0, 2, 3)) if ctx.bias else None
            return d_x, d_weight, d_bias, None, None, None, None, None
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


def gradients(
    gradient: Tensor, x: Tensor, conv: Convolution, form: str, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of the input and of the weight of a convolution.

    Args:
        gradient: Of its output.
        x: Its input.
        conv: Without a bias.
        form: "native", or "reference" for torch's.
        needed: Which of the two.
    """
    if form == "native":
        d_x = kernels.input_gradient(gradient, conv.weight, x.shape, conv.geometry) if needed[0] else None
        return d_x, kernels.weight_gradient(x, gradient, conv.weight, conv.geometry) if needed[1] else None
    numbers = ([conv.stride] * 2, [conv.padding] * 2, [conv.dilation] * 2, False, [0, 0], conv.groups)
    both = torch.ops.aten.convolution_backward(gradient, x, conv.weight, None, *numbers, [*needed, False])
    return both[0], both[1]


def _kernels(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    return kernels.convolve(x, weight, bias, kernels.Geometry(stride, padding, dilation, groups))


def _native(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    need_eager("native", x, weight, bias)
    dtype = result_dtype(x)
    x, weight = upcast(x), upcast(weight)
    bias = None if bias is None else upcast(bias)
    native.need(x, weight, bias)
    geometry = kernels.Geometry(stride, padding, dilation, groups)
    check(
        geometry.fits(x, weight, bias),
        "impl='native'",
        "the kernels are for square kernels, and for tensors of one type whose shapes fit",
        remedy="Leave impl at 'auto'.",
        x=tuple(x.shape),
        weight=tuple(weight.shape),
        groups=groups,
    )
    if recording(x, weight, bias):
        out: Tensor = _Convolution.apply(x, weight, bias, stride, padding, dilation, groups, _kernels)
        return out.to(dtype)
    return _kernels(x, weight, bias, stride, padding, dilation, groups).to(dtype)


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


def best_form(
    device: str, *, native: bool, size: int, outputs: int, width: int, groups: int, beats_torch: bool = False
) -> str:
    """The form that "auto" takes, by what measured best on CPUs; on other devices `conv2d` as it is.

    Args:
        device: Type of the device.
        native: Whether there are kernels of our own for these tensors.
        size: Of the kernel.
        outputs: Output channels of a group.
        width: Input channels of a group.
        groups: Groups.
        beats_torch: Whether the kernels are faster than torch where there is one group.
    """
    if device != "cpu" or (groups == 1 and not (native and beats_torch)) or outputs == width == 1:
        return "reference"
    if native:
        return "native"
    if size >= 5:
        return "channels_last"
    return "merged" if min(outputs, width) < _LANES else "reference"


def _choice(
    x: Tensor, weight: Tensor, bias: Tensor | None, numbers: tuple[int, int, int, int], scale: Tensor | None = None
) -> str:
    groups = numbers[3]
    given = [tensor for tensor in (x, weight, bias, scale) if tensor is not None]
    if not eager(*given) or x.dim() != 4 or x.shape[1] != weight.shape[1] * groups or len(weight) % groups:
        return "reference"  # which says what is wrong with sizes that do not fit
    geometry = kernels.Geometry(*numbers)
    fits = geometry.fits(x, weight, bias) and (scale is None or scale.shape == weight.shape[:1])
    return best_form(
        x.device.type,
        native=native.available() and x.dtype == torch.float32 and precise(*given) and fits,
        size=weight.shape[2],
        outputs=weight.shape[0] // groups,
        width=weight.shape[1],
        groups=groups,
        beats_torch=geometry.beats_torch(x.shape, weight),
    )


def _auto(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    numbers = (stride, padding, dilation, groups)
    name = _choice(x, weight, bias, numbers)
    form = _CONVOLUTION[name]
    narrow = name not in ("reference", "native") and min(weight.shape[0] // groups, weight.shape[1]) < _LANES
    if narrow and recording(x, weight, bias) and precise(x, weight):
        out: Tensor = _Convolution.apply(x, weight, bias, *numbers, form)
        return out
    return form(x, weight, bias, *numbers)


_CONVOLUTION = {
    "auto": _auto,
    "reference": _reference,
    "native": _native,
    "channels_last": _channels_last,
    "merged": _merged,
}
IMPLEMENTATIONS = native.served(_CONVOLUTION)


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
        impl: "auto", by sizes and device; "reference", conv2d as it is; "native", the kernels of `visattn.native`, not
            for compilers; "channels_last", in that layout; "merged", narrow groups put together, with zeros between
            groups, so that an infinity or NaN of one may reach others. The kernels take wide convolutions of small maps
            by Fourier transforms: rounding is then that of the largest value of a 7x7 tile and its surroundings.

    Returns:
        (B, D, H', W'), in channels-last layout where the form works in it.

    Raises:
        ValueError: Unknown `impl`, or one that cannot serve the arguments.

    Example:
        >>> grouped_conv2d(torch.randn(2, 8, 5, 7), torch.randn(4, 2, 3, 3), padding=1, groups=4).shape
        torch.Size([2, 4, 5, 7])
    """
    function = choose("grouped_conv2d", impl, _CONVOLUTION)
    return function(x, weight, bias, stride, padding, dilation, groups)


def conv2d_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """`relu(scale * conv2d(x, weight) + shift)` and what its maps add up to.

    Args:
        x: (B, C, H, W).
        weight: (D, C // groups, k, k).
        scale: (D,) or None.
        shift: (D,) or None.
        stride: As in `conv2d`.
        padding: As in `conv2d`.
        dilation: As in `conv2d`.
        groups: As in `conv2d`.

    Returns:
        (B, D, H', W') and (B, D), the sums of 16-bit maps in float32.

    Example:
        >>> x, weight = torch.ones(2, 8, 5, 7), torch.ones(4, 2, 1, 1)
        >>> conv2d_relu(x, weight, None, torch.ones(4), stride=1, padding=0, dilation=1, groups=4)[1][0]
        tensor([105., 105., 105., 105.])
    """
    numbers = (stride, padding, dilation, groups)
    if not recording(x, weight, scale, shift) and _choice(x, weight, shift, numbers, scale) == "native":
        return kernels.convolve_relu(x, weight, scale, shift, kernels.Geometry(*numbers))
    if scale is None:
        out = _auto(x, weight, shift, *numbers)
    elif weight.numel() * stride**2 < x[:, :1].numel() * len(weight):
        out = _auto(x, weight * scale[:, None, None, None], shift, *numbers)
    else:  # the map is smaller than the weight
        out = _auto(x, weight, None, *numbers).mul_(scale[:, None, None])
        out = out if shift is None else out.add_(shift[:, None, None])
    out = F.relu_(out)
    return out, out.sum(dim=(2, 3), dtype=torch.promote_types(out.dtype, torch.float32))
