"""What selective kernels do between convolutions and sum, by the kernels of `select.c`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

from torch import Tensor

from visattn.native import call

__all__ = ["MOST_BRANCHES", "combine", "gather", "normalise", "scatter"]

# As in select.c:
MOST_BRANCHES = 4
_SUMS = 4  # of a map, for the backward pass


def _sizes(maps: Sequence[Tensor], *vectors: tuple[Tensor, tuple[int, ...]]) -> tuple[int, int, int, int]:
    """Branches, batch, channels and positions, after a look at all shapes."""
    first = maps[0]
    fit = len(maps) <= MOST_BRANCHES and first.dim() == 4 and first.numel() > 0
    fit = fit and all(one.shape == first.shape and one.is_contiguous() for one in maps)
    if not fit or any(tensor.shape != shape or not tensor.is_contiguous() for tensor, shape in vectors):
        shapes = [tuple(tensor.shape) for tensor in (*maps, *(tensor for tensor, _ in vectors))]
        raise ValueError(f"visattn.native: a selection was given maps and vectors {shapes}")
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
    numbers, descriptor = maps[0].new_empty(5, branches, channels), maps[0].new_empty(maps[0].shape[:2])
    some = (ctypes.c_double * branches)(*eps)
    call("select_normalise", *sizes, maps, weights, biases, some, numbers, descriptor, flops=0)
    return numbers, descriptor


def combine(
    maps: tuple[Tensor, ...], attention: Tensor, *, numbers: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`sum_k attention_k map_k`, or of `relu(norm_k(map_k))` where the norms' numbers are given.

    Args:
        maps: K times (B, C, H, W), contiguous.
        attention: (B, K, C), contiguous.
        numbers: By `normalise`.
        out: Where to, which may be the first map.
    """
    out = maps[0].new_empty(maps[0].shape) if out is None else out
    branches, (batch, channels) = len(maps), maps[0].shape[:2]
    vectors = [(attention, (batch, branches, channels)), (out, tuple(maps[0].shape))]
    vectors += [] if numbers is None else [(numbers, (5, branches, channels))]
    call("select_combine", *_sizes(maps, *vectors), maps, numbers, attention, out, flops=0)
    return out


def gather(maps: tuple[Tensor, ...], numbers: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `attention` (B, K, C), and sums that `scatter` takes.

    Args:
        maps: What was combined.
        numbers: By `normalise`.
        gradient: Of the result, contiguous.
    """
    shape = (maps[0].shape[0], len(maps), maps[0].shape[1])
    d_attention, sums = gradient.new_empty(shape), gradient.new_empty(*shape, _SUMS)
    sizes = _sizes(maps, (gradient, tuple(maps[0].shape)), (numbers, (5, *shape[1:])))
    call("select_gather", *sizes, maps, numbers, gradient, d_attention, sums, flops=0)
    return d_attention, sums


def scatter(
    maps: tuple[Tensor, ...],
    numbers: Tensor,
    gradient: Tensor,
    attention: Tensor,
    sums: Tensor,
    d_descriptor: Tensor,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The gradients of the maps, and those of the norms' weights and biases, both (K, C).

    Args:
        maps: What was combined.
        numbers: By `normalise`.
        gradient: Of the result, contiguous.
        attention: (B, K, C), contiguous.
        sums: By `gather`.
        d_descriptor: The gradient of what `normalise` returned, (B, C), contiguous.
    """
    shape = (maps[0].shape[0], len(maps), maps[0].shape[1])
    d_maps = tuple(one.new_empty(one.shape) for one in maps)
    d_weights, d_biases = numbers.new_empty(shape[1:]), numbers.new_empty(shape[1:])
    sizes = _sizes(
        maps,
        (gradient, tuple(maps[0].shape)),
        (numbers, (5, *shape[1:])),
        (attention, shape),
        (sums, (*shape, _SUMS)),
        (d_descriptor, (shape[0], shape[2])),
    )
    given = (maps, numbers, gradient, attention, sums, d_descriptor, d_maps, d_weights, d_biases)
    call("select_scatter", *sizes, *given, flops=0)
    return d_maps, d_weights, d_biases
