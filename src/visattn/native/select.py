"""Selective kernels: their branches, and what is done between these and the sum, by the kernels of `select*.c`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visattn.native import call
from visattn.native.convolution import Geometry

__all__ = [
    "MOST_BRANCHES",
    "Convolutions",
    "Factors",
    "Norm",
    "combine",
    "convolve",
    "factors",
    "gather",
    "infer",
    "input_gradient",
    "normalise",
    "scatter",
    "weight_gradients",
]

# As in convolution.h and select.c:
MOST_BRANCHES = 4
_SUMS = 4  # of a map, for the backward pass


def _check(tensors: Sequence[tuple[Tensor | None, Sequence[int]]]) -> None:
    given = [(tensor, tuple(shape)) for tensor, shape in tensors if tensor is not None]
    if any(tensor.shape != shape or not tensor.is_contiguous() for tensor, shape in given):
        shapes = [(tuple(tensor.shape), shape) for tensor, shape in given]
        raise ValueError(f"visattn.native: a selection was given tensors and their shapes {shapes}")


def _sizes(maps: Sequence[Tensor], *vectors: tuple[Tensor, tuple[int, ...]]) -> tuple[int, int, int, int]:
    """Branches, batch, channels and positions, after a look at all shapes."""
    first = maps[0]
    if len(maps) > MOST_BRANCHES or first.dim() != 4 or first.numel() == 0:
        raise ValueError(f"visattn.native: a selection was given maps {[tuple(one.shape) for one in maps]}")
    _check([*((one, tuple(first.shape)) for one in maps), *vectors])
    return len(maps), first.shape[0], first.shape[1], math.prod(first.shape[2:])


def normalise(
    maps: tuple[Tensor, ...], weights: tuple[Tensor, ...], biases: tuple[Tensor, ...], eps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """What batch norms are from the statistics of these maps, and `mean over positions of sum_k relu(norm_k(map_k))`.

    Args:
        maps: K times (B, C, H, W), contiguous.
        weights: K times (C,).
        biases: K times (C,).
        eps: K numbers.

    Returns:
        (5, K, C): mean, unbiased variance, inverse standard deviation, what a map is multiplied with and what is added
        to it. (B, C), the mean over positions.
    """
    branches, channels = len(maps), maps[0].shape[1]
    weights, biases = (tuple(one.contiguous() for one in vectors) for vectors in (weights, biases))
    vectors = [(one, (channels,)) for one in (*weights, *biases)]
    if not branches == len(weights) == len(biases) == len(eps):
        raise ValueError("visattn.native: every map of a selection needs a norm")
    sizes = _sizes(maps, *vectors)
    of_norms, descriptor = maps[0].new_empty(5, branches, channels), maps[0].new_empty(maps[0].shape[:2])
    some = (ctypes.c_double * branches)(*eps)
    call("select_normalise", *sizes, maps, weights, biases, some, of_norms, descriptor, flops=0)
    return of_norms, descriptor


def combine(maps: tuple[Tensor, ...], attention: Tensor, of_norms: Tensor) -> Tensor:
    """`sum_k attention_k relu(norm_k(map_k))`.

    Args:
        maps: K times (B, C, H, W), contiguous.
        attention: (B, K, C), contiguous.
        of_norms: By `normalise`.
    """
    out = maps[0].new_empty(maps[0].shape)
    branches, (batch, channels) = len(maps), maps[0].shape[:2]
    vectors = [(attention, (batch, branches, channels)), (of_norms, (5, branches, channels))]
    call("select_combine", *_sizes(maps, *vectors), maps, of_norms, attention, out, flops=0)
    return out


def gather(maps: tuple[Tensor, ...], of_norms: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `attention` (B, K, C), and sums that `factors` takes.

    Args:
        maps: What was combined.
        of_norms: By `normalise`.
        gradient: Of the result, contiguous.
    """
    shape = (maps[0].shape[0], len(maps), maps[0].shape[1])
    d_attention, sums = gradient.new_empty(shape), gradient.new_empty(*shape, _SUMS)
    sizes = _sizes(maps, (gradient, tuple(maps[0].shape)), (of_norms, (5, *shape[1:])))
    call("select_gather", *sizes, maps, of_norms, gradient, d_attention, sums, flops=0)
    return d_attention, sums


