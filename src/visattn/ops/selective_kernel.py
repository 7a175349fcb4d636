"""Selective kernel: branches with different receptive fields, weighed per channel.

Paper: Selective Kernel Networks, https://arxiv.org/abs/1903.06586
Published code compared with:
https://github.com/developer0hye/SKNet-PyTorch at f78ea0c8e9394a77e58b33b228a4209186a6ad9e,
https://github.com/xmu-xiaoma666/External-Attention-pytorch at d75848e40233ed56fa503c888472bab8b17c568c
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from visattn import native
from visattn.errors import check
from visattn.native import select as kernels
from visattn.native.convolution import Geometry
from visattn.ops._gate import Gate, Tape, attend, attend_backward, branch_weights, normed
from visattn.ops._shared import (
    BatchNorm,
    again,
    choose,
    differentiate_again,
    eager,
    full_precision,
    need_eager,
    precise,
    recording,
)
from visattn.ops.convolution import Convolution

__all__ = [
    "NORMED_IMPLEMENTATIONS",
    "Gate",
    "branch_descriptor",
    "branch_select",
    "branch_weights",
    "normed_select",
    "normed_served",
    "selective_kernel",
    "whole",
    "whole_way",
]


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


def _tensors(sources: Sequence[Tensor], norms: Sequence[BatchNorm], gate: Gate) -> list[Tensor | None]:
    """All that has a gradient, in one row: `_parts` takes it apart."""
    hidden = (None, None) if gate.norm is None else gate.norm[:2]
    vectors = [norm.weight for norm in norms] + [norm.bias for norm in norms]
    return [*sources, *vectors, *gate.weights, *gate.biases, gate.weight, gate.bias, *hidden]


class _Settings(NamedTuple):
    norms: tuple[BatchNorm, ...]
    hidden: BatchNorm | None
    relu: bool  # of the small network
    geometries: tuple[Geometry, ...] | None  # of convolutions of one map, or None for maps


class _Parts(NamedTuple):
    sources: tuple[Tensor, ...]  # maps, or weights of convolutions
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    gate: Gate


def _parts(tensors: Sequence[Any], settings: _Settings) -> _Parts:
    branches = len(settings.norms)
    sources, weights, biases, gate_weights, gate_biases = (
        tuple(tensors[i * branches : (i + 1) * branches]) for i in range(5)
    )
    weight, bias, norm_weight, norm_bias = tensors[5 * branches :]
    norm = settings.hidden
    if norm is not None:
        norm = norm._replace(weight=norm_weight, bias=norm_bias)
    return _Parts(sources, weights, biases, Gate(weight, bias, norm, gate_weights, gate_biases, settings.relu))


class _NormedSelect(torch.autograd.Function):
    """From a map, or the outputs of its convolutions, to the weighted sum, by kernels that read these outputs seldom.

    Nothing as large as a map is kept but these outputs, and of the gradients none but the input's is written.
    """

    @staticmethod
    def forward(ctx: Any, settings: _Settings, x: Tensor | None, *tensors: Any) -> Tensor:
        parts = _parts(tensors, settings)
        maps = parts.sources
        if x is not None and settings.geometries is not None:
            maps = kernels.convolve(x, kernels.Convolutions(parts.sources, settings.geometries))
        eps = [norm.eps for norm in settings.norms]
        of_norms, descriptor = kernels.normalise(maps, parts.weights, parts.biases, eps)
        # Here, with those of the hidden norm: a checkpoint's second run ends with this function.
        for norm, mean, variance in zip(settings.norms, of_norms[0], of_norms[1], strict=True):
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(variance.to(norm.running_var.dtype), norm.momentum)
        tape = attend(parts.gate, descriptor)
        out = kernels.combine(maps, tape.attention, of_norms)
        small = (of_norms, descriptor, tape.before, tape.hidden, tape.attention, *tape.saved)
        ctx.save_for_backward(x, *tensors, *small, *(() if x is None else maps))
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        settings: _Settings = ctx.settings
        branches = len(settings.norms)
        x, *saved = ctx.saved_tensors
        tensors, saved = saved[: 5 * branches + 4], saved[5 * branches + 4 :]
        needed = ctx.needs_input_grad[1:]
        if again(gradient):
            return None, *differentiate_again(_normed_plain(settings), [x, *tensors], needed, gradient)
        parts, gradient = _parts(tensors, settings), gradient.contiguous()
        maps = parts.sources
        if x is not None:
            saved, maps = saved[:-branches], tuple(saved[-branches:])
        of_norms, descriptor, before, hidden, attention, *of_hidden = saved
        d_attention, sums = kernels.gather(maps, of_norms, gradient)
        with full_precision(gradient):
            tape = Tape(before, of_hidden, hidden, attention)
            d_descriptor, *d_gate = attend_backward(parts.gate, descriptor, tape, d_attention)
        d_x: Tensor | None = None
        d_sources: Sequence[Tensor | None] = [None] * branches
        d_norms: Sequence[Tensor | None] = [None] * (2 * branches)
        if any(needed[: 3 * branches + 1]):
            positions = gradient[0, 0].numel()
            *vectors, by = kernels.factors(of_norms, attention, sums, cast(Tensor, d_descriptor), positions)
            d_norms = [one for rows in vectors for one in rows.unbind()]
            if x is None:
                d_sources = kernels.scatter(maps, gradient, by) if any(needed[1 : branches + 1]) else d_sources
            else:
                convs = kernels.Convolutions(parts.sources, cast(Any, settings.geometries))
                d_x = kernels.input_gradient(x.shape, convs, maps, gradient, by) if needed[0] else None
                if any(needed[1 : branches + 1]):
                    d_sources = kernels.weight_gradients(x, convs, maps, gradient, by)
        return None, d_x, *d_sources, *d_norms, *d_gate


def _normed_plain(settings: _Settings) -> Any:
    def plain(x: Tensor | None, *tensors: Any) -> Tensor:
        parts = _parts(tensors, settings)
        maps: Sequence[Tensor] = parts.sources
        if x is not None and settings.geometries is not None:
            pairs = zip(parts.sources, settings.geometries, strict=True)
            maps = [F.conv2d(x, weight, None, *geometry) for weight, geometry in pairs]
        features = [
            F.relu(F.batch_norm(one, None, None, weight, bias, True, 0.0, norm.eps))
            for one, weight, bias, norm in zip(maps, parts.weights, parts.biases, settings.norms, strict=True)
        ]
        gate = parts.gate
        if (norm := gate.norm) is not None:  # its statistics were updated by the forward pass already
            mean, variance = norm.running_mean.clone(), norm.running_var.clone()
            gate = gate._replace(norm=norm._replace(running_mean=mean, running_var=variance))
        attention = gate.attention(_descriptor(features, ()))[..., None, None]
        return sum((attention[:, k] * feature for k, feature in enumerate(features)), torch.zeros_like(features[0]))

    return plain


def _normed_reference(maps: Sequence[Tensor], norms: Sequence[BatchNorm | None], gate: Gate) -> Tensor:
    pairs = zip(maps, norms, strict=True)
    features = torch.stack([F.relu(x if norm is None else normed(x, norm)) for x, norm in pairs], dim=1)
    attention = gate.attention(features.sum(dim=1).mean(dim=(2, 3)))
    return (features * attention[..., None, None]).sum(dim=1)


def _trained(shape: torch.Size, norms: Sequence[BatchNorm], gate: Gate) -> bool:
    """Whether the kernels are for maps of that shape: batches of more than one value, with statistics of their own."""
    batched = len(shape) == 4 and all(norm.training for norm in norms) and shape.numel() > shape[1]
    hidden = gate.norm is None or (gate.norm.training and shape[0] > 1)
    few = len(norms) <= kernels.MOST_BRANCHES and gate.fits(shape[1])
    return few and batched and hidden and all(norm.weight.shape == shape[1:2] == norm.bias.shape for norm in norms)


def _for_kernels(impl: str, *tensors: Tensor | None) -> bool:
    """Whether an implementation may take the kernels for these tensors."""
    given = [tensor for tensor in tensors if tensor is not None]
    known = eager(*given) and given[0].device.type == "cpu" and precise(*given) and native.available()
    return known and (impl == "native" or (impl == "auto" and given[0].dtype == torch.float32))


def _normed_native(maps: Sequence[Tensor], norms: Sequence[BatchNorm], gate: Gate) -> Tensor:
    tensors = _tensors(maps, norms, gate)
    need_eager("native", *tensors)
    native.need(*tensors)
    check(
        len({one.shape for one in maps}) == 1 and _trained(maps[0].shape, norms, gate),
        "impl='native'",
        f"the kernels are for at most {kernels.MOST_BRANCHES} maps of one shape, with norms in training",
        remedy="Leave impl at 'auto'.",
        maps=[tuple(one.shape) for one in maps],
    )
    tensors[: len(maps)] = [one.contiguous() for one in maps]
    out: Tensor = _NormedSelect.apply(_Settings(tuple(norms), gate.norm, gate.relu, None), None, *tensors)
    return out


def _normed_auto(maps: Sequence[Tensor], norms: Sequence[BatchNorm], gate: Gate) -> Tensor:
    alike = len({one.shape for one in maps}) == 1 and _trained(maps[0].shape, norms, gate)
    if alike and _for_kernels("auto", *_tensors(maps, norms, gate)):
        return _normed_native(maps, norms, gate)
    return _normed_reference(maps, norms, gate)


def normed_served(x: Tensor, norms: Sequence[BatchNorm], gate: Gate, *, impl: str = "auto") -> bool:
    """Whether `normed_select` takes the kernels for what convolutions will make of `x`."""
    shape = torch.Size([len(x), len(norms[0].weight), *x.shape[2:]])
    return _trained(shape, norms, gate) and _for_kernels(impl, *_tensors([x], norms, gate))


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
        >>> gate = Gate(w, None, None, [w, w], [zeros, zeros], relu=False)
        >>> normed_select([torch.randn(2, 6, 3, 5), torch.randn(2, 6, 3, 5)], norms, gate).shape
        torch.Size([2, 6, 3, 5])
    """
    return choose("normed_select", impl, _NORMED)(maps, norms, gate)


