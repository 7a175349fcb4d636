"""What each arm of a segmentation made of the same images, beside the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from visattn.colours import hex_code, indexed, palette
from visattn.compare.attended import SHOWN, Picture, picture_of, source_of
from visattn.compare.classes import class_names
from visattn.compare.reading import Arm, Run
from visattn.tasks import IGNORED

__all__ = ["Predicted", "predicted"]


@dataclass(frozen=True)
class Strip:
    """A row of masks: whose they are and, under each, how well it covers the truth."""

    arm: Arm | None
    sources: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Predicted:
    """The same images and their masks, true and predicted.

    Attributes:
        pictures: The images.
        truths: What is in each, in words.
        strips: The truth, then each arm with examples.
        legend: Names and colours of the classes in the masks, with ignored pixels where there are any.
        seed: Whose trials they are of.
    """

    pictures: tuple[Picture, ...]
    truths: tuple[str, ...]
    strips: tuple[Strip, ...]
    legend: tuple[tuple[str, str], ...]
    seed: int


def predicted(run: Run) -> Predicted | None:
    """The masks of all arms that have some of the same images; None where there are none."""
    arms = [(arm, arm.examples) for arm in run.arms if arm.examples is not None and arm.examples.labels.ndim == 3]
    if not arms:
        return None
    first = arms[0][1]
    same = [
        (arm, examples)
        for arm, examples in arms
        if examples.images.shape == first.images.shape and (examples.images == first.images).all()
    ]
    classes = class_names(run)
    truth = first.labels[:SHOWN]
    masks = [examples.predictions[:SHOWN] for _, examples in same]
    used = sorted({int(value) for some in (truth, *masks) for value in np.unique(some)})
    colours = palette(len(classes))

    def name(label: int) -> str:
        return "ignored" if label == IGNORED else classes[label] if label < len(classes) else f"class {label}"

    def sources(some: npt.NDArray[Any]) -> tuple[str, ...]:
        return tuple(source_of(indexed(mask, len(classes))) for mask in some)

    strips = [Strip(None, sources(truth), ("",) * len(truth))]
    for (arm, _), some in zip(same, masks, strict=True):
        captions = tuple(_caption(mask, true) for mask, true in zip(some, truth, strict=True))
        strips.append(Strip(arm, sources(some), captions))
    return Predicted(
        pictures=tuple(picture_of(image) for image in first.images[:SHOWN]),
        truths=tuple(", ".join(name(int(label)) for label in np.unique(mask)) for mask in truth),
        strips=tuple(strips),
        legend=tuple((name(label), hex_code(colours[label])) for label in used),
        seed=first.seed,
    )


def _caption(mask: npt.NDArray[Any], truth: npt.NDArray[Any]) -> str:
    """MIoU on one image."""
    known = truth != IGNORED
    shares = []
    for label in np.union1d(mask[known], truth[known]):
        ours, true = (mask == label) & known, (truth == label) & known
        shares.append((ours & true).sum() / (ours | true).sum())
    return f"{100 * float(np.mean(shares)):.0f}%" if shares else ""