class Factors(NamedTuple):
    """What the gradients of maps are made with, see `normed` in convolution.h.

    Attributes:
        of_channels: (K, C, 5).
        of_maps: (K, B, C, 2).
    """

    of_channels: Tensor
    of_maps: Tensor


def factors(
    of_norms: Tensor, attention: Tensor, sums: Tensor, d_descriptor: Tensor, positions: int
) -> tuple[Tensor, Tensor, Factors]:
    """The gradients of the norms' weights and biases, both (K, C), and what those of the maps are made with.

    Args:
        of_norms: By `normalise`.
        attention: (B, K, C), contiguous.
        sums: By `gather`.
        d_descriptor: The gradient of what `normalise` returned, (B, C), contiguous.
        positions: Of a map.
    """
    batch, branches, channels = attention.shape
    given = [(of_norms, (5, branches, channels)), (sums, (*attention.shape, _SUMS)), (d_descriptor, (batch, channels))]
    _check([(attention, attention.shape), *given])
    d_weights, d_biases = of_norms.new_empty(branches, channels), of_norms.new_empty(branches, channels)
    found = Factors(of_norms.new_empty(branches, channels, 5), of_norms.new_empty(branches, batch, channels, 2))
    sizes = branches, batch, channels, positions
    call("select_factors", *sizes, of_norms, attention, sums, d_descriptor, d_weights, d_biases, *found, flops=0)
    return d_weights, d_biases, found


def _sizes_with(maps: Sequence[Tensor], gradient: Tensor, by: Factors) -> tuple[int, int, int, int]:
    branches, (batch, channels) = len(maps), maps[0].shape[:2]
    of = [(by.of_channels, (branches, channels, 5)), (by.of_maps, (branches, batch, channels, 2))]
    return _sizes(maps, (gradient, tuple(maps[0].shape)), *of)


def scatter(maps: tuple[Tensor, ...], gradient: Tensor, by: Factors) -> tuple[Tensor, ...]:
    """The gradients of the maps.

    Args:
        maps: What was combined.
        gradient: Of the result, contiguous.
        by: By `factors`.
    """
    d_maps = tuple(one.new_empty(one.shape) for one in maps)
    call("select_scatter", *_sizes_with(maps, gradient, by), maps, gradient, *by, d_maps, flops=0)
    return d_maps


class Convolutions(NamedTuple):
    """Several convolutions of one input whose outputs have one shape.

    Attributes:
        weights: K times (C', C / groups, k, k), contiguous.
        geometries: K of them.
    """

    weights: tuple[Tensor, ...]
    geometries: tuple[Geometry, ...]

    def output(self, shape: torch.Size) -> torch.Size | None:
        """The shape of all outputs for an input of that shape; None where they differ or are too many."""
        pairs = list(zip(self.weights, self.geometries, strict=True))
        outputs = {geometry.sizes(shape, one)[1] for one, geometry in pairs}
        alike = {(one.shape[:2], geometry.stride, geometry.groups) for one, geometry in pairs}
        served = len(pairs) <= MOST_BRANCHES and len(outputs) == len(alike) == 1
        return torch.Size(outputs.pop()) if served else None

    def sizes(self, shape: torch.Size) -> tuple[ctypes.Array[Any], torch.Size, int]:
        """The sizes as C has them, the shape of an output and the FLOPs, for an input of that shape."""
        output = self.output(shape)
        if output is None:
            raise ValueError(f"visattn.native: branches of different sizes {[tuple(x.shape) for x in self.weights]}")
        found = [geometry.sizes(shape, one)[0] for geometry, one in zip(self.geometries, self.weights, strict=True)]
        return (type(found[0]) * len(found))(*found), output, sum(sizes.flops for sizes in found)


