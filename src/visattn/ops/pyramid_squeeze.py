"""Pyramid squeeze attention: branches at several scales, weighed per channel and concatenated.

Paper: EPSANet: An Efficient Pyramid Squeeze Attention Block on CNN, https://arxiv.org/abs/2105.14447
Authors' code: https://github.com/murufeng/EPSANet at 9955041a1db4591fae080d2e6edb25e2a2914d47
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visattn.ops._shared import choose, upcast

__all__ = ["pyramid_squeeze", "pyramid_weights"]


def pyramid_weights(gates: Tensor) -> Tensor:
    """Softmax over scales of (B, K, C) gates, in float32 for 16-bit ones; keeps the dtype."""
    return upcast(gates).softmax(dim=1).to(gates.dtype)


def _reference(features: Sequence[Tensor], gates: Tensor) -> Tensor:
    stacked = torch.stack(list(features), dim=1)  # (B, K, C, H, W)
    weighted = stacked * pyramid_weights(gates).to(stacked.dtype)[..., None, None]
    return weighted.flip(dims=(1,)).flatten(1, 2)  # the last scale comes first


def _auto(features: Sequence[Tensor], gates: Tensor) -> Tensor:
    weights = pyramid_weights(gates).to(features[0].dtype)[..., None, None]
    return torch.cat([feature * weights[:, index] for index, feature in reversed(list(enumerate(features)))], dim=1)


def pyramid_squeeze(features: Sequence[Tensor], gates: Tensor, *, impl: str = "auto") -> Tensor:
    """Concatenation of `softmax_k(gates)_k F_k` in reverse order of k, as the published checkpoints need it.

    Args:
        features: K maps (B, C, H, W).
        gates: (B, K, C); their softmax runs in float32.
        impl: "auto" or "reference".

    Returns:
        (B, K * C, H, W) in the dtype of the features, channels of the last branch first.

    Raises:
        ValueError: Unknown `impl`.

    Example:
        >>> pyramid_squeeze([torch.randn(2, 6, 3, 5), torch.randn(2, 6, 3, 5)], torch.rand(2, 2, 6)).shape
        torch.Size([2, 12, 3, 5])
    """
    return choose("pyramid_squeeze", impl, {"auto": _auto, "reference": _reference})(features, gates)
