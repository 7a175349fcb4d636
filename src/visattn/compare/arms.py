"""The contenders: the plain network, each mechanism, and plain convolutions of the same size as control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visattn import models
from visattn.errors import UserError, one_line, require
from visattn.registry import resolve
from visattn.surgery import Insertion, Place, find_places, insert
from visattn.tasks import SEGMENTATION, Task

__all__ = [
    "SEGMENTATION_PLACE",
    "Arm",
    "Control",
    "Widened",
    "build_arm",
    "build_backbone",
    "choose_places",
    "control_width",
    "default_stride",
    "head_channels",
    "list_arms",
    "widened_width",
]

SEGMENTATION_PLACE = "head.conv"  # of `visattn.models.fcn`: what comes out of it goes to the classifier
LARGE = 128  # shorter side of images that features of stride 8 are fine enough for
SMALLEST_MAP = 7  # below it there is little left to attend to
BLOCK_SEED = 7919  # blocks are initialised from their own stream, so that they cannot shift the backbone's


@dataclass(frozen=True)
class Arm:
    """One contender; `kind` is "plain", "mechanism" or "control"."""

    name: str
    kind: str
    title: str


class Control(nn.Sequential):
    """Capacity without attention: conv 3x3, BatchNorm, ReLU, conv 1x1, BatchNorm.

    Args:
        channels: Channels in and out.
        hidden: Channels between.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(
            nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )


def control_width(channels: int, parameters: int) -> int:
    """Hidden channels that bring `Control` as near as possible to a number of parameters."""
    # 9 C h + 2 h + h C + 2 C
    return max(1, round((parameters - 2 * channels) / (10 * channels + 2)))


class Widened(nn.Module):
    """A plain head with more of the same: a second branch, conv 3x3, BatchNorm, ReLU, conv 1x1, adds its logits.

    The last convolution starts at 0, where the head is the one without the branch.

    Args:
        head: The plain head.
        channels: Channels of the features it is given.
        hidden: Channels between the convolutions of the branch.
        classes: Classes a pixel can have.
    """

    def __init__(self, head: nn.Module, channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.head = head
        self.branch = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, classes, 1),
        )
        for parameter in self.branch[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, K, h, w)."""
        logits: Tensor = self.head(x) + self.branch(x)
        return logits


def default_stride(name: str, image_size: tuple[int, int]) -> int:
    """Stride of the features under a segmentation head: 8 as in the papers, or 4 on small images.

    Masks of small images have strokes of a few pixels, which features of stride 8 cannot draw. A backbone that cannot
    keep so much of its resolution has 8 all the same: its early stages know too little.
    """
    if min(image_size) >= LARGE:
        return 8
    timm = require("timm", extra="compare", purpose="visattn compare")
    try:
        with torch.device("meta"):
            timm.create_model(name, features_only=True, output_stride=4)
    except Exception:  # each network refuses in its own way
        return 8
    return 4


def head_channels(net: nn.Module) -> int:
    """Channels of the features that a plain segmentation head is given."""
    return int(net.get_submodule(f"{SEGMENTATION_PLACE}.conv").in_channels)  # type: ignore[arg-type]  # a convolution's


def widened_width(channels: int, classes: int, parameters: int) -> int:
    """Hidden channels that bring the branch of `Widened` as near as possible to a number of parameters."""
    # 9 C h + 2 h + h K + K
    return max(1, round((parameters - classes) / (9 * channels + 2 + classes)))


def list_arms(mechanisms: Sequence[str], task: Task) -> tuple[Arm, ...]:
    """Plain, the mechanisms in the order given, control."""
    pixels = task is SEGMENTATION
    return (
        Arm("plain", "plain", "Plain head" if pixels else "Plain backbone"),
        *(Arm(name, "mechanism", resolve(name).title) for name in mechanisms),
        Arm("control", "control", "Wider plain head" if pixels else "Plain convolution of the same size"),
    )


def build_backbone(
    name: str,
    *,
    classes: int,
    channels: int,
    image_size: tuple[int, int],
    seed: int,
    output_stride: int | None = None,
) -> nn.Module:
    """A timm network with fresh weights that depend on the seed alone.

    Args:
        name: Its name.
        classes: Classes to tell apart.
        channels: Channels of the images.
        image_size: (H, W) of the images.
        seed: Decides the weights.
        output_stride: Under a plain segmentation head, of the features it is given; None for a classifier.

    Raises:
        UserError: It does not take images of that size, or gives no features of that stride.
    """
    timm = require("timm", extra="compare", purpose="visattn compare")
    fixed = bool(timm.models.get_pretrained_cfg(name).fixed_input_size)
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    options |= {"img_size": image_size} if fixed else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if output_stride is None:
                net: nn.Module = timm.create_model(name, **options)
            else:
                net = models.fcn(name, output_stride=output_stride, **options)
            with torch.no_grad():
                output = net.eval()(torch.zeros(1, channels, *image_size))
        except Exception as error:  # timm has hundreds of networks, each with its own way to refuse a size
            if str(error).startswith("fcn: "):
                raise UserError(f"--backbone {name} carries no segmentation head: {error}") from error
            raise UserError(
                f"--backbone {name} does not take {image_size[0]}x{image_size[1]} images with {channels} "
                f"channel{'s' if channels > 1 else ''}: {one_line(error)[:200]}"
            ) from error
    if output_stride is None and (not isinstance(output, Tensor) or output.shape != (1, classes)):
        raise UserError(f"--backbone {name} is no classifier: its output is not one row of {classes} logits.")
    return net.train()


def _stages(net: nn.Module) -> list[str]:
    """Names of the modules timm takes features from, in order."""
    info = getattr(net, "feature_info", None)
    entries = info if isinstance(info, list) else getattr(info, "info", None) or []
    return [entry["module"] for entry in entries if isinstance(entry, dict) and "module" in entry]


def _size(place: Place) -> int:
    """Positions in a place's output."""
    if place.layout == "tokens":
        return place.shape[0]
    height, width = place.shape[1:] if place.layout == "map" else place.shape[:2]
    return height * width if min(height, width) >= SMALLEST_MAP else min(height * width, SMALLEST_MAP**2 - 1)


