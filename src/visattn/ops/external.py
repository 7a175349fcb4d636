"""External attention: two small memories shared by all samples.

Paper: Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks, https://arxiv.org/abs/2105.02358
Authors' code: https://github.com/MenghaoGuo/EANet at 59c03cb0a286d3a29a797f8ea07fb89d7af56b60
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn import native
from visattn.errors import check
from visattn.ops._products import Products, best_products
from visattn.ops._shared import (
    BatchNorm,
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

__all__ = [
    "IMPLEMENTATIONS",
    "BatchNorm",
    "double_normalize",
    "external_attention",
    "external_attention_2d",
    "external_residual_2d",
    "external_residual_eval",
]


def _double_normalize_reference(logits: Tensor, eps: float) -> Tensor:
    attention = upcast(logits).softmax(dim=-1)  # (..., S, N): each slot is a distribution over positions
    attention = attention / (eps + attention.sum(dim=-2, keepdim=True))  # then each position one over slots
    return attention.to(logits.dtype)


def _double_normalize(logits: Tensor, eps: float) -> Tensor:
    if eps > 0:
        return _double_normalize_reference(logits, eps)
    # Without eps the two steps are one softmax over slots, which has no 0 / 0 where all slots underflow.
    wide = upcast(logits)
    return wide.log_softmax(dim=-1).softmax(dim=-2).to(logits.dtype)


def double_normalize(logits: Tensor, *, eps: float = 1e-9, impl: str = "auto") -> Tensor:
    """Softmax over positions, then each position divided by its sum over slots.

    `A = softmax_N(L); A / (eps + sum_S A)`. Runs in float32 for 16-bit logits, where `eps` would be zero.

    Args:
        logits: (..., S, N), S slots and N positions.
        eps: Added to the sum over slots. 0 selects the exact form `softmax_S(L - logsumexp_N L)`.
        impl: "auto" or "reference".

    Returns:
        (..., S, N) in the dtype of `logits`.

    Raises:
        ValueError: Unknown `impl`.

    Example:
        >>> double_normalize(torch.randn(2, 5, 7), eps=0.0).sum(dim=1).shape
        torch.Size([2, 7])
    """
    functions = {"auto": _double_normalize, "reference": _double_normalize_reference}
    return choose("double_normalize", impl, functions)(logits, eps)


def external_attention(
    x: Tensor,
    key_memory: Tensor,
    value_memory: Tensor,
    *,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    eps: float = 1e-9,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """External attention on tokens: `Mv double_normalize(Mk x)`.

    Args:
        x: (..., N, C) tokens.
        key_memory: (S, C).
        value_memory: (D, S).
        key_bias: (S,) added to the logits.
        value_bias: (D,) added to the output.
        eps: See `double_normalize`.
        dropout_p: Share of attention entries dropped.
        impl: "auto" or "reference".

    Returns:
        (..., N, D) in the dtype of the linear layers (autocast applies to them; the normalisation is in float32).

    Raises:
        ValueError: Unknown `impl`.

    Example:
        >>> external_attention(torch.randn(2, 11, 6), torch.randn(4, 6), torch.randn(6, 4)).shape
        torch.Size([2, 11, 6])
    """
    logits = F.linear(x, key_memory, key_bias).transpose(-1, -2)  # (..., S, N)
    attention = double_normalize(logits, eps=eps, impl=impl).transpose(-1, -2)
    if dropout_p > 0:
        attention = F.dropout(attention, dropout_p)
    return F.linear(attention, value_memory, value_bias)


def _external_2d_reference(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_memory: Tensor,
    value_memory: Tensor,
    out_weight: Tensor,
    eps: float,
) -> Tensor:
    batch, channels, height, width = x.shape
    query = F.conv2d(x, query_weight, query_bias).flatten(2)  # (B, C, N)
    attention = _double_normalize_reference(key_memory @ query, eps)  # (B, S, N)
    values = (value_memory @ attention).view(batch, channels, height, width)
    return F.conv2d(values, out_weight)


def _external_2d(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_memory: Tensor,
    value_memory: Tensor,
    out_weight: Tensor,
    eps: float,
) -> Tensor:
    # Multiplying the small matrices first leaves two C x S products on the map in place of two C x C and two C x S.
    with full_precision(x):
        into_slots = key_memory @ query_weight.flatten(1)  # (S, C)
        # Constant over positions, so the softmax removes it again; it is there for its gradient, zero up to rounding.
        slot_bias = None if query_bias is None else key_memory @ query_bias  # (S,)
        out_of_slots = out_weight.flatten(1) @ value_memory  # (C, S)
    logits = F.conv2d(x, into_slots[:, :, None, None], slot_bias)  # (B, S, H, W)
    attention = _double_normalize(logits.flatten(2), eps).view(logits.shape)
    return F.conv2d(attention, out_of_slots[:, :, None, None])


_EXTERNAL_2D = {"auto": _external_2d, "reference": _external_2d_reference, "plain": _external_2d}


def external_attention_2d(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_memory: Tensor,
    value_memory: Tensor,
    out_weight: Tensor,
    *,
    eps: float = 1e-9,
    impl: str = "auto",
) -> Tensor:
    """The map of EANet's block before its batch norm: `W2 Mv double_normalize(Mk (W1 x + b1))`.

    Args:
        x: (B, C, H, W).
        query_weight: (C, C, 1, 1), `W1`.
        query_bias: (C,) or None, `b1`; the softmax over positions removes it, so its gradient is zero up to rounding.
        key_memory: (S, C), `Mk`.
        value_memory: (C, S), `Mv`.
        out_weight: (C, C, 1, 1), `W2`.
        eps: See `double_normalize`.
        impl: "auto" and "plain" (small matrices multiplied first) or "reference".

    Returns:
        (B, C, H, W). Products of the small matrices and the normalisation stay in float32 under autocast.

    Raises:
        ValueError: Unknown `impl`.

    Example:
        >>> w = torch.randn(6, 6, 1, 1)
        >>> x = torch.randn(2, 6, 3, 5)
        >>> external_attention_2d(x, w, torch.zeros(6), torch.randn(4, 6), torch.randn(6, 4), w).shape
        torch.Size([2, 6, 3, 5])
    """
    function = choose("external_attention_2d", impl, _EXTERNAL_2D)
    return function(x, query_weight, query_bias, key_memory, value_memory, out_weight, eps)


def _residual_reference(
    x: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
    norm: BatchNorm,
    eps: float,
    attend: Callable[..., Tensor] = _external_2d_reference,
) -> Tensor:
    mapped = attend(x, *weights, eps)
    normed = F.batch_norm(
        mapped, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
    )
    return F.relu(x + normed)


def _into_slots(query_weight: Tensor, query_bias: Tensor | None, key_memory: Tensor) -> Tensor:
    """`Mk W1`, with a zero that `b1` gets its gradient from: the softmax over positions removes the bias."""
    into_slots = key_memory @ query_weight.flatten(1)
    if query_bias is not None and recording(query_bias):
        into_slots = into_slots + 0.0 * (key_memory @ query_bias)[:, None]
    return into_slots


def _attend(x: Tensor, into_slots: Tensor, eps: float, by: Products) -> tuple[Tensor, Tensor]:
    """The attention (B, S, N) and, for its gradient, what each position was divided by (B, 1, N)."""
    logits = by.product(into_slots, x)
    attention = torch.softmax(logits, -1, out=logits)
    total = attention.sum(dim=-2, keepdim=True).add_(eps)
    return attention.div_(total), total


def external_residual_eval(
    x: Tensor, into_slots: Tensor, out_of_slots: Tensor, shift: Tensor, eps: float, by: Products | None = None
) -> Tensor:
    """`relu(x + shift + V A)`, the map written once."""
    by = best_products("auto", x) if by is None else by
    out, flat_out = empty_map(x)
    attention, _ = _attend(x.flatten(2), into_slots, eps, by)
    by.product(out_of_slots, attention, addend=x.flatten(2), bias=shift, relu=True, out=flat_out)
    return out


class _ResidualTrain(torch.autograd.Function):
    """EANet's block in training: two products on the map forward, four backward, the map written once.

    The batch norm needs of its input `V A` no more than mean and variance, which follow from mean and covariance of
    the S rows of A. A is centred before the covariance is taken: near-uniform attention varies by far less than its
    mean, and a difference of second moments would lose that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        into_slots: Tensor,
        out_of_slots: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        norm_eps: float,
        by: Products,
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.flatten(2)
        attention, total = _attend(flat, into_slots, eps, by)
        mean = attention.mean(dim=(0, 2))
        centred = attention - mean[:, None]
        count = flat.shape[0] * flat.shape[2]
        covariance = by.product_sum(centred, centred.transpose(1, 2)).div_(count)
        # The variance of each channel is `v Cov(A) v^T` for its row v of `W2 Mv`; rounding may leave it below zero.
        spread = out_of_slots @ covariance
        variance = (spread * out_of_slots).sum(dim=1).clamp_min_(0)
        inverse = (variance + norm_eps).rsqrt_()
        values = out_of_slots * (weight * inverse)[:, None]
        out, flat_out = empty_map(x)
        by.product(values, centred, addend=flat, bias=bias, relu=True, out=flat_out)
        ctx.save_for_backward(
            x, into_slots, out_of_slots, weight, bias, out, attention, total, centred, spread, inverse, variance, values
        )
        ctx.eps, ctx.norm_eps, ctx.by = eps, norm_eps, by
        means = out_of_slots @ mean
        ctx.mark_non_differentiable(means, variance)
        return out, means, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        x, into_slots, out_of_slots, weight, bias, out, attention, total, centred, spread, inverse, variance, values = (
            ctx.saved_tensors
        )
        if again(gradient):
            plain = differentiate_again(
                partial(_train_plain, ctx.eps, ctx.norm_eps),
                (x, into_slots, out_of_slots, weight, bias),
                ctx.needs_input_grad[:5],
                gradient,
            )
            return (*plain, None, None, None)
        by: Products = ctx.by
        with full_precision(x):
            flat = x.flatten(2)
            count = flat.shape[0] * flat.shape[2]
            d_x, d_flat = empty_map(x)
            torch.ops.aten.threshold_backward.grad_input(gradient, out, 0, grad_input=d_x)
            d_bias = d_flat.sum(dim=(0, 2))
            d_values = by.product_sum(d_flat, centred.transpose(1, 2))
            d_weight = (d_values * out_of_slots).sum(dim=1).mul_(inverse)
            # Twice the gradient of the variance, as the covariance is symmetric; of one cut off at zero there is none.
            twice = (d_weight * weight * inverse * inverse).neg_().masked_fill_(variance == 0, 0)[:, None]
            d_out_of_slots = (d_values * (weight * inverse)[:, None]).addcmul_(spread, twice)
            d_covariance = out_of_slots.t() @ (twice * out_of_slots)
            d_attention = by.product(values.t(), d_flat)
            by.product(d_covariance.div_(count), centred, addend=d_attention, out=d_attention)
            d_attention.sub_(d_attention.mean(dim=(0, 2))[:, None])
            # A = P / total with P the softmax over positions and total = eps + sum_S P
            d_attention.sub_((d_attention * attention).sum(dim=1, keepdim=True)).div_(total)
            softmax = attention * total
            d_logits = torch.ops.aten._softmax_backward_data.out(
                d_attention, softmax, -1, softmax.dtype, grad_input=d_attention
            )
            d_into_slots = by.product_sum(flat, d_logits.transpose(1, 2)).t()
            by.product(into_slots.t(), d_logits, addend=d_flat, out=d_flat)
        return d_x, d_into_slots, d_out_of_slots, d_weight, d_bias, None, None, None


