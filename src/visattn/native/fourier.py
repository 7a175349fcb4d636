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

__all__ = ["convolve", "convolve_relu", "input_gradient", "pays", "weight_gradient"]

# As in fourier.c and tiles.h:
TILE = 7  # side of a tile of the output
TALL = 6  # rows of a panel
WIDE = 16  # channels that are transformed together
BLOCK = 48  # channels that lie together in spectra

WIDEST = 9  # kernel
COST = 2  # of a FLOP, in those of a direct convolution
MOST = 2**23  # numbers of the spectra at hand at one time


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ssize_t) for name in ("batch", "inputs", "outputs", "height", "width", "kernel")]


def _pairs(side: int) -> Tensor:
    """Positions (row, column) from the middle on, one of each pair p and -p."""
    half = side // 2
    flat = torch.arange(side * side // 2, side * side, device="cpu")  # whatever the default device is
    return torch.stack([flat // side - half, flat % side - half]).double()


@functools.cache
def _waves(side: int, size: int, back: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines between positions of a square and the frequencies of one of `size`, in panels of 6 rows."""
    at, frequencies = _pairs(side), _pairs(size)
    angle = 2 * math.pi / size * (frequencies.t() @ at)
    waves = [angle.cos(), angle.sin()]
    if back:
        for wave in waves:
            wave[1:] *= 2  # the frequency zero is no pair
        waves = [wave.t() / size**2 for wave in waves]
    panels = [F.pad(wave, (0, 0, 0, -len(wave) % TALL)).view(-1, TALL, wave.shape[1]).mT for wave in waves]
    cosines, sines = (panel.to(dtype).contiguous() for panel in panels)
    return cosines, sines


def _sizes(x: Tensor, weight: Tensor, *others: tuple[Tensor | None, tuple[int, ...]]) -> tuple[_Sizes, int]:
    """Sizes as C has them, after a look at all shapes, and about how many FLOPs a convolution takes."""
    outputs, inputs, kernel = weight.shape[:3]
    fit = x.dim() == 4 and x.shape[1] == inputs and weight.shape[3] == kernel and kernel % 2 == 1 and x.numel() > 0
    if not fit or any(tensor is not None and tensor.shape != shape for tensor, shape in others):
        given = (x, weight, *(tensor for tensor, _ in others))
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in given]
        raise ValueError(f"visattn.native: a convolution by transforms was given {shapes}")
    batch, _, height, width = x.shape
    return _Sizes(batch, inputs, outputs, height, width, kernel), _work(x.shape, inputs, outputs, kernel)


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _pairs_and_tiles(shape: Sequence[int], kernel: int) -> tuple[int, int]:
    """Frequencies of a tile, and tiles of a map."""
    return (TILE + kernel - 1) ** 2 // 2 + 1, math.prod(-(-side // TILE) for side in shape[2:])


def _work(shape: Sequence[int], inputs: int, outputs: int, kernel: int) -> int:
    """FLOPs of a convolution of maps of that shape, or of one of its gradients, transforms included."""
    inputs, outputs = _up(inputs, WIDE), _up(outputs, WIDE)
    pairs, tiles = _pairs_and_tiles(shape, kernel)
    tiles = _up(shape[0] * tiles, TALL)
    of_tiles = 2 * tiles * (inputs * pairs + outputs * (TILE * TILE // 2 + 1))
    return 2 * pairs * (3 * tiles * inputs * outputs + of_tiles + 2 * inputs * outputs * (kernel * kernel // 2 + 1))


def pays(shape: Sequence[int], weight: Tensor) -> bool:
    """Whether this is faster than a direct convolution of maps of that shape, padded to keep their size.

    Large maps, of which the spectra of one would take more memory than is good for them, are not asked about speed.
    """
    outputs, inputs, kernel = weight.shape[:3]
    pairs, tiles = _pairs_and_tiles(shape, kernel)
    direct = 2 * math.prod(shape) * outputs * kernel**2
    small = 3 * pairs * tiles * (_up(inputs, BLOCK) + _up(outputs, BLOCK)) <= MOST
    return 3 <= kernel <= WIDEST and small and COST * _work(shape, inputs, outputs, kernel) < direct


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
    outputs, _, kernel = weight.shape[:3]
    size = TILE + kernel - 1
    sizes, flops = _sizes(x, weight, (scale, (outputs,)), (shift, (outputs,)))
    out, totals = x.new_empty(x.shape[0], outputs, *x.shape[2:]), x.new_empty(x.shape[0], outputs)
    scale, shift = (None if numbers is None else numbers.contiguous() for numbers in (scale, shift))
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
    sizes, flops = _sizes(x, weight, (gradient, (x.shape[0], len(weight), *x.shape[2:])))
    into, back = _waves(size, size, False, x.dtype), _waves(kernel, size, True, x.dtype)
    waves = (*into, *_waves(TILE, size, False, x.dtype), *back)
    call("fourier_weight_gradient", x.contiguous(), gradient.contiguous(), out, *waves, sizes, MOST, flops=flops)
    return out
