"""Dual attention: attention over positions and attention over channels.

Paper: Dual Attention Network for Scene Segmentation, https://arxiv.org/abs/1809.02983
Authors' code: https://github.com/junfu1115/DANet at b0a0fa008148f102321cdaa7ca38fb0ddd0239d1
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from visattn.ops._shared import choose, full_precision, small_matrix, upcast

__all__ = ["channel_attention", "channel_weights", "position_attention", "position_weights"]


def position_weights(query: Tensor, key: Tensor) -> Tensor:
    """`softmax(q^T k)`, without a scale, for queries (B, D, Q) and keys (B, D, N).

    Returns:
        (B, Q, N) in the dtype of the queries; energies and softmax of 16-bit inputs run in float32.
    """
    with full_precision(query):
        energies = upcast(query).transpose(1, 2) @ upcast(key)
    return energies.softmax(dim=-1).to(query.dtype)


def _position_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    attention = position_weights(query.flatten(2), key.flatten(2))  # (B, N, N)
    return (value.flatten(2) @ attention.transpose(1, 2)).view(value.shape)


def _position(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (query, key, value))  # (B, 1, N, channels)
    if small_matrix(q, k):
        return _position_reference(query, key, value)
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return out.squeeze(1).transpose(1, 2).reshape(value.shape)


def position_attention(query: Tensor, key: Tensor, value: Tensor, *, impl: str = "auto") -> Tensor:
    """`v softmax(q^T k)^T` over the positions of a map, without a scale.

    Args:
        query: (B, D, H, W).
        key: (B, D, H, W).
        value: (B, C, H, W).
        impl: "auto" (torch's fused attention, but for small matrices in float32) or "reference" (holds the N x N
            matrix).

    Returns:
        (B, C, H, W) in the dtype of `value`. Softmax of 16-bit inputs runs in float32.

    Raises:
        ValueError: Unknown `impl`.

    Example:
        >>> q, v = torch.randn(2, 3, 5, 7), torch.randn(2, 8, 5, 7)
        >>> position_attention(q, q, v).shape
        torch.Size([2, 8, 5, 7])
    """
    functions = {"auto": _position, "reference": _position_reference}
    return choose("position_attention", impl, functions)(query, key, value)


def channel_weights(x: Tensor, *, inverted: bool = True) -> Tensor:
    """The channel-to-channel matrix (B, C, C) of `channel_attention`, in float32 for 16-bit inputs, autocast or not."""
    flat = upcast(x.flatten(2))
    with full_precision(x):  # sums over all positions overflow float16 at ordinary sizes
        energies = flat @ flat.transpose(1, 2)
    return (-energies if inverted else energies).softmax(dim=-1)  # softmax(rowmax(E) - E) = softmax(-E)


def _channel_reference(x: Tensor, inverted: bool) -> Tensor:
    flat = upcast(x.flatten(2))
    with full_precision(x):
        energies = flat @ flat.transpose(1, 2)  # (B, C, C)
    if inverted:
        energies = energies.amax(dim=-1, keepdim=True) - energies
    attention = energies.softmax(dim=-1).to(x.dtype)
    return (attention @ x.flatten(2)).view(x.shape)


def _channel(x: Tensor, inverted: bool) -> Tensor:
    attention = channel_weights(x, inverted=inverted).to(x.dtype)
    return (attention @ x.flatten(2)).view(x.shape)


def channel_attention(x: Tensor, *, inverted: bool = True, impl: str = "auto") -> Tensor:
    """`softmax(rowmax(E) - E) X` with `E = X X^T` over channels; `softmax(E) X` if not inverted.

    Args:
        x: (B, C, H, W).
        inverted: The authors' code, which their checkpoints need: the most alike channels get the least weight.
            False is the paper's equation.
        impl: "auto" or "reference".

    Returns:
        (B, C, H, W). Energies and softmax run in float32 for 16-bit inputs and under autocast.

    Raises:
        ValueError: Unknown `impl`.

    Example:
        >>> channel_attention(torch.randn(2, 6, 3, 5)).shape
        torch.Size([2, 6, 3, 5])
    """
    return choose("channel_attention", impl, {"auto": _channel, "reference": _channel_reference})(x, inverted)
