"""Selective kernel: branches with different receptive fields, weighed per channel.

Paper: Selective Kernel Networks, https://arxiv.org/abs/1903.06586
Published code compared with:
https://github.com/developer0hye/SKNet-PyTorch at f78ea0c8e9394a77e58b33b228a4209186a6ad9e,
https://github.com/xmu-xiaoma666/External-Attention-pytorch at d75848e40233ed56fa503c888472bab8b17c568c
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn import native
from visattn.errors import check
from visattn.native import select as kernels
from visattn.ops._shared import (
    BatchNorm,
    again,
    choose,
    differentiate_again,
    eager,
    full_precision,
    need_eager,
    precise,
    upcast,
)

__all__ = ["NORMED_IMPLEMENTATIONS", "Gate", "branch_descriptor", "branch_select", "branch_weights", "normed_select"]


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


class Gate(NamedTuple):
    """The small network of a selective kernel, from a descriptor (B, C) to logits (B, K, C).

    Attributes:
        weight: (hidden, C), of the layer that all branches share.
        bias: (hidden,) or None.
        norm: Of its output, with a ReLU behind it, or None.
        weights: K times (C, hidden).
        biases: K times (C,).
    """

    weight: Tensor
    bias: Tensor | None
    norm: BatchNorm | None
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]

    def attention(self, descriptor: Tensor) -> Tensor:
        """(B, K, C), a softmax over K."""
        hidden = F.linear(descriptor, self.weight, self.bias)
        if self.norm is not None:
            hidden = F.relu(_normed(hidden, self.norm))
        pairs = zip(self.weights, self.biases, strict=True)
        return branch_weights(torch.stack([F.linear(hidden, weight, bias) for weight, bias in pairs], dim=1))


def _normed(x: Tensor, norm: BatchNorm) -> Tensor:
    weight, bias, mean, variance, training, momentum, eps = norm
    return F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)


def _tensors(maps: Sequence[Tensor], norms: Sequence[BatchNorm], gate: Gate) -> list[Tensor | None]:
    """All that has a gradient, in one row: `_parts` takes it apart."""
    hidden = (None, None) if gate.norm is None else gate.norm[:2]
    vectors = [norm.weight for norm in norms] + [norm.bias for norm in norms]
    return [*maps, *vectors, *gate.weights, *gate.biases, gate.weight, gate.bias, *hidden]


class _Numbers(NamedTuple):
    norms: tuple[BatchNorm, ...]
    hidden: BatchNorm | None


class _Parts(NamedTuple):
    maps: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    gate: Gate


def _parts(tensors: Sequence[Any], numbers: _Numbers, *, update: bool) -> _Parts:
    branches = len(numbers.norms)
    maps, weights, biases, gate_weights, gate_biases = (
        tuple(tensors[i * branches : (i + 1) * branches]) for i in range(5)
    )
    weight, bias, norm_weight, norm_bias = tensors[5 * branches :]
    norm = numbers.hidden
    if norm is not None:
        norm = norm._replace(weight=norm_weight, bias=norm_bias)
        if (
            not update
        ):  # torch's batch norm takes None for statistics that shall stay, though `BatchNorm` always has them
            norm = norm._replace(running_mean=None, running_var=None)  # type: ignore[arg-type]
    return _Parts(maps, weights, biases, Gate(weight, bias, norm, gate_weights, gate_biases))


class _NormedSelect(torch.autograd.Function):
    """From the convolutions' outputs to the weighted sum, by kernels that read each of them four times in all.

    Nothing as large as a map is kept but these outputs; the small network runs again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, numbers: _Numbers, *tensors: Any) -> Tensor:
        parts = _parts(tensors, numbers, update=True)
        eps = [norm.eps for norm in numbers.norms]
        of_norms, descriptor = kernels.normalise(parts.maps, parts.weights, parts.biases, eps)
        # Here, with those of the hidden norm: a checkpoint's second run ends with this function.
        for norm, mean, variance in zip(numbers.norms, of_norms[0], of_norms[1], strict=True):
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(variance.to(norm.running_var.dtype), norm.momentum)
        attention = parts.gate.attention(descriptor)
        out = kernels.combine(parts.maps, attention, numbers=of_norms)
        ctx.save_for_backward(*tensors, of_norms, descriptor, attention)
        ctx.numbers = numbers
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        *tensors, of_norms, descriptor, attention = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if again(gradient):
            return None, *differentiate_again(_normed_plain(ctx.numbers), tensors, needed, gradient)
        parts, gradient = _parts(tensors, ctx.numbers, update=False), gradient.contiguous()
        branches = len(parts.maps)
        d_attention, sums = kernels.gather(parts.maps, of_norms, gradient)
        with torch.enable_grad(), full_precision(gradient):  # through matrices and vectors alone
            leaves = [None if one is None else one.detach().requires_grad_() for one in tensors[3 * branches :]]
            leaf = descriptor.detach().requires_grad_()
            gate = _parts([*tensors[: 3 * branches], *leaves], ctx.numbers, update=False).gate
            wanted = [leaf, *(one for one in leaves if one is not None)]
            d_descriptor, *rest = torch.autograd.grad(gate.attention(leaf), wanted, d_attention)
        found: Iterator[Tensor] = iter(rest)
        d_gate = [None if one is None else next(found) for one in leaves]
        d_maps: Sequence[Tensor | None] = [None] * branches
        d_norms: Sequence[Tensor | None] = [None] * (2 * branches)
        if any(needed[: 3 * branches]):
            given = (gradient, attention, sums, d_descriptor.contiguous())
            d_maps, *vectors = kernels.scatter(parts.maps, of_norms, *given)
            d_norms = [one for rows in vectors for one in rows.unbind()]
        return None, *d_maps, *d_norms, *d_gate