def choose_places(net: nn.Module, sample: Tensor, at: Sequence[str]) -> tuple[str, ...]:
    """Names of the places patterns mean; without patterns the deepest stage whose map is at least 7x7.

    Raises:
        UserError: A pattern matches nothing; the message lists the places with their shapes.
    """
    places = find_places(net, sample)
    if at:
        try:
            probe = insert(net, lambda channels: nn.Identity(), at=list(at), sample=sample)
        except ValueError as error:
            raise UserError(f"--at: {str(error).removeprefix('insert: ')}") from error
        names = tuple(place.name for place in probe.places)
        probe.remove()
        return names
    stages = [places[name] for name in _stages(net) if name in places] or list(places.values())
    wide = [place for place in stages if _size(place) >= SMALLEST_MAP**2]
    if not wide:  # small images: the deepest of the largest maps
        largest = max(map(_size, stages))
        wide = [place for place in stages if _size(place) == largest]
    return (wide[-1].name,)


def build_arm(
    net: nn.Module,
    arm: Arm,
    *,
    at: Sequence[str],
    sample: Tensor,
    seed: int,
    control: Sequence[int] = (),
) -> Insertion | None:
    """Turn a plain backbone into an arm, in place.

    Args:
        net: The backbone.
        arm: What to make of it.
        at: Names of the places.
        sample: A batch of images.
        seed: Initialises the blocks, from a stream of their own.
        control: Hidden channels of the control: one for each place, or of the branch beside a segmentation head.

    Returns:
        The record of the insertion; None where nothing is inserted.

    Raises:
        ValueError: The block does not fit one of the places.
    """
    if arm.kind == "plain":
        return None
    if arm.kind == "control" and isinstance(net, models.Segmenter):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(BLOCK_SEED + seed)
            net.head = Widened(net.head, head_channels(net), control[0], net.num_classes).train(net.training)
        return None
    block: str | Callable[[int], nn.Module] = arm.name
    if arm.kind == "control":
        widths = iter(control)  # `insert` builds in the order of the places

        def block(channels: int) -> nn.Module:
            return Control(channels, next(widths))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BLOCK_SEED + seed)
        return insert(net, block, at=list(at), sample=sample)