def _way(x: Tensor, convs: Sequence[Convolution], norms: Sequence[BatchNorm | None], gate: Gate) -> str:
    """How the kernels compute a whole selective kernel: in "training" or "inference"; "" where they do not."""
    pairs = [(conv, conv.geometry) for conv in convs]
    fit = all(one.fits(x, conv.weight, conv.bias) and one.way(x.shape, conv.weight) == "direct" for conv, one in pairs)
    branches = kernels.Convolutions(tuple(conv.weight for conv in convs), tuple(one for _, one in pairs))
    if not fit or (shape := branches.output(x.shape)) is None:
        return ""
    every = [*norms, *([] if gate.norm is None else [gate.norm])]
    if all(norm is not None and norm.training for norm in every):
        trained = all(conv.bias is None for conv in convs) and _trained(shape, cast(Any, norms), gate)
        return "training" if trained else ""
    tensors = [tensor for conv in convs for tensor in conv[:2]] + [t for norm in every if norm for t in norm[:4]]
    frozen = all(norm is None or (not norm.training and norm.weight.shape == shape[1:2]) for norm in norms)
    frozen = frozen and gate.fits(shape[1]) and (gate.norm is None or not gate.norm.training)
    unseen = not recording(x, *tensors, gate.weight, gate.bias, *gate.weights, *gate.biases)
    return "inference" if frozen and unseen else ""


