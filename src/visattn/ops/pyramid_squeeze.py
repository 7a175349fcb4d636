"""Pyramid squeeze attention: branches at several scales, weighed per channel and concatenated.

Paper: EPSANet: An Efficient Pyramid Squeeze Attention Block on CNN, https://arxiv.org/abs/2105.14447
Authors' code: https://github.com/murufeng/EPSANet at 9955041a1db4591fae080d2e6edb25e2a2914d47
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn import native
from visattn.errors import check
from visattn.native import pyramid as kernels
from visattn.native.convolution import Geometry, convolve
from visattn.ops._shared import (
    again,
    choose,
    differentiate_again,
    eager,
    full_precision,
    need_eager,
    precise,
    recording,
    upcast,
)
from visattn.ops.convolution import Convolution, best_form, gradients

__all__ = [
    "Squeeze",
    "attend",
    "attention_forms",
    "pyramid_attention",
    "pyramid_squeeze",
    "pyramid_weights",
]


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


class Squeeze(NamedTuple):
    """What makes the gates of a scale from the means of its maps: two layers with a ReLU between, then a sigmoid.

    Attributes:
        weight: (hidden, C).
        bias: (hidden,) or None.
        out_weight: (C, hidden).
        out_bias: (C,) or None.
        sigmoid: Whether there is one.
    """

    weight: Tensor
    bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    sigmoid: bool = True


class _Tape(NamedTuple):
    """What the gradients of the weights need beside means and layers."""

    hidden: Tensor
    gates: Tensor
    weights: Tensor


def _excite(means: Tensor, squeeze: Squeeze) -> _Tape:
    hidden = F.linear(means, squeeze.weight, squeeze.bias).relu()
    gates = F.linear(hidden, squeeze.out_weight, squeeze.out_bias)
    gates = gates.sigmoid() if squeeze.sigmoid else gates
    return _Tape(hidden, gates, gates.softmax(dim=1))


def _excite_backward(means: Tensor, squeeze: Squeeze, tape: _Tape, d_weights: Tensor) -> list[Tensor | None]:
    """Gradients of the means and of the tensors of `Squeeze`, by hand: autograd takes longer than the arithmetic."""
    hidden, gates, weights = tape
    d_gates = torch._softmax_backward_data(d_weights, weights, 1, weights.dtype)
    d_gates = torch.ops.aten.sigmoid_backward(d_gates, gates) if squeeze.sigmoid else d_gates
    d_hidden = torch.ops.aten.threshold_backward(d_gates @ squeeze.out_weight, hidden, 0)
    d_gates, hidden, rows = d_gates.flatten(0, 1), hidden.flatten(0, 1), d_hidden.flatten(0, 1)
    d_bias = None if squeeze.bias is None else rows.sum(dim=0)
    d_out_bias = None if squeeze.out_bias is None else d_gates.sum(dim=0)
    return [d_hidden @ squeeze.weight, rows.t() @ means.flatten(0, 1), d_bias, d_gates.t() @ hidden, d_out_bias]


class _Numbers(NamedTuple):
    geometries: tuple[Geometry, ...]
    forms: tuple[str, ...]  # "native" or "reference"
    sigmoid: bool

    def convolutions(self, tensors: Sequence[Any]) -> list[Convolution]:
        return [Convolution(tensors[k], None, *geometry) for k, geometry in enumerate(self.geometries)]

    def squeeze(self, tensors: Sequence[Any]) -> Squeeze:
        weight, bias, out_weight, out_bias = tensors[-4:]
        return Squeeze(weight, bias, out_weight, out_bias, self.sigmoid)

    def maps(self, x: Tensor, tensors: Sequence[Any]) -> tuple[Tensor, ...]:
        """Of all scales."""
        return tuple(
            convolve(x, tensors[k], None, geometry)
            if form == "native"
            else F.conv2d(x, tensors[k], None, *geometry).contiguous()
            for k, (geometry, form) in enumerate(zip(self.geometries, self.forms, strict=True))
        )


class _Attention(torch.autograd.Function):
    """A whole pyramid squeeze attention: its maps are read twice in either direction."""

    @staticmethod
    def forward(ctx: Any, numbers: _Numbers, x: Tensor, *tensors: Any) -> Tensor:
        maps = numbers.maps(x, tensors)
        means = kernels.means(maps)
        tape = _excite(means, numbers.squeeze(tensors))
        ctx.save_for_backward(x, *tensors, means, *tape, *maps)
        ctx.numbers = numbers
        return kernels.weigh(maps, tape.weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        numbers: _Numbers = ctx.numbers
        scales = len(numbers.forms)
        x, *saved = ctx.saved_tensors
        tensors, (means, *tape), maps = saved[: scales + 4], saved[scales + 4 : scales + 8], tuple(saved[scales + 8 :])
        needed = ctx.needs_input_grad[1:]
        if again(gradient):
            return None, *differentiate_again(_attention_plain(numbers), [x, *tensors], needed, gradient)
        gradient, of = gradient.contiguous(), _Tape(*tape)
        d_x: Tensor | None = None
        d_weights: list[Tensor | None] = [None] * scales
        with full_precision(gradient):
            found = _excite_backward(means, numbers.squeeze(tensors), of, kernels.gather(maps, gradient))
            d_means, *d_squeeze = found
            for k, (conv, form) in enumerate(zip(numbers.convolutions(tensors), numbers.forms, strict=True)):
                if not (needed[0] or needed[1 + k]):
                    continue
                d_map = kernels.scatter(maps, k, gradient, of.weights, cast(Tensor, d_means))
                part, d_weights[k] = gradients(d_map, x, conv, form, (needed[0], needed[1 + k]))
                d_x = part if d_x is None or part is None else d_x.add_(part)
        return None, d_x, *d_weights, *d_squeeze


def _attention_plain(numbers: _Numbers) -> Any:
    def plain(x: Tensor, *tensors: Any) -> Tensor:
        return _attention_reference(x, numbers.convolutions(tensors), numbers.squeeze(tensors))

    return plain


def _attention_reference(x: Tensor, convs: Sequence[Convolution], squeeze: Squeeze) -> Tensor:
    maps = [F.conv2d(x, *conv) for conv in convs]
    means = torch.stack([one.mean(dim=(2, 3)) for one in maps], dim=1)
    return _reference(maps, _excite(means, squeeze).gates)


def attention_forms(
    x: Tensor, convs: Sequence[Convolution], squeeze: Squeeze, *, impl: str = "auto"
) -> tuple[str, ...]:
    """The forms of the convolutions where `pyramid_attention` takes the kernels, "native" or "reference"; else none."""
    tensors = [one for one in (x, *(conv.weight for conv in convs), *squeeze[:4]) if one is not None]
    usual = impl == "native" or (impl == "auto" and x.dtype == torch.float32)
    if not (usual and eager(*tensors) and x.device.type == "cpu" and precise(*tensors) and native.available()):
        return ()
    shapes, forms = set(), []
    for conv in convs:
        weight, geometry = conv.weight, conv.geometry
        if conv.bias is not None or not geometry.fits(x, weight, None):
            return ()
        shapes.add(geometry.sizes(x.shape, weight)[1])
        groups, faster = conv.groups, geometry.beats_torch(x.shape, weight)
        sizes = {"size": weight.shape[2], "outputs": len(weight) // groups, "width": weight.shape[1], "groups": groups}
        forms.append("native" if impl == "native" else best_form("cpu", native=True, beats_torch=faster, **sizes))
    return tuple(forms) if len(shapes) == 1 else ()


def attend(x: Tensor, convs: Sequence[Convolution], squeeze: Squeeze, forms: tuple[str, ...]) -> Tensor:
    """`pyramid_attention` by the kernels, in the forms that `attention_forms` told."""
    x, weights = x.contiguous(), [conv.weight for conv in convs]
    numbers = _Numbers(tuple(conv.geometry for conv in convs), forms, squeeze.sigmoid)
    if recording(x, *weights, *squeeze[:4]):
        out: Tensor = _Attention.apply(numbers, x, *weights, *squeeze[:4])
        return out
    maps = numbers.maps(x, weights)
    return kernels.weigh(maps, _excite(kernels.means(maps), squeeze).weights)


def _attention_auto(x: Tensor, convs: Sequence[Convolution], squeeze: Squeeze) -> Tensor:
    forms = attention_forms(x, convs, squeeze)
    return attend(x, convs, squeeze, forms) if forms else _attention_reference(x, convs, squeeze)


def _attention_native(x: Tensor, convs: Sequence[Convolution], squeeze: Squeeze) -> Tensor:
    tensors = [x, *(conv.weight for conv in convs), *squeeze[:4]]
    need_eager("native", *tensors)
    native.need(*tensors)
    forms = attention_forms(x, convs, squeeze, impl="native")
    check(
        forms != (),
        "impl='native'",
        "the kernels are for scales of one shape, without biases and autocast",
        remedy="Leave impl at 'auto'.",
        x=tuple(x.shape),
        weights=[tuple(conv.weight.shape) for conv in convs],
    )
    return attend(x, convs, squeeze, forms)


_ATTENTION = {"auto": _attention_auto, "reference": _attention_reference, "native": _attention_native}


def pyramid_attention(x: Tensor, convs: Sequence[Convolution], squeeze: Squeeze, *, impl: str = "auto") -> Tensor:
    """`pyramid_squeeze` of what convolutions make of `x`, by gates of the means of each scale's maps.

    Args:
        x: (B, C, H, W).
        convs: K convolutions with as many output channels C'.
        squeeze: What makes the gates, the same for all scales.
        impl: "auto"; "reference"; "native", kernels in C for the convolutions and all that follows.

    Returns:
        (B, K * C', H', W'), channels of the last scale first.

    Raises:
        ValueError: Unknown `impl`, or one that cannot serve the arguments.

    Example:
        >>> convs = [Convolution(torch.randn(6, 2, k, k), padding=k // 2, groups=3) for k in (3, 5)]
        >>> squeeze = Squeeze(torch.randn(2, 6), None, torch.randn(6, 2), None)
        >>> pyramid_attention(torch.randn(2, 6, 3, 5), convs, squeeze).shape
        torch.Size([2, 12, 3, 5])
    """
    return choose("pyramid_attention", impl, _ATTENTION)(x, convs, squeeze)
