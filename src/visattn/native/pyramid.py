"""What pyramid squeeze attention does with the maps of its scales, by the kernels of `pyramid.c`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from visattn.native import call

__all__ = ["gather", "means", "scatter", "weigh"]


def _sizes(maps: Sequence[Tensor], *others: tuple[Tensor, str]) -> tuple[int, int, int, int]:
    """Scales, batch, channels and positions, after a look at all shapes: of "vectors" and of "whole" maps."""
    scales, shape = len(maps), maps[0].shape
    shapes = {"vectors": (shape[0], scales, shape[1]), "whole": (shape[0], scales * shape[1], *shape[2:])}
    given = [*((one, tuple(shape)) for one in maps), *((one, shapes[kind]) for one, kind in others)]
    if maps[0].numel() == 0 or any(tuple(one.shape) != size or not one.is_contiguous() for one, size in given):
        raise ValueError(f"visattn.native: a pyramid was given {[(tuple(one.shape), size) for one, size in given]}")
    return scales, shape[0], shape[1], math.prod(shape[2:])


def means(maps: tuple[Tensor, ...]) -> Tensor:
    """Over positions, (B, K, C), of K maps (B, C, H, W)."""
    out = maps[0].new_empty(maps[0].shape[0], len(maps), maps[0].shape[1])
    call("pyramid_means", *_sizes(maps), maps, out, flops=0)
    return out


def weigh(maps: tuple[Tensor, ...], weights: Tensor) -> Tensor:
    """The maps times weights (B, K, C), concatenated, the last scale's first: (B, K * C, H, W)."""
    batch, channels, *sides = maps[0].shape
    out = maps[0].new_empty(batch, len(maps) * channels, *sides)
    call("pyramid_weigh", *_sizes(maps, (weights, "vectors"), (out, "whole")), maps, weights, out, flops=0)
    return out


def gather(maps: tuple[Tensor, ...], gradient: Tensor) -> Tensor:
    """The gradient of the weights, (B, K, C), from that of what `weigh` returned."""
    out = gradient.new_empty(maps[0].shape[0], len(maps), maps[0].shape[1])
    call("pyramid_gather", *_sizes(maps, (gradient, "whole")), maps, gradient, out, flops=0)
    return out


def scatter(maps: tuple[Tensor, ...], scale: int, gradient: Tensor, weights: Tensor, d_means: Tensor) -> Tensor:
    """The gradient of the maps of one scale, from those of what `weigh` and `means` returned."""
    out = gradient.new_empty(maps[scale].shape)
    sizes = _sizes(maps, (gradient, "whole"), (weights, "vectors"), (d_means, "vectors"))
    call("pyramid_scatter", *sizes, scale, gradient, weights, d_means, out, flops=0)
    return out