def whole(x: Tensor, convs: Sequence[Convolution], norms: Sequence[BatchNorm | None], gate: Gate, way: str) -> Tensor:
    """`selective_kernel` by the kernels, in the way that `whole_way` told."""
    x, weights = x.contiguous(), tuple(conv.weight.contiguous() for conv in convs)
    geometries = tuple(conv.geometry for conv in convs)
    if way == "training":
        given = cast(Sequence[BatchNorm], norms)
        settings = _Settings(tuple(given), gate.norm, gate.relu, geometries)
        out: Tensor = _NormedSelect.apply(settings, x, *_tensors(weights, given, gate))
        return out
    known = [_norm_of(conv.bias, norm) for conv, norm in zip(convs, norms, strict=True)]
    hidden = gate.weight.contiguous(), _norm_of(gate.bias, gate.norm), gate.relu
    rows = tuple(one.contiguous() for one in gate.weights)
    biases = tuple(None if one is None else one.contiguous() for one in gate.biases)
    return kernels.infer(x, kernels.Convolutions(weights, geometries), known, hidden, rows, biases)


def _norm_of(before: Tensor | None, norm: BatchNorm | None) -> kernels.Norm:
    before = None if before is None else before.contiguous()
    if norm is None:
        return kernels.Norm(before)
    weight, bias, mean, variance = (one.contiguous() for one in norm[:4])
    return kernels.Norm(before, weight, bias, mean, variance, norm.eps)


