"""Weights of published files into our networks: find the layout, check everything, then copy."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from visattn.checkpoints.layouts import architecture, classifier, strip_prefixes
from visattn.checkpoints.matching import COUNTER, Match, match_with
from visattn.checkpoints.reading import read
from visattn.errors import plain, some
from visattn.surgery import Inserted

__all__ = ["Loaded", "load_checkpoint", "speaking_for"]

_SHOWN = 3  # names in a record


@dataclass(frozen=True)
class Loaded:
    """What came of a file.

    Attributes:
        file: The file.
        layout: What it holds, and whose names it has.
        mapped: Our names of the tensors that were taken.
        dropped: Its names of those that were not.
        left: Our names of what the file has no tensors for.
        note: What the file does not tell.
    """

    file: Path
    layout: str
    mapped: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.file.name}: {self.layout}",
            f"  mapped  {len(self.mapped):,} tensors",
            f"  dropped {_count(self.dropped)}",
            f"  left at initialisation {_count(self.left)}",
        ]
        return "\n".join(lines + ([f"  note: {self.note}"] if self.note else []))


def _count(names: Sequence[str]) -> str:
    """How many names, and which: all of a few, else how many below each module at the top."""
    counters = [name for name in names if name.endswith(COUNTER)]
    others = [name for name in names if not name.endswith(COUNTER)]
    if len(others) > _SHOWN:
        groups = Counter(plain(name.split(".")[0]) for name in others)
        said = [f"{top}.* ({number})" for top, number in groups.items()]
        said = [*said[:_SHOWN], f"{len(said) - _SHOWN} more modules"] if len(said) > _SHOWN + 1 else said
    else:
        said = list(map(plain, others))
    said += [f"{COUNTER} of {len(counters)} norms"] if counters else []
    return f"{len(names):,}: {', '.join(said)}" if names else "nothing"


@contextlib.contextmanager
def speaking_for(owner: str) -> Iterator[None]:
    """Put the name of the public function before what is wrong."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{owner}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error


def load_checkpoint(net: nn.Module, file: str | os.PathLike[str], *, strict: bool = True) -> Loaded:
    """Load the weights of a published file, or of one of visattn's, timm's or torchvision's, into a network.

    Whose names the file has is found out from the names: EPSANet, DANet (the authors' and MMSegmentation's), EANet,
    SKNet (developer0hye's and pppLang's), the single blocks of `visattn.checkpoints.PUBLISHED`, or the network's own.
    A classification network goes into the backbone of a segmentation network, a block into the one place it fits.
    What training scripts put around (`state_dict`, `model`, `net`, `module.`, ...) is taken off. Tensors keep the
    network's type and device.

    Only tensors are read. A pickle that would build anything else is refused, and nothing in it is run.

    Shapes do not tell everything: stride, dilation and the order of otherwise equal layers have to agree.

    Args:
        net: The network; it is as before after any error.
        file: Written by `torch.save`, in its present or its old format, or in safetensors.
        strict: False leaves what the file lacks at its initialisation, drops what the network lacks, and leaves a
            classifier of another number of classes; both are in the record.

    Returns:
        What was found, mapped, dropped and left; print it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no whole checkpoint of tensors, or not one of this network: missing, unknown or differently
            shaped tensors.
        UserError: The file is a safetensors file and safetensors is not installed.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = pathlib.Path(folder.name, "cam.pth")
        >>> torch.save({"epoch": 3, "state_dict": {"module.beta": torch.ones(1)}}, file)
        >>> print(load_checkpoint(visattn.ChannelAttention(8, inverted=False), file))
        cam.pth: CAM as of changzy00/pytorch-attention, under 'state_dict', without the prefix 'module.'
          mapped  1 tensors
          dropped nothing
          left at initialisation nothing
        >>> folder.cleanup()
    """
    path = Path(file)
    with speaking_for("load_checkpoint"):
        content = read(path)
        targets, aside, around = _targets(net, content.tensors)
        match = match_with(content, net, around, targets)
        left = _check(match, targets, path, strict=strict)
    with torch.no_grad():
        for name, tensor in match.mapped.items():
            targets[name].copy_(tensor)
    return Loaded(path, match.layout, tuple(match.mapped), tuple(match.dropped), (*left, *aside), match.note)


