"""Example images and what each arm attended to, as small pictures the page lays over one another."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image

from visattn.compare.reading import Arm, Examples

__all__ = ["SHOWN", "Attended", "Picture", "attended", "picture_of", "pictures", "source_of"]

SHOWN = 6  # images per arm
PLACES = 3  # places per arm, spread over those that were captured
_SIDE = 128  # longest side of an embedded image
_CHANNELS = 64  # longest side of an embedded channel picture

_TITLES = {
    "position": "where the query position (cross) looks",
    "slot": "where the most concentrated memory slot looks",
    "branch": "mean weight per branch (line: equal shares)",
    "channel": "which channels count",
}
_WARM = (255, 96, 0)  # heat: orange, over grey as over colour, also for colour-blind readers


@dataclass(frozen=True)
class Picture:
    """One image: its identity on the page (images shared by arms are embedded once) and its source."""

    key: str
    source: str
    width: int
    height: int


@dataclass(frozen=True)
class Cell:
    """What one arm made of one image, for one kind of attention."""

    kind: str
    source: str
    bars: tuple[float, ...]
    caption: str
    description: str


@dataclass(frozen=True)
class Row:
    """The cells of one kind of attention at one place."""

    place: str
    title: str
    gate: float
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Attended:
    """Everything shown of one arm."""

    arm: Arm
    pictures: tuple[Picture, ...]
    truths: tuple[str, ...]
    answers: tuple[str, ...]  # empty for masks, which are shown side by side elsewhere
    right: tuple[bool, ...]
    query: tuple[float, float]
    rows: tuple[Row, ...]
    places: int
    hidden_places: int


def attended(arms: Sequence[Arm], classes: Sequence[str]) -> list[Attended]:
    """What each arm with examples made of its first images.

    Args:
        arms: The arms of the run.
        classes: Class names, by label.
    """
    shown = [
        _attended(arm, arm.examples, classes)
        for arm in arms
        if arm.examples is not None
        and len(arm.examples.labels)
        and (arm.examples.maps or arm.examples.labels.ndim == 1)
    ]
    return sorted(shown, key=lambda arm: bool(arm.rows))  # those with answers alone first


def pictures(shown: Sequence[Attended], more: Sequence[Picture] = ()) -> list[Picture]:
    """Each embedded image once."""
    every = [picture for arm in shown for picture in arm.pictures] + list(more)
    return list({picture.key: picture for picture in every}.values())


def _attended(arm: Arm, examples: Examples, classes: Sequence[str]) -> Attended:
    def name(label: int) -> str:
        return str(classes[label]) if 0 <= label < len(classes) else f"class {label}"

    places = list(dict.fromkeys(place for place, _ in examples.maps))
    chosen = places if len(places) <= PLACES else [places[0], places[len(places) // 2], places[-1]]
    gates = arm.trials[examples.seed].gates
    rows = [
        Row(
            place=place,
            title=_TITLES[kind] if kind != "channel" or maps.ndim == 2 else "how channels look at each other",
            gate=gates.get(place, math.nan),
            cells=tuple(_cell(kind, maps[index], place, maps) for index in range(min(SHOWN, len(maps)))),
        )
        for (place, kind), maps in sorted(examples.maps.items(), key=lambda item: places.index(item[0][0]))
        if place in chosen
    ]
    whole = examples.labels.ndim == 1
    labels = examples.labels[:SHOWN].tolist() if whole else []
    predictions = examples.predictions[:SHOWN].tolist() if whole else []
    return Attended(
        arm=arm,
        pictures=tuple(picture_of(image) for image in examples.images[:SHOWN]),
        truths=tuple(name(label) for label in labels) or ("what is in the mask",) * len(examples.images[:SHOWN]),
        answers=tuple(name(prediction) for prediction in predictions),
        right=tuple(label == prediction for label, prediction in zip(labels, predictions, strict=True)),
        query=examples.query,
        rows=tuple(rows),
        places=len(places),
        hidden_places=len(places) - len(chosen),
    )


def _cell(kind: str, values: npt.NDArray[Any], place: str, all_maps: npt.NDArray[Any]) -> Cell:
    if not np.isfinite(values).all():
        return Cell("text", "", (), "not a number", f"{place}: not a number")
    if kind == "branch":
        shares = tuple(float(value) for value in values)
        top = max(2 / len(shares), float(np.nanmax(all_maps)))
        text = ", ".join(f"branch {index + 1} {share:.2f}" for index, share in enumerate(shares))
        return Cell(kind, "", tuple(max(0.0, share) / top for share in (*shares, 1 / len(shares))), "", text)
    low, high, mean = float(values.min()), float(values.max()), float(values.mean())
    if kind == "channel":
        span = f"{_weight(low)} to {_weight(high)}"
        return Cell("gates" if values.ndim == 1 else kind, _channel(values), (), span, f"weights from {span}")
    peak = high / mean if mean > 0 else math.nan
    caption = f"peak {peak:.1f}x" if math.isfinite(peak) else ""
    return Cell(kind, _heat(values), (), caption, f"peak {peak:.1f} times the mean weight")


def _weight(value: float) -> str:
    return "0" if abs(value) < 1e-4 else f"{value:.{1 if abs(value) < 0.01 else 2}g}"


def picture_of(image: npt.NDArray[np.uint8]) -> Picture:
    """An image as the page embeds it."""
    picture = Image.fromarray(image)
    picture.thumbnail((_SIDE, _SIDE))
    digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()[:12]
    return Picture(f"image-{digest}", source_of(picture), picture.width, picture.height)


def _heat(weights: npt.NDArray[Any]) -> str:
    """Weights above the mean as an overlay; full strength is the peak, or twice the mean where the map is flatter."""
    mean = float(weights.mean())
    strength = np.clip((weights - mean) / max(float(weights.max()) - mean, abs(mean), 1e-30), 0, 1)
    pixels = np.empty((*weights.shape, 4), np.uint8)
    pixels[..., :3] = _WARM
    pixels[..., 3] = np.round(230 * strength).astype(np.uint8)
    overlay = Image.fromarray(pixels)
    overlay.thumbnail((_SIDE, _SIDE))
    return source_of(overlay)


def _channel(weights: npt.NDArray[Any]) -> str:
    weights = weights[None] if weights.ndim == 1 else weights
    span = float(weights.max() - weights.min())
    scaled = (weights - weights.min()) / span if span > 0 else np.zeros_like(weights)
    for axis in (0, 1):
        if scaled.shape[axis] > _CHANNELS:
            starts = np.linspace(0, scaled.shape[axis], _CHANNELS, endpoint=False).astype(int)
            counts = np.diff(np.append(starts, scaled.shape[axis]))
            shape = (-1, 1) if axis == 0 else (1, -1)
            scaled = np.add.reduceat(scaled, starts, axis=axis) / counts.reshape(shape)
    colours = mpl.colormaps["cividis"](scaled)[..., :3]
    return source_of(Image.fromarray(np.round(255 * colours).astype(np.uint8)))


def source_of(image: Image.Image) -> str:
    """A picture as the page holds it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
