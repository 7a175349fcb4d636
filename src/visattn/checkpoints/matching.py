"""Find out what a file is, and which tensors of a network its tensors are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from visattn.blocks import Block
from visattn.checkpoints.layouts import recognise, strip_prefixes
from visattn.checkpoints.published import PUBLISHED, Published
from visattn.checkpoints.reading import Content
from visattn.errors import some

__all__ = ["COUNTER", "LAYOUT", "Match", "match_alone", "match_with"]

COUNTER = "num_batches_tracked"  # torch has it since 0.4.1; with the usual momentum nothing depends on it
LAYOUT = "visattn.layout"  # in the metadata of a converted file: what it was
_TOP = ("fc.", "head.", "classifier.")  # what a classification network has behind its features


@dataclass
class Match:
    """The tensors of a file under the names of a network."""

    layout: str
    mapped: dict[str, Tensor]
    dropped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    note: str = ""
    below: str = ""  # the part of the network that the file is for: this prefix; all others stay as they are


def _title(what: str, content: Content, prefix: str) -> str:
    around = f", under {content.within!r}" if content.within else ""
    around += f", without the prefix {prefix!r}" if prefix else ""
    return what + around


def _network(content: Content, state: Mapping[str, Tensor], prefix: str) -> Match | None:
    """The match of a published network's layout; None where it is none."""
    layout = recognise(state)
    if layout is None:
        return None
    mapped, dropped, unknown = layout.to_ours(state)
    return Match(_title(f"{layout.title} as of {layout.repo}", content, prefix), mapped, dropped, unknown, layout.note)


def _own(content: Content, prefix: str, net: nn.Module | None = None) -> str:
    if content.metadata.get(LAYOUT):
        return f"names as of visattn, converted from {content.metadata[LAYOUT]}"
    same = [e.source for e in PUBLISHED if not e.names and net is not None and e.block == type(net).__name__]
    owners = ["visattn", *same] if same else ["visattn", "timm", "torchvision"]
    return _title(f"names as of {', '.join(owners)}", content, prefix)


def _block(content: Content, state: Mapping[str, Tensor], prefix: str, module: nn.Module, below: str) -> Match | None:
    """The match of a published class with one of our blocks; None where names or shapes do not fit."""
    targets = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    for entry in PUBLISHED:
        if not _is_of(entry, module) or (entry.names and not entry.recognises(state)):
            continue
        ours = entry.to_ours(state)
        if _fits(ours, targets):
            title = _title(f"{entry.name} as of {entry.repo}", content, prefix)
            return Match(title, {below + name: tensor for name, tensor in ours.items()}, below=below)
    return None


def _is_of(entry: Published, module: nn.Module) -> bool:
    """Whether a block of ours is the one that a published class equals."""
    return entry.block == type(module).__name__ and all(getattr(module, k) == v for k, v in entry.fixed.items())


def _fits(ours: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> bool:
    """Whether names and shapes are the same, but for counters."""
    names = {name for name in ours if not name.endswith(COUNTER)}
    if names != {name for name in targets if not name.endswith(COUNTER)}:
        return False
    return all(ours[name].shape == targets[name].shape for name in names)


def _generic(content: Content, state: dict[str, Tensor], prefix: str, targets: Mapping[str, Tensor]) -> Match:
    """Names that are the network's own already, or its backbone's, or those of one that has a backbone of its kind."""
    title = _own(content, prefix)
    found = Match(title, state)
    for candidate in (_of_backbone(title, state, targets), _from_backbone(title, state)):
        if candidate is not None and _common(candidate, targets) > _common(found, targets):
            found = candidate
    return found


def _common(match: Match, targets: Mapping[str, Tensor]) -> int:
    return len(match.mapped.keys() & targets.keys())


def _of_backbone(
    title: str, state: Mapping[str, Tensor], targets: Mapping[str, Tensor], network: Match | None = None
) -> Match | None:
    """A classification network into the backbone of a segmentation network; its classifier is dropped."""
    if not any(name.startswith("backbone.") for name in targets):
        return None
    match = Match(f"{title}, into the backbone", {}, below="backbone.")
    if network is not None:
        match.dropped, match.unknown, match.note = [*network.dropped], [*network.unknown], network.note
    for name, tensor in state.items():
        flat = re.sub(r"^([a-z]+)\.(\d+)\.", r"\1_\2.", name)  # timm flattens some networks for their features
        fitting = next((n for n in (f"backbone.{name}", f"backbone.{flat}") if n in targets), f"backbone.{name}")
        if fitting not in targets and name.startswith(_TOP):
            match.dropped.append(name)
        elif fitting in match.mapped:  # two names for one tensor: which is meant, nothing tells
            match.unknown.append(name)
        else:
            match.mapped[fitting] = tensor
    return match


def _from_backbone(title: str, state: Mapping[str, Tensor]) -> Match | None:
    """A backbone that was saved from a larger network, into a network of its own."""
    for prefix in ("backbone.", "pretrained.", "encoder."):
        if all(name.startswith(prefix) for name in state):
            return Match(f"{title}, its {prefix[:-1]}", {name[len(prefix) :]: t for name, t in state.items()})
    return None


def match_with(content: Content, net: nn.Module, around: str, targets: Mapping[str, Tensor]) -> Match:
    """Find out what a file is, given where it is to go.

    Args:
        content: Of the file.
        net: The network.
        around: The prefix that its own names have and those of `targets` do not.
        targets: Its tensors.

    Raises:
        ValueError: It is nothing that this network could take, or could go to several places.
    """
    state, prefix = strip_prefixes(content.tensors)
    if _fits(state, targets) and not recognise(state):
        return Match(_own(content, prefix, net), state)
    network = _network(content, state, prefix)
    if network is not None:
        inner = _of_backbone(network.layout, network.mapped, targets, network)
        return inner if inner is not None and _common(inner, targets) > _common(network, targets) else network
    inside = []
    for name, module in net.named_modules():
        if isinstance(module, Block):
            below = f"{name}.".removeprefix(around) if name else ""
            inside.append(_block(content, state, prefix, module, below))
    places = [match for match in inside if match is not None]
    if len(places) > 1:
        names = some([match.below.rstrip(".") for match in places])
        raise ValueError(
            f"the file ({places[0].layout}) fits {len(places)} blocks of the network ({names}). "
            "Load it into one of them: load_checkpoint(net.get_submodule(name), file)."
        )
    if places:
        return places[0]
    found = _renaming_block(content, state, prefix, net) or _generic(content, state, prefix, targets)
    if not _common(found, targets):
        raise ValueError(
            f"no published layout, and none of its names are the network's: the file has {some(list(state))}; "
            f"the network has {some(list(targets))}."
        )
    return found


def _renaming_block(
    content: Content, state: Mapping[str, Tensor], prefix: str, net: nn.Module | None = None
) -> Match | None:
    """The match of a published class with names of its own, by these alone; None where there is no such class."""
    entries = [entry for entry in PUBLISHED if net is None or _is_of(entry, net)]
    entry = next((entry for entry in entries if entry.recognises(state)), None)
    if entry is None:
        return None
    return Match(_title(f"{entry.name} as of {entry.repo}", content, prefix), entry.to_ours(state))


def match_alone(content: Content) -> Match:
    """Find out what a file is from its names alone; what is of no known layout keeps its names."""
    state, prefix = strip_prefixes(content.tensors)
    match = _network(content, state, prefix) or _renaming_block(content, state, prefix)
    if match is not None:
        return match
    unknown = _title("names of no published layout, kept", content, prefix)
    return Match(_own(content, prefix) if content.metadata.get(LAYOUT) else unknown, state)
