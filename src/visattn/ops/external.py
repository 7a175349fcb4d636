"""External attention: two small memories shared by all samples.

Paper: Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks, https://arxiv.org/abs/2105.02358
Authors' code: https://github.com/MenghaoGuo/EANet at 59c03cb0a286d3a29a797f8ea07fb89d7af56b60
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from visattn.ops._shared import choose, full_precision, upcast

__all__ = ["double_normalize", "external_attention", "external_attention_2d"]


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
        impl: "auto" (small matrices multiplied first) or "reference".

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
    function = choose("external_attention_2d", impl, {"auto": _external_2d, "reference": _external_2d_reference})
    return function(x, query_weight, query_bias, key_memory, value_memory, out_weight, eps)