def convolve(x: Tensor, convs: Convolutions) -> tuple[Tensor, ...]:
    """The branches' maps.

    Args:
        x: (B, C, H, W), contiguous.
        convs: With contiguous weights.
    """
    sizes, shape, flops = convs.sizes(x.shape)
    _check([(x, x.shape), *((one, one.shape) for one in convs.weights)])
    maps = tuple(x.new_empty(shape) for _ in convs.weights)
    call("convolve_branches", len(maps), x, convs.weights, maps, sizes, flops=flops)
    return maps


def input_gradient(
    shape: torch.Size, convs: Convolutions, maps: tuple[Tensor, ...], gradient: Tensor, by: Factors
) -> Tensor:
    """The gradient of the input, of that shape; other arguments as `scatter` has them."""
    sizes, of_maps, flops = convs.sizes(shape)
    _check([(one, of_maps) for one in maps] + [(one, one.shape) for one in convs.weights])
    if _sizes_with(maps, gradient, by)[0] != len(convs.weights):
        raise ValueError("visattn.native: every branch needs a map")
    out = gradient.new_empty(shape)
    call("select_input_gradient", len(maps), convs.weights, maps, gradient, *by, out, sizes, flops=flops)
    return out


def weight_gradients(
    x: Tensor, convs: Convolutions, maps: tuple[Tensor, ...], gradient: Tensor, by: Factors
) -> tuple[Tensor, ...]:
    """The gradients of the weights; other arguments as `scatter` has them."""
    sizes, of_maps, flops = convs.sizes(x.shape)
    _check([(x, x.shape), *((one, of_maps) for one in maps)])
    if _sizes_with(maps, gradient, by)[0] != len(convs.weights):
        raise ValueError("visattn.native: every branch needs a map")
    out = tuple(gradient.new_empty(one.shape) for one in convs.weights)
    call("select_weight_gradients", len(maps), x, maps, gradient, *by, out, sizes, flops=flops)
    return out


class Norm(NamedTuple):
    """A layer's bias and the batch norm of eval mode behind it, all of which may be missing."""

    before: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    eps: float = 0.0


def infer(
    x: Tensor,
    convs: Convolutions,
    norms: Sequence[Norm],
    hidden: tuple[Tensor, Norm, bool],
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
) -> Tensor:
    """A whole selective kernel in inference.

    Args:
        x: (B, C, H, W), contiguous.
        convs: The branches; their norms end in a ReLU.
        norms: K of them.
        hidden: The layer that all branches share: weight, norm, and whether a ReLU follows.
        weights: K times (C', hidden).
        biases: K times (C',) or None.
    """
    sizes, shape, flops = convs.sizes(x.shape)
    weight, norm, relu = hidden
    channels, size, branches = shape[1], len(weight), len(convs.weights)
    vectors: list[tuple[Tensor | None, Sequence[int]]] = [(x, x.shape), (weight, (size, channels))]
    vectors += [(one, one.shape) for one in convs.weights] + [(one, (channels, size)) for one in weights]
    vectors += [(one, (channels,)) for one in (*(one for given in norms for one in given[:5]), *biases)]
    _check([*vectors, *((one, (size,)) for one in norm[:5])])
    if not branches == len(norms) == len(weights) == len(biases):
        raise ValueError("visattn.native: every branch needs a norm and a layer for its logits")
    given = tuple(one for some in (*norms, norm) for one in some[:5])
    eps = (ctypes.c_double * (branches + 1))(*(some.eps for some in (*norms, norm)))
    out = x.new_empty(shape)
    flops += 2 * len(x) * channels * size * (branches + 1)
    call(
        "select_infer",
        branches,
        sizes,
        x,
        convs.weights,
        given,
        eps,
        size,
        relu,
        weight,
        weights,
        biases,
        out,
        flops=flops,
    )
    return out
