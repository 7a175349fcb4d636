"""Pyramid squeeze attention: branches at several scales, weighed per channel and concatenated.

Paper: EPSANet: An Efficient Pyramid Squeeze Attention Block on CNN, https://arxiv.org/abs/2105.14447
Authors' code: https://github.com/murufeng/EPSANet at 9955041a1db4591fae080d2e6edb25e2a2914d47
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visattn.errors import check
from visattn.ops._shared import again, choose, differentiate_again, eager, recording, upcast

__all__ = ["pyramid_squeeze", "pyramid_weights"]


def pyramid_weights(gates: Tensor) -> Tensor:
    """Softmax over scales of (B, K, C) gates, in float32 for 16-bit ones; keeps the dtype."""
    return upcast(gates).softmax(dim=1).to(gates.dtype)


def _reference(features: Sequence[Tensor], gates: Tensor) -> Tensor:
    stacked = torch.stack(list(features), dim=1)  # (B, K, C, H, W)
    weighted = stacked * pyramid_weights(gates).to(stacked.dtype)[..., None, None]
    return weighted.flip(dims=(1,)).flatten(1, 2)  # the last scale comes first


def _weighted_plain(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    parts = [feature * weights[:, index, :, None, None] for index, feature in enumerate(features)]
    return torch.cat(parts[::-1], dim=1)


def _concatenate(features: Sequence[Tensor], weights: Tensor, layout: torch.memory_format) -> Tensor:
    """Each weighted map written once, in its final place."""
    batch, scales, channels = weights.shape
    shape = (batch, scales * channels, *features[0].shape[2:])
    out = torch.empty(shape, dtype=features[0].dtype, device=features[0].device, memory_format=layout)
    for index, feature in enumerate(features):
        start = (scales - 1 - index) * channels
        torch.mul(feature, weights[:, index, :, None, None], out=out[:, start : start + channels])
    return out


class _Weighted(torch.autograd.Function):
    """`_concatenate` and its gradients, without the concatenation in either direction."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, layout: torch.memory_format, *features: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *features)
        return _concatenate(features, weights, layout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weights, *features = ctx.saved_tensors
        if again(gradient):
            plain = differentiate_again(
                lambda weights, *features: _weighted_plain(features, weights),
                (weights, *features),
                (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]),
                gradient,
            )
            return (plain[0], None, *plain[1:])
        scales, channels = weights.shape[1:]
        if features[0].is_contiguous(memory_format=torch.channels_last):
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        d_features, d_weights = [], []
        for index, feature in enumerate(features):
            start = (scales - 1 - index) * channels
            part = gradient[:, start : start + channels]
            d_features.append(part * weights[:, index, :, None, None])
            d_weights.append((part * feature).sum(dim=(2, 3)))
        return torch.stack(d_weights, dim=1), None, *d_features


def _auto(features: Sequence[Tensor], gates: Tensor, layout: torch.memory_format) -> Tensor:
    weights = pyramid_weights(gates).to(features[0].dtype)
    if not eager(gates, *features) or len({(feature.dtype, feature.shape) for feature in features}) > 1:
        return _weighted_plain(features, weights).contiguous(memory_format=layout)
    if recording(weights, *features):
        out: Tensor = _Weighted.apply(weights, layout, *features)
        return out
    return _concatenate(features, weights, layout)


def pyramid_squeeze(
    features: Sequence[Tensor],
    gates: Tensor,
    *,
    layout: torch.memory_format = torch.contiguous_format,
    impl: str = "auto",
) -> Tensor:
    """Concatenation of `softmax_k(gates)_k F_k` in reverse order of k, as the published checkpoints need it.

    Args:
        features: K maps (B, C, H, W).
        gates: (B, K, C); their softmax runs in float32.
        layout: Memory format of the result.
        impl: "auto" or "reference".

    Returns:
        (B, K * C, H, W) in the dtype of the features, channels of the last branch first.

    Raises:
        ValueError: Unknown `impl`, or another number of maps than of gates.

    Example:
        >>> pyramid_squeeze([torch.randn(2, 6, 3, 5), torch.randn(2, 6, 3, 5)], torch.rand(2, 2, 6)).shape
        torch.Size([2, 12, 3, 5])
    """
    check(
        len(features) == gates.shape[1],
        "pyramid_squeeze",
        "there must be as many gates as maps",
        features=len(features),
        gates=tuple(gates.shape),
    )
    if choose("pyramid_squeeze", impl, {"auto": _auto, "reference": _reference}) is _auto:
        return _auto(features, gates, layout)
    return _reference(features, gates).contiguous(memory_format=layout)
