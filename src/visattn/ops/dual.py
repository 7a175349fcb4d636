"""Dual attention: attention over positions and attention over channels.

Paper: Dual Attention Network for Scene Segmentation, https://arxiv.org/abs/1809.02983
Authors' code: https://github.com/junfu1115/DANet at b0a0fa008148f102321cdaa7ca38fb0ddd0239d1
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn import native
from visattn.native.attention import attend, fits
from visattn.native.matrices import multiply
from visattn.ops._attention import KEPT, PIECE, attend_fused, attend_in_pieces
from visattn.ops._products import NATIVE, Products, best_products
from visattn.ops._shared import (
    again,
    choose,
    differentiate_again,
    eager,
    empty_map,
    full_precision,
    map_layout,
    need_eager,
    precise,
    recording,
    upcast,
)
from visattn.ops.convolution import grouped_conv2d

__all__ = [
    "CHANNEL_IMPLEMENTATIONS",
    "POSITION_IMPLEMENTATIONS",
    "best_position",
    "channel_attention",
    "channel_residual",
    "channel_weights",
    "position_attention",
    "position_residual",
    "position_weights",
]

POSITIONS = 1024  # of a map that the value convolution takes at one time
Projection = tuple[Tensor, Tensor]


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


def _one_head(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, N, channels)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, weights: Tensor | None, scale: float
) -> Tensor:
    return (query @ key.transpose(2, 3)).softmax(dim=-1) @ value


def _position_fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = attend_fused(_one_head(query), _one_head(key), _one_head(value), _plain)
    return out.squeeze(1).transpose(1, 2).reshape(value.shape)


def _position_buffered(query: Tensor, key: Tensor, value: Tensor, *, impl: str) -> Tensor:
    out = attend_in_pieces(_one_head(query), _one_head(key), _one_head(value), _plain, impl=impl)
    return out.squeeze(1).transpose(1, 2).reshape(value.shape).to(value.dtype)


def best_position(
    device: str, *, compiling: bool, buffers: bool, precise: bool, entries: int, native: bool = False
) -> str:
    """The implementation that "auto" takes.

    On a CPU torch's fused kernels want queries as wide as values, and anywhere they know no second derivatives. 16-bit
    inputs on a GPU, and compilers, are what they are for.

    Args:
        device: Type of the device.
        compiling: Whether a compiler or an exporter is at work.
        buffers: Whether code with buffers of its own may serve the tensors.
        precise: Whether they are float32 or float64, without autocast.
        entries: Size of the attention matrix.
        native: Whether the compiled kernels serve the tensors.
    """
    if native and buffers and precise:
        return "native"
    if compiling or not (precise or (buffers and device == "cpu")):
        return "fused"
    small = entries <= KEPT.get(device, KEPT["cpu"])
    if buffers and (device == "cpu" or not small):  # a GPU wants all samples at once
        return "pieces"
    return "reference" if small else "fused"


def _position(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    compiling = torch.compiler.is_compiling()
    buffers = eager(query, key, value)
    name = best_position(
        query.device.type,
        compiling=compiling,
        buffers=buffers,
        precise=precise(query, key, value),
        entries=0 if compiling else query.shape[0] * (query.shape[2] * query.shape[3]) ** 2,
        native=buffers
        and native.leads()
        and query.dtype == torch.float32
        and fits(*map(_one_head, (query, key, value))),
    )
    return _POSITION[name](query, key, value)


_POSITION: dict[str, Callable[..., Tensor]] = {
    "auto": _position,
    "reference": _position_reference,
    "fused": _position_fused,
    "pieces": partial(_position_buffered, impl="pieces"),
    "native": partial(_position_buffered, impl="native"),
}
POSITION_IMPLEMENTATIONS = native.served(_POSITION)


def position_attention(query: Tensor, key: Tensor, value: Tensor, *, impl: str = "auto") -> Tensor:
    """`v softmax(q^T k)^T` over the positions of a map, without a scale.

    Args:
        query: (B, D, H, W).
        key: (B, D, H, W).
        value: (B, C, H, W).
        impl: "auto"; "reference", which holds the N x N matrix; "fused", torch's kernels; "pieces", a part of the
            matrix at a time, not for compilers; "native", the same in C, on a CPU.

    Returns:
        (B, C, H, W) in the dtype of `value`. Softmax of 16-bit inputs runs in float32.

    Raises:
        ValueError: Unknown `impl`, or one that cannot serve the arguments.

    Example:
        >>> q, v = torch.randn(2, 3, 5, 7), torch.randn(2, 8, 5, 7)
        >>> position_attention(q, q, v).shape
        torch.Size([2, 8, 5, 7])
    """
    return choose("position_attention", impl, _POSITION)(query, key, value)


def _position_residual_plain(
    x: Tensor,
    query: Projection,
    key: Projection,
    value: Projection,
    gamma: Tensor,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    convolve: Callable[..., Tensor] = F.conv2d,
) -> Tensor:
    return gamma * attention(convolve(x, *query), convolve(x, *key), convolve(x, *value)) + x


@torch.no_grad()
def _position_residual_pieces(
    x: Tensor, query: Projection, key: Projection, value: Projection, gamma: Tensor
) -> Tensor:
    # The rows of the attention matrix sum to one, so the value convolution may come after it: neither the values nor
    # the attended map before gamma and the residual are ever in memory.
    out, flat_out = empty_map(x)
    query_weight, key_weight, weight = (projection[0].flatten(1) for projection in (query, key, value))
    weight, bias = gamma * weight, (gamma * value[1])[:, None]
    positions = flat_out.shape[2]
    rows = min(positions, max(1, PIECE["cpu"] // positions))
    buffer = x.new_empty(rows, positions)
    for x_map, y_map in zip(x.flatten(2), flat_out, strict=True):
        keys = torch.addmm(key[1][:, None], key_weight, x_map)
        queries = torch.addmm(query[1], x_map.t(), query_weight.t())
        for start in range(0, positions, rows):
            part = slice(start, start + rows)
            attention = buffer[: queries[part].shape[0]]
            torch.mm(queries[part], keys, out=attention)
            torch.softmax(attention, -1, out=attention)
            y = torch.addmm(bias, weight, x_map @ attention.t(), out=y_map[:, part])
            y.add_(x_map[:, part])  # in the end: a sum that starts from it loses digits of what is small beside it
    return out


@torch.no_grad()
def _position_residual_native(
    x: Tensor, query: Projection, key: Projection, value: Projection, gamma: Tensor
) -> Tensor:
    # As in pieces: the value convolution comes after, some positions at a time, over what was attended to.
    out, flat_out = empty_map(x)
    query_weight, key_weight, weight = (projection[0].flatten(1) for projection in (query, key, value))
    weight, bias = gamma * weight, (gamma * value[1])[:, None]
    for x_map, y_map in zip(x.flatten(2), flat_out, strict=True):
        queries = multiply(query_weight, x_map, bias=query[1][:, None])
        keys = multiply(key_weight, x_map, bias=key[1][:, None])
        as_queries, as_keys, as_values, into = (y.t()[None, None] for y in (queries, keys, x_map, y_map))
        attend(as_queries, as_keys, as_values, None, None, 1.0, into)
        for inputs, y in zip(x_map.split(POSITIONS, dim=1), y_map.split(POSITIONS, dim=1), strict=True):
            torch.add(multiply(weight, y, bias=bias), inputs, out=y)
    return out


def _position_residual(x: Tensor, query: Projection, key: Projection, value: Projection, gamma: Tensor) -> Tensor:
    tensors = (x, *query, *key, *value, gamma)
    if x.device.type == "cpu" and eager(*tensors) and precise(*tensors) and not recording(*tensors):
        fast = native.leads() and x.dtype == torch.float32 and query[0].shape == key[0].shape
        run = _position_residual_native if fast else _position_residual_pieces
        return run(x, query, key, value, gamma)
    return _position_residual_plain(x, query, key, value, gamma, _position, grouped_conv2d)


def position_residual(
    x: Tensor, query: Projection, key: Projection, value: Projection, gamma: Tensor, *, impl: str = "auto"
) -> Tensor:
    """DANet's position attention with its convolutions: `gamma * position_attention(Wq x, Wk x, Wv x) + x`.

    Args:
        x: (B, C, H, W).
        query: Weight (D, C, 1, 1) and bias (D,) of the convolution that makes the queries.
        key: The same for the keys.
        value: Weight (C, C, 1, 1) and bias (C,).
        gamma: One number.
        impl: As for `position_attention`. Without gradients "auto" applies the value convolution to what was attended
            to, a few positions at a time: on a CPU its memory is the output and little else.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: Unknown `impl`, or one that cannot serve the arguments.

    Example:
        >>> x, projection = torch.randn(2, 6, 3, 5), (torch.randn(6, 6, 1, 1), torch.zeros(6))
        >>> position_residual(x, projection, projection, projection, torch.ones(1)).shape
        torch.Size([2, 6, 3, 5])
    """
    attention = choose("position_residual", impl, _POSITION)
    if impl == "auto":
        return _position_residual(x, query, key, value, gamma)
    return _position_residual_plain(x, query, key, value, gamma, attention)


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


def _channel_residual_reference(x: Tensor, gamma: Tensor, inverted: bool) -> Tensor:
    return gamma * _channel_reference(x, inverted) + x


def _channel_residual_plain(x: Tensor, gamma: Tensor, inverted: bool) -> Tensor:
    return gamma * _channel(x, inverted) + x


def _weights_of(flat: Tensor, inverted: bool, by: Products) -> Tensor:
    """`A`, (B, C, C)."""
    energies = by.gram(flat)
    return torch.softmax(energies.neg_() if inverted else energies, -1, out=energies)


def _add_mixed(mixing: Tensor, flat: Tensor, like: Tensor, by: Products) -> Tensor:
    """`mixing @ flat + like` as a map like `like`.

    The map is added in the end: a sum of hundreds of small products that starts from it loses their digits.
    """
    out, flat_out = empty_map(like)
    if by is NATIVE:
        by.product(mixing, flat, addend=like.flatten(2), out=flat_out)
        return out
    torch.bmm(mixing, flat, out=flat_out)
    return out.add_(like)


class _ChannelResidual(torch.autograd.Function):
    """`(gamma A) X + X`: gamma goes into the small matrix, and a gradient that has two sources is written once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, inverted: bool, by: Products) -> Tensor:
        flat = x.flatten(2)
        attention = _weights_of(flat, inverted, by)
        ctx.save_for_backward(x, gamma, attention)
        ctx.inverted, ctx.by = inverted, by
        return _add_mixed(gamma * attention, flat, x, by)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, gamma, attention = ctx.saved_tensors
        if again(gradient):
            plain = differentiate_again(
                lambda x, gamma: _channel_residual_plain(x, gamma, ctx.inverted),
                (x, gamma),
                ctx.needs_input_grad[:2],
                gradient,
            )
            return (*plain, None, None)
        by: Products = ctx.by
        with full_precision(x):
            flat, flat_gradient = x.flatten(2), gradient.flatten(2)
            d_mixing = by.product(flat_gradient, flat.transpose(1, 2))
            d_gamma = (d_mixing * attention).sum().view(gamma.shape)
            d_attention = d_mixing.mul_(-gamma if ctx.inverted else gamma)
            d_energies = torch.ops.aten._softmax_backward_data(d_attention, attention, -1, attention.dtype)
            d_x, d_flat = empty_map(x)
            outer, inner = d_energies + d_energies.transpose(1, 2), (gamma * attention).transpose(1, 2)
            if by is NATIVE:
                by.product(outer, flat, addend=flat_gradient.contiguous(), out=d_flat)
                by.product(inner, flat_gradient, addend=d_flat, out=d_flat)
            else:
                torch.bmm(outer, flat, out=d_flat)
                torch.baddbmm(d_flat, inner, flat_gradient, out=d_flat)
                d_x.add_(gradient)
        return d_x, d_gamma, None, None


