"""Convolutions by the kernels of `convolution.c`, those of wide small maps by those of `fourier.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visattn.native import call, fourier

__all__ = ["Geometry", "convolve", "convolve_relu", "input_gradient", "weight_gradient"]


MOST_STRIDE = 64
MOST_REACH = 16  # of a kernel, in sides of the map


class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_ssize_t)
        for name in (
            "batch",
            "groups",
            "in_channels",
            "out_channels",
            "height",
            "width",
            "out_height",
            "out_width",
            "kernel",
            "stride",
            "padding",
            "dilation",
        )
    ]

    @property
    def flops(self) -> int:
        """Of the convolution, or of one of its gradients."""
        outputs = self.batch * self.groups * self.out_channels * self.out_height * self.out_width
        return int(2 * outputs * self.in_channels * self.kernel**2)


class Geometry(NamedTuple):
    """What the kernels support: square kernels, one stride, padding and dilation for both directions."""

    stride: int
    padding: int
    dilation: int
    groups: int

    def fits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the kernels serve these shapes, which they do not check again."""
        if x.dim() != 4 or weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
            return False
        reach = self.dilation * (weight.shape[2] - 1) + 1
        return (
            min(self.stride, self.dilation, self.groups) >= 1
            and self.stride <= MOST_STRIDE
            and self.padding >= 0
            and max(self.padding, reach) <= MOST_REACH * max(x.shape[2:])  # buffers are as wide
            and min(x.shape[2:]) + 2 * self.padding >= reach
            and weight.shape[0] % self.groups == 0
            and x.shape[1] == weight.shape[1] * self.groups
            and (bias is None or bias.shape == weight.shape[:1])
            and len({tensor.dtype for tensor in (x, weight, bias) if tensor is not None}) == 1
        )

    def by_fourier(self, shape: Sequence[int], weight: Tensor) -> bool:
        """Whether transforms are the fastest way for maps of that shape: see fourier.c."""
        same = self[:] == (1, weight.shape[2] // 2, 1, 1) and weight.shape[2] % 2 == 1
        return same and fourier.pays(shape, weight)

    def sizes(self, shape: torch.Size, weight: Tensor) -> tuple[_Sizes, tuple[int, int, int, int]]:
        """The sizes as C has them, and the shape of the output, for an input of that shape."""
        batch, _, height, width = shape
        outputs, in_channels, kernel = weight.shape[:3]
        reach = self.dilation * (kernel - 1) + 1
        out = [(side + 2 * self.padding - reach) // self.stride + 1 for side in (height, width)]
        sizes = _Sizes(
            batch,
            self.groups,
            in_channels,
            outputs // self.groups,
            height,
            width,
            *out,
            kernel,
            self.stride,
            self.padding,
            self.dilation,
        )
        return sizes, (batch, outputs, out[0], out[1])


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """`conv2d(x, weight, bias)`."""
    if geometry.by_fourier(x.shape, weight):
        return fourier.convolve(x, weight, bias)
    sizes, shape = geometry.sizes(x.shape, weight)
    out, bias = x.new_empty(shape), _whole(bias)
    call("convolve", x.contiguous(), weight.contiguous(), None, bias, out, None, sizes, False, flops=sizes.flops)
    return out


def convolve_relu(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """`relu(scale * conv2d(x, weight) + shift)` and the sums of its maps, (B, C)."""
    if geometry.by_fourier(x.shape, weight):
        return fourier.convolve_relu(x, weight, scale, shift)
    sizes, shape = geometry.sizes(x.shape, weight)
    out, sums, scale, shift = x.new_empty(shape), x.new_empty(shape[:2]), _whole(scale), _whole(shift)
    call("convolve", x.contiguous(), weight.contiguous(), scale, shift, out, sums, sizes, True, flops=sizes.flops)
    return out, sums


def input_gradient(gradient: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """The gradient of an input of that shape."""
    if geometry.by_fourier(shape, weight):
        return fourier.input_gradient(gradient, weight)
    sizes, out = geometry.sizes(shape, weight)[0], gradient.new_empty(shape)
    call("convolve_input_gradient", gradient.contiguous(), weight.contiguous(), out, sizes, flops=sizes.flops)
    return out


def weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of a weight like `weight`."""
    if geometry.by_fourier(x.shape, weight):
        return fourier.weight_gradient(x, gradient, weight)
    sizes, out = geometry.sizes(x.shape, weight)[0], torch.empty_like(weight, memory_format=torch.contiguous_format)
    call("convolve_weight_gradient", x.contiguous(), gradient.contiguous(), out, sizes, flops=sizes.flops)
    return out


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