def _train_plain(
    eps: float, norm_eps: float, x: Tensor, into_slots: Tensor, out_of_slots: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    logits = torch.matmul(into_slots, x.flatten(2))
    mapped = torch.matmul(out_of_slots, _double_normalize_reference(logits, eps)).view(x.shape)
    return F.relu(x + F.batch_norm(mapped, None, None, weight, bias, True, 0.0, norm_eps))


def _residual_plain(
    x: Tensor, weights: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor], norm: BatchNorm, eps: float
) -> Tensor:
    return _residual_reference(x, weights, norm, eps, _external_2d)


def _residual_buffered(
    x: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
    norm: BatchNorm,
    eps: float,
    impl: str = "buffered",
) -> Tensor:
    need_eager(impl, x, *weights, *norm[:4])
    sizes = [tuple(tensor.shape) for tensor in norm[:4]]
    check(set(sizes) == {(x.shape[1],)}, f"impl={impl!r}", "the norm needs one number for each channel", norm=sizes)
    check(eps > 0, f"impl={impl!r}", "without eps a slot may have no weight at all", eps=eps)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if norm.training and count == 1:
        return _residual_plain(x, weights, norm, eps)  # torch's batch norm raises
    dtype = x.dtype
    with full_precision(x):
        x = upcast(x)
        by = best_products(impl, x)
        query_weight, key_memory, value_memory, out_weight, weight, bias = (
            tensor.to(x.dtype) for tensor in (weights[0], *weights[2:], norm.weight, norm.bias)
        )
        query_bias = None if weights[1] is None else weights[1].to(x.dtype)
        into_slots = _into_slots(query_weight, query_bias, key_memory)
        if norm.training:
            out_of_slots = out_weight.flatten(1) @ value_memory
            out, mean, variance = _ResidualTrain.apply(x, into_slots, out_of_slots, weight, bias, eps, norm.eps, by)
            with torch.no_grad():
                norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
                norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)
            return cast(Tensor, out).to(dtype)
        scale = weight * (norm.running_var.to(x.dtype) + norm.eps).rsqrt()
        out_of_slots = (out_weight.flatten(1) * scale[:, None]) @ value_memory
        shift = bias - norm.running_mean.to(x.dtype) * scale
        if not recording(x, into_slots, out_of_slots, shift):
            return external_residual_eval(x, into_slots, out_of_slots, shift, eps, by).to(dtype)
        attention = _double_normalize(torch.matmul(into_slots, x.flatten(2)), eps)
        return F.relu(x + shift[:, None, None] + torch.matmul(out_of_slots, attention).view(x.shape)).to(dtype)


