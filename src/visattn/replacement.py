"""Put blocks in the place of convolutions, the way SKNet and EPSANet grew out of ResNets."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from visattn.blocks import PyramidSqueezeAttention
from visattn.blocks.base import has_hooks
from visattn.errors import some
from visattn.registry import list_blocks, resolve

__all__ = ["Replaced", "Replacement", "replace"]

_NORMS = (_BatchNorm, nn.GroupNorm)
_ACTIVATIONS = tuple(
    getattr(nn, name) for name in ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "GELU", "SiLU", "Mish", "Hardswish")
)
_SHOWN = 5  # modules named in an error


@dataclass(frozen=True)
class Replaced:
    """One convolution that a block stands for now.

    Attributes:
        name: The module's name in the network.
        convolution: What was there.
        parameters_before: Parameters of the convolution, and of the norm behind it where that went too.
        parameters: Parameters of the block.
    """

    name: str
    convolution: str
    parameters_before: int
    parameters: int


@dataclass
class Replacement:
    """What `replace` changed, and the way back.

    Attributes:
        title: What the blocks are.
        places: The convolutions that were replaced.
    """

    title: str
    places: list[Replaced]
    _changes: list[tuple[nn.Module, str, nn.Module, nn.Module]] = field(repr=False)

    @property
    def parameters_added(self) -> int:
        """Parameters of the blocks less those of what they replaced."""
        return sum(place.parameters - place.parameters_before for place in self.places)

    def remove(self) -> None:
        """Put the convolutions back, with the norms and activations behind them.

        Raises:
            RuntimeError: They are back already, or something else was put in place of a block since.
        """
        if not self._changes:
            raise RuntimeError("remove: the convolutions are back already.")
        for holder, key, _, new in self._changes:
            if holder._modules.get(key) is not new:
                raise RuntimeError(
                    f"remove: {key} of {type(holder).__name__} is not what was put there. What came later, such as an "
                    "insertion, has to be removed first."
                )
        for holder, key, old, _ in self._changes:
            holder._modules[key] = old
        self._changes, self.places = [], []

    def __str__(self) -> str:
        if not self.places:
            return f"{self.title} removed again"
        width = max(len(place.name) for place in self.places)
        what = "1 convolution" if len(self.places) == 1 else f"{len(self.places)} convolutions"
        lines = [f"{self.title} in place of {what}, {self.parameters_added:+,} parameters"]
        lines += [
            f"  {p.name:<{width}}  {p.convolution:<44} {p.parameters_before:,} -> {p.parameters:,} parameters"
            for p in self.places
        ]
        return "\n".join(lines)


def replace(
    net: nn.Module, block: str | Callable[..., nn.Module], *, at: str | Sequence[str], **options: Any
) -> Replacement:
    """Put blocks in the place of convolutions. Channels, stride, dilation and groups are those of the convolution.

    Padding has to keep the size of the map, as a block's does. A selective kernel ends in a norm and an activation of
    its own: those of the network right behind the convolution (the next modules of an `nn.Sequential`, or `bn2` and
    `act2` beside `conv2`) become identities, as in SKNet. The blocks are freshly initialised, so the network has to be
    trained: where its output must stay as it is, use `insert`.

    Args:
        net: The network, changed in place.
        block: A name of `list_blocks(role="convolution")`, an alias, or a class or function that is called with input
            and output channels and the keywords stride, dilation and groups.
        at: A module name or glob pattern (`*`, `?`, `[34]`), or several; `*` crosses dots.
        options: Options of the block; they win over what the convolution says.

    Returns:
        A record: print it, or call its `remove()`.

    Raises:
        ValueError: Unknown block, a pattern that matches nothing, modules that cannot be replaced (the message names
            them and says why), or options or widths that the block refuses; the network is then unchanged.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(8, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        >>> record = replace(net, "selective_kernel", at="0")
        >>> net(torch.randn(2, 8, 9, 7)).shape, net[1]
        (torch.Size([2, 64, 5, 4]), Identity())
    """
    build, title = _builder(block)
    convolutions = _convolutions(net, at)
    places: list[Replaced] = []
    changes: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
    built: dict[nn.Module, nn.Module] = {}  # a convolution with two names is one block with two names
    for name, conv in convolutions.items():
        new = built.get(conv)
        if new is None:
            new = built[conv] = _built(build, name, conv, options)
        holder, key = _holder(net, name)
        behind = list(_behind(holder, key, conv)) if getattr(new, "activated", False) else []
        if (holder, key) not in [change[:2] for change in changes]:  # a holder with two names is changed once
            changes.append((holder, key, conv, new))
            changes += [(holder, other, holder._modules[other], nn.Identity()) for other in behind]  # type: ignore[misc]
        before = [conv, *(holder._modules[other] for other in behind)]
        places.append(Replaced(name, _described(conv), sum(map(_count, before)), _count(new)))
    for holder, key, _, new in changes:
        holder._modules[key] = new
    return Replacement(title, places, changes)


def _builder(block: str | Callable[..., nn.Module]) -> tuple[Callable[..., nn.Module], str]:
    """The class or function, and what it is called in the record."""
    if isinstance(block, nn.Module):
        raise ValueError(
            f"replace: block must be a name, a class or a function of channels, got an instance of "
            f"{type(block).__name__}. Give the class and its options."
        )
    if callable(block):
        return block, getattr(block, "__name__", type(block).__name__)
    card = resolve(block)
    if card.role != "convolution":
        choices = ", ".join(list_blocks(role="convolution"))
        raise ValueError(
            f"replace: block must take the place of a convolution, got {card.name!r}. Choose from {choices}, "
            "or use visattn.insert."
        )
    return card.cls, f"{card.title} ({card.name})"


def _convolutions(net: nn.Module, at: str | Sequence[str]) -> dict[str, nn.Conv2d]:
    """The convolutions that patterns name, all of them fit to be replaced."""
    patterns = [at] if isinstance(at, str) else list(at)
    if not patterns:
        raise ValueError(f"replace: at must name at least one convolution, got {at!r}.")
    modules = {name: module for name, module in net.named_modules(remove_duplicate=False) if name}
    chosen: set[str] = set()
    for pattern in patterns:
        names = [name for name in modules if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not names:
            fit = [name for name, module in modules.items() if not _objection(module)]
            known = f"Convolutions: {some(fit, _SHOWN)}" if fit else "It has no convolution to replace"
            raise ValueError(f"replace: at={pattern!r} matches no module. {known}.")
        chosen.update(names)
    objections = {name: _objection(module) for name, module in modules.items() if name in chosen}
    unfit = [f"{name} ({reason})" for name, reason in objections.items() if reason]
    if unfit:
        raise ValueError(
            f"replace: {len(unfit)} of the {len(objections)} modules that at={at!r} names cannot be replaced: "
            f"{some(unfit, _SHOWN)}."
        )
    return {name: module for name, module in modules.items() if name in chosen and isinstance(module, nn.Conv2d)}


def _objection(module: nn.Module) -> str:
    """Why a block cannot take the place of a module; empty if it can."""
    if not isinstance(module, nn.Conv2d):
        return f"{type(module).__name__}, not a 2-D convolution"
    height, width = module.kernel_size
    if is_lazy(module.weight):
        return "its channels are not known before a first call"
    if max(height, width) == 1:
        return "1x1: it looks at no neighbours"
    if height != width or height % 2 == 0:
        return f"kernel {height}x{width}, not square and odd"
    if len(set(module.stride)) > 1 or len(set(module.dilation)) > 1:
        return f"stride {module.stride} or dilation {module.dilation} differs by direction"
    if has_hooks(module) or is_parametrized(module):
        return "hooks or parametrizations such as weight_norm would be lost: remove them first"
    if module.padding_mode != "zeros":
        return f"padding_mode {module.padding_mode!r}, not zeros"
    same = module.dilation[0] * (height // 2)
    if module.padding not in ((same, same), "same"):
        return f"padding {module.padding}, where {same} would keep the size of the map"
    return ""


def _built(build: Callable[..., nn.Module], name: str, conv: nn.Conv2d, options: Mapping[str, Any]) -> nn.Module:
    """The block for a convolution, where it lives and in its mode."""
    taken: dict[str, Any] = {"stride": conv.stride[0], "dilation": conv.dilation[0], "groups": conv.groups}
    if isinstance(build, type) and issubclass(build, PyramidSqueezeAttention):
        scales = len(options.get("kernel_size", (3, 5, 7, 9)))
        if conv.groups > 1:
            taken["groups"] = (conv.groups,) * scales
        else:
            del taken["groups"]  # what the paper takes in place of a plain convolution
    try:
        block = build(conv.in_channels, conv.out_channels, **{**taken, **options})
    except ValueError as error:
        raise ValueError(f"replace: {name}, {_described(conv)}: {error}") from error
    return block.to(device=conv.weight.device, dtype=conv.weight.dtype).train(conv.training)


def _holder(net: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, key = name.rpartition(".")
    return net.get_submodule(parent), key


def _behind(holder: nn.Module, key: str, conv: nn.Conv2d) -> Iterator[str]:
    """Names of the norm and the activation right behind a convolution, beside it in the same module."""
    children = holder._modules
    if isinstance(holder, nn.Sequential):
        names = list(children)
        following = names[names.index(key) + 1 :]
        norm, activation = [*following, "", ""][:2]
    else:
        number = re.fullmatch(r"conv_?(\d*)", key)
        if number is None:
            return
        near = [name for stem in ("bn", "norm") for name in (f"{stem}{number[1]}", f"{stem}_{number[1]}")]
        norm = next((name for name in near if name in children), "")
        near = [name for stem in ("act", "relu") for name in (f"{stem}{number[1]}", f"{stem}_{number[1]}")]
        activation = next((name for name in near if name in children), "") if number[1] else ""
    found = children.get(norm)
    channels = getattr(found, "num_features", getattr(found, "num_channels", None))
    if not isinstance(found, _NORMS) or channels != conv.out_channels:
        return
    yield norm
    if isinstance(children.get(activation), _ACTIVATIONS):
        yield activation


def _described(conv: nn.Conv2d) -> str:
    size = f"{conv.in_channels} -> {conv.out_channels}, {conv.kernel_size[0]}x{conv.kernel_size[1]}"
    extras = [
        f"{name} {value}" for name, value in (("stride", conv.stride[0]), ("dilation", conv.dilation[0])) if value > 1
    ]
    extras += [f"{conv.groups} groups"] if conv.groups > 1 else []
    return ", ".join([f"conv {size}", *extras])


def _count(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0