def _channel_residual_buffered(x: Tensor, gamma: Tensor, inverted: bool, impl: str = "buffered") -> Tensor:
    need_eager(impl, x, gamma)
    dtype, x = x.dtype, upcast(x)
    by = best_products(impl, x)
    gamma = gamma.to(x.dtype)
    with full_precision(x):
        if recording(x, gamma):
            recorded: Tensor = _ChannelResidual.apply(x, gamma, inverted, by)
            return recorded.to(dtype)
        flat = x.flatten(2)
        return _add_mixed(gamma * _weights_of(flat, inverted, by), flat, x, by).to(dtype)


def _channel_residual_native(x: Tensor, gamma: Tensor, inverted: bool) -> Tensor:
    out = _channel_residual_buffered(x.contiguous(), gamma, inverted, "native")
    return out.contiguous(memory_format=map_layout(x))


def _channel_residual(x: Tensor, gamma: Tensor, inverted: bool) -> Tensor:
    if eager(x, gamma) and precise(x, gamma):
        return _channel_residual_buffered(x, gamma, inverted, "auto")
    return _channel_residual_plain(x, gamma, inverted)


_CHANNEL = {
    "auto": _channel_residual,
    "reference": _channel_residual_reference,
    "plain": _channel_residual_plain,
    "buffered": _channel_residual_buffered,
    "native": _channel_residual_native,
}
CHANNEL_IMPLEMENTATIONS = native.served(_CHANNEL)


def channel_residual(x: Tensor, gamma: Tensor, *, inverted: bool = True, impl: str = "auto") -> Tensor:
    """DANet's channel attention: `gamma * channel_attention(x) + x`.

    Args:
        x: (B, C, H, W).
        gamma: One number.
        inverted: As for `channel_attention`.
        impl: "auto"; "reference"; "plain", in ordinary operations; "buffered", gamma made part of the small matrix and
            half of the symmetric one computed, not for compilers; "native", the same on a CPU with products in C.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: Unknown `impl`, or one that cannot serve the arguments.

    Example:
        >>> channel_residual(torch.randn(2, 6, 3, 5), torch.ones(1)).shape
        torch.Size([2, 6, 3, 5])
    """
    return choose("channel_residual", impl, _CHANNEL)(x, gamma, inverted)
