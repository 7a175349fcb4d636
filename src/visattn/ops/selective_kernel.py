"""Selective kernel: branches with different receptive fields, weighed per channel.

Paper: Selective Kernel Networks, https://arxiv.org/abs/1903.06586
Published code compared with:
https://github.com/developer0hye/SKNet-PyTorch at f78ea0c8e9394a77e58b33b228a4209186a6ad9e,
https://github.com/xmu-xiaoma666/External-Attention-pytorch at d75848e40233ed56fa503c888472bab8b17c568c
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visattn.ops._shared import choose, upcast

__all__ = ["branch_descriptor", "branch_select", "branch_weights"]


def branch_weights(logits: Tensor) -> Tensor:
    """Softmax over branches of (B, K, C) logits, in float32 for 16-bit ones; keeps the dtype."""
    return upcast(logits).softmax(dim=1).to(logits.dtype)


def _descriptor_reference(features: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(features), dim=1).sum(dim=1).mean(dim=(2, 3))


def _descriptor(features: Sequence[Tensor]) -> Tensor:
    # The mean of the sum is the sum of the means: the K-fold stack and its sum are never written.
    descriptor = features[0].mean(dim=(2, 3))
    for feature in features[1:]:
        descriptor = descriptor + feature.mean(dim=(2, 3))
    return descriptor


def branch_descriptor(features: Sequence[Tensor], *, impl: str = "auto") -> Tensor:
    """Mean over positions of the sum of the branches.

    Args:
        features: K maps (B, C, H, W).
        impl: "auto" or "reference".

    Returns:
        (B, C).

    Raises:
        ValueError: Unknown `impl`.

    Example:
        >>> branch_descriptor([torch.randn(2, 6, 3, 5), torch.randn(2, 6, 3, 5)]).shape
        torch.Size([2, 6])
    """
    functions = {"auto": _descriptor, "reference": _descriptor_reference}
    return choose("branch_descriptor", impl, functions)(features)


def _select_reference(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    stacked = torch.stack(list(features), dim=1)  # (B, K, C, H, W)
    weights = branch_weights(logits).to(stacked.dtype)
    return (stacked * weights[..., None, None]).sum(dim=1)


def _select(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    weights = branch_weights(logits).to(features[0].dtype)[..., None, None]
    out = features[0] * weights[:, 0]
    for index, feature in enumerate(features[1:], start=1):
        out = torch.addcmul(out, feature, weights[:, index])
    return out


def branch_select(features: Sequence[Tensor], logits: Tensor, *, impl: str = "auto") -> Tensor:
    """`sum_k softmax_k(logits)_k F_k`, the weights one per sample, branch and channel.

    Args:
        features: K maps (B, C, H, W).
        logits: (B, K, C); their softmax runs in float32.
        impl: "auto" or "reference".

    Returns:
        (B, C, H, W) in the dtype of the features.

    Raises:
        ValueError: Unknown `impl`.

    Example:
        >>> branch_select([torch.randn(2, 6, 3, 5), torch.randn(2, 6, 3, 5)], torch.randn(2, 2, 6)).shape
        torch.Size([2, 6, 3, 5])
    """
    return choose("branch_select", impl, {"auto": _select, "reference": _select_reference})(features, logits)
