"""Put blocks into any network without changing its output, and take them out again.

`insert` wraps the named modules as `y = x + gate * (block(x) - x)` with a learned gate that starts at 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visattn.blocks import Block
from visattn.registry import resolve

__all__ = ["Inserted", "Insertion", "Place", "find_places", "insert"]

_MOST_PREFIX_TOKENS = 5  # a class token and four registers; more is a grid that is not square

Sample = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """A module whose output a block can take.

    Attributes:
        name: The module's name in the network.
        shape: Its output without the batch: (C, H, W), (H, W, C) for layout "map_last", (N, C) for "tokens".
        layout: "map" (B, C, H, W), "map_last" (B, H, W, C) or "tokens" (B, N, C).
        dtype: Type of the output.
        device: Where the output lives.
        parameters: Parameters inserted there; 0 before.
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    device: torch.device
    parameters: int = 0

    @property
    def channels(self) -> int:
        """Channels of a map, width of tokens."""
        return self.shape[0] if self.layout == "map" else self.shape[-1]

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"


class _OnLastChannels(nn.Module):
    """A map block on (B, H, W, C)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x.permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1)


class _OnGrid(nn.Module):
    """A map block on the patch tokens of (B, N, C); tokens before the patches pass by."""

    def __init__(self, block: nn.Module, prefix: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.block, self.prefix, self.grid = block, prefix, grid

    def forward(self, x: Tensor) -> Tensor:
        patches = x.shape[1] - self.prefix
        height, width = self.grid
        if patches != height * width:  # another input size than that of the sample
            height = width = math.isqrt(patches)
            if patches != height * width:
                raise ValueError(
                    f"inserted block: {patches} patch tokens are neither the {self.grid[0]} x {self.grid[1]} grid it "
                    "was inserted for nor a square. Insert again with a sample of the new size."
                )
        grid = x[:, self.prefix :].transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)
        out: Tensor = self.block(grid)
        return torch.cat([x[:, : self.prefix], out.flatten(2).transpose(1, 2)], dim=1)

    def extra_repr(self) -> str:
        return f"prefix={self.prefix}, grid={self.grid}"


class Inserted(nn.Module):
    """`y = x + gate * (block(x) - x)`, x the output of `host`; attributes of the host stay within reach.

    Running through it module by module, as gradient checkpointing does with an `nn.Sequential`, includes the block.
    A state dict of the network from before the insertion loads (with `strict=False`): it has all but the block.

    Attributes:
        host: The module that was there.
        block: What was inserted.
        gate: Learned scalar, 0 at first.
    """

    def __init__(self, host: nn.Module, block: nn.Module, gate: nn.Parameter) -> None:
        super().__init__()
        self.gate = gate  # before a host's own gate shows
        self.block = block
        self.training = host.training
        self.host = host

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The host's output, moved towards the block's by the gate."""
        x: Tensor = self.host(*args, **kwargs)
        attended: Tensor = self.block(x)
        return x + self.gate * (attended - x).to(x.dtype)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("host"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        host = self.__dict__.get("_modules", {}).get("host")
        own = name in self.__dict__ or name in ("host", "block", "gate") or hasattr(type(self), name)
        if host is None or own or not hasattr(host, name):
            super().__setattr__(name, value)
        else:  # a setting of the host, such as timm's grad_checkpointing
            setattr(host, name, value)

    def __getitem__(self, index: Any) -> Any:
        return self.host[index]  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        modules = list(self.host)  # type: ignore[call-overload]
        if isinstance(self.host, nn.Sequential | Inserted):
            modules[-1:] = [Inserted(modules[-1] if modules else nn.Identity(), self.block, self.gate)]
        return iter(modules)

    def __len__(self) -> int:
        return len(self.host)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        of_host, own = self.host.state_dict(), self.state_dict()
        if not any(f"{prefix}host.{key}" in state_dict for key in of_host):  # from before the insertion
            for key in [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]:
                if key in of_host or key not in own:  # a host may have a gate or a block of its own
                    state_dict[f"{prefix}host.{key}"] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass
class Insertion:
    """What `insert` changed, and the way back.

    Attributes:
        title: What was inserted.
        places: Where, with the parameters each place got.
        max_difference: Largest output difference measured on the sample, before against after.
    """

    title: str
    places: list[Place]
    max_difference: float
    _network: nn.Module = field(repr=False)
    _inserted: dict[str, Inserted] = field(repr=False)

    @property
    def parameters_added(self) -> int:
        """Parameters of all inserted blocks and gates."""
        return sum(place.parameters for place in self.places)

    def gates(self) -> dict[str, float]:
        """How far each gate has opened."""
        return {name: inserted.gate.item() for name, inserted in self._inserted.items()}

    def remove(self) -> None:
        """Put the original modules back.

        Raises:
            RuntimeError: They are back already, or something else was put around or in place of an insertion since.
        """
        held = []
        for name, inserted in self._inserted.items():
            holder = _holder(self._network, name, inserted)
            if holder is None:
                raise RuntimeError(
                    f"remove: {name} is not the module that was inserted. It was removed already, "
                    "or a later insertion has to be removed first."
                )
            held.append((*holder, inserted.host))
        for parent, last, host in held:
            parent._modules[last] = host
        self._inserted = {}
        self.places = []

    def __str__(self) -> str:
        if not self.places:
            return f"{self.title} removed again"
        width = max(len(place.name) for place in self.places)
        places = "1 place" if len(self.places) == 1 else f"{len(self.places)} places"
        lines = [f"{self.title} inserted at {places}, {self.parameters_added:,} parameters added"]
        lines += [f"  {p.name:<{width}}  {p.shape!s:<16} {p.parameters:,} parameters" for p in self.places]
        return "\n".join([*lines, f"max|output difference| = {self.max_difference:g}"])


def _holder(net: nn.Module, name: str, inserted: Inserted) -> tuple[nn.Module, str] | None:
    """The module that has an insertion as a child, and the child's name there."""
    parent: nn.Module | None = net
    *path, last = name.split(".")
    for part in path:
        parent = None if parent is None else parent._modules.get(part)
    if parent is not None and parent._modules.get(last) is inserted:
        return parent, last
    for module in net.modules():  # an insertion around it that came or went since has changed its name
        for key, child in module._modules.items():
            if child is inserted and not isinstance(module, Inserted):
                return module, key
    return None


def _set(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    net.get_submodule(parent)._modules[last] = module


@contextlib.contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in net.modules()}
    try:
        for module in modes:  # not net.eval(), which some networks override to fold or merge weights
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _run(net: nn.Module, sample: Sample) -> Any:
    if isinstance(sample, Tensor):
        return net(sample)
    return net(**sample) if isinstance(sample, Mapping) else net(*sample)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output):
        output = vars(output)
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for part in output for t in _tensors(part)] if isinstance(output, list | tuple) else []


