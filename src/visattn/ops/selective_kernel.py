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

from visattn.errors import check
from visattn.ops._shared import choose, upcast

__all__ = ["branch_descriptor", "branch_select", "branch_weights"]


def branch_weights(logits: Tensor) -> Tensor:
    """Softmax over branches of (B, K, C) logits, in float32 for 16-bit ones; keeps the dtype."""
    return upcast(logits).softmax(dim=1).to(logits.dtype)


def _descriptor_reference(features: Sequence[Tensor], sums: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(features), dim=1).sum(dim=1).mean(dim=(2, 3))


def _descriptor(features: Sequence[Tensor], sums: Sequence[Tensor]) -> Tensor:
    # The mean of the sum is the sum of the means: the K-fold stack and its sum are never written. Sums, divided in the
    # end, as the gradient of a mean is divided map by map.
    positions = features[0].shape[2] * features[0].shape[3]
    dtype = torch.promote_types(features[0].dtype, torch.float32)  # a sum over a map overflows float16
    sums = sums or [feature.sum(dim=(2, 3), dtype=dtype) for feature in features]
    descriptor = sums[0]
    for some in sums[1:]:
        descriptor = descriptor + some
    return (descriptor / positions).to(features[0].dtype)


def branch_descriptor(features: Sequence[Tensor], sums: Sequence[Tensor] = (), *, impl: str = "auto") -> Tensor:
    """Mean over positions of the sum of the branches.

    Args:
        features: K maps (B, C, H, W).
        sums: What they add up to, K times (B, C), where that is known.
        impl: "auto" or "reference", which does not look at the sums.

    Returns:
        (B, C).

    Raises:
        ValueError: Unknown `impl`.

    Example:
        >>> branch_descriptor([torch.randn(2, 6, 3, 5), torch.randn(2, 6, 3, 5)]).shape
        torch.Size([2, 6])
    """
    functions = {"auto": _descriptor, "reference": _descriptor_reference}
    return choose("branch_descriptor", impl, functions)(features, sums)


def _select_reference(features: Sequence[Tensor], logits: Tensor) -> Tensor:
    stacked = torch.stack(list(features), dim=1)  # (B, K, C, H, W)
    weights = branch_weights(logits).to(stacked.dtype)
    return (stacked * weights[..., None, None]).sum(dim=1)


def _select(features: Sequence[Tensor], logits: Tensor, overwrite: bool) -> Tensor:
    weights = branch_weights(logits).to(features[0].dtype)[..., None, None]
    first, *others = features
    if len(others) == 1:  # the two weights add up to one
        return first.lerp_(others[0], weights[:, 1]) if overwrite else torch.lerp(first, others[0], weights[:, 1])
    out = first.mul_(weights[:, 0]) if overwrite else first * weights[:, 0]
    for index, feature in enumerate(others, start=1):
        out = out.addcmul_(feature, weights[:, index]) if overwrite else torch.addcmul(out, feature, weights[:, index])
    return out


def branch_select(features: Sequence[Tensor], logits: Tensor, *, overwrite: bool = False, impl: str = "auto") -> Tensor:
    """`sum_k softmax_k(logits)_k F_k`, the weights one per sample, branch and channel.

    Args:
        features: K maps (B, C, H, W).
        logits: (B, K, C); their softmax runs in float32.
        overwrite: The first map may be written to, which "auto" then does. Not for maps that autograd needs.
        impl: "auto" or "reference".

    Returns:
        (B, C, H, W) in the dtype of the features.

    Raises:
        ValueError: Unknown `impl`, or another number of maps than of logits.

    Example:
        >>> branch_select([torch.randn(2, 6, 3, 5), torch.randn(2, 6, 3, 5)], torch.randn(2, 2, 6)).shape
        torch.Size([2, 6, 3, 5])
    """
    check(
        len(features) == logits.shape[1],
        "branch_select",
        "there must be as many logits as maps",
        features=len(features),
        logits=tuple(logits.shape),
    )
    if choose("branch_select", impl, {"auto": _select, "reference": _select_reference}) is _select:
        return _select(features, logits, overwrite)
    return _select_reference(features, logits)