def _residual_native(
    x: Tensor, weights: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor], norm: BatchNorm, eps: float
) -> Tensor:
    out = _residual_buffered(x.contiguous(), weights, norm, eps, "native")
    return out.contiguous(memory_format=map_layout(x))


def _residual(
    x: Tensor, weights: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor], norm: BatchNorm, eps: float
) -> Tensor:
    given = [tensor for tensor in (x, *weights, *norm[:4]) if tensor is not None]
    if eps > 0 and eager(*given) and precise(*given):
        return _residual_buffered(x, weights, norm, eps, "auto")
    return _residual_plain(x, weights, norm, eps)


_RESIDUAL = {
    "auto": _residual,
    "reference": _residual_reference,
    "plain": _residual_plain,
    "buffered": _residual_buffered,
    "native": _residual_native,
}
IMPLEMENTATIONS = native.served(_RESIDUAL)


def external_residual_2d(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_memory: Tensor,
    value_memory: Tensor,
    out_weight: Tensor,
    norm: BatchNorm,
    *,
    eps: float = 1e-9,
    impl: str = "auto",
) -> Tensor:
    """EANet's block: `relu(x + BN(W2 Mv double_normalize(Mk (W1 x + b1))))`.

    Args:
        x: (B, C, H, W).
        query_weight: (C, C, 1, 1), `W1`.
        query_bias: (C,) or None, `b1`; its gradient is zero, as the softmax over positions removes it.
        key_memory: (S, C), `Mk`.
        value_memory: (C, S), `Mv`.
        out_weight: (C, C, 1, 1), `W2`.
        norm: The batch norm's tensors and numbers; its running statistics are updated in training.
        eps: See `double_normalize`.
        impl: "auto"; "reference"; "plain", the small matrices multiplied first; "buffered", the batch norm made part of
            them too and the map written once, not for compilers; "native", the same on a CPU with products in C.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: Unknown `impl`, or one that cannot serve the arguments.

    Example:
        >>> w, ones, zeros = torch.randn(6, 6, 1, 1), torch.ones(6), torch.zeros(6)
        >>> norm = BatchNorm(ones, zeros, zeros, ones, training=False)
        >>> external_residual_2d(torch.randn(2, 6, 3, 5), w, zeros, w[:4, :, 0, 0], w[:, :4, 0, 0], w, norm).shape
        torch.Size([2, 6, 3, 5])
    """
    function = choose("external_residual_2d", impl, _RESIDUAL)
    return function(x, (query_weight, query_bias, key_memory, value_memory, out_weight), norm, eps)