def _every_tensor(
    x: Tensor, convs: Sequence[Convolution], norms: Sequence[BatchNorm | None], gate: Gate
) -> list[Tensor | None]:
    of_norms = (tensor for norm in (*norms, gate.norm) if norm is not None for tensor in norm[:4])
    of_gate = (gate.weight, gate.bias, *gate.weights, *gate.biases)
    return [x, *(tensor for conv in convs for tensor in conv[:2]), *of_norms, *of_gate]


def _whole_reference(x: Tensor, convs: Sequence[Convolution], norms: Sequence[BatchNorm | None], gate: Gate) -> Tensor:
    return _normed_reference([F.conv2d(x, *conv) for conv in convs], norms, gate)


def _whole_native(x: Tensor, convs: Sequence[Convolution], norms: Sequence[BatchNorm | None], gate: Gate) -> Tensor:
    tensors = _every_tensor(x, convs, norms, gate)
    need_eager("native", *tensors)
    native.need(*tensors)
    way = _way(x, convs, norms, gate)
    check(
        way != "",
        "impl='native'",
        f"the kernels are for at most {kernels.MOST_BRANCHES} branches of one shape that no product or transform "
        "serves better, either with all norms in training and no biases, or with none in training and no gradient",
        remedy="Leave impl at 'auto'.",
        x=tuple(x.shape),
        weights=[tuple(conv.weight.shape) for conv in convs],
    )
    return whole(x, convs, norms, gate, way)


def _whole_auto(x: Tensor, convs: Sequence[Convolution], norms: Sequence[BatchNorm | None], gate: Gate) -> Tensor:
    way = whole_way(x, convs, norms, gate)
    return whole(x, convs, norms, gate, way) if way else _whole_reference(x, convs, norms, gate)


def whole_way(
    x: Tensor, convs: Sequence[Convolution], norms: Sequence[BatchNorm | None], gate: Gate, *, impl: str = "auto"
) -> str:
    """How an implementation of `selective_kernel` takes the kernels: "training", "inference", or "", not at all."""
    if not _for_kernels(impl, *_every_tensor(x, convs, norms, gate)):
        return ""
    faster = (conv.groups > 1 or conv.geometry.beats_torch(x.shape, conv.weight) for conv in convs)
    return _way(x, convs, norms, gate) if impl == "native" or all(faster) else ""


_WHOLE = {"auto": _whole_auto, "reference": _whole_reference, "native": _whole_native}


def selective_kernel(
    x: Tensor,
    convs: Sequence[Convolution],
    norms: Sequence[BatchNorm | None],
    gate: Gate,
    *,
    impl: str = "auto",
) -> Tensor:
    """`normed_select` of what convolutions make of `x`.

    Args:
        x: (B, C, H, W).
        convs: K convolutions.
        norms: K batch norms; in training their running statistics are updated. None for a ReLU alone.
        gate: What makes the weights.
        impl: "auto"; "reference"; "native", kernels in C for the branches as one, not for compilers or autocast: in
            inference no map of a branch leaves the cache, in training no gradient of one is written.

    Returns:
        (B, C', H', W'), which all branches must have.

    Raises:
        ValueError: Unknown `impl`, or one that cannot serve the arguments.

    Example:
        >>> w, b = torch.randn(6, 6), torch.zeros(6)
        >>> convs = [Convolution(torch.randn(6, 2, 3, 3), padding=k, dilation=k, groups=3) for k in (1, 2)]
        >>> selective_kernel(torch.randn(2, 6, 3, 5), convs, [None, None], Gate(w, None, None, [w, w], [b, b])).shape
        torch.Size([2, 6, 3, 5])
    """
    return choose("selective_kernel", impl, _WHOLE)(x, convs, norms, gate)