def _targets(net: nn.Module, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], str]:
    """The network's tensors by the names that files have, what was inserted since and stays, and the prefix taken off.

    Raises:
        ValueError: The network has no tensors, none in memory yet, or some that cannot be written.
    """
    held = {name: tensor for name, tensor in net.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    if not held:
        raise ValueError(f"the network has no parameters or buffers, got net={type(net).__name__}.")
    empty = [name for name, tensor in held.items() if is_lazy(tensor) or tensor.is_meta]
    if empty:
        raise ValueError(
            f"the network is not in memory yet ({some(empty)}). Run it once on a sample, or move it off the meta "
            "device with net.to_empty(device='cpu')."
        )
    fixed = [name for name, tensor in held.items() if not _writable(tensor)]
    if fixed:  # found out now, as a network half loaded would be worse
        raise ValueError(
            f"the network's tensors cannot be written ({some(fixed)}): they were made in torch.inference_mode, or "
            "share memory within themselves. Build the network outside of it, or clone them."
        )
    held, around = strip_prefixes(held)  # of a compiled network, or one in DataParallel
    names, aside = {*strip_prefixes(given)[0]}, []
    for name, module in reversed([*net.named_modules()]):  # an insertion at an insertion before the outer one
        place = f"{name}.".removeprefix(around) if name else ""
        if not isinstance(module, Inserted) or f"{place}gate" in names:
            continue
        host = f"{place}host."
        own = [key for key in held if key.startswith(f"{place}block.") or key == f"{place}gate"]
        aside += own
        held = {k.replace(host, place, 1) if k.startswith(host) else k: t for k, t in held.items() if k not in own}
    return held, aside, around


def _writable(tensor: Tensor) -> bool:
    shared = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return not shared and (torch.is_inference_mode_enabled() or not tensor.is_inference())


def _check(match: Match, targets: Mapping[str, Tensor], file: Path, *, strict: bool) -> list[str]:
    """Make a match ready to be copied: what is not to be is moved from its tensors to its dropped names.

    Returns:
        Names of the network that the file has no tensors for.

    Raises:
        ValueError: The file is not one of this network.
    """
    mapped, got = match.mapped, f"got file={str(file)!r}"
    _untie(match, targets)
    extra = [name for name in mapped if name not in targets]
    missing = [n for n in targets if n not in mapped and n.startswith(match.below) and not n.endswith(COUNTER)]
    wrong = [name for name, tensor in mapped.items() if name in targets and not _takes(name, targets[name], tensor)]
    kept = [name for name in wrong if not strict and _is_classifier(name, mapped, targets)]
    unknown = [name for name in (*match.unknown, *extra) if not name.endswith(COUNTER)]
    wrong = [name for name in wrong if name not in kept]
    if wrong or (strict and (missing or unknown)):
        raise ValueError(f"the file ({match.layout}) {_differences(match, targets, missing, unknown, wrong)}, {got}.")
    for name in (*extra, *kept):
        del mapped[name]
    match.dropped += [*match.unknown, *extra, *kept]
    if not mapped:
        raise ValueError(f"the file ({match.layout}) has nothing that the network could take, {got}.")
    large = [name for name, tensor in mapped.items() if _overflows(targets[name], tensor)]
    if large:
        raise ValueError(
            f"the file ({match.layout}) has numbers that are infinite in the network's {targets[large[0]].dtype} "
            f"({some(large)}). Load it into a float32 network, {got}."
        )
    return [name for name in targets if name not in mapped]


def _takes(name: str, target: Tensor, tensor: Tensor) -> bool:
    kind = target.is_floating_point() == tensor.is_floating_point() and target.is_complex() == tensor.is_complex()
    return (kind or name.endswith(COUNTER)) and target.shape == tensor.shape


def _overflows(target: Tensor, tensor: Tensor) -> bool:
    """Whether finite numbers become infinite in the type of a network's tensor."""
    narrower = target.is_floating_point() and torch.finfo(target.dtype).max < torch.finfo(tensor.dtype).max
    return narrower and bool((tensor.isfinite() & ~tensor.to(target.dtype).isfinite()).any())


def _is_classifier(name: str, mapped: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is of a classifier and has another number of classes than the network's, nothing more."""
    weight = re.sub(r"bias$", "weight", re.sub(r"conv[678]\.1", "conv8.1", name))
    return weight == classifier(mapped) and mapped[name].shape[1:] == targets[name].shape[1:]


def _untie(match: Match, targets: Mapping[str, Tensor]) -> None:
    """Drop the second memory of an external attention where the network has one for both and they are equal."""
    for name in [name for name in match.mapped if name.endswith("linear_1.weight") and name not in targets]:
        first = match.mapped.get(name.replace("linear_1", "linear_0"))
        if first is not None and first.dim() == 3 and torch.equal(first.transpose(0, 1), match.mapped[name]):
            match.dropped.append(name)
            del match.mapped[name]


def _differences(
    match: Match, targets: Mapping[str, Tensor], missing: list[str], unknown: list[str], wrong: list[str]
) -> str:
    """In what a file and a network differ, as shortly as it can be said."""
    of_file, of_net = architecture(match.mapped), architecture(targets)
    if match.below:  # a backbone has no head to differ in
        of_file.pop("classes", None)
    aspects = [a for a in of_file if of_file[a] != of_net.get(a)]
    aspects += [a for a in of_net if a not in of_file and not match.below and a != "classes"]
    if aspects == ["classes"]:
        return (
            f"is for {of_file['classes']} classes, the network for {of_net.get('classes', 'none')}. Build the network "
            f"with num_classes={of_file['classes']}, or give strict=False to leave the classifier as it is"
        )
    if aspects:
        said = [f"{a}: {of_file.get(a, 'none')} in the file, {of_net.get(a, 'none')} in the network" for a in aspects]
        note = f" ({match.note})" if match.note and "stem" in aspects else ""
        return f"is of another network: {'; '.join(said)}{note}"
    said = [f"lacks {len(missing):,} tensors of the network ({some(missing)})"] if missing else []
    said += [f"has {len(unknown):,} that it does not know ({some(unknown)})"] if unknown else []
    shapes = [f"{n}: {_shape(match.mapped[n])} in the file, {_shape(targets[n])} in the network" for n in wrong]
    said += [f"has {len(wrong):,} of another shape ({some(shapes)})"] if wrong else []
    remedy = "" if wrong else ". Give strict=False to load the rest"
    return f"{' and '.join(said)}{remedy}"


def _shape(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"
