"""The small network of a selective kernel: from the mean of its branches to their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn.ops._shared import BatchNorm, upcast

__all__ = ["Gate", "Tape", "attend", "attend_backward", "branch_weights", "normed"]


def branch_weights(logits: Tensor) -> Tensor:
    """Softmax over branches of (B, K, C) logits, in float32 for 16-bit ones; keeps the dtype."""
    return upcast(logits).softmax(dim=1).to(logits.dtype)


class Gate(NamedTuple):
    """The small network of a selective kernel, from a descriptor (B, C) to logits (B, K, C).

    Attributes:
        weight: (hidden, C), of the layer that all branches share.
        bias: (hidden,) or None.
        norm: Of its output, or None.
        weights: K times (C, hidden).
        biases: K times (C,) or None.
        relu: Whether a ReLU comes before the last layers.
    """

    weight: Tensor
    bias: Tensor | None
    norm: BatchNorm | None
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    relu: bool = True

    def fits(self, channels: int) -> bool:
        """Whether all tensors have the shapes above, without broadcasting."""
        hidden = len(self.weight)
        matrices = {one.shape for one in self.weights} == {(channels, hidden)} and self.weight.shape[1:] == (channels,)
        vectors = [(self.bias, hidden), *((one, channels) for one in self.biases)]
        return matrices and all(one is None or one.shape == (size,) for one, size in vectors)

    def attention(self, descriptor: Tensor) -> Tensor:
        """(B, K, C), a softmax over K."""
        hidden = F.linear(descriptor, self.weight, self.bias)
        hidden = hidden if self.norm is None else normed(hidden, self.norm)
        hidden = F.relu(hidden) if self.relu else hidden
        pairs = zip(self.weights, self.biases, strict=True)
        return branch_weights(torch.stack([F.linear(hidden, weight, bias) for weight, bias in pairs], dim=1))


def normed(x: Tensor, norm: BatchNorm) -> Tensor:
    """What a batch norm makes of `x`; its running statistics are updated in training."""
    weight, bias, mean, variance, training, momentum, eps = norm
    return F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)


class Tape(NamedTuple):
    """What the gradients of a gate need beside its arguments."""

    before: Tensor  # the hidden vector as its layer leaves it
    saved: Sequence[Tensor]  # of the norm
    hidden: Tensor
    attention: Tensor


def attend(gate: Gate, descriptor: Tensor) -> Tape:
    """`Gate.attention`, for `attend_backward`."""
    hidden = before = F.linear(descriptor, gate.weight, gate.bias)
    saved: Sequence[Tensor] = ()
    if gate.norm is not None:
        weight, bias, mean, variance, training, momentum, eps = gate.norm
        hidden, *saved = torch.native_batch_norm(before, weight, bias, mean, variance, training, momentum, eps)
    hidden = hidden.relu() if gate.relu else hidden
    pairs = zip(gate.weights, gate.biases, strict=True)
    logits = torch.stack([F.linear(hidden, weight, bias) for weight, bias in pairs], dim=1)
    return Tape(before, saved, hidden, logits.softmax(dim=1))


def attend_backward(gate: Gate, descriptor: Tensor, tape: Tape, d_attention: Tensor) -> list[Tensor | None]:
    """Gradients of the descriptor and of all tensors of the gate, in the order that selective_kernel.py has them.

    By hand: autograd would take as long as the kernels for a small map.
    """
    before, saved, hidden, attention = tape
    d_logits = torch._softmax_backward_data(d_attention, attention, 1, attention.dtype)
    d_weights, d_hidden = [], torch.zeros_like(hidden)
    d_biases = [None if one is None else d_logits[:, k].sum(dim=0) for k, one in enumerate(gate.biases)]
    for weight, of_branch in zip(gate.weights, d_logits.unbind(1), strict=True):
        d_weights.append(of_branch.t() @ hidden)
        d_hidden.addmm_(of_branch, weight)
    if gate.relu:
        d_hidden = torch.ops.aten.threshold_backward(d_hidden, hidden, 0)
    vectors: Sequence[Tensor | None] = (None, None)
    if gate.norm is not None:
        norm = gate.norm
        d_hidden, *vectors = torch.ops.aten.native_batch_norm_backward(
            d_hidden, before, norm.weight, None, None, *saved, True, norm.eps, [True, True, True]
        )
    d_bias = None if gate.bias is None else d_hidden.sum(dim=0)
    return [d_hidden @ gate.weight, *d_weights, *d_biases, d_hidden.t() @ descriptor, d_bias, *vectors]
