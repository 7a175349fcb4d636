"""Dense convolutions of small maps by Fourier transforms of tiles, see fourier.c."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn.native import call

__all__ = ["convolve", "convolve_relu", "input_gradient", "pays", "weight_gradient", "work"]

TILE = 7  # side of a tile of the output
TALL = 6  # rows of a panel
WIDE = 16  # channels that are transformed together
WIDEST = 9  # kernel
COST = 2  # of a FLOP, in those of a direct convolution
MOST = 2**23  # numbers of the spectra at hand at one time


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ssize_t) for name in ("batch", "inputs", "outputs", "height", "width", "kernel")]


def _pairs(side: int) -> Tensor:
    """Positions (row, column) from the middle on, one of each pair p and -p."""
    half = side // 2
    flat = torch.arange(side * side // 2, side * side)
    return torch.stack([flat // side - half, flat % side - half]).double()


@functools.cache
def _waves(side: int, size: int, back: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines between positions of a square and the frequencies of one of `size`, in panels of 6 rows."""
    at, frequencies = _pairs(side), _pairs(size)
    angle = 2 * math.pi / size * (frequencies.t() @ at)
    waves = [angle.cos(), angle.sin()]
    if back:
        share = torch.full((len(angle), 1), 2.0, dtype=torch.float64)
        share[0] = 1.0  # the frequency zero is no pair
        one = torch.ones(side * side // 2 + 1, dtype=torch.float64)
        waves = [(wave * share / size**2 * one).t() for wave in waves]
    panels = [F.pad(wave, (0, 0, 0, -len(wave) % TALL)).view(-1, TALL, wave.shape[1]).mT for wave in waves]
    cosines, sines = (panel.to(dtype).contiguous() for panel in panels)
    return cosines, sines


def _sizes(x: Tensor, inputs: int, outputs: int, kernel: int) -> tuple[_Sizes, int]:
    """Sizes as C has them, and about how many FLOPs the products take."""
    batch, _, height, width = x.shape
    return _Sizes(batch, inputs, outputs, height, width, kernel), work(x.shape, inputs, outputs, kernel)


def work(shape: Sequence[int], inputs: int, outputs: int, kernel: int) -> int:
    """FLOPs of a convolution of maps of that shape, or of one of its gradients, transforms included."""
    inputs, outputs = (-(-channels // WIDE) * WIDE for channels in (inputs, outputs))
    size = TILE + kernel - 1
    pairs = size * size // 2 + 1
    tiles = shape[0] * math.prod(-(-side // TILE) for side in shape[2:])
    of_tiles = 2 * tiles * (inputs * pairs + outputs * (TILE * TILE // 2 + 1))
    return 2 * pairs * (3 * tiles * inputs * outputs + of_tiles + 2 * inputs * outputs * (kernel * kernel // 2 + 1))


def pays(shape: Sequence[int], weight: Tensor) -> bool:
    """Whether this is faster than a direct convolution of maps of that shape, padded to keep their size."""
    outputs, inputs, kernel = weight.shape[:3]
    direct = 2 * math.prod(shape) * outputs * kernel**2
    return 3 <= kernel <= WIDEST and COST * work(shape, inputs, outputs, kernel) < direct


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv2d(x, weight, bias, padding="same")`."""
    return _convolve(x, weight, None, bias, False)[0]


def convolve_relu(x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """`relu(scale * conv2d(x, weight, padding="same") + shift)` and the sums of its maps, (B, C)."""
    return _convolve(x, weight, scale, shift, True)


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the input: a convolution with turned kernels, whose sines have the other sign."""
    return _convolve(gradient, weight.transpose(0, 1), None, None, False, sign=-1.0)[0]


def _convolve(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool, sign: float = 1.0
) -> tuple[Tensor, Tensor]:
    weight = weight if weight.stride()[2:] == (weight.shape[3], 1) else weight.contiguous()
    outputs, inputs, kernel = weight.shape[:3]
    size = TILE + kernel - 1
    out, totals = x.new_empty(x.shape[0], outputs, *x.shape[2:]), x.new_empty(x.shape[0], outputs)
    scale, shift = (None if numbers is None else numbers.contiguous() for numbers in (scale, shift))
    sizes, flops = _sizes(x, inputs, outputs, kernel)
    cosines, sines = _waves(kernel, size, False, x.dtype)
    waves = (*_waves(size, size, False, x.dtype), cosines, sign * sines, *_waves(TILE, size, True, x.dtype))
    given = (x.contiguous(), weight, scale, shift, out, totals if relu else None)
    call("fourier_convolve", *given, *waves, sizes, *weight.stride()[:2], relu, MOST, flops=flops)
    return out, totals


def weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a weight like `weight`."""
    kernel = weight.shape[2]
    size = TILE + kernel - 1
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    sizes, flops = _sizes(x, x.shape[1], gradient.shape[1], kernel)
    into, back = _waves(size, size, False, x.dtype), _waves(kernel, size, True, x.dtype)
    waves = (*into, *_waves(TILE, size, False, x.dtype), *back)
    call("fourier_weight_gradient", x.contiguous(), gradient.contiguous(), out, *waves, sizes, MOST, flops=flops)
    return out