def _difference(before: Any, after: Any) -> float:
    """Largest absolute difference; equal infinities and NaN in the same place count as equal."""
    largest = 0.0
    for old, new in zip(_tensors(before), _tensors(after), strict=True):
        same = (old == new) | (old.isnan() & new.isnan())
        if not bool(same.all()):
            worst = (old.double() - new.double()).abs()[~same].max().item()
            largest = max(largest, math.inf if math.isnan(worst) else worst)
    return largest


def _default_sample(net: nn.Module) -> Sample:
    size = (getattr(net, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        raise ValueError("sample: the network does not tell its input size. Give sample=, one input of the network.")
    weight = next(net.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *size, generator=generator).to(weight)


def find_places(net: nn.Module, sample: Sample | None = None) -> dict[str, Place]:
    """Every module of a network whose output a block can take, with its shape.

    Args:
        net: Any module; it is run once in eval mode without gradients and left as it was.
        sample: One input of the network: a tensor, or a tuple or dict of arguments. Default: noise of the input size
            that a timm network tells.

    Returns:
        Places by module name, in the order of the network's modules.

    Raises:
        ValueError: No sample, and the network does not tell its input size.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten())
        >>> find_places(net, torch.randn(1, 3, 6, 5))["0"].shape
        (8, 4, 3)
    """
    return _find_places(net, _default_sample(net) if sample is None else sample)


def _channel_axis(module: nn.Module, output: Tensor) -> int | None:
    """1 or -1 where a layer tells the axis of the channels in its output."""
    if isinstance(module, nn.Linear):
        return -1
    if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
        return 1
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        axes = [axis for axis in (1, -1) if output.shape[axis] == module.normalized_shape[0]]
        return axes[0] if len(axes) == 1 else None  # timm's and torchvision's LayerNorm2d are of its kind
    return None


def _find_places(net: nn.Module, sample: Sample) -> dict[str, Place]:
    batch = next((tensor.shape[0] for tensor in _tensors(sample) if tensor.ndim), None)
    last = getattr(net, "output_fmt", None) == "NHWC"
    inside = {id(m) for i in net.modules() if isinstance(i, Inserted) for m in i.block.modules()}
    calls: dict[str, list[Tensor | None]] = {}  # outputs without content
    told: dict[int, set[torch.Size]] = {1: set(), -1: set()}  # shapes by the axis of their channels

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            fits = isinstance(output, Tensor) and output.ndim in (3, 4) and output.is_floating_point()
            calls.setdefault(name, []).append(output.new_empty(()).expand(output.shape) if fits else None)
            axis = _channel_axis(module, output) if fits else None
            if axis is not None:
                told[axis].add(output.shape)

        return hook

    def place(name: str, output: Tensor | None) -> Place | None:
        if output is None:
            return None
        first, final = output.shape in told[1], output.shape in told[-1]
        if output.ndim == 4:
            layout = "map_last" if (final if first != final else last) else "map"
        elif (first and not final) or output.shape[0] != batch == output.shape[1]:
            return None  # (B, C, N), or (N, B, C), where a block would mix the samples
        else:
            layout = "tokens"
        return Place(name, tuple(output.shape[1:]), layout, output.dtype, output.device)

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in net.named_modules()
        if name and id(module) not in inside
    ]
    try:
        with _evaluating(net):
            _run(net, sample)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, _ in net.named_modules():
        places = [place(name, made) for made in calls.get(name, [])]
        if places and places[0] and len({p and (p.channels, p.layout) for p in places}) == 1:
            found[name] = places[0]  # run twice with different widths, no one block fits
    return found


def _match(places: Mapping[str, Place], at: str | Sequence[str]) -> list[Place]:
    """Places that fit a name or glob pattern (`*` crosses dots); of nested ones only the outermost."""
    chosen: set[str] = set()
    patterns = [at] if isinstance(at, str) else list(at)
    if not patterns:
        raise ValueError(f"insert: at must name at least one place, got {at!r}.")
    for pattern in patterns:
        names = [name for name in places if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not names:
            if not places:
                raise ValueError(
                    "insert: the network has no place for a block: no module of it gives (B, C, H, W), (B, H, W, C) or "
                    "(B, N, C) on the sample."
                )
            shallow = [str(p) for p in places.values() if p.name.count(".") <= 1] or [str(p) for p in places.values()]
            rest = len(places) - len(shallow)
            more = f", and {rest} deeper ones (visattn.find_places lists all)" if rest else ""
            raise ValueError(f"insert: at={pattern!r} matches no place. Places: {', '.join(shallow)}{more}.")
        chosen.update(names)
    outermost = {name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)}
    return [place for name, place in places.items() if name in outermost]


def _grid(net: nn.Module, place: Place) -> tuple[int, tuple[int, int]]:
    """Number of prefix tokens and the patch grid of a place of tokens."""
    tokens = place.shape[0]
    told = getattr(net, "num_prefix_tokens", None)
    prefix = tokens - math.isqrt(tokens) ** 2 if told is None else int(told)
    patches = tokens - prefix
    height, width = getattr(getattr(net, "patch_embed", None), "grid_size", None) or (0, 0)
    if height * width != patches:
        height = width = math.isqrt(patches)
    if height * width != patches or (told is None and prefix > _MOST_PREFIX_TOKENS):
        raise ValueError(
            f"insert: {place.name} gives {tokens} tokens, which are no square grid of patches. "
            "Use a block for tokens (visattn.list_blocks(role='tokens'))."
        )
    return prefix, (height, width)


def _build(
    net: nn.Module, block: str | Callable[[int], nn.Module], place: Place, options: Mapping[str, Any]
) -> nn.Module:
    """The block for a place, in the place's layout."""
    grid = None
    if isinstance(block, nn.Module):
        raise ValueError(
            f"insert: block must be a name, a class or a function of a channel count, got an instance of "
            f"{type(block).__name__}. Give lambda channels: {type(block).__name__}(channels)."
        )
    if callable(block):
        built = block(place.channels, **options)
    else:
        card = resolve(block)
        if place.layout == "tokens" and card.tokens is not None:
            card = resolve(card.tokens)
        if card.role == "part":
            raise ValueError(f"insert: {card.name} is a part of a network, not a block to insert.")
        if card.role == "tokens" and place.layout != "tokens":
            raise ValueError(f"insert: {card.name} takes tokens (B, N, C), {place.name} gives a map {place.shape}.")
        if card.fixed_size and "feat_size" not in options:
            size = place.shape[1:] if place.layout == "map" else place.shape[:2]
            if place.layout == "tokens":
                grid = _grid(net, place)
                size = grid[1]
            options = {**options, "feat_size": size}
        built = card.cls(place.channels, **options)
        if card.role == "tokens":
            return built
    if place.layout == "tokens":
        return _OnGrid(built, *(grid or _grid(net, place)))
    return _OnLastChannels(built) if place.layout == "map_last" else built


def insert(
    net: nn.Module,
    block: str | Callable[[int], nn.Module],
    *,
    at: str | Sequence[str],
    sample: Sample | None = None,
    **options: Any,
) -> Insertion:
    """Insert a block behind modules of a network, its output unchanged until training opens the gates.

    Each place becomes `y = x + gate * (block(x) - x)`, gate a learned scalar starting at 0; a zero start of the block's
    own (gamma of dual attention) is set to 1, since the gate has taken its place. Weights of the network
    keep their values and `requires_grad`. Convolutional maps, channels-last maps and token sequences are told apart
    by the number of axes and by where the layers around have their channels; on tokens a mechanism's token form is
    used, or its map form on the grid of patches.

    Args:
        net: The network, changed in place.
        block: A name of `list_blocks`, an alias, or a class or function that makes a module for (B, C, H, W) of a
            channel count and the options.
        at: A module name or glob pattern (`*`, `?`, `[34]`), or several; `*` crosses dots, and of nested matches the
            outermost counts.
        sample: One input of the network: a tensor, or a tuple or dict of arguments. Default: noise of the input size
            that a timm network tells.
        options: Options of the block.

    Returns:
        A record: print it, or call its `remove()`.

    Raises:
        ValueError: Unknown block, a pattern that matches nothing (the message lists the places with their shapes), or
            options or widths the block refuses; the network is then unchanged.
        RuntimeError: The output on the sample changed; the insertion is undone.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> record = insert(net, "dual", at="0", sample=torch.randn(1, 3, 6, 5))
        >>> record.max_difference
        0.0
    """
    sample = _default_sample(net) if sample is None else sample
    chosen = _match(_find_places(net, sample), at)
    with _evaluating(net):  # again: modules that are watched by hooks may compute in another way
        before = _run(net, sample)
    inserted: dict[str, Inserted] = {}
    for place in chosen:
        built = _build(net, block, place, options).to(device=place.device, dtype=place.dtype)
        for module in built.modules():
            if isinstance(module, Block):
                module.wake()
        host = net.get_submodule(place.name)
        gate = nn.Parameter(torch.zeros((), device=place.device, dtype=place.dtype))
        inserted[place.name] = Inserted(host, built.train(host.training), gate)
    record = Insertion(
        title=_title(block),
        places=[Place(p.name, p.shape, p.layout, p.dtype, p.device, _count(inserted[p.name])) for p in chosen],
        max_difference=math.nan,
        _network=net,
        _inserted=inserted,
    )
    if not _tensors(before):
        raise ValueError(
            "insert: the network's output has no tensor to compare, so it cannot be shown to stay the same."
        )
    for name, module in inserted.items():
        _set(net, name, module)
    hooks = [module.block.register_forward_hook(_check_shape) for module in inserted.values()]
    try:
        with _evaluating(net):
            record.max_difference = _difference(before, _run(net, sample))
    except BaseException:  # an interruption from the keyboard too
        record.remove()
        raise
    finally:
        for hook in hooks:
            hook.remove()
    if record.max_difference != 0:
        record.remove()
        raise RuntimeError(
            f"insert: the output changed by {record.max_difference:g} on the sample, so the insertion was undone. "
            "Is the network deterministic in eval mode, and are its activations finite?"
        )
    return record


def _check_shape(block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    if output.shape != args[0].shape:  # a single row or column would be spread over the map in silence
        raise ValueError(
            f"insert: the output of a block must have the shape of its input, got {tuple(output.shape)} for "
            f"{tuple(args[0].shape)}."
        )


def _title(block: str | Callable[[int], nn.Module]) -> str:
    if isinstance(block, str):
        card = resolve(block)
        return f"{card.title} ({card.name})"
    return getattr(block, "__name__", type(block).__name__)


def _count(inserted: Inserted) -> int:
    return inserted.gate.numel() + sum(p.numel() for p in inserted.block.parameters())
