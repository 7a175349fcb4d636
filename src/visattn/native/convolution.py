"""Convolutions by the kernels of `convolution.c`, and faster ways for wide ones."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visattn import native
from visattn.native import call, fourier
from visattn.native.matrices import multiply

__all__ = ["Geometry", "convolve", "convolve_relu", "input_gradient", "weight_gradient"]


LEAST_SIDE = 64  # of both matrices of a 1x1 convolution that is taken from torch
DIRECT_INPUTS, DIRECT_OUTPUTS = 512, 128  # channels up to which sums over taps beat torch without groups
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

    def way(self, shape: Sequence[int], weight: Tensor) -> str:
        """How the kernels compute a convolution of maps of that shape: by "product", "fourier" or "direct" sums.

        A 1x1 convolution without groups is a product; others of small maps are faster by transforms, see fourier.c.
        """
        outputs, width, kernel = weight.shape[:3]
        if not native.leads() or self[:] != (1, kernel // 2, 1, 1) or kernel % 2 == 0:
            return "direct"
        if kernel == 1:
            return "product" if min(math.prod(shape[2:]), outputs, width) >= LEAST_SIDE else "direct"
        return "fourier" if fourier.pays(shape, weight) else "direct"

    def beats_torch(self, shape: Sequence[int], weight: Tensor) -> bool:
        """Whether that is faster than torch where there is but one group."""
        if self.way(shape, weight) != "direct":
            return True
        outputs, width, kernel = weight.shape[:3]
        narrow = kernel == 3 and width <= DIRECT_INPUTS and outputs <= DIRECT_OUTPUTS
        return native.leads() and self[:] == (1, 1, 1, 1) and narrow

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
    match geometry.way(x.shape, weight):
        case "product":
            return _of_maps(weight.flatten(1), x, None if bias is None else bias[:, None])
        case "fourier":
            return fourier.convolve(x, weight, bias)
    sizes, shape = geometry.sizes(x.shape, weight)
    out, bias = x.new_empty(shape), _whole(bias)
    call("convolve", x.contiguous(), weight.contiguous(), None, bias, out, None, sizes, False, flops=sizes.flops)
    return out


def convolve_relu(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """`relu(scale * conv2d(x, weight) + shift)` and the sums of its maps, (B, C)."""
    match geometry.way(x.shape, weight):
        case "product":
            weight = weight.flatten(1) if scale is None else weight.flatten(1) * scale[:, None]
            out = _of_maps(weight, x, None if shift is None else shift[:, None]).relu_()
            return out, out.sum(dim=(2, 3))
        case "fourier":
            return fourier.convolve_relu(x, weight, scale, shift)
    sizes, shape = geometry.sizes(x.shape, weight)
    out, sums, scale, shift = x.new_empty(shape), x.new_empty(shape[:2]), _whole(scale), _whole(shift)
    call("convolve", x.contiguous(), weight.contiguous(), scale, shift, out, sums, sizes, True, flops=sizes.flops)
    return out, sums


def input_gradient(gradient: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """The gradient of an input of that shape."""
    match geometry.way(shape, weight):
        case "product":
            return _of_maps(weight.flatten(1).t(), gradient, None)
        case "fourier":
            return fourier.input_gradient(gradient, weight)
    sizes, out = geometry.sizes(shape, weight)[0], gradient.new_empty(shape)
    call("convolve_input_gradient", gradient.contiguous(), weight.contiguous(), out, sizes, flops=sizes.flops)
    return out


def weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of a weight like `weight`."""
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    match geometry.way(x.shape, weight):
        case "product":
            for i, (of_out, of_in) in enumerate(zip(gradient.flatten(2), x.flatten(2), strict=True)):
                multiply(of_out, of_in.t(), out=out.flatten(1), add=i > 0)
            return out
        case "fourier":
            return fourier.weight_gradient(x, gradient, weight)
    sizes = geometry.sizes(x.shape, weight)[0]
    call("convolve_weight_gradient", x.contiguous(), gradient.contiguous(), out, sizes, flops=sizes.flops)
    return out


def _of_maps(matrix: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """The products of a matrix and each map (C, N)."""
    out = x.new_empty(x.shape[0], len(matrix), *x.shape[2:])
    for from_map, to_map in zip(x.flatten(2), out.flatten(2), strict=True):
        multiply(matrix, from_map, bias=bias, out=to_map)
    return out


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