def _normed_plain(numbers: _Numbers) -> Any:
    def plain(*tensors: Any) -> Tensor:
        parts = _parts(tensors, numbers, update=False)
        features = [
            F.relu(F.batch_norm(x, None, None, weight, bias, True, 0.0, eps))
            for x, weight, bias, eps in zip(*parts[:3], [norm.eps for norm in numbers.norms], strict=True)
        ]
        attention = parts.gate.attention(_descriptor(features, ()))[..., None, None]
        return sum((attention[:, k] * feature for k, feature in enumerate(features)), torch.zeros_like(features[0]))

    return plain


def _normed_reference(maps: Sequence[Tensor], norms: Sequence[BatchNorm], gate: Gate) -> Tensor:
    features = torch.stack([F.relu(_normed(x, norm)) for x, norm in zip(maps, norms, strict=True)], dim=1)
    attention = gate.attention(features.sum(dim=1).mean(dim=(2, 3)))
    return (features * attention[..., None, None]).sum(dim=1)


def _served(maps: Sequence[Tensor], norms: Sequence[BatchNorm], gate: Gate) -> bool:
    """Whether the kernels are for these maps: batches of more than one value, with statistics of their own."""
    shape = maps[0].shape
    batched = all(norm.training for norm in norms) and shape.numel() > shape[1]
    hidden = gate.norm is None or (gate.norm.training and shape[0] > 1)
    alike = len(shape) == 4 and all(one.shape == shape for one in maps) and len(maps) <= kernels.MOST_BRANCHES
    return alike and batched and hidden and all(norm.weight.shape == shape[1:2] == norm.bias.shape for norm in norms)


def _normed_native(maps: Sequence[Tensor], norms: Sequence[BatchNorm], gate: Gate) -> Tensor:
    tensors = _tensors(maps, norms, gate)
    need_eager("native", *tensors)
    native.need(*tensors)
    check(
        _served(maps, norms, gate),
        "impl='native'",
        f"the kernels are for at most {kernels.MOST_BRANCHES} maps of one shape, with norms in training",
        remedy="Leave impl at 'auto'.",
        maps=[tuple(one.shape) for one in maps],
    )
    tensors[: len(maps)] = [one.contiguous() for one in maps]
    numbers = _Numbers(tuple(norms), gate.norm)
    out: Tensor = _NormedSelect.apply(numbers, *tensors)
    return out


def _normed_auto(maps: Sequence[Tensor], norms: Sequence[BatchNorm], gate: Gate) -> Tensor:
    tensors = [tensor for tensor in _tensors(maps, norms, gate) if tensor is not None]
    known = native.available() and maps[0].device.type == "cpu" and maps[0].dtype == torch.float32
    if known and eager(*tensors) and precise(*tensors) and _served(maps, norms, gate):
        return _normed_native(maps, norms, gate)
    return _normed_reference(maps, norms, gate)


_NORMED = {"auto": _normed_auto, "reference": _normed_reference, "native": _normed_native}
NORMED_IMPLEMENTATIONS = native.served(_NORMED)


def normed_select(maps: Sequence[Tensor], norms: Sequence[BatchNorm], gate: Gate, *, impl: str = "auto") -> Tensor:
    """`sum_k a_k F_k` with `F_k = relu(norm_k(map_k))` and `a = gate(mean over positions of sum_k F_k)`.

    Args:
        maps: K maps (B, C, H, W), as convolutions leave them.
        norms: K batch norms; in training their running statistics are updated.
        gate: What makes the weights.
        impl: "auto"; "reference"; "native", kernels in C that read the maps as seldom as can be, in training alone.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: Unknown `impl`, or one that cannot serve the arguments.

    Example:
        >>> ones, zeros, w = torch.ones(6), torch.zeros(6), torch.randn(6, 6)
        >>> norms = [BatchNorm(ones, zeros, zeros.clone(), ones.clone(), training=True) for _ in range(2)]
        >>> gate = Gate(w, None, None, [w, w], [zeros, zeros])
        >>> normed_select([torch.randn(2, 6, 3, 5), torch.randn(2, 6, 3, 5)], norms, gate).shape
        torch.Size([2, 6, 3, 5])
    """
    return choose("normed_select", impl, _NORMED)(maps, norms, gate)
